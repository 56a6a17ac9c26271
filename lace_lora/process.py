"""Both ends of the line between main.py and the training process, with accelerate's launcher between them.

The launcher turns every failure into exit code 1 and passes no signal on. So each training process keeps two files in a
folder that it shares with main.py: `outcome.json` says how it ended, and `<process id>.alive` is locked as long as it
lives. main.py sends stops to the processes whose files are locked, and has waited for all when none is.

`python -m lace_lora.process` is accelerate's launcher itself, without tracebacks of its own.
"""

import argparse
import ctypes
import fcntl
import json
import logging
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lace_lora.errors import OUT_OF_MEMORY, UserError, explain
from lace_lora.files import write_atomically

OUTCOME = "outcome.json"
STOPPED = 130
ADVICE = (
    "set gradient_checkpointing: true, or halve train_batch_size and double gradient_accumulation_steps, "
    "or choose a smaller resolution"
)
_BUG = "training failed by a bug of this program; the traceback above says where"
_ROOT = Path(__file__).resolve().parent.parent
_LAUNCHER_PID = "LACE_LORA_LAUNCHER"  # in the environment of what a launcher of several processes starts
_PR_SET_PDEATHSIG = 1
_POLL_SECONDS = 0.1


# main.py's end


def run(command: list[str], folder: Path) -> str:
    """Run the launcher until all training processes have ended; returns the training's closing line.

    The first SIGINT or SIGTERM lets the training save and leave; a second one ends everything at once.

    Raises:
        UserError: the training said what is wrong, was killed, or was stopped (exit 130 or 143).
    """
    python_path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
    # Nothing in the user's current folder is to be imported in place of a library.
    environment = os.environ | {"PYTHONPATH": python_path, "PYTHONSAFEPATH": "1"}
    with _stop_requests() as stops:
        launcher = subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=_die_with_parent)
        while (running := launcher.poll() is None) | bool(training := _living(folder)):
            # The launcher can end before the training, by a signal that was meant for both: then that still saves.
            if stops or not running:
                finished = not running and _read_outcome(folder).get("exit_code") is not None
                # Again and again: a process that is only just starting does not listen yet.
                _send(signal.SIGKILL if finished or len(stops) > 1 else signal.SIGTERM, training, launcher.pid)
            time.sleep(_POLL_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)  # whatever else it has started
    return _verdict(launcher.returncode, stops, _read_outcome(folder))


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """A list that grows by each SIGINT or SIGTERM that comes."""
    stops: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda got, _: stops.append(got)) for number in numbers}
    try:
        yield stops
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _living(folder: Path) -> set[int]:
    """The ids of the training processes that live, whoever their parents are: the kernel frees a dead one's lock."""
    return {int(file.stem) for file in folder.glob("*.alive") if _is_locked(file)}


def _is_locked(file: Path) -> bool:
    with open(file) as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _send(number: int, training: set[int], launcher: int) -> None:
    # The launcher is left alone while a training lives: stopped, it would not wait for that to save.
    for process in training:
        with suppress(ProcessLookupError):
            os.kill(process, number)
    if not training or number == signal.SIGKILL:
        with suppress(ProcessLookupError):
            os.killpg(launcher, number)


def _verdict(code: int, stops: list[int], outcome: dict[str, Any]) -> str:
    ended, message = outcome.get("exit_code"), outcome.get("message", "")
    if ended == 0:
        return message
    if not stops and code in (-signal.SIGINT, -signal.SIGTERM):
        stops = [-code]  # the launcher alone was stopped
    if stops and ended in (None, STOPPED) or ended == STOPPED:
        message = message or "stopped at once; the same command goes on from the last checkpoint"
        raise UserError(message, 128 + (stops[0] if stops else signal.SIGINT))
    if ended is not None:
        raise UserError(message, ended)
    if not outcome:
        raise UserError(f"accelerate could not start the training (exit code {code}); what it printed above says why")
    raise UserError(
        "the training process was killed, most likely because the machine ran out of memory: close other programs "
        "or choose a machine with more; the same command goes on from the last checkpoint",
        OUT_OF_MEMORY,
    )


# the training process's end


class Stopped(Exception):
    """The user asked to stop; what was learnt so far is saved."""


class StopSignal:
    """The user's wish to stop: SIGINT and SIGTERM end the process at once, or while `deferred` only set `requested`."""

    def __init__(self) -> None:
        self.requested = self.deferred = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, _number: int, _frame: Any) -> None:
        first, self.requested = not self.requested, True
        if first and not self.deferred:
            raise Stopped("stopped before the first step; run the same command again to start over")


def report_outcome(work: Callable[[StopSignal], str], folder: Path) -> int:
    """Run the training process's `work` and write how it ended into `folder`; returns the exit code.

    A failure that is a bug of ours is raised again, with its traceback.
    """
    _die_with_parent()
    if os.environ.get(_LAUNCHER_PID, str(os.getppid())) != str(os.getppid()):
        return STOPPED  # it was dead before we could ask for that
    _show_alive(folder)
    if not (folder / OUTCOME).exists():
        _write_outcome(folder, None, "")
    try:
        message, code = work(StopSignal()), 0
    except Stopped as reason:
        message, code = str(reason), STOPPED
    except UserError as error:
        message, code = str(error), error.exit_code
    except Exception as error:
        explained = explain(error, ADVICE)
        if explained is None:
            _report(folder, 1, _BUG)
            raise
        message, code = str(explained), explained.exit_code
    _report(folder, code, message)
    return code


def _die_with_parent() -> None:
    """Have the kernel send SIGTERM when the parent dies, so that a killed launcher leaves no orphan."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _show_alive(folder: Path) -> None:
    """Keep a file with this process's id locked until the process ends: the descriptor is left open on purpose."""
    unnamed = folder / f"{os.getpid()}.tmp"
    fcntl.flock(os.open(unnamed, os.O_CREAT | os.O_RDWR, 0o600), fcntl.LOCK_EX)
    unnamed.rename(folder / f"{os.getpid()}.alive")  # named once it is locked, never before


def _report(folder: Path, code: int, message: str) -> None:
    """Of several processes the first tells a good end, and the first failure outweighs all that comes after it."""
    good = (0, STOPPED)
    if code in good and os.environ.get("LOCAL_RANK", "0") != "0":
        return
    if _read_outcome(folder).get("exit_code") in (None, *good):
        _write_outcome(folder, code, message)


def _write_outcome(folder: Path, code: int | None, message: str) -> None:
    write_atomically(folder / OUTCOME, json.dumps({"exit_code": code, "message": message}).encode())


def _read_outcome(folder: Path) -> dict[str, Any]:
    path = folder / OUTCOME
    return json.loads(path.read_text()) if path.exists() else {}


# accelerate's launcher


def launch() -> None:
    """accelerate's own launcher. A single training process is this one, so that torch is imported once."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ[_LAUNCHER_PID] = str(os.getpid())
    # accelerate sets it for what it starts; here torch reads it while it is imported.
    os.environ["OMP_NUM_THREADS"] = sys.argv[sys.argv.index("--num_cpu_threads_per_process") + 1]
    from accelerate.commands import launch as accelerate_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    accelerate_launch.simple_launcher = _run_here
    try:
        accelerate_launch.launch_command(accelerate_launch.launch_command_parser().parse_args())
    except Exception as error:
        # By name, since torch's launcher of several processes is not imported for one.
        if type(error).__name__ == "SignalException":
            number = error.sigval  # type: ignore[attr-defined]
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if type(error).__name__ != "ChildFailedError":
            raise
        sys.exit(1)


def _run_here(arguments: argparse.Namespace) -> None:
    """The training script in this process, with the environment that accelerate would start it with."""
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
