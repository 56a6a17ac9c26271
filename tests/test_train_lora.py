"""Updates, checkpoints, and interrupted runs against uninterrupted ones."""

import math
import threading
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.optimization import get_scheduler
from safetensors.torch import load_file

import train_lora
from helpers import Make, refused
from lace_lora.config import LORA_FILE
from lace_lora.errors import LOSS_NOT_FINITE, UserError
from lace_lora.pictures import crops
from lace_lora.process import Stopped
from lace_lora.training import checkpoint, class_pictures, resuming
from lace_lora.training.batches import EMPTY_PROMPT, Batch
from lace_lora.training.metrics import Metrics
from training_helpers import StopAt, make_run, train_here


def test_only_the_lora_changes(settings: Make) -> None:
    run = make_run(settings())
    unet = run.train_step.networks["unet"]
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    train_lora.update(run, 0, 1.0)
    changed = {name for name, value in unet.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)


def test_accumulated_batches_equal_one_large_batch(settings: Make) -> None:
    once = make_run(settings(train_batch_size=4))
    summed = make_run(settings(train_batch_size=2, gradient_accumulation_steps=2))
    for step in range(2):
        loss_once, norm_once, _ = train_lora.update(once, step, 1.0)
        loss_summed, norm_summed, _ = train_lora.update(summed, step, 1.0)
        torch.testing.assert_close(loss_once, loss_summed, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(norm_once, norm_summed, rtol=1e-4, atol=1e-6)


def test_gradients_are_clipped(settings: Make) -> None:
    run = make_run(settings(max_grad_norm=1e-4))
    seen: list[float] = []

    def note(*_: Any) -> None:
        seen.append(math.sqrt(sum(float(w.grad.pow(2).sum()) for w in run.lora.values() if w.grad is not None)))

    run.optimizer.register_step_pre_hook(note)
    _, norm, _ = train_lora.update(run, 0, 1.0)
    assert norm > 1e-3
    assert seen[0] == pytest.approx(1e-4, rel=0.01)


def test_gradient_checkpointing_changes_nothing(settings: Make) -> None:
    plain, saving = make_run(settings()), make_run(settings(gradient_checkpointing=True))
    for run in (plain, saving):
        run.train_step.networks["unet"].train()
        train_lora.update(run, 0, 1.0)
    for name, weight in plain.lora.items():
        torch.testing.assert_close(weight, saving.lora[name])


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_dropout": 0.1, "random_flip": True},
        {"resolution": 32, "random_rotate": True},  # with close-ups
        {"optimizer": "prodigy", "learning_rate": 1.0, "noise_offset": 0.1},
        {"train_text_encoder": True, "text_encoder_lr": 1e-2, "gradient_checkpointing": True, "caption_dropout": 0.5},
        {"with_prior_preservation": True, "num_class_images": 3, "class_prompt": "a net", "caption_dropout": 0.5},
        {"aspect_ratio_buckets": True, "gradient_accumulation_steps": 2},
        {"lora_targets": "attention+feedforward"},
    ],
)
def test_a_run_interrupted_twice_equals_an_uninterrupted_one(
    settings: Make, tmp_path: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crops, "DRAWN_SIDE", 64)  # so that small photos have close-ups at a resolution of 32
    options = {"max_train_steps": 4, "lr_scheduler": "cosine", "checkpointing_steps": 4, **changes}
    straight = settings(lora_output_dir=str(tmp_path / "straight"), **options)
    parted = settings(lora_output_dir=str(tmp_path / "parted"), **options)
    train_here(straight)
    resume = None
    for step, stop in ((1, StopAt(1)), (3, StopAt(2))):
        existing = class_pictures.existing(parted)
        with pytest.raises(Stopped, match=f"stopped at step {step}"):
            train_here(parted, resume, stop, existing)
        resume = tmp_path / "parted" / f"checkpoint-{step}"
    train_here(parted, resume, of_class=class_pictures.existing(parted))
    for name in (LORA_FILE, "checkpoint-4/training_state.safetensors"):
        expected, got = load_file(tmp_path / "straight" / name), load_file(tmp_path / "parted" / name)
        assert expected.keys() == got.keys()
        assert all(torch.equal(expected[key], got[key]) for key in expected)
    rows = [(tmp_path / folder / "metrics.csv").read_text().splitlines() for folder in ("straight", "parted")]
    without_seconds = [[line.rpartition(",")[0] for line in lines] for lines in rows]
    assert without_seconds[0] == without_seconds[1]
    assert len(rows[0]) == 5


def test_caption_dropout_reaches_the_step(settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    run, seen = make_run(settings(caption_dropout=0.5, train_batch_size=4)), list[torch.Tensor]()
    loss = run.train_step.loss

    def note(batch: Batch) -> torch.Tensor:
        seen.append(batch.caption)
        return loss(batch)

    monkeypatch.setattr(run.train_step, "loss", note)
    for step in range(4):
        train_lora.update(run, step, 1.0)
    assert 0 < (torch.cat(seen) == EMPTY_PROMPT).sum() < 16


def test_training_reduces_the_loss_and_is_reproducible(settings: Make, tmp_path: Path) -> None:
    results = []
    for name in ("one", "two"):
        train_here(settings(lora_output_dir=str(tmp_path / name), max_train_steps=2))
        results.append(load_file(tmp_path / name / LORA_FILE))
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])
    assert any(tensor.abs().max() > 0 for key, tensor in results[0].items() if "lora_B" in key)


def test_learning_rate_follows_diffusers_schedule(settings: Make, tmp_path: Path) -> None:
    train_here(settings(max_train_steps=5, lr_scheduler="cosine", lr_warmup_steps=2, checkpointing_steps=5))
    lines = (tmp_path / "lora" / "metrics.csv").read_text().splitlines()[1:]
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], 1e-2)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=2, num_training_steps=5)
    for line in lines:
        assert float(line.split(",")[2]) == pytest.approx(schedule.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        schedule.step()


def test_an_update_without_finite_loss_is_skipped(settings: Make) -> None:
    run = make_run(settings())
    train_lora.update(run, 0, 1.0)
    before = [weight.clone() for weight in run.lora.values()]
    moments = [tensor.clone() for state in run.optimizer.state.values() for tensor in state.values()]
    latents = run.data.latents
    broken = replace(latents, mean=[mean * torch.nan for mean in latents.mean])
    good, run.data = run.data, replace(run.data, latents=broken)
    loss, _, _ = train_lora.update(run, 1, 1.0)
    assert loss.isnan()
    assert all(map(torch.equal, before, run.lora.values()))
    assert all(map(torch.equal, moments, (t for state in run.optimizer.state.values() for t in state.values())))
    run.data = good
    train_lora.update(run, 2, 1.0)
    assert not all(map(torch.equal, before, run.lora.values()))


def test_a_loss_that_is_not_finite_stops_the_run(settings: Make, tmp_path: Path) -> None:
    config = settings(max_train_steps=40, learning_rate=1e30, checkpointing_steps=1)
    with pytest.raises(UserError, match="NaN or inf") as caught:
        train_here(config)
    assert caught.value.exit_code == LOSS_NOT_FINITE
    assert not (tmp_path / "lora" / LORA_FILE).exists()
    for folder in (tmp_path / "lora").glob("checkpoint-*"):
        assert all(tensor.isfinite().all() for tensor in load_file(folder / "training_state.safetensors").values())


def test_checkpoint_of_another_model_is_refused(settings: Make, tmp_path: Path) -> None:
    train_here(settings(max_train_steps=2))
    with pytest.raises(UserError, match="does not match this model"):
        train_here(settings(rank=8), resume=tmp_path / "lora" / "checkpoint-2")


def test_what_the_text_encoders_learnt_is_saved(settings: Make, tmp_path: Path) -> None:
    train_here(settings(train_text_encoder=True, text_encoder_lr=1e-2, validation_steps=1, num_validation_images=1,
                        max_train_steps=2))  # fmt: skip
    for name in (LORA_FILE, f"checkpoint-2/{LORA_FILE}"):
        state = load_file(tmp_path / "lora" / name)
        for prefix in ("unet.", "text_encoder.text_model.", "text_encoder_2.text_model."):
            trained = [
                tensor.abs().max() > 0 for key, tensor in state.items() if key.startswith(prefix) and "_B" in key
            ]
            assert sum(trained) >= len(trained) - 4  # all but the first encoder's last layer, which SDXL does not read
            assert sum(trained) > 4
    grids = [(tmp_path / "lora" / "samples" / f"step-00000{step}.png").read_bytes() for step in (1, 2)]
    assert grids[0] != grids[1]


@pytest.mark.parametrize("changes", [{}, {"lora_dropout": 0.1}])
def test_a_checkpoint_has_the_weights_of_its_step_however_slow_the_write(
    settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    train_here(settings(lora_output_dir=str(tmp_path / "quick"), max_train_steps=3, **changes))
    update, publish, learnt_more = train_lora.update, checkpoint.publish, threading.Event()

    def note(run: train_lora.Run, step: int, *arguments: Any) -> Any:
        result = update(run, step, *arguments)
        if step == 2:  # the third step: what was learnt in the second is gone from the weights
            learnt_more.set()
        return result

    def slowly(*arguments: Any) -> Path:
        assert learnt_more.wait(60)
        return publish(*arguments)

    monkeypatch.setattr(train_lora, "update", note)
    monkeypatch.setattr(checkpoint, "publish", slowly)
    train_here(settings(lora_output_dir=str(tmp_path / "slow"), max_train_steps=3, **changes))
    for name in (LORA_FILE, "training_state.safetensors"):
        expected, got = (load_file(tmp_path / run / "checkpoint-2" / name) for run in ("quick", "slow"))
        assert all(torch.equal(expected[key], got[key]) for key in expected)


def test_a_checkpoint_is_saved_before_the_curve_is_drawn(
    settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def fail(*_: Any) -> bytes:
        raise Killed

    monkeypatch.setattr("lace_lora.training.metrics._plot", fail)
    run = make_run(settings(max_train_steps=2))
    (tmp_path / "lora").mkdir()
    with pytest.raises(Killed):
        train_lora.loop(run, Metrics(run.config, 0, is_main=True), 0, StopAt(None))  # type: ignore[arg-type]
    run.publisher.wait()
    assert checkpoint.newest(tmp_path / "lora") == (tmp_path / "lora" / "checkpoint-2", [])
    assert len((tmp_path / "lora" / "metrics.csv").read_text().splitlines()) == 3


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_resumed_run_equals_an_uninterrupted_one_on_a_gpu_within_rounding(
    settings: Make, tmp_path: Path, precision: str
) -> None:
    options = {"max_train_steps": 9, "mixed_precision": precision, "learning_rate": 1e-3}
    train_here(settings(lora_output_dir=str(tmp_path / "straight"), **options))
    parted = settings(lora_output_dir=str(tmp_path / "parted"), checkpointing_steps=3, **options)
    for resume, stop in ((None, 3), ("checkpoint-3", 3), ("checkpoint-6", None)):
        with pytest.raises(Stopped) if stop else nullcontext():
            train_here(parted, tmp_path / "parted" / resume if resume else None, StopAt(stop))
    expected, got = (load_file(tmp_path / run / LORA_FILE) for run in ("straight", "parted"))
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    "changes", [{}, {"optimizer": "prodigy", "learning_rate": 1.0}, {"lora_targets": "attention+feedforward"}]
)
@pytest.mark.parametrize("plain_first", [False, True])
def test_either_training_step_resumes_from_the_others_checkpoint(
    settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], plain_first: bool
) -> None:
    config = settings(max_train_steps=4, checkpointing_steps=4, **changes)
    train_here(replace(config, lora_output_dir=str(tmp_path / "straight")))
    ways = iter(["the test wants it", ""] if plain_first else ["", "the test wants it"])
    monkeypatch.setattr("lace_lora.training.train_step.reason_for_eager", lambda *_: next(ways))
    with pytest.raises(Stopped):
        train_here(config, stop=StopAt(2))
    train_here(config, resume=tmp_path / "lora" / "checkpoint-2")
    straight, mixed = (load_file(tmp_path / run / "pytorch_lora_weights.safetensors") for run in ("straight", "lora"))
    # Together: Adam makes steps of the same size of gradients that are rounding and no more.
    distance = sum((mixed[name] - weight).pow(2).sum() for name, weight in straight.items())
    assert distance / sum(weight.pow(2).sum() for weight in straight.values()) < 1e-6


def test_a_lora_and_a_checkpoint_have_the_fingerprint_that_a_resume_compares(settings: Make, tmp_path: Path) -> None:
    config = settings(max_train_steps=2)
    train_here(config)  # with its rank as the fingerprint
    assert resuming.finished_step(config, {"rank": 4}, None, "") == 2
    assert resuming.find_resume_checkpoint(config, {"rank": 4}, None, "") == (tmp_path / "lora" / "checkpoint-2", None)
    for check in (resuming.finished_step, resuming.find_resume_checkpoint):
        refused(lambda check=check: check(config, {"rank": 8}, None, ""), r"rank \(was 4, is 8\)")  # type: ignore[misc]


def test_a_training_begins_with_the_lora_that_it_is_given(settings: Make, tmp_path: Path) -> None:
    first = settings(lora_output_dir=str(tmp_path / "first"), max_train_steps=2)
    train_here(first)
    begun = settings(init_lora=str(first.lora_file), lora_alpha=8.0, max_train_steps=1, learning_rate=1e-12)
    train_here(begun)
    expected, got = load_file(first.lora_file), load_file(begun.lora_file)
    assert expected.keys() == got.keys()
    for layer in {key.rpartition(".lora_")[0] for key in expected}:
        effects = [state[f"{layer}.lora_B.weight"] @ state[f"{layer}.lora_A.weight"] for state in (expected, got)]
        torch.testing.assert_close(*effects, rtol=1e-4, atol=1e-7)
    resumed = replace(begun, max_train_steps=2, learning_rate=1e-2)
    train_here(resumed, Path(begun.lora_output_dir, "checkpoint-1"))
    once = load_file(resumed.lora_file)
    train_here(replace(resumed, init_lora=None), Path(begun.lora_output_dir, "checkpoint-1"))
    assert all(torch.equal(once[key], value) for key, value in load_file(resumed.lora_file).items())


def test_a_run_from_a_named_checkpoint_keeps_it_and_goes_on_from_its_own(settings: Make, tmp_path: Path) -> None:
    config = settings(max_train_steps=2, checkpointing_steps=1, checkpoints_total_limit=1)
    train_here(config)
    again = replace(config, resume_from_checkpoint="checkpoint-2", max_train_steps=6)
    origin = resuming.find_origin(again)
    for first, stop in (("checkpoint-2", StopAt(2)), ("checkpoint-4", StopAt(None))):
        resume, origin = resuming.find_resume_checkpoint(again, {"rank": 4}, origin, "")
        assert resume == tmp_path / "lora" / first
        with suppress(Stopped):
            train_here(again, resume, stop, origin=origin)
        assert (tmp_path / "lora" / "checkpoint-2").exists()
    assert resuming.finished_step(again, {"rank": 4}, origin, "") == 6
    assert not (tmp_path / "lora" / "checkpoint-5").exists()
