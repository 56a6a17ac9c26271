"""Finding pictures and the report on them; captions and annotations are in test_annotations.py."""

import errno
import json
import os
from pathlib import Path

import pytest

import data_utils
from helpers import as_file, gradient, jpg, jpgs, photo, truncated_jpg
from lace_lora import files
from lace_lora.config import IMAGE_EXTENSIONS
from lace_lora.errors import UserError
from lace_lora.pictures import checking, image_files, photo_folder


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
    pictures = photo_folder.without_duplicates(pictures, folder)
    annotations = data_utils.plan_annotations(folder, "lace", [p.path for p in pictures if p.used], folder)
    return data_utils.report_text(folder, pictures, annotations, "lace", extensions or (".jpg",))


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
    assert "pages        1 with several, of which the first or the main one is used: pages.jpg (2)" in text
    assert "64 to 90 pixels wide, 48 to 200 high" in text
    assert "tiny.jpg (20x20" in text
    assert "cut.jpg (" in text
    assert "duplicate    1: lace_1.jpg (equal to copy.jpg)" in text
    assert "other files  1 .heic, 2 .png" in text
    assert "to use them, set image_extensions: [.jpg, .png, .heic]" in text
    assert "5: 1 from .txt files next to the pictures, the others 'lace'" in text


def test_the_report_suggests_extensions_including_those_in_use(tmp_path: Path) -> None:
    jpgs(tmp_path, 1)
    gradient().save(tmp_path / "a.png")
    gradient().save(tmp_path / "a.webp")
    assert "image_extensions: [.png, .jpg, .webp]" in report(tmp_path, ".png")


def test_the_report_fits_a_screen_however_many_there_are(tmp_path: Path) -> None:
    pictures = [checking.Picture(tmp_path / f"{n}.jpg", 9, 9, str(n % 50)) for n in range(500)]
    pictures += [checking.Picture(tmp_path / f"{n}.jpg", reason=f"unreadable: because {n}") for n in range(500)]
    text = data_utils.report_text(tmp_path, pictures, data_utils.Annotations(tmp_path, {}, False), "lace")
    assert len(text.splitlines()) < 24
    assert "and 497 more" in text


def checked(folder: Path) -> list[checking.Picture]:
    return checking.check_pictures(data_utils.list_images(folder), 32)


def test_pictures_in_subfolders_are_used_with_recursive(tmp_path: Path) -> None:
    for name in ("b.jpg", "sub/a.jpg", "sub/deeper/c.JPG", "sub.jpg/d.jpg", ".hidden/e.jpg", "sub/.f.jpg", "out/g.jpg"):
        photo(tmp_path / "photos" / name)
    (tmp_path / "photos" / "link").symlink_to(tmp_path / "photos" / "sub")
    found = image_files.named_as_pictures(tmp_path / "photos", [".jpg"], True, {tmp_path / "photos" / "out"})
    assert [str(path.relative_to(tmp_path / "photos")) for path in found] == [
        "b.jpg", "sub.jpg", "sub/a.jpg", "sub/deeper/c.JPG", "sub.jpg/d.jpg",
    ]  # fmt: skip


def test_the_report_tells_of_pictures_in_subfolders(tmp_path: Path) -> None:
    for name in ("a.jpg", "sub/b.jpg", "sub/deeper/c.JPG", "sub/d.png", "out/e.jpg", ".hidden/f.jpg"):
        photo(tmp_path / name)
    plan = data_utils.Annotations(tmp_path, {}, False)
    out = {tmp_path / "out"}
    text = data_utils.report_text(tmp_path, checked(tmp_path), plan, "lace", [".jpg", ".heic"], False, out)
    assert "\n  subfolders   2 .jpg in them; to use these too, set recursive: true\n" in text
    text = data_utils.report_text(tmp_path, checked(tmp_path), plan, "lace", [".jpg", ".heic"], True, out)
    assert "subfolders" not in text
    assert "other files  1 .png\n               to use them, set image_extensions: [.jpg, .heic, .png]\n" in text


def test_names_in_subfolders_are_shown_with_them(tmp_path: Path) -> None:
    photo(tmp_path / "a.jpg")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes())
    paths = image_files.named_as_pictures(tmp_path, [".jpg"], True)
    pictures = photo_folder.without_duplicates(checking.check_pictures(paths, 32), tmp_path)
    assert [picture.reason for picture in pictures] == ["", "duplicate: equal to a.jpg"]
    text = data_utils.report_text(tmp_path, pictures, data_utils.Annotations(tmp_path, {}, False), "lace")
    assert "duplicate    1: sub/a.jpg (equal to a.jpg)" in text


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
