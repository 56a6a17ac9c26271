"""The program as a user runs it: main.py in processes of its own, training through accelerate, then drawing."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file

from helpers import ROOT, Make, RunHere, main_py, snapshot
from lace_lora.config import LORA_FILE, dump_config, load_config
from training_helpers import train_here


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def event_files(folder: Path) -> set[str]:
    return {name for name in files(folder) if name.startswith("logs/myspecialstyle/events.out.tfevents")}


@pytest.fixture
def config_file(settings: Make, tmp_path: Path) -> Path:
    path = tmp_path / "my.yaml"
    path.write_text(dump_config(settings(num_images=3, save_base=True, prompt=("a photo of <myspecialstyle>", "edge"))))
    return path


def test_train_and_draw(config_file: Path, run_here: RunHere, tmp_path: Path) -> None:
    train, draw = (["--mode", mode, "--config", str(config_file)] for mode in ("train", "inference"))
    trained = main_py(*train, "validation_steps=4", "report_to=tensorboard")
    assert trained.returncode == 0, trained.stderr
    checkpoint = ["manifest.json", LORA_FILE, "state.json", "training_state.safetensors"]
    expected = {f"checkpoint-{step}/{name}" for step in (2, 4) for name in checkpoint}
    expected |= {
        "config.yaml",
        "pictures.json",
        "metrics.csv",
        "loss.png",
        "samples/step-000000.png",
        "samples/step-000004.png",
        "samples.png",
        "myspecialstyle.json",
        "myspecialstyle.safetensors",
        LORA_FILE,
    }
    events = event_files(tmp_path / "lora")
    assert len(events) == 1
    assert files(tmp_path / "lora") - events == expected
    assert load_config(tmp_path / "lora" / "config.yaml").rank == 4
    for named in ("samples, by step: {}/samples.png", "loss: {}/loss.png", "TensorBoard: tensorboard --logdir {}/logs"):
        assert named.format(tmp_path / "lora") in trained.stdout.splitlines()
    assert "\r" not in trained.stderr  # into a pipe, lines
    assert "training: 4 of 4 steps" in trained.stderr
    assert len((tmp_path / "lora" / "metrics.csv").read_text().splitlines()) == 5
    pipeline = StableDiffusionXLPipeline.from_pretrained(load_config(config_file).pretrained_model)
    # Offline, older versions of diffusers must be told the name.
    pipeline.load_lora_weights(str(tmp_path / "lora"), weight_name=LORA_FILE)

    code, printed = run_here(*train)
    assert code == 0
    assert "Finished already" in printed
    code, printed = run_here(*train, "rank=8")
    assert code == 2
    assert "rank (was 4, is 8)" in printed

    command = trained.stdout.splitlines()[-1].removeprefix("To draw with it: ")
    python, program, *arguments = shlex.split(command)
    assert (python, Path(ROOT, program).resolve()) == ("python", ROOT / "main.py")
    drawn = main_py(*arguments)
    assert drawn.returncode == 0, drawn.stderr
    pictures = {f"{kind}_output_00{index}.png" for index in range(3) for kind in ("base", "refined")}
    before_refining = {f".before_refining/00{index}.{kind}" for index in range(3) for kind in ("jpg", "json")}
    shown = {"contact_sheet.png", "gallery.html", "manifest.json"}
    assert files(tmp_path / "pictures") == pictures | before_refining | shown
    opened = [Image.open(tmp_path / "pictures" / name) for name in sorted(pictures)]
    assert len({picture.tobytes() for picture in opened}) == 6
    refined = Image.open(tmp_path / "pictures" / "refined_output_001.png")
    assert refined.size == (64, 64)
    recipe = json.loads(refined.info["lace-lora"])
    assert (recipe["prompt"], recipe["seed"], recipe["settings"]["num_inference_steps"]) == ("edge", 43, 5)
    assert recipe["settings"]["original_size"] == 72  # the median shorter side of the photos

    # A picture that was lost is drawn again, the very same; the others stay.
    lost, other = (tmp_path / "pictures" / f"refined_output_00{index}.png" for index in (1, 0))
    before, written = lost.read_bytes(), other.stat().st_mtime_ns
    lost.unlink()
    assert run_here(*draw)[0] == 0
    assert lost.read_bytes() == before
    assert other.stat().st_mtime_ns == written
    # Other settings never overwrite it.
    assert run_here(*draw, "seed=7", "num_images=1", "image_format=jpg")[0] == 0
    comment = json.loads(Image.open(tmp_path / "pictures-2" / "refined_output_000.jpg").info["comment"])
    assert comment["seed"] == 7


def test_two_processes_train_like_one_with_twice_the_batch(
    settings: Make, config_file: Path, two_processes: str, tmp_path: Path
) -> None:
    train_here(
        settings(
            lora_output_dir=str(tmp_path / "one"), train_batch_size=2, learning_rate=0.01, gradient_accumulation_steps=2
        )
    )
    two = main_py(
        "--mode", "train", "--config", str(config_file), "train_batch_size=1", "learning_rate=0.01",
        "gradient_accumulation_steps=2", "report_to=tensorboard", f"lora_output_dir={tmp_path / 'two'}",
        f"accelerate_config={two_processes}",
    )  # fmt: skip
    assert two.returncode == 0, two.stderr
    assert "one of 2 processes" in two.stderr
    expected, trained = (load_file(tmp_path / name / LORA_FILE) for name in ("one", "two"))
    assert max(weight.abs().max() for name, weight in expected.items() if "lora_B" in name or "lora.up" in name) > 0.01
    # By the norm of a whole matrix: Adam makes as much of the rounding of a tiny gradient as of any other.
    assert trained.keys() == expected.keys()
    for name, weight in expected.items():
        assert (trained[name] - weight).norm() < 0.01 * weight.norm(), name
    rows = [(tmp_path / name / "metrics.csv").read_text().splitlines() for name in ("one", "two")]
    for single, double in zip(*rows, strict=True):
        assert single.split(",")[0] == double.split(",")[0]
    assert float(rows[0][-1].split(",")[1]) == pytest.approx(float(rows[1][-1].split(",")[1]), rel=1e-3)
    assert len(event_files(tmp_path / "two")) == 1


def test_class_pictures_are_drawn_once_and_user_files_kept(settings: Make, run_here: RunHere, tmp_path: Path) -> None:
    config = settings(with_prior_preservation=True, class_prompt="a net", num_class_images=2, max_train_steps=2)
    model = f"{config.pretrained_model}/"  # as a hub's name is, another than the training process is given
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "myspecialstyle.safetensors").write_bytes(b"mine")
    (tmp_path / "mine.yaml").write_text(dump_config(replace(config, pretrained_model=model)))
    command = ["--mode", "train", "--config", str(tmp_path / "mine.yaml")]
    first = main_py(*command)
    assert first.returncode == 0, first.stderr
    drawn = snapshot(tmp_path / "lora" / "class_images")
    assert len(drawn) == 3
    assert "Would use 2 existing class pictures" in run_here(*command, "--dry-run", "max_train_steps=4")[1]
    done = main_py(*command, "max_train_steps=4")
    assert done.returncode == 0, done.stderr
    assert "resuming from" in done.stderr
    assert snapshot(tmp_path / "lora" / "class_images") == drawn
    assert (tmp_path / "lora" / "myspecialstyle-earlier.safetensors").read_bytes() == b"mine"
    for key, other in (("guidance_scale", 3), ("num_class_images", 1)):  # other pictures of the class
        for steps in (4, 6):
            code, printed = run_here(*command, f"max_train_steps={steps}", f"{key}={other}")
            assert code == 2
            assert f"was trained with different settings or pictures; changed: {key} (was " in printed
    assert snapshot(tmp_path / "lora" / "class_images") == drawn
