"""Copies, odd ones out, and what to set where no picture can be used."""

from pathlib import Path

import pytest

import data_utils
from helpers import photo
from lace_lora.pictures import checking, photo_folder


def test_odd_ones_among_photos_are_named(tmp_path: Path) -> None:
    for number in range(12):
        photo(tmp_path / f"IMG_{number}.jpg", (400, 300))
    photo(tmp_path / "from chat.jpg", (400, 300), camera=False)
    photo(tmp_path / "panorama.jpg", (900, 200))
    photo(tmp_path / "Screenshot 2026.jpg", (300, 400), camera=False)
    photo(tmp_path / "thumbnail.jpg", (80, 60))
    pictures = checking.check_pictures(data_utils.list_images(tmp_path), 32)
    assert photo_folder.odd_ones(pictures, tmp_path) == [
        "Screenshot 2026.jpg (a screenshot by its name, 300x400)",
        "from chat.jpg (no camera named, as in a screenshot or a picture from a messenger, 400x300)",
        "panorama.jpg (another shape, 900x200)",
        "thumbnail.jpg (much smaller, 80x60)",
    ]
    text = data_utils.report_text(tmp_path, pictures, data_utils.Annotations(tmp_path, {}, False), "lace")
    assert "16 used, 0 skipped" in text
    assert "  odd ones     4, used too; remove those that do not belong here: Screenshot 2026.jpg (a screenshot" in text


@pytest.mark.parametrize("cameras", [0, 5])
def test_without_cameras_in_most_pictures_none_is_odd(cameras: int, tmp_path: Path) -> None:
    """As with scans, drawn lace, and what messengers have passed on."""
    for number in range(9):
        photo(tmp_path / f"{number}.jpg", camera=number < cameras)
    photo(tmp_path / "screenshot.jpg", (80, 300), camera=False)
    pictures = checking.check_pictures(data_utils.list_images(tmp_path), 32)
    assert photo_folder.odd_ones(pictures, tmp_path) == []
    assert photo_folder.odd_ones([], tmp_path) == []


def test_of_equal_pictures_the_one_with_a_caption_stays(tmp_path: Path) -> None:
    pictures = [checking.Picture(tmp_path / name, 9, 9, "same") for name in "abc"]
    kept = photo_folder.without_duplicates(pictures, tmp_path, {tmp_path / "b": "lace"})
    assert [picture.reason for picture in kept] == ["duplicate: equal to b", "", "duplicate: equal to b"]


def test_another_caption_of_an_equal_picture_is_said_to_be_unused(tmp_path: Path) -> None:
    pictures = [checking.Picture(tmp_path / name, 9, 9, "same") for name in "abc"]
    captions = {tmp_path / "a": "lace", tmp_path / "b": "lace", tmp_path / "c": "a net"}
    kept = photo_folder.without_duplicates(pictures, tmp_path, captions)
    unused = "duplicate: equal to a, but its own caption is not used"
    assert [picture.reason for picture in kept] == ["", "duplicate: equal to a", unused]


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ([], "no files: set images_dir to another folder"),
        (["a.bmp", "b.tif", "c.mov"], "1 .bmp, 1 .tif, 1 .mov: set image_extensions: [.jpg, .png, .bmp, .tif], "
         "or set images_dir to another folder"),
        (["a/x.jpg", "a/b/y.jpg", "notes"], "1 without extension, and 2 .jpg in subfolders: set recursive: true, or"),
        (["a/x.bmp"], "no files, and 1 .bmp in subfolders: set recursive: true, and set image_extensions: [.jpg, .png, "
         ".bmp], or set images_dir"),
        (["a.jpg"], "1 .jpg: see the list above, or set images_dir"),
    ],
)  # fmt: skip
def test_a_folder_without_a_usable_picture(names: list[str], says: str, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    text = photo_folder.nothing_usable(tmp_path, [".jpg", ".png"], False)
    assert text.startswith(f"{tmp_path} has {says}")
