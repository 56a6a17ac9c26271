"""What this machine has: its GPU, without importing torch. It needs nothing installed: the notebook asks it first."""

import csv
import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from lace_lora.errors import UserError

# The oldest major version of NVIDIA's driver for one of CUDA: docs.nvidia.com/deploy/cuda-compatibility.
_OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}


@dataclass(frozen=True)
class Gpu:
    name: str
    total: float  # GiB
    free: float  # GiB
    has_bf16: bool
    driver: int = 0  # its major version

    def dtype(self, mixed_precision: str) -> str:
        """The dtype of the frozen model, by accelerate's name, as `models.pick_dtype` picks it."""
        return mixed_precision if mixed_precision != "auto" else "bf16" if self.has_bf16 else "fp16"


@cache  # nvidia-smi takes up to a second
def find_gpu() -> Gpu | None:
    """The first NVIDIA GPU that programs may use, as `nvidia-smi` reports it; None if it reports none, or a MIG slice.

    Of GPUs of different kinds, CUDA may count another one as the first: the fastest, unless CUDA_DEVICE_ORDER is set.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    first = (visible or "").partition(",")[0].strip()
    if visible is not None and first in ("", "-1"):
        return None
    query = "--query-gpu=name,memory.total,memory.free,compute_cap,driver_version,mig.mode.current"
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits", *([f"--id={first}"] if first else [])]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
        name, total, free, capability, driver, mig = next(csv.reader(output.splitlines(), skipinitialspace=True))
        if mig == "Enabled":  # total and free are those of the whole card
            return None
        return Gpu(name, float(total) / 1024, float(free) / 1024, float(capability) >= 8, int(driver.partition(".")[0]))
    except (OSError, ValueError, StopIteration, subprocess.SubprocessError):
        return None


def require_gpu(on_cpu: str) -> None:
    """Stop before anything is downloaded for work that takes too long on a CPU; `on_cpu` says how long.

    Raises:
        UserError: PyTorch has no GPU to use.
    """
    if _has_apple_gpu():
        return
    gpu, built_for = find_gpu(), _pytorch_built_for()
    is_cpu_build, cuda = built_for == {}, (built_for or {}).get("cuda", 0)
    fits = gpu is not None and gpu.driver >= _OLDEST_DRIVER.get(cuda, 0)
    if not is_cpu_build and (fits or _pytorch_has_gpu()):
        return
    if gpu is None:
        reason, advice = "no GPU was found", "use Colab (lace_lora.ipynb), or see the demo (`make demo`)"
    elif is_cpu_build:
        reason = f"PyTorch is installed in its build for CPUs, which cannot use the {gpu.name}"
        advice = "install the build for CUDA (pytorch.org, Get Started)"
    else:
        reason = f"the {gpu.name} has driver {gpu.driver}, too old for PyTorch's CUDA {cuda}"
        advice = f"update the driver to {_OLDEST_DRIVER[cuda]} or later"
    raise UserError(f"{reason}, and {on_cpu}: {advice}, or set device: cpu to run it all the same")


def _pytorch_built_for() -> dict[str, int] | None:
    """What PyTorch is built for besides CPUs, with major versions, such as {"cuda": 13}; None if that is not known."""
    try:
        text = Path(str(distribution("torch").locate_file("torch/version.py"))).read_text()
    except (PackageNotFoundError, OSError):
        return None
    return {name: int(major) for name, major in re.findall(r"^(cuda|hip|xpu)\b.*= *'(\d+)", text, re.MULTILINE)}


def _pytorch_has_gpu() -> bool:
    """Whether PyTorch itself finds a GPU, in a process of its own, since importing it takes seconds.

    It finds those that `nvidia-smi` does not know, or not by that name: AMD's, MIG slices, and some in containers.
    """
    command = [sys.executable, "-P", "-c", "import sys, torch; sys.exit(not torch.cuda.is_available())"]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True).returncode == 0


def _has_apple_gpu() -> bool:
    return platform.system() == "Darwin" and platform.machine() == "arm64"
