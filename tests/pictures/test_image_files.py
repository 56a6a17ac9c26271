"""Opening, checking and cropping pictures."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image, ImageChops, ImageCms, ImageStat

import data_utils
from helpers import ROOT, as_file, gradient, jpg, jpgs, snapshot, swapped_profile, truncated_jpg
from lace_lora.config import IMAGE_EXTENSIONS
from lace_lora.pictures import image_files

Transpose = Image.Transpose
# What a viewer has to do with a picture of each EXIF orientation (Exif 2.3, tag 0x0112).
UPRIGHT: dict[int, tuple[Transpose, ...]] = {
    1: (),
    2: (Transpose.FLIP_LEFT_RIGHT,),
    3: (Transpose.ROTATE_180,),
    4: (Transpose.FLIP_TOP_BOTTOM,),
    5: (Transpose.ROTATE_270, Transpose.FLIP_LEFT_RIGHT),
    6: (Transpose.ROTATE_270,),
    7: (Transpose.ROTATE_90, Transpose.FLIP_LEFT_RIGHT),
    8: (Transpose.ROTATE_90,),
}


ANY = image_files.formats_of(IMAGE_EXTENSIONS)


def opened(source: Any, at_least: int | None = None) -> Image.Image:
    picture, _ = image_files.open_picture(source, at_least, ANY)
    assert picture.mode == "RGB"
    return picture


def mean_difference(one: Image.Image, other: Image.Image) -> float:
    """The mean difference of two pictures, 0 to 255."""
    assert one.size == other.size
    return float(max(ImageStat.Stat(ImageChops.difference(one.convert("RGB"), other.convert("RGB"))).mean))


def test_a_broken_link_is_reported(tmp_path: Path) -> None:
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere")
    [found] = image_files.check_pictures(data_utils.list_images(tmp_path), 16)
    assert found.reason == "unreadable: a broken link"


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation_equals_turning_by_hand(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    near_lossless: dict[str, dict[str, Any]] = {"JPEG": {"quality": 98, "subsampling": 0}, "WEBP": {"lossless": True}}
    options = near_lossless.get(kind, {})
    content = as_file(gradient(64, 48), kind, exif=exif, **options)
    by_hand = gradient(64, 48)
    for turn in UPRIGHT[orientation]:
        by_hand = by_hand.transpose(turn)
    picture, size = image_files.open_picture(content, formats=ANY)
    assert size == by_hand.size == picture.size
    assert mean_difference(picture, by_hand) < 1.5


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize(("size", "at_least"), [((1002, 1001), 64), ((1001, 1002), 100), ((800, 600), 150)])
def test_a_scaled_decode_reports_the_original_size(size: tuple[int, int], at_least: int, orientation: int,
                                                  tmp_path: Path) -> None:  # fmt: skip
    path = jpg(tmp_path / "a.jpg", gradient(*size), orientation)
    picture, full = image_files.open_picture(path, at_least)
    assert full == (size if orientation == 1 else size[::-1])
    assert at_least <= min(picture.size) < min(size)
    assert mean_difference(picture, opened(path).resize(picture.size, Image.Resampling.BOX)) < 3


def test_nothing_is_ever_enlarged_or_cut() -> None:
    assert opened(as_file(gradient(40, 30), "JPEG"), at_least=512).size == (40, 30)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_picture_with_broken_exif_is_still_used() -> None:
    content = as_file(gradient(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12garbage", quality=98)
    assert mean_difference(opened(content), gradient()) < 3


def test_cmyk_equals_the_formula() -> None:
    inks = Image.merge(
        "CMYK", [*gradient().split(), Image.linear_gradient("L").resize((64, 48)).point(lambda v: v // 3)]
    )
    values = np.asarray(inks, dtype=np.float64)
    expected = (255 - values[..., :3]) * (255 - values[..., 3:]) / 255
    assert np.abs(np.asarray(opened(as_file(inks, "TIFF"))) - expected).max() <= 1.5
    photo = np.asarray(opened(as_file(inks, "JPEG", quality=98, subsampling=0)))
    assert np.abs(photo - expected).mean() < 2


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP"])
def test_grey_stays_grey(kind: str) -> None:
    grey = Image.linear_gradient("L")
    assert mean_difference(opened(as_file(grey, kind)), Image.merge("RGB", [grey] * 3)) < 1


@pytest.mark.parametrize(("kind", "order"), [("PNG", "<u2"), ("TIFF", "<u2"), ("TIFF", ">u2")])
def test_sixteen_bits_are_scaled_not_clipped(kind: str, order: str) -> None:
    values = np.linspace(0, 65535, 64 * 48).reshape(48, 64)
    picture = opened(as_file(Image.fromarray(values.astype(order)), kind))
    assert np.abs(np.asarray(picture)[..., 1] - values / 257).max() <= 1


def test_eight_bits_in_a_wider_file_keep_their_brightness() -> None:
    values = np.arange(48 * 5, dtype=np.uint16).reshape(48, 5)
    assert np.array_equal(np.asarray(opened(as_file(Image.fromarray(values))))[..., 0], values)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_ground_becomes_white(mode: str) -> None:
    picture = Image.new("RGBA", (32, 32), (200, 0, 0, 0))
    picture.paste((40, 40, 40, 255), (0, 0, 16, 32))
    shown = opened(as_file(picture.convert(mode)))
    assert shown.getpixel((24, 8)) == (255, 255, 255)
    assert shown.getpixel((8, 8)) == (40, 40, 40)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_a_colour_profile_is_applied(mode: str) -> None:
    """The profile calls green what sRGB calls red, so that pure arithmetic tells the result: channels change places."""
    picture = gradient().quantize(64) if mode == "P" else gradient().convert(mode)
    red, green, blue = picture.convert("RGB").split()
    shown = opened(as_file(picture, icc_profile=swapped_profile()))
    assert mean_difference(shown, Image.merge("RGB", (green, red, blue))) < 1.5


def test_srgb_itself_changes_nothing() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert mean_difference(opened(as_file(gradient(), icc_profile=profile)), gradient()) < 1


@pytest.mark.parametrize("profile", [b"nonsense", swapped_profile()[:200]])
def test_a_broken_profile_is_ignored(profile: bytes) -> None:
    assert mean_difference(opened(as_file(gradient(), icc_profile=profile)), gradient()) == 0
    grey = gradient().convert("L")
    assert mean_difference(opened(as_file(grey, icc_profile=swapped_profile())), grey) == 0


def test_checking_says_what_is_wrong_with_each(tmp_path: Path) -> None:
    jpg(tmp_path / "good.jpg", gradient(64, 48), orientation=6)
    jpg(tmp_path / "small.jpg", gradient(100, 31))
    truncated_jpg(tmp_path / "cut.jpg")
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("not a picture")
    gradient().save(tmp_path / "other.jpg", format="PPM")
    gradient().save(tmp_path / "really a png.jpg", format="PNG")
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "bomb.jpg").write_bytes(bomb())
    paths = image_files.named_as_pictures(tmp_path, [".jpg"])
    before = snapshot(tmp_path)
    found = image_files.check_pictures(paths, 32)
    assert snapshot(tmp_path) == before
    assert [picture.path for picture in found] == paths
    reasons = {picture.path.name: picture.reason for picture in found}
    assert reasons.pop("cut.jpg").startswith("unreadable: ")
    assert "exceeds limit" in reasons.pop("bomb.jpg")
    unknown = "unreadable: not a valid JPEG file"
    assert reasons == {
        "good.jpg": "",
        "really a png.jpg": unknown,
        "folder.jpg": "unreadable: a folder",
        "pipe.jpg": "unreadable: not a file",
        "small.jpg": "too small: 100x31, min_image_size is 32",
        "empty.jpg": unknown,
        "text.jpg": unknown,
        "other.jpg": unknown,
    }
    good = found[paths.index(tmp_path / "good.jpg")]
    assert (good.width, good.height, good.used) == (48, 64, True)


def bomb() -> bytes:
    """A JPEG of a few bytes that says it is 60,000 pixels wide and high."""
    content = bytearray(as_file(gradient(), "JPEG").getvalue())
    frame = content.index(b"\xff\xc0")
    content[frame + 5 : frame + 9] = (60_000).to_bytes(2, "big") * 2
    return bytes(content)


def test_other_formats_are_used_when_asked_for(tmp_path: Path) -> None:
    gradient().save(tmp_path / "really a png.jpg", format="PNG")
    formats = image_files.formats_of([".JPG", ".jpeg", ".png"])
    assert formats == ("JPEG", "PNG")
    [found] = image_files.check_pictures(data_utils.list_images(tmp_path), 32, formats)
    assert found.used


def test_only_the_picture_that_crashes_its_worker_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = jpgs(tmp_path, 20)
    paths[3].write_bytes(b"die")
    paths[15].write_bytes(b"die")
    monkeypatch.setattr(image_files, "_check", check_or_crash)
    found = image_files.check_pictures(paths, 32)
    assert [picture.path for picture in found] == paths
    crashed = [picture.path for picture in found if "it crashes the decoder" in picture.reason]
    assert crashed == [paths[3], paths[15]]
    assert sum(picture.used for picture in found) == 18


def check_or_crash(path: Path, min_image_size: int, formats: Sequence[str]) -> image_files.Picture:
    """As a buggy decoder does on some files."""
    if path.read_bytes() == b"die":
        os.kill(os.getpid(), signal.SIGKILL)
    return image_files.Picture(path, 64, 48, "0")


def test_a_file_without_permission_is_skipped(tmp_path: Path) -> None:
    [path] = jpgs(tmp_path, 1)
    path.chmod(0)
    tmp_path.chmod(0o755)
    reader, writer = os.pipe()
    child = os.fork()  # root may read everything: a child gives that up
    if not child:
        os.seteuid(65534)
        os.write(writer, image_files._check(path, 32, ("JPEG",)).reason.encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 200).decode() == "unreadable: Permission denied"


@pytest.mark.parametrize(
    ("size", "shape", "scaled", "corner"),
    [
        ((64, 32), (32, 32), (64, 32), (0, 16)),
        ((40, 60), (32, 32), (32, 48), (8, 0)),
        ((20, 20), (32, 32), (32, 32), (0, 0)),
        ((40, 60), (16, 32), (32, 48), (16, 0)),
        ((30, 10), (20, 40), (60, 20), (0, 10)),
    ],
)
def test_fit_crops_the_centre(
    size: tuple[int, int], shape: tuple[int, int], scaled: tuple[int, int], corner: tuple[int, int]
) -> None:
    whole = gradient(*size).resize(scaled, Image.Resampling.LANCZOS)
    part, found = image_files.fit(gradient(*size), shape)
    assert found == corner
    assert mean_difference(part, whole.crop((corner[1], corner[0], corner[1] + shape[1], corner[0] + shape[0]))) == 0


def test_no_process_is_left_when_the_main_one_is_killed(tmp_path: Path) -> None:
    code = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from lace_lora.pictures import image_files
if __name__ == "__main__":
    with image_files._processes(2) as pool:
        pool.submit(time.time).result()
        print("ready", flush=True)
        pool.submit(time.sleep, 60).result()
"""
    (tmp_path / "check.py").write_text(code)
    process = psutil.Popen([sys.executable, str(tmp_path / "check.py")], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    family = process.children(recursive=True)
    process.kill()
    process.wait(10)
    _, left = psutil.wait_procs(family, timeout=10)
    for member in left:
        member.kill()
    assert not left
