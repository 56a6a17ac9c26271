"""The loss on held-out pictures: what it is, that it compares, and that it costs the training nothing."""

import csv
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import data_utils
from helpers import Make
from lace_lora import seeds
from lace_lora.config import LORA_FILE, Config
from lace_lora.pictures import crops
from lace_lora.process import Stopped
from lace_lora.training import batches, validation
from lace_lora.training.loss import training_loss
from training_helpers import StopAt, encode_here, job_of, make_run, train_here


def encoded(config: Config, photos: Path) -> batches.Encoded:
    """Five pictures, of which the last two are held out."""
    captions = {str(path): f"lace number {index}" for index, path in enumerate(data_utils.list_images(photos))}
    held_out = {path: captions.pop(path) for path in list(captions)[3:]}
    data, _, _ = encode_here(config, job_of(captions, held_out=held_out))
    return data


def losses(config: Config) -> dict[int, float]:
    with open(Path(config.lora_output_dir, "metrics.csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    return {int(row["step"]): float(row["validation_loss"]) for row in rows if row["validation_loss"]}


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize("buckets", [False, True])
def test_the_loss_is_the_mean_over_pictures_and_timesteps(
    settings: Make, photos: Path, size: int, buckets: bool
) -> None:
    config = settings(aspect_ratio_buckets=buckets, snr_gamma=5.0, lora_dropout=0.5)
    data = encoded(config, photos)
    run = make_run(config, data)
    unet, held_out = run.train_step.networks["unet"], data.held_out
    assert held_out is not None

    def loss(batch: batches.Batch) -> torch.Tensor:
        assert len(batch.caption) <= size
        return training_loss(unet, batch, run.noise_scheduler, None)

    measured = validation.Validation(held_out, loss, config.seed, size).measure(run.train_step, 0)
    assert unet.training
    by_hand = []
    unet.eval()
    for picture in range(2):
        for timestep in validation.TIMESTEPS:
            noise = torch.randn(4, *held_out.latents.mean[picture].shape[2:],
                                generator=seeds.stream(config.seed, "validation", picture, timestep))  # fmt: skip
            noisy = run.noise_scheduler.add_noise(
                held_out.latents.mean[picture][:1], noise[None], torch.tensor([timestep])
            )
            row = int(held_out.caption[picture])
            added = {"text_embeds": data.pooled_prompt_embeds[row][None],
                     "time_ids": held_out.latents.time_ids[picture][None]}  # fmt: skip
            with torch.no_grad():
                found = unet(noisy, timestep, data.prompt_embeds[row][None], added_cond_kwargs=added).sample[0]
            by_hand.append(float((found - noise).square().mean()))
    assert measured == pytest.approx(sum(by_hand) / 8, rel=1e-3)


def test_without_memory_it_is_measured_one_by_one(settings: Make, photos: Path) -> None:
    config = settings()
    data = encoded(config, photos)
    run, sizes = make_run(config, data), []
    assert data.held_out is not None

    def loss(batch: batches.Batch) -> torch.Tensor:
        sizes.append(len(batch.caption))
        if len(batch.caption) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return training_loss(run.train_step.networks["unet"], batch, run.noise_scheduler, None)

    measure = validation.Validation(data.held_out, loss, config.seed, 8).measure
    assert measure(run.train_step, 0) == measure(run.train_step, 2) is not None
    assert sizes == [8, *[1] * 16]


def test_a_held_out_picture_never_enters_a_batch(settings: Make, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crops, "DRAWN_SIDE", 64)
    config = settings(resolution=32, crops_per_image=3)
    data = encoded(config, photos)
    assert data.instances == len(data.latents.mean) == 3
    held_out = data.held_out
    assert held_out is not None
    assert held_out.instances == len(held_out.latents.mean) == 2
    for step in range(20):
        batch = batches.step_batch(data, config.seed, step, 2, 1000)
        assert int(batch.caption.max()) < 3  # the captions of the others come after these


def test_it_is_in_metrics_before_training_and_after_the_same_steps_as_samples(settings: Make, tmp_path: Path) -> None:
    config = settings(validation_steps=2, num_validation_images=1, max_train_steps=5, checkpointing_steps=5)
    train_here(config, held_out_count=2)
    straight = losses(config)
    assert list(straight) == [0, 2, 4, 5]
    assert len(set(straight.values())) == 4  # it learns
    lines = Path(config.lora_output_dir, "metrics.csv").read_text().splitlines()
    assert lines[0] == "step,loss,learning_rate,grad_norm,validation_loss,seconds"
    assert lines[1].startswith("0,,,,1.")
    assert [line.split(",")[0] for line in lines[1:]] == list("012345")

    parted = settings(
        lora_output_dir=str(tmp_path / "parted"), validation_steps=2, num_validation_images=1, max_train_steps=5,
        checkpointing_steps=5,
    )  # fmt: skip
    with pytest.raises(Stopped):
        train_here(parted, stop=StopAt(3), held_out_count=2)
    train_here(parted, tmp_path / "parted" / "checkpoint-3", held_out_count=2)
    assert losses(parted) == straight


@pytest.mark.parametrize("failing", [False, True])
def test_measuring_changes_nothing_of_what_is_learnt(
    settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, failing: bool
) -> None:
    learnt = []
    for name, steps in (("with", 1), ("without", 0)):
        config = settings(lora_output_dir=str(tmp_path / name), validation_steps=steps, num_validation_images=1)
        if failing:
            monkeypatch.setattr(validation, "make_batches", fail)
        with caplog.at_level(logging.WARNING):
            train_here(config, held_out_count=2)
        learnt.append(load_file(tmp_path / name / LORA_FILE))
    assert all(torch.equal(value, learnt[1][key]) for key, value in learnt[0].items())
    assert ("no validation loss at step 0: a fault" in caplog.text) == failing


def fail(*_: Any) -> Any:
    raise ZeroDivisionError("a fault")
