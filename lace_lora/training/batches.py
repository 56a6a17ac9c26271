"""What a training step sees: every picture and caption encoded once, and the batch of step n as a function of n.

All randomness of a step comes from a generator seeded by (seed, step) and is drawn for the whole effective batch, so a
resumed run repeats the straight one with no saved state, and processes share one draw without training alike.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lace_lora.seeds import stream
from lace_lora.training.latents import Latents


@dataclass(frozen=True)
class Encoded:
    """N pictures and U different captions.

    The first `instances` are the user's; any that follow are of the class, for prior preservation.
    """

    latents: Latents
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
    """The whole effective batch of optimizer step `step` (counted from 0), of pictures that have one shape.

    Where there are class pictures, one follows each of the user's, so that every share of the batch has both.

    Args:
        size: pictures of the user in the effective batch: processes x accumulation x batch size.
        timesteps: how many the noise schedule has (1000).
        noise_offset: deviation of a shift of each channel's noise as a whole. Guttenberg 2023, "Diffusion with Offset
            Noise".
        prior_weight: of the class pictures' mean loss, which is added to that of the user's pictures.
    """
    generator = stream(seed, "step", step)
    weights = torch.ones(size)
    mean, std = data.latents.mean, data.latents.std
    bucket, before = _bucket(_buckets(mean[: data.instances]), seed, step)
    pictures = torch.tensor([bucket[place] for place in _places(len(bucket), seed, "epoch", before * size, size)])
    if others := len(data.caption) - data.instances:
        classes = data.instances + torch.tensor(list(_places(others, seed, "class epoch", step * size, size)))
        pictures = torch.stack([pictures, classes], dim=1).flatten()
        # Twice, since the mean is taken over twice as many.
        weights = torch.tensor([2.0, 2.0 * prior_weight]).repeat(size)
    versions = torch.randint(len(mean[0]), pictures.shape, generator=generator)
    chosen = list(zip(pictures.tolist(), versions.tolist(), strict=True))
    means, stds = (torch.stack([part[picture][version] for picture, version in chosen]) for part in (mean, std))
    captions = data.caption[pictures]
    latents = means + stds * torch.randn(means.shape, generator=generator)
    noise = torch.randn(means.shape, generator=generator)
    drawn_timesteps = torch.randint(timesteps, pictures.shape, generator=generator)
    if noise_offset:
        noise += noise_offset * torch.randn((*means.shape[:2], 1, 1), generator=generator)
    return Batch(
        latents=latents,
        noise=noise,
        timesteps=drawn_timesteps,
        time_ids=data.latents.time_ids[pictures],
        caption=captions,
        prompt_embeds=data.prompt_embeds[captions],
        pooled_prompt_embeds=data.pooled_prompt_embeds[captions],
        weights=weights,
    )


def _buckets(mean: Sequence[Tensor]) -> list[list[int]]:
    """The pictures of each shape, in the order of their first ones."""
    buckets: dict[Any, list[int]] = {}
    for picture, value in enumerate(mean):
        buckets.setdefault(value.shape, []).append(picture)
    return list(buckets.values())


def _bucket(buckets: list[list[int]], seed: int, step: int) -> tuple[list[int], int]:
    """The bucket that a step learns from, and how many steps learnt from it before.

    In as many steps as there are pictures, each bucket has as many as it has pictures: all pictures are seen equally
    often.
    """
    row = [number for number, bucket in enumerate(buckets) for _ in bucket]
    cycle, place = divmod(step, len(row))
    order = [row[index] for index in torch.randperm(len(row), generator=stream(seed, "buckets", cycle)).tolist()]
    number = order[place]
    return buckets[number], cycle * len(buckets[number]) + order[:place].count(number)


def _places(count: int, seed: int, name: str, start: int, size: int) -> Iterator[int]:
    """Positions start … start + size of an endless row in which every epoch is a new shuffle of 0 … count."""
    orders: dict[int, list[int]] = {}
    for position in range(start, start + size):
        epoch, place = divmod(position, count)
        if epoch not in orders:
            orders[epoch] = torch.randperm(count, generator=stream(seed, name, epoch)).tolist()
        yield orders[epoch][place]
