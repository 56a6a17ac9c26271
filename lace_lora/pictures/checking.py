"""Checking pictures before anything is loaded: each is decoded once, in a process that it may crash.

`python -m lace_lora.pictures.checking` is such a process. It knows nothing of the program that started it, which may be
a notebook or a script without a main guard.
"""

import hashlib
import io
import json
import os
import re
import selectors
import stat
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from PIL import Image

from lace_lora.config import IMAGE_EXTENSIONS
from lace_lora.errors import first_line
from lace_lora.pictures import recipe
from lace_lora.pictures.image_files import (
    BROKEN,
    Unsuitable,
    count_pages,
    formats_of,
    has_camera,
    open_picture,
    reads_heic,
)
from lace_lora.process import launch_environment

_CRASHED = "unreadable: it crashes the decoder, or exhausts memory"
_COPY = "copy or download it again"
_GAP = bytes(1024)
_HEIC_GAP = bytes(16384)  # some cameras' EXIF data has shorter ones
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # that ends a scan of a JPEG
# What Pillow raises as well, on files that are made to mislead it.
_RARE = (MemoryError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RuntimeError)
# How files begin that are not pictures, or pictures that this program does not read.
_OTHERS = {
    rb"GIF8": "a GIF: save it as PNG",
    rb"....ftypavi": "an AVIF picture: save it as JPEG",
    rb"....ftyp(?!hei|hev|mif1|msf1)": "a video",
    rb"8BPS": "a Photoshop document: export it as JPEG",
    rb"%PDF": "a PDF: export its pages as JPEG",
    rb"PK\x03\x04": "a ZIP archive: unpack it",
    rb"version https://git-lfs": "a Git LFS pointer: run `git lfs pull`",
    rb"(\xef\xbb\xbf)?\s*(?i:<!doctype html|<html|<head)": "a web page: download the picture itself",
    rb"(\xef\xbb\xbf)?\s*<(\?xml|svg)": "an SVG or XML file: save it as PNG",
}
_PICTURES = {
    rb"\xff\xd8\xff": "JPEG", rb"\x89PNG\r\n\x1a\n": "PNG", rb"RIFF....WEBP": "WEBP", rb"BM": "BMP",
    rb"II\*\0|MM\0\*|II\+\0|MM\0\+": "TIFF",
    rb"....ftyp(hei|hev|mif1|msf1)": "HEIF",
}  # fmt: skip


_NAMES = {"HEIF": "HEIC"}  # that users know


@dataclass(frozen=True)
class Picture:
    """The result of checking one file. Sizes are in pixels, with the picture upright."""

    path: Path
    width: int = 0
    height: int = 0
    sha256: str = ""
    reason: str = ""  # why it is skipped; empty when it is used
    drawn: bool = False  # by this program
    pages: int = 1  # of which one is used
    camera: bool = False  # the file names one

    @property
    def used(self) -> bool:
        return not self.reason


def check_pictures(paths: Sequence[Path], min_image_size: int, formats: Sequence[str] = ("JPEG",)) -> list[Picture]:
    """Decode every picture once, in other processes, and return for each, in order, whether it is used or why not."""
    processes = max(1, min(8, os.cpu_count() or 1, len(paths) // 8))
    found = _check_all(paths, processes, min_image_size, formats)
    if processes > 1:  # once more, alone: it may have been the others that used up the memory
        crashed = [path for path, picture in found.items() if picture.reason == _CRASHED]
        found |= _check_all(crashed, 1, min_image_size, formats)
    return [found[path] for path in paths]


def _check_all(
    paths: Sequence[Path], processes: int, min_image_size: int, formats: Sequence[str]
) -> dict[Path, Picture]:
    found: dict[Path, Picture] = {}
    left = iter(dict.fromkeys(paths))
    with ExitStack() as started, selectors.DefaultSelector() as busy:

        def start(path: Path) -> None:
            worker = _Worker(min_image_size, formats)
            started.callback(worker.end)
            busy.register(worker.answers, selectors.EVENT_READ, worker)
            worker.ask(path)

        for path in islice(left, processes):
            start(path)
        while busy.get_map():
            for key, _ in busy.select():
                worker = key.data
                picture, following = worker.answer(), next(left, None)
                found[worker.path] = picture or Picture(worker.path, reason=_CRASHED)
                if picture and following:
                    worker.ask(following)
                    continue
                busy.unregister(worker.answers)
                worker.end()
                if following:  # the process is gone: the rest goes on in a new one
                    start(following)
    return found


class _Worker:
    """A process that checks one picture after another; it ends when its input closes, as when this process dies."""

    def __init__(self, min_image_size: int, formats: Sequence[str]) -> None:
        command = [sys.executable, "-W", "ignore", "-m", __name__, str(min_image_size), *formats]
        # In a session of its own: Ctrl-C is the main process's to handle.
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=launch_environment(os.environ),
            start_new_session=True,
        )
        assert self.process.stdin
        assert self.process.stdout
        self.questions, self.answers = self.process.stdin, self.process.stdout
        self.path = Path()

    def ask(self, path: Path) -> None:
        self.path = path
        with suppress(BrokenPipeError):  # it has just died: `answer` notices
            self.questions.write(json.dumps(str(path)).encode() + b"\n")
            self.questions.flush()

    def answer(self) -> Picture | None:
        """The result for the picture that was asked for; None if it crashed the process."""
        line = self.answers.readline()
        if not line.endswith(b"\n"):
            if self.process.wait() > 0:
                raise RuntimeError(f"checking {self.path} failed because of a bug in this program; see above")
            return None
        return Picture(**json.loads(line) | {"path": self.path})

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.answers.close()
        with suppress(BrokenPipeError):
            self.questions.close()


def _work(min_image_size: int, formats: Sequence[str]) -> None:
    """The process: paths in as lines of JSON, results out."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    for line in sys.stdin.buffer:
        picture = _check(Path(json.loads(line)), min_image_size, formats)
        print(json.dumps(asdict(picture) | {"path": None}), file=answers, flush=True)


def _check(path: Path, min_image_size: int, formats: Sequence[str]) -> Picture:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return Picture(path, reason=f"unreadable: {'a folder' if path.is_dir() else 'not a file'}")
        content = path.read_bytes()
    except FileNotFoundError:
        return Picture(path, reason="unreadable: a broken link" if path.is_symlink() else "unreadable: it was deleted")
    except (OSError, MemoryError) as error:
        return Picture(path, reason=f"unreadable: {getattr(error, 'strerror', None) or 'too large for the memory'}")
    try:
        _, (width, height) = open_picture(io.BytesIO(content), at_least=64, formats=formats)
        if _has_gap(content, width * height):
            raise Unsuitable(f"part of it is missing: {_COPY}")
        pages, camera = count_pages(content, formats), has_camera(content, formats)
    except Unsuitable as error:
        return Picture(path, reason=f"unreadable: {error}")
    except (*BROKEN, *_RARE) as error:
        return Picture(path, reason=f"unreadable: {_what_it_is(content, formats, error)}")
    is_small = min(width, height) < min_image_size
    reason = f"too small: {width}x{height}, min_image_size is {min_image_size}" if is_small else ""
    digest, drawn = hashlib.sha256(content).hexdigest(), recipe.is_drawn(content)
    return Picture(path, width, height, digest, reason, drawn, pages, camera)


def _has_gap(content: bytes, pixels: int) -> bool:
    """Whether part of a JPEG's, WebP's or HEIC's data was never written: decoders take zeros for grey."""
    if _GAP not in content:
        return False
    if content.startswith(b"RIFF"):
        gap = bytes(max(len(_GAP), pixels // 8000))  # a plain ground takes a zero for 12,000 pixels or more
        return any(gap in data for data in _webp_data(content))
    if content[4:8] == b"ftyp":
        return any(_HEIC_GAP in data for data in _heic_data(content))
    first: dict[int, int] = {}  # what a zero means, by Huffman table
    at, scan = 2, False
    while content[at : at + 1] == b"\xff" and at + 4 <= len(content):
        marker, length = content[at + 1], int.from_bytes(content[at + 2 : at + 4])
        segment, at = content[at + 4 : at + 2 + length], at + 2 + length
        if marker == 0xFF:  # filling
            at -= length + 1
        elif marker == 0xD9:  # the end; what phones append does not matter
            return False
        elif marker == 0xC4:
            first |= _first_symbols(segment)
        elif marker == 0xDA:
            following = _MARKER.search(content, at)
            scan, start, at = True, at, following.start() if following else len(content)
            is_dc = segment[-3:-1] == b"\0\0"  # of a progressive JPEG, where zeros may be a plain ground
            if not is_dc and _GAP in content[start:at] and first.get(0x10 | segment[2] & 15) != 0:
                return True
    return scan and content.endswith(_GAP)


def _first_symbols(segment: bytes) -> dict[int, int]:
    """The symbol whose code is all zeros, for each Huffman table of a DHT segment; 0 is the end of a block."""
    found = {}
    while len(segment) > 17:
        found[segment[0]] = segment[17]
        segment = segment[17 + sum(segment[1:17]) :]
    return found


def _webp_data(content: bytes) -> Iterator[bytes]:
    at = 12
    while at + 8 <= len(content):
        end = at + 8 + int.from_bytes(content[at + 4 : at + 8], "little")
        if content[at : at + 4] in (b"VP8 ", b"VP8L"):
            yield content[at + 8 : end]
        at = end + end % 2


def _heic_data(content: bytes) -> Iterator[bytes]:
    """The data of a HEIC's pictures; what phones append, such as a video, has boxes of its own."""
    at = 0
    while at + 16 <= len(content):
        size, kind = int.from_bytes(content[at : at + 4], "big"), content[at + 4 : at + 8]
        if size == 1:
            size = int.from_bytes(content[at + 8 : at + 16], "big")
        end = at + size if size else len(content)
        if kind == b"mdat":
            yield content[at:end]
        at = max(end, at + 8)


def _what_it_is(content: bytes, formats: Sequence[str], error: Exception) -> str:
    """Why a file cannot be decoded, by what it really is."""
    if isinstance(error, MemoryError):
        return "too large for the memory"
    if not content.strip(b"\0"):
        return f"{'nothing but zeros' if content else 'an empty file'}, as of an unfinished upload: {_COPY}"
    for begins, what in _OTHERS.items():
        if re.match(begins, content[:1000], re.DOTALL):
            return what
    found = next((name for begins, name in _PICTURES.items() if re.match(begins, content[:20], re.DOTALL)), None)
    if found is None:
        *names, last = (_NAMES.get(name, name) for name in formats)
        return f"not a valid {', '.join(names)}{' or ' if names else ''}{last} file"
    name = _NAMES.get(found, found)
    if found not in formats:
        extension = next(name for name in IMAGE_EXTENSIONS if found in formats_of([name]))
        return f"a {name} file under another name: add {extension} to image_extensions"
    if found == "HEIF" and not reads_heic():
        return "a HEIC file: run `pip install pi-heif`, which reads it"
    if found == "HEIF" and isinstance(error, Image.UnidentifiedImageError):
        return f"damaged or incomplete, or of a rare kind: {_COPY}, or export it as JPEG"
    if isinstance(error, Image.UnidentifiedImageError):
        return f"a damaged {name} file, or one of a rare kind: save it again, with 8 bits per colour"
    why = "it ends too early" if "truncated" in str(error) else first_line(error)
    return f"damaged or incomplete ({why}): {_COPY}"


if __name__ == "__main__":
    _work(int(sys.argv[1]), sys.argv[2:])
