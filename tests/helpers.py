"""Small pictures of every awkward kind, and other things that several test files need."""

import hashlib
import io
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import ExifTags, Image, ImageCms

from lace_lora.config import Config
from lace_lora.errors import UserError

ROOT = Path(__file__).parent.parent
Make = Callable[..., Config]  # a Config for tests, changed by keyword arguments
RunHere = Callable[..., tuple[int, str]]  # main.py in this process: its exit code and what it printed


def gradient(width: int = 64, height: int = 48, turn: int = 0) -> Image.Image:
    """A smooth picture without any symmetry; `turn` makes another of the same size."""
    across = Image.linear_gradient("L").rotate(90).resize((width, height))
    down = Image.linear_gradient("L").resize((width, height))
    return Image.merge("RGB", (across, down, across.point(lambda value: (value + 20 * turn) // 2)))


def jpg(path: Path, picture: Image.Image | None = None, orientation: int = 1) -> Path:
    """Write a JPEG of good quality with an EXIF orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    (picture or gradient()).save(path, format="JPEG", quality=98, subsampling=0, exif=exif)
    return path


def jpgs(folder: Path, count: int = 3) -> list[Path]:
    """A folder of different good pictures, `lace_0.jpg` and on."""
    folder.mkdir(parents=True, exist_ok=True)
    return [jpg(folder / f"lace_{index}.jpg", gradient(turn=index)) for index in range(count)]


def photo(path: Path, size: tuple[int, int] = (80, 60), camera: bool = True) -> Path:
    """Write a JPEG as a phone does, unlike the others of its folder; its EXIF data names the camera, or has none."""
    exif = Image.Exif()
    if camera:
        exif[ExifTags.Base.Make], exif[ExifTags.Base.Model] = "Apple", "iPhone 13"
    path.parent.mkdir(parents=True, exist_ok=True)
    gradient(*size, turn=len(list(path.parent.iterdir()))).save(path, exif=exif)
    return path


def contents(paths: Iterable[Path]) -> dict[Path, str]:
    """The SHA-256 of each file."""
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def truncated_jpg(path: Path) -> Path:
    jpg(path, gradient(200, 150))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])
    return path


def swapped_profile() -> bytes:
    """An ICC profile like sRGB's, whose red is sRGB's green and whose green is its red: easy to compute by hand."""
    content = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    table = 132
    rows = [bytes(content[at : at + 4]) for at in range(table, table + 12 * content[131], 12)]
    red, green = (table + 12 * rows.index(name) for name in (b"rXYZ", b"gXYZ"))
    content[red : red + 4], content[green : green + 4] = content[green : green + 4], content[red : red + 4]
    return bytes(content)


def snapshot(folder: Path) -> dict[str, tuple[int, str]]:
    """Everything under a folder: name, time of the last change, content."""
    found = {}
    for path in [folder, *folder.rglob("*")]:
        content = path.read_bytes() if path.is_file() else b""
        found[str(path)] = (path.lstat().st_mtime_ns, hashlib.sha256(content).hexdigest())
    return found


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def refused(call: Callable[[], object], part: str, code: int = 2) -> str:
    """What a UserError with this exit code, matching `part`, says."""
    with pytest.raises(UserError, match=part) as caught:
        call()
    assert caught.value.exit_code == code
    return str(caught.value)


def main_py(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """`python main.py …` as a user runs it."""
    command = [sys.executable, str(ROOT / "main.py"), *arguments]
    env = os.environ | {"PYTHONIOENCODING": "utf-8"}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False)


def as_file(picture: Image.Image, image_format: str = "PNG", **options: Any) -> io.BytesIO:
    content = io.BytesIO()
    picture.save(content, format=image_format, **options)
    content.seek(0)
    return content


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

Tags = dict[int, tuple[str, Sequence[int]]]  # of a TIFF: struct's type and values


def tiff(pixels: bytes, width: int, height: int, order: str = "<", tags: Tags | None = None) -> bytes:
    """A TIFF, uncompressed and of one strip unless `tags`, which are added to these or replace them, say otherwise."""
    fields: Tags = {
        256: ("H", [width]), 257: ("H", [height]), 258: ("H", [8]), 262: ("H", [1]), 277: ("H", [1]),
        278: ("H", [height]), 279: ("I", [len(pixels)]), **(tags or {}),
    }  # fmt: skip
    lengths = fields[279][1]
    fields[273] = ("I", [8 + sum(lengths[:number]) for number in range(len(lengths))])
    directory, beyond = struct.pack(order + "H", len(fields)), b""
    start = 8 + len(pixels) + 2 + 12 * len(fields) + 4
    for tag, (kind, values) in sorted(fields.items()):
        value = struct.pack(order + kind * len(values), *values)
        directory += struct.pack(order + "HHI", tag, {"B": 1, "s": 2, "H": 3, "I": 4}[kind], len(values))
        if len(value) > 4:
            directory += struct.pack(order + "I", start + len(beyond))
            beyond += value
        else:
            directory += value.ljust(4, b"\0")
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "I", 8 + len(pixels))
    return head + pixels + directory + bytes(4) + beyond


Fields = Sequence[tuple[int, int, int, bytes]]  # of EXIF: tag, type, count, and the value or its place


def exif_of(fields: Fields, order: str = "<", rest: bytes = b"") -> bytes:
    """EXIF data, field by field, and what comes after them."""
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "IH", 8, len(fields))
    return head + b"".join(struct.pack(order + "HHI", *field[:3]) + field[3].ljust(4, b"\0") for field in fields) + rest
