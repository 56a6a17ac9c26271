"""Pictures to latents: prefetched on threads, encoded by the VAE once, and cached for the next run."""

import hashlib
import io
import os
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageOps
from torch import Tensor

from lace_lora.errors import UserError
from lace_lora.pictures.crops import Cropping, open_views
from lace_lora.pictures.image_files import BROKEN
from lace_lora.progress import Progress
from lace_lora.sdxl.vae import encode_pixels, to_tensor
from lace_lora.training import cache

_VERSION = 2  # of the cached latents: count up when pictures are encoded in another way
_TURNS = (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)


@dataclass(frozen=True)
class Latents:
    """N views of pictures, each in F versions: as it is, mirrored with `random_flip`, turned with `random_rotate`."""

    mean: list[Tensor]  # N of (F, 4, h, w): the VAE's posterior, in the UNet's scale; (F, 0) for a view left out
    std: list[Tensor]  # the same shapes
    time_ids: Tensor  # (N, 6) original height and width, crop top and left, target height and width

    def __add__(self, other: "Latents") -> "Latents":
        return Latents(self.mean + other.mean, self.std + other.std, torch.cat([self.time_ids, other.time_ids]))


def encode_pictures(
    load_vae: Callable[[], AutoencoderKL],
    contents: Mapping[Path, str],
    cropping: Cropping,
    mirrored: bool = False,
    turned: bool = False,
    formats: Sequence[str] = ("JPEG",),
    depends_on: Any = None,
    drawn: Mapping[Path, Sequence[bool]] | None = None,
) -> Latents:
    """Encode every view of every picture once, or take the latents from the cache of an earlier run.

    The posterior's mean and std are cached, not a sample of it: sampling belongs to the step. A mirrored version is
    encoded on its own, because mirrored latents are not the latents of the mirrored picture; so is a turned one.

    Args:
        load_vae: called only if latents are not in the cache.
        contents: SHA-256 of each picture file.
        mirrored: also a mirror image of each view.
        turned: also each by a quarter, half and three quarters of a turn; all shapes are square.
        depends_on: all else that cached latents must have been made with: the VAE, its dtype.
        drawn: for each picture, for each of its views whether it is encoded; all are, if this is left out.

    Raises:
        UserError: a picture was changed during the run, or the VAE's output for it is not finite (exit 5).
    """

    wanted = {path: [number for number, is_drawn in enumerate(drawn[path]) if is_drawn] if drawn else None
              for path in contents}  # fmt: skip

    def make() -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        time_ids: list[list[int]] = []
        vae = load_vae()
        paths = [path for path in contents if wanted[path] != []]
        read = partial(_read, contents=contents, cropping=cropping, formats=formats, wanted=wanted,
                       mirrored=mirrored, turned=turned)  # fmt: skip
        decoded = Progress(_prefetch(read, paths), desc="encoding pictures", unit="picture", total=len(paths))
        for path, views in zip(paths, decoded, strict=True):
            for pixels, ids in views:
                view = len(time_ids)
                tensors[f"mean.{view}"], tensors[f"std.{view}"] = encode_pixels(vae, pixels, path)
                time_ids.append(ids)
        return tensors | {"time_ids": torch.tensor(time_ids, dtype=torch.float32)}

    close_ups = [cropping.share, cropping.most, cropping.seed] if cropping.most > 1 else None
    key = {"version": _VERSION, "pictures": list(contents.values()), "shapes": cropping.shapes, "mirrored": mirrored,
           "turned": turned, "close_ups": close_ups, "wanted": list(wanted.values()),
           "depends_on": depends_on}  # fmt: skip
    tensors = cache.cached(key, make)
    time_ids = tensors["time_ids"]
    means, stds = ([tensors[f"{name}.{view}"] for view in range(len(time_ids))] for name in ("mean", "std"))
    if not drawn:
        return Latents(means, stds, time_ids)
    return _with_gaps(Latents(means, stds, time_ids), [each for path in contents for each in drawn[path]], cropping)


def _with_gaps(latents: Latents, is_there: Sequence[bool], cropping: Cropping) -> Latents:
    """Latents of some of the views, with nothing in place of the others; all have one shape."""
    [shape], nothing = cropping.shapes, torch.empty(len(latents.mean[0]), 0)
    means, stds = iter(latents.mean), iter(latents.std)
    time_ids = torch.tensor([0.0, 0, 0, 0, *shape]).repeat(len(is_there), 1)
    time_ids[torch.tensor(is_there)] = latents.time_ids
    return Latents(
        [next(means) if there else nothing for there in is_there],
        [next(stds) if there else nothing for there in is_there],
        time_ids,
    )


def _read(
    path: Path, contents: Mapping[Path, str], cropping: Cropping, formats: Sequence[str],
    wanted: Mapping[Path, Collection[int] | None], mirrored: bool, turned: bool,
) -> list[tuple[Tensor, list[int]]]:  # fmt: skip
    """A picture file's views as pixels (F, 3, height, width), each with its time ids."""
    try:
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != contents[path]:
            raise UserError(f"{path} was changed while the program was running: run the same command again")
        views = open_views(io.BytesIO(content), cropping, formats, wanted[path])
    except BROKEN as error:
        raise UserError(f"{path} can no longer be read ({error}): run the same command again") from error
    return [(torch.stack([to_tensor(each) for each in _versions(part, mirrored, turned)]), ids) for part, ids in views]


def _versions(part: Image.Image, mirrored: bool, turned: bool) -> list[Image.Image]:
    versions = [part, ImageOps.mirror(part)] if mirrored else [part]
    return versions + [each.transpose(turn) for each in versions for turn in _TURNS if turned]


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
