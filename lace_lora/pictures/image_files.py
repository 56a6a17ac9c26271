"""Picture files: finding them in a folder, checking them in processes that may crash, opening and cropping them."""

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
from collections.abc import Collection, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import ExifTags, Image, ImageCms, ImageOps

from lace_lora.config import IMAGE_EXTENSIONS
from lace_lora.errors import DISK_OR_DRIVE, UserError, first_line

logger = logging.getLogger(__name__)

# Pillow's names of formats, by extension.
_FORMATS = dict(zip(IMAGE_EXTENSIONS, ("JPEG", "JPEG", "PNG", "WEBP", "BMP", "TIFF", "TIFF"), strict=True))
# What Pillow's decoders raise on broken files, besides OSError (truncated, unidentified, unreadable).
BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


@dataclass(frozen=True)
class Picture:
    """The result of checking one file. Sizes are in pixels, with the picture upright."""

    path: Path
    width: int = 0
    height: int = 0
    sha256: str = ""
    reason: str = ""  # why it is skipped; empty when it is used

    @property
    def used(self) -> bool:
        return not self.reason


def named_as_pictures(image_dir: str | Path, extensions: Collection[str]) -> list[Path]:
    """Everything with a picture's name, folders too, so that `check_pictures` can say why it is skipped."""
    wanted = {extension.lower() for extension in extensions} - {".txt"}
    return [path for path in visible_entries(image_dir) if path.suffix.lower() in wanted]


def visible_entries(image_dir: str | Path) -> list[Path]:
    """Everything in a folder that is not hidden, sorted by name.

    Raises:
        UserError: the folder is missing or cannot be read.
    """
    try:
        with os.scandir(image_dir) as entries:
            return sorted(Path(entry.path) for entry in entries if entry.name[0] != ".")
    except (FileNotFoundError, NotADirectoryError) as error:
        what = "not a folder" if isinstance(error, NotADirectoryError) else "no such folder"
        raise UserError(f"{image_dir}: {what}; set images_dir to the folder with your pictures") from None
    except OSError as error:
        advice = "check disk and permissions"
        raise UserError(f"{image_dir} cannot be read ({error.strerror}): {advice}", DISK_OR_DRIVE) from error


def check_pictures(paths: Sequence[Path], min_image_size: int, formats: Sequence[str] = ("JPEG",)) -> list[Picture]:
    """Decode every picture once, in other processes, and return for each, in order, whether it is used or why not."""
    check = partial(_check, min_image_size=min_image_size, formats=formats)
    found: dict[Path, Picture] = {}
    with _processes(min(8, os.cpu_count() or 1, len(paths) // 8 or 1)) as pool, suppress(BrokenProcessPool):
        for picture in pool.map(check, paths, chunksize=8):
            found[picture.path] = picture
    while left := [path for path in paths if path not in found]:
        with _processes(1) as pool:  # one at a time, to see which one crashes its process
            for path in left:
                try:
                    found[path] = pool.submit(check, path).result()
                except BrokenProcessPool:
                    found[path] = Picture(path, reason="unreadable: it crashes the decoder, or exhausts memory")
                    break
    return [found[path] for path in paths]


def _processes(count: int) -> ProcessPoolExecutor:
    # Not forked from this process: a notebook's has threads, and a fork of it may hang.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return ProcessPoolExecutor(count, context, initializer=_exit_with_the_main_process)


def _exit_with_the_main_process() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process handles Ctrl-C
    main_process = multiprocessing.parent_process()

    def wait_and_exit() -> None:
        if main_process:
            main_process.join()
            os._exit(1)

    threading.Thread(target=wait_and_exit, daemon=True).start()


def _check(path: Path, min_image_size: int, formats: Sequence[str]) -> Picture:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return Picture(path, reason=f"unreadable: {'a folder' if path.is_dir() else 'not a file'}")
        content = path.read_bytes()
        _, (width, height) = open_picture(io.BytesIO(content), at_least=64, formats=formats)
    except Image.UnidentifiedImageError:
        return Picture(path, reason=f"unreadable: not a valid {' or '.join(formats)} file")
    except FileNotFoundError:
        return Picture(path, reason="unreadable: a broken link" if path.is_symlink() else "unreadable: it was deleted")
    except (*BROKEN, MemoryError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        return Picture(path, reason=f"unreadable: {reason}")
    is_small = min(width, height) < min_image_size
    reason = f"too small: {width}x{height}, min_image_size is {min_image_size}" if is_small else ""
    return Picture(path, width, height, hashlib.sha256(content).hexdigest(), reason)


def formats_of(extensions: Collection[str]) -> tuple[str, ...]:
    """Pillow's names for the formats of extensions: no other decoder gets to read the file."""
    return tuple(dict.fromkeys(_FORMATS[extension.lower()] for extension in extensions))


def open_picture(
    source: str | Path | io.BytesIO, at_least: int | None = None, formats: Sequence[str] = ("JPEG",)
) -> tuple[Image.Image, tuple[int, int]]:
    """Decode one picture upright in sRGB.

    Args:
        source: a file or its bytes; opened for reading only.
        at_least: a JPEG may be decoded at a half, quarter or eighth, as long as its shorter side keeps this many
            pixels: that is several times faster on a phone's photos.
        formats: which decoders to allow, see `formats_of`; the file's extension is not used.

    Returns:
        The RGB picture, and the (width, height) of the original.

    Raises:
        OSError, SyntaxError, ValueError, EOFError, struct.error, DecompressionBombError: it cannot be decoded.
    """
    with Image.open(source, formats=tuple(formats)) as image:
        full = image.size
        if at_least:
            shrink = min(full) / at_least
            image.draft(None, (int(full[0] / shrink), int(full[1] / shrink)))
        image.load()  # all of it: verify() accepts truncated JPEGs
        upright, turned = _upright(image)
    return _to_srgb(upright), (full[1], full[0]) if turned else full


def _upright(image: Image.Image) -> tuple[Image.Image, bool]:
    """The picture turned as its EXIF says, and whether width and height were swapped."""
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        return ImageOps.exif_transpose(image), turned
    except (*BROKEN, KeyError, TypeError) as error:  # broken EXIF: the picture itself is fine
        logger.debug("EXIF data cannot be read: %s", error)
        return image.copy(), False


def _to_srgb(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    if image.mode.startswith(("I", "F")):  # 16 or 32 bits a channel: Pillow's convert() would clip at 255
        wide = image if image.mode == "F" else image.convert("I")
        _, high = wide.getextrema()
        # A picture that uses no more than 8 of its bits keeps its brightness.
        factor = 255 / 65535 if isinstance(high, int | float) and high > 255 else 1.0
        image = wide.point(lambda value: value * factor + 0).convert("L")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.new("RGB", image.size, "white")
        image.paste(layer, mask=layer.getchannel("A"))
    elif image.mode == "P":
        image = image.convert("RGB")
    if profile and image.mode in ("RGB", "CMYK", "L"):
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
            assert converted is not None  # only in-place conversion returns None
            return converted
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
            logger.debug("colour profile cannot be used, its values are read as sRGB: %s", error)
    return image.convert("RGB")


def fit(picture: Image.Image, shape: tuple[int, int]) -> tuple[Image.Image, tuple[int, int]]:
    """Scale a picture until it covers `shape`, a height and width in pixels, and crop the centre.

    Returns:
        The crop, and its (top, left) in pixels of the scaled picture, as in SDXL's time ids.
    """
    height, width = shape
    scale = max(width / picture.width, height / picture.height)
    scaled_width, scaled_height = max(width, round(picture.width * scale)), max(height, round(picture.height * scale))
    left, top = round((scaled_width - width) / 2), round((scaled_height - height) / 2)
    scaled = picture.resize((scaled_width, scaled_height), Image.Resampling.LANCZOS)
    return scaled.crop((left, top, left + width, top + height)), (top, left)


# Lace at 1024² takes 7 % more bytes than with zlib's default, and a third of the time.
PNG_OPTIONS = {"compress_level": 1, "compress_type": zlib.Z_RLE}


def open_finished(path: Path) -> Image.Image:
    """A picture written by this program, in RGB.

    Raises:
        UserError: it exists, but is truncated or damaged.
    """
    try:
        with Image.open(path, formats=("PNG", "JPEG")) as picture:
            return picture.convert("RGB")
    except BROKEN as error:
        if isinstance(error, OSError) and error.errno:
            raise  # an error of the disk
        raise UserError(f"{path} is truncated or damaged: delete it, then rerun the command that drew it") from error
