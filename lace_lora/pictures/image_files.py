"""One picture: opening it safely, checking it in a process that may die of it, cutting it to a shape."""

import hashlib
import io
import logging
import multiprocessing
import os
import signal
import stat
import struct
import threading
import zlib
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import ExifTags, Image, ImageCms, ImageOps

from lace_lora.config import IMAGE_EXTENSIONS
from lace_lora.errors import DISK_OR_DRIVE, UserError

logger = logging.getLogger(__name__)

_FORMATS = dict(
    zip(IMAGE_EXTENSIONS, ("JPEG", "JPEG", "PNG", "WEBP", "BMP", "TIFF", "TIFF"), strict=True)
)  # by extension
# What Pillow's decoders raise on broken files, besides OSError (truncated, unidentified, unreadable).
BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


@dataclass(frozen=True)
class Picture:
    """What the check found out about one file. Sizes are in pixels, with the picture upright."""

    path: Path
    width: int = 0
    height: int = 0
    sha256: str = ""
    reason: str = ""  # why it is skipped; empty when it is used

    @property
    def used(self) -> bool:
        return not self.reason


def check_pictures(paths: Sequence[Path], min_image_size: int, kinds: Sequence[str] = ("JPEG",)) -> list[Picture]:
    """Decode every picture once, in processes of their own, and say which are taken. Order is kept."""
    check = partial(_check, min_image_size=min_image_size, kinds=kinds)
    found = _check_side_by_side(check, paths)
    while left := [path for path in paths if path not in found]:
        with _processes(1) as pool:  # one at a time, so that it is plain which one ends its process
            for path in left:
                try:
                    found[path] = pool.submit(check, path).result()
                except BrokenProcessPool:
                    found[path] = Picture(path, reason="unreadable: the decoder crashes on it, or runs out of memory")
                    break
    return [found[path] for path in paths]


def _check_side_by_side(check: Callable[[Path], Picture], paths: Sequence[Path]) -> dict[Path, Picture]:
    """What was found before all were checked, or one of them took its process along."""
    found: dict[Path, Picture] = {}
    with _processes(min(8, os.cpu_count() or 1, len(paths) // 8 or 1)) as pool, suppress(BrokenProcessPool):
        for picture in pool.map(check, paths, chunksize=8):
            found[picture.path] = picture
    return found


def _processes(count: int) -> ProcessPoolExecutor:
    # From a server, not forked off this process: a notebook's has threads, and a fork of it may hang.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return ProcessPoolExecutor(count, context, initializer=_leave_with_the_main_process)


def _leave_with_the_main_process() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is that one's to tell
    main_process = multiprocessing.parent_process()

    def leave() -> None:
        if main_process:
            main_process.join()
            os._exit(1)

    threading.Thread(target=leave, daemon=True).start()


def _check(path: Path, min_image_size: int, kinds: Sequence[str]) -> Picture:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return Picture(path, reason=f"unreadable: {'a folder' if path.is_dir() else 'not a file'}")
        content = path.read_bytes()
        _, (width, height) = open_picture(io.BytesIO(content), at_least=64, kinds=kinds)
    except Image.UnidentifiedImageError:
        return Picture(path, reason=f"unreadable: not a {' or '.join(kinds)} that can be opened")
    except FileNotFoundError:
        return Picture(path, reason="unreadable: a link to nowhere" if path.is_symlink() else "unreadable: it is gone")
    except (*BROKEN, MemoryError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).split("\n")[0]
        return Picture(path, reason=f"unreadable: {reason}")
    reason = ""
    if min(width, height) < min_image_size:
        reason = f"too small: {width}x{height}, min_image_size is {min_image_size}"
    return Picture(path, width, height, hashlib.sha256(content).hexdigest(), reason)


def formats(extensions: Collection[str]) -> tuple[str, ...]:
    """The kinds of files, by Pillow's names, that stand behind extensions: no other decoder sees a picture's bytes."""
    return tuple(dict.fromkeys(_FORMATS[extension.lower()] for extension in extensions))


def open_picture(
    source: str | Path | io.BytesIO, at_least: int | None = None, kinds: Sequence[str] = ("JPEG",)
) -> tuple[Image.Image, tuple[int, int]]:
    """Decode one picture upright in sRGB.

    Args:
        source: a file or its bytes; opened for reading only.
        kinds: what it may be, see `formats`; its name says nothing.
        at_least: a JPEG may be decoded at a half, quarter or eighth, as long as its shorter side keeps this many
            pixels: that is several times faster on a phone's photos.

    Returns:
        The RGB picture, and the (width, height) of the original.

    Raises:
        OSError, SyntaxError, ValueError, EOFError, struct.error, DecompressionBombError: it cannot be decoded.
    """
    with Image.open(source, formats=tuple(kinds)) as image:
        full = image.size
        if at_least:
            shrink = min(full) / at_least
            image.draft(None, (int(full[0] / shrink), int(full[1] / shrink)))
        image.load()  # all of it: verify() takes truncated JPEGs
        upright, turned = _upright(image)
    return _to_srgb(upright), (full[1], full[0]) if turned else full


def _upright(image: Image.Image) -> tuple[Image.Image, bool]:
    """The picture as it was seen, and whether width and height changed places."""
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        return ImageOps.exif_transpose(image), turned
    except (*BROKEN, KeyError, TypeError) as error:  # broken EXIF: the picture itself is fine
        logger.debug("EXIF data cannot be read: %s", error)
        return image.copy(), False


def _to_srgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):  # 16 bits a channel: Pillow's convert() would clip at 255
        image = _to_eight_bits(image)
    if image.has_transparency_data:
        profile = image.info.get("icc_profile")
        layer = image.convert("RGBA")
        image = Image.new("RGB", image.size, "white")
        image.paste(layer, mask=layer.getchannel("A"))
        if profile:
            image.info["icc_profile"] = profile
    profile = image.info.get("icc_profile")
    if image.mode == "P":
        image = image.convert("RGB")
    if profile and image.mode in ("RGB", "CMYK", "L"):
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
            assert converted is not None  # only in-place conversion returns None
            return converted
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
            logger.debug("colour profile cannot be used, its values are taken as sRGB: %s", error)
    return image.convert("RGB")


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """A greyscale picture of 16 or 32 bits; what uses no more than 8 of them is left at its own brightness."""
    wide = image if image.mode == "F" else image.convert("I")
    _, high = wide.getextrema()
    factor = 255 / 65535 if isinstance(high, int | float) and high > 255 else 1.0
    return wide.point(lambda value: value * factor + 0).convert("L")


def fit(picture: Image.Image, shape: tuple[int, int]) -> tuple[Image.Image, tuple[int, int]]:
    """Scale a picture until it covers `shape`, a height and width in pixels, and cut the centre out.

    Returns:
        That part, and the (top, left) of the cut in pixels of the scaled picture, as SDXL's time ids want it.
    """
    height, width = shape
    scale = max(width / picture.width, height / picture.height)
    scaled_width, scaled_height = max(width, round(picture.width * scale)), max(height, round(picture.height * scale))
    left, top = round((scaled_width - width) / 2), round((scaled_height - height) / 2)
    scaled = picture.resize((scaled_width, scaled_height), Image.Resampling.LANCZOS)
    return scaled.crop((left, top, left + width, top + height)), (top, left)


# Of zlib's ways: lace at 1024² takes 7 % more bytes than by the usual one, and a third of the time.
PNG_OPTIONS = {"compress_level": 1, "compress_type": zlib.Z_RLE}


def open_finished(path: Path) -> Image.Image:
    """A picture of this program's own, decoded.

    Raises:
        UserError: it is there, but not whole.
    """
    try:
        with Image.open(path, formats=("PNG", "JPEG")) as picture:
            return picture.convert("RGB")
    except BROKEN as error:
        if isinstance(error, OSError) and error.errno:
            raise  # of the disk
        advice = "once it is out of the way, the command that drew it makes it again"
        raise UserError(f"{path} is not a whole picture: {advice}") from error


def named_as_pictures(image_dir: str | Path, extensions: Collection[str]) -> list[Path]:
    """Everything with a picture's name, folders too, so that `check_pictures` can say why it is passed over."""
    wanted = {extension.lower() for extension in extensions} - {".txt"}
    return [path for path in _visible(image_dir) if path.suffix.lower() in wanted]


def _visible(image_dir: str | Path) -> list[Path]:
    try:
        with os.scandir(image_dir) as entries:
            return sorted(Path(entry.path) for entry in entries if entry.name[0] != ".")
    except FileNotFoundError:
        raise UserError(
            f"{image_dir}: there is no such folder; set images_dir to the folder of your pictures"
        ) from None
    except NotADirectoryError:
        raise UserError(f"{image_dir}: is a file; set images_dir to the folder of your pictures") from None
    except OSError as error:
        raise UserError(f"{image_dir}: cannot be read ({error.strerror})", DISK_OR_DRIVE) from error
