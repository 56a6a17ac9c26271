"""The LoRA: added to the networks that train, saved for diffusers and kohya's programs, read and merged for drawing.

`Networks` have diffusers' names: `unet`, `text_encoder`, `text_encoder_2`.
"""

import json
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.utils import convert_unet_state_dict_to_peft
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lace_lora.config import Config
from lace_lora.errors import UserError, explain, first_line
from lace_lora.files import write_atomically
from lace_lora.sdxl.models import BAD_CONTENT

_MAX_ALPHA = 1e6
# The linears of a transformer block. sd-scripts also trains `proj_in` and `proj_out` around the blocks.
_ATTENTION, _FEED_FORWARD = ("to_q", "to_k", "to_v", "to_out.0"), ("ff.net.0.proj", "ff.net.2")
UNET_TARGETS = {"attention": _ATTENTION, "attention+feedforward": _ATTENTION + _FEED_FORWARD}
_TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")  # of every attention
_KOHYA_PREFIX = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
# The UNet's layers outside of attention, by diffusers' name and by that of SDXL's own code, which kohya's programs use.
_ORIGINAL_NAMES = {
    "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2", "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2", "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2", "conv_in": "input_blocks.0.0", "conv_out": "out.2",
    ".conv1": ".in_layers.2", ".time_emb_proj": ".emb_layers.1", ".conv2": ".out_layers.3",
    ".conv_shortcut": ".skip_connection",
}  # fmt: skip
# The prefixes of names in a LoRA file, by network, and their suffixes, by role in the layer.
_PREFIXES = {network: (f"{network}.", f"{prefix}_") for network, prefix in _KOHYA_PREFIX.items()}
_SUFFIXES = {
    ".lora_A.weight": "down", ".lora_B.weight": "up", ".lora_down.weight": "down", ".lora_up.weight": "up",
    ".alpha": "alpha", ".lora_magnitude_vector": "magnitude",
}  # fmt: skip

Networks = dict[str, torch.nn.Module]


def add_lora(networks: Networks, config: Config) -> dict[str, torch.nn.Parameter]:
    """Add a new LoRA, initially without effect, to the UNet's `lora_targets` and the text encoders' attention.

    Returns:
        Its weights by `network.parameter`: the only ones that train, in fp32, since at usual learning rates most
        updates of bf16 weights would round to nothing.
    """
    weights: dict[str, torch.nn.Parameter] = {}
    size = {"r": config.rank, "lora_alpha": config.alpha, "lora_dropout": config.lora_dropout}
    for name, network in networks.items():
        targets = list(UNET_TARGETS[config.lora_targets] if name == "unet" else _TEXT_TARGETS)
        adapter = LoraConfig(init_lora_weights="gaussian", target_modules=targets, **size)
        network.add_adapter(adapter)  # type: ignore[operator]
        weights |= {f"{name}.{part}": weight for part, weight in network.named_parameters() if weight.requires_grad}
    for weight in weights.values():
        weight.data = weight.data.float()
    return weights


def lora_state(networks: Networks, scale: float = 1.0) -> dict[str, Tensor]:
    """The LoRA under diffusers' names, on the CPU, in fp32, with `scale` folded into its weights.

    That is alpha / rank for a file, since plain loaders assume that alpha is the rank.
    """
    state = {}
    for name, network in networks.items():
        for key, weight in get_peft_model_state_dict(network).items():
            # transformers 5.6 removed the level `text_model` from one of the encoders; files keep it.
            path = key if name == "unet" or key.startswith("text_model.") else f"text_model.{key}"
            state[f"{name}.{path}"] = (weight.detach().float().cpu() * (scale if "lora_B" in key else 1)).contiguous()
    return state


def kohya_state(state: dict[str, Tensor], alpha: float, layers_per_block: int) -> dict[str, Tensor]:
    """`lora_state` under kohya's names, for ComfyUI, A1111 and InvokeAI, which scale by alpha / rank."""
    named = {}
    for key, weight in state.items():
        module, _, matrix = key.removesuffix(".weight").rpartition(".")
        name = kohya_name(module, layers_per_block)
        named[f"{name}.{'lora_down' if matrix == 'lora_A' else 'lora_up'}.weight"] = weight
        named[f"{name}.alpha"] = torch.tensor(alpha)
    return named


def kohya_name(module: str, layers_per_block: int) -> str:
    """kohya's name for a layer: `lora_unet_input_blocks_4_1_proj` for SDXL's `unet.down_blocks.1.attentions.0.proj`."""
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
    for diffusers_name, original in _ORIGINAL_NAMES.items():
        path = path.replace(diffusers_name, original)
    return path


def save_lora(path: Path, state: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a LoRA file atomically."""
    # Not save_file: it has temporary names and errors of its own, which hide a full disk.
    write_atomically(path, save(state, metadata={"format": "pt", **metadata}))


class LoraLayer(NamedTuple):
    """What a LoRA file has for one layer, to whose weights it adds alpha / rank * up @ down."""

    down: Tensor  # (rank, in, …)
    up: Tensor  # (out, rank, …)
    alpha: float
    magnitude: Tensor | None  # (out) values, with DoRA


class Lora(NamedTuple):
    """A LoRA file in memory, its layers by the name that it has for each: diffusers' or one of kohya's."""

    path: Path
    layers: dict[str, LoraLayer]


def read_lora(path: Path) -> Lora:
    """A LoRA file of diffusers, peft or kohya's programs, once; for `merge_lora(networks, read_lora(path), scale)`.

    Raises:
        UserError: not safetensors, or not a LoRA for SDXL. Disk and out-of-memory errors are passed on.
    """
    with _not_for_this_model(path):
        state, adapter = _read_file(path)
        layers: dict[str, dict[str, Tensor]] = {}
        unknown = []
        for key, value in state.items():
            end = next((end for end in _SUFFIXES if key.endswith(end)), "")
            layer, part = key.removesuffix(end), _SUFFIXES.get(end)
            if part and key.startswith(sum(_PREFIXES.values(), ())) and part not in layers.get(layer, {}):
                layers.setdefault(layer, {})[part] = value
            else:
                unknown.append(key)
        unknown += [layer for layer, own in layers.items() if not own.keys() >= {"down", "up"}]
        _refuse(unknown)
        if not any(layer.startswith(_PREFIXES["unet"]) for layer in layers):
            raise ValueError("it has no weights for the UNet")
        return Lora(path, {layer: _layer(layer, own, adapter) for layer, own in layers.items()})


def read_state(path: Path) -> dict[str, Tensor]:
    """A LoRA file that diffusers' own scripts wrote, in fp32, under the names of `lora_state`."""
    return {key: value.float() for key, value in _read_file(path)[0].items()}


def _read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors, other diffusers names changed to those of `lora_state`, and peft's settings if the file has them."""
    with safe_open(path, framework="pt") as file:
        adapter = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
        # Copied: a tensor that is still mapped when its disk is lost would end the process.
        tensors = {key: file.get_tensor(key).clone() for key in list(file.keys())}
    return {_our_name(key): value for key, value in convert_unet_state_dict_to_peft(tensors).items()}, adapter


def _our_name(key: str) -> str:
    key = key.replace(".lora_linear_layer.down.", ".lora_A.").replace(".lora_linear_layer.up.", ".lora_B.")
    key = key.replace(".lora_magnitude_vector.weight", ".lora_magnitude_vector")
    return re.sub(r"^(text_encoder(?:_2)?)\.encoder\.", r"\1.text_model.encoder.", key)


def _layer(name: str, own: dict[str, Tensor], adapter: dict[str, Any]) -> LoraLayer:
    """`adapter` has peft's alpha: by pattern of layers, or for all; with rsLoRA it is divided by the rank's root."""
    rank = _rank(name, own)
    network, _, path = name.partition(".")
    patterns = adapter.get(f"{network}.alpha_pattern") or {}
    matching = (alpha for pattern, alpha in patterns.items() if re.fullmatch(rf"(.*\.)?({pattern})", path))
    alpha = next(matching, adapter.get(f"{network}.lora_alpha"))
    if alpha is None:
        alpha = own.get("alpha", rank)
    elif adapter.get(f"{network}.use_rslora"):
        alpha *= rank**0.5
    alpha = float(torch.as_tensor(alpha).float())
    if not abs(alpha) < _MAX_ALPHA:  # NaN too
        raise ValueError(f"{name} has alpha {alpha:g}")
    return LoraLayer(own["down"], own["up"], alpha, own.get("magnitude"))


def _rank(name: str, own: dict[str, Tensor]) -> int:
    """A layer's rank, the size that its matrices have in common."""
    for part in own.keys() - {"alpha"}:
        if not own[part].is_floating_point() or not own[part].float().isfinite().all():
            raise ValueError(f"{name} has {part} weights that are not finite numbers")
    down, up = own["down"].shape, own["up"].shape
    if min(len(down), len(up)) < 2 or down[0] != up[1] or 0 in (*down, *up):
        raise ValueError(f"{name} has matrices of {list(down)} and {list(up)}, which do not make a LoRA")
    return down[0]


def merge_lora(networks: Networks, lora: Lora, scale: float) -> None:
    """Add `scale` times a LoRA to the networks' weights: no cost per step after that.

    A network without weights in the LoRA is left unchanged. All layers of each are matched before any is merged.

    Raises:
        UserError: the LoRA's layers or shapes do not match the network's. Out-of-memory errors are passed on.
    """
    if scale == 0:
        return
    with _not_for_this_model(lora.path):
        for name, network in networks.items():
            left = {layer: own for layer, own in lora.layers.items() if layer.startswith(_PREFIXES[name])}
            found = [(module, left.pop(layer)) for layer, module in _by_name(network, name).items() if layer in left]
            _refuse(left)
            for module, own in found:
                _add(module.weight, own, scale)


@torch.no_grad()
def begin_from(networks: Networks, lora: Lora, alpha: float) -> None:
    """Give the LoRA that `add_lora` added the effect of another one; layers that `lora` lacks stay as they are.

    Raises:
        UserError: `lora` has another rank, DoRA, or layers that do not train here.
    """
    with _not_for_this_model(lora.path):
        left = dict(lora.layers)
        for name, network in networks.items():
            for layer, module in _by_name(network, name).items():
                if layer not in left or not hasattr(module, "lora_A"):
                    continue
                own, down, up = left.pop(layer), module.lora_A["default"].weight, module.lora_B["default"].weight
                if own.magnitude is not None:
                    raise ValueError("it is a DoRA")
                if own.down.shape != down.shape or own.up.shape != up.shape:
                    raise ValueError(f"it has rank {len(own.down)} in {layer}, and rank is {len(down)}")
                down.copy_(own.down)
                up.copy_(own.up * (own.alpha / alpha))  # of one rank, so alpha alone scales them
        if left:
            raise ValueError(f"it has layers that do not train with these settings, such as {min(left)}")


def _by_name(network: Any, name: str) -> dict[str, Any]:
    """Each linear layer and convolution of a network, under every name that a LoRA file can have for it."""
    layers_per_block = network.config.layers_per_block if name == "unet" else 0
    modules: dict[str, Any] = {}
    for path, module in network.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) or hasattr(module, "lora_A"):
            in_file = path if name == "unet" or re.match("text_model|text_projection", path) else f"text_model.{path}"
            diffusers_name = f"{name}.{in_file}"
            modules.setdefault(diffusers_name, module)
            modules.setdefault(kohya_name(diffusers_name, layers_per_block), module)
            modules.setdefault(f"{_KOHYA_PREFIX[name]}_{in_file.replace('.', '_')}", module)  # some files do
    return modules


@torch.no_grad()
def _add(weight: Tensor, layer: LoraLayer, scale: float) -> None:
    """Add a layer's LoRA to weights (out, in, …), in fp32; with DoRA, then set the length of each output's weights.

    Liu et al. 2024, "DoRA", equation 5: `magnitude` is that length.
    """
    up, down = (matrix.to(weight.device).float().flatten(1) for matrix in (layer.up, layer.down))
    merged = torch.addmm(weight.flatten(1).float(), up, down, alpha=scale * (layer.alpha / len(down)))
    if layer.magnitude is not None:
        merged *= (layer.magnitude.to(weight.device).float().flatten() / merged.norm(dim=1))[:, None]
    merged = merged.view_as(weight).to(weight.dtype)
    if not merged.isfinite().all():
        raise ValueError("it makes weights that are not finite")
    weight.copy_(merged)


def _refuse(unknown: Collection[str]) -> None:
    if unknown:
        raise ValueError(f"it contains weights of another model, or not of a LoRA, such as {min(unknown)}")


@contextmanager
def _not_for_this_model(path: Path) -> Iterator[None]:
    """Turn errors of a LoRA file into a UserError; disk and out-of-memory errors are passed on."""
    try:
        yield
    except (SafetensorError, OSError, re.error, *BAD_CONTENT) as error:
        if explain(error, ""):
            raise
        reason = first_line(error)
        raise UserError(f"{path} is not a LoRA for this model ({reason}): choose another LoRA or model") from error
