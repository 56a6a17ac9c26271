"""Loss, learning rate and gradient norm by step: metrics.csv, TensorBoard, loss.png and the progress bar."""

import csv
import io
import logging
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lace_lora.config import Config, dump_config
from lace_lora.errors import LOSS_NOT_FINITE, UserError, first_line
from lace_lora.files import write_atomically
from lace_lora.pictures.recipe import TEXT
from lace_lora.progress import Progress, duration, shows_bars

COLUMNS = ("step", "loss", "learning_rate", "grad_norm", "seconds")
VALIDATION = "validation_loss"  # a column with a value in some steps only
# This many updates skipped in a row, because one of these is not finite, end the training. fp16 starts with a
# few overflows of the gradients, until the loss scale fits.
MAX_SKIPPED = {"loss": 5, "grad_norm": 25}
READ_EVERY = 10  # steps between readings of the loss: each costs the CPU a little
# What the progress bar says.
TRAINING, SAMPLING, SAVING, VALIDATING = "training", "drawing samples", "saving", "validating"
MEAN_OVER = 50  # steps, about, of which the running mean of the loss is

_CAPTION = (
    "Each step trains at random noise levels, so its loss says little, and the mean falls only a little.\n"
    "A mean that rises, or jumps: the learning rate is too high."
)
_TOO_FEW = "So few steps say nothing: each trains at random noise levels."
_HELD_OUT = "Where the loss on held-out pictures rises again, single photos are learnt rather than their style."
_SEE_SAMPLES = "How good the pictures are, samples.png shows."

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


class RunningMean:
    """An exponential mean without the bias towards where it starts, as Adam's. Kingma & Ba 2015, section 3."""

    def __init__(self) -> None:
        self.sum = self.weights = 0.0

    def add(self, value: float) -> float:
        """The mean with one more value; infinity and NaN are left out."""
        if math.isfinite(value):
            self.sum += (value - self.sum) / MEAN_OVER
            self.weights += (1 - self.weights) / MEAN_OVER
        return self.sum / self.weights if self.weights else math.nan


class Metrics:
    """Collects one row per step; the first process shows and writes them, and what fails of that is a warning.

    metrics.csv is rewritten and renamed with every checkpoint: appended lines may never reach Google Drive, and rows
    after the last checkpoint would be duplicated by a resume.
    """

    def __init__(self, config: Config, first_step: int, is_main: bool) -> None:
        self.folder, self.learning_rate = Path(config.lora_output_dir), config.learning_rate
        self.rows, self.validation = _read_rows(self.folder / "metrics.csv", before=first_step)
        self.pending: list[tuple[int, float, float, PendingScalars]] = []
        self.started = time.monotonic() - (self.rows[-1]["seconds"] if self.rows else 0)
        self.mean = RunningMean()
        for row in self.rows:
            self.mean.add(row["loss"])
        self.failed: set[str] = set()
        self.config = config
        self.others: dict[str, float] = {}  # seconds of what was done last in place of training, by its label
        self.in_others = 0.0  # seconds of all of that
        self.writing = 0.0  # seconds in which the last checkpoint was written, beside the training
        self.first_reading: tuple[int, float] | None = None  # step and seconds
        self.bar = Progress(disable=True)
        self.writer: Any = None
        if is_main:
            with self._only_warn("the progress bar"):
                self.bar = Progress(
                    total=config.max_train_steps, initial=first_step, desc=TRAINING, unit="step", timed=False
                )
        if is_main and config.report_to == "tensorboard":
            with self._only_warn("TensorBoard"):
                from torch.utils.tensorboard.writer import SummaryWriter

                # purge_step: drops points after the step that a run resumes from.
                folder = self.folder / "logs" / config.lora_name  # the last part is the run's name
                self.writer = SummaryWriter(str(folder), purge_step=first_step or None)
                self.writer.add_text("settings", "```yaml\n" + dump_config(config) + "```", first_step)

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

    def record_validation(self, step: int, loss: float) -> None:
        """Record the loss on held-out pictures; step 0 is before training."""
        self.validation[step] = loss
        if self.writer:
            with self._only_warn("TensorBoard"):
                self.writer.add_scalar(f"train/{VALIDATION}", loss, step)

    def read(self, latest: bool) -> None:
        """Read pending losses and norms into `rows` and show the last; without `latest`, leave the newest pending."""
        ready = self.pending if latest else self.pending[:-1] or self.pending
        self.pending = self.pending[len(ready) :]
        for step, learning_rate, seconds, numbers in ready:
            loss, grad_norm = numbers.read()
            row = dict(zip(COLUMNS, (step, loss, learning_rate, grad_norm, seconds), strict=True))
            self.rows.append(row)
            mean = self.mean.add(loss)
            if self.writer and "TensorBoard" not in self.failed:
                with self._only_warn("TensorBoard"):
                    for name in COLUMNS[1:4]:
                        self.writer.add_scalar(f"train/{name}", row[name], step)
                    self.writer.add_scalar("train/mean loss", mean, step)
        with self._only_warn("the progress bar"):
            time_left = self._time_left(step)
            self.bar.set_postfix_str(f"{time_left}mean loss {mean:.4f}, lr {learning_rate:.1e}", refresh=False)

    def _time_left(self, step: int) -> str:
        """How long the rest takes, once the steps after the first reading say it: with samples and checkpoints."""
        now = time.monotonic() - self.in_others
        if not self.first_reading:
            self.first_reading = step, now
            return ""
        last, every = self.config.max_train_steps, self.config.validation_steps
        if step == last:
            return ""
        per_step = (now - self.first_reading[1]) / (step - self.first_reading[0])
        seconds = (last - step) * per_step
        if every:
            seconds += _rounds(step, last, every) * self.others.get(SAMPLING, 0.0)
            # This step's, if there is one, is over.
            seconds += _rounds(step + 1, last, every) * self.others.get(VALIDATING, 0.0)
        seconds += _rounds(step, last, self.config.checkpointing_steps) * self.others.get(SAVING, 0.0)
        # In the end the last checkpoint is waited for, and then the LoRA written twice, which is half as much.
        seconds += 1.5 * self.writing
        return f"{duration(seconds)} left, samples and saving included; {per_step:.3g} s a step, "

    @contextmanager
    def label(self, what: str) -> Iterator[None]:
        """Say on the progress bar what is done in place of training."""
        with self._only_warn("the progress bar"):
            self.bar.set_description_str(what)
        began = time.monotonic()
        try:
            yield
        finally:
            self.others[what] = time.monotonic() - began
            self.in_others += self.others[what]
            with self._only_warn("the progress bar"):
                self.bar.set_description_str(TRAINING, refresh=False)

    def answer_stop(self) -> None:
        """Say at once what a stop does: the step that is under way is finished and saved. For a signal handler."""
        if self.bar.disable:
            return
        step = min(int(self.bar.n) + 1, self.config.max_train_steps)
        text = f"stopping: saving step {step}; press Ctrl-C again to leave now, without saving\n"
        with suppress(OSError):  # not sys.stderr, which may be in the middle of writing
            os.write(2, (("\n" if shows_bars() else "") + text).encode())

    def show_samples(self, picture: Image.Image | None, step: int) -> None:
        """Pass the sample strip to TensorBoard."""
        if self.writer and picture:
            with self._only_warn("TensorBoard"):
                self.writer.add_image("samples", np.asarray(picture), step, dataformats="HWC")

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
            names = (*COLUMNS[1:-1], VALIDATION, COLUMNS[-1])
            writer.writerow([COLUMNS[0], *names])
            rows: dict[int, dict[str, float]] = {int(row["step"]): row for row in self.rows}
            for step, loss in self.validation.items():
                rows[step] = rows.get(step, {}) | {VALIDATION: loss}
            for step, row in sorted(rows.items()):
                writer.writerow([step, *(f"{row[name]:.6g}" if name in row else "" for name in names)])
            write_atomically(self.folder / "metrics.csv", text.getvalue().encode())

    def draw_curve(self) -> None:
        """Write loss.png, and what TensorBoard has so far."""
        with self._only_warn("loss.png"):
            content = _plot(self.rows, self.config.validation_steps > 0, self.validation)
            write_atomically(self.folder / "loss.png", content)
        if self.writer:
            with self._only_warn("TensorBoard"):
                self.writer.flush()

    def close(self) -> None:
        with self._only_warn("the progress bar"):
            self.bar.close()
        if self.writer:
            with self._only_warn("TensorBoard"):
                self.writer.close()


def _rounds(step: int, last: int, every: int) -> int:
    """How often what is done every so many steps, and after the last one, is still to come, `step` included."""
    return math.ceil(last / every) - (step - 1) // every


def _read_rows(path: Path, before: int) -> tuple[list[dict[str, float]], dict[int, float]]:
    """Rows and validation losses of an earlier run up to the step that this one resumes from."""
    if not before or not path.exists():
        return [], {}
    try:
        with open(path, newline="") as file:
            read = [row for row in csv.DictReader(file) if float(row["step"]) <= before]
        validation = {int(row["step"]): float(row[VALIDATION]) for row in read if row.get(VALIDATION)}
        rows = [{name: float(row[name]) for name in COLUMNS} for row in read if float(row["step"])]
    except (OSError, ValueError, KeyError, TypeError, csv.Error):
        logger.warning("%s cannot be read or is damaged: the loss curve starts at the step resumed from", path)
        return [], {}
    return [row | {"step": int(row["step"])} for row in rows], validation


def _plot(rows: list[dict[str, float]], has_samples: bool, validation: dict[int, float]) -> bytes:
    """The loss by step as a PNG: of single steps, faint because noisy, their running mean, and on held-out pictures."""
    os.environ["MPLBACKEND"] = "agg"  # a notebook's, which may be set, need not be installed here
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 7 if validation else 4.5), layout="constrained")
    axes, *below = figure.subplots(2 if validation else 1, sharex=True, squeeze=False)[:, 0]
    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    mean = RunningMean()
    smooth = [mean.add(loss) for loss in losses]
    settled = min(MEAN_OVER, len(rows)) // 2  # before, it is the mean of a few steps
    axes.plot(steps, losses, color="0.8", linewidth=0.8, label="each step")
    axes.plot(steps[settled:], smooth[settled:], color="tab:blue", label=f"mean of about {MEAN_OVER} steps")
    axes.set(xlabel="step", ylabel="loss", title="Training loss")
    for held_out in below:  # on a scale of its own, since it changes by a few percent
        held_out.plot(*zip(*sorted(validation.items()), strict=True), "o-", color="tab:orange")
        held_out.set(xlabel="step", ylabel="loss", title="Loss on held-out pictures")
    caption = _CAPTION if len(rows) > 2 * MEAN_OVER else _TOO_FEW
    lines = [caption, *[_HELD_OUT] * len(below), *[_SEE_SAMPLES] * has_samples]
    figure.supxlabel("\n".join(lines), fontsize="small")
    axes.legend()
    image = io.BytesIO()
    # With the text, nobody trains on it by mistake.
    figure.savefig(image, format="png", dpi=120, metadata={TEXT: "loss"})
    return image.getvalue()
