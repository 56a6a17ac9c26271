"""The contact sheet and the page."""

import base64
import hashlib
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops, ImageStat

from helpers import gradient, jpg, refused
from lace_lora.pictures import gallery
from lace_lora.pictures.gallery import Card
from lace_lora.pictures.recipe import Design

PROMPT = 'weiße Spitze 🧵, "scalloped" <myspecialstyle> & net'
RECIPE = {"seed": 7, "negative_prompt": "blur <b>", "prompts": [PROMPT, "edge"], "refine": True, "lora_sha256": None}
DESIGN = Design(3, PROMPT, 10)


@pytest.mark.parametrize(("count", "columns", "rows"), [(1, 2, 1), (2, 2, 1), (4, 3, 2), (24, 6, 4), (25, 7, 4)])
def test_a_contact_sheet_shows_every_picture_once_in_order(count: int, columns: int, rows: int) -> None:
    side, gap = 30, gallery.GAP
    colours = [(200 - index * 7, index * 9, 50 + index * 5) for index in range(count)]
    pictures = [Image.new("RGB", (60, 60), colour) for colour in colours]
    with Image.open(io.BytesIO(gallery.contact_sheet(pictures, side))) as sheet:
        assert sheet.size == (columns * (side + gap) + gap, rows * (side + gap) + gap)
        centres = [gap + side // 2 + place * (side + gap) for place in range(max(columns, rows))]
        seen = [sheet.getpixel((x, y)) for y in centres[:rows] for x in centres[:columns]]
    assert seen == colours + [(255, 255, 255)] * (columns * rows - count)


def test_a_contact_sheet_of_small_pictures_has_small_cells() -> None:
    with Image.open(io.BytesIO(gallery.contact_sheet([Image.new("RGB", (30, 20))] * 2, side=384))) as sheet:
        assert sheet.size == (2 * 38 + 8, 38 + 8)


@pytest.mark.parametrize(("size", "box"), [((80, 40), (10, 18, 50, 38)), ((40, 80), (20, 8, 40, 48))])
def test_a_contact_sheet_keeps_proportions(size: tuple[int, int], box: tuple[int, int, int, int]) -> None:
    content = gallery.contact_sheet([Image.new("RGB", size, "black")], side=40)
    with Image.open(io.BytesIO(content)) as sheet:
        left, top, right, bottom = ImageChops.invert(sheet.crop((0, 0, 56, 56))).getbbox() or (0, 0, 0, 0)
    assert (right - left, bottom - top) == (box[2] - box[0], box[3] - box[1])
    assert abs((left + right) / 2 - 28) <= 1
    assert abs((top + bottom) / 2 - 28) <= 1


class Reader(HTMLParser):
    """All tags with their attributes, and the texts after the opening tags of each class, or kind if it has none."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and data.strip():
            tag, attributes = self.tags[-1]
            self.text.setdefault(attributes.get("class") or tag, []).append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def read_page(folder: Path, title: str = "lace", prompts: tuple[str, ...] = (PROMPT,), **values: Any) -> Reader:
    """A page with one picture for each prompt, all with these values in their cards."""
    files = [gradient_file(folder / f"{index}.png", turn=index) for index in range(len(prompts))]
    designs = [Design(index, prompt, 7 + index) for index, prompt in enumerate(prompts)]
    cards = [Card(design, path, **values) for design, path in zip(designs, files, strict=True)]
    return Reader(gallery.page(title, cards, RECIPE))


def gradient_file(path: Path, width: int = 40, height: int = 60, turn: int = 0) -> Path:
    gradient(width, height, turn).save(path)
    return path


def embedded(source: str | None) -> Image.Image:
    kind, _, content = str(source).partition(",")
    assert kind == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(content)))


@pytest.fixture
def read(tmp_path: Path) -> Reader:
    files = [tmp_path / "refined_output_000.png", tmp_path / "refined_output_001.jpg"]
    gradient(90, 60).save(files[0])
    jpg(files[1], gradient(40, 60, turn=1))
    base = gradient_file(tmp_path / "elsewhere.png", turn=2)
    cards = [Card(Design(0, PROMPT, 7), files[0]), Card(Design(1, "<script>alert(1)</script>", 8), files[1], base)]
    return Reader(gallery.page("my <pictures>", cards, RECIPE))


def test_the_page_needs_no_other_file(read: Reader) -> None:
    for tag, attributes in read.tags:
        assert tag not in ("link", "iframe", "object")
        for name in ("src", "srcset", "data", "data-base", "poster"):
            assert (attributes.get(name) or "data:").startswith("data:")
    links = [link["href"] for link in read.all("a") if "href" in link]
    assert links == ["refined_output_000.png", "refined_output_001.jpg"]
    assert not re.search(r"url\(|@import", "".join(read.text["style"]))


def test_the_page_allows_its_own_style_and_script_and_nothing_else(read: Reader) -> None:
    policy = next(meta["content"] for meta in read.all("meta") if "http-equiv" in meta)
    rules = dict(rule.strip().split(" ", 1) for rule in str(policy).split(";"))
    hashes = {}
    for tag in ("style", "script"):
        (content,) = read.text[tag]
        hashes[tag] = f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
    assert rules == {
        "default-src": "'none'", "base-uri": "'none'", "form-action": "'none'", "img-src": "data:",
        "style-src": hashes["style"], "script-src": hashes["script"],
    }  # fmt: skip
    assert not [name for _, attributes in read.tags for name in attributes if name == "style" or name.startswith("on")]


def test_the_page_shows_every_picture_with_its_prompt_and_seed(read: Reader) -> None:
    originals = [gradient(90, 60), gradient(40, 60, turn=1)]
    for tag, original in zip(read.all("img"), originals, strict=True):
        with embedded(tag["src"]) as shown:
            assert shown.size == original.size == (int(str(tag["width"])), int(str(tag["height"])))
            assert max(ImageStat.Stat(ImageChops.difference(shown, original)).mean) < 6
    assert [tag["alt"] for tag in read.all("img")] == [f"{PROMPT}, seed 7", "<script>alert(1)</script>, seed 8"]
    assert read.text["prompt"] == [PROMPT, "<script>alert(1)</script>"]
    assert read.text["seed"] == ["7", "8"]
    assert read.text["file"] == ["refined_output_000.png", "refined_output_001.jpg"]
    assert read.text["title"] == ["my <pictures>"]
    assert read.text["count"] == ["2 pictures"]


def test_the_page_holds_a_picture_as_it_was_before_refining_where_there_is_one(read: Reader) -> None:
    without, with_base = read.all("li")
    assert "data-base" not in without
    with embedded(with_base["data-base"]) as shown:
        assert max(ImageStat.Stat(ImageChops.difference(shown, gradient(40, 60, turn=2))).mean) < 6


def test_large_pictures_are_made_smaller(tmp_path: Path) -> None:
    large = gradient_file(tmp_path / "large.png", 1500, 1000)
    read = Reader(gallery.page("lace", [Card(DESIGN, large, base=large)], RECIPE))
    for source in (read.all("img")[0]["src"], read.all("li")[0]["data-base"]):
        with embedded(source) as shown:
            assert shown.size == (1024, 683)


@pytest.mark.parametrize(
    ("values", "latent", "edge", "why"),
    [
        ({}, [], [], []),
        ({"latent_change": 0.1234}, ["12.3%"], [], []),
        ({"edge_change": 0.05}, [], ["+5.0%"], []),
        ({"latent_change": 0.0, "edge_change": -0.0876}, ["0.0%"], ["−8.8%"], []),
        ({"edge_change": -0.0001}, [], ["+0.0%"], []),
        ({"warning": "lower <refiner_strength>"}, [], [], ["lower <refiner_strength>"]),
    ],
)
def test_how_refining_changed_a_picture(
    values: dict[str, Any], latent: list[str], edge: list[str], why: list[str], tmp_path: Path
) -> None:
    text = read_page(tmp_path, **values).text
    assert [text.get(name, []) for name in ("latent", "edge", "why")] == [latent, edge, why]
    spans = " ".join(text["span"])
    assert ("Changed by refining" in spans, "Edge strength" in spans) == (bool(latent), bool(edge))
    assert text["badge"] == ["Flagged"] * (1 + len(why))  # one waits in the large view


@pytest.mark.parametrize(
    ("prompts", "options"),
    [(("net",), []), (("net", "net"), []), (("net", "<b>", "net"), ["All prompts", "net", "<b>"])],
)
def test_several_prompts_have_a_filter(prompts: tuple[str, ...], options: list[str], tmp_path: Path) -> None:
    read = read_page(tmp_path, prompts=prompts)
    assert read.text.get("option", []) == options
    assert read.text["count"] == ["1 picture" if len(prompts) == 1 else f"{len(prompts)} pictures"]


def test_odd_file_names_are_linked(tmp_path: Path) -> None:
    path = gradient_file(tmp_path / "100%#1 ü.png")
    read = Reader(gallery.page("lace", [Card(DESIGN, path)], RECIPE))
    assert read.all("a")[0]["href"] == "100%25%231%20%C3%BC.png"


def test_the_page_shows_the_settings(read: Reader) -> None:
    assert json.loads(read.text["pre"][0]) == RECIPE


def test_a_page_without_a_picture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing"):
        gallery.page("x", [Card(DESIGN, tmp_path / "missing.png")], RECIPE)


@pytest.mark.parametrize(
    ("width", "height", "small"), [(1100, 700, (320, 204)), (1024, 1024, (320, 320)), (64, 32, (64, 32))]
)
def test_a_picture_in_memory_has_the_preview_of_its_file(
    tmp_path: Path, width: int, height: int, small: tuple[int, int]
) -> None:
    picture, path = gradient(width, height), tmp_path / "a.png"
    picture.save(path)
    from_file, from_memory = gallery.make_preview(path), gallery.make_preview(path, picture)
    assert from_file.attributes == from_memory.attributes
    assert from_file.small.tobytes() == from_memory.small.tobytes()
    assert from_file.small.size == small


@pytest.mark.parametrize(("side", "comment", "as_it_is"), [(64, b"", True), (64, b"recipe", False), (1100, b"", False)])
def test_a_small_jpeg_is_shown_as_it_is_but_without_a_recipe(
    tmp_path: Path, side: int, comment: bytes, as_it_is: bool
) -> None:
    path = tmp_path / "a.jpg"
    gradient(side, side).save(path, quality=90, comment=comment)
    shown = base64.b64decode(str(gallery.embed(path)["src"]).partition(",")[2])
    assert (shown == path.read_bytes()) == as_it_is
    assert b"recipe" not in shown
    path.write_bytes(path.read_bytes()[:-200])
    refused(lambda: gallery.embed(path), "a.jpg is truncated or damaged")


def test_names_below_pictures_may_have_letters_of_any_european_language() -> None:
    font = gallery._font(12)
    missing = font.getmask("\uffff").getbbox(), bytes(font.getmask("\uffff"))
    for letter in "öğıİşçáñßåøłéžčΩЖ":
        assert (font.getmask(letter).getbbox(), bytes(font.getmask(letter))) != missing, letter
