"""Loss, learning rate and gradient norm by step: metrics.csv, TensorBoard, loss.png and the progress bar."""

import csv
import io
import logging
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lace_lora.config import Config
from lace_lora.errors import LOSS_NOT_FINITE, UserError, first_line
from lace_lora.files import write_atomically
from lace_lora.pictures.recipe import TEXT

COLUMNS = ("step", "loss", "learning_rate", "grad_norm", "seconds")
# This many updates skipped in a row, because one of these is not finite, end the training. fp16 starts with a
# few overflows of the gradients, until the loss scale fits.
MAX_SKIPPED = {"loss": 5, "grad_norm": 25}
READ_EVERY = 10  # steps between readings of the loss: each costs the CPU a little

logger = logging.getLogger("train_lora")


class PendingScalars:
    """Scalars that a GPU may still be calculating; their copy to the CPU is asynchronous, only `read` waits for it."""

    def __init__(self, *values: Tensor) -> None:
        stacked = torch.stack([value.detach().float() for value in values])
        self.numbers = stacked.to("cpu", non_blocking=stacked.is_cuda)
        self.arrived = torch.cuda.Event() if stacked.is_cuda else None
        if self.arrived:
            self.arrived.record()

    def read(self) -> list[float]:
        if self.arrived:
            self.arrived.synchronize()
        return self.numbers.tolist()


class Metrics:
    """Collects one row per step; the first process shows and writes them, and what fails of that is a warning.

    metrics.csv is rewritten and renamed with every checkpoint: appended lines may never reach Google Drive, and rows
    after the last checkpoint would be duplicated by a resume.
    """

    def __init__(self, config: Config, first_step: int, is_main: bool) -> None:
        self.folder, self.learning_rate = Path(config.lora_output_dir), config.learning_rate
        self.rows = _read_rows(self.folder / "metrics.csv", before=first_step)
        self.pending: list[tuple[int, float, float, PendingScalars]] = []
        self.started = time.monotonic() - (self.rows[-1]["seconds"] if self.rows else 0)
        self.failed: set[str] = set()
        self.bar = tqdm(disable=True)
        self.writer: Any = None
        if is_main:
            with self._only_warn("the progress bar"):
                self.bar = tqdm(total=config.max_train_steps, initial=first_step, desc="training", unit="step")
        if is_main and config.report_to == "tensorboard":
            with self._only_warn("TensorBoard"):
                from torch.utils.tensorboard.writer import SummaryWriter

                # purge_step: drops points after the step that a run resumes from.
                self.writer = SummaryWriter(str(self.folder / "logs"), purge_step=first_step or None)

    @contextmanager
    def _only_warn(self, what: str) -> Iterator[None]:
        """Training goes on without what only watches it; a warning says so the first time."""
        try:
            yield
        except (Exception, SystemExit) as error:
            if what not in self.failed:
                logger.warning("%s failed (%s): training goes on", what, first_line(error))
            self.failed.add(what)

    def record(self, step: int, loss: Tensor, learning_rate: float, grad_norm: Tensor) -> None:
        """Record one step, counted from 1, and the time; loss and norm may still be pending."""
        seconds = time.monotonic() - self.started
        self.pending.append((step, learning_rate, seconds, PendingScalars(loss, grad_norm)))
        with self._only_warn("the progress bar"):
            self.bar.update()

    def read(self, latest: bool) -> None:
        """Read pending losses and norms into `rows` and show the last; without `latest`, leave the newest pending."""
        ready = self.pending if latest else self.pending[:-1] or self.pending
        self.pending = self.pending[len(ready) :]
        for step, learning_rate, seconds, numbers in ready:
            loss, grad_norm = numbers.read()
            row = dict(zip(COLUMNS, (step, loss, learning_rate, grad_norm, seconds), strict=True))
            self.rows.append(row)
            if self.writer and "TensorBoard" not in self.failed:
                with self._only_warn("TensorBoard"):
                    for name in COLUMNS[1:4]:
                        self.writer.add_scalar(f"train/{name}", row[name], step)
        with self._only_warn("the progress bar"):
            self.bar.set_postfix(loss=f"{loss:.4f}", lr=f"{learning_rate:.1e}")

    def check_finite(self, ending: bool) -> bool:
        """Whether the weights may be saved: the last loss is a finite number, or the run is ending.

        Raises:
            UserError: too many in a row are not (exit 5).
        """
        for column, maximum in MAX_SKIPPED.items():
            skipped = 0  # in a row
            for row in self.rows:
                skipped = 0 if math.isfinite(row[column]) else skipped + 1
                if skipped == maximum:
                    raise UserError(
                        "the loss or its gradients are not finite (NaN or inf) in several steps up to step "
                        f"{self.rows[-1]['step']}: lower learning_rate ({self.learning_rate:g}) or, if training in "
                        "fp16, set mixed_precision: bf16 or no, then run the same command again",
                        LOSS_NOT_FINITE,
                    )
        return ending or math.isfinite(self.rows[-1]["loss"])

    def write_rows(self) -> None:
        """Write metrics.csv. Before the checkpoint, so that a resume from that finds its rows."""
        with self._only_warn("metrics.csv"):
            text = io.StringIO()
            writer = csv.writer(text, lineterminator="\n")
            writer.writerow(COLUMNS)
            writer.writerows([row["step"], *(f"{row[name]:.6g}" for name in COLUMNS[1:])] for row in self.rows)
            write_atomically(self.folder / "metrics.csv", text.getvalue().encode())

    def draw_curve(self) -> None:
        """Write loss.png, and what TensorBoard has so far."""
        with self._only_warn("loss.png"):
            write_atomically(self.folder / "loss.png", _plot(self.rows))
        if self.writer:
            with self._only_warn("TensorBoard"):
                self.writer.flush()

    def close(self) -> None:
        with self._only_warn("the progress bar"):
            self.bar.close()
        if self.writer:
            with self._only_warn("TensorBoard"):
                self.writer.close()


def _read_rows(path: Path, before: int) -> list[dict[str, float]]:
    """Rows of an earlier run up to the step that this one resumes from."""
    if not before or not path.exists():
        return []
    try:
        with open(path, newline="") as file:
            rows = [{name: float(row[name]) for name in COLUMNS} for row in csv.DictReader(file)]
    except (OSError, ValueError, KeyError, TypeError, csv.Error):
        logger.warning("%s cannot be read or is damaged: the loss curve starts at the step resumed from", path)
        return []
    return [row | {"step": int(row["step"])} for row in rows if row["step"] <= before]


def _plot(rows: list[dict[str, float]]) -> bytes:
    """The loss by step as a PNG: single steps faint, because they are noisy, and their running mean."""
    os.environ["MPLBACKEND"] = "agg"  # a notebook's, which may be set, need not be installed here
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    smooth, mean = [], next(filter(math.isfinite, losses), 0.0)
    weight = max(0.02, 2 / (len(losses) + 1))
    for loss in losses:
        mean += weight * (loss - mean) if math.isfinite(loss) else 0
        smooth.append(mean)
    axes.plot(steps, losses, color="0.8", linewidth=0.8, label="each step")
    axes.plot(steps, smooth, color="tab:blue", label="running mean")
    axes.set(xlabel="step", ylabel="loss", title="Training loss")
    axes.legend()
    image = io.BytesIO()
    # With the text, nobody trains on it by mistake.
    figure.savefig(image, format="png", dpi=120, metadata={TEXT: "loss"})
    return image.getvalue()
