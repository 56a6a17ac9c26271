"""What a training step sees: every picture and caption encoded once, and the batch of step n as a function of n.

All randomness of a step comes from a generator seeded by (seed, step) and is drawn for the whole effective batch, so a
resumed run repeats the straight one with no saved state, and processes share one draw without training alike.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageOps
from torch import Tensor
from tqdm.auto import tqdm

import image_files
from config import LOSS_NOT_FINITE, UserError


@dataclass(frozen=True)
class Encoded:
    """N pictures, each in F versions (as it is, and mirrored where random_flip is on), and U different captions.

    The first `instances` are the user's; any that follow are of the class, for prior preservation.
    """

    mean: Tensor  # (N, F, 4, h, w) the VAE's posterior, in the UNet's scale
    std: Tensor  # (N, F, 4, h, w)
    time_ids: Tensor  # (N, 6) original height and width, crop top and left, target height and width
    caption: Tensor  # (N,) index into the embeddings
    prompt_embeds: Tensor  # (U, 77, c)
    pooled_prompt_embeds: Tensor  # (U, p)
    instances: int


@dataclass(frozen=True)
class Batch:
    """One step's inputs for B pictures, on the CPU until `to` moves them."""

    latents: Tensor  # (B, 4, h, w)
    noise: Tensor  # (B, 4, h, w)
    timesteps: Tensor  # (B,)
    time_ids: Tensor  # (B, 6)
    caption: Tensor  # (B,) index into the different captions
    prompt_embeds: Tensor  # (B, 77, c)
    pooled_prompt_embeds: Tensor  # (B, p)
    weights: Tensor  # (B,) of each picture's loss in the mean over the batch

    def split(self, size: int) -> list["Batch"]:
        """In parts of `size` whose losses add up to the loss of the whole, which is a mean over pictures."""
        count = len(self.caption)
        rows = zip(*(value.split(size) for value in vars(self).values()), strict=True)
        return [part.weighed(len(part.caption) / count) for part in (Batch(*values) for values in rows)]

    def weighed(self, factor: float) -> "Batch":
        return replace(self, weights=self.weights * factor)

    def share(self, rank: int, world: int) -> "Batch":
        """The `rank`-th of `world` equal parts, for a process of its own."""
        size = len(self.caption) // world
        return Batch(*(value[rank * size : (rank + 1) * size] for value in vars(self).values()))

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(value.to(device, non_blocking=True) for value in vars(self).values()))

    def pinned(self) -> "Batch":
        """In memory that a GPU copies from by itself, without the CPU waiting for it."""
        return Batch(*(value.pin_memory() for value in vars(self).values()))


@torch.no_grad()
def encode_pictures(
    vae: AutoencoderKL, paths: Sequence[Path], resolution: int, mirrored: bool, kinds: Sequence[str] = ("JPEG",)
) -> tuple[Tensor, Tensor, Tensor]:
    """Every picture through the VAE once.

    The posterior's mean and deviation are kept, not a sample of it: sampling belongs into the step. A mirrored version
    is encoded on its own, because mirrored latents are not the latents of the mirrored picture.

    Returns:
        mean and std (N, F, 4, resolution / 8, resolution / 8) times the VAE's scaling factor, and time ids (N, 6).

    Raises:
        UserError: a picture can no longer be read, or the VAE makes no finite numbers of it (exit 5).
    """
    means, stds, time_ids = [], [], []
    for path in tqdm(paths, desc="encoding pictures", unit="picture"):
        try:
            # Twice the training size is enough to scale down from, and much faster to decode.
            picture, (width, height) = image_files.open_picture(path, 2 * resolution, kinds)
        except image_files.BROKEN as error:
            raise UserError(f"{path} can no longer be read ({error}): was it changed or moved meanwhile?") from error
        square, (top, left) = image_files.fit_square(picture, resolution)
        versions = [square, ImageOps.mirror(square)] if mirrored else [square]
        pixels = torch.stack([to_tensor(version) for version in versions]).to(vae.device, vae.dtype)
        posterior = vae.encode(pixels).latent_dist
        if not posterior.mean.isfinite().all():
            raise UserError(
                f"the VAE makes no finite numbers of {path}: its weights are damaged, or overflow in fp16",
                LOSS_NOT_FINITE,
            )
        means.append((posterior.mean * vae.config.scaling_factor).float().cpu())
        stds.append((posterior.std * vae.config.scaling_factor).float().cpu())
        time_ids.append([height, width, top, left, resolution, resolution])
    return torch.stack(means), torch.stack(stds), torch.tensor(time_ids, dtype=torch.float32)


def to_tensor(picture: Image.Image) -> Tensor:
    """An RGB picture as (3, height, width) in -1..1."""
    values = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return values.view(picture.height, picture.width, 3).permute(2, 0, 1).float() / 127.5 - 1


def encode_captions(
    captions: Sequence[str], encode: Callable[[list[str]], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Every different caption through the text encoders once.

    Returns:
        caption indices (N,), prompt_embeds (U, 77, c) and pooled_prompt_embeds (U, p), on the CPU.
    """
    different = list(dict.fromkeys(captions))
    encoded = [encode([caption]) for caption in different]
    index = {caption: position for position, caption in enumerate(different)}
    return (
        torch.tensor([index[caption] for caption in captions]),
        torch.cat([embeds.cpu() for embeds, _ in encoded]),
        torch.cat([pooled.cpu() for _, pooled in encoded]),
    )


def step_batch(
    data: Encoded, seed: int, step: int, size: int, timesteps: int, noise_offset: float = 0.0, prior_weight: float = 1.0
) -> Batch:
    """The whole effective batch of optimizer step `step` (counted from 0).

    Where there are class pictures, one follows each of the user's, so that every share of the batch has both.

    Args:
        size: pictures of the user in the effective batch: processes x accumulation x batch size.
        timesteps: how many the noise schedule has (1000).
        noise_offset: deviation of a shift of each channel's noise as a whole. Guttenberg 2023, "Diffusion with Offset
            Noise".
        prior_weight: of the class pictures' mean loss, which is added to that of the user's pictures.
    """
    generator = stream(seed, "step", step)
    pictures = torch.tensor(list(_pictures(data.instances, seed, "epoch", step * size, size)))
    weights = torch.ones(size)
    if others := len(data.caption) - data.instances:
        classes = data.instances + torch.tensor(list(_pictures(others, seed, "class epoch", step * size, size)))
        pictures = torch.stack([pictures, classes], dim=1).flatten()
        # Twice, since the mean is taken over twice as many.
        weights = torch.tensor([2.0, 2.0 * prior_weight]).repeat(size)
    versions = torch.randint(data.mean.shape[1], pictures.shape, generator=generator)
    mean, std = data.mean[pictures, versions], data.std[pictures, versions]
    captions = data.caption[pictures]
    latents = mean + std * torch.randn(mean.shape, generator=generator)
    noise = torch.randn(mean.shape, generator=generator)
    drawn_timesteps = torch.randint(timesteps, pictures.shape, generator=generator)
    if noise_offset:
        noise += noise_offset * torch.randn((*mean.shape[:2], 1, 1), generator=generator)
    return Batch(
        latents=latents,
        noise=noise,
        timesteps=drawn_timesteps,
        time_ids=data.time_ids[pictures],
        caption=captions,
        prompt_embeds=data.prompt_embeds[captions],
        pooled_prompt_embeds=data.pooled_prompt_embeds[captions],
        weights=weights,
    )


def _pictures(count: int, seed: int, name: str, start: int, size: int) -> Iterator[int]:
    """Positions start … start + size of an endless row in which every epoch is a new shuffle of all pictures."""
    orders: dict[int, list[int]] = {}
    for position in range(start, start + size):
        epoch, place = divmod(position, count)
        if epoch not in orders:
            orders[epoch] = torch.randperm(count, generator=stream(seed, name, epoch)).tolist()
        yield orders[epoch][place]


def stream(seed: int, *names: str | int) -> torch.Generator:
    """A generator of its own for every use: seeded by a hash, so that neighbouring seeds share nothing."""
    return torch.Generator().manual_seed(stream_seed(seed, *names))


def stream_seed(seed: int, *names: str | int) -> int:
    digest = hashlib.sha256(repr((seed, *names)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
