"""SDXL's parts, each loaded alone and in the right dtype, so that no two big models are in memory at once."""

import ctypes
import gc
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub
import torch
import transformers
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from lace_lora.config import Config
from lace_lora.errors import UserError, explain, first_line
from lace_lora.sdxl import hub

_IN_ONE_FILE = {"text_encoder": "0.transformer.", "text_encoder_2": "1.model."}
# What libraries raise when the content of a config or of weights makes no sense.
BAD_CONTENT = (
    ValueError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError, ImportError, RuntimeError,
)  # fmt: skip
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # options of glibc's mallopt


def prepare_process() -> None:
    """For entry points to call before they use a model: quiet libraries, and on a CPU a faster malloc."""
    # The libraries' warnings concern their internals, and their progress bars single files; users need neither.
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.enable_progress_bars()  # transformers turns these off too, and downloads are long
    # Let glibc keep up to half a GiB of free memory and serve large blocks from it too: asking the system for every
    # tensor's can take as long as the arithmetic. 30 steps of the demo took 14.5 s with this, 21.3 s without.
    if sys.platform == "linux" and not torch.cuda.is_available():
        with suppress(AttributeError):  # of another C library
            for option, value in ((_MMAP_THRESHOLD, 2**25), (_TRIM_THRESHOLD, 2**29), (_TOP_PAD, 2**26)):
                ctypes.CDLL(None).mallopt(option, value)


def pick_device(setting: str = "auto") -> torch.device:
    if setting == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def pick_dtype(mixed_precision: str, device: torch.device) -> torch.dtype:
    """The dtype of the frozen weights.

    Raises:
        UserError: the device does not support the dtype that was asked for.
    """
    # By capability: torch.cuda.is_bf16_supported() says yes on a T4, which only emulates it.
    has_bf16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if mixed_precision == "auto":
        mixed_precision = "no" if device.type != "cuda" else "bf16" if has_bf16 else "fp16"
    if mixed_precision == "bf16" and device.type == "cuda" and not has_bf16:
        name = torch.cuda.get_device_name(device)
        raise UserError(f"mixed_precision is bf16, which {name} does not support: use fp16 or auto")
    if mixed_precision == "fp16" and device.type == "cpu":
        raise UserError("mixed_precision is fp16, which needs a GPU: use no or auto")
    return {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[mixed_precision]


def load_unet(
    source: str, variant: str | None, device: torch.device, dtype: torch.dtype, attention: str = "auto"
) -> UNet2DConditionModel:
    """A UNet, frozen, with PyTorch's attention (`sdpa`, which `auto` chooses) or xformers'.

    Raises:
        UserError: see `load_part`; or xformers is asked for and is not installed, or does not work on this GPU.
    """
    unet = load_part(UNet2DConditionModel, source, "unet", variant, dtype, device)
    unet = unet.to(device).eval().requires_grad_(False)
    if attention == "xformers":
        try:
            unet.enable_xformers_memory_efficient_attention()
        except (ImportError, ValueError, RuntimeError, NotImplementedError) as error:
            advice = "install the xformers version built for your PyTorch, or set attention: auto"
            reason = first_line(error)
            raise UserError(f"attention is xformers, which cannot be used here ({reason}): {advice}") from error
    return unet


def layers_per_block(source: str) -> int:
    """A UNet's, without loading it."""
    return int(UNet2DConditionModel.load_config(source, subfolder="unet")["layers_per_block"])


def load_vae(config: Config, device: torch.device, dtype: torch.dtype, drawing: bool = False) -> AutoencoderKL:
    """The VAE in fp32, since SDXL's own overflows in fp16; `pretrained_vae` in `dtype`, unless it says the same.

    For `drawing`, bf16 will do: half the memory, and pictures that differ by half a level of 255 (the demo's).
    """
    source, subfolder = vae_source(config)
    in_dtype = config.pretrained_vae or drawing and dtype == torch.bfloat16
    vae = load_part(AutoencoderKL, source, subfolder, config.variant, dtype if in_dtype else torch.float32)
    if vae.dtype == torch.float16 and vae.config.force_upcast:
        vae = load_part(AutoencoderKL, source, subfolder, config.variant, torch.float32)
    return vae.to(device).eval().requires_grad_(False)


def vae_source(config: Config) -> tuple[str, str]:
    """The folder or file of the VAE, and its subfolder."""
    source = config.pretrained_vae or config.pretrained_model
    return source, hub.vae_subfolder(Path(source))


def load_noise_scheduler(config: Config, refiner: bool = False) -> DDPMScheduler:
    """The base's own noise schedule, betas and prediction type, or the refiner's, in the form used for training."""
    return load_part(DDPMScheduler, config.refiner_model if refiner else config.pretrained_model, "scheduler")


def load_part(
    part: Any,
    source: str,
    subfolder: str,
    variant: str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Any:
    """One part of a model in a folder in diffusers format, or in one file.

    Args:
        variant: which weight files to prefer; the default ones are used if there are none of these.
        dtype: of the weights, read from safetensors alone; None for parts without weights.
        device: where a UNet goes: to a GPU it is loaded without ever being completely in host memory.

    Raises:
        UserError: the folder or file does not exist, or cannot be loaded as this part.
    """
    options: dict[str, Any] = {}
    if dtype is not None:
        # transformers calls it dtype, diffusers torch_dtype.
        options = {"dtype" if issubclass(part, PreTrainedModel) else "torch_dtype": dtype}
        options |= {"use_safetensors": True, "output_loading_info": True}
        options["variant"] = variant if hub.weight_files(Path(source, subfolder), variant) else None
    try:
        if Path(source).is_file():
            loaded = _load_from_file(part, Path(source), subfolder, dtype)
        elif device and device.type == "cuda" and dtype is not None:
            loaded = load_in_chunks(part, Path(source, subfolder), options["variant"], dtype, device)
        else:
            loaded = part.from_pretrained(source, subfolder=subfolder, **options)
        missing, unexpected = [], []
        if isinstance(loaded, tuple):
            loaded, report = loaded
            missing, unexpected = (sorted(report[f"{kind}_keys"]) for kind in ("missing", "unexpected"))
        elif dtype is not None:
            missing = [name for name, weight in loaded.state_dict().items() if weight.is_meta]
        if missing:  # which libraries fill with random numbers
            raise ValueError(f"it has no weights for {missing[0]}")
        # Some files have these, and no model needs them.
        if extra := [name for name in unexpected if not name.endswith(("position_ids", "logit_scale"))]:
            raise ValueError(f"its config has no place for {extra[0]}, so that they do not belong together")
        return loaded
    except (SafetensorError, OSError, *BAD_CONTENT) as error:
        if isinstance(error, RuntimeError) and explain(error, ""):
            raise  # out of memory
        reason = " ".join(str(error).split())[:300]
    advice = "it must be an SDXL model: a folder in diffusers format or a .safetensors checkpoint"
    raise UserError(f"{Path(source, subfolder)} cannot be loaded ({reason}): {advice}")


def load_in_chunks(
    part: Any, folder: Path, variant: str | None, dtype: torch.dtype, device: torch.device
) -> tuple[Any, dict[str, list[str]]]:
    """A model of diffusers' on a device, with only part of its weights in host memory at any time.

    Also returns what is missing and unexpected, as `from_pretrained` does with `output_loading_info`.

    A drawing's peak host memory on an H100 is 3.5 GiB with it, and 7.2 GiB with diffusers' `device_map`.

    Raises:
        RuntimeError, SafetensorError, OSError: the weights do not exist, or do not match this model.
    """
    with torch.device("meta"):
        model = part.from_config(part.load_config(folder))

    def read(file: Path, names: list[str]) -> dict[str, Tensor]:
        with safe_open(file, framework="pt") as content:  # opened again each time: closing frees what was read
            return {name: content.get_tensor(name).to(device).to(dtype) for name in names}  # converted by the device

    weights: dict[str, Tensor] = {}
    with ThreadPoolExecutor(4) as pool:
        for file in hub.weight_files(folder, variant):
            with safe_open(file, framework="pt") as content:
                names = list(content.keys())
            for some in pool.map(partial(read, file), [names[n : n + 50] for n in range(0, len(names), 50)]):
                weights |= some
    result = model.load_state_dict(weights, strict=False, assign=True)
    return model, {"missing_keys": result.missing_keys, "unexpected_keys": result.unexpected_keys}


def _load_from_file(part: Any, file: Path, subfolder: str, dtype: torch.dtype | None) -> Any:
    """A part of a checkpoint that contains all weights of a model under their original names."""
    layout = str(hub.layout(file))
    if dtype is None:
        return part.from_pretrained(layout, subfolder=subfolder)
    if issubclass(part, PreTrainedModel):
        # from_single_file of the pipeline does this with the text encoders; transformers has no such method.
        prefix = f"conditioner.embedders.{_IN_ONE_FILE[subfolder]}"
        with safe_open(file, framework="pt") as content:
            names = list(content.keys())
            weights = {name: content.get_tensor(name) for name in names if name.startswith(prefix)}
        return create_diffusers_clip_model_from_ldm(part, weights, subfolder, layout, dtype, local_files_only=True)
    # Not the path: diffusers would open a file with any suffix but .safetensors in small letters as a pickle.
    return part.from_single_file(load_file(file), config=layout, subfolder=subfolder, torch_dtype=dtype)


def free(device: torch.device) -> None:
    """Return the memory of models that are no longer referenced to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak_memory(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    return f"peak: {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB of GPU memory"
