"""How the training process is started: its job, the command, and accelerate's settings file."""

import argparse
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from lace_lora.config import ORIGINAL_SIZE, Config, load_config
from lace_lora.errors import UserError, first_line
from lace_lora.files import hold_shared_lock
from lace_lora.process import StopSignal, report_outcome

# accelerate's file for one process on any device; train_lora.py chooses the precision itself.
ACCELERATE_SETTINGS = """\
compute_environment: LOCAL_MACHINE
distributed_type: "NO"
mixed_precision: "no"
num_machines: 1
num_processes: 1
machine_rank: 0
use_cpu: false
"""


@dataclass(frozen=True)
class Job:
    """What the training process needs besides the settings, as JSON in a file."""

    captions: dict[str, str] = field(default_factory=dict)  # by picture file
    contents: dict[str, str] = field(default_factory=dict)  # SHA-256 of each picture file, held out or not
    fingerprint: dict[str, Any] = field(default_factory=dict)  # see resuming.run_fingerprint
    resume: str | None = None  # the checkpoint to resume from
    models: dict[str, Any] = field(default_factory=dict)  # settings that name models, as paths
    origin: str | None = None  # of the named checkpoint that the run began at, see checkpoint.origin_of
    started: float = field(default_factory=time.time)  # when train.py wrote it, in seconds since 1970
    class_pictures: dict[str, str] = field(default_factory=dict)  # SHA-256 of those that exist
    class_to_draw: dict[str, int] = field(default_factory=dict)  # each with the number that gives its seed
    original_size: int | None = None  # median shorter side of the pictures
    held_out: dict[str, str] = field(default_factory=dict)  # captions of pictures that are never trained on, by file
    views: dict[str, int] = field(default_factory=dict)  # how many each picture file has; one if it is not there
    to_caption: dict[str, str] = field(default_factory=dict)  # for write_captions: each picture's caption file

    @property
    def metadata(self) -> dict[str, str]:
        """Of every LoRA that this training saves."""
        return {ORIGINAL_SIZE: str(self.original_size)} if self.original_size else {}


def check_packages(config: Config) -> None:
    """Raises UserError: a package that this training needs is not installed. None is imported, since that is slow."""
    needed = dict.fromkeys(("torch", "diffusers", "transformers", "accelerate", "peft", "matplotlib"), "")
    if config.report_to == "tensorboard":
        needed["tensorboard"] = ", or set report_to: none"
    if config.optimizer == "prodigy":
        needed["prodigyopt"] = ", or set optimizer: adamw"
    if config.attention == "xformers":
        needed["xformers"] = ", or set attention: auto"
    for package, otherwise in needed.items():
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{package} is not installed: run `pip install {package}`{otherwise}")


def run_job(description: str, run: Callable[[Config, Job, Path, StopSignal], str]) -> int:
    """The main function of a script that accelerate runs; returns its exit code.

    `run` gets the settings, with models as paths, the job and the folder that it is in, and returns the closing line.
    """
    parser = argparse.ArgumentParser(description=f"{description}; launched by `main.py --mode train`.")
    parser.add_argument("--config", required=True, type=Path, help="resolved settings")
    parser.add_argument("--job", required=True, type=Path, help="written by train.py: captions, models, checkpoint")
    arguments = parser.parse_args()

    def work(stop: StopSignal) -> str:
        job = Job(**json.loads(arguments.job.read_text()))
        config = replace(load_config(arguments.config), **job.models)
        hold_shared_lock(Path(config.lora_output_dir))
        return run(config, job, arguments.job.parent, stop)

    return report_outcome(work, arguments.job.parent)


def build_command(config: Config, accelerate_file: Path, job_file: Path) -> list[str]:
    """The full launch command. accelerate always gets a config file: one cached on the machine would override flags."""
    threads = os.environ.get("OMP_NUM_THREADS", "")  # as accelerate and PyTorch do
    if not threads.isdecimal() or not int(threads):  # each process gets its share of the CPUs
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = str(max(1, cpus // _processes_here(_accelerate_settings(config))))
    ours = [str(Path(__file__).resolve().parents[2] / "train_lora.py")]
    return [
        sys.executable, "-m", "lace_lora.process",
        "--config_file", config.accelerate_config or str(accelerate_file),
        "--num_cpu_threads_per_process", threads,  # accelerate's default is 1
        "--quiet",  # no traceback of the launcher's: the outcome file says why a training failed
        *(["--module", "lace_lora.training.run_diffusers_script"] if config.train_script else ours),
        "--config", str(Path(config.lora_output_dir) / "config.yaml"),
        "--job", str(job_file),
    ]  # fmt: skip


def captions_command(config_file: Path, job_file: Path) -> list[str]:
    """The command that writes captions: one process, however many train."""
    module = "lace_lora.training.write_captions"
    return [sys.executable, "-m", module, "--config", str(config_file), "--job", str(job_file)]


def processes(config: Config) -> int:
    """How many processes train together, on all machines; each takes a batch of its own in every step."""
    return int(_accelerate_settings(config).get("num_processes") or 1)


def _accelerate_settings(config: Config) -> dict[str, Any]:
    return yaml.safe_load(Path(config.accelerate_config).read_text()) if config.accelerate_config else {}


def _processes_here(settings: dict[str, Any]) -> int:
    return max(1, int(settings.get("num_processes") or 1) // int(settings.get("num_machines") or 1))


def check_accelerate_config(path: Path) -> None:
    """Raises UserError: the file is missing, or uses DeepSpeed, FSDP or MPI."""
    try:
        settings = yaml.safe_load(path.read_text())
        kind = str(settings.get("distributed_type", "NO")).upper()
        _processes_here(settings)
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise UserError(f"accelerate_config: {path} is not an accelerate config file ({first_line(error)})") from error
    if kind in ("DEEPSPEED", "FSDP") or settings.get("deepspeed_config") or settings.get("fsdp_config"):
        raise UserError(f"accelerate_config: {path} uses DeepSpeed or FSDP: set distributed_type: MULTI_GPU")
    if settings.get("mpirun_config"):
        raise UserError(f"accelerate_config: {path} uses MPI, which is not supported: remove mpirun_config")
