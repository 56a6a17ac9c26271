"""Build the demo's tiny SDXL: base and refiner, of SDXL's own classes and layout.

    python -m demo.making.build_model FOLDER

writes FOLDER/base and FOLDER/refiner in the layout of a Hub repository, with random weights from a fixed seed;
`demo/making/teach.py` trains them. `--shapes sdxl` builds the same at SDXL's own shapes, for measuring speed and
memory, which do not depend on the weights.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

NOISE_SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}  # SDXL's
START, END = "<|startoftext|>", "<|endoftext|>"
# Made once from the words of the demo's captions and of some users' prompts, and fixed: made again, merges of equal
# frequency would come in another order, and the weights know the words by their ids.
MERGES = Path(__file__).parent / "merges.txt"


@dataclass(frozen=True)
class Shapes:
    """The numbers in which the demo model differs from SDXL; everything else is the same."""

    encoder_1: tuple[int, int, int, int]  # hidden size, layers, heads, intermediate size
    encoder_2: tuple[int, int, int, int]
    base_channels: tuple[int, ...]
    base_heads: tuple[int, ...]
    base_transformers: tuple[int, ...]
    refiner_channels: tuple[int, ...]
    refiner_heads: tuple[int, ...]
    refiner_transformers: int
    layers_per_block: int
    time_embed: int  # `addition_time_embed_dim` of the base
    refiner_time_embed: int
    vae_channels: tuple[int, ...]
    vae_layers: int
    vae_groups: int
    sample_size: int  # the base's native side in latent pixels


TINY = Shapes(
    encoder_1=(128, 3, 4, 384), encoder_2=(128, 3, 4, 384),
    base_channels=(64, 96, 128), base_heads=(2, 3, 4), base_transformers=(1, 1, 2),
    refiner_channels=(64, 96, 64, 32), refiner_heads=(2, 3, 2, 1), refiner_transformers=1,
    layers_per_block=1, time_embed=32, refiner_time_embed=32,
    vae_channels=(32, 64, 128, 192), vae_layers=1, vae_groups=16, sample_size=32,
)  # fmt: skip
SDXL = Shapes(
    encoder_1=(768, 12, 12, 3072), encoder_2=(1280, 32, 20, 5120),
    base_channels=(320, 640, 1280), base_heads=(5, 10, 20), base_transformers=(1, 2, 10),
    refiner_channels=(384, 768, 1536, 1536), refiner_heads=(6, 12, 24, 24), refiner_transformers=4,
    layers_per_block=2, time_embed=256, refiner_time_embed=256,
    vae_channels=(128, 256, 512, 512), vae_layers=2, vae_groups=32, sample_size=128,
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shapes", choices=("tiny", "sdxl"), default="tiny")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    build(arguments.folder, TINY if arguments.shapes == "tiny" else SDXL, arguments.seed)
    print(f"built {arguments.folder}/base and {arguments.folder}/refiner ({arguments.shapes} shapes)")


@dataclass(frozen=True)
class Parts:
    """The networks of base and refiner, which shares the base's VAE and second text encoder."""

    text_encoder: CLIPTextModel
    text_encoder_2: CLIPTextModelWithProjection
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    refiner_unet: UNet2DConditionModel


def build(folder: Path, shapes: Shapes, seed: int = 0) -> None:
    """Write `folder/base` and `folder/refiner` in diffusers' layout, fp16 safetensors, random weights."""
    tokenizers = write_tokenizers(folder)
    # Made where it is fast: filling 6 billion random weights takes minutes on a CPU, seconds on a GPU.
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        parts = make_parts(shapes, tokenizers[0], seed, halve=True)
    write(folder, parts, tokenizers)


def make_parts(shapes: Shapes, tokenizer: CLIPTokenizer, seed: int, halve: bool = False) -> Parts:
    """All networks with random weights, in fp32 or halved one by one, on PyTorch's default device."""

    def made(network: Any) -> Any:
        return network.half() if halve else network

    torch.manual_seed(seed)
    return Parts(
        made(CLIPTextModel(text_config(shapes.encoder_1, "quick_gelu", tokenizer))),
        made(CLIPTextModelWithProjection(text_config(shapes.encoder_2, "gelu", tokenizer))),
        made(AutoencoderKL(**vae_config(shapes))),
        made(UNet2DConditionModel(**base_config(shapes))),
        made(UNet2DConditionModel(**refiner_config(shapes))),
    )


def write(folder: Path, parts: Parts, tokenizers: tuple[CLIPTokenizer, CLIPTokenizer]) -> None:
    """Write the networks beside their tokenizers, which are there already, in fp16."""
    for network in vars(parts).values():
        network.half()
    scheduler = EulerDiscreteScheduler(**NOISE_SCHEDULE, steps_offset=1, timestep_spacing="leading")
    StableDiffusionXLPipeline(
        parts.vae, parts.text_encoder, parts.text_encoder_2, *tokenizers, parts.unet, scheduler
    ).save_pretrained(folder / "base")
    # The refiner shares the base's VAE and second text encoder; only what differs is stored again.
    parts.refiner_unet.save_pretrained(folder / "refiner" / "unet")
    scheduler.save_pretrained(folder / "refiner" / "scheduler")
    index = StableDiffusionXLImg2ImgPipeline(
        vae=parts.vae, text_encoder=None, text_encoder_2=parts.text_encoder_2, tokenizer=None, tokenizer_2=None,
        unet=parts.refiner_unet, scheduler=scheduler, requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
    )  # fmt: skip
    index.save_config(folder / "refiner")


def base_config(shapes: Shapes) -> dict[str, Any]:
    return unet_common(shapes) | {
        "attention_head_dim": list(shapes.base_heads),
        "block_out_channels": list(shapes.base_channels),
        "transformer_layers_per_block": list(shapes.base_transformers),
        "cross_attention_dim": shapes.encoder_1[0] + shapes.encoder_2[0],
        "addition_time_embed_dim": shapes.time_embed,
        # six time ids (original size, crop, target size) and the pooled embedding
        "projection_class_embeddings_input_dim": 6 * shapes.time_embed + shapes.encoder_2[0],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    }


def refiner_config(shapes: Shapes) -> dict[str, Any]:
    return unet_common(shapes) | {
        "attention_head_dim": list(shapes.refiner_heads),
        "block_out_channels": list(shapes.refiner_channels),
        "transformer_layers_per_block": shapes.refiner_transformers,
        "cross_attention_dim": shapes.encoder_2[0],
        "addition_time_embed_dim": shapes.refiner_time_embed,
        # five time ids (original size, crop, aesthetic score) and the pooled embedding
        "projection_class_embeddings_input_dim": 5 * shapes.refiner_time_embed + shapes.encoder_2[0],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    }


def unet_common(shapes: Shapes) -> dict[str, Any]:
    return {
        "addition_embed_type": "text_time",
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": shapes.layers_per_block,
        "use_linear_projection": True,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "sample_size": shapes.sample_size,
    }


def vae_config(shapes: Shapes) -> dict[str, Any]:
    return {
        "block_out_channels": list(shapes.vae_channels),
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": shapes.vae_layers,
        "latent_channels": 4,
        "norm_num_groups": shapes.vae_groups,
        "sample_size": shapes.sample_size * 8,
        "scaling_factor": 0.13025,
        "force_upcast": True,
    }


def text_config(size: tuple[int, int, int, int], activation: str, tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    hidden_size, layers, heads, intermediate_size = size
    return CLIPTextConfig(
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=intermediate_size,
        projection_dim=hidden_size,
        hidden_act=activation,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=1,
        max_position_embeddings=77,
    )


def write_tokenizers(folder: Path) -> tuple[CLIPTokenizer, CLIPTokenizer]:
    """Both of SDXL's tokenizers into `folder/base`, which differ in what they pad with."""
    for name, pad_token in (("tokenizer", END), ("tokenizer_2", "!")):
        write_tokenizer(folder / "base" / name, pad_token)
    first, second = (CLIPTokenizer.from_pretrained(folder / "base" / name) for name in ("tokenizer", "tokenizer_2"))
    return first, second


def write_tokenizer(folder: Path, pad_token: str) -> None:
    """A CLIP tokenizer's files (byte-level BPE) with the merges of `MERGES`; any text can be written with it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").unlink(missing_ok=True)  # an earlier one would be read instead
    merges = MERGES.read_text(encoding="utf-8")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    alphabet.insert(0, alphabet.pop(alphabet.index("!")))  # id 0, which tokenizer 2 pads with
    vocabulary = alphabet + [letter + "</w>" for letter in alphabet]
    vocabulary += [merge.replace(" ", "") for merge in merges.splitlines()[1:]] + [START, END]
    ids = {token: index for index, token in enumerate(dict.fromkeys(vocabulary))}
    (folder / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text(merges, encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad_token}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(special | {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True})
    )


if __name__ == "__main__":
    main()
