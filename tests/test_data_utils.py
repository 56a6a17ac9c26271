"""Finding pictures and the report on them; captions and annotations are in test_annotations.py."""

import errno
import json
import os
from pathlib import Path

import pytest

import data_utils
from helpers import as_file, gradient, jpg, jpgs, truncated_jpg
from lace_lora import files
from lace_lora.config import IMAGE_EXTENSIONS
from lace_lora.errors import UserError
from lace_lora.pictures import checking, image_files


def test_list_images(tmp_path: Path) -> None:
    wanted = ["A.JPG", "b.jpg", "ä 🧵.Jpg", "z z.jpg"]
    others = ["a.jpeg", "b.png", ".hidden.jpg", "._b.jpg", "b.txt", "annotations.txt", "jpg", "b.jpg.part", "c.heic"]
    for name in wanted + others:
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "c.jpg").write_bytes(b"x")
    assert data_utils.list_images(tmp_path) == [tmp_path / name for name in sorted(wanted)]
    assert data_utils.list_images(str(tmp_path), {".PNG", ".jpeg"}) == [tmp_path / "a.jpeg", tmp_path / "b.png"]
    assert data_utils.list_images(tmp_path, {".txt"}) == []


def test_relative_folders_give_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jpgs(tmp_path / "photos", 1)
    monkeypatch.chdir(tmp_path)
    assert data_utils.list_images("photos") == [Path("photos/lace_0.jpg")]
    monkeypatch.chdir("photos")
    assert data_utils.list_images(".") == [Path("lace_0.jpg")]


@pytest.mark.parametrize(("name", "part"), [("missing", "no such folder"), ("file", "not a folder")])
def test_a_missing_folder_or_a_file_is_refused(name: str, part: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=part) as caught:
        data_utils.list_images(tmp_path / name)
    assert caught.value.exit_code == 2


def report(folder: Path, *extensions: str) -> str:
    paths = data_utils.list_images(folder, extensions or (".jpg",))
    pictures = checking.check_pictures(paths, 32, image_files.formats_of(IMAGE_EXTENSIONS))
    pictures = data_utils.drop_duplicates(pictures, ())
    annotations = data_utils.plan_annotations(folder, "lace", [p.path for p in pictures if p.used], folder)
    return data_utils.report_text(folder, pictures, annotations, "lace")


def test_the_report_counts_everything(tmp_path: Path) -> None:
    jpgs(tmp_path, 3)
    jpg(tmp_path / "large.jpg", gradient(90, 200))
    (tmp_path / "copy.jpg").write_bytes((tmp_path / "lace_1.jpg").read_bytes())
    jpg(tmp_path / "tiny.jpg", gradient(20, 20))
    truncated_jpg(tmp_path / "cut.jpg")
    (tmp_path / "lace_0.txt").write_text("a rosette")
    (tmp_path / "cut.txt").write_text("of a picture that is skipped")
    (tmp_path / "lace 2.txt").write_text("of none")
    frames = {"save_all": True, "append_images": [gradient(turn=9)]}
    (tmp_path / "pages.jpg").write_bytes(as_file(gradient(turn=8), "TIFF", **frames).getvalue())
    for name in ("a.png", "b.PNG", "c.heic"):
        (tmp_path / name).write_bytes(b"x")
    text = report(tmp_path)
    assert "5 used, 3 skipped" in text
    assert "unused .txt  1: lace 2.txt (no picture of that name)" in text
    assert "pages        1 have several, of which the first is used: pages.jpg (2)" in text
    assert "64x48 to 90x200" in text
    assert "tiny.jpg (20x20" in text
    assert "cut.jpg (" in text
    assert "duplicate    1: lace_1.jpg (equal to copy.jpg)" in text
    assert "other files  1 .heic, 2 .png" in text
    assert "image_extensions: [.jpg, .heic, .png]" in text
    assert "5: 1 from .txt files next to the pictures, the others 'lace'" in text


def test_the_report_suggests_extensions_including_those_in_use(tmp_path: Path) -> None:
    jpgs(tmp_path, 1)
    gradient().save(tmp_path / "a.png")
    gradient().save(tmp_path / "a.webp")
    assert "image_extensions: [.jpg, .png, .webp]" in report(tmp_path, ".png")


def test_the_report_fits_a_screen_however_many_there_are(tmp_path: Path) -> None:
    pictures = [checking.Picture(tmp_path / f"{n}.jpg", 9, 9, str(n % 50)) for n in range(500)]
    pictures += [checking.Picture(tmp_path / f"{n}.jpg", reason=f"unreadable: because {n}") for n in range(500)]
    text = data_utils.report_text(tmp_path, pictures, data_utils.Annotations(tmp_path, {}, False), "lace")
    assert len(text.splitlines()) < 24
    assert "and 497 more" in text


def test_the_report_as_json() -> None:
    pictures = [
        checking.Picture(Path("ü 🧵.jpg"), 9, 8, "x"),
        checking.Picture(Path("b.jpg"), reason="too small: x"),
    ]
    rows = json.loads(data_utils.report_json(pictures))["pictures"]
    assert rows[0] == {"path": "ü 🧵.jpg", "taken": True, "reason": None, "width": 9, "height": 8}
    assert (rows[1]["taken"], rows[1]["reason"]) == (False, "too small: x")


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "a.txt"
    files.write_atomically(path, b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write_atomically(path, b"new")
    assert [(found.name, found.read_bytes()) for found in tmp_path.iterdir()] == [("a.txt", b"old")]


def test_of_equal_pictures_the_one_with_a_caption_stays(tmp_path: Path) -> None:
    names = {"a.jpg": "1", "b.jpg": "1", "c.jpg": "2"}
    same = [checking.Picture(tmp_path / name, 9, 9, digest) for name, digest in names.items()]
    same.append(checking.Picture(tmp_path / "d.jpg", 9, 9, "1", reason="unreadable: x"))
    found = data_utils.drop_duplicates(same, {tmp_path / "b.jpg"})
    assert [picture.reason for picture in found] == ["duplicate: equal to b.jpg", "", "", "unreadable: x"]
    assert [picture.used for picture in data_utils.drop_duplicates(same, ())] == [True, False, True, False]


def test_odd_ones_out_are_named(tmp_path: Path) -> None:
    photos = [checking.Picture(tmp_path / f"IMG_{n}.jpg", 4032, 3024, str(n), camera=True) for n in range(8)]
    assert data_utils.odd_ones_out(photos) == []
    odd = [
        checking.Picture(tmp_path / "Screenshot_2026.png", 1170, 2532, "s"),
        checking.Picture(tmp_path / "from a shop.jpg", 3000, 3000, "w"),
        checking.Picture(tmp_path / "icon.jpg", 300, 300, "t", camera=True),
    ]
    assert data_utils.odd_ones_out([*photos, *odd]) == [
        "Screenshot_2026.png (a screenshot, by its name)",
        "from a shop.jpg (names no camera, as most others do)",
        "icon.jpg (300x300, much smaller than most)",
    ]
    scans = [checking.Picture(tmp_path / f"{n}.png", 2000, 3000, str(n)) for n in range(8)]
    assert data_utils.odd_ones_out(scans) == []  # without a camera, all of them
    assert data_utils.odd_ones_out([]) == []


def test_pictures_in_subfolders_are_pointed_out(tmp_path: Path) -> None:
    jpgs(tmp_path, 1)
    jpgs(tmp_path / "2026" / "May", 2)
    text = report(tmp_path)
    assert "subfolders   2 pictures in 2026/May" in text
    assert "to use them, set recursive: true" in text
    assert "2 .jpg" in data_utils.what_is_there(tmp_path)


def test_captions_lie_beside_pictures_in_subfolders(tmp_path: Path) -> None:
    jpgs(tmp_path, 1)
    [inside] = jpgs(tmp_path / "sub", 1)
    inside.with_suffix(".txt").write_text("inside")
    (tmp_path / "sub" / "none.txt").write_text("of no picture")
    used, unused = data_utils.caption_files(tmp_path, [tmp_path / "lace_0.jpg", inside])
    assert used == {inside: tmp_path / "sub" / "lace_0.txt"}
    assert unused == ["sub/none.txt (no picture of that name)"]
