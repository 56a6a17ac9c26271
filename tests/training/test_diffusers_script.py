"""`train_script`: the arguments of diffusers' script, and where its result goes.

The script here is a stand-in with the flags of diffusers' own, which needs packages that this project does not.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops, ImageOps
from safetensors import safe_open
from safetensors.torch import load_file

from helpers import ROOT, Make, gradient, jpg, main_py, names, refused, truncated_jpg
from lace_lora.config import Config, dump_config
from lace_lora.pictures import image_files
from lace_lora.training import diffusers_script, run_diffusers_script
from training_helpers import job_of

FLAGS = (
    "pretrained_model_name_or_path", "variant", "instance_data_dir", "instance_prompt", "output_dir", "resolution",
    "rank", "max_train_steps", "learning_rate", "lr_scheduler", "mixed_precision", "class_prompt", "class_data_dir",
    "seed", "resume_from_checkpoint", "checkpointing_steps",
)  # fmt: skip
SCRIPT = """
import argparse, json, sys
from pathlib import Path
import torch
from PIL import Image
from safetensors.torch import save_file

parser = argparse.ArgumentParser()
FLAGS
parser.add_argument("--with_prior_preservation", default=False, action="store_true")
parser.add_argument("--gradient_checkpointing", action="store_true")
arguments = parser.parse_args()
if arguments.learning_rate == "0.5":
    raise ZeroDivisionError("a bug of the script")
if arguments.learning_rate == "0.25":
    import no_such_package
files = sorted(Path(arguments.instance_data_dir).iterdir())
for path in files:
    Image.open(path).load()
folder = Path(arguments.output_dir)
(folder / "arguments.json").write_text(json.dumps(vars(arguments) | {"pictures": [path.name for path in files]}))
name = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
save_file({f"{name}.lora.down.weight": torch.ones(4, 8), f"{name}.lora.up.weight": torch.ones(8, 4)},
          folder / "pytorch_lora_weights.safetensors")
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "their script.py"
    path.write_text(SCRIPT.replace("FLAGS", "\n".join(f'parser.add_argument("--{name}")' for name in FLAGS)))
    return path


def write(config: Config, tmp_path: Path) -> list[str]:
    (tmp_path / "mine.yaml").write_text(dump_config(config))
    return ["--mode", "train", "--config", str(tmp_path / "mine.yaml")]


def test_a_run(script: Path, settings: Make, tmp_path: Path) -> None:
    photos = tmp_path / "my photos"
    photos.mkdir()
    for index in range(12):
        jpg(photos / f"lace {index}.jpg", gradient(turn=index))
    truncated_jpg(photos / "broken.jpg")
    (photos / "notes.txt").write_text("no picture")
    config = settings(
        train_script=str(script), images_dir=str(photos), snr_gamma=5.0, gradient_checkpointing=True, lora_alpha=None,
        with_prior_preservation=True, class_prompt="a net",
    )  # fmt: skip
    done = main_py(*write(config, tmp_path))
    assert done.returncode == 0, done.stderr
    assert "no effect: min_" not in done.stderr
    assert "has no option for these settings, so they have no effect: snr_gamma, validation_steps" in done.stderr
    folder = tmp_path / "lora"
    given = json.loads((folder / "train_script" / "arguments.json").read_text())
    assert given["pictures"] == [f"{index:05d}.jpg" for index in range(12)]
    assert given["pretrained_model_name_or_path"] == config.pretrained_model
    assert (given["rank"], given["resolution"], given["mixed_precision"]) == ("4", "64", "no")
    assert given["with_prior_preservation"]
    assert given["class_prompt"] == "a net"
    assert given["gradient_checkpointing"]
    assert given["resume_from_checkpoint"] is None
    assert given["variant"] is None  # the model has none

    module = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    state = load_file(folder / "pytorch_lora_weights.safetensors")
    assert set(state) == {f"{module}.lora_A.weight", f"{module}.lora_B.weight"}
    assert torch.equal(state[f"{module}.lora_B.weight"], torch.ones(8, 4))
    with safe_open(folder / "pytorch_lora_weights.safetensors", framework="pt") as file:
        assert file.metadata()["step"] == "4"
    assert {"myspecialstyle.safetensors", "config.yaml"} <= names(folder)
    again = main_py(*write(config, tmp_path))
    assert (again.returncode, "Finished already" in again.stdout) == (0, True)


def test_the_script_gets_copies_of_pictures_that_it_opens_wrongly(tmp_path: Path) -> None:
    """It opens a picture with Pillow alone, turns it as EXIF says, and converts it to RGB."""
    (tmp_path / "a.heic").write_bytes((ROOT / "tests/pictures/heic/turned.heic").read_bytes())
    jpg(tmp_path / "b.jpg", orientation=6)
    see_through = gradient().convert("RGBA")
    see_through.putalpha(Image.linear_gradient("L").resize((64, 48)))
    see_through.save(tmp_path / "c.png")
    Image.fromarray(np.linspace(0, 65535, 64 * 48).reshape(48, 64).astype("u2")).save(tmp_path / "d.png")
    gradient().convert("L").save(tmp_path / "e.png")
    paths = sorted(tmp_path.iterdir())
    folder = tmp_path / "job" / "pictures"
    folder.mkdir(parents=True)
    extensions = (".heic", ".jpg", ".png")
    for _ in range(2):  # as a second process does
        diffusers_script.hand_over(paths, folder, extensions)
    given = sorted(folder.iterdir())
    assert [path.name for path in given] == ["00000.png", "00001.jpg", "00002.png", "00003.png", "00004.png"]
    assert [path.is_symlink() for path in given] == [False, True, False, False, True]
    assert names(folder.parent) == {"pictures"}
    for path, theirs in zip(paths, given, strict=True):
        ours, _ = image_files.open_picture(path, formats=image_files.formats_of(extensions))
        with Image.open(theirs, formats=("JPEG", "PNG")) as picture:
            opened = ImageOps.exif_transpose(picture).convert("RGB")
        assert opened.size == ours.size
        assert ImageChops.difference(opened, ours).getbbox() is None


@pytest.mark.parametrize(
    ("rate", "code", "message"),
    [(0.5, 1, "failed with ZeroDivisionError"), (0.25, 2, "needs no_such_package, which is not installed")],
)
def test_a_script_that_fails(
    script: Path, settings: Make, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    rate: float, code: int, message: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(sys, "argv", sys.argv)
    (tmp_path / "lora").mkdir()
    config = settings(train_script=str(script), learning_rate=rate)
    job = job_of({str(path): "lace" for path in photos.glob("*.jpg")}, fingerprint={"rank": 4})
    refused(lambda: run_diffusers_script.run(config, job, tmp_path / "used"), message, code)
    assert not (tmp_path / "lora" / "pytorch_lora_weights.safetensors").exists()
    other = replace(job, fingerprint={"rank": 8})
    refused(lambda: run_diffusers_script.run(config, other, tmp_path / "used"), "trained with other settings")


def test_other_files_are_refused_before_training_starts(settings: Make, tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text("print('hello')")
    (tmp_path / "no.py").write_text("this is no Python")
    for name, part in (("none.py", "cannot be read"), ("no.py", "cannot be read"), ("other.py", "options are missing")):
        refused(lambda name=name: diffusers_script.check(settings(train_script=str(tmp_path / name))), part)  # type: ignore[misc]


@pytest.mark.parametrize("setting", ["pretrained_model", "pretrained_vae"])
def test_single_files_are_refused(script: Path, settings: Make, tmp_path: Path, setting: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    config = settings(train_script=str(script), **{setting: str(tmp_path / "model.safetensors")})
    refused(lambda: diffusers_script.check(config), f"set {setting} to a Hub model or a folder")


def test_switches_and_values(script: Path, settings: Make, tmp_path: Path) -> None:
    flags = diffusers_script.flags_of(script)
    assert flags["gradient_checkpointing"]
    assert not flags["rank"]
    zeros = diffusers_script.command_line(settings(seed=0), flags, tmp_path / "in", tmp_path / "out", "no")
    assert "--seed=0" in zeros
    arguments = diffusers_script.command_line(settings(), flags, tmp_path / "in", tmp_path / "out", "bf16")
    assert "--mixed_precision=bf16" in arguments
    assert f"--instance_data_dir={tmp_path / 'in'}" in arguments
    assert not any(argument.startswith(("--gradient_checkpointing", "--class_prompt")) for argument in arguments)
    assert not any(argument.partition("=")[0].removeprefix("--") not in flags for argument in arguments)
