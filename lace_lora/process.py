"""The training process as main.py runs it, from both ends, and accelerate's launcher between them.

The launcher turns every failure into exit code 1 and passes no signal on. So each training process has two files in a
folder that it shares with main.py: `outcome.json` says how it ended, and `<process id>.alive` is locked while it
runs. main.py sends stops to the processes whose files are locked, and waits until none is.

`python -m lace_lora.process` is accelerate's launcher itself, without tracebacks of its own.
"""

import argparse
import ctypes
import fcntl
import json
import logging
import os
import re
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lace_lora import console
from lace_lora.errors import OUT_OF_MEMORY, UserError, explain
from lace_lora.files import write_atomically

OUTCOME = "outcome.json"
ADVICE = (
    "set gradient_checkpointing: true, or halve train_batch_size and double gradient_accumulation_steps, "
    "or choose a smaller resolution"
)
_BUG = "training failed because of a bug in this program; see the traceback above"
_STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)  # exit codes
_ROOT = Path(__file__).resolve().parent.parent
# Set by the launchers of torch, accelerate and MPI for the processes that they start, and read by them.
_OF_A_LAUNCH = re.compile(
    r"(LOCAL_|NODE_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|NPROC|FORK_LAUNCHED|LACE_LORA_LAUNCHER"
    r"|(MASTER|TORCHELASTIC|PET|ACCELERATE|FSDP|DEEPSPEED|MEGATRON_LM|PARALLELISM_CONFIG|OMPI|PMIX?|MPI|MV2)_.*"
)
_LAUNCHER_PID = "LACE_LORA_LAUNCHER"  # environment variable of the processes that the launcher starts
_PR_SET_PDEATHSIG = 1


def run(command: list[str], folder: Path) -> str:
    """Run the launcher until all training processes have ended; returns the training's closing line.

    The first SIGINT or SIGTERM lets the training save and end; a second one kills everything.

    Raises:
        UserError: the training failed, was killed, or was stopped (exit 130 or 143).
    """
    with stop_requests() as stops:
        environment = launch_environment(os.environ)
        launcher = subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=die_with_parent)
        while True:
            running = launcher.poll() is None  # checked first: the launcher may start a training until it exits
            # Whatever their parents are: the kernel releases the lock of a dead one.
            training = {int(file.stem) for file in folder.glob("*.alive") if _is_locked(file)}
            if not running and not training:
                break
            # A signal sent to both may end the launcher first, while the training still saves.
            if stops or not running:
                finished = not running and bool(_read_outcome(folder))
                # Sent in every round: a process that has just started may have missed the last one.
                _send(signal.SIGKILL if finished or len(stops) > 1 else signal.SIGTERM, folder, training, launcher.pid)
            time.sleep(0.1)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(launcher.pid, signal.SIGKILL)  # whatever else it has started
    return _closing_line(launcher.returncode, stops, folder)


def launch_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The launcher's environment: the user's, without what another launch has left, which would join or break ours."""
    python_path = os.pathsep.join(filter(None, [str(_ROOT), environ.get("PYTHONPATH")]))
    kept = {name: value for name, value in environ.items() if not _OF_A_LAUNCH.fullmatch(name)}
    # So that no file in the user's current folder is imported in place of a library.
    return kept | {"PYTHONPATH": python_path, "PYTHONSAFEPATH": "1"}


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """A list to which each SIGINT or SIGTERM is appended; Python lets the main thread alone handle signals."""
    stops: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, lambda got, _: stops.append(got)) for number in numbers}
    try:
        yield stops
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_locked(file: Path) -> bool:
    with open(file) as opened, suppress(BlockingIOError):
        fcntl.lockf(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    return True


def _send(number: int, folder: Path, training: set[int], launcher: int) -> None:
    for process in training:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(process, number)
    # The launcher gets no other signal: it would not wait for the training to save, and exits by itself afterwards.
    if number == signal.SIGKILL or not any(folder.glob("*.alive")):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(launcher, number)


def _closing_line(code: int, stops: list[int], folder: Path) -> str:
    """How the training ended, from the launcher's exit code, the stops that were requested, and the outcome file."""
    outcome = _read_outcome(folder)
    ended, message = outcome.get("exit_code"), outcome.get("message", "")
    if ended == 0:
        return message
    if not stops and code in (-signal.SIGINT, -signal.SIGTERM):
        stops = [-code]  # the launcher alone was stopped
    if ended in _STOPPED or (stops and ended is None):
        message = message or (
            "stopped immediately; run the same command again: it resumes from the last checkpoint, if there is one"
        )
        raise UserError(message, 128 + stops[0] if stops else outcome["exit_code"])
    if ended is not None:
        raise UserError(message, ended)
    if not any(folder.glob("*.alive")):
        raise UserError(f"accelerate could not start the training (exit code {code}); see its output above")
    reason = "the training process was killed, most likely because the machine ran out of memory"
    advice = "close other programs or choose a machine with more memory, then run the same command again"
    raise UserError(f"{reason}: {advice}", OUT_OF_MEMORY)


# the training process


class Stopped(Exception):
    """A stop was requested, and what was trained so far is saved."""


class StopSignal:
    """SIGINT or SIGTERM: the first one raises `Stopped` at once, or, while `deferred`, sets `requested` and answers."""

    def __init__(self) -> None:
        self.deferred = False
        self.answer: Callable[[], object] = lambda: None  # tells the user what happens now
        self.number: int | None = None

    @property
    def requested(self) -> bool:
        return self.number is not None

    def __call__(self, number: int, _frame: Any) -> None:
        """The signal handler."""
        if self.requested:
            return
        self.number = number
        if not self.deferred:
            raise Stopped("stopped before training started; run the same command again")
        self.answer()


def report_outcome(work: Callable[[StopSignal], str], folder: Path) -> int:
    """Run the training process's `work` and write into `folder` how it ended; returns the exit code.

    A bug is raised again, for its traceback.
    """
    die_with_parent()
    if os.environ.get(_LAUNCHER_PID, str(os.getppid())) != str(os.getppid()):
        return _STOPPED[1]  # the parent had already died
    # Renamed once it is locked, which it stays until this process ends: the descriptor is left open on purpose. By
    # `lockf`, not `flock`: a process that a library forks off this one does not inherit the lock.
    unnamed = folder / f"{os.getpid()}.tmp"
    with suppress(OSError):  # of a folder without locks: then stops go to the launcher's process group
        fcntl.lockf(os.open(unnamed, os.O_CREAT | os.O_RDWR, 0o600), fcntl.LOCK_EX)
        unnamed.rename(folder / f"{os.getpid()}.alive")
    stop = StopSignal()
    try:
        signal.signal(signal.SIGINT, stop)
        signal.signal(signal.SIGTERM, stop)
        message, code = work(stop), 0
    except Stopped as reason:
        message, code = str(reason), 128 + (stop.number or signal.SIGTERM)
    except UserError as error:
        message, code = str(error), error.exit_code
    except (Exception, SystemExit) as error:
        explained = explain(error, ADVICE)
        if explained is None:
            _write_outcome(folder, 1, _BUG)
            raise
        message, code = str(explained), explained.exit_code
    finally:
        stop.deferred = True
    _write_outcome(folder, code, message)
    return code


def die_with_parent() -> None:
    """Have the kernel send SIGTERM when the parent dies, so that a killed launcher leaves no orphan."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _write_outcome(folder: Path, code: int, message: str) -> None:
    """Of several processes, only the first reports success; the first failure is never overwritten."""
    succeeded = (0, *_STOPPED)
    if code in succeeded and os.environ.get("LOCAL_RANK", "0") != "0":
        return
    if _read_outcome(folder).get("exit_code", 0) in succeeded:
        write_atomically(folder / OUTCOME, json.dumps({"exit_code": code, "message": message}).encode())


def _read_outcome(folder: Path) -> dict[str, Any]:
    """`exit_code` and `message`; empty while the training runs, or if it was killed."""
    path = folder / OUTCOME
    return json.loads(path.read_text()) if path.exists() else {}


# accelerate's launcher


def launch() -> None:
    """Run accelerate's own launcher. A single training process is this one, so that torch is imported once."""
    console.protect()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no KeyboardInterrupt
    os.environ[_LAUNCHER_PID] = str(os.getpid())
    # accelerate sets it for the processes that it starts; here torch reads it when it is imported.
    os.environ["OMP_NUM_THREADS"] = sys.argv[sys.argv.index("--num_cpu_threads_per_process") + 1]
    from accelerate.commands import launch as accelerate_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    accelerate_launch.simple_launcher = _run_here
    start_several = accelerate_launch.multi_gpu_launcher
    accelerate_launch.multi_gpu_launcher = lambda arguments: start_several(_with_use_cpu(arguments))
    try:
        accelerate_launch.launch_command(accelerate_launch.launch_command_parser().parse_args())
    except Exception as error:
        # By name, since torch's launcher of several processes is not imported for a single one.
        if type(error).__name__ == "SignalException":
            number = error.sigval  # type: ignore[attr-defined]
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if type(error).__name__ != "ChildFailedError":
            raise
        sys.exit(1)


def _with_use_cpu(arguments: argparse.Namespace) -> argparse.Namespace:
    """Pass `use_cpu` on, which accelerate does for a single process only. Without a GPU, each would train alone."""
    import torch

    os.environ["ACCELERATE_USE_CPU"] = str(arguments.use_cpu or not torch.accelerator.is_available())
    return arguments


def _run_here(arguments: argparse.Namespace) -> None:
    """Run the training script in this process, with the environment that accelerate would give to one of its own."""
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    _, environment = prepare_simple_launcher_cmd_env(arguments)
    os.environ.update(environment)
    del os.environ[_LAUNCHER_PID]
    sys.argv = [arguments.training_script, *arguments.training_script_args]
    if arguments.module:
        runpy.run_module(arguments.training_script, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(arguments.training_script, run_name="__main__")


if __name__ == "__main__":
    launch()
