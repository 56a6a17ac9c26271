"""What is known before anything is drawn: prompts and the LoRA file."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from helpers import Make, refused
from lace_lora.config import LORA_FILE, Config
from lace_lora.drawing import plan


@pytest.fixture
def settings(tmp_path: Path) -> Make:
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / LORA_FILE).write_bytes(b"weights")
    return lambda **changes: Config(**{"lora_output_dir": str(tmp_path / "lora"), **changes})


@pytest.mark.parametrize(
    ("changes", "prompts"),
    [
        ({}, ["a photo of <myspecialstyle>"]),
        ({"instance_prompt": "lace"}, ["lace"]),
        ({"prompt": ("edge",)}, ["edge"]),
        ({"prompt": ("edge", "net")}, ["edge", "net"]),
    ],
)
def test_prompts(changes: dict[str, Any], prompts: list[str], settings: Make) -> None:
    assert plan.read_prompts(settings(**changes)) == prompts


def test_a_prompts_file(tmp_path: Path, settings: Make) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffein Rand, weiß 🧵\r\n\r\n  net: 'fine'  \n# no comment\n".encode())
    assert plan.read_prompts(settings(prompts_file=str(path))) == ["ein Rand, weiß 🧵", "net: 'fine'", "# no comment"]
    path.write_bytes("\ufeffein Rand\r🧵\r".encode("utf-16-be"))
    assert plan.read_prompts(settings(prompts_file=str(path))) == ["ein Rand", "🧵"]


@pytest.mark.parametrize(
    ("content", "part"),
    [(None, "No such file"), (b" \n\n", "is empty"), (b"\xe4", "UTF-8"), (b"l\0a\0c\0e\0", "UTF-8")],
)
def test_a_prompts_file_that_cannot_be_used(content: bytes | None, part: str, tmp_path: Path, settings: Make) -> None:
    if content is not None:
        (tmp_path / "prompts.txt").write_bytes(content)
    refused(lambda: plan.read_prompts(settings(prompts_file=str(tmp_path / "prompts.txt"))), part)


def test_a_token_among_the_prompts_is_refused_and_not_repeated(tmp_path: Path, settings: Make) -> None:
    (tmp_path / "prompts.txt").write_text(f"lace\nhf_{'x' * 34}\n")
    refused(lambda: plan.read_prompts(settings(prompts_file=str(tmp_path / "prompts.txt"))), "an access token [^x]*$")


def test_paths_of_the_lora(tmp_path: Path, settings: Make) -> None:
    trained = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    (tmp_path / "mine.safetensors").write_bytes(b"other")
    assert plan.find_lora(settings()) == trained
    assert plan.find_lora(settings(lora_path=str(tmp_path / "lora"))) == trained
    assert plan.find_lora(settings(lora_path=str(trained))) == trained
    assert plan.find_lora(settings(lora_path=str(tmp_path / "mine.safetensors"))) == tmp_path / "mine.safetensors"
    (tmp_path / "MINE.SAFETENSORS").write_bytes(b"other")
    assert plan.find_lora(settings(lora_path=str(tmp_path / "MINE.SAFETENSORS"))) == tmp_path / "MINE.SAFETENSORS"
    assert plan.find_lora(settings(lora_scale=0.0, lora_path="missing")) is None


def test_a_lora_that_cannot_be_used(tmp_path: Path, settings: Make) -> None:
    (tmp_path / "old.bin").write_bytes(b"pickle")
    refused(lambda: plan.find_lora(settings(lora_path=str(tmp_path / "old.bin"))), "not a .safetensors file")
    refused(lambda: plan.find_lora(settings(lora_path=str(tmp_path / "no.safetensors"))), "no LoRA found at")
    refused(lambda: plan.find_lora(settings(lora_output_dir=str(tmp_path))), "train one first")


@pytest.mark.parametrize(("said", "size"), [("600", 600), ("", None), ("-5", None), ("a lot", None), ("9" * 30, None)])
def test_what_a_lora_says_of_its_photos(tmp_path: Path, said: str, size: int | None) -> None:
    save_file({"weight": np.zeros(1)}, tmp_path / "lora.safetensors", {"original_size": said})
    mine = Config(width=64, height=64, lora_path=str(tmp_path / "lora.safetensors"))
    assert plan.as_trained(mine).original_size == size
    assert plan.as_trained(replace(mine, lora_scale=0.0)).original_size == size  # to compare with and without it
    assert plan.as_trained(replace(mine, lora_path="missing.safetensors")).original_size is None


def test_pictures_are_drawn_as_photos_of_the_size_that_was_trained_on() -> None:
    assert Config(width=832, height=512).with_photo_size(600).original_size == 600
    assert Config(width=832, height=640).with_photo_size(600).original_size is None  # which would draw them blurred
    assert Config(original_size=300).with_photo_size(600).original_size == 300
    assert Config().with_photo_size(None) == Config()
