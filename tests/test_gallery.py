"""Finished pictures: what they carry inside, the contact sheet, the page."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image, ImageChops, ImageStat

import gallery
from gallery import Design
from pictures import gradient, jpg

PROMPT = 'weiße Spitze 🧵, "scalloped" <myspecialstyle> & net'
RECIPE = {"seed": 7, "negative_prompt": "blur <b>", "prompts": [PROMPT, "edge"], "refine": True, "lora_sha256": None}
DESIGN = Design(3, PROMPT, 10)


@pytest.mark.parametrize(
    ("index", "image_format", "refined", "name"),
    [
        (0, "png", True, "refined_output_000.png"),
        (23, "jpg", True, "refined_output_023.jpg"),
        (1234, "png", False, "base_output_1234.png"),
    ],
)
def test_file_names(index: int, image_format: str, refined: bool, name: str) -> None:
    assert Design(index, "lace", 1).file_name(image_format, refined) == name


def test_a_png_holds_its_pixels_prompt_seed_and_settings(tmp_path: Path) -> None:
    gallery.save_picture(tmp_path / "a.png", gradient(), DESIGN, RECIPE)
    with Image.open(tmp_path / "a.png") as saved:
        assert saved.format == "PNG"
        assert ImageChops.difference(saved.convert("RGB"), gradient()).getbbox() is None
        assert (saved.info["prompt"], saved.info["seed"]) == (PROMPT, "10")
        assert json.loads(saved.info["settings"]) == RECIPE
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("prompts", [[PROMPT], [f"a long prompt, {index} " * 20 for index in range(1000)]])
def test_a_jpeg_holds_them_in_its_comment(prompts: list[str], tmp_path: Path) -> None:
    gallery.save_picture(tmp_path / "a.jpg", gradient(), DESIGN, RECIPE | {"prompts": prompts})
    with Image.open(tmp_path / "a.jpg") as saved:
        assert saved.format == "JPEG"
        assert max(ImageStat.Stat(ImageChops.difference(saved, gradient())).mean) < 2
        inside = json.loads(saved.info["comment"])
    assert (inside["prompt"], inside["seed"]) == (PROMPT, 10)
    assert inside["settings"] == {name: value for name, value in RECIPE.items() if name != "prompts"}


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    gallery.save_picture(tmp_path / "a.png", gradient(), DESIGN, RECIPE)
    before = (tmp_path / "a.png").read_bytes()
    with pytest.raises(OSError, match="mode"):
        gallery.save_picture(tmp_path / "a.png", Image.new("HSV", (8, 8)), DESIGN, RECIPE)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a.png": before}


@pytest.mark.parametrize(("count", "columns", "rows"), [(1, 2, 1), (2, 2, 1), (4, 3, 2), (24, 6, 4), (25, 7, 4)])
def test_a_contact_sheet_shows_every_picture_once_in_order(count: int, columns: int, rows: int) -> None:
    side, gap = 30, 4
    colours = [(200 - index * 7, index * 9, 50 + index * 5) for index in range(count)]
    pictures = [Image.new("RGB", (60, 60), colour) for colour in colours]
    with Image.open(io.BytesIO(gallery.contact_sheet(pictures, side, gap))) as sheet:
        assert sheet.size == (columns * (side + gap) + gap, rows * (side + gap) + gap)
        centres = [gap + side // 2 + place * (side + gap) for place in range(max(columns, rows))]
        seen = [sheet.getpixel((x, y)) for y in centres[:rows] for x in centres[:columns]]
    assert seen == colours + [(255, 255, 255)] * (columns * rows - count)


def test_a_contact_sheet_of_small_pictures_has_small_cells() -> None:
    with Image.open(io.BytesIO(gallery.contact_sheet([Image.new("RGB", (30, 20))] * 2, side=384, gap=8))) as sheet:
        assert sheet.size == (2 * 38 + 8, 38 + 8)


@pytest.mark.parametrize(("size", "box"), [((80, 40), (10, 18, 50, 38)), ((40, 80), (20, 8, 40, 48))])
def test_a_contact_sheet_keeps_proportions(size: tuple[int, int], box: tuple[int, int, int, int]) -> None:
    content = gallery.contact_sheet([Image.new("RGB", size, "black")], side=40, gap=8)
    with Image.open(io.BytesIO(content)) as sheet:
        left, top, right, bottom = ImageChops.invert(sheet.crop((0, 0, 56, 56))).getbbox() or (0, 0, 0, 0)
    assert (right - left, bottom - top) == (box[2] - box[0], box[3] - box[1])
    assert abs((left + right) / 2 - 28) <= 1
    assert abs((top + bottom) / 2 - 28) <= 1


class Reader(HTMLParser):
    """All tags with their attributes, and the text inside each kind of tag."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.setdefault(self.tags[-1][0] if self.tags else "", []).append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def read(tmp_path: Path) -> Reader:
    files = [tmp_path / "refined_output_000.png", tmp_path / "refined_output_001.jpg"]
    gradient(90, 60).save(files[0])
    jpg(files[1], gradient(40, 60, turn=1))
    designs = [Design(0, PROMPT, 7), Design(1, "<script>alert(1)</script>", 8)]
    return Reader(gallery.page("my <pictures>", designs, files, RECIPE))


def test_the_page_needs_no_other_file(read: Reader) -> None:
    for tag, attributes in read.tags:
        assert tag not in ("link", "script", "iframe")
        for name in ("src", "srcset", "data", "poster"):
            assert (attributes.get(name) or "data:").startswith("data:")
    assert [link["href"] for link in read.all("a")] == ["refined_output_000.png", "refined_output_001.jpg"]
    style = "".join(read.text["style"])
    assert not re.search(r"url\(|@import", style)


def test_the_page_shows_every_picture_with_its_prompt_and_seed(read: Reader) -> None:
    originals = [gradient(90, 60), gradient(40, 60, turn=1)]
    for tag, original in zip(read.all("img"), originals, strict=True):
        kind, _, content = str(tag["src"]).partition(",")
        assert kind == "data:image/jpeg;base64"
        with Image.open(io.BytesIO(base64.b64decode(content))) as shown:
            assert shown.size == original.size
            assert max(ImageStat.Stat(ImageChops.difference(shown, original)).mean) < 6
    assert read.text["figcaption"][0::2][0] == PROMPT
    assert "<script>alert(1)</script>" in read.text["figcaption"]
    assert [text for text in read.text["small"] if text.strip()] == [
        "seed 7 · refined_output_000.png",
        "seed 8 · refined_output_001.jpg",
    ]
    assert read.text["title"][0] == "my <pictures>"


def test_the_page_shows_the_settings(read: Reader) -> None:
    assert json.loads(read.text["pre"][0]) == RECIPE


def test_a_page_for_too_few_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="argument"):
        gallery.page("x", [DESIGN], [], RECIPE)
