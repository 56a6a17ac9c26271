"""SDXL's VAE: pictures to latents and back."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from lace_lora.errors import LOSS_NOT_FINITE, UserError


@torch.no_grad()
def encode_pixels(vae: AutoencoderKL, pixels: Tensor, path: Path) -> tuple[Tensor, Tensor]:
    """Pixels (F, 3, height, width) to mean and std (F, 4, h, w) times the VAE's scaling factor."""
    posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
    mean, std = (
        (part * vae.config.scaling_factor).float().cpu().contiguous() for part in (posterior.mean, posterior.std)
    )
    if not mean.isfinite().all():
        raise UserError(
            f"the VAE makes no finite numbers of {path}: its weights are damaged, or overflow in fp16", LOSS_NOT_FINITE
        )
    return mean, std


def to_tensor(picture: Image.Image) -> Tensor:
    """An RGB picture as (3, height, width) in -1..1."""
    values = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return values.view(picture.height, picture.width, 3).permute(2, 0, 1).float() / 127.5 - 1


Decoded = Callable[[], Image.Image]


def decode_latents(vae: AutoencoderKL, latents: Tensor) -> list[Image.Image]:
    """Latents (n, 4, h, w) to pictures, one by one: decoding takes more memory than anything else.

    Raises:
        UserError: the picture would be black, since it is not of finite numbers (exit 5).
    """
    return [picture() for picture in decode_each(vae, latents)]


def decode_each(vae: AutoencoderKL, latents: Tensor) -> Iterator[Decoded]:
    """Each of latents (n, 4, h, w), as it is asked for. All are copied at once: that means to wait for the GPU."""
    finite = latents.isfinite().flatten(1).all(dim=1)
    for row, is_finite in zip(latents.to(vae.device, vae.dtype).split(1), finite.tolist(), strict=True):
        yield _decode(vae, row, is_finite)


@torch.no_grad()
def _decode(vae: AutoencoderKL, latents: Tensor, latents_finite: bool) -> Decoded:
    """Have latents (1, 4, h, w) decoded, without waiting for a GPU; what is returned waits, and gives the picture."""
    pixels = vae.decode(latents / vae.config.scaling_factor).sample[0]
    levels = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()
    on_gpu = vae.device.type == "cuda"
    levels, finite = (value.to("cpu", non_blocking=on_gpu) for value in (levels, pixels.isfinite().all()))
    arrived = torch.cuda.Event(blocking=True) if on_gpu else None  # a thread that waits for it leaves the CPU alone
    if arrived:
        arrived.record()

    def picture() -> Image.Image:
        if arrived:
            arrived.synchronize()
        _check(latents_finite, "latents")
        _check(bool(finite), "VAE's output")
        height, width, _ = levels.shape
        return Image.frombytes("RGB", (width, height), levels.numpy().tobytes())

    return picture


def _check(finite: bool, name: str) -> None:
    if not finite:
        advice = "set mixed_precision: bf16 or no, leave pretrained_vae empty, or try lora_scale=0"
        raise UserError(f"the {name} is not of finite numbers, so that pictures are black: {advice}", LOSS_NOT_FINITE)
