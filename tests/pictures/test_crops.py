"""The sheet of crops; that training's crops equal those by hand is tested in training/test_latents.py."""

import io
from pathlib import Path

import pytest
from PIL import Image, ImageChops, ImageStat

from helpers import gradient, jpg, jpgs
from lace_lora.pictures import checking, crops, gallery

SIDE, GAP = gallery.NAMED, gallery.GAP
HEIC = Path(__file__).parent / "heic"


def sheet_of(paths: list[Path], allowed: list[crops.Shape]) -> Image.Image:
    content = crops.preview({path: path.name for path in paths}, allowed, ("JPEG", "HEIF"))
    return Image.open(io.BytesIO(content))


@pytest.mark.parametrize("buckets", [False, True])
def test_every_cell_is_the_crop_that_is_learnt(buckets: bool, tmp_path: Path) -> None:
    paths = [
        jpg(tmp_path / "a.jpg", gradient(2000, 1200)),
        jpg(tmp_path / "b.jpg", gradient(2000, 800, turn=5), orientation=6),
        HEIC / "turned.heic",
    ]
    allowed = crops.shapes(512, buckets)
    sheet = sheet_of(paths, allowed)
    assert (sheet.mode, sheet.width) == ("RGB", GAP + 3 * (SIDE + GAP))
    for column, path in enumerate(paths):
        crop, _ = crops.open_crop(path, allowed, ("JPEG", "HEIF"))  # as training does
        assert (crop.size == (512, 512)) == (not buckets)
        crop.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        left, top = GAP + column * (SIDE + GAP) + (SIDE - crop.width) // 2, GAP + (SIDE - crop.height) // 2
        cell = sheet.crop((left, top, left + crop.width, top + crop.height))
        assert max(ImageStat.Stat(ImageChops.difference(cell, crop)).mean) < 2


def test_small_pictures_are_shown_as_large_as_the_others(tmp_path: Path) -> None:
    sheet = sheet_of([jpg(tmp_path / "a.jpg", gradient(64, 48))], [(512, 512)])
    assert sheet.getpixel((GAP + SIDE - 1, GAP + SIDE - 1)) != (255, 255, 255)


def test_names_stand_below_and_are_shortened(tmp_path: Path) -> None:
    names = ["short.jpg", "a very long name of a picture of lace 0123456789.jpg", "broken \udc80.jpg", "häkel 🧵.jpg"]
    sheet = Image.open(io.BytesIO(gallery.named_sheet([gradient()] * 4, names)))
    for column in range(4):
        left = GAP + column * (SIDE + GAP)
        below = sheet.convert("L").crop((left, GAP + SIDE, left + SIDE, sheet.height))
        assert ImageStat.Stat(below).extrema[0][0] < 128
        gap = sheet.convert("L").crop((left + SIDE, GAP + SIDE, left + SIDE + GAP, sheet.height))
        assert gap.getextrema() == (255, 255)


def test_three_hundred_pictures_are_few_to_a_row(tmp_path: Path) -> None:
    sheet = Image.open(io.BytesIO(gallery.named_sheet([gradient()] * 300, ["lace.jpg"] * 300)))
    assert sheet.width < 1600
    assert sheet.height < 38 * (SIDE + 40)


def test_it_is_recognised_as_drawn_by_this_program(tmp_path: Path) -> None:
    paths = jpgs(tmp_path, 2)
    (tmp_path / "sheet.png").write_bytes(crops.preview({path: "x" for path in paths}, [(64, 64)], ("JPEG",)))
    [found] = checking.check_pictures([tmp_path / "sheet.png"], 32, ("PNG",))
    assert found.drawn
    assert gallery.is_sheet(tmp_path / "sheet.png")
    assert not gallery.is_sheet(paths[0])
