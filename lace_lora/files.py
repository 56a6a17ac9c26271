"""Atomic writes, text files, unused file names, digests, and a lock that lets only one run use a folder."""

import codecs
import fcntl
import hashlib
import itertools
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lace_lora.errors import DISK_OR_DRIVE, UserError

logger = logging.getLogger(__name__)

_UNFINISHED = re.compile(r"\..+\.\d+\.tmp")  # as `write_atomically` and checkpoint.publish name them

# Control characters that are no white space. What has them is a binary file, or UTF-16 without a mark.
CONTROL = re.compile(r"[\x00-\x08\x0e-\x1b\x1f\x7f-\x84\x86-\x9f]")


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file atomically: after a kill it has its old content or its new one, never half."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with name_in_errors(path), open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def name_in_errors(path: Path) -> Iterator[None]:
    """Say in errors of a disk which path it was; those of a full one do not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def read_text(path: Path) -> str:
    r"""A file that a user wrote: UTF-8, or UTF-16 with a byte order mark; lines end with `\n`.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not text.
    """
    content = path.read_bytes()
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = content.decode("utf-16" if utf16 else "utf-8").replace("\ufeff", "")
    if control := CONTROL.search(text):
        raise ValueError(f"it contains the control character {control[0]!r}")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def one_line(text: str) -> str:
    """Text as `read_text` reads it back from a single line: without line breaks and control characters."""
    return " ".join(CONTROL.sub(" ", text).replace("\ufeff", "").split())


def counted(number: int, what: str) -> str:
    """A number with its noun: 1 picture, 2 pictures."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def few(names: Sequence[str]) -> str:
    """The first three names, and how many more there are."""
    return "; ".join([*names[:3], f"and {len(names) - 3} more"] if len(names) > 3 else names)


def remove_unfinished(folder: Path) -> None:
    """Remove temporary files of killed writes. Only call this while holding `lock_for_one_run`."""
    for path in folder.glob(".*.tmp"):
        if _UNFINISHED.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def numbered(folder: Path, stem: str, suffix: str = "") -> Iterator[Path]:
    """Candidate names, without end: `stem`, `stem-2`, `stem-3` … in `folder`, each with `suffix`."""
    yield folder / (stem + suffix)
    for number in itertools.count(2):
        yield folder / f"{stem}-{number}{suffix}"


def free_name(folder: Path, stem: str, suffix: str) -> Path:
    """The first of the `numbered` names that does not exist yet."""
    return next(path for path in numbered(folder, stem, suffix) if not path.exists())


def free_space(folder: Path) -> float:
    """Free disk space in GB where a folder is, or would be created.

    Raises:
        UserError: see `check_writable`.
    """
    return shutil.disk_usage(check_writable(folder)).free / 1e9


def check_writable(folder: Path) -> Path:
    """The folder, or if it does not exist the one in which it would be created.

    Raises:
        UserError: it is a file, or in one, or cannot be written (exit 4).
    """
    place = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
    if not place.is_dir():
        raise UserError(f"{folder} cannot be used as a folder: {place} is a file; set another folder", DISK_OR_DRIVE)
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{folder} cannot be written: set a folder that you can write to", DISK_OR_DRIVE)
    return place


def is_safetensors(path: Path) -> bool:
    """By its name, whatever its case."""
    return path.suffix.lower() == ".safetensors"


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_digest(value: Any, length: int = 16) -> str:
    """The first hexadecimal digits of the SHA-256 of a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:length]


@contextmanager
def lock_for_one_run(folder: Path) -> Iterator[int]:
    """Lock an output folder that exists; yields the lock's file descriptor, for `share_lock`.

    The lock is the kernel's: it ends with the last process that holds it.

    Raises:
        UserError: another run on this machine is using that folder.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _lock(descriptor, fcntl.LOCK_EX, folder)
        yield descriptor
    finally:
        os.close(descriptor)


def share_lock(descriptor: int, folder: Path) -> None:
    """Let the other processes of this run hold the lock too; other runs are refused until the last of them ends."""
    _lock(descriptor, fcntl.LOCK_SH, folder)


def hold_shared_lock(folder: Path) -> None:
    """The training process's part in the lock. The descriptor stays open on purpose, until the process ends."""
    share_lock(os.open(folder, os.O_RDONLY), folder)


def _lock(descriptor: int, kind: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another run is using {folder}: wait until it ends, stop it, or set another folder") from None
    except OSError as error:  # some network folders have no locks
        logger.warning("%s cannot be locked (%s): do not start a second run in it", folder, error.strerror)
