"""The input of a training step: every picture and caption encoded once, and the batch of step n as a function of n.

All randomness of a step comes from a generator seeded by (seed, step) and is drawn for the whole effective batch, so a
resumed run repeats the uninterrupted one without saved state, and processes share one draw without training alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from lace_lora.seeds import stream
from lace_lora.training.latents import Latents

EMPTY_PROMPT = -1  # its index among the captions: the last


@dataclass(frozen=True)
class Encoded:
    """N views of pictures, and U unique captions with the empty prompt after them.

    The first `instances` views are of the user's pictures, others are for prior preservation.
    """

    latents: Latents
    caption: Tensor  # (N,) index into the embeddings
    prompt_embeds: Tensor  # (U + 1, 77, c)
    pooled_prompt_embeds: Tensor  # (U + 1, p)
    instances: int
    held_out: "Encoded | None" = None  # pictures that are never trained on, with the same embeddings

    @cached_property
    def buckets(self) -> list[list[int]]:
        """The user's pictures of each shape, in the order of their first ones."""
        buckets: dict[tuple[float, ...], list[int]] = {}
        for picture, ids in enumerate(self.latents.time_ids[: self.instances].tolist()):
            buckets.setdefault(tuple(ids[4:]), []).append(picture)
        return list(buckets.values())

    @cached_property
    def bucket_of_each(self) -> list[int]:
        """The number of a bucket, as often as it has pictures, for all buckets one after another."""
        return [number for number, bucket in enumerate(self.buckets) for _ in bucket]


@dataclass(frozen=True)
class Batch:
    """One step's inputs for B pictures, on the CPU until `to` moves them."""

    latents: Tensor  # (B, 4, h, w)
    noise: Tensor  # (B, 4, h, w)
    timesteps: Tensor  # (B,)
    time_ids: Tensor  # (B, 6)
    caption: Tensor  # (B,) index into the unique captions, or EMPTY_PROMPT
    prompt_embeds: Tensor  # (B, 77, c)
    pooled_prompt_embeds: Tensor  # (B, p)
    weights: Tensor  # (B,) of each picture's loss in the mean over the batch

    def split(self, size: int) -> list["Batch"]:
        """In micro-batches of `size` whose losses add up to the loss of the whole, which is a mean over pictures."""
        count = len(self.caption)
        rows = zip(*(value.split(size) for value in vars(self).values()), strict=True)
        parts = [Batch(*values) for values in rows]
        return [replace(part, weights=part.weights * (len(part.caption) / count)) for part in parts]

    def shard(self, rank: int, world: int) -> "Batch":
        """The `rank`-th of `world` equal parts, for a process of its own."""
        size = len(self.caption) // world
        return Batch(*(value[rank * size : (rank + 1) * size] for value in vars(self).values()))

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(value.to(device, non_blocking=True) for value in vars(self).values()))

    def pinned(self) -> "Batch":
        """In memory that a GPU copies from by itself, without the CPU waiting for it."""
        return Batch(*(value.pin_memory() for value in vars(self).values()))


def unique_captions(captions: Sequence[str]) -> tuple[list[str], Tensor]:
    """The U different ones of N captions, and for each of the N its index (N,) among them."""
    index = {caption: position for position, caption in enumerate(dict.fromkeys(captions))}
    return list(index), torch.tensor([index[caption] for caption in captions])


def step_batch(
    data: Encoded, seed: int, step: int, size: int, timesteps: int, noise_offset: float = 0.0,
    prior_weight: float = 1.0, caption_dropout: float = 0.0,
) -> Batch:  # fmt: skip
    """The whole effective batch of optimizer step `step` (counted from 0), of pictures that have one shape.

    Where there are class pictures, one follows each of the user's, so that every process's part of the batch has both.

    Args:
        size: pictures of the user in the effective batch: processes x accumulation x batch size.
        timesteps: how many the noise schedule has (1000).
        noise_offset: std of a shift of each channel's noise. Guttenberg 2023, "Diffusion with Offset Noise".
        prior_weight: of the class pictures' mean loss, which is added to that of the user's.
        caption_dropout: probability that a picture of the user has the empty prompt in place of its caption, so that
            guidance keeps working. Ho & Salimans 2022, "Classifier-Free Diffusion Guidance", algorithm 1.
    """
    generator = stream(seed, "step", step)
    weights = torch.ones(size)
    mean, std = data.latents.mean, data.latents.std
    bucket, before = _bucket(data, seed, step)
    pictures = torch.tensor([bucket[place] for place in _places(len(bucket), seed, "epoch", before * size, size)])
    if others := len(data.caption) - data.instances:
        classes = data.instances + torch.tensor(_places(others, seed, "class epoch", step * size, size))
        pictures = torch.stack([pictures, classes], dim=1).flatten()
        # Doubled, since the mean is over twice as many pictures.
        weights = torch.tensor([2.0, 2.0 * prior_weight]).repeat(size)
    versions = torch.randint(len(mean[0]), pictures.shape, generator=generator)
    chosen = [  # class pictures have fewer versions, since they are not turned
        (picture, version % len(mean[picture]))
        for picture, version in zip(pictures.tolist(), versions.tolist(), strict=True)
    ]
    means, stds = (torch.stack([part[picture][version] for picture, version in chosen]) for part in (mean, std))
    captions = data.caption[pictures]
    if caption_dropout:  # from a stream of its own, so that everything else is as without it
        dropped = torch.rand(pictures.shape, generator=stream(seed, "caption dropout", step)) < caption_dropout
        captions[dropped & (pictures < data.instances)] = EMPTY_PROMPT
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


def seen(count: int, seed: int, draws: int) -> list[bool]:
    """Which of `count` pictures, all of one shape, are among the first `draws` of a training."""
    places = set(_places(count, seed, "epoch", 0, min(count, draws)))
    return [place in places for place in range(count)]


def _bucket(data: Encoded, seed: int, step: int) -> tuple[list[int], int]:
    """The bucket that a step trains on, and how many steps trained on it before.

    In as many steps as there are pictures, each bucket is used as often as it has pictures: all are seen equally often.
    """
    row = data.bucket_of_each
    cycle, place = divmod(step, len(row))
    order = [row[index] for index in _shuffle(len(row), seed, "buckets", cycle)]
    number = order[place]
    return data.buckets[number], cycle * len(data.buckets[number]) + order[:place].count(number)


def _places(count: int, seed: int, name: str, start: int, size: int) -> list[int]:
    """Positions start … start + size of an endless sequence in which every epoch is a new shuffle of 0 … count."""
    positions = [divmod(position, count) for position in range(start, start + size)]
    return [_shuffle(count, seed, name, epoch)[place] for epoch, place in positions]


@lru_cache(maxsize=16)  # an epoch's is needed in many steps, and by a batch of few pictures several at once
def _shuffle(count: int, seed: int, name: str, epoch: int) -> list[int]:
    return torch.randperm(count, generator=stream(seed, name, epoch)).tolist()
