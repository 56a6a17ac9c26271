"""Both ends of the line between main.py and the training process that accelerate launches for it.

The launcher between them turns every failure into exit code 1 and does not pass signals on. So the reason of an end
travels in a file, a stop goes to the whole process group, and whoever loses its parent saves and leaves too. An output
folder is locked by whoever works in it, so that no two runs write into one.
"""

import contextlib
import ctypes
import errno
import fcntl
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from config import DISK_OR_DRIVE, OUT_OF_MEMORY, UserError
from data_utils import write_atomically

logger = logging.getLogger(__name__)

OUTCOME = "outcome.json"
_GROUP = ".group"  # of files whose names are the process groups that train: several processes have one each
STOPPED = 130
ADVICE = (
    "set gradient_checkpointing: true, or halve train_batch_size and double gradient_accumulation_steps, "
    "or choose a smaller resolution"
)
_BUG = "training failed by a fault of this program; the traceback above says where"
_DISK_ERRORS = (
    errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ENOTCONN, errno.ESTALE, errno.ENOENT, errno.ENOTDIR,
    errno.EISDIR, errno.EEXIST, errno.EACCES, errno.EPERM, errno.ETIMEDOUT, errno.ENODEV, errno.EBUSY,
    errno.ENAMETOOLONG,
)  # fmt: skip
_MEMORY_ERRORS = ("OutOfMemoryError", "out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_REMIND_SECONDS = 0.5
LAUNCHER_PID = "LACE_LORA_LAUNCHER"  # in the environment of what it starts


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
    _set_for_process(_PR_SET_PDEATHSIG, signal.SIGTERM)  # so that the launcher's death reaches us
    if os.environ.get(LAUNCHER_PID, str(os.getppid())) != str(os.getppid()):
        return STOPPED  # it was dead before we could ask for that
    (folder / f"{os.getpgrp()}{_GROUP}").touch()
    if not (folder / OUTCOME).exists():
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
            _report(folder, 1, _BUG)
            raise
        message, code = explained
    except Exception:
        _report(folder, 1, _BUG)
        raise
    _report(folder, code, message)
    return code


def _report(folder: Path, code: int, message: str) -> None:
    """Of several processes the first tells a good end, and the first failure outweighs all that comes after it."""
    good = (0, STOPPED)
    if code in good and os.environ.get("LOCAL_RANK", "0") != "0":
        return
    if _outcome(folder).get("exit_code") not in (None, *good):
        return
    _write(folder, code, message)


def _write(folder: Path, code: int | None, message: str) -> None:
    write_atomically(folder / OUTCOME, json.dumps({"exit_code": code, "message": message}).encode())


def explain(error: Exception, advice: str) -> tuple[str, int] | None:
    """The sentence and exit code for a failure that the user can mend; None for a bug of ours."""
    # By words, since this file does not import torch, and not all of its libraries raise torch.OutOfMemoryError.
    said = f"{type(error).__name__}: {error}" if isinstance(error, RuntimeError) else ""
    if isinstance(error, MemoryError) or any(words in said for words in _MEMORY_ERRORS):
        return f"out of memory: {advice}", OUT_OF_MEMORY
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        cure = "make room, or see that the folder is there, then run the same command again"
        name = error.filename2 or error.filename or "a file"  # of a copy, where it was to go
        name = os.fsdecode(name) if isinstance(name, bytes) else name  # TensorBoard's
        return f"{name} could not be written or read ({error.strerror}): {cure}", DISK_OR_DRIVE
    return None


@contextmanager
def sole_use(folder: Path) -> Iterator[int]:
    """Lock an output folder that is there; yields the lock, for `share`. It dies with all processes that hold it.

    Raises:
        UserError: another run on this machine works in that folder.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _lock(descriptor, fcntl.LOCK_EX, folder)
        yield descriptor
    finally:
        os.close(descriptor)


def share(descriptor: int, folder: Path) -> None:
    """Let the processes of this run hold the lock too: whoever wants the folder waits for the last of them."""
    _lock(descriptor, fcntl.LOCK_SH, folder)


def hold_shared(folder: Path) -> None:
    """The training process's part in the lock, until it ends: the descriptor is left open on purpose."""
    share(os.open(folder, os.O_RDONLY), folder)


def _lock(descriptor: int, kind: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        advice = "wait for it or stop it, or name another folder"
        raise UserError(f"another run is at work in {folder}: {advice}") from None
    except OSError as error:  # some network folders have no locks
        logger.warning("%s cannot be locked (%s): start no second run in it", folder, error.strerror)


def run(command: list[str], folder: Path) -> str:
    """main.py's end: run the launcher, pass a stop on, wait for all, and return the training's closing sentence.

    The first SIGINT or SIGTERM lets the training save and leave; a second one ends everything at once.

    Raises:
        UserError: the training said what is wrong, was killed, or was stopped (exit 130 or 143).
    """
    stops: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    old = {number: signal.signal(number, lambda got, _: stops.append(got)) for number in numbers}
    _set_for_process(_PR_SET_CHILD_SUBREAPER, 1)  # a training that loses its launcher becomes our child
    try:
        launcher = subprocess.Popen(command, start_new_session=True, preexec_fn=_as_launcher)
        while True:
            try:
                code = launcher.wait(timeout=_REMIND_SECONDS)
                break
            except subprocess.TimeoutExpired:
                # Again and again: a process that is only just starting has no ear for it yet.
                if stops:
                    _signal_groups(folder, launcher.pid, kill=len(stops) > 1)
        # The launcher can end before the training, by the signal that was for both: then that still saves.
        while any(list(map(_group_lives, _groups(folder) | {launcher.pid}))):
            told = _outcome(folder).get("exit_code") is not None
            _signal_groups(folder, launcher.pid, kill=told or len(stops) > 1)
            time.sleep(_REMIND_SECONDS / 5)
    finally:
        _set_for_process(_PR_SET_CHILD_SUBREAPER, 0)
        for number, handler in old.items():
            signal.signal(number, handler)
    return _verdict(code, stops, _outcome(folder))


def _as_launcher() -> None:
    _set_for_process(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _set_for_process(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value)


def _groups(folder: Path) -> set[int]:
    """The process groups that train: the launcher's, or, of several processes, one for each."""
    return {int(path.stem) for path in folder.glob(f"*{_GROUP}")}


def _signal_groups(folder: Path, launcher: int, kill: bool) -> None:
    # A launcher of several processes is left alone if it can be: stopped, it would not wait for them to save.
    groups = _groups(folder)
    for group in groups | {launcher} if kill else groups or {launcher}:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL if kill else signal.SIGTERM)


def _group_lives(group: int) -> bool:
    """Whether any process of the group is left; the dead among them that are ours are put to rest."""
    try:
        while os.waitpid(-group, os.WNOHANG) != (0, 0):
            pass
    except ChildProcessError:
        pass
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _outcome(folder: Path) -> dict[str, Any]:
    path = folder / OUTCOME
    return json.loads(path.read_text()) if path.exists() else {}


def _verdict(code: int, stops: list[int], said: dict[str, Any]) -> str:
    ended, message = said.get("exit_code"), said.get("message", "")
    if ended == 0:
        return message
    if not stops and code in (-signal.SIGINT, -signal.SIGTERM):
        stops = [-code]  # the launcher alone was stopped
    if stops and ended in (None, STOPPED) or ended == STOPPED:
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
