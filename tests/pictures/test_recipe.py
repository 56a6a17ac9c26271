"""The recipe inside picture files, read back and read as A1111 does."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import ExifTags, Image, ImageChops, ImageStat, PngImagePlugin

from helpers import Make, gradient, jpg, names, refused, snapshot
from lace_lora.config import PICTURE, Config, settings_that_affect
from lace_lora.pictures import recipe
from lace_lora.pictures.recipe import Design, Recipe

PROMPT = 'weiße Spitze 🧵, "scalloped" <myspecialstyle> & net'
BATCH = [Design(2, "edge", 9), Design(3, PROMPT, 10)]


@pytest.fixture
def own(settings: Make) -> Recipe:
    config = settings(negative_prompt="blur <b>, low", guidance_scale=5.5)
    values = {name: getattr(config, name) for name in settings_that_affect(PICTURE)}
    return Recipe(BATCH[1], True, BATCH, values | {"lora_sha256": None}, "lace")


def test_a_png_holds_its_pixels_and_its_recipe(own: Recipe, tmp_path: Path) -> None:
    recipe.save_picture(tmp_path / "a.png", gradient(), own)
    with Image.open(tmp_path / "a.png") as saved:
        assert saved.format == "PNG"
        assert ImageChops.difference(saved.convert("RGB"), gradient()).getbbox() is None
        carried = json.loads(saved.info["lace-lora"])
        assert (carried["prompt"], carried["seed"], carried["settings"]) == (PROMPT, 10, own.settings)
        assert saved.info["parameters"] == recipe.parameters(own)
        assert not saved.getexif()
    assert names(tmp_path) == {"a.png"}
    assert recipe.read(tmp_path / "a.png") == replace(own, lora_name="")


def test_the_seeds_after_the_highest_that_can_be_set(own: Recipe, tmp_path: Path) -> None:
    batch = [Design(index, "lace", 2**63 - 1 + index) for index in range(2)]
    recipe.save_picture(tmp_path / "a.png", gradient(), replace(own, design=batch[1], batch=batch))
    assert recipe.read(tmp_path / "a.png").design == batch[1]


def test_a_jpeg_contains_its_recipe(own: Recipe, tmp_path: Path) -> None:
    recipe.save_picture(tmp_path / "a.jpg", gradient(), own)
    with Image.open(tmp_path / "a.jpg") as saved:
        assert saved.format == "JPEG"
        assert max(ImageStat.Stat(ImageChops.difference(saved, gradient())).mean) < 2
        exif = saved.getexif().get_ifd(ExifTags.IFD.Exif)
    assert exif[ExifTags.Base.UserComment] == b"UNICODE\0" + recipe.parameters(own).encode("utf-16-be")
    assert recipe.read(tmp_path / "a.jpg") == replace(own, lora_name="")


def test_a_jpeg_holds_as_much_as_there_is_room_for(own: Recipe, tmp_path: Path) -> None:
    others = [Design(index, f"{index} " * 15_000, 100 + index) for index in range(4, 7)]
    recipe.save_picture(tmp_path / "a.jpg", gradient(), replace(own, batch=[*BATCH, *others]))
    assert recipe.read(tmp_path / "a.jpg").batch == [own.design]
    huge = Design(3, "lace " * 20_000, 10)
    recipe.save_picture(tmp_path / "b.jpg", gradient(), replace(own, design=huge, batch=[huge]))
    refused(lambda: recipe.read(tmp_path / "b.jpg"), "no valid recipe in")


def test_local_folders_are_not_in_the_recipe(settings: Make, tiny: Path) -> None:
    config = settings(pretrained_vae="madebyollin/sdxl-vae-fp16-fix")
    carried = recipe.without_folders({name: getattr(config, name) for name in (*recipe.MODELS, "seed")})
    assert carried == {"pretrained_model": "base", "refiner_model": "refiner", "seed": 42,
                    "pretrained_vae": "madebyollin/sdxl-vae-fp16-fix"}  # fmt: skip


# The patterns with which A1111 parses its last line.
FACTS = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"Refined with": "refiner", "Refined strength": "0.2"}),
        ({"pretrained_model": Config().pretrained_model}, {"Model": "stable-diffusion-xl-base-1.0"}),
        ({"pretrained_model": "/models/sd_xl.base.safetensors"}, {"Model": "sd_xl.base"}),
        ({"pretrained_model": "SD_XL.SAFETENSORS"}, {"Model": "SD_XL"}),
        ({"refiner_flow": "ensemble"}, {"Refiner": "refiner", "Refiner switch at": "0.8"}),
        ({"pretrained_model": 'me/lace, fine: "1"'}, {"Model": '"lace, fine: \\"1\\""'}),
    ],
)
def test_the_text_that_other_programs_read(own: Recipe, changes: dict[str, Any], expected: dict[str, str]) -> None:
    own.settings.update(changes)
    prompt, negative, facts = recipe.parameters(own).split("\n")
    assert prompt == f"{PROMPT} <lora:lace:1>"
    assert negative == "Negative prompt: blur <b>, low"
    read = dict(FACTS.findall(facts))
    assert read.items() >= {
        "Steps": "5", "Sampler": "Euler", "CFG scale": "5.5", "Seed": "10", "Size": "64x64", **expected
    }.items()  # fmt: skip
    assert ("Refiner" in read) == (own.settings["refiner_flow"] == "ensemble")


def test_a_picture_without_lora_negative_prompt_or_refining(own: Recipe) -> None:
    own.settings["negative_prompt"] = None
    text = recipe.parameters(replace(own, refined=False, lora_name=""))
    assert text.split("\n")[0] == PROMPT
    assert "Negative" not in text
    assert "Refine" not in text


def test_a_write_that_fails_leaves_what_was_there(own: Recipe, tmp_path: Path) -> None:
    recipe.save_picture(tmp_path / "a.png", gradient(), own)
    before = snapshot(tmp_path)
    with pytest.raises(OSError, match="mode"):
        recipe.save_picture(tmp_path / "a.png", Image.new("HSV", (8, 8)), own)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("photo", "it contains none"), ("text", "cannot identify"), ("missing", "no such file"), ("mixed up", "")],
)
def test_a_file_without_a_recipe_is_refused(kind: str, reason: str, own: Recipe, tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    if kind == "photo":
        jpg(path)
    elif kind == "text":
        path.write_text("no picture")
    elif kind == "mixed up":
        recipe.save_picture(path, gradient(), replace(own, design=Design(0, "another", 1)))
    refused(lambda: recipe.read(path), f"no valid recipe in .*{reason}")


@pytest.mark.parametrize(
    "damage",
    [
        {"seed": 2**64}, {"batch": [[float("inf"), 0, 10]]}, {"batch": [[3, 5, 10]]}, {"batch": []},
        {"batch": [[3]]}, {"settings": 5}, {"settings": {"negative_prompt": "\ud800"}}, {"prompts": None},
        {"prompt": "\ud800", "prompts": ["\ud800"], "batch": [[0, 0, 10]]},
    ],
)  # fmt: skip
def test_a_forged_recipe_is_refused(own: Recipe, tmp_path: Path, damage: dict[str, Any]) -> None:
    recipe.save_picture(tmp_path / "a.png", gradient(), own)
    with Image.open(tmp_path / "a.png") as picture:
        text = PngImagePlugin.PngInfo()
        text.add_itxt("lace-lora", json.dumps(json.loads(picture.info["lace-lora"]) | damage))
        picture.save(tmp_path / "b.png", pnginfo=text)
        text = PngImagePlugin.PngInfo()
        text.add_itxt("lace-lora", "[" * 100_000)
        picture.save(tmp_path / "c.png", pnginfo=text)
    for name in ("b.png", "c.png"):
        refused(lambda name=name: recipe.read(tmp_path / name), "no valid recipe in")  # type: ignore[misc]
