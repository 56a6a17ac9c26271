"""Measure training on this machine's GPU, next to diffusers' own script if its path is given, as a table in Markdown.

    python -m benchmarks.train [--script train_dreambooth_lora_sdxl.py] [--work FOLDER]

builds SDXL at its real shapes with random weights (speed and memory do not depend on them), makes 300 photos of 12
megapixels, and runs `main.py --mode train` on them as a user would. `--work` keeps both for the next run (14 GB). A
cold run has none of the caches of this program and Triton; files are in the page cache, and nothing is downloaded. The
total time of diffusers' script is extrapolated from 60 steps. Needs psutil, which is in requirements-dev.txt; the
script also needs torchvision.
"""

import argparse
import csv
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import accelerate
import diffusers
import numpy as np
import psutil
import torch
from PIL import Image
from PIL.Image import Resampling

from demo.making import build_model

ROOT = Path(__file__).parent.parent
PHOTOS, PHOTO_SIZE = 300, (4000, 3000)
GIB = 2**30
SCRIPT_STEPS = 60
# Runs a script as `python script.py` would, and prints the peak of its GPU memory.
WATCHED = (
    "import runpy, sys, torch; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__'); "
    f"print(torch.cuda.max_memory_allocated() / {GIB}, 'GiB of GPU memory')"
)


@dataclass
class Run:
    """Time and memory of one command."""

    seconds: float  # from the start of the command to its end
    step: float  # seconds per step, once it is under way
    gpu: float  # GiB that PyTorch had allocated at the peak
    host: float  # GiB of memory of all its processes at the peak, each page counted once (PSS)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", type=Path, help="diffusers' train_dreambooth_lora_sdxl.py")
    parser.add_argument("--work", type=Path, help="folder to keep model and photos in; empty: a temporary one")
    parser.add_argument("--photos", type=int, default=PHOTOS)
    parser.add_argument("--steps", type=int, default=1000, help="training steps of the longest runs, at least 60")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = options.work or Path(folder)
        prepare(work, options.photos)
        with tempfile.TemporaryDirectory(dir=work) as runs:
            measure(work, Path(runs), options.steps, options.script)
    return 0


def prepare(work: Path, photos: int) -> None:
    if not (work / "model" / "refiner").exists():
        build_model.build(work / "model", build_model.SDXL)
    (work / "photos").mkdir(exist_ok=True)
    with ProcessPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
        list(pool.map(make_photo, [work / "photos" / f"photo_{number:03d}.jpg" for number in range(photos)]))


def make_photo(path: Path) -> None:
    """A smooth picture with grain, of about 4 MB as a phone's."""
    if path.exists():
        return
    random = np.random.default_rng(int(path.stem.partition("_")[2]))
    few = random.integers(0, 256, (30, 40, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(few).resize(PHOTO_SIZE, Resampling.BICUBIC))
    grain = random.integers(-14, 15, (*smooth.shape[:2], 1), dtype=np.int8)
    Image.fromarray((smooth.astype(np.int16) + grain).clip(0, 255).astype(np.uint8)).save(path, quality=90)


def measure(work: Path, runs: Path, steps: int, script: Path | None) -> None:
    """Run everything and print the table."""
    print(f"{machine()}; rank 16, bf16, {PHOTOS} photos of 12 megapixels.\n")
    theirs = run_script(script, work, runs / "script") if script else None
    cold = run_ours(work, runs / "cold", "train_batch_size=2", f"max_train_steps={steps}")
    warm = run_ours(work, runs / "warm", "train_batch_size=2", f"max_train_steps={steps}")
    few = ["resolution=1024", "max_train_steps=60"]
    large = run_ours(work, runs / "large", "train_batch_size=4", *few)
    small = run_ours(work, runs / "small", "train_batch_size=1", "gradient_checkpointing=true", *few)
    saving = run_ours(work, runs / "saving", "train_batch_size=2", "gradient_checkpointing=true", "max_train_steps=60")
    about = f"about {theirs.seconds + (steps - SCRIPT_STEPS) * theirs.step:.0f} s" if theirs else ""
    rows = [
        ("step, 512², batch 2", theirs and f"{theirs.step * 1000:.0f} ms", f"{cold.step * 1000:.1f} ms"),
        ("step, 1024², batch 4", "", f"{large.step * 1000:.1f} ms"),
        (f"{steps} steps, 512², batch 2, from the command to the LoRA file", about, f"{cold.seconds:.0f} s"),
        ("the same with warm caches", "", f"{warm.seconds:.0f} s"),
        ("peak GPU memory, 512², batch 2", theirs and f"{theirs.gpu:.1f} GiB", f"{cold.gpu:.1f} GiB"),
        ("the same with checkpointing", "", f"{saving.gpu:.1f} GiB, {saving.step * 1000:.0f} ms a step"),
        ("1024², batch 1, with checkpointing", "", f"{small.gpu:.1f} GiB, {small.step * 1000:.0f} ms a step"),
        ("peak host memory", theirs and f"{theirs.host:.1f} GiB", f"{cold.host:.1f} GiB"),
    ]
    print("| measurement | diffusers' script | this program |\n|---|---|---|")
    for name, other, ours in rows:
        print(f"| {name} | {other or ''} | {ours} |")


def machine() -> str:
    devices = f"{torch.cuda.get_device_name()}, {len(os.sched_getaffinity(0))} CPU cores"
    versions = f"torch {torch.__version__}, diffusers {diffusers.__version__}, accelerate {accelerate.__version__}"
    return f"{devices}, Python {platform.python_version()}, {versions}"


def run_ours(work: Path, folder: Path, *overrides: str) -> Run:
    """`main.py --mode train`, with all caches in folders beside this run's."""
    command = [
        sys.executable, str(ROOT / "main.py"), "--mode", "train", f"pretrained_model={work / 'model' / 'base'}",
        f"images_dir={work / 'photos'}", f"lora_output_dir={folder}", "mixed_precision=bf16", "variant=",
        "validation_steps=0", "report_to=none", *overrides,
    ]  # fmt: skip
    caches = {"XDG_CACHE_HOME": str(folder.parent / "cache"), "TRITON_CACHE_DIR": str(folder.parent / "triton")}
    run = watch(command, caches)
    with open(folder / "metrics.csv", newline="") as file:
        at = {int(row["step"]): float(row["seconds"]) for row in csv.DictReader(file)}
    first, last = (60, 160) if len(at) > 200 else (len(at) // 2 - 5, len(at) - 5)
    run.step = (at[last] - at[first]) / (last - first)
    print(folder.name, run, file=sys.stderr, flush=True)
    return run


def run_script(script: Path, work: Path, folder: Path) -> Run:
    """diffusers' script with the same settings, and otherwise its own defaults."""
    options = [
        f"--pretrained_model_name_or_path={work / 'model' / 'base'}", f"--instance_data_dir={work / 'photos'}",
        "--instance_prompt=a photo of <myspecialstyle>", f"--output_dir={folder}", "--resolution=512", "--rank=16",
        "--train_batch_size=2", "--mixed_precision=bf16", f"--max_train_steps={SCRIPT_STEPS}", "--seed=42",
    ]  # fmt: skip
    return watch([sys.executable, "-c", WATCHED, str(script), *options])


def watch(command: list[str], environment: dict[str, str] | None = None) -> Run:
    """Run a command to its end; the time of a step is read from its progress bar.

    Raises:
        SystemExit: it failed.
    """
    began = time.monotonic()
    process = psutil.Popen(
        command, cwd=ROOT, env=os.environ | (environment or {}), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    peak = [0.0]
    watcher = threading.Thread(target=note_memory, args=(process, peak))
    watcher.start()
    output, reached = "", dict[int, float]()
    while part := os.read(process.stdout.fileno(), 65536):
        output += part.decode(errors="replace")
        for step in re.findall(r"Steps: .*?(\d+)/\d+ \[", output[-2000:]):
            reached.setdefault(int(step), time.monotonic())
    if process.wait():
        raise SystemExit(f"{' '.join(command)}\nfailed:\n{output[-3000:]}")
    watcher.join()
    gpu = re.findall(r"([\d.]+) GiB of GPU memory", output)
    steps = sorted(step for step in reached if step >= SCRIPT_STEPS // 4)
    step = (reached[steps[-1]] - reached[steps[0]]) / (steps[-1] - steps[0]) if len(steps) > 1 else 0.0
    if printed := re.findall(r"Seconds a step: ([\d.]+)", output):
        step = min(map(float, printed))
    return Run(time.monotonic() - began, step, float(gpu[-1]) if gpu else 0.0, peak[0])


def note_memory(process: psutil.Popen, peak: list[float]) -> None:
    with suppress(psutil.NoSuchProcess):
        while process.status() != psutil.STATUS_ZOMBIE:
            total = 0
            for member in [process, *process.children(recursive=True)]:
                with suppress(psutil.Error):  # it has just ended
                    total += member.memory_full_info().pss
            peak[0] = max(peak[0], total / GIB)
            time.sleep(0.2)


if __name__ == "__main__":
    sys.exit(main())
