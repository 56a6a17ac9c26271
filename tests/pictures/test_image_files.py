"""Opening, checking and cropping pictures."""

import io
import struct
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageChops, ImageCms, ImageStat, PngImagePlugin

from helpers import UPRIGHT, Fields, Tags, Transpose, as_file, exif_of, gradient, jpg, swapped_profile, tiff
from lace_lora.config import IMAGE_EXTENSIONS
from lace_lora.pictures import checking, image_files

ANY = image_files.formats_of(IMAGE_EXTENSIONS)


def opened(source: Any, at_least: int | None = None) -> Image.Image:
    picture, _ = image_files.open_picture(source, at_least, ANY)
    assert picture.mode == "RGB"
    return picture


def mean_difference(one: Image.Image, other: Image.Image) -> float:
    """The mean difference of two pictures, 0 to 255."""
    assert one.size == other.size
    return float(max(ImageStat.Stat(ImageChops.difference(one.convert("RGB"), other.convert("RGB"))).mean))


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


# Formats and depths, each against known numbers.


def shown(content: bytes | io.BytesIO) -> np.ndarray:
    return np.asarray(opened(io.BytesIO(content) if isinstance(content, bytes) else content), dtype=np.float64)


RAMP = np.linspace(0, 1, 64 * 48).reshape(48, 64)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("white_is", [1, 0])
@pytest.mark.parametrize(("bits", "dtype"), [(8, "u1"), (16, "<u2"), (16, ">u2"), (32, "<f4"), (32, ">f4")])
def test_every_grey_tiff_is_scaled_by_the_range_of_its_format(
    bits: int, dtype: str, white_is: int, compressed: bool
) -> None:
    highest = 1 if "f" in dtype else 2**bits - 1
    pixels = (RAMP * highest if "f" in dtype else np.round(RAMP * highest)).astype(dtype).tobytes()
    pixels = zlib.compress(pixels) if compressed else pixels
    tags: Tags = {258: ("H", [bits]), 262: ("H", [white_is]), 339: ("H", [3 if "f" in dtype else 1])}
    content = tiff(pixels, 64, 48, ">" if ">" in dtype else "<", tags | {259: ("H", [8 if compressed else 1])})
    if (dtype, white_is) == (">u2", 0) or (dtype, compressed) == (">f4", True):  # Pillow does not know them
        assert "save it again" in reason_of(content)
        return
    expected = RAMP if white_is else 1 - RAMP
    assert np.abs(shown(content)[..., 1] - expected * 255).max() <= 1


def test_a_tiff_that_does_not_say_what_black_is() -> None:
    content = tiff((RAMP * 255).astype("u1").tobytes(), 64, 48)
    content = content.replace(struct.pack("<HHI", 262, 3, 1), struct.pack("<HHI", 261, 3, 1))
    assert "whether 0 is black or white" in reason_of(content)


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """Rows of numbers below 256 as rows of bytes, without gaps."""
    return np.packbits(np.unpackbits(values.astype(np.uint8)[..., None], axis=-1)[..., -bits:].reshape(48, -1), axis=-1)


@pytest.mark.parametrize("white_is", [1, 0])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_few_bits_of_grey(bits: int, white_is: int) -> None:
    values = np.arange(48 * 64).reshape(48, 64) % 2**bits
    packed = np.packbits(
        np.unpackbits(values.astype(np.uint8)[..., None], axis=-1)[..., -bits:].reshape(48, -1), axis=-1
    )
    expected = values * 255 // (2**bits - 1)
    content = tiff(packed.tobytes(), 64, 48, tags={258: ("H", [bits]), 262: ("H", [white_is])})
    assert np.array_equal(shown(content)[..., 0], expected if white_is else 255 - expected)


def test_twelve_bits_reach_white() -> None:
    values = np.round(RAMP * 4095).astype(np.uint16).reshape(-1, 2)
    packed = np.stack([values[:, 0] >> 4, values[:, 0] << 4 & 0xF0 | values[:, 1] >> 8, values[:, 1] & 0xFF], -1)
    content = tiff(packed.astype(np.uint8).tobytes(), 64, 48, tags={258: ("H", [12])})
    assert np.abs(shown(content)[..., 2] - RAMP * 255).max() <= 1


@pytest.mark.parametrize(
    ("dtype", "sample_format", "part"),
    [
        ("<i1", 2, "signed or of 32 bits"),
        ("<i2", 2, "signed or of 32 bits"),
        ("<u4", 1, "signed or of 32 bits"),
        ("<i4", 2, "signed or of 32 bits"),
        ("<f4", 3, "not all from 0 to 1"),
        ("<f8", 3, "save it again"),
    ],
)
def test_numbers_without_a_known_white_are_refused(dtype: str, sample_format: int, part: str) -> None:
    pixels = (RAMP * 200).astype(dtype)
    tags: Tags = {258: ("H", [8 * pixels.itemsize]), 339: ("H", [sample_format])}
    assert part in reason_of(tiff(pixels.tobytes(), 64, 48, tags=tags))


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf, -0.01, 1.01])
def test_a_float_outside_its_range_is_refused(wrong: float) -> None:
    pixels = RAMP.astype("<f4")
    pixels[20, 30] = wrong
    tags: Tags = {258: ("H", [32]), 339: ("H", [3])}
    assert "not all from 0 to 1" in reason_of(tiff(pixels.tobytes(), 64, 48, tags=tags))


def reason_of(content: bytes) -> str:
    """Why a file is skipped."""
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(content)
        reason = checking._check(Path(file.name), 8, ANY).reason
    assert "\n" not in reason
    return reason


def png(pixels: np.ndarray, bits: int, colour_type: int, chunks: bytes = b"") -> bytes:
    """A PNG of rows of bytes as the format packs them."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = pixels.reshape(48, -1)
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", 64, 48, bits, colour_type, 0, 0, 0)
    transparent = chunk(b"tRNS", chunks) if chunks else b""
    data = chunk(b"IDAT", zlib.compress(lines))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + transparent + data + chunk(b"IEND", b"")


@pytest.mark.parametrize("key", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_every_grey_png_and_its_transparent_colour(bits: int, key: bool) -> None:
    values = np.arange(48 * 64).reshape(48, 64) * (21 if bits == 16 else 1) % 2**bits
    pixels = pack(values, bits) if bits < 8 else values.astype(f">u{bits // 8}")
    expected, colour = values * 255 / (2**bits - 1), values[3, 7]
    if key:
        expected[values == colour] = 255
    content = png(pixels, bits, 0, struct.pack(">H", colour) if key else b"")
    assert np.abs(shown(content)[..., 0] - expected).max() <= 1


def test_a_transparent_colour_of_sixteen_bits_per_channel_is_refused() -> None:
    """Pillow keeps the upper eight bits only, which other colours have too."""
    values = np.dstack([RAMP * 65535] * 3).round().astype(">u2")
    assert "16 bits per colour and one that is transparent" in reason_of(png(values, 16, 2, values[10, 20].tobytes()))
    assert np.abs(shown(png(values, 16, 2)) - values / 257).max() <= 1


@pytest.mark.parametrize("colour_type", [4, 6])
@pytest.mark.parametrize("bits", [8, 16])
def test_alpha_of_a_png(bits: int, colour_type: int) -> None:
    alpha = RAMP[::-1]
    channels = [RAMP, alpha] if colour_type == 4 else [RAMP, RAMP, RAMP, alpha]
    pixels = (np.dstack(channels) * (2**bits - 1)).round().astype(f">u{bits // 8}")
    expected = (RAMP * alpha + 1 - alpha) * 255
    assert np.abs(shown(png(pixels, bits, colour_type))[..., 1] - expected).max() <= 2


@pytest.mark.parametrize("extra", [1, 2])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("bits", [8, 16])
def test_associated_and_other_alpha_of_a_tiff(bits: int, channels: int, extra: int) -> None:
    alpha = 0.2 + 0.8 * RAMP[::-1]
    colour = RAMP * alpha if extra == 1 else RAMP
    pixels = (np.dstack([colour] * channels + [alpha]) * (2**bits - 1)).round().astype(f"<u{bits // 8}")
    tags: Tags = {
        258: ("H", [bits] * (channels + 1)), 262: ("H", [1 if channels == 1 else 2]), 277: ("H", [channels + 1]),
        338: ("H", [extra]),
    }  # fmt: skip
    content = tiff(pixels.tobytes(), 64, 48, tags=tags)
    if (bits, channels) == (16, 1):  # Pillow does not know it
        assert "save it again" in reason_of(content)
        return
    assert np.abs(shown(content)[..., 0] - (RAMP * alpha + 1 - alpha) * 255).max() <= 3


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("order", "<>")
def test_colours_stored_one_after_another(order: str, bits: int, compressed: bool) -> None:
    colours = np.moveaxis(np.asarray(gradient()), -1, 0) * np.array(257 if bits == 16 else 1, f"{order}u{bits // 8}")
    strips = [plane.astype(colours.dtype.newbyteorder(order)).tobytes() for plane in colours]
    strips = [zlib.compress(strip) if compressed else strip for strip in strips]
    tags: Tags = {
        258: ("H", [bits] * 3), 259: ("H", [8 if compressed else 1]), 262: ("H", [2]), 277: ("H", [3]),
        279: ("I", list(map(len, strips))), 284: ("H", [2]),
    }  # fmt: skip
    content = tiff(b"".join(strips), 64, 48, order, tags)
    if bits == 16 and not compressed:
        assert "interleaved" in reason_of(content)
    else:
        assert mean_difference(opened(io.BytesIO(content)), gradient()) == 0


def test_lab_equals_its_definition() -> None:
    """CIE L*a*b* at D50, as TIFF has it: a* and b* are signed."""
    expected = [(255, 255, 255), (0, 0, 0), (200, 100, 50), (60, 140, 200), (90, 170, 80)]
    colours = [(100, 0, 0), (0, 0, 0), (54, 38, 46), (55, -10, -39), (63, -39, 38)]
    values = np.array([[[round(light * 2.55), a & 255, b & 255] for light, a, b in colours]] * 8, np.uint8)
    tags: Tags = {258: ("H", [8, 8, 8]), 262: ("H", [8]), 277: ("H", [3])}
    assert np.abs(shown(tiff(values.tobytes(), 5, 8, tags=tags))[0] - expected).max() < 7


@pytest.mark.parametrize(
    ("space", "modes"),
    [("swapped", "L LA 1 CMYK I;16"), ("LAB", "L LA 1 P RGB RGBA CMYK I;16"), ("grey", "P RGB RGBA CMYK")],
)
def test_a_profile_that_does_not_fit_is_ignored(space: str, modes: str) -> None:
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    profile = {"swapped": swapped_profile(), "LAB": lab, "grey": linear_grey_profile()}[space]
    for mode in modes.split():
        wide = Image.fromarray((RAMP * 65535).astype(np.uint16))
        picture, kind = wide if mode == "I;16" else gradient().convert(mode), "TIFF" if mode == "CMYK" else "PNG"
        with_profile = opened(as_file(picture, kind, icc_profile=profile))
        assert mean_difference(with_profile, opened(as_file(picture, kind))) == 0, mode


def test_grey_with_alpha_heeds_its_profile() -> None:
    """A made-up profile of gamma 1: middle grey, 0.5 of white's light, is 188 in sRGB."""
    picture = Image.new("LA", (32, 32), (128, 255))
    plain = opened(as_file(picture.convert("L"), icc_profile=linear_grey_profile()))
    assert plain.getpixel((5, 5)) == opened(as_file(picture, icc_profile=linear_grey_profile())).getpixel((5, 5))
    assert plain.getpixel((5, 5)) == pytest.approx((188, 188, 188), abs=2)


def linear_grey_profile() -> bytes:
    """An ICC profile (ICC.1:2001-04) of greyscale with a linear curve."""
    white = b"XYZ \0\0\0\0" + struct.pack(">iii", 63190, 65536, 54061)
    curve = b"curv\0\0\0\0" + struct.pack(">I", 0)
    text = b"desc\0\0\0\0" + struct.pack(">I", 2) + b"x\0" + bytes(12 + 67 + 6)
    tags, place, table = [(b"wtpt", white), (b"kTRC", curve), (b"desc", text)], 128 + 4 + 36, b""
    for name, data in tags:
        table += name + struct.pack(">II", place, len(data))
        place += len(data)
    body = struct.pack(">I", 3) + table + white + curve + text
    head = struct.pack(">I4sI4s4s4s", 128 + len(body), b"\0" * 4, 0x02100000, b"mntr", b"GRAY", b"XYZ ")
    return (head + bytes(12) + b"acsp").ljust(68, b"\0") + struct.pack(">iii", 63190, 65536, 54061) + bytes(48) + body


def test_a_picture_that_is_all_transparent_is_refused() -> None:
    assert "all of it is transparent" in reason_of(as_file(Image.new("RGBA", (32, 32), (9, 9, 9, 0))).getvalue())


@pytest.mark.parametrize("kind", ["TIFF", "PNG", "WEBP"])
def test_the_first_of_several_pages_is_used(kind: str, tmp_path: Path) -> None:
    others: dict[str, Any] = {"save_all": True, "append_images": [gradient(turn=3), gradient(turn=5)]}
    path = tmp_path / "pages"
    path.write_bytes(as_file(gradient(), kind, **others, **({"lossless": True} if kind == "WEBP" else {})).getvalue())
    assert mean_difference(opened(path), gradient()) < 1
    assert checking._check(path, 8, ANY).pages == 3


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


def with_exif(kind: str, exif: bytes) -> io.BytesIO:
    near_lossless: dict[str, dict[str, Any]] = {"JPEG": {"quality": 98, "subsampling": 0}, "WEBP": {"lossless": True}}
    return as_file(gradient(), kind, exif=b"Exif\0\0" + exif, **near_lossless.get(kind, {}))


TURNED = (274, 3, 1, b"\x06\0")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "fields",
    [
        [(271, 2, 9999, b"\xff\0\0\0"), TURNED],  # a text that is not there
        [TURNED, (282, 5, 1, b"\xff\xff\xff\xff")],
        [(270, 77, 3, b"abc"), TURNED],  # a type that does not exist
        [TURNED, (305, 3, 2, b"\x01\0\x02\0")],  # a number where Pillow writes text
        [TURNED, (34665, 4, 1, b"\xf0\xff\xff\0")],  # directories that are not there
        [TURNED, (34853, 2, 4, b"gps\0")],
        [TURNED, (50341, 7, 4, b"Prin"), (40965, 1, 1, b"\1")],
    ],
)
def test_a_broken_field_of_exif_does_not_hide_the_orientation(kind: str, fields: Fields) -> None:
    picture = opened(with_exif(kind, exif_of(fields, rest=bytes(4))))
    assert mean_difference(picture, gradient().transpose(Transpose.ROTATE_270)) < 1.5


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("number", [1, 2, 3, 4, 6, 7, 8, 9, 5, 10, 11, 12])
def test_an_orientation_of_another_type_is_read(number: int, kind: str, order: str) -> None:
    layout = {1: "B", 2: "s", 3: "H", 4: "I", 5: "II", 6: "b", 7: "B", 8: "h", 9: "i", 10: "ii", 11: "f", 12: "d"}[
        number
    ]
    values: list[Any] = [b"6"] if number == 2 else [12, 2] if len(layout) == 2 else [6]
    value = struct.pack(order + layout, *values)
    place = value if len(value) <= 4 else struct.pack(order + "I", 8 + 2 + 12 + 4)
    exif = exif_of([(274, number, 1, place)], order, rest=bytes(4) + value)
    assert opened(with_exif(kind, exif)).size == (48, 64)


def test_only_the_main_directory_of_exif_has_the_orientation() -> None:
    """The second one describes the thumbnail."""
    second = 8 + 2 + 12 + 4
    thumbnail = struct.pack("<H", 1) + struct.pack("<HHI", *TURNED[:3]) + b"\x06\0\0\0" + bytes(4)
    exif = exif_of([(274, 3, 1, b"\x01\0")], rest=struct.pack("<I", second) + thumbnail)
    assert opened(with_exif("JPEG", exif)).size == (64, 48)


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_is_upright(value: int) -> None:
    exif = exif_of([(274, 3, 1, struct.pack("<H", value))], rest=bytes(4))
    assert mean_difference(opened(with_exif("JPEG", exif)), gradient()) < 1.5


@pytest.mark.parametrize("xmp", ['tiff:Orientation="6"', "<tiff:Orientation>6</tiff:Orientation>"])
def test_an_orientation_in_xmp_counts_where_exif_has_none(xmp: str) -> None:
    packet = f"<x:xmpmeta xmlns:x='adobe:ns:meta/'><rdf:Description {xmp}/></x:xmpmeta>".encode()
    for kind in ("JPEG", "WEBP"):
        assert opened(as_file(gradient(), kind, xmp=packet)).size == (48, 64)
        upright = exif_of([(274, 3, 1, b"\x01\0")], rest=bytes(4))
        assert opened(as_file(gradient(), kind, xmp=packet, exif=b"Exif\0\0" + upright)).size == (64, 48)
    text = PngImagePlugin.PngInfo()
    text.add_itxt("XML:com.adobe.xmp", packet.decode())
    assert opened(as_file(gradient(), pnginfo=text)).size == (48, 64)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("extra", [{}, {271: ("s", [b"x"])}, {34665: ("I", [0xFFFFF0])}, {34853: ("H", [7])}])
def test_a_tiff_is_turned_or_refused_whatever_else_it_says(extra: Tags, order: str) -> None:
    pixels = np.asarray(gradient()).tobytes()
    tags: Tags = {258: ("H", [8, 8, 8]), 262: ("H", [2]), 277: ("H", [3])}
    values: list[tuple[str, Any]] = [("H", 6), ("I", 6), ("B", 6), ("s", b"6")]
    for kind, value in values:
        content = tiff(pixels, 64, 48, order, {**tags, 274: (kind, [value]), **extra})
        if reason := reason_of(content):
            assert extra or ("orientation" in reason and kind in "Bs")
        else:
            assert mean_difference(opened(io.BytesIO(content)), gradient().transpose(Transpose.ROTATE_270)) == 0


@pytest.mark.parametrize(
    ("gamma", "profile", "fits"), [(45455, False, True), (100000, False, False), (100000, True, True)]
)
def test_a_png_of_another_gamma_than_srgbs_is_refused(gamma: int, profile: bool, fits: bool) -> None:
    text = PngImagePlugin.PngInfo()
    text.add(b"gAMA", struct.pack(">I", gamma))
    file = as_file(gradient(), pnginfo=text, icc_profile=swapped_profile() if profile else None)
    if fits:
        image_files.open_picture(file, formats=("PNG",))
        return
    with pytest.raises(image_files.Unsuitable, match="not sRGB \\(gamma 1\\)"):
        image_files.open_picture(file, formats=("PNG",))


def test_a_tiff_with_a_palette_of_8_bits_is_refused() -> None:
    picture = gradient().quantize(16)
    content = as_file(picture, "TIFF").getvalue()
    palette = picture.getpalette("RGB") or []
    levels = [level for channel in range(3) for level in palette[channel::3]]
    start = struct.pack(f"<{len(levels) // 3}H", *(level * 256 for level in levels[: len(levels) // 3]))
    at = content.index(start)
    values = struct.unpack_from("<768H", content, at)
    dark = content[:at] + struct.pack("<768H", *(value // 256 for value in values)) + content[at + 1536 :]
    image_files.open_picture(io.BytesIO(content), formats=("TIFF",))
    with pytest.raises(image_files.Unsuitable, match="its palette has 8 bits"):
        image_files.open_picture(io.BytesIO(dark), formats=("TIFF",))
