"""A model in diffusers' layout as one checkpoint under SDXL's original names, which is how many are passed around."""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file

Weights = dict[str, torch.Tensor]

UNET_ENDS = {
    "norm1.": "in_layers.0.", "conv1.": "in_layers.2.", "time_emb_proj.": "emb_layers.1.", "norm2.": "out_layers.0.",
    "conv2.": "out_layers.3.", "conv_shortcut.": "skip_connection.",
}  # fmt: skip
UNET_NAMES = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}  # fmt: skip
VAE_NAMES = {
    "mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2", "mid_block.attentions.0": "mid.attn_1",
    "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out", "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut", "downsamplers.0": "downsample", "upsamplers.0": "upsample",
}  # fmt: skip
TEXT_NAMES = {
    "text_model.embeddings.token_embedding": "token_embedding", "text_model.final_layer_norm": "ln_final",
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "fc1": "c_fc", "fc2": "c_proj", "self_attn": "attn",
    "text_model.encoder.layers": "transformer.resblocks",
}  # fmt: skip


def original_checkpoint(base: Path) -> Weights:
    layers = json.loads((base / "unet" / "config.json").read_text())["layers_per_block"]
    levels = len(json.loads((base / "vae" / "config.json").read_text())["block_out_channels"])
    [unet, vae, first, second] = (
        load_file(next((base / part).glob("*.safetensors")))
        for part in ("unet", "vae", "text_encoder", "text_encoder_2")
    )
    checkpoint = {f"model.diffusion_model.{unet_name(key, layers, unet)}": value for key, value in unet.items()}
    for key, value in vae.items():
        linear = "attentions" in key and value.dim() == 2
        checkpoint[f"first_stage_model.{vae_name(key, levels)}"] = value[..., None, None] if linear else value
    for key, value in first.items():
        checkpoint[f"conditioner.embedders.0.transformer.text_model.{key.removeprefix('text_model.')}"] = value
    checkpoint |= {f"conditioner.embedders.1.model.{key}": value for key, value in open_clip(second).items()}
    return {key: value.contiguous().clone() for key, value in checkpoint.items()}


def original_refiner(refiner: Path, base: Path) -> Weights:
    """Its text encoder is the base's second one."""
    layers = json.loads((refiner / "unet" / "config.json").read_text())["layers_per_block"]
    unet, encoder = (
        load_file(next(folder.glob("*.safetensors"))) for folder in (refiner / "unet", base / "text_encoder_2")
    )
    checkpoint = {f"model.diffusion_model.{unet_name(key, layers, unet)}": value for key, value in unet.items()}
    checkpoint |= {f"conditioner.embedders.0.model.{key}": value for key, value in open_clip(encoder).items()}
    return {key: value.contiguous().clone() for key, value in checkpoint.items()}


def unet_name(key: str, layers: int, unet: Weights) -> str:
    if match := re.match(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.*)", key):
        side, level, kind, place, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
        first = level * (layers + 1) + (side == "down")
        with_attention = any(name.startswith(f"{side}_blocks.{level}.attentions.") for name in unet)
        blocks = f"{'input' if side == 'down' else 'output'}_blocks"
        if kind == "downsamplers":
            return f"{blocks}.{first + layers}.0.op.{rest.removeprefix('conv.')}"
        if kind == "upsamplers":
            return f"{blocks}.{first + layers}.{1 + with_attention}.{rest}"
        rest = replaced(rest, UNET_ENDS) if kind == "resnets" else rest
        return f"{blocks}.{first + place}.{int(kind == 'attentions')}.{rest}"
    ends = UNET_ENDS if "resnets" in key else {}
    return replaced(replaced(key, UNET_NAMES), ends)


def vae_name(key: str, levels: int) -> str:
    key = re.sub(r"down_blocks\.(\d)\.", r"down.\1.", key)
    key = re.sub(r"up_blocks\.(\d)\.", lambda found: f"up.{levels - 1 - int(found[1])}.", key)
    return replaced(key, VAE_NAMES).replace("resnets", "block")


def open_clip(encoder: Weights) -> Weights:
    found: Weights = {}
    for key, value in encoder.items():
        if key == "text_projection.weight":
            found["text_projection"] = value.T
        elif key.endswith("position_embedding.weight"):
            found["positional_embedding"] = value
        elif match := re.fullmatch(r"(.*layers\.\d+\.self_attn)\.q_proj\.(weight|bias)", key):
            rows = [encoder[f"{match[1]}.{part}_proj.{match[2]}"] for part in "qkv"]
            found[f"{replaced(match[1], TEXT_NAMES)}.in_proj_{match[2]}"] = torch.cat(rows)
        elif not re.search(r"\.[kv]_proj\.", key):
            found[replaced(key, TEXT_NAMES)] = value
    return found


def replaced(text: str, names: dict[str, str]) -> str:
    for ours, original in names.items():
        text = text.replace(ours, original)
    return text
