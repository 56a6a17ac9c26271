"""Sample grids: where memory is short, where pictures are black, and without effect on the training."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops
from safetensors.torch import load_file, save_file

import train_lora
from helpers import Make
from lace_lora.config import LORA_FILE, Config
from lace_lora.sdxl import models, sampling
from lace_lora.sdxl.prompts import Embeddings
from lace_lora.training.samples import SampleInputs, draw_samples
from training_helpers import CPU, make_run, random_batch, train_here


def made_up_embeddings() -> Embeddings:
    batch = random_batch(2)
    prompt, pooled = batch.prompt_embeds, batch.pooled_prompt_embeds
    return Embeddings(prompt[:1], pooled[:1], prompt[1:], pooled[1:])


def draw(config: Config, step: int) -> train_lora.Run:
    run = make_run(config)
    sample_inputs = SampleInputs(made_up_embeddings, models.load_vae(config, CPU, torch.float32))
    Path(config.lora_output_dir).mkdir(exist_ok=True)
    draw_samples(config, step, run.train_step, run.noise_scheduler, sample_inputs, None)
    return run


def test_samples_are_told_the_photos_size(settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    base_latents = sampling.base_latents

    def noting(*given: Any) -> torch.Tensor:
        told.append(given[4].original_size)
        return base_latents(*given)

    monkeypatch.setattr(sampling, "base_latents", noting)
    run, vae = make_run(settings()), models.load_vae(settings(), CPU, torch.float32)
    (tmp_path / "lora").mkdir()
    draw_samples(settings(), 2, run.train_step, run.noise_scheduler, SampleInputs(made_up_embeddings, vae), 3000)
    assert told
    assert set(told) == {3000}


@pytest.mark.parametrize("most", [1, 0])
def test_out_of_memory_draws_samples_one_by_one_or_skips_them(
    settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, most: int
) -> None:
    config = settings(num_validation_images=3, train_batch_size=2)
    draw(replace(config, lora_output_dir=str(tmp_path / "plenty")), 2)
    base_latents = sampling.base_latents

    def out_of_memory(*arguments: Any) -> torch.Tensor:
        if len(arguments[3]) > most:  # seeds
            raise torch.OutOfMemoryError("CUDA out of memory")
        return base_latents(*arguments)

    monkeypatch.setattr(sampling, "base_latents", out_of_memory)
    run = draw(config, 2)
    assert run.train_step.networks["unet"].training
    grids = [tmp_path / name / "samples" / "step-000002.png" for name in ("plenty", "lora")]
    if most:
        plenty, few = (torch.from_numpy(np.array(Image.open(grid))).int() for grid in grids)
        assert (plenty - few).abs().max() <= 2
    else:
        assert not grids[1].exists()
        assert "no sample pictures at step 2: out of memory" in caplog.text


def test_black_samples_do_not_stop_the_training(
    settings: Make, tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(tiny / "base", tmp_path / "base")
    [file] = (tmp_path / "base" / "vae").glob("*.safetensors")
    broken = load_file(file)
    broken["decoder.conv_out.bias"].fill_(torch.nan)
    save_file(broken, file, metadata={"format": "pt"})
    run = draw(settings(pretrained_model=str(tmp_path / "base"), num_validation_images=1), 2)
    assert "no sample pictures at step 2: NaN or inf in the VAE's output" in caplog.text
    loss, _, _ = train_lora.update(run, 2, 1.0)
    assert loss.isfinite()


def test_sample_grids_do_not_disturb_the_training(settings: Make, tmp_path: Path) -> None:
    plain = settings(lora_output_dir=str(tmp_path / "plain"), max_train_steps=2)
    watched = replace(plain, lora_output_dir=str(tmp_path / "watched"), validation_steps=1, num_validation_images=2)
    for config in (plain, watched):
        train_here(config)
    expected, got = (load_file(tmp_path / name / LORA_FILE) for name in ("plain", "watched"))
    assert all(torch.equal(expected[key], got[key]) for key in expected)
    grids = sorted(path.name for path in (tmp_path / "watched" / "samples").iterdir())
    assert grids == [f"step-00000{step}.png" for step in range(3)]


def test_samples_and_class_pictures_do_not_depend_on_the_refiners_flow(settings: Make, tmp_path: Path) -> None:
    plain = settings(
        max_train_steps=1, validation_steps=1, num_validation_images=1, with_prior_preservation=True, num_class_images=1
    )
    folders = [tmp_path / "img2img", tmp_path / "ensemble"]
    for folder, config in zip(folders, (plain, replace(plain, refiner_flow="ensemble")), strict=True):
        folder.mkdir()
        train_here(replace(config, lora_output_dir=str(folder), class_data_dir=str(folder)))
    for pattern in ("samples/step-000001.png", "class_*.png"):
        [expected], [got] = ([Image.open(path).tobytes() for path in folder.glob(pattern)] for folder in folders)
        assert got == expected


@pytest.mark.parametrize(
    ("broken", "changes"),
    [
        ("lace_lora.sdxl.sampling.base_latents", {}),
        ("lace_lora.pictures.gallery.column", {"train_text_encoder": True, "lora_dropout": 0.1}),
    ],
)
def test_a_grid_that_fails_leaves_the_training_as_it_was(
    broken: str, changes: dict[str, Any], settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("a bug in drawing")

    changes = {"max_train_steps": 2, **changes}
    train_here(settings(lora_output_dir=str(tmp_path / "plain"), **changes))
    monkeypatch.setattr(broken, fail)
    train_here(settings(validation_steps=1, num_validation_images=1, **changes))
    assert [r.message for r in caplog.records if r.levelname == "WARNING"] == [
        f"no sample pictures at step {step}: a bug in drawing" for step in (0, 1, 2)
    ]
    for name in (LORA_FILE, "checkpoint-2/training_state.safetensors"):
        expected, got = (load_file(tmp_path / run / name) for run in ("plain", "lora"))
        assert all(torch.equal(expected[key], got[key]) for key in expected)


def test_the_strip_grows_by_a_column_at_each_point_in_training(settings: Make, tmp_path: Path) -> None:
    config = settings(max_train_steps=2, validation_steps=1, num_validation_images=2)
    train_here(config)
    with Image.open(tmp_path / "lora" / "samples.png") as strip:
        width = strip.width
    columns = [tmp_path / "lora" / "samples" / f"step-00000{step}.png" for step in range(3)]
    assert [Image.open(column).size for column in columns] == [(64, 2 * 64 + 8)] * 3  # two seeds, one below the other
    assert width == 3 * (64 + 8) + 8
    train_here(replace(config, max_train_steps=3), resume=tmp_path / "lora" / "checkpoint-2")
    with Image.open(tmp_path / "lora" / "samples.png") as strip:
        assert strip.width == 4 * (64 + 8) + 8
        for place, column in enumerate(columns):
            left = 8 + place * (64 + 8)
            shown = strip.crop((left, 8, left + 64, 8 + 2 * 64 + 8))
            assert ImageChops.difference(shown, Image.open(column)).getbbox() is None
            number = strip.crop((left, 8 + 2 * 64 + 8, left + 64, strip.height))
            assert np.asarray(number).min() < 128  # something is written there


def test_the_strip_of_a_long_run_stays_readable(settings: Make, tmp_path: Path) -> None:
    folder = tmp_path / "lora" / "samples"
    folder.mkdir(parents=True)
    for step in range(1100):
        Image.new("RGB", (64, 64), (0, 255, 0) if step == 0 else "white").save(folder / f"step-{step:06d}.png")
    draw(settings(num_validation_images=1), 1100)
    with Image.open(tmp_path / "lora" / "samples.png") as strip:
        assert strip.width == 40 * (64 + 8) + 8
        first, last = strip.crop((8, 8, 72, 72)), strip.crop((strip.width - 72, 8, strip.width - 8, 72))
    assert first.getpixel((9, 9)) == (0, 255, 0)
    assert ImageChops.difference(last, Image.open(folder / "step-001100.png")).getbbox() is None


def test_a_damaged_column_is_left_out(settings: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "lora" / "samples"
    folder.mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(folder / "step-000001.png")
    (folder / "step-000000.png").write_bytes((folder / "step-000001.png").read_bytes()[:60])
    draw(settings(num_validation_images=1), 2)
    assert "left out of the strip of samples: " in caplog.text
    assert "step-000000.png is truncated or damaged" in caplog.text
    with Image.open(tmp_path / "lora" / "samples.png") as strip:
        assert strip.width == 2 * (64 + 8) + 8


def test_the_last_step_has_samples_too(settings: Make, tmp_path: Path) -> None:
    train_here(settings(max_train_steps=3, validation_steps=2, num_validation_images=1))
    names = sorted(path.name for path in (tmp_path / "lora" / "samples").iterdir())
    assert names == ["step-000000.png", "step-000002.png", "step-000003.png"]


def test_the_strip_leaves_out_samples_of_another_size_and_copies(settings: Make, tmp_path: Path) -> None:
    folder = tmp_path / "lora" / "samples"
    folder.mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(folder / "step-000001.png")
    Image.new("RGB", (64, 64)).save(folder / "step-000009.png")  # of a run that was longer
    Image.new("RGB", (64, 136)).save(folder / "step-000001 (1).png")  # as Drive names copies
    draw(settings(num_validation_images=2), 2)
    with Image.open(tmp_path / "lora" / "samples.png") as strip:
        assert strip.width == (64 + 8) + 8
