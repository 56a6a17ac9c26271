"""SDXL's VAE: pictures to latents and back."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from lace_lora.errors import LOSS_NOT_FINITE, UserError

Decoded = Callable[[], Image.Image]  # waits for a picture and returns it, or raises as `decode_latents`


@torch.no_grad()
def encode_pixels(vae: AutoencoderKL, pixels: Tensor, path: Path) -> tuple[Tensor, Tensor]:
    """Pixels (F, 3, height, width) to mean and std (F, 4, h, w) times the VAE's scaling factor."""
    posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
    mean, std = ((part * vae.config.scaling_factor).float().cpu() for part in (posterior.mean, posterior.std))
    if not mean.isfinite().all():
        reason = "its weights are damaged, or overflow in fp16"
        raise UserError(f"the VAE's output for {path} is not finite: {reason}", LOSS_NOT_FINITE)
    return mean.contiguous(), std.contiguous()


def to_tensor(picture: Image.Image) -> Tensor:
    """An RGB picture as (3, height, width) in -1..1."""
    values = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return values.view(picture.height, picture.width, 3).permute(2, 0, 1).float() / 127.5 - 1


def decode_latents(vae: AutoencoderKL, latents: Tensor) -> list[Image.Image]:
    """Latents (n, 4, h, w) to pictures, one by one: decoding takes more memory than anything else.

    Raises:
        UserError: a picture would be black, since the latents or the VAE's output are not finite (exit 5).
    """
    return [wait() for wait in decode_each(vae, latents)]


@torch.no_grad()
def decode_each(vae: AutoencoderKL, latents: Tensor) -> Iterator[Decoded]:
    """Decode each of latents (n, 4, h, w) when the iterator reaches it, without waiting for the GPU.

    Only copying the latents there waits, before the first one.
    """
    on_gpu = vae.device.type == "cuda"
    latents_finite = latents.isfinite().flatten(1).all(dim=1).tolist()
    for row, row_finite in zip(latents.to(vae.device, vae.dtype).split(1), latents_finite, strict=True):
        pixels = vae.decode(row / vae.config.scaling_factor).sample[0]
        levels = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()
        levels, finite = (value.to("cpu", non_blocking=on_gpu) for value in (levels, pixels.isfinite().all()))
        arrived = torch.cuda.Event(blocking=True) if on_gpu else None  # a thread that waits for it leaves the CPU alone
        if arrived:
            arrived.record()
        yield partial(_picture, levels, finite, row_finite, arrived)


def _picture(levels: Tensor, finite: Tensor, latents_finite: bool, arrived: torch.cuda.Event | None) -> Image.Image:
    """Levels (height, width, 3), uint8, and whether the VAE's output was finite, once they have `arrived`."""
    if arrived:
        arrived.synchronize()
    for is_finite, name in ((latents_finite, "latents"), (bool(finite), "VAE's output")):
        if not is_finite:
            advice = "set mixed_precision: bf16 or no, leave pretrained_vae empty, or try lora_scale=0"
            raise UserError(f"the {name} is not finite, so pictures would be black: {advice}", LOSS_NOT_FINITE)
    height, width, _ = levels.shape
    return Image.frombytes("RGB", (width, height), levels.numpy().tobytes())
