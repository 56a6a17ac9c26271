"""What training sees of a picture: the whole of it and close-ups, their shapes, and a sheet of all to look at."""

import io
import math
import random
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageFilter, ImageOps

from lace_lora.config import Config
from lace_lora.pictures.gallery import NAMED, named_sheet
from lace_lora.pictures.image_files import fit, open_picture
from lace_lora.progress import Progress

Shape = tuple[int, int]  # height and width in pixels
Box = tuple[float, float, float, float]  # left, top, right and bottom in pixels
View = tuple[Image.Image, list[int]]  # a crop, scaled to its shape, and its six time ids for SDXL

DRAWN_SIDE = 1024  # pixels, of the pictures that SDXL is made for
MOST_VIEWS = 4  # of a picture, unless the user sets another number
_GREY = 64  # pixels of a close-up's shorter side, in which its detail is measured
_GAP = 3  # pixels between a picture and its close-ups on the sheet
_PLACES = 9  # along either side, at which a close-up may be


@dataclass(frozen=True)
class Cropping:
    """How pictures are cropped: the whole, as large as its shape allows, then close-ups."""

    shapes: Sequence[Shape]
    share: float = 1.0  # side of a close-up, of the whole's
    most: int = 1  # views of a picture
    seed: int = 0

    @classmethod
    def of(cls, config: Config) -> "Cropping":
        """Close-ups are so large that threads are as wide in training as in a drawing of the whole picture by SDXL."""
        share = min(1.0, config.resolution / DRAWN_SIDE)
        most = config.crops_per_image or min(MOST_VIEWS, 1 + round(1 / share**2))
        if share == 1 or config.train_script:  # the script makes crops of its own
            most = 1
        return cls(shapes(config.resolution, config.aspect_ratio_buckets), share, most, config.seed)

    def shape(self, width: int, height: int) -> Shape:
        """The shape nearest to a picture's own."""
        return min(self.shapes, key=lambda shape: abs(math.log(shape[0] * width / (shape[1] * height))))

    def views(self, width: int, height: int) -> int:
        """How many views a picture has; none is a close-up if that would have to be enlarged."""
        shape = self.shape(width, height)
        return self.most if max(shape[0] / height, shape[1] / width) <= self.share else 1


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


def open_views(
    source: Path | io.BytesIO, cropping: Cropping, formats: Sequence[str], wanted: Collection[int] | None = None
) -> list[View]:
    """The views of a picture, or the `wanted` ones of them by their numbers; view 0 is the whole.

    A close-up is a picture of its own: its size in the photo is its original size, and it is not cropped, which is what
    drawing asks for. For `formats` and what it raises see `open_picture`.
    """
    # Enough to scale down from, and much faster to decode.
    at_least = math.ceil(max(2, 1 / cropping.share) * max(map(min, cropping.shapes)))
    picture, (width, height) = open_picture(source, at_least, formats)
    shape = cropping.shape(width, height)

    def whole() -> View:
        part, corner = fit(picture, shape)
        return part, [height, width, *corner, *shape]

    def close_up(box: Box) -> View:
        part = picture.resize(shape[::-1], Image.Resampling.LANCZOS, box)
        scale = height / picture.height
        return part, [round((box[3] - box[1]) * scale), round((box[2] - box[0]) * scale), 0, 0, *shape]

    count = cropping.views(width, height)
    boxes = _close_ups(picture, shape, cropping, count - 1) if count > 1 else []
    numbers = range(count) if wanted is None else sorted(wanted)
    return [close_up(boxes[number - 1]) if number else whole() for number in numbers]


def _close_ups(picture: Image.Image, shape: Shape, cropping: Cropping, count: int) -> list[Box]:
    """Where close-ups are: spread over a picture, at places with much detail; what is out of focus or empty has less.

    The seed and the picture decide where the first one is.
    """
    scale = cropping.share / max(shape[1] / picture.width, shape[0] / picture.height)
    width, height = scale * shape[1], scale * shape[0]
    factor = _GREY / min(width, height)
    grey = picture.convert("L").resize((round(picture.width * factor), round(picture.height * factor)))
    # The filter leaves the outermost pixels as they are.
    edges = grey.filter(ImageFilter.FIND_EDGES).crop((1, 1, grey.width - 1, grey.height - 1)).convert("F")
    across, down = edges.width / picture.width, edges.height / picture.height

    def detail(box: Box) -> float:
        left, top, right, bottom = box
        inside = (left * across, top * down, min(right * across, edges.width), min(bottom * down, edges.height))
        mean: Any = edges.resize((1, 1), Image.Resampling.BOX, inside).getpixel((0, 0))
        return float(mean)

    shares = [place / (_PLACES - 1) for place in range(_PLACES)]
    corners = [(x * (picture.width - width), y * (picture.height - height)) for y in shares for x in shares]
    boxes = [(left, top, left + width, top + height) for left, top in corners]
    details = {box: detail(box) for box in boxes}
    best = sorted(details, key=details.__getitem__, reverse=True)
    much = 0.6 * details[best[len(best) // 10]]
    good = [box for place, box in enumerate(best) if details[box] >= much or place < count]
    chosen = [random.Random(cropping.seed.to_bytes(8, "big") + grey.tobytes()).choice(good)]
    while len(chosen) < count:
        chosen.append(max(good, key=lambda box: min(math.dist(box[:2], other[:2]) for other in chosen)))
    return chosen


def preview(pictures: Mapping[Path, str], cropping: Cropping, formats: Sequence[str]) -> bytes:
    """A PNG of all pictures, small: each one's views and its name. Raises what `open_views` raises."""

    def small(path: Path) -> Image.Image:
        return _together([part for part, _ in open_views(path, cropping, formats)])

    with ThreadPoolExecutor(8) as pool:
        found = pool.map(small, pictures)
        cells = list(Progress(found, desc="preview", unit="picture", total=len(pictures)))
    return named_sheet(cells, list(pictures.values()))


def _together(views: Sequence[Image.Image]) -> Image.Image:
    """A picture's views in one of at most `NAMED` pixels: the whole, and its close-ups in a column beside it."""
    count = len(views) - 1
    if not count:
        return ImageOps.contain(views[0], (NAMED, NAMED))
    side = (NAMED - _GAP) * count // (count + 1)  # of the whole
    whole = ImageOps.contain(views[0], (side, side))
    close_ups = [ImageOps.contain(view, (side // count - _GAP, side // count - _GAP)) for view in views[1:]]
    cell = Image.new("RGB", (whole.width + _GAP + close_ups[0].width, whole.height), "white")
    cell.paste(whole, (0, 0))
    for number, part in enumerate(close_ups):
        cell.paste(part, (whole.width + _GAP, number * whole.height // count))
    return cell
