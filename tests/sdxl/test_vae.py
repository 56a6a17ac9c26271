"""SDXL's VAE: what it cannot decode."""

import pytest
import torch

from helpers import Make, refused
from lace_lora.errors import LOSS_NOT_FINITE
from lace_lora.sdxl import models
from lace_lora.sdxl.vae import decode_latents


@pytest.mark.parametrize("where", ["latents", "VAE"])
def test_a_black_picture_is_an_error(settings: Make, where: str) -> None:
    vae = models.load_vae(settings(), torch.device("cpu"), torch.float32)
    latents = torch.zeros(1, 4, 8, 8)
    if where == "latents":
        latents[0, 0, 0, 0] = torch.inf
    else:
        with torch.no_grad():
            vae.decoder.conv_out.bias.fill_(torch.nan)
    refused(lambda: decode_latents(vae, latents), f"NaN or inf in the {where}", LOSS_NOT_FINITE)
