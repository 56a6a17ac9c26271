"""What training sees of a picture: the shapes it may have, the crop, and a sheet of all crops to look at."""

import io
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from lace_lora.pictures.gallery import NAMED, named_sheet
from lace_lora.pictures.image_files import fit, open_picture
from lace_lora.progress import Progress

Shape = tuple[int, int]  # height and width in pixels


def shapes(resolution: int, buckets: bool) -> list[Shape]:
    """What pictures are cropped to: a square, or SDXL's bucket list scaled to `resolution`, in multiples of 32 pixels.

    Podell et al. 2023, "SDXL", appendix I: sides in multiples of 64, 0.9 to 1 times 1024²; 1344x704 only in portrait.
    """
    if not buckets:
        return [(resolution, resolution)]
    sides = range(512, 2049, 64)
    pairs = [(short, long) for short in sides for long in reversed(sides) if 0.9 <= short * long / 1024**2 <= 1]
    scaled = [tuple(max(32, round(side * resolution / 1024 / 32) * 32) for side in pair) for pair in pairs]
    return list(dict.fromkeys(shape for short, long in scaled for shape in ((short, long), (long, short))))


def open_crop(
    source: Path | io.BytesIO, allowed: Sequence[Shape], formats: Sequence[str], at_least: int | None = None
) -> tuple[Image.Image, list[int]]:
    """A picture, scaled and cropped to the shape in `allowed` nearest to its own, and its six time ids for SDXL.

    For `at_least`, `formats` and what it raises see `open_picture`. Without `at_least` it is twice the training size:
    enough to scale down from, and much faster to decode.
    """
    picture, (width, height) = open_picture(source, at_least or 2 * max(map(min, allowed)), formats)
    shape = min(allowed, key=lambda shape: abs(math.log(shape[0] * width / (shape[1] * height))))
    part, corner = fit(picture, shape)
    return part, [height, width, *corner, *shape]


def preview(pictures: Mapping[Path, str], allowed: Sequence[Shape], formats: Sequence[str]) -> bytes:
    """A PNG of all crops, small, each with its name; decoded no larger than shown. Raises what `open_crop` raises."""

    def small(path: Path) -> Image.Image:
        part, _ = open_crop(path, allowed, formats, at_least=NAMED)
        part.thumbnail((NAMED, NAMED), Image.Resampling.LANCZOS)
        return part

    with ThreadPoolExecutor(8) as pool:
        found = pool.map(small, pictures)
        cells = list(Progress(found, desc="preview", unit="picture", total=len(pictures)))
    return named_sheet(cells, list(pictures.values()))
