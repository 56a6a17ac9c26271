"""How accelerate is launched: the command, its settings file, and what stands in for its own launcher.

Run as a script this is accelerate's launcher, silent where the training process tells the reason itself: a SIGINT, or a
training process that failed or was stopped, would end it with a traceback or two of its own.
"""

import logging
import os
import runpy
import signal
import sys
from pathlib import Path

import yaml

from config import Config, UserError
from supervise import LAUNCHER_PID

LAUNCHER = Path(__file__)
# What accelerate runs: ours, or what takes the user's `train_script` through.
TRAINING_SCRIPT, SCRIPT_RUNNER = (LAUNCHER.with_name(name) for name in ("train_lora.py", "foreign_script.py"))


def build_command(config: Config, accelerate_file: Path, job_file: Path) -> list[str]:
    """The whole launch. accelerate gets a file, the user's or ours: one cached on the machine would win over flags."""
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, threads // _processes_here(config.accelerate_config))
    return [
        sys.executable, str(LAUNCHER),
        "--config_file", config.accelerate_config or str(accelerate_file),
        "--num_cpu_threads_per_process", str(threads),  # its own default is one
        "--quiet",  # the reason of a failure is told by us, once
        str(SCRIPT_RUNNER if config.train_script else TRAINING_SCRIPT),
        "--config", str(Path(config.lora_output_dir) / "config.yaml"),
        "--job", str(job_file),
    ]  # fmt: skip


def _processes_here(accelerate_config: str | None) -> int:
    settings = yaml.safe_load(Path(accelerate_config).read_text()) if accelerate_config else {}
    return max(1, int(settings.get("num_processes") or 1) // int(settings.get("num_machines") or 1))


def accelerate_settings() -> str:
    """accelerate's file for one process on whatever this machine has; precision is train_lora.py's own matter."""
    settings = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "NO",
        "mixed_precision": "no",
        "num_machines": 1,
        "num_processes": 1,
        "machine_rank": 0,
        "use_cpu": False,
    }
    return yaml.safe_dump(settings)


def check_accelerate_config(path: Path) -> None:
    """
    Raises:
        UserError: the file is missing, or asks for DeepSpeed or FSDP.
    """
    try:
        settings = yaml.safe_load(path.read_text())
        kind = str(settings.get("distributed_type", "NO")).upper()
        _processes_here(str(path))
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"accelerate_config: {path} is not an accelerate file ({reason})") from error
    if kind in ("DEEPSPEED", "FSDP") or settings.get("deepspeed_config") or settings.get("fsdp_config"):
        raise UserError(f"accelerate_config: {path} asks for DeepSpeed or FSDP; a LoRA needs neither: use MULTI_GPU")


def main() -> None:
    """accelerate's own launcher, in this process."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ[LAUNCHER_PID] = str(os.getpid())
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        runpy.run_module("accelerate.commands.launch", run_name="__main__", alter_sys=True)
    except Exception as error:
        # By name, since torch is slow to import and not needed for one process.
        if type(error).__name__ == "SignalException":
            number = error.sigval  # type: ignore[attr-defined]
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if type(error).__name__ != "ChildFailedError":
            raise
        sys.exit(1)


if __name__ == "__main__":
    main()
