"""A finished training's files: what kohya's programs show of them, and the name of the style."""

import json
import os
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lace_lora.config import LORA_FILE, Config
from lace_lora.training import results
from lace_lora.training.launch import Job

LAYERS = (
    "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
    "text_encoder_2.text_model.encoder.layers.1.self_attn.out_proj",
)


@pytest.fixture
def saved(tmp_path: Path) -> Config:
    return save(tmp_path)


def save(folder: Path, steps: int = 7) -> Config:
    """Both files and the card of a LoRA of all three networks, alpha unequal to rank."""
    config = Config(lora_output_dir=str(folder), rank=4, lora_alpha=2.0, resolution=64)
    state = {f"{layer}.lora_A.weight": torch.ones(4, 8) for layer in LAYERS}
    state |= {f"{layer}.lora_B.weight": torch.ones(8, 4) for layer in LAYERS}
    captions = dict(zip("abc", [config.instance_prompt, config.instance_prompt, "a rosette, White"], strict=True))
    job = Job(captions, {}, {"pretrained_model": "some/model"}, None, {}, started=1.7e9, original_size=600)
    assert results.save_results(config, state, config.alpha, steps, job, 1, "epsilon") == folder / LORA_FILE
    return config


def test_the_diffusers_file_has_alpha_folded_in_and_what_it_was_trained_on(saved: Config) -> None:
    with safe_open(Path(saved.lora_output_dir, LORA_FILE), framework="pt") as file:
        metadata = file.metadata()
    assert metadata["original_size"] == "600"
    assert (metadata["step"], json.loads(metadata["learns"])) == ("7", {"pretrained_model": "some/model"})
    for name, weight in load_file(Path(saved.lora_output_dir, LORA_FILE)).items():
        assert (weight == (0.5 if "lora_B" in name else 1)).all()


def test_files_of_an_earlier_training_are_kept(saved: Config, tmp_path: Path) -> None:
    kohya = tmp_path / "myspecialstyle.safetensors"
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    own = tmp_path / "pytorch_lora_weights-step7.safetensors"
    own.write_text("the user's own")
    save(tmp_path, 9)
    assert own.read_text() == "the user's own"
    for name, copy in (
        (LORA_FILE, "pytorch_lora_weights-step7-2.safetensors"),
        (kohya.name, "myspecialstyle-step7.safetensors"),
        ("myspecialstyle.json", "myspecialstyle-step7.json"),
    ):
        assert (tmp_path / copy).read_bytes() == kept[name]
    kohya.write_text("of another program")
    save(tmp_path, 9)
    assert (tmp_path / "myspecialstyle-earlier.safetensors").read_text() == "of another program"


@pytest.mark.parametrize("writes", range(7))
def test_until_the_new_lora_is_complete_the_earlier_one_is_there(
    writes: int, saved: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted after any number of files."""
    before, left = (tmp_path / LORA_FILE).read_bytes(), iter(range(writes))
    replace = os.replace

    def replace_or_fail(*paths: Path) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        replace(*paths)

    monkeypatch.setattr(os, "replace", replace_or_fail)
    with suppress(KeyboardInterrupt):
        save(tmp_path, 9)
    current = (tmp_path / LORA_FILE).read_bytes()
    copy = tmp_path / "pytorch_lora_weights-step7.safetensors"
    assert current == before if writes < 6 else copy.read_bytes() == before
    monkeypatch.undo()
    save(tmp_path, 9)
    assert copy.read_bytes() == before


def test_the_kohya_file_carries_alpha_and_what_programs_show(saved: Config) -> None:
    with safe_open(Path(saved.lora_output_dir, "myspecialstyle.safetensors"), framework="pt") as file:
        metadata, names = file.metadata(), set(file.keys())
        alphas = {float(file.get_tensor(name)) for name in names if name.endswith(".alpha")}
    assert alphas == {2.0}
    modules = {name.partition(".")[0] for name in names}
    assert names == {f"{m}.{end}" for m in modules for end in ("lora_down.weight", "lora_up.weight", "alpha")}
    assert metadata["original_size"] == "600"
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0"
    assert metadata["ss_training_started_at"] == "1700000000.0"  # not the time of saving
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "2.0")
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert metadata["modelspec.trigger_phrase"] == "<myspecialstyle>"
    assert metadata["modelspec.resolution"] == "64x64"
    assert metadata["ss_sd_model_name"] == "some/model"  # a path would be its last name alone
    tags = {"a photo of <myspecialstyle>": 2, "a rosette": 1, "white": 1}
    assert json.loads(metadata["ss_tag_frequency"]) == {"1_myspecialstyle": tags}
    card = json.loads(Path(saved.lora_output_dir, "myspecialstyle.json").read_text())
    assert (card["activation text"], card["sd version"]) == ("<myspecialstyle>", "SDXL")


@pytest.mark.parametrize(
    ("prompt", "folder", "name", "words"),
    [
        ("a photo of <my-lace>", "x/lora", "my-lace", "<my-lace>"),
        ("lace in sks style", "x/antique lace", "antique lace", "lace in sks style"),
        ("<a> and <b>, <a>", "x/lora", "a", "<a>, <b>"),
        ("lace", "x/lora/..", "x", "lace"),
    ],
)
def test_trigger_words_and_lora_name(prompt: str, folder: str, name: str, words: str) -> None:
    config = Config(instance_prompt=prompt, lora_output_dir=folder)
    assert config.lora_name == name
    assert results.trigger_words(prompt) == words
