"""What this machine has: its GPU, without importing torch. It needs nothing installed: the notebook asks it first."""

import csv
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from lace_lora.errors import UserError


@dataclass(frozen=True)
class Gpu:
    name: str
    total: float  # GiB
    free: float  # GiB
    has_bf16: bool

    def dtype(self, mixed_precision: str) -> str:
        """The dtype of the frozen model, by accelerate's name, as `models.pick_dtype` picks it."""
        return mixed_precision if mixed_precision != "auto" else "bf16" if self.has_bf16 else "fp16"


def find_gpu() -> Gpu | None:
    """The first NVIDIA GPU that programs may use, as its driver reports it; None if there is none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return None
    query = "--query-gpu=name,memory.total,memory.free,compute_cap"
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits", *([f"--id={visible}"] if visible else [])]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
        name, total, free, capability = next(csv.reader(output.splitlines(), skipinitialspace=True))
        return Gpu(name, float(total) / 1024, float(free) / 1024, float(capability) >= 8)
    except (OSError, ValueError, StopIteration, subprocess.SubprocessError):
        return None


def require_gpu(on_cpu: str) -> None:
    """Stop before anything is downloaded for work that takes too long on a CPU; `on_cpu` says how long.

    Raises:
        UserError: PyTorch has no GPU to use.
    """
    if _has_apple_gpu():
        return
    gpu = find_gpu()
    if gpu is None and not _is_cpu_build() and _pytorch_has_gpu():
        return
    if gpu is None:
        reason, advice = "no GPU was found", "use Colab (lace_lora.ipynb), or see the demo (`make demo`)"
    elif _is_cpu_build():
        reason = f"PyTorch is installed in its build for CPUs, which cannot use the {gpu.name}"
        advice = "install the build for CUDA (pytorch.org, Get Started)"
    else:
        return
    raise UserError(f"{reason}, and {on_cpu}: {advice}, or set device: cpu to run it all the same")


def _is_cpu_build() -> bool:
    try:
        return version("torch").endswith("+cpu")
    except PackageNotFoundError:
        return False


def _pytorch_has_gpu() -> bool:
    """Whether PyTorch itself finds a GPU, in a process of its own, since importing it takes seconds.

    It finds those that `nvidia-smi` does not know, or not by that name: AMD's, MIG slices, and some in containers.
    """
    command = [sys.executable, "-P", "-c", "import sys, torch; sys.exit(not torch.cuda.is_available())"]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True).returncode == 0


def _has_apple_gpu() -> bool:
    return platform.system() == "Darwin" and platform.machine() == "arm64"
