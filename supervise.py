"""Both ends of the line between main.py and the training process that accelerate launches for it.

The launcher between them turns every failure into exit code 1 and does not pass signals on. So the reason of an end
travels in a file, a stop goes to the whole process group, and whoever loses its parent leaves too.
"""

import contextlib
import ctypes
import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from config import DISK_OR_DRIVE, OUT_OF_MEMORY, UserError
from data_utils import write_atomically

OUTCOME = "outcome.json"
STOPPED = 130
ADVICE = (
    "set gradient_checkpointing: true, or halve train_batch_size and double gradient_accumulation_steps, "
    "or choose a smaller resolution"
)
_BUG = "training failed by a fault of this program; the traceback above says where"
_DISK_ERRORS = (
    errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ENOTCONN, errno.ESTALE, errno.ENOENT, errno.ENOTDIR,
    errno.EISDIR, errno.EEXIST, errno.EACCES, errno.EPERM,
)  # fmt: skip
_PR_SET_PDEATHSIG = 1
_REMIND_SECONDS = 0.5


class Stopped(Exception):
    """The user asked to stop; what was learnt so far is saved."""


class StopSignal:
    """The training process's end: SIGINT and SIGTERM end it at once, or while `deferred` only set `requested`."""

    def __init__(self) -> None:
        self.requested = self.deferred = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, _number: int, _frame: Any) -> None:
        first, self.requested = not self.requested, True
        if first and not self.deferred:
            raise Stopped("stopped before a step was made; the same command goes on")


def report_outcome(work: Callable[[StopSignal], str], folder: Path) -> int:
    """Run the training process's `work` and write how it ended into `folder`; returns the exit code.

    A failure that is a bug of ours goes on as it is, with its traceback.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)  # so that the launcher's death reaches us
    _write(folder, None, "")
    try:
        message, code = work(StopSignal()), 0
    except Stopped as reason:
        message, code = str(reason), STOPPED
    except UserError as error:
        message, code = str(error), error.exit_code
    except (MemoryError, OSError, RuntimeError) as error:
        explained = explain(error, ADVICE)
        if explained is None:
            _write(folder, 1, _BUG)
            raise
        message, code = explained
    except Exception:
        _write(folder, 1, _BUG)
        raise
    if os.environ.get("LOCAL_RANK", "0") == "0" or code not in (0, STOPPED):
        _write(folder, code, message)
    return code


def _write(folder: Path, code: int | None, message: str) -> None:
    write_atomically(folder / OUTCOME, json.dumps({"exit_code": code, "message": message}).encode())


def explain(error: Exception, advice: str) -> tuple[str, int] | None:
    """The sentence and exit code for a failure that the user can mend; None for a bug of ours."""
    # By name, since this file does not import torch: torch.OutOfMemoryError is a RuntimeError.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"out of memory: {advice}", OUT_OF_MEMORY
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        cure = "make room, or see that the folder is there, then run the same command again"
        return f"{error.filename or 'a file'} could not be written or read ({error.strerror}): {cure}", DISK_OR_DRIVE
    return None


def run(command: list[str], folder: Path) -> str:
    """main.py's end: run the launcher, pass a stop on, wait for all, and return the training's closing sentence.

    The first SIGINT or SIGTERM lets the training save and leave; a second one ends everything at once.

    Raises:
        UserError: the training said what is wrong, was killed, or was stopped (exit 130 or 143).
    """
    stops: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    old = {number: signal.signal(number, lambda got, _: stops.append(got)) for number in numbers}
    try:
        launcher = subprocess.Popen(command, start_new_session=True, preexec_fn=_as_launcher)
        while True:
            try:
                code = launcher.wait(timeout=_REMIND_SECONDS)
                break
            except subprocess.TimeoutExpired:
                # Again and again: a process that is only just starting has no ear for it yet.
                if stops:
                    _signal_group(launcher.pid, signal.SIGKILL if len(stops) > 1 else signal.SIGINT)
        _signal_group(launcher.pid, signal.SIGKILL)  # whoever of the group is left over
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
    return _verdict(code, stops, folder / OUTCOME)


def _as_launcher() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is to outlive the training process, and report its end
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _verdict(code: int, stops: list[int], outcome: Path) -> str:
    said = json.loads(outcome.read_text()) if outcome.exists() else {}
    ended, message = said.get("exit_code"), said.get("message", "")
    if ended == 0:
        return message
    if stops or ended == STOPPED:
        message = message or "stopped at once; the same command goes on from the last checkpoint"
        raise UserError(message, 128 + (stops[0] if stops else signal.SIGINT))
    if ended is not None:
        raise UserError(message, ended)
    if not said:
        raise UserError(f"accelerate could not start the training (exit code {code}); what it printed above says why")
    raise UserError(
        "the training process was killed, most likely because the machine ran out of memory: close other programs "
        "or choose a machine with more; the same command goes on from the last checkpoint",
        OUT_OF_MEMORY,
    )
