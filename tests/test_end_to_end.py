"""The program as a user runs it: main.py in processes of its own, training through accelerate, then drawing."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file

from helpers import ROOT, Make, main_py, snapshot
from lace_lora.config import dump_config, load_config


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def config_file(settings: Make, tmp_path: Path) -> Path:
    path = tmp_path / "my.yaml"
    path.write_text(dump_config(settings(num_images=3, save_base=True, prompt=("a photo of <myspecialstyle>", "edge"))))
    return path


def test_train_and_draw(config_file: Path, tmp_path: Path) -> None:
    trained = main_py("--mode", "train", "--config", str(config_file), "validation_steps=4", "report_to=tensorboard")
    assert trained.returncode == 0, trained.stderr
    checkpoint = ["manifest.json", "pytorch_lora_weights.safetensors", "state.json", "training_state.safetensors"]
    expected = {f"checkpoint-{step}/{name}" for step in (2, 4) for name in checkpoint}
    expected |= {
        "config.yaml",
        "metrics.csv",
        "loss.png",
        "samples/step-000004.png",
        "myspecialstyle.json",
        "myspecialstyle.safetensors",
        "pytorch_lora_weights.safetensors",
    }
    found = files(tmp_path / "lora")
    events = {name for name in found if name.startswith("logs/events.out.tfevents")}
    assert len(events) == 1
    assert found - events == expected
    assert load_config(tmp_path / "lora" / "config.yaml").rank == 4
    assert len((tmp_path / "lora" / "metrics.csv").read_text().splitlines()) == 5
    pipeline = StableDiffusionXLPipeline.from_pretrained(load_config(config_file).pretrained_model)
    folder, file = str(tmp_path / "lora"), "pytorch_lora_weights.safetensors"
    pipeline.load_lora_weights(folder, weight_name=file)  # offline, older diffusers must be told the name

    again = main_py("--mode", "train", "--config", str(config_file))
    assert again.returncode == 0
    assert "Finished already" in again.stdout
    refused = main_py("--mode", "train", "--config", str(config_file), "rank=8")
    assert refused.returncode == 2
    assert "rank (was 4, is 8)" in refused.stderr

    drawn = main_py("--mode", "inference", "--config", str(config_file))
    assert drawn.returncode == 0, drawn.stderr
    pictures = {f"{kind}_output_00{index}.png" for index in range(3) for kind in ("base", "refined")}
    before_refining = {f".before_refining/00{index}.{kind}" for index in range(3) for kind in ("jpg", "json")}
    shown = {"contact_sheet.png", "gallery.html", "manifest.json"}
    assert files(tmp_path / "pictures") == pictures | before_refining | shown
    opened = [Image.open(tmp_path / "pictures" / name) for name in sorted(pictures)]
    assert len({picture.tobytes() for picture in opened}) == 6
    refined = Image.open(tmp_path / "pictures" / "refined_output_001.png")
    assert refined.size == (64, 64)
    said = json.loads(refined.info["lace-lora"])
    assert (said["prompt"], said["seed"], said["settings"]["num_inference_steps"]) == ("edge", 43, 5)

    # A picture that was lost is drawn again, the very same; the others stay.
    lost = tmp_path / "pictures" / "refined_output_001.png"
    before, kept = lost.read_bytes(), (tmp_path / "pictures" / "refined_output_000.png").stat().st_mtime_ns
    lost.unlink()
    assert main_py("--mode", "inference", "--config", str(config_file)).returncode == 0
    assert lost.read_bytes() == before
    assert (tmp_path / "pictures" / "refined_output_000.png").stat().st_mtime_ns == kept
    # Other settings never overwrite it.
    other = main_py("--mode", "inference", "--config", str(config_file), "seed=7", "num_images=1", "image_format=jpg")
    assert other.returncode == 0, other.stderr
    assert (tmp_path / "pictures-2" / "refined_output_000.jpg").exists()
    comment = json.loads(Image.open(tmp_path / "pictures-2" / "refined_output_000.jpg").info["comment"])
    assert comment["seed"] == 7


def test_two_processes_learn_what_one_does_with_twice_the_batch(
    settings: Make, config_file: Path, two_processes: str, tmp_path: Path
) -> None:
    common = ["--mode", "train", "--config", str(config_file), "learning_rate=0.01", "gradient_accumulation_steps=2"]
    one = main_py(*common, "train_batch_size=2", f"lora_output_dir={tmp_path / 'one'}")
    two = main_py(
        *common, "train_batch_size=1", f"lora_output_dir={tmp_path / 'two'}", f"accelerate_config={two_processes}"
    )
    assert one.returncode == two.returncode == 0, two.stderr
    assert "one of 2 processes" in two.stderr
    expected, learnt = (load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("one", "two"))
    assert max(weight.abs().max() for name, weight in expected.items() if "lora_B" in name or "lora.up" in name) > 0.01
    # As wholes: Adam makes as much of the rounding of a tiny gradient as of any other.
    for name, weight in expected.items():
        assert (learnt[name] - weight).norm() < 0.01 * weight.norm(), name
    rows = [(tmp_path / name / "metrics.csv").read_text().splitlines() for name in ("one", "two")]
    for single, double in zip(*rows, strict=True):
        assert single.split(",")[0] == double.split(",")[0]
    assert float(rows[0][-1].split(",")[1]) == pytest.approx(float(rows[1][-1].split(",")[1]), rel=1e-3)


def test_a_stop_saves_and_the_same_command_goes_on(config_file: Path, tmp_path: Path) -> None:
    arguments = ["--mode", "train", "--config", str(config_file), "max_train_steps=100000", "checkpointing_steps=5"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "main.py"), *arguments], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "lora" / "checkpoint-5").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGINT
    assert "the same command goes on" in errors.splitlines()[-1]
    steps = [int(path.name.partition("-")[2]) for path in (tmp_path / "lora").glob("checkpoint-*")]
    assert f"stopped at step {max(steps)}" in errors.splitlines()[-1]
    survivors = subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True, check=False)
    assert not survivors.stdout
    on = main_py("--mode", "train", "--config", str(config_file), f"max_train_steps={max(steps) + 1}")
    assert on.returncode == 0, on.stderr
    assert f"going on from {tmp_path / 'lora' / f'checkpoint-{max(steps)}'}" in on.stderr


def test_class_pictures_are_drawn_once_and_the_users_files_kept(settings: Make, tmp_path: Path) -> None:
    config = settings(with_prior_preservation=True, class_prompt="a net", num_class_images=2, max_train_steps=2)
    model = f"{config.pretrained_model}/"  # as a hub's name, not what the training process is given
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "myspecialstyle.safetensors").write_bytes(b"mine")
    (tmp_path / "mine.yaml").write_text(dump_config(replace(config, pretrained_model=model)))
    command = ["--mode", "train", "--config", str(tmp_path / "mine.yaml")]
    assert main_py(*command).returncode == 0
    drawn = snapshot(tmp_path / "lora" / "class_images")
    assert len(drawn) == 3
    planned = main_py(*command, "--dry-run", "max_train_steps=4")
    assert "Would learn 2 class pictures" in planned.stdout
    done = main_py(*command, "max_train_steps=4")
    assert done.returncode == 0, done.stderr
    assert "going on from" in done.stderr
    assert snapshot(tmp_path / "lora" / "class_images") == drawn
    assert (tmp_path / "lora" / "myspecialstyle-earlier.safetensors").read_bytes() == b"mine"
    for key, other in (("guidance_scale", 3), ("num_class_images", 1)):  # other pictures of the class
        refused = main_py(*command, "max_train_steps=6", f"{key}={other}")
        assert refused.returncode == 2
        assert f"has learnt something else; changed: {key} (was " in refused.stderr
        assert "Finished already" in main_py(*command, "max_train_steps=4", f"{key}={other}").stdout
    assert snapshot(tmp_path / "lora" / "class_images") == drawn
