"""The tiny model's networks, loaded once for a test file and copied for each test; their output for a fixed input."""

from copy import deepcopy
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from lace_lora.config import Config
from lace_lora.sdxl import lora_weights, models, prompts
from lace_lora.sdxl.lora_weights import Networks

CPU = torch.device("cpu")
PROMPTS = ["a photo of <myspecialstyle>", "white lace, scalloped edge"]
TEXT = ("text_encoder", "text_encoder_2")


def config_for(tiny: Path, folder: Path) -> Config:
    """Settings with alpha unequal to rank."""
    return Config(
        pretrained_model=str(tiny / "base"), refiner_model=str(tiny / "refiner"), lora_output_dir=str(folder / "lora"),
        resolution=64, rank=4, lora_alpha=2.0,
    )  # fmt: skip


def load_networks(config: Config) -> Networks:
    """UNet and both text encoders; to be copied before a test changes them, which is ten times as fast as loading."""
    encoders = prompts.load_text_encoders(config, CPU, torch.float32)
    return {"unet": models.load_unet(config.pretrained_model, None, CPU, torch.float32)} | dict(
        zip(TEXT, encoders, strict=True)
    )


def copies(networks: Networks, *names: str) -> Networks:
    return {name: deepcopy(networks[name]) for name in names}


def add_trained_lora(networks: Networks, config: Config) -> Networks:
    """The same networks with a LoRA that does something."""
    generator = torch.Generator().manual_seed(2)
    for weight in lora_weights.add_lora(networks, config).values():
        weight.data = torch.randn(weight.shape, generator=generator) * 0.3
    return networks


def run_unet(unet: UNet2DConditionModel) -> torch.Tensor:
    """The UNet's output for one fixed input."""
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "text_embeds": torch.randn(2, 128, generator=generator),
        "time_ids": torch.tensor([[64.0, 80.0, 0.0, 8.0, 64.0, 64.0]] * 2),
    }
    latents, embeds = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 77, 256, generator=generator)
    with torch.no_grad():
        return unet(latents, torch.tensor([100, 900]), embeds, added_cond_kwargs=inputs).sample
