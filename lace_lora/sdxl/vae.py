"""SDXL's VAE: pictures to latents and back."""

from collections.abc import Iterator
from dataclasses import dataclass
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
        advice = "leave pretrained_vae empty, or set mixed_precision: bf16 or no"
        reason = f"its weights are damaged or overflow in fp16; {advice}"
        raise UserError(f"the VAE's output for {path} contains NaN or inf: {reason}", LOSS_NOT_FINITE)
    return mean, std


def to_tensor(picture: Image.Image) -> Tensor:
    """An RGB picture as (3, height, width) in -1..1."""
    values = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return values.view(picture.height, picture.width, 3).permute(2, 0, 1).float() / 127.5 - 1


@dataclass(frozen=True)
class PendingPicture:
    """A decoded picture on its way from the GPU."""

    levels: Tensor  # (height, width, 3), uint8, on the CPU; to be read once `arrived`
    finite: Tensor  # (), bool: whether the VAE's output was finite; likewise
    latents_finite: bool
    arrived: torch.cuda.Event | None  # None where nothing is copied in the background

    def wait(self) -> Image.Image:
        """Wait for the picture and return it.

        Raises:
            UserError: it would be black: the latents or the VAE's output contain NaN or inf (exit 5).
        """
        if self.arrived:
            self.arrived.synchronize()
        for finite, name in ((self.latents_finite, "latents"), (bool(self.finite), "VAE's output")):
            if not finite:
                advice = "set mixed_precision: bf16 or no, leave pretrained_vae empty, or try lora_scale=0"
                raise UserError(f"NaN or inf in the {name}, so pictures would be black: {advice}", LOSS_NOT_FINITE)
        height, width, _ = self.levels.shape
        return Image.frombytes("RGB", (width, height), self.levels.numpy().tobytes())


def decode_latents(vae: AutoencoderKL, latents: Tensor) -> list[Image.Image]:
    """Latents (n, 4, h, w) to pictures, one by one: decoding takes more memory than anything else.

    Raises:
        UserError: see `PendingPicture.wait`.
    """
    return [picture.wait() for picture in decode_each(vae, latents)]


def decode_each(vae: AutoencoderKL, latents: Tensor) -> Iterator[PendingPicture]:
    """Decode each of latents (n, 4, h, w) when the iterator reaches it, without waiting for the GPU.

    Only copying the latents there waits, before the first one.
    """
    finite = latents.isfinite().flatten(1).all(dim=1)
    for row, is_finite in zip(latents.to(vae.device, vae.dtype).split(1), finite.tolist(), strict=True):
        yield _decode(vae, row, is_finite)


@torch.no_grad()
def _decode(vae: AutoencoderKL, latents: Tensor, latents_finite: bool) -> PendingPicture:
    """Latents (1, 4, h, w) to one picture."""
    pixels = vae.decode(latents / vae.config.scaling_factor).sample[0]
    levels = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()
    on_gpu = vae.device.type == "cuda"
    levels, finite = (value.to("cpu", non_blocking=on_gpu) for value in (levels, pixels.isfinite().all()))
    arrived = torch.cuda.Event(blocking=True) if on_gpu else None  # a thread that waits for it uses no CPU time
    if arrived:
        arrived.record()
    return PendingPicture(levels, finite, latents_finite, arrived)
