"""Close-ups, and the sheet of crops; that whole pictures equal crops by hand is tested in training/test_latents.py."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops, ImageStat

from helpers import gradient, jpg, jpgs
from lace_lora.config import Config
from lace_lora.pictures import checking, crops, gallery

SIDE, GAP = gallery.NAMED, gallery.GAP
HEIC = Path(__file__).parent / "heic"


def sheet_of(paths: list[Path], cropping: crops.Cropping) -> Image.Image:
    content = crops.preview({path: path.name for path in paths}, cropping, ("JPEG", "HEIF", "PNG"))
    return Image.open(io.BytesIO(content))


@pytest.mark.parametrize("buckets", [False, True])
def test_every_cell_is_the_crop_that_is_learnt(buckets: bool, tmp_path: Path) -> None:
    paths = [
        jpg(tmp_path / "a.jpg", gradient(2000, 1200)),
        jpg(tmp_path / "b.jpg", gradient(2000, 800, turn=5), orientation=6),
        HEIC / "turned.heic",
    ]
    cropping = crops.Cropping(crops.shapes(512, buckets))
    sheet = sheet_of(paths, cropping)
    assert (sheet.mode, sheet.width) == ("RGB", GAP + 3 * (SIDE + GAP))
    for column, path in enumerate(paths):
        [(crop, _)] = crops.open_views(path, cropping, ("JPEG", "HEIF"))  # as training does
        assert (crop.size == (512, 512)) == (not buckets)
        crop.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        left, top = GAP + column * (SIDE + GAP) + (SIDE - crop.width) // 2, GAP + (SIDE - crop.height) // 2
        cell = sheet.crop((left, top, left + crop.width, top + crop.height))
        assert max(ImageStat.Stat(ImageChops.difference(cell, crop)).mean) < 2


def test_small_pictures_are_shown_as_large_as_the_others(tmp_path: Path) -> None:
    sheet = sheet_of([jpg(tmp_path / "a.jpg", gradient(64, 48))], crops.Cropping([(512, 512)]))
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
    (tmp_path / "sheet.png").write_bytes(
        crops.preview({path: "x" for path in paths}, crops.Cropping([(64, 64)]), ("JPEG",))
    )
    [found] = checking.check_pictures([tmp_path / "sheet.png"], 32, ("PNG",))
    assert found.drawn
    assert gallery.is_sheet(tmp_path / "sheet.png")
    assert not gallery.is_sheet(paths[0])


# --- close-ups

HALF = crops.Cropping([(64, 64)], share=0.5, most=4, seed=1)


@pytest.mark.parametrize(
    ("size", "changes", "views"),
    [
        ((3024, 4032), {}, 4),
        ((1024, 1024), {}, 4),
        ((1023, 4000), {}, 1),  # close-ups would be enlarged
        ((3024, 4032), {"crops_per_image": 9}, 9),
        ((3024, 4032), {"crops_per_image": 1}, 1),
        ((3024, 4032), {"resolution": 1024}, 1),  # threads are as wide in training as in drawings already
        ((3024, 4032), {"resolution": 768}, 3),
        ((3024, 4032), {"width": 512}, 4),  # what is drawn later does not matter
        ((3024, 4032), {"train_script": "script.py"}, 1),
        ((3024, 4032), {"aspect_ratio_buckets": True}, 4),
    ],
)
def test_large_photos_have_close_ups(size: tuple[int, int], changes: dict[str, Any], views: int) -> None:
    assert crops.Cropping.of(Config(**changes)).views(*size) == views


def textured(folder: Path, empty: Sequence[tuple[int, int, int, int]] = (), name: str = "lace") -> Path:
    """A photo whose red and green tell the place, with threads in its blue, but none in the boxes of `empty`."""
    picture = gradient(400, 300)
    red, green, _ = picture.split()
    blue = Image.new("L", picture.size)
    for x in range(0, 400, 4):
        blue.paste(255, (x, 0, x + 2, 300))
    for box in empty:
        blue.paste(0, box)
    path = folder / f"{name}.png"
    Image.merge("RGB", (red, green, blue)).save(path)
    return path


def places(views: Sequence[crops.View]) -> list[tuple[float, float]]:
    """Where in a picture by `textured` the middles of its close-ups are, in pixels."""
    means = [ImageStat.Stat(part).mean for part, _ in views[1:]]
    return [(red / 255 * 400, green / 255 * 300) for red, green, _ in means]


def test_close_ups_are_parts_of_the_photo_with_the_size_of_their_own(tmp_path: Path) -> None:
    path = textured(tmp_path)
    views = crops.open_views(path, HALF, ("PNG",))
    assert [part.size for part, _ in views] == [(64, 64)] * 4
    assert [ids for _, ids in views] == [[300, 400, 0, 10, 64, 64], *[[150, 150, 0, 0, 64, 64]] * 3]
    photo = Image.open(path)
    for (part, _), (x, y) in zip(views[1:], places(views), strict=True):
        box = (round(x - 75), round(y - 75), round(x + 75), round(y + 75))
        by_hand = photo.crop(box).resize((64, 64), Image.Resampling.LANCZOS)
        for band in range(2):  # the third has lines, which a pixel's difference moves
            assert ImageStat.Stat(ImageChops.difference(part.getchannel(band), by_hand.getchannel(band))).mean[0] < 3
    assert [ids for _, ids in crops.open_views(path, HALF, ("PNG",), wanted=[0, 2])] == [views[0][1], views[2][1]]
    assert places([views[0], *crops.open_views(path, HALF, ("PNG",), wanted=[3])]) == places(views)[2:]


def test_close_ups_are_where_detail_is_and_apart(tmp_path: Path) -> None:
    everywhere = places(crops.open_views(textured(tmp_path), HALF, ("PNG",)))
    apart = [
        abs(one[0] - other[0]) + abs(one[1] - other[1]) for one in everywhere for other in everywhere if one < other
    ]
    assert min(apart) > 75  # half their side
    left = textured(tmp_path, empty=[(200, 0, 400, 300)], name="left")
    assert all(x < 200 for x, _ in places(crops.open_views(left, HALF, ("PNG",))))


def test_seed_and_picture_choose_the_close_ups(tmp_path: Path) -> None:
    path, other = textured(tmp_path), textured(tmp_path, empty=[(0, 0, 9, 9)], name="other")
    chosen = {
        tuple(places(crops.open_views(photo, crops.Cropping([(64, 64)], 0.5, 4, seed), ("PNG",))))
        for photo in (path, other, path)
        for seed in (1, 2, 3)
    }
    assert len(chosen) > 3


def test_close_ups_have_their_pictures_shape(tmp_path: Path) -> None:
    cropping = crops.Cropping(crops.shapes(64, buckets=True), 0.5, 3, 0)
    views = crops.open_views(textured(tmp_path), cropping, ("PNG",))
    shape = views[0][1][4:]
    assert shape[0] < shape[1]
    assert all(part.size == (shape[1], shape[0]) and ids[4:] == shape for part, ids in views)


def test_the_sheet_has_close_ups_beside_their_picture(tmp_path: Path) -> None:
    path = textured(tmp_path)
    sheet, views = sheet_of([path], HALF), crops.open_views(path, HALF, ("PNG",))
    side = (SIDE - 3) * 3 // 4
    left, top = GAP + (SIDE - side - side // 3) // 2, GAP + (SIDE - side) // 2
    for number, (part, _) in enumerate(views):
        small = part.resize((side, side)) if not number else part.resize((side // 3 - 3, side // 3 - 3))
        corner = (left, top) if not number else (left + side + 3, top + (number - 1) * side // 3)
        cell = sheet.crop((*corner, corner[0] + small.width, corner[1] + small.height))
        assert max(ImageStat.Stat(ImageChops.difference(cell, small)).mean) < 4
