"""The LoRA: put on the networks that train, written as diffusers and as kohya's programs name it, merged for drawing.

`Networks` are called as diffusers calls them: `unet`, `text_encoder`, `text_encoder_2`.
"""

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import convert_unet_state_dict_to_peft
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lace_lora import errors
from lace_lora.config import Config
from lace_lora.errors import UserError
from lace_lora.files import write_atomically

# Every attention of each network.
_UNET_TARGETS, _TEXT_TARGETS = ("to_q", "to_k", "to_v", "to_out.0"), ("q_proj", "k_proj", "v_proj", "out_proj")
_KOHYA_PREFIX = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
_LAYERS_PER_BLOCK = 2  # of SDXL's UNet; the demo's has 1
# Of the UNet's layers outside of attention, what SDXL's own code calls them, and kohya's programs after it.
_ORIGINAL_NAMES = {
    "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2", "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2", "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2", "conv_in": "input_blocks.0.0", "conv_out": "out.2",
    ".conv1": ".in_layers.2", ".time_emb_proj": ".emb_layers.1", ".conv2": ".out_layers.3",
    ".conv_shortcut": ".skip_connection",
}  # fmt: skip

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
    if network == "unet":
        path = _original_path(path, layers_per_block)
    return f"{_KOHYA_PREFIX[network]}_{path.replace('.', '_')}"


def _original_path(path: str, layers_per_block: int) -> str:
    if block := re.match(r"(down|up)_blocks\.(\d)\.(attention|resnet|downsampler|upsampler)s\.(\d)\.(.*)", path):
        side, level, kind, place, rest = block[1], int(block[2]), block[3], int(block[4]), block[5]
        # Going down, the first block is the input convolution, and each level ends in a block that halves the size.
        number = level * (layers_per_block + 1) + (side == "down")
        number += layers_per_block if kind.endswith("sampler") else place
        within = {"resnet": 0, "attention": 1, "downsampler": 0, "upsampler": 2}[kind]
        rest = "op" if kind == "downsampler" else rest
        path = f"{'input' if side == 'down' else 'output'}_blocks.{number}.{within}.{rest}"
    for ours, original in _ORIGINAL_NAMES.items():
        path = path.replace(ours, original)
    return path


def save_lora(path: Path, state: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a LoRA file; its name never stands for half of it."""
    # Not save_file: it has temporary names and errors of its own, which hide a full disk.
    write_atomically(path, save(state, metadata={"format": "pt", **metadata}))


def read_lora(path: Path) -> dict[str, Tensor]:
    """A LoRA file in fp32; what diffusers' own scripts wrote, under the names of `lora_state`.

    Strengths that such a file notes in its metadata become an `alpha` beside each layer's matrices, as kohya has it.
    """
    with safe_open(path, framework="pt") as file:
        noted = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
        keys = list(file.keys())
        as_it_is = {key: file.get_tensor(key).float() for key in keys}
    weights = {_our_name(key): weight for key, weight in convert_unet_state_dict_to_peft(as_it_is).items()}
    for key in [key for key in weights if key.endswith(".lora_A.weight")]:
        layer, rank = key.removesuffix(".lora_A.weight"), len(weights[key])
        alpha = _noted_alpha(noted, layer, rank)
        if alpha is not None and alpha != rank:
            weights[f"{layer}.alpha"] = torch.tensor(alpha)
    return weights


def _our_name(key: str) -> str:
    key = key.replace(".lora_linear_layer.down.", ".lora_A.").replace(".lora_linear_layer.up.", ".lora_B.")
    key = key.replace(".lora_magnitude_vector.weight", ".lora_magnitude_vector")
    return re.sub(r"^(text_encoder(?:_2)?)\.encoder\.", r"\1.text_model.encoder.", key)


def _noted_alpha(noted: dict[str, Any], layer: str, rank: int) -> float | None:
    """peft's alpha for a layer: the one of its pattern, or of all; with rsLoRA it counts by the root of the rank."""
    network, _, path = layer.partition(".")
    patterns = noted.get(f"{network}.alpha_pattern") or {}
    own = (alpha for pattern, alpha in patterns.items() if re.fullmatch(rf"(.*\.)?({pattern})", path))
    alpha = next(own, noted.get(f"{network}.lora_alpha"))
    return alpha if alpha is None else alpha * rank**0.5 if noted.get(f"{network}.use_rslora") else alpha


def merge_lora(networks: Networks, path: Path, scale: float) -> None:
    """Load a LoRA file and add `scale` times its product to the networks' weights: no cost per step after that.

    diffusers' and kohya's keys are understood, on any linear layer or convolution, with DoRA by peft's name for it. A
    network that the file has nothing for is left alone, but the UNet; nothing is merged in part.

    Raises:
        UserError: not safetensors, not a LoRA for this model, or of other shapes. Errors of the disk and of memory go
            on as they are.
    """
    if scale == 0:
        return
    try:
        weights = read_lora(path)
        of = {name: (f"{name}.", f"{prefix}_") for name, prefix in _KOHYA_PREFIX.items()}
        _refuse([key for key in weights if not key.startswith(sum(of.values(), ()))])
        if not any(key.startswith(of["unet"]) for key in weights):
            raise ValueError("it has no weights for the UNet")
        for name, network in networks.items():
            _merge(network, name, {key: value for key, value in weights.items() if key.startswith(of[name])}, scale)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        if errors.explain(error, ""):
            raise
        reason = str(error).strip().split("\n")[0][:200]
        advice = "check lora_path and pretrained_model"
        raise UserError(f"{path} is not a LoRA for this model ({reason}): {advice}") from error


def _refuse(left: Collection[str]) -> None:
    if left:
        raise ValueError(f"it has weights of another model, or of another kind than LoRA, such as {min(left)}")


@torch.no_grad()
def _merge(network: Any, name: str, own: dict[str, Tensor], scale: float) -> None:
    layers_per_block = getattr(network.config, "layers_per_block", _LAYERS_PER_BLOCK)
    changes: list[tuple[Tensor, Tensor, Tensor, float, Tensor | None]] = []
    for path, layer in network.named_modules():
        in_file = path if name == "unet" or re.match("text_model|text_projection", path) else f"text_model.{path}"
        ours = f"{name}.{in_file}"
        for theirs, down, up in (
            (ours, "lora_A", "lora_B"),
            (kohya_name(ours, layers_per_block), "lora_down", "lora_up"),
            (f"{_KOHYA_PREFIX[name]}_{in_file.replace('.', '_')}", "lora_down", "lora_up"),
        ):
            if f"{theirs}.{down}.weight" in own:
                up_matrix, down_matrix = own.pop(f"{theirs}.{up}.weight"), own.pop(f"{theirs}.{down}.weight")
                rank = len(down_matrix)
                strength = float(own.pop(f"{theirs}.alpha", rank)) / rank
                magnitude = own.pop(f"{theirs}.lora_magnitude_vector", None)
                changes.append((layer.weight, up_matrix, down_matrix, scale * strength, magnitude))
    _refuse(own)
    for change in changes:
        _add(*change)


def _add(weight: Tensor, up: Tensor, down: Tensor, scale: float, magnitude: Tensor | None) -> None:
    """Add the product of (out, rank, …) and (rank, in, …) to (out, in, …), in fp32; with DoRA, lengths are then set.

    Liu et al. 2024, "DoRA", equation 5: `magnitude` is the length of the weights of each output.
    """
    up, down = (matrix.to(weight.device).flatten(1) for matrix in (up, down))
    merged = torch.addmm(weight.flatten(1).float(), up, down, alpha=scale)
    if magnitude is not None:
        merged *= (magnitude.to(weight.device).flatten() / merged.norm(dim=1))[:, None]
    weight.copy_(merged.view_as(weight))
