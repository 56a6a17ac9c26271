"""Skipped updates, the time of each step, and what only watches a training."""

import csv
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from helpers import Make, refused
from lace_lora.config import Config
from lace_lora.errors import LOSS_NOT_FINITE
from lace_lora.training.metrics import MEAN_OVER, SAMPLING, SAVING, Metrics, RunningMean


@pytest.mark.parametrize(
    ("losses", "norms", "ending", "good"),
    [
        ([1.0, 1.0], [1.0, 1.0], True, True),
        ([math.nan, 1.0], [math.nan, 1.0], True, True),
        ([1.0, math.nan], [1.0, math.nan], False, False),
        ([1.0, math.nan], [1.0, math.nan], True, True),
        ([1.0, *[math.nan] * 5, 1.0], [1.0] * 7, False, None),
        ([1.0, *[math.inf] * 4], [1.0] * 5, False, False),
        ([1.0, *[math.inf] * 5], [1.0] * 6, False, None),
        ([1.0] * 25, [1.0, *[math.inf] * 24], True, True),  # as fp16 does while it looks for its scale
        ([1.0] * 26, [1.0, *[math.inf] * 25], False, None),
    ],
)
def test_how_many_updates_may_be_skipped(
    losses: list[float], norms: list[float], ending: bool, good: bool | None, settings: Make
) -> None:
    log = Metrics(settings(), first_step=0, is_main=False)
    log.rows = [{"step": 7, "loss": loss, "grad_norm": norm} for loss, norm in zip(losses, norms, strict=True)]
    if good is None:
        refused(lambda: log.check_finite(ending), "NaN or inf.* step 7: lower learning_rate", LOSS_NOT_FINITE)
    else:
        assert log.check_finite(ending) == good


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_seconds_are_those_of_each_step_and_go_on_in_a_resumed_run(
    settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    (tmp_path / "lora").mkdir()
    for first_step, began in ((0, 1000.0), (3, 5000.0)):
        now = began
        log = Metrics(settings(), first_step, is_main=False)
        for step in range(first_step + 1, first_step + 4):
            now += step
            log.record(step, torch.tensor(0.5), 1e-4, torch.tensor(1.0))
        now += 60
        log.read(latest=True)
        log.write_rows()
    assert [float(row["seconds"]) for row in rows(tmp_path / "lora")] == [1, 3, 6, 10, 15, 21]


WATCHES = {
    "the progress bar": "tqdm.std.tqdm.refresh",
    "TensorBoard": "torch.utils.tensorboard.writer.SummaryWriter.add_scalar",
    "loss.png": "matplotlib.figure.Figure.savefig",
    "metrics.csv": "lace_lora.training.metrics.csv.writer",
}


@pytest.mark.parametrize("broken", WATCHES)
def test_what_only_watches_a_training_cannot_end_it_and_says_so_once(
    broken: str, settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError(f"a bug in {broken}")

    monkeypatch.setattr(WATCHES[broken], fail)
    (tmp_path / "lora").mkdir()
    log = Metrics(settings(report_to="tensorboard"), 0, is_main=True)
    for step in range(1, 5):
        log.record(step, torch.tensor(0.5), 1e-4, torch.tensor(1.0))
        log.read(latest=True)
        log.write_rows()
        log.draw_curve()
    log.close()
    assert [record.message for record in caplog.records] == [f"{broken} failed (a bug in {broken}): training goes on"]
    written = {path.name for path in (tmp_path / "lora").iterdir()}
    assert written == {"metrics.csv", "loss.png", "logs"} - {broken}


def test_packages_that_are_broken_are_a_warning_too(
    settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "lora").mkdir()
    for package in ("matplotlib.figure", "torch.utils.tensorboard.writer"):
        monkeypatch.setitem(sys.modules, package, None)  # importing it raises
    log = Metrics(settings(report_to="tensorboard"), 0, is_main=True)
    log.record(1, torch.tensor(0.5), 1e-4, torch.tensor(1.0))
    log.read(latest=True)
    log.write_rows()
    log.draw_curve()
    log.close()
    assert [record.message.partition(" failed")[0] for record in caplog.records] == ["TensorBoard", "loss.png"]
    assert len(rows(tmp_path / "lora")) == 1


def test_only_the_first_process_watches(settings: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = Metrics(settings(report_to="tensorboard"), 0, is_main=False)
    log.record(1, torch.tensor(0.5), 1e-4, torch.tensor(1.0))
    log.read(latest=True)
    log.close()
    assert not (tmp_path / "lora").exists()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("content", [None, b"", b"step,loss\n1,2\n", b"\xff\xfe\0", b'step,loss\n"' + b"x" * 200_000])
def test_a_resume_does_not_need_the_rows_of_before(content: bytes | None, settings: Make, tmp_path: Path) -> None:
    path = tmp_path / "lora" / "metrics.csv"
    path.parent.mkdir()
    path.mkdir() if content is None else path.write_bytes(content)
    log = Metrics(settings(), 1, is_main=False)
    log.record(2, torch.tensor(0.5), 1e-4, torch.tensor(1.0))
    log.read(latest=True)
    assert [row["step"] for row in log.rows] == [2]


def test_the_running_mean_is_not_biased_towards_its_start() -> None:
    mean = RunningMean()
    assert math.isnan(mean.add(math.nan))
    assert mean.add(0.5) == pytest.approx(0.5)
    assert mean.add(1.0) == pytest.approx(0.75, abs=0.01)
    for _ in range(10 * MEAN_OVER):
        settled = mean.add(1.0)
    assert settled == pytest.approx(1.0, abs=1e-4)
    assert mean.add(math.inf) == settled


@pytest.fixture
def log(settings: Make, tmp_path: Path) -> Iterator[Metrics]:
    (tmp_path / "lora").mkdir()
    every = {"validation_steps": 250, "checkpointing_steps": 250}
    log = Metrics(settings(report_to="tensorboard", max_train_steps=1000, **every), 0, is_main=True)
    yield log
    log.close()


def test_what_is_done_in_place_of_training_is_said(log: Metrics) -> None:
    with log.label("drawing samples"):
        assert log.bar.desc.startswith("drawing samples")
    assert log.bar.desc.startswith("training")


def test_a_stop_is_answered_at_once(log: Metrics, capfd: pytest.CaptureFixture[str]) -> None:
    log.bar.update(411)
    log.answer_stop()
    assert "stopping: saving step 412; press Ctrl-C again to leave now" in capfd.readouterr().err
    Metrics(Config(lora_output_dir=str(log.folder)), 0, is_main=False).answer_stop()  # of another process
    assert "stopping" not in capfd.readouterr().err


def test_the_time_left_is_that_of_steps_samples_and_checkpoints(log: Metrics, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    with log.label(SAMPLING):
        now += 15

    def train(first: int, last: int) -> str:
        nonlocal now
        for step in range(first, last + 1):
            now += 30 if step == 1 else 0.5  # the first compiles
            log.record(step, torch.tensor(0.5), 1e-4, torch.tensor(1.0))
            if step == 15:
                with log.label(SAMPLING):
                    now += 20
            if step % 10 == 0:
                log.read(latest=True)
        return str(log.bar.postfix)

    assert train(1, 10) == "mean loss 0.5000, lr 1.0e-04"
    # 980 steps of half a second; samples after 250, 500, 750 and 1000, like the last ones
    assert train(11, 20).startswith("10 min left, samples and saving included; 0.5 s a step, mean loss")
    assert train(21, 250).startswith("8 min left, ")
    with log.label(SAVING):
        now += 100
    # 740 steps, samples and checkpoints after 500, 750 and 1000
    assert train(251, 260).startswith("12 min left, ")
    log.writing = 200  # seconds; in the end, the last checkpoint is waited for, and the LoRA follows
    assert train(261, 270).startswith("17 min left, ")
    assert train(271, 1000) == "mean loss 0.5000, lr 1.0e-04"  # nothing to say when all steps are done


def test_tensorboard_gets_pictures_settings_and_the_mean_loss_under_the_runs_name(log: Metrics) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for step, loss in ((1, 0.5), (2, 1.0)):
        log.record(step, torch.tensor(loss), 1e-4, torch.tensor(1.0))
    log.read(latest=True)
    log.show_samples(Image.new("RGB", (60, 40), "white"), 2)
    log.close()
    [run] = (log.folder / "logs").iterdir()
    assert run.name == "myspecialstyle"
    events = EventAccumulator(str(run)).Reload()
    assert [event.step for event in events.Images("samples")] == [2]
    assert [event.value for event in events.Scalars("train/mean loss")] == pytest.approx([0.5, 0.75], abs=0.01)
    [text] = events.Tensors("settings/text_summary")
    assert b"max_train_steps: 1000" in text.tensor_proto.string_val[0]
