"""Picture files: finding them in a folder, opening and scaling them."""

import fcntl
import io
import logging
import numbers
import os
import re
import struct
import zlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from pathlib import Path

from PIL import ExifTags, Image, ImageCms, ImageFile, ImageOps, PngImagePlugin

from lace_lora.config import IMAGE_EXTENSIONS
from lace_lora.errors import DISK_OR_DRIVE, UserError

logger = logging.getLogger(__name__)

# Pillow's names of formats, by extension.
_FORMATS = dict(
    zip(IMAGE_EXTENSIONS, ("JPEG", "JPEG", "PNG", "WEBP", "HEIF", "HEIF", "BMP", "TIFF", "TIFF"), strict=True)
)
# What Pillow's decoders raise on broken files, besides OSError (truncated, unidentified, unreadable).
BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
MAX_PIXELS = 250_000_000  # phones make up to 201 million, an A4 page scanned at 1200 dpi has 139
_LARGE = 40_000_000  # pixels; above it, pictures are decoded one at a time
_MAX_TEXT = 2**26  # bytes of a text or colour profile in a PNG
_SAVE_AGAIN = "save it again with 8 or 16 bits per colour"
_BITS_PER_SAMPLE, _PHOTOMETRIC, _PLANES, _COLOUR_MAP, _SAMPLE_FORMAT = 258, 262, 284, 320, 339  # tags of a TIFF

# How to turn a picture of each EXIF orientation.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
# The red, green and blue of a HEIC's colours, by their number in ITU-T H.273, as X, Y and Z at a profile's D50.
_PRIMARIES = {
    9: {b"rXYZ": (0.6735, 0.2790, -0.0019), b"gXYZ": (0.1657, 0.6753, 0.0300), b"bXYZ": (0.1251, 0.0456, 0.7968)},
    12: {b"rXYZ": (0.5151, 0.2412, -0.0011), b"gXYZ": (0.2920, 0.6922, 0.0419), b"bXYZ": (0.1571, 0.0666, 0.7841)},
}  # BT.2020, Display P3
_HDR = (16, 18)  # brightness as in H.273: PQ, HLG
# Types of EXIF, by their code, as struct names them; 2 is text.
_EXIF_TYPES = {1: "B", 2: "c", 3: "H", 4: "I", 5: "II", 6: "b", 7: "B", 8: "h", 9: "i", 10: "ii", 11: "f", 12: "d"}


class Unsuitable(ValueError):
    """A picture that is whole, but cannot be used; the text says why, and what to do."""


def named_as_pictures(
    image_dir: str | Path, extensions: Collection[str], recursive: bool = False, without: Collection[Path] = ()
) -> list[Path]:
    """Everything with a picture's name, folders too, so that `check_pictures` can say why it is skipped.

    With `recursive` also in subfolders; for `without` see `visible_entries`.
    """
    wanted = {extension.lower() for extension in extensions} - {".txt"}
    return [path for path in visible_entries(image_dir, recursive, without) if path.suffix.lower() in wanted]


def visible_entries(image_dir: str | Path, recursive: bool = False, without: Collection[Path] = ()) -> list[Path]:
    """Everything in a folder that is not hidden, sorted by name; with `recursive`, then what its subfolders have.

    Links to folders are not followed, and resolved folders in `without` are left out.

    Raises:
        UserError: the folder is missing or cannot be read.
    """
    try:
        with os.scandir(image_dir) as entries:
            visible = sorted((entry for entry in entries if entry.name[0] != "."), key=lambda entry: entry.name)
        found = [Path(entry.path) for entry in visible]
        for folder in visible if recursive else []:
            if folder.is_dir(follow_symlinks=False) and Path(folder.path).resolve() not in without:
                found += visible_entries(folder.path, recursive, without)
        return found
    except (FileNotFoundError, NotADirectoryError) as error:
        what = "not a folder" if isinstance(error, NotADirectoryError) else "no such folder"
        raise UserError(f"{image_dir}: {what}; set images_dir to the folder with your pictures") from None
    except OSError as error:
        advice = "check disk and permissions"
        raise UserError(f"{image_dir} cannot be read ({error.strerror}): {advice}", DISK_OR_DRIVE) from error


@cache
def reads_heic() -> bool:
    """Whether pi-heif is installed, which decodes HEIC; if it is, Pillow opens them from now on."""
    try:
        import pi_heif

        pi_heif.register_heif_opener(thumbnails=False, depth_images=False, aux_images=False)
    except ImportError:
        return False
    return True


def formats_of(extensions: Collection[str]) -> tuple[str, ...]:
    """Pillow's names for the formats of extensions: no other decoder gets to read the file."""
    return tuple(dict.fromkeys(_FORMATS[extension.lower()] for extension in extensions))


def open_picture(
    source: str | Path | io.BytesIO, at_least: int | None = None, formats: Sequence[str] = ("JPEG",)
) -> tuple[Image.Image, tuple[int, int]]:
    """Decode one picture upright in sRGB; the first, or a HEIC's main one, where a file has several.

    Args:
        source: a file or its bytes; opened for reading only.
        at_least: a JPEG may be decoded at a half, quarter or eighth, as long as its shorter side keeps this many
            pixels: that is several times faster on a phone's photos.
        formats: which decoders to allow, see `formats_of`; the file's extension is not used.

    Returns:
        The RGB picture, and the (width, height) of the original.

    Raises:
        Unsuitable: it is too large, or nothing says how bright its numbers are.
        OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error: it cannot be decoded.
    """
    _set_limits()
    with _open(source, formats) as image:
        full = image.size
        if full[0] * full[1] > MAX_PIXELS:
            raise Unsuitable(f"{full[0]}x{full[1]} are over {MAX_PIXELS // 10**6} megapixels: scale it down")
        _check_tiff(image)
        _check_gamma(image)
        _use_nclx(image)
        _scale_transparent_colour(image)
        if at_least:
            shrink = min(full) / at_least
            image.draft(None, (int(full[0] / shrink), int(full[1] / shrink)))
        # A progressive JPEG is decoded at full size, whatever size is asked for.
        width, height = full if "progressive" in image.info else image.size
        with _one_at_a_time() if width * height > _LARGE else nullcontext():
            image.load()  # all of it: verify() accepts truncated JPEGs
            picture = _to_srgb(image)
        if image.format in ("TIFF", "HEIF"):  # turned while loading; what a HEIC's EXIF says does not count
            return picture, picture.size
        orientation = _orientation(image)
    if (turn := _TURNS.get(orientation or 1)) is not None:
        picture = picture.transpose(turn)
    return picture, full[::-1] if orientation in (5, 6, 7, 8) else full


def _open(source: str | Path | io.BytesIO, formats: Sequence[str]) -> ImageFile.ImageFile:
    return Image.open(source, formats=[name for name in formats if name != "HEIF" or reads_heic()])


def _set_limits() -> None:
    """Pillow's limits are lower than what phones, scanners and picture editors write."""
    Image.MAX_IMAGE_PIXELS = None  # MAX_PIXELS in its place
    PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = _MAX_TEXT, 4 * _MAX_TEXT


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Of all processes and threads of this program, only one is in here: a large picture takes up to 4 GB."""
    descriptor = os.open(Path(__file__).parent, os.O_RDONLY)
    try:
        with suppress(OSError):  # of a folder without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def count_pages(content: bytes, formats: Sequence[str]) -> int:
    """How many pages or frames a picture file has, of which one is used; a JPEG's others are previews."""
    with _open(io.BytesIO(content), formats) as image:
        return 1 if image.format in ("JPEG", "MPO") else getattr(image, "n_frames", 1)


def has_camera(content: bytes, formats: Sequence[str]) -> bool:
    """Whether a picture file names the camera that made it, as photos do that no messenger has passed on."""
    camera = (ExifTags.Base.Make, ExifTags.Base.Model)
    with _open(io.BytesIO(content), formats) as image:
        fields = (tag for tag, _, length, _, _ in _exif_fields(_exif(image)) if length > 1)
        return not {*fields, *getattr(image, "tag_v2", ())}.isdisjoint(camera)


def _orientation(image: Image.Image) -> int | None:
    """The orientation of a loaded picture as in EXIF or, where that has none, XMP; None where neither has one."""
    xmp = data if isinstance(data := image.info.get("xmp"), bytes) else b""
    found = _exif_orientation(_exif(image))
    if found is None and (in_xmp := re.search(rb"tiff:Orientation(?:=[\"']|>)([1-8])", xmp)):
        return int(in_xmp[1])
    return found


def _exif(image: Image.Image) -> bytes:
    # A PNG's texts can have any name, also this.
    exif = data if isinstance(data := image.info.get("exif"), bytes) else b""
    with suppress(ValueError):
        if as_text := image.info.get("Raw profile type exif"):  # of a PNG by ImageMagick
            exif = exif or bytes.fromhex("".join(as_text.split("\n")[3:]))
    while exif.startswith(b"Exif\0\0"):
        exif = exif[6:]
    return exif


def _exif_orientation(exif: bytes) -> int | None:
    """EXIF's orientation; a number of any type is accepted."""
    with suppress(struct.error, ZeroDivisionError, ValueError, OverflowError):
        for tag, kind, length, order, at in _exif_fields(exif):
            if tag == ExifTags.Base.Orientation and kind in _EXIF_TYPES:
                layout = order + _EXIF_TYPES[kind]
                inline = struct.calcsize(layout) * length <= 4
                place = at if inline else struct.unpack_from(order + "I", exif, at)[0]
                value, *divisor = struct.unpack_from(layout, exif, place)
                return int(value / divisor[0] if divisor else value)
    return None


def _exif_fields(exif: bytes) -> Iterator[tuple[int, int, int, str, int]]:
    """Tag, type, count, byte order and place of the value of EXIF's first fields, one by one.

    Pillow does not get past one that is broken.
    """
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None:
        return
    with suppress(struct.error):
        [directory] = struct.unpack_from(order + "I", exif, 4)
        [count] = struct.unpack_from(order + "H", exif, directory)
        for at in range(directory + 2, directory + 2 + 12 * count, 12):
            tag, kind, length = struct.unpack_from(order + "HHI", exif, at)
            yield tag, kind, length, order, at + 8


def _check_tiff(image: ImageFile.ImageFile) -> None:
    """Refuse a TIFF that Pillow would open wrongly."""
    tags = getattr(image, "tag_v2", None)
    if tags is None:
        return
    if not isinstance(tags.get(ExifTags.Base.Orientation, 1), numbers.Real):
        raise Unsuitable(f"its orientation is not a number: {_SAVE_AGAIN}")
    if image.mode == "P" and max(tags.get(_COLOUR_MAP, (256,))) < 256:
        raise Unsuitable(f"its palette has 8 bits per colour, and a TIFF's has 16: {_SAVE_AGAIN}")
    if _PHOTOMETRIC not in tags:
        raise Unsuitable(f"it does not say whether 0 is black or white: {_SAVE_AGAIN}")
    if image.mode == "I" or tags.get(_SAMPLE_FORMAT, (1,))[0] == 2:
        raise Unsuitable(f"its numbers are signed or of 32 bits, so that nothing says which is white: {_SAVE_AGAIN}")
    is_compressed = image.tile[0][0] == "libtiff"
    if image.mode == "F" and tags.prefix == b"MM" and is_compressed:
        raise Unsuitable(f"its floating-point numbers are compressed with the high byte first: {_SAVE_AGAIN}")
    if tags.get(_PLANES) == 2 and max(tags.get(_BITS_PER_SAMPLE, (1,))) > 8 and not is_compressed:
        raise Unsuitable("its colours of more than 8 bits are stored one after another: save it again, interleaved")


def _check_gamma(image: Image.Image) -> None:
    """Refuse a PNG whose values have another gamma than sRGB's, and nothing that says how to convert them."""
    gamma = image.info.get("gamma")
    if not isinstance(gamma, float):  # a text may have that name too
        return
    if abs(gamma - 1 / 2.2) > 0.02 and not {"srgb", "icc_profile"} & image.info.keys():
        raise Unsuitable(f"its values are not sRGB (gamma {gamma:g}): {_SAVE_AGAIN}")


def _use_nclx(image: Image.Image) -> None:
    """Give a HEIC that has numbers in place of a colour profile the one they stand for; refuse one in HDR."""
    if (nclx := image.info.get("nclx_profile")) and image.format == "HEIF":
        if nclx["transfer_characteristics"] in _HDR:
            raise Unsuitable("its brightness is HDR (PQ or HLG): export it as JPEG")
        if nclx["color_primaries"] in _PRIMARIES:
            image.info["icc_profile"] = _profile(nclx["color_primaries"])


def _profile(primaries: int) -> bytes:
    """sRGB's colour profile, with the red, green and blue of `_PRIMARIES`."""
    content = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    [count] = struct.unpack_from(">I", content, 128)
    for at in range(132, 132 + 12 * count, 12):
        name, place = struct.unpack_from(">4sI", content, at)
        if colour := _PRIMARIES[primaries].get(name):
            struct.pack_into(">3i", content, place + 8, *(round(value * 2**16) for value in colour))
    return bytes(content)


def _scale_transparent_colour(image: ImageFile.ImageFile) -> None:
    """A PNG names its transparent colour in its own bits per channel, and Pillow decodes to 8."""
    if image.format == "PNG" and "transparency" in image.info and image.tile:
        match image.tile[0][3]:
            case "L;2" | "L;4" as rawmode:
                image.info["transparency"] = min(255, image.info["transparency"] * (85 if rawmode == "L;2" else 17))
            case "RGB;16B":
                raise Unsuitable("it has 16 bits per colour and one that is transparent: save it again with 8 bits")


def _to_srgb(image: Image.Image) -> Image.Image:
    """A loaded picture in RGB: as its colour profile says, and white where it is transparent."""
    alpha = None
    if image.mode[0] in "IF":
        image, alpha = _grey_in_8_bits(image)
    elif image.has_transparency_data:
        is_grey = image.mode in ("1", "L", "LA", "La")
        if image.mode not in ("LA", "RGBA"):
            image = image.convert("LA" if image.mode == "La" else "RGBA")
        alpha, image = image.getchannel("A"), image.convert("L" if is_grey else "RGB")
    if alpha and alpha.getextrema()[1] == 0:
        raise Unsuitable("all of it is transparent")
    picture = _by_its_profile(image)
    if alpha:
        opaque, picture = picture, Image.new("RGB", picture.size, "white")
        picture.paste(opaque, mask=alpha)
    return picture


def _grey_in_8_bits(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """A greyscale picture of more bits, scaled by the range of its format, and what of it is transparent."""
    tags = getattr(image, "tag_v2", {})
    alpha = None
    if image.mode == "F":
        low, high = image.getextrema()
        # The mean is not a number if any pixel is not, which extrema do not show.
        mean = image.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
        if not (low >= 0 and high <= 1 and mean >= 0):  # type: ignore[operator]
            raise Unsuitable(f"its numbers are not all from 0 to 1, so that nothing says which is white: {_SAVE_AGAIN}")
        grey = image.point(lambda value: value * 255 + 0.5).convert("L")
    else:
        highest = 2 ** tags.get(_BITS_PER_SAMPLE, (16,))[0] - 1
        wide = image.convert("I")
        grey = wide.point([min(255, 255 * value / highest) for value in range(2**16)], "L")
        if (colour := image.info.get("transparency")) is not None:
            alpha = wide.point([0 if value == colour else 255 for value in range(2**16)], "L")
    if tags.get(_PHOTOMETRIC) == 0:  # 0 is white, which Pillow heeds up to 8 bits only
        grey = ImageOps.invert(grey)
    return grey, alpha


def _by_its_profile(image: Image.Image) -> Image.Image:
    """An opaque picture in sRGB."""
    profile = image.info.get("icc_profile")
    if image.mode not in ("RGB", "CMYK", "L"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    if profile:
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
