"""A run of drawing: its folder, what is finished already, what is published. Drawing is faked."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageChops
from safetensors.numpy import save_file

import inference
import lace_lora.drawing
from helpers import ROOT, Make, gradient, jpg, names, refused, snapshot
from lace_lora import files
from lace_lora.config import LORA_FILE, Config
from lace_lora.drawing import plan
from lace_lora.drawing.output_folder import BEFORE, UNFINISHED, OutputFolder
from lace_lora.errors import UserError
from lace_lora.pictures.recipe import Design, Drawn

DEMO = ROOT / "demo" / "model"


class FakePhases(ModuleType):
    """Fake of phases.py: draws each picture in one colour, which depends on the seed; can be interrupted."""

    def __init__(self) -> None:
        super().__init__("phases")
        self.batches: list[list[int]] = []
        self.stop_after, self.at_once = 1000, 1
        self.error: Exception = RuntimeError("a bug")

    def pictures_at_once(self, config: Config) -> int:
        return self.at_once

    def draw_pictures(
        self, config: Config, lora: Path | None, batches: list[list[Any]], latents: Path, finish: Callable[..., object]
    ) -> None:
        for batch in batches:
            if len(self.batches) == self.stop_after:
                raise self.error
            self.batches.append([design.index for design in batch])
            for design in batch:
                picture = Image.new("RGB", (config.width, config.height), (design.seed, 0, 0))
                refined = ImageChops.invert(picture) if config.refine else None
                change = 0.1 * design.index if config.refine else None
                has_base = not config.refine or config.refiner_flow == "img2img" or config.save_base
                finish(Drawn(design, picture if has_base else None, refined, change))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakePhases:
    drawing = FakePhases()
    monkeypatch.setitem(sys.modules, "lace_lora.drawing.phases", drawing)
    monkeypatch.setattr(lace_lora.drawing, "phases", drawing, raising=False)
    return drawing


def write_lora(path: Path, value: float) -> None:
    weights = {f"unet.conv_in.lora_{matrix}.weight": np.full((1, 1), value, np.float32) for matrix in "AB"}
    save_file(weights, path)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    (tmp_path / "lora").mkdir()
    write_lora(tmp_path / "lora" / LORA_FILE, 1)

    def settings(**changes: Any) -> Config:
        folders = {"lora_output_dir": str(tmp_path / "lora"), "output_dir": str(tmp_path / "out")}
        sizes: dict[str, Any] = {"num_images": 4, "width": 64, "height": 64, "seed": 10}
        models = {name: str(DEMO / part) for name, part in (("pretrained_model", "base"), ("refiner_model", "refiner"))}
        return Config(**(folders | sizes | models | changes))

    return settings


def test_the_files_of_a_run(tmp_path: Path, fake: FakePhases, make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    inference.run(make(prompt=("edge", "net", "rosette"), save_base=True))
    out = tmp_path / "out"
    pictures = {f"{kind}_output_00{index}.png" for kind in ("base", "refined") for index in range(4)}
    assert names(out) == pictures | {"contact_sheet.png", "gallery.html", "manifest.json", BEFORE}
    manifest = json.loads((out / "manifest.json").read_text())
    assert [(row["prompt"], row["seed"]) for row in manifest["pictures"]] == [
        ("edge", 10), ("net", 11), ("rosette", 12), ("edge", 13)
    ]  # fmt: skip
    assert manifest["pictures"][3]["files"] == {"refined": "refined_output_003.png", "base": "base_output_003.png"}
    for row in manifest["pictures"]:
        for name in row["files"].values():
            with Image.open(out / name) as picture:
                carried = json.loads(picture.info["lace-lora"])
                assert (carried["prompt"], carried["seed"]) == (row["prompt"], row["seed"])
    printed = capsys.readouterr().out
    assert all(str(out / name) in printed for name in ("gallery.html", "contact_sheet.png"))


@pytest.mark.parametrize(
    ("changes", "files"),
    [
        ({}, {"refined_output_000.png"}),
        ({"refine": False}, {"base_output_000.png"}),
        ({"refine": False, "save_base": True}, {"base_output_000.png"}),
        ({"image_format": "jpg", "save_base": True}, {"base_output_000.jpg", "refined_output_000.jpg"}),
    ],
)
def test_refined_pictures_have_refined_in_their_names(
    changes: dict[str, Any], files: set[str], tmp_path: Path, fake: FakePhases, make: Make
) -> None:
    inference.run(make(num_images=1, **changes))
    assert {name for name in names(tmp_path / "out") if "_output_" in name} == files


@pytest.mark.parametrize(
    ("index", "changes", "names"),
    [
        (0, {}, ["refined_output_000.png"]),
        (23, {"image_format": "jpg", "save_base": True}, ["refined_output_023.jpg", "base_output_023.jpg"]),
        (1234, {"refine": False}, ["base_output_1234.png"]),
    ],
)
def test_file_names(index: int, changes: dict[str, Any], names: list[str], make: Make) -> None:
    paths = OutputFolder(make(**changes)).files(Design(index, "lace", 1))
    assert [path.name for path in paths.values()] == names


@pytest.mark.parametrize(
    ("changes", "changed", "bases"),
    [
        ({}, 4, 4),
        ({"save_base": True}, 4, 4),
        ({"refine": False, "save_base": True}, 0, 0),
        ({"refiner_flow": "ensemble"}, 4, 0),
        ({"refiner_flow": "ensemble", "save_base": True}, 4, 4),
    ],
)
def test_the_page_shows_refined_pictures_beside_their_base_and_how_they_changed(
    changes: dict[str, Any], changed: int, bases: int, tmp_path: Path, fake: FakePhases, make: Make
) -> None:
    inference.run(make(**changes))
    page = (tmp_path / "out" / "gallery.html").read_text(encoding="utf-8")
    assert (page.count("data-base="), page.count("Changed by refining")) == (bases, changed)
    rows = json.loads((tmp_path / "out" / "manifest.json").read_text())["pictures"]
    assert [row["refining"]["latent_change"] for row in rows if "refining" in row] == [0.0, 0.1, 0.2, 0.3][:changed]
    assert sum("edge_change" in row.get("refining", {}) for row in rows) == bases
    assert not (tmp_path / "out" / UNFINISHED).exists()


def test_latents_of_another_recipe_are_not_used(tmp_path: Path, fake: FakePhases, make: Make) -> None:
    seen: list[Path] = []
    draw_pictures = fake.draw_pictures

    def note(config: Config, lora: Path | None, batches: Any, latents: Path, finish: Any) -> None:
        assert list(latents.iterdir()) == []
        (latents / "base_000.safetensors").write_bytes(b"latents")
        seen.append(latents)
        draw_pictures(config, lora, batches, latents, finish)

    fake.draw_pictures = note  # type: ignore[method-assign]
    fake.stop_after = 0
    for changes in ({}, {"seed": 11}, {"inference_batch_size": 2}):
        for path in (tmp_path / "out").glob("[!.]*"):
            path.unlink()
        with pytest.raises(RuntimeError, match="a bug"):
            inference.run(make(**changes))
    assert len(set(seen)) == 3


def test_the_batch_size_is_chosen_once(tmp_path: Path, fake: FakePhases, make: Make) -> None:
    fake.at_once, fake.stop_after = 3, 1
    with pytest.raises(RuntimeError, match="a bug"):
        inference.run(make(num_images=7))
    fake.at_once, fake.stop_after = 2, 1000  # as on another GPU
    inference.run(make(num_images=7))
    assert fake.batches == [[0, 1, 2], [3, 4, 5], [6]]
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["batch_size"] == 3


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyboardInterrupt(), UserError("black", 5)])
def test_the_manifest_lists_the_pictures_that_exist(error: Any, tmp_path: Path, fake: FakePhases, make: Make) -> None:
    def listed() -> list[str]:
        rows = json.loads((tmp_path / "out" / "manifest.json").read_text())["pictures"]
        return [name for row in rows for name in row["files"].values()]

    draw_pictures = fake.draw_pictures

    def first_look(*arguments: Any) -> None:
        assert listed() == before
        draw_pictures(*arguments)

    fake.draw_pictures = first_look  # type: ignore[method-assign, assignment]
    fake.stop_after, fake.error, before = 2, error, list[str]()
    with pytest.raises(type(error)):
        inference.run(make())
    assert listed() == before + [f"refined_output_00{index}.png" for index in range(2)]
    (tmp_path / "out" / "refined_output_000.png").unlink()
    fake.stop_after, before = 1000, listed()[1:]
    inference.run(make())
    assert listed() == [f"refined_output_00{index}.png" for index in range(4)]


@pytest.mark.parametrize(("output_dir", "name"), [(".", "here"), ("..", "above"), ("sub/..", "here"), ("./", "here")])
def test_a_second_folder_has_the_folders_name(
    output_dir: str, name: str, tmp_path: Path, fake: FakePhases, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "above" / "here" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "above" / "here")
    first = inference.run(make(output_dir=output_dir, num_images=1))
    assert first.samefile(output_dir)
    assert f"<title>{name}" in (first / "gallery.html").read_text()
    second = inference.run(make(output_dir=output_dir, num_images=1, seed=1))
    assert second.resolve() == first.resolve().with_name(f"{name}-2")


def test_only_missing_pictures_are_written_again(tmp_path: Path, fake: FakePhases, make: Make) -> None:
    fake.at_once = 3
    inference.run(make())
    (tmp_path / "out" / "refined_output_001.png").unlink()
    (tmp_path / "out" / "refined_output_002.png").write_bytes(b"retouched")
    gradient(64, 64).save(tmp_path / "out" / "refined_output_002.png")
    before = {index: snapshot(tmp_path / "out" / f"refined_output_00{index}.png") for index in (0, 2, 3)}
    inference.run(make())
    assert fake.batches == [[0, 1, 2], [3], [0, 1, 2]]
    assert before == {index: snapshot(tmp_path / "out" / f"refined_output_00{index}.png") for index in (0, 2, 3)}
    assert (tmp_path / "out" / "gallery.html").read_text(encoding="utf-8").count("data-base=") == 4
    rows = json.loads((tmp_path / "out" / "manifest.json").read_text())["pictures"]
    assert [row["refining"]["latent_change"] for row in rows] == [0.0, 0.1, 0.2, 0.3]


def test_finished_already(tmp_path: Path, fake: FakePhases, make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    inference.run(make())
    before = snapshot(tmp_path)
    inference.run(make())
    assert snapshot(tmp_path) == before
    assert fake.batches == [[0], [1], [2], [3]]
    assert "Finished already" in capsys.readouterr().out
    (tmp_path / "out" / "contact_sheet.png").unlink()
    (tmp_path / "out" / "refined_output_001.png").write_bytes(b"")  # of an unfinished copy
    inference.run(make())
    assert fake.batches == [[0], [1], [2], [3], [1]]
    assert snapshot(tmp_path).keys() == before.keys()
    assert all(path.stat().st_size for path in (tmp_path / "out").glob("*.png"))


@pytest.mark.parametrize(
    "changes",
    [{"seed": 11}, {"num_images": 5}, {"prompt": ("edge",)}, {"refine": False}, {"lora_scale": 0.5}, {"width": 72}],
)
def test_other_settings_get_the_next_free_name(
    changes: dict[str, Any], tmp_path: Path, fake: FakePhases, make: Make
) -> None:
    inference.run(make())
    before = snapshot(tmp_path / "out")
    inference.run(make(**changes))
    inference.run(make(negative_prompt="blur"))
    inference.run(make(**changes))
    assert snapshot(tmp_path / "out") == before
    assert names(tmp_path) == {"lora", "out", "out-2", "out-3"}


def test_another_lora_gets_the_next_free_name(tmp_path: Path, fake: FakePhases, make: Make) -> None:
    inference.run(make())
    before = snapshot(tmp_path / "out")
    write_lora(tmp_path / "lora" / LORA_FILE, 2)
    inference.run(make())
    assert snapshot(tmp_path / "out") == before
    assert len(names(tmp_path / "out-2")) == 8


def test_pictures_without_a_manifest_are_not_overwritten(tmp_path: Path, fake: FakePhases, make: Make) -> None:
    (tmp_path / "out").mkdir()
    jpg(tmp_path / "out" / "refined_output_000.png")
    before = snapshot(tmp_path / "out")
    inference.run(make())
    assert snapshot(tmp_path / "out") == before


def test_a_run_that_was_refused_leaves_its_folder_to_the_next(tmp_path: Path, fake: FakePhases, make: Make) -> None:
    fake.stop_after, fake.error, fake.at_once = 0, UserError("the base would get no steps"), 3
    refused(lambda: inference.run(make(refiner_start=0.01)), "would get no steps")
    fake.stop_after, fake.at_once = 1000, 2
    assert inference.run(make()) == tmp_path / "out"
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["batch_size"] == 2  # not the other recipe's


@pytest.mark.parametrize("size", ["many", 0, None])
def test_a_manifest_with_an_invalid_batch_size(size: Any, tmp_path: Path, fake: FakePhases, make: Make) -> None:
    path = inference.run(make()) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"batch_size": size}))
    (tmp_path / "out" / "refined_output_001.png").unlink()
    inference.run(make())
    assert (tmp_path / "out" / "refined_output_001.png").exists()


def test_a_damaged_picture_is_a_one_line_error(tmp_path: Path, fake: FakePhases, make: Make) -> None:
    inference.run(make())
    path = tmp_path / "out" / "refined_output_002.png"
    path.write_bytes(path.read_bytes()[:100])
    (tmp_path / "out" / "gallery.html").unlink()
    refused(lambda: inference.run(make()), "refined_output_002.png is truncated or damaged")
    path.unlink()
    inference.run(make())
    assert (tmp_path / "out" / "gallery.html").exists()


def test_the_page_names_no_folders_of_the_users(tmp_path: Path, fake: FakePhases, make: Make) -> None:
    page = (inference.run(make()) / "gallery.html").read_text()
    assert str(DEMO) not in page
    assert str(DEMO) in (tmp_path / "out" / "manifest.json").read_text()


def test_another_run_that_uses_the_folder_meanwhile_is_noticed(
    tmp_path: Path, fake: FakePhases, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock_for_one_run = files.lock_for_one_run

    def late(folder: Path) -> Any:
        monkeypatch.setattr(files, "lock_for_one_run", lock_for_one_run)
        inference.run(make(seed=3))
        return lock_for_one_run(folder)

    monkeypatch.setattr(files, "lock_for_one_run", late)
    refused(lambda: inference.run(make()), "another run has written")
    rows = json.loads((tmp_path / "out" / "manifest.json").read_text())["pictures"]
    assert {row["seed"] for row in rows} == {3, 4, 5, 6}


def test_an_interrupted_run_resumes_at_the_missing_batches(tmp_path: Path, fake: FakePhases, make: Make) -> None:
    fake.stop_after = 2
    config = make(num_images=7, inference_batch_size=2)
    with pytest.raises(RuntimeError, match="a bug"):
        inference.run(config)
    assert not (tmp_path / "out" / "gallery.html").exists()
    (tmp_path / "out" / "refined_output_001.png").unlink()
    before = snapshot(tmp_path / "out" / "refined_output_002.png")
    fake.stop_after = 1000
    inference.run(config)
    assert fake.batches == [[0, 1], [2, 3], [0, 1], [4, 5], [6]]
    assert snapshot(tmp_path / "out" / "refined_output_002.png") == before
    assert len(names(tmp_path / "out")) == 7 + 4


@pytest.mark.parametrize(
    ("error", "code", "part"),
    [
        (MemoryError(), 3, "inference_batch_size: 1"),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA"), 3, "inference_batch_size: 1"),
        (OSError(28, "No space left on device", "a.png"), 4, "a.png could not be read or written"),
    ],
)
def test_failures_that_users_can_fix(error: Exception, code: int, part: str, fake: FakePhases, make: Make) -> None:
    fake.stop_after, fake.error = 1, error
    refused(lambda: inference.run(make()), part, code)


@pytest.mark.parametrize("name", ["file", "file/out"])
def test_a_folder_that_cannot_be_created(name: str, tmp_path: Path, fake: FakePhases, make: Make) -> None:
    (tmp_path / "file").write_text("x")
    for dry_run in (True, False):
        refused(lambda dry_run=dry_run: inference.run(make(output_dir=str(tmp_path / name)), dry_run), "is a file", 4)  # type: ignore[misc]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path, fake: FakePhases, make: Make) -> None:
    config = make(output_dir=str(tmp_path / "read only" / "out"))
    (tmp_path / "read only").mkdir(mode=0o555)
    for dry_run in (True, False):
        refused(lambda dry_run=dry_run: inference.run(config, dry_run), "cannot be written", 4)  # type: ignore[misc]


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"refiner_model": str(DEMO / "base")}, "is a base model"),
        ({"pretrained_model": str(DEMO / "refiner")}, "is a refiner model"),
        ({"pretrained_vae": str(DEMO / "refiner")}, "has no VAE"),
        ({"pretrained_model": "no/such/folder"}, "no model found"),
        ({"lora_path": "broken.safetensors"}, "is damaged or incomplete"),
        ({"lora_path": "checkpoint.safetensors"}, "no weights for the UNet"),
    ],
)
def test_models_and_lora_are_checked_before_anything_is_written(
    dry_run: bool,
    changes: Any,
    part: str,
    tmp_path: Path,
    fake: FakePhases,
    make: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.safetensors").write_bytes(b"x")
    save_file({"model.diffusion_model.x": np.ones(1)}, "checkpoint.safetensors")
    before = snapshot(tmp_path)
    refused(lambda: inference.run(make(**changes), dry_run), part)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("finished", [False, True])
def test_a_dry_run_writes_nothing(
    finished: bool, tmp_path: Path, fake: FakePhases, make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    if finished:
        inference.run(make())
    before, drawn = snapshot(tmp_path), list(fake.batches)
    inference.run(make(prompt=("weiße Spitze 🧵",) if not finished else None), dry_run=True)
    assert snapshot(tmp_path) == before
    assert fake.batches == drawn
    printed = capsys.readouterr().out
    assert f"Would draw {0 if finished else 4} of 4 pictures, 64x64, into {tmp_path / 'out'}" in printed
    assert str(tmp_path / "lora" / LORA_FILE) in printed
    assert finished or "weiße Spitze 🧵" in printed
    assert "Free disk space" in printed
    assert "download" not in printed
    inference.run(make(refiner_model="lace/refiner"), dry_run=True)
    assert "Would first download lace/refiner" in capsys.readouterr().out


def test_unused_prompts_are_warned_about(fake: FakePhases, make: Make, caplog: pytest.LogCaptureFixture) -> None:
    inference.run(make(num_images=2, prompt=("edge", "net", "rosette")), dry_run=True)
    assert "1 of 3 prompts" in caplog.text


@pytest.mark.parametrize(
    ("changes", "warned"),
    [({}, True), ({"lora_scale": 0.0}, False), ({"lora_path": "mine.safetensors"}, False)],
)
def test_a_prompt_without_the_token_is_named(changes: dict[str, Any], warned: bool, settings: Make) -> None:
    found = plan.without_token(settings(**changes), ["a photo of <myspecialstyle>", "a doily"])
    assert [text.partition(":")[0] for text in found] == ["prompt 'a doily' does not contain <myspecialstyle>"] * warned


def test_that_warning_comes_before_drawing(settings: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / LORA_FILE).write_bytes(b"")
    with pytest.raises(UserError):  # it is no LoRA
        inference.run(settings(prompt=("a doily",)), dry_run=True)
    assert "warning: prompt 'a doily' does not contain <myspecialstyle>: add it" in caplog.text
