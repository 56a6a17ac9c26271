"""What is said before a training: about the machine, and about settings that are most likely not meant."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from demo.making import build_model
from lace_lora import machine
from lace_lora.config import Config
from lace_lora.machine import Gpu
from lace_lora.sdxl import lora_weights
from lace_lora.training import plan

H100 = Gpu("NVIDIA H100 80GB HBM3", 79.6, 79.1, has_bf16=True)
T4 = Gpu("Tesla T4", 15.0, 14.6, has_bf16=False)
SDXL = Config(images_dir="photos", lora_output_dir="lora", output_dir="pictures")
TOKEN = "<myspecialstyle>"
DOWNLOADS = ["stabilityai/stable-diffusion-xl-base-1.0 (6.9 GB)"]


def described(
    monkeypatch: pytest.MonkeyPatch, gpu: Gpu | None = None, pictures: int = 250, **changes: Any
) -> dict[str, str]:
    """The lines, by the word before the colon."""
    monkeypatch.setattr(machine, "find_gpu", lambda: gpu)
    first_step = changes.pop("first_step", 0)
    lines = plan.describe(replace(SDXL, **changes), [1] * pictures, first_step, DOWNLOADS)
    return dict(line.split(": ", 1) for line in lines)


def test_what_people_ask_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    said = described(monkeypatch, H100)
    assert said["GPU"] == "NVIDIA H100 80GB HBM3, 79.1 of 79.6 GiB free; precision: bf16"
    assert said["GPU memory"] == "7.7 GiB needed (computed from measurements of an H100)"
    assert said["steps"].startswith("0 to 1000, each of 2 of the 250 pictures")
    assert said["steps"].endswith("every picture is seen 8 times in all (8.0 epochs)")
    assert said["time"] == "30 s of steps (computed from measurements of this kind of GPU)"
    assert said["download"].startswith(f"{DOWNLOADS[0]}, to ")
    assert said["disk"].endswith("GB free for lora; needed: 1.3 GB (computed)")
    assert "nothing is uploaded" in said["privacy"]
    assert "CreativeML Open RAIL++-M" in said["licence"]


@pytest.mark.parametrize(
    ("gpu", "changes"),
    [
        (T4, {}),
        (replace(H100, name="NVIDIA H100 PCIe"), {}),
        (replace(H100, name="NVIDIA H100 NVL"), {}),
        (H100, {"resolution": 640}),
        (H100, {"gradient_checkpointing": True}),
        (H100, {"mixed_precision": "fp16"}),
        (H100, {"lora_targets": "attention+feedforward"}),
        (H100, {"device": "cpu"}),
        (None, {}),
    ],
)
def test_no_time_is_invented(monkeypatch: pytest.MonkeyPatch, gpu: Gpu | None, changes: dict[str, Any]) -> None:
    assert "after its first steps" in described(monkeypatch, gpu, **changes)["time"]


def test_one_picture_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "each of 2 of the 1 picture; " in described(monkeypatch, pictures=1)["steps"]


def test_each_process_takes_pictures_of_its_own(monkeypatch: pytest.MonkeyPatch, two_processes: str) -> None:
    said = described(monkeypatch, H100, accelerate_config=two_processes)
    assert said["steps"].startswith("0 to 1000, each of 4 of the 250 pictures")
    assert said["steps"].endswith("every picture is seen 16 times in all (16.0 epochs)")
    assert "after its first steps" in said["time"]  # measured with one only
    [warning] = plan.warnings(replace(SDXL, accelerate_config=two_processes), [TOKEN] * 20)
    assert "20 pictures would be seen 200 times" in warning
    assert "500 steps are 100 times" in warning


def test_nothing_is_said_of_the_time_and_memory_of_diffusers_script(monkeypatch: pytest.MonkeyPatch) -> None:
    said = described(monkeypatch, H100, train_script="script.py")
    assert not {"time", "GPU memory"} & said.keys()
    assert "needed" not in said["disk"]


def test_a_resumed_training_takes_the_rest_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    said = described(monkeypatch, H100, first_step=500)
    assert said["time"].startswith("15 s of steps")
    assert said["steps"].startswith("500 to 1000")


def test_a_gpu_that_is_too_small_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    said = described(monkeypatch, T4, resolution=1024, train_batch_size=4)
    assert said["GPU"].endswith("precision: fp16")
    assert "at most 22.9 GiB needed" in said["GPU memory"]
    assert "more than is free" in said["GPU memory"]
    assert "more than is free" not in described(monkeypatch, T4)["GPU memory"]


@pytest.mark.parametrize(("validation_steps", "needed"), [(250, "7.3"), (0, "5.8")])
def test_samples_take_more_memory_than_a_training_with_checkpointing(
    monkeypatch: pytest.MonkeyPatch, validation_steps: int, needed: str
) -> None:
    said = described(monkeypatch, H100, gradient_checkpointing=True, validation_steps=validation_steps)
    assert said["GPU memory"].startswith(f"{needed} GiB needed")


def test_feed_forward_layers_take_memory_and_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    said = described(monkeypatch, H100, lora_targets="attention+feedforward")
    assert said["GPU memory"].startswith("8.5 GiB needed (computed from measurements of an H100, and from the sizes of")
    assert said["disk"].endswith("needed: 2.3 GB (computed)")


@pytest.mark.parametrize("targets", ["attention", "attention+feedforward"])
def test_sdxl_s_lora_is_as_large_as_said(targets: Any) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(build_model.base_config(build_model.SDXL))
        lora = lora_weights.add_lora({"unet": unet}, replace(SDXL, rank=1, lora_targets=targets))
    assert sum(weight.numel() for weight in lora.values()) == plan.LORA_WEIGHTS[targets]


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, tiny: Path) -> None:
    assert described(monkeypatch)["GPU"] == "none that NVIDIA's driver reports"
    said = described(monkeypatch, pretrained_model=str(tiny / "base"))
    assert said["GPU"] == "none that NVIDIA's driver reports; a model this small needs none"
    assert "time" not in said
    assert "licence" not in said


def test_in_colab_results_go_to_drive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLAB_RELEASE_TAG", "1")
    said = described(monkeypatch, lora_output_dir="/content/drive/MyDrive/lora")
    assert "GB free" in said["Google Drive"]
    assert said["privacy"].endswith("results go to your own Google Drive, nothing else is uploaded")


@pytest.mark.parametrize(
    ("changes", "captions", "expected"),
    [
        ({}, [TOKEN], ""),
        ({}, [TOKEN, "a doily"], "1 of 2 captions without <myspecialstyle>, such as 'a doily'"),
        ({"validation_prompt": "lace"}, [TOKEN], "validation_prompt 'lace' does not contain <myspecialstyle>"),
        ({"instance_prompt": "a photo of lace"}, ["a photo of lace"], "instance_prompt 'a photo of lace' has no token"),
        ({"learning_rate": 1.0}, [TOKEN], "learning_rate is 1, far too high for adamw: 1e-4"),
        ({"learning_rate": 1.0, "optimizer": "prodigy"}, [TOKEN], ""),
        ({"max_train_steps": 100_000}, [TOKEN], "each of 1 picture would be seen 200,000 times"),
        ({}, ["a doily"], "1 of 1 caption without"),
        ({"max_train_steps": 100_000}, [TOKEN] * 48, "48 pictures would be seen 4,167 times, .* 2400 steps"),
        ({"lora_output_dir": "./photos"}, [TOKEN], "lora_output_dir is the same folder as images_dir"),
        ({"output_dir": "photos"}, [TOKEN], "output_dir is the same folder as images_dir"),
    ],
)  # fmt: skip
def test_what_is_most_likely_not_meant(changes: dict[str, Any], captions: list[str], expected: str) -> None:
    config = replace(SDXL, **({"max_train_steps": 10} | changes))
    found = plan.warnings(config, captions)
    if not expected:
        assert found == []
    else:
        [warning] = found
        assert re.search(expected, warning), warning
