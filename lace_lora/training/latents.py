"""Pictures to latents: prefetched on threads, encoded by the VAE once, and cached for the next run."""

import hashlib
import io
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from PIL import ImageOps
from torch import Tensor

from lace_lora.errors import UserError
from lace_lora.pictures.crops import Shape, open_crop
from lace_lora.pictures.image_files import BROKEN
from lace_lora.progress import Progress
from lace_lora.sdxl.vae import encode_pixels, to_tensor
from lace_lora.training import cache

_VERSION = 2  # of the cached latents: count up when pictures are encoded in another way


@dataclass(frozen=True)
class Latents:
    """N pictures, each in F versions: the picture, and with `random_flip` its mirror image."""

    mean: list[Tensor]  # N of (F, 4, h, w): the VAE's posterior, in the UNet's scale
    std: list[Tensor]  # N of (F, 4, h, w)
    time_ids: Tensor  # (N, 6) original height and width, crop top and left, target height and width

    def __add__(self, other: "Latents") -> "Latents":
        return Latents(self.mean + other.mean, self.std + other.std, torch.cat([self.time_ids, other.time_ids]))


def encode_pictures(
    load_vae: Callable[[], AutoencoderKL],
    contents: Mapping[Path, str],
    allowed: Sequence[Shape],
    mirrored: bool,
    formats: Sequence[str] = ("JPEG",),
    depends_on: Any = None,
) -> Latents:
    """Encode every picture once, or take its latents from the cache of an earlier run.

    The posterior's mean and std are cached, not a sample of it: sampling belongs to the step. A mirrored version is
    encoded on its own, because mirrored latents are not the latents of the mirrored picture.

    Args:
        load_vae: called only if latents are not in the cache.
        contents: SHA-256 of each picture file.
        allowed: shapes, of which each picture is scaled and cropped to the one nearest to its own.
        depends_on: all else that cached latents must have been made with: the VAE, its dtype.

    Raises:
        UserError: a picture was changed during the run, or the VAE's output for it is not finite (exit 5).
    """

    def make() -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        time_ids = []
        vae = load_vae()
        read = partial(_read, contents=contents, allowed=allowed, mirrored=mirrored, formats=formats)
        decoded = Progress(_prefetch(read, contents), desc="encoding pictures", unit="picture", total=len(contents))
        for number, (path, (pixels, ids)) in enumerate(zip(contents, decoded, strict=True)):
            tensors[f"mean.{number}"], tensors[f"std.{number}"] = encode_pixels(vae, pixels, path)
            time_ids.append(ids)
        return tensors | {"time_ids": torch.tensor(time_ids, dtype=torch.float32)}

    key = {"version": _VERSION, "pictures": list(contents.values()), "shapes": allowed, "mirrored": mirrored,
           "depends_on": depends_on}  # fmt: skip
    tensors = cache.cached(key, make)
    means, stds = ([tensors[f"{name}.{number}"] for number in range(len(contents))] for name in ("mean", "std"))
    return Latents(means, stds, tensors["time_ids"])


def _read(
    path: Path, contents: Mapping[Path, str], allowed: Sequence[Shape], mirrored: bool, formats: Sequence[str]
) -> tuple[Tensor, list[int]]:
    """A picture file as pixels (F, 3, height, width), and its time ids."""
    try:
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != contents[path]:
            raise UserError(f"{path} was changed while the program was running: run the same command again")
        part, time_ids = open_crop(io.BytesIO(content), allowed, formats)
    except BROKEN as error:
        raise UserError(f"{path} can no longer be read ({error}): run the same command again") from error
    versions = [part, ImageOps.mirror(part)] if mirrored else [part]
    return torch.stack([to_tensor(version) for version in versions]), time_ids


def _prefetch(function: Callable[[Path], Any], items: Iterable[Path]) -> Iterator[Any]:
    """`map` on several threads, with few results in memory at any time.

    Threads are enough: Pillow releases the GIL, and separate processes have read all of these files without a crash.
    """
    threads = min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool:
        results = (pool.submit(function, item) for item in items)
        waiting = deque(islice(results, threads))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(islice(results, 1))
