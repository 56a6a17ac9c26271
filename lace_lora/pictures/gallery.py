"""Finished pictures to look through: a contact sheet, and a page."""

import base64
import hashlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from lace_lora.pictures.image_files import BROKEN, PNG_OPTIONS, open_finished
from lace_lora.pictures.recipe import TEXT, Design

CONTACT_SHEET, PAGE, MANIFEST = "contact_sheet.png", "gallery.html", "manifest.json"
SMALL, LARGE = 320, 1024  # longer side of a picture in pixels, at most: on the contact sheet, on the page
NAMED = 180  # the same, on a sheet with names
GAP = 8  # pixels between pictures on the contact sheet
SHEET = "contact sheet"  # what our text in such a PNG says
Attributes = dict[str, str | int]  # of an element of HTML


@dataclass(frozen=True)
class Card:
    """What the page shows of one picture; what is None or empty is left out."""

    design: Design
    file: Path  # the finished picture
    base: Path | None = None  # as it was before refining
    latent_change: float | None = None  # by refining, as a share of its latents: 0.1 is 10 %
    edge_change: float | None = None  # likewise of its edges; below 0 they are weaker
    warning: str = ""  # why it is flagged


@dataclass(frozen=True)
class Preview:
    """A finished picture in the sizes that are shown."""

    attributes: Attributes  # of an <img> on the page
    small: Image.Image  # on the contact sheet


def make_preview(path: Path, picture: Image.Image | None = None) -> Preview:
    """The preview of a finished picture; `picture` is the file's content, if it is in memory."""
    picture = picture or open_finished(path)
    return Preview(embed(path, picture), _shrink(picture, SMALL))


def contact_sheet(pictures: Sequence[Image.Image], side: int = SMALL) -> bytes:
    """All pictures in rows on one PNG, each fitted into a square of at most `side` pixels."""
    side = min(side, max(max(picture.size) for picture in pictures))
    columns = math.ceil(math.sqrt(len(pictures) * 1.5))
    rows, cell = math.ceil(len(pictures) / columns), side + GAP
    sheet = Image.new("RGB", (columns * cell + GAP, rows * cell + GAP), "white")
    for position, picture in enumerate(pictures):
        (row, column), small = divmod(position, columns), _shrink(picture, side)
        left, top = (side - small.width) // 2, (side - small.height) // 2
        sheet.paste(small, (GAP + column * cell + left, GAP + row * cell + top))
    return _as_png(sheet)


def column(pictures: Sequence[Image.Image], side: int = 512) -> bytes:
    """Pictures of one size below one another on a PNG, each within `side` pixels: a column of `strip`."""
    small = [_shrink(picture, side) for picture in pictures]
    height = small[0].height + GAP
    sheet = Image.new("RGB", (small[0].width, height * len(small) - GAP), "white")
    for row, picture in enumerate(small):
        sheet.paste(picture, (0, row * height))
    return _as_png(sheet)


def strip(columns: Mapping[str, Image.Image]) -> bytes:
    """Columns of one size beside one another on a PNG, with the name of each below it; at most 8192 pixels wide."""
    full = next(iter(columns.values()))
    width = min(full.width, 8192 // len(columns) - GAP)
    height, text = round(full.height * width / full.width), max(12, width // 16)
    sheet = Image.new("RGB", ((width + GAP) * len(columns) + GAP, height + 3 * GAP + text), "white")
    draw, font = ImageDraw.Draw(sheet), _font(text)
    for place, (name, picture) in enumerate(columns.items()):
        left = GAP + place * (width + GAP)
        sheet.paste(picture.resize((width, height), Image.Resampling.LANCZOS), (left, GAP))
        draw.text((left + width / 2, height + 2 * GAP), name, fill="black", font=font, anchor="ma")
    return _as_png(sheet)


def named_sheet(pictures: Sequence[Image.Image], names: Sequence[str]) -> bytes:
    """Pictures of at most `NAMED` pixels in rows of eight or fewer on a PNG, with the name of each below it."""
    columns, text = min(8, len(pictures)), 12
    width, height = NAMED + GAP, NAMED + text + 2 * GAP
    sheet = Image.new("RGB", (columns * width + GAP, math.ceil(len(pictures) / columns) * height + GAP), "white")
    draw, font = ImageDraw.Draw(sheet), _font(text)
    for position, (picture, name) in enumerate(zip(pictures, names, strict=True)):
        row, column = divmod(position, columns)
        left, top = GAP + column * width, GAP + row * height
        sheet.paste(picture, (left + (NAMED - picture.width) // 2, top + (NAMED - picture.height) // 2))
        draw.text((left + NAMED / 2, top + NAMED + 2), _shorten(name, font), fill="black", font=font, anchor="ma")
    return _as_png(sheet)


def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib: Pillow's own font has no letters beyond English."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)


def _shorten(name: str, font: ImageFont.FreeTypeFont) -> str:
    """A name without its middle, if it is too long to stand below a picture."""
    name = name.encode(errors="replace").decode()  # fonts have no bytes that are not UTF-8
    shorter = name
    for left_out in range(1, len(name)):
        if font.getlength(shorter) <= NAMED:
            break
        start = (len(name) - left_out) // 2
        shorter = f"{name[:start]}...{name[start + left_out :]}"
    return shorter


def is_sheet(path: Path) -> bool:
    """Whether a file is a PNG with several pictures, as the functions above make it."""
    try:
        with Image.open(path, formats=("PNG",)) as picture:
            return picture.info.get(TEXT) == SHEET
    except BROKEN:
        return False


def _as_png(sheet: Image.Image) -> bytes:
    content, text = io.BytesIO(), PngImagePlugin.PngInfo()
    text.add_itxt(TEXT, SHEET)  # so that nobody trains on it by mistake
    sheet.save(content, format="PNG", pnginfo=text, **PNG_OPTIONS)
    return content.getvalue()


def page(
    title: str, cards: Sequence[Card], recipe: dict[str, Any], embedded: dict[Path, Attributes] | None = None
) -> str:
    """One HTML file that needs no other: every picture inside it, with its prompt and seed.

    Pictures link to their files by name alone, so the page belongs in the folder of `Card.file`. `embedded` is what
    `embed` already returned for some of them.

    Raises:
        OSError: a picture cannot be read.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    embedded = embedded or {}
    missing = {path for card in cards for path in (card.file, card.base) if path} - embedded.keys()
    with ThreadPoolExecutor() as pool:
        embedded = embedded | dict(zip(missing, pool.map(embed, missing), strict=True))
    environment.filters |= {"embedded": embedded.__getitem__, "csp_hash": _csp_hash}
    return environment.get_template("gallery_page.html").render(
        title=title,
        cards=cards,
        prompts=list(dict.fromkeys(card.design.prompt for card in cards)),
        settings=json.dumps(recipe, indent=2, ensure_ascii=False),
    )


def embed(path: Path, picture: Image.Image | None = None) -> Attributes:
    """A picture as the attributes of an <img> that needs no file; for `picture` see `make_preview`."""
    picture = picture or open_finished(path)
    small = _shrink(picture, LARGE)
    if small.size == picture.size and path.suffix == ".jpg" and "comment" not in picture.info:
        content = path.read_bytes()
    else:  # also to leave out a recipe
        file = io.BytesIO()
        small.save(file, format="JPEG", quality=88, comment=b"")
        content = file.getvalue()
    source = "data:image/jpeg;base64," + base64.b64encode(content).decode()
    return {"src": source, "width": small.width, "height": small.height}


def _shrink(picture: Image.Image, side: int) -> Image.Image:
    scale = min(1.0, side / max(picture.size))
    width, height = (max(1, round(length * scale)) for length in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def _csp_hash(content: str) -> str:
    """An inline style or script as a Content-Security-Policy names it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
