"""HEIC, as iPhones save photos.

pi-heif cannot encode, so the files in heic/ are stored. They are `gradient()` of helpers.py, saved at quality=95 and
chroma=444 with pillow-heif 1.8.1, which can:

- turned.heic: with the bytes of EXIF data that has orientation 6, Make "Apple" and Model "iPhone 13". The file says it
  twice that it is to be turned: there, and in a field of its own;
- exif_only.heic: the same, with Pillow's Exif object, which pillow-heif does not turn into that field;
- ten_bits.heic: from the mode RGB;16, with bit_depth=10 and the colour profile `swapped_profile()`;
- p3.heic: color_primaries=12, transfer_characteristics=13, matrix_coefficients=6; hdr.heic: 9, 16 and 9;
- several.heic: append_images=[gradient(turn=9)], primary_index=1;
- alpha.heic: mode RGBA, its alpha the linear gradient of Pillow.
"""

import io
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageChops, ImageStat

from helpers import ROOT, Transpose, gradient
from lace_lora.pictures import checking, image_files

HEIC = Path(__file__).parent / "heic"
FORMATS = ("JPEG", "HEIF")


def opened(name: str) -> Image.Image:
    picture, size = image_files.open_picture(HEIC / name, formats=FORMATS)
    assert (picture.mode, picture.size) == ("RGB", size)
    return picture


def difference(one: Image.Image, other: Image.Image) -> float:
    assert one.size == other.size
    return max(ImageStat.Stat(ImageChops.difference(one, other)).mean)


def check(path: Path) -> checking.Picture:
    [found] = checking.check_pictures([path], 32, FORMATS)
    return found


def test_it_is_turned_upright_once() -> None:
    assert difference(opened("turned.heic"), gradient().transpose(Transpose.ROTATE_270)) < 2
    assert difference(opened("exif_only.heic"), gradient()) < 2  # ISO/IEC 23008-12: EXIF does not count
    found = check(HEIC / "turned.heic")
    assert (found.width, found.height, found.camera, found.pages, found.used) == (48, 64, True, 1, True)


def test_ten_bits_and_a_colour_profile() -> None:
    red, green, blue = gradient().split()
    assert difference(opened("ten_bits.heic"), Image.merge("RGB", (green, red, blue))) < 3


def test_colours_of_display_p3_equal_the_formula() -> None:
    """SMPTE EG 432-1: to linear light, from P3's primaries to sRGB's, both with the white D65, and back."""

    def to_xyz(corners: list[tuple[float, float]]) -> np.ndarray:
        columns = np.array([[x / y, 1, (1 - x - y) / y] for x, y in corners]).T
        white = np.array([0.3127 / 0.3290, 1, (1 - 0.3127 - 0.3290) / 0.3290])
        return columns * np.linalg.solve(columns, white)

    p3 = to_xyz([(0.680, 0.320), (0.265, 0.690), (0.150, 0.060)])
    srgb = to_xyz([(0.640, 0.330), (0.300, 0.600), (0.150, 0.060)])
    with Image.open(HEIC / "p3.heic", formats=("HEIF",)) as image:
        values = np.asarray(image.convert("RGB")) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    linear = (linear @ (np.linalg.inv(srgb) @ p3).T).clip(0, 1)
    expected = 255 * np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    shown = np.asarray(opened("p3.heic"), dtype=np.float64)
    assert np.abs(shown - expected).mean() < 1
    assert np.abs(shown - 255 * values).mean() > 3


def test_hdr_is_refused() -> None:
    assert check(HEIC / "hdr.heic").reason == "unreadable: its brightness is HDR (PQ or HLG): export it as JPEG"


def test_the_main_one_of_several_is_used() -> None:
    assert difference(opened("several.heic"), gradient(turn=9)) < 2
    assert check(HEIC / "several.heic").pages == 2


def test_transparent_parts_become_white() -> None:
    alpha = Image.linear_gradient("L").resize((64, 48))
    expected = Image.composite(gradient(), Image.new("RGB", (64, 48), "white"), alpha)
    assert difference(opened("alpha.heic"), expected) < 3


@pytest.mark.parametrize("part", [0.3, 0.7, 0.99])
def test_an_incomplete_one_is_refused(part: float, tmp_path: Path) -> None:
    content = (HEIC / "turned.heic").read_bytes()
    (tmp_path / "a.heic").write_bytes(content[: int(len(content) * part)])
    reason = check(tmp_path / "a.heic").reason
    assert re.match(r"unreadable: damaged or incomplete.*: copy or download it again", reason)


def test_one_with_a_part_that_was_never_written_is_refused(tmp_path: Path) -> None:
    content = (HEIC / "turned.heic").read_bytes()
    video = (20_008).to_bytes(4, "big") + b"mpvd" + bytes(20_000)  # as phones append one
    (tmp_path / "a.heic").write_bytes(content + video)
    assert check(tmp_path / "a.heic").used
    at = content.index(b"mdat") - 4
    length = int.from_bytes(content[at : at + 4], "big")
    hole = (length + 20_000).to_bytes(4, "big") + content[at + 4 : at + length] + bytes(20_000)
    (tmp_path / "a.heic").write_bytes(content[:at] + hole + content[at + length :])
    assert check(tmp_path / "a.heic").reason == "unreadable: part of it is missing: copy or download it again"


def test_it_is_used_under_another_name_only_if_heic_is(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes((HEIC / "turned.heic").read_bytes())
    assert check(tmp_path / "a.jpg").used
    [found] = checking.check_pictures([tmp_path / "a.jpg"], 32, ("JPEG",))
    assert found.reason == "unreadable: a HEIC file under another name: add .heic to image_extensions"


def test_without_pi_heif_the_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pi_heif.py").write_text("raise ImportError('not installed')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = check(HEIC / "turned.heic")
    assert found.reason == "unreadable: a HEIC file: run `pip install pi-heif`, which reads it"
    assert check_jpeg(tmp_path)


def check_jpeg(folder: Path) -> bool:
    gradient().save(folder / "a.jpg")
    return check(folder / "a.jpg").used


def test_nothing_of_pi_heif_is_imported_unless_heic_is_used() -> None:
    code = "import sys, io\nfrom PIL import Image\nfrom lace_lora.pictures import image_files\n"
    code += "file = io.BytesIO()\nImage.new('RGB', (9, 9)).save(file, 'JPEG')\nimage_files.open_picture(file)\n"
    code += "print('pi_heif' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_bytes_that_are_no_picture() -> None:
    with pytest.raises(image_files.BROKEN):
        image_files.open_picture(io.BytesIO(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"), formats=FORMATS)
