"""SDXL's parts: loading each alone in the right number format; prompts to embeddings; adding, saving, merging a LoRA.

Nothing here loads more than it is asked for, so that no two big models need be in memory at once.
"""

import logging
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, PreTrainedModel

from config import Config, UserError
from data_utils import write_atomically

logger = logging.getLogger(__name__)

LORA_FILE = "pytorch_lora_weights.safetensors"  # the name diffusers looks for
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")  # every attention of the UNet
GIB = 2**30

# Their warnings are about their own matters, and their bars about single files; ours tell what the user needs.
diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def pick_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def pick_dtype(mixed_precision: str, device: torch.device) -> torch.dtype:
    """The number format of the frozen weights.

    Raises:
        UserError: the device cannot calculate in the format that was asked for.
    """
    # By capability: torch.cuda.is_bf16_supported() says yes on a T4, which only emulates it.
    has_bf16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if mixed_precision == "auto":
        mixed_precision = "no" if device.type != "cuda" else "bf16" if has_bf16 else "fp16"
    if mixed_precision == "bf16" and device.type == "cuda" and not has_bf16:
        raise UserError(
            f"mixed_precision is bf16, which {torch.cuda.get_device_name(device)} does not have: use fp16 or auto"
        )
    if mixed_precision == "fp16" and device.type == "cpu":
        raise UserError("mixed_precision is fp16, which needs a GPU: use no or auto")
    return {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[mixed_precision]


def load_part(
    part: Any, source: str, subfolder: str, variant: str | None = None, dtype: torch.dtype | None = None
) -> Any:
    """`part.from_pretrained` of one subfolder of a hub repository or a local folder.

    Args:
        variant: which weight files to prefer; plain ones are taken where the repository has none of these.
        dtype: number format of the weights, read from safetensors alone; None for parts without weights.

    Raises:
        UserError: the folder, the repository or the file is not there, or is not what it should be.
    """
    options: dict[str, Any] = {}
    if dtype is not None:
        # transformers calls it dtype, diffusers torch_dtype.
        options = {"dtype" if issubclass(part, PreTrainedModel) else "torch_dtype": dtype, "use_safetensors": True}
    attempts: list[dict[str, Any]] = [{"variant": variant}, {}] if dtype is not None and variant else [{}]
    if Path(source).is_dir() and not any(Path(source, subfolder).glob(f"*.{variant}.*")):
        attempts = [{}]
    for attempt in attempts:
        try:
            return part.from_pretrained(source, subfolder=subfolder, **options, **attempt)
        except (OSError, ValueError, SafetensorError) as error:
            reason = str(error).strip().split("\n")[0]
    advice = "check the name, your connection, and whether the hub wants you to log in"
    if Path(source).exists():
        advice = "it must be a folder in diffusers' layout"
    raise UserError(f"{source}/{subfolder} cannot be loaded ({reason}): {advice}")


def load_tokenizers(source: str) -> list[CLIPTokenizer]:
    return [load_part(CLIPTokenizer, source, folder) for folder in ("tokenizer", "tokenizer_2")]


def load_text_encoders(config: Config, device: torch.device, dtype: torch.dtype) -> list[torch.nn.Module]:
    """Both text encoders, frozen: CLIP ViT-L, then OpenCLIP bigG, the one with the pooled projection."""
    parts = ((CLIPTextModel, "text_encoder"), (CLIPTextModelWithProjection, "text_encoder_2"))
    encoders = []
    for part, folder in parts:
        encoder = load_part(part, config.pretrained_model, folder, config.variant, dtype)
        encoders.append(encoder.to(device).eval().requires_grad_(False))
    return encoders


def load_unet(source: str, variant: str | None, device: torch.device, dtype: torch.dtype) -> UNet2DConditionModel:
    unet = load_part(UNet2DConditionModel, source, "unet", variant, dtype)
    return unet.to(device).eval().requires_grad_(False)


def load_vae(config: Config, device: torch.device) -> AutoencoderKL:
    """The VAE in fp32: SDXL's own overflows in fp16."""
    vae = load_part(AutoencoderKL, config.pretrained_model, "vae", config.variant, torch.float32)
    return vae.to(device).eval().requires_grad_(False)


def load_noise_scheduler(config: Config) -> DDPMScheduler:
    """The model's own noise schedule, betas and prediction type, in its training form."""
    return load_part(DDPMScheduler, config.pretrained_model, "scheduler")


def zeros_for_empty_prompt(source: str, default: bool) -> bool:
    """`force_zeros_for_empty_prompt` of the model's pipeline: whether no negative prompt means zeros, not \"\"."""
    try:
        return bool(DiffusionPipeline.load_config(source).get("force_zeros_for_empty_prompt", default))
    except OSError:
        return default


@torch.no_grad()
def encode_prompts(
    prompts: list[str], tokenizers: list[CLIPTokenizer], text_encoders: list[torch.nn.Module]
) -> tuple[Tensor, Tensor]:
    """Prompts as SDXL reads them: both encoders' penultimate hidden states, and the second one's pooled projection.

    With the second tokenizer and encoder alone, the embeddings are the refiner's. SDXL paper, section 2.1.

    Returns:
        prompt_embeds (n, 77, sum of hidden sizes) and pooled_prompt_embeds (n, projection size).
    """
    hidden_states = []
    for tokenizer, text_encoder in zip(tokenizers, text_encoders, strict=True):
        tokens = tokenizer(
            prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        )
        output = text_encoder(tokens.input_ids.to(text_encoder.device), output_hidden_states=True)
        hidden_states.append(output.hidden_states[-2])
    return torch.cat(hidden_states, dim=-1), output.text_embeds


def too_long(prompt: str, tokenizer: CLIPTokenizer) -> bool:
    """Whether the encoders see only the start of the prompt (77 tokens with start and end)."""
    return len(tokenizer(prompt).input_ids) > tokenizer.model_max_length


def add_lora(unet: UNet2DConditionModel, config: Config) -> dict[str, torch.nn.Parameter]:
    """Put a new LoRA, initially without effect, on every attention of the UNet.

    Returns:
        Its weights by name: the only ones that train, in fp32, since at usual learning rates most updates of bf16
        weights would round to nothing.
    """
    unet.add_adapter(
        LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.lora_dropout,
            init_lora_weights="gaussian",
            target_modules=list(LORA_TARGETS),
        )
    )
    weights = {name: parameter for name, parameter in unet.named_parameters() if parameter.requires_grad}
    for parameter in weights.values():
        parameter.data = parameter.data.float()
    return weights


def lora_state(unet: UNet2DConditionModel, scale: float) -> dict[str, Tensor]:
    """The LoRA as diffusers names it, `scale` (alpha / rank) folded in, since plain loaders take alpha for the rank."""
    state = {}
    for name, weight in get_peft_model_state_dict(unet).items():
        folded = weight.detach().float().cpu() * (scale if "lora_B" in name else 1.0)
        state[f"unet.{name}"] = folded.contiguous()
    return state


def save_lora(path: Path, state: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a LoRA file; its name never stands for half of it."""
    # Not save_file: it has temporary names and errors of its own, which hide a full disk.
    write_atomically(path, save(state, metadata={"format": "pt", **metadata}))


def merge_lora(unet: UNet2DConditionModel, path: Path, scale: float) -> None:
    """Load a LoRA file and add `scale` times its product to the UNet's weights: no cost per step after that.

    Raises:
        UserError: not safetensors, not a LoRA for this UNet, or of other shapes.
    """
    if scale == 0:
        return
    try:
        state, alphas = StableDiffusionXLPipeline.lora_state_dict(load_file(path), unet_config=unet.config)
        unet.load_lora_adapter(state, network_alphas=alphas, prefix="unet", adapter_name="lora")
        if not getattr(unet, "peft_config", None):
            raise ValueError("it has no weights for the UNet")
        unet.fuse_lora(lora_scale=scale)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        advice = "check lora_path and pretrained_model"
        raise UserError(f"{path} is not a LoRA for this model ({reason}): {advice}") from error
    unet.unload_lora()


def peak_memory(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    return f"{torch.cuda.max_memory_allocated(device) / GIB:.1f} GiB of GPU memory at the peak"
