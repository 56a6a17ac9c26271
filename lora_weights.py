"""The LoRA: put on the networks that train, written as diffusers and as kohya's programs name it, merged for drawing.

`Networks` are called as diffusers calls them: `unet`, `text_encoder`, `text_encoder_2`.
"""

import json
import re
import time
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from config import Config, UserError
from data_utils import write_atomically

LORA_FILE = "pytorch_lora_weights.safetensors"  # the name diffusers looks for
# Every attention of each network.
_UNET_TARGETS, _TEXT_TARGETS = ("to_q", "to_k", "to_v", "to_out.0"), ("q_proj", "k_proj", "v_proj", "out_proj")
_KOHYA_PREFIX = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
_LAYERS_PER_BLOCK = 2  # of SDXL's UNet; the demo's has 1

Networks = dict[str, torch.nn.Module]


def add_lora(networks: Networks, config: Config) -> dict[str, torch.nn.Parameter]:
    """Put a new LoRA, initially without effect, on the attention of every network.

    Returns:
        Its weights by name, the network's before a dot: the only ones that train, in fp32, since at usual learning
        rates most updates of bf16 weights would round to nothing.
    """
    weights: dict[str, torch.nn.Parameter] = {}
    for name, network in networks.items():
        network.add_adapter(  # type: ignore[operator]
            LoraConfig(
                r=config.rank,
                lora_alpha=config.alpha,
                lora_dropout=config.lora_dropout,
                init_lora_weights="gaussian",
                target_modules=list(_UNET_TARGETS if name == "unet" else _TEXT_TARGETS),
            )
        )
        weights |= {f"{name}.{part}": weight for part, weight in network.named_parameters() if weight.requires_grad}
    for weight in weights.values():
        weight.data = weight.data.float()
    return weights


def lora_state(networks: Networks, scale: float = 1.0) -> dict[str, Tensor]:
    """The LoRA as diffusers names it, on the CPU, in fp32.

    Args:
        scale: folded in; alpha / rank for a file, since plain loaders take alpha for the rank.
    """
    state = {}
    for name, network in networks.items():
        for key, weight in get_peft_model_state_dict(network).items():
            # transformers 5.6 took the level `text_model` out of one of the encoders; files keep it.
            path = key if name == "unet" or key.startswith("text_model.") else f"text_model.{key}"
            state[f"{name}.{path}"] = (weight.detach().float().cpu() * (scale if "lora_B" in key else 1)).contiguous()
    return state


def kohya_state(state: dict[str, Tensor], alpha: float, layers_per_block: int = _LAYERS_PER_BLOCK) -> dict[str, Tensor]:
    """`lora_state` as kohya's sd-scripts name it, for ComfyUI, A1111 and InvokeAI: scaled by alpha / rank there."""
    named = {}
    for key, weight in state.items():
        module, _, matrix = key.removesuffix(".weight").rpartition(".")
        name = kohya_name(module, layers_per_block)
        named[f"{name}.{'lora_down' if matrix == 'lora_A' else 'lora_up'}.weight"] = weight
        named[f"{name}.alpha"] = torch.tensor(alpha)
    return named


def kohya_name(module: str, layers_per_block: int = _LAYERS_PER_BLOCK) -> str:
    """`unet.down_blocks.1.attentions.0.proj` is `lora_unet_input_blocks_4_1_proj`, as SDXL's own code."""
    network, _, path = module.partition(".")
    if block := re.match(r"(down|up)_blocks\.(\d)\.attentions\.(\d)\.", path):
        side, level, place = block[1], int(block[2]), int(block[3])
        # Going down, the first block is the input convolution, and each level ends in a block that halves the size.
        number = level * (layers_per_block + 1) + place + (side == "down")
        path = f"{'input' if side == 'down' else 'output'}_blocks.{number}.1.{path[block.end() :]}"
    path = path.replace("mid_block.attentions.0.", "middle_block.1.")
    return f"{_KOHYA_PREFIX[network]}_{path.replace('.', '_')}"


def kohya_metadata(
    config: Config, alpha: float, steps: int, job: dict[str, Any], prediction_type: str
) -> dict[str, str]:
    """What those programs show of a LoRA: base model, size, captions. Keys and values as sd-scripts write them."""
    name, captions, side = config.lora_name, list(job["captions"].values()), config.resolution
    tags = Counter(tag for caption in captions for part in caption.split(",") if (tag := part.strip().lower()))
    model = str(job["learns"].get("pretrained_model", config.pretrained_model))
    buckets = {"0": {"resolution": [side, side], "count": len(captions)}}
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": name,
        "modelspec.date": datetime.now().isoformat(timespec="seconds"),
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.prediction_type": "v" if prediction_type == "v_prediction" else "epsilon",
        "modelspec.trigger_phrase": trigger_words(config.instance_prompt),
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_v2": "False",
        "ss_sd_model_name": model if re.fullmatch(r"[\w-]+/[\w.-]+", model) else Path(model).name,  # no one's folders
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(config.rank),
        "ss_network_alpha": str(alpha),
        "ss_resolution": f"({side}, {side})",
        "ss_output_name": name,
        "ss_training_started_at": str(time.time()),
        "ss_steps": str(steps),
        "ss_max_train_steps": str(config.max_train_steps),
        "ss_learning_rate": str(config.learning_rate),
        "ss_lr_scheduler": config.lr_scheduler,
        "ss_optimizer": config.optimizer,
        "ss_seed": str(config.seed),
        "ss_num_train_images": str(len(captions)),
        "ss_batch_size_per_device": str(config.train_batch_size),
        "ss_gradient_accumulation_steps": str(config.gradient_accumulation_steps),
        "ss_bucket_info": json.dumps({"buckets": buckets, "mean_img_ar_error": 0.0}),
        "ss_dataset_dirs": json.dumps({f"1_{name}": {"n_repeats": 1, "img_count": len(captions)}}),
        "ss_tag_frequency": json.dumps({f"1_{name}": tags}, ensure_ascii=False),
    }


def trigger_words(instance_prompt: str) -> str:
    """The tokens in angle brackets that call the style up, or the whole prompt where there are none."""
    return ", ".join(dict.fromkeys(re.findall(r"<[^<>\s]+>", instance_prompt))) or instance_prompt


def save_results(
    config: Config, state: dict[str, Tensor], alpha: float, steps: int, job: dict[str, Any],
    layers_per_block: int = _LAYERS_PER_BLOCK, prediction_type: str = "epsilon",
) -> Path:  # fmt: skip
    """Write a finished LoRA, as `lora_state` gives it, for diffusers and for kohya's programs; returns the first file.

    That one comes last, since it is what says that the run is finished.
    """
    folder = Path(config.lora_output_dir)
    # A1111 and InvokeAI read the trigger words from here alone.
    card = {"description": config.instance_prompt, "sd version": "SDXL", "preferred weight": 1.0}
    card |= {"activation text": trigger_words(config.instance_prompt)}
    write_atomically(folder / f"{config.lora_name}.json", json.dumps(card, indent=2, ensure_ascii=False).encode())
    metadata = kohya_metadata(config, alpha, steps, job, prediction_type)
    save_lora(folder / f"{config.lora_name}.safetensors", kohya_state(state, alpha, layers_per_block), metadata)
    scale = alpha / config.rank
    folded = {key: weight * scale if "lora_B" in key else weight for key, weight in state.items()}
    save_lora(folder / LORA_FILE, folded, {"step": str(steps), "learns": json.dumps(job["learns"])})
    return folder / LORA_FILE


def save_lora(path: Path, state: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a LoRA file; its name never stands for half of it."""
    # Not save_file: it has temporary names and errors of its own, which hide a full disk.
    write_atomically(path, save(state, metadata={"format": "pt", **metadata}))


def read_lora(path: Path) -> dict[str, Tensor]:
    """A LoRA file in fp32; what diffusers' own scripts wrote, under the names of `lora_state`."""
    old = {".lora.down.": ".lora_A.", ".lora.up.": ".lora_B."}
    old |= {".lora_linear_layer.down.": ".lora_A.", ".lora_linear_layer.up.": ".lora_B."}
    state = {}
    for key, weight in load_file(path).items():
        for theirs, ours in old.items():
            key = key.replace(theirs, ours)
        state[re.sub(r"^(text_encoder(?:_2)?)\.encoder\.", r"\1.text_model.encoder.", key)] = weight.float()
    return state


def merge_lora(networks: Networks, path: Path, scale: float) -> None:
    """Load a LoRA file and add `scale` times its product to the networks' weights: no cost per step after that.

    diffusers' and kohya's keys are understood. A network that the file has nothing for is left alone, but the UNet.

    Raises:
        UserError: not safetensors, not a LoRA for this model, or of other shapes.
    """
    if scale == 0:
        return
    try:
        weights = read_lora(path)
        for name, network in networks.items():
            _merge(network, name, weights, scale)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        advice = "check lora_path and pretrained_model"
        raise UserError(f"{path} is not a LoRA for this model ({reason}): {advice}") from error


@torch.no_grad()
def _merge(network: Any, name: str, weights: dict[str, Tensor], scale: float) -> None:
    own = {key: value for key, value in weights.items() if key.startswith((f"{name}.", f"{_KOHYA_PREFIX[name]}_"))}
    if name == "unet" and not own:
        raise ValueError("it has no weights for the UNet")
    layers_per_block = getattr(network.config, "layers_per_block", _LAYERS_PER_BLOCK)
    products, left = [], set(own)
    for path, layer in network.named_modules():
        ours = f"{name}.{path}" if name == "unet" or path.startswith("text_model.") else f"{name}.text_model.{path}"
        theirs = kohya_name(ours, layers_per_block)
        for down, up, alpha in (
            (f"{ours}.lora_A.weight", f"{ours}.lora_B.weight", ""),
            (f"{theirs}.lora_down.weight", f"{theirs}.lora_up.weight", f"{theirs}.alpha"),
        ):
            if down in own and isinstance(layer, torch.nn.Linear):
                strength = float(own[alpha]) / len(own[down]) if alpha in own else 1.0
                products.append((layer.weight, scale * strength, own[up], own[down]))
                left -= {down, up, alpha}
    if not left:
        for weight, strength, *factors in products:
            up_matrix, down_matrix = (factor.to(weight.device) for factor in factors)
            weight += (strength * (up_matrix @ down_matrix)).to(weight.dtype)
    elif name == "unet":
        _merge_through_peft(network, own, scale)
    else:  # diffusers' loader does not find an encoder's layers with Colab's versions, see `lora_state`
        raise ValueError(f"it has weights for layers that the model does not have, such as {min(left)}")


def _merge_through_peft(unet: Any, own: dict[str, Tensor], scale: float) -> None:
    """Convolutions, DoRA, other programs' names and what else diffusers understands; takes seconds."""
    if any(key.endswith(".dora_scale") for key in own):  # it would be left out, and the pictures be of another style
        raise ValueError("it is a DoRA by kohya's names")
    state, alphas = StableDiffusionXLPipeline.lora_state_dict(own, unet_config=unet.config)
    unet.load_lora_adapter(state, network_alphas=alphas, prefix="unet", adapter_name="lora")
    unet.fuse_lora(lora_scale=scale)
    unet.unload_lora()
