"""Redrawing a picture from the recipe inside it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import main
from helpers import Make, gradient, names, refused, snapshot
from lace_lora.config import PICTURE
from lace_lora.drawing import rebuild
from lace_lora.pictures import recipe
from lace_lora.pictures.recipe import Design, Recipe
from lace_lora.sdxl import hub

BATCH = [Design(2, "edge", 9), Design(3, "lace", 10)]


@pytest.fixture
def own(settings: Make) -> Recipe:
    return Recipe(BATCH[1], True, BATCH, settings().subset(PICTURE) | {"lora_sha256": None}, "lace")


@pytest.mark.parametrize(("image_format", "refine", "flow"), [
    ("png", True, "img2img"), ("jpg", True, "ensemble"), ("png", False, "img2img"),
])  # fmt: skip
def test_a_picture_is_redrawn(
    settings: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], image_format: str, refine: bool, flow: str
) -> None:
    thorough = refine and flow == "img2img"  # once is enough for names and for pictures of another batch
    config = settings(lora_scale=0.0)
    changed = {
        "image_format": image_format, "refine": refine, "refiner_flow": flow, "inference_batch_size": 2,
        "num_images": 3 if thorough else 2, "prompt": "[edge, net]", "seed": 5, "original_size": 200,
    }  # fmt: skip
    common = [f"{name}={getattr(config, name)}" for name in (
        "pretrained_model", "refiner_model", "lora_scale", "width", "height", "num_inference_steps", "output_dir",
    )]  # fmt: skip
    (tmp_path / "empty.yaml").write_text("")
    command = ["--mode", "inference", "--config", str(tmp_path / "empty.yaml")]
    assert main.main([*command, *common, *(f"{name}={value}" for name, value in changed.items())]) == 0
    original = tmp_path / "pictures" / f"{'refined' if refine else 'base'}_output_001.{image_format}"
    before = snapshot(tmp_path / "pictures")
    models = [one for one in common if "_model=" in one]
    again = [*command, *models, f"rebuild={original}", f"output_dir={tmp_path / 'again'}", "seed=99", "num_images=1"]
    again.append("original_size=70")
    assert main.main([*again, "--dry-run"]) == 0
    assert not (tmp_path / "again").exists()
    for _ in range(2 if thorough else 1):
        assert main.main(again) == 0
        assert "identical to the original, pixel by pixel" in capsys.readouterr().out
    assert names(tmp_path / "again") == {
        f"rebuilt_{original.stem}{end}.{image_format}" for end in ("", "-2")[: 1 + thorough]
    }
    assert recipe.read(next((tmp_path / "again").iterdir())) == recipe.read(original)
    assert snapshot(tmp_path / "pictures") == before
    (tmp_path / "file").write_text("x")
    assert main.main([*again, f"output_dir={tmp_path / 'file'}"]) == 4
    assert "cannot be used as a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"width": "wide"}, "width is 'wide', not a whole number"),
        ({"width": 7, "scheduler": "none"}, "; "),
        ({"seed": [[[]]]}, "seed is not a whole number"),
        ({"refine": False}, "refine is false"),
        ({"lora_sha256": "0" * 64}, "a different LoRA"),
        ({"scheduler": ...}, "has invalid settings: scheduler is missing"),
        ({"refiner_model": ...}, "has invalid settings: refiner_model is missing"),
    ],
)
def test_a_recipe_that_cannot_be_used(
    own: Recipe, tmp_path: Path, changes: dict[str, Any], part: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    changed = own.settings | {"lora_scale": 0.0, **changes}
    carried = {name: value for name, value in changed.items() if value is not ...}
    monkeypatch.setattr(recipe, "parameters", str)  # A1111's text needs every setting
    recipe.save_picture(tmp_path / "a.png", gradient(), replace(own, settings=carried))
    (tmp_path / "empty.yaml").write_text("")
    config = ["--config", str(tmp_path / "empty.yaml")]
    assert main.main(["--mode", "inference", *config, f"rebuild={tmp_path / 'a.png'}"]) == 2
    printed = capsys.readouterr().err
    assert part in printed
    assert len(printed.splitlines()) == 1


def test_an_older_recipe_has_the_pictures_own_size(own: Recipe, settings: Make) -> None:
    older = replace(own, settings={name: value for name, value in own.settings.items() if name != "original_size"})
    assert rebuild._with_settings_of(older, Path("a.png"), settings(original_size=70)).original_size is None


def test_a_dry_run_checks_models_and_folder(
    own: Recipe, settings: Make, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own.settings.update(lora_scale=0.0)
    recipe.save_picture(tmp_path / "a.png", gradient(64, 64), own)
    recipe.save_picture(tmp_path / "base.png", gradient(64, 64), replace(own, refined=False))
    again = {"rebuild": str(tmp_path / "a.png")}
    rebuild.run(settings(**again), dry_run=True)
    assert "Free disk space" in capsys.readouterr().out
    for dry_run in (True, False):
        for change, part, code in (
            ({"refiner_model": str(tiny / "base")}, "is a base model", 2),
            ({"output_dir": str(tmp_path / "a.png")}, "is a file", 4),
        ):
            config = settings(**again | change)
            refused(lambda config=config, dry_run=dry_run: rebuild.run(config, dry_run), part, code)  # type: ignore[misc]
    # A base picture needs no refiner.
    rebuild.run(settings(rebuild=str(tmp_path / "base.png"), refiner_model=str(tiny / "base")), dry_run=True)


@pytest.mark.parametrize("dry_run", [True, False])
def test_sdxl_is_not_downloaded_for_a_cpu(
    own: Recipe, settings: Make, tmp_path: Path, dry_run: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    own.settings.update(lora_scale=0.0)
    recipe.save_picture(tmp_path / "a.png", gradient(64, 64), own)
    config = settings(rebuild=str(tmp_path / "a.png"), pretrained_model="someone/sdxl", refiner_model="someone/refiner")
    monkeypatch.setattr(hub, "fetch_models", lambda *_: pytest.fail("downloads"))
    refused(lambda: rebuild.run(config, dry_run), "no GPU was found, and drawing with SDXL on a CPU takes hours", 2)


def test_a_recipe_cannot_choose_models(
    own: Recipe, settings: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    own.settings.update(lora_scale=0.0, pretrained_model="someone/elses", refiner_model="/etc/passwd", revision="x")
    recipe.save_picture(tmp_path / "a.png", gradient(64, 64), own)
    config = settings(rebuild=str(tmp_path / "a.png"))
    place = rebuild.run(config)
    assert "was drawn with pretrained_model: someone/elses, but your setting is base" in caplog.text
    assert recipe.read(place).settings["pretrained_model"] == "base"
    assert "or versions round differently" in capsys.readouterr().out
