"""Errors that a user can fix, each with its exit code; memory and disk errors in users' terms; redaction of secrets."""

import errno
import os
import re

# Exit codes of main.py. 0 is done, 1 a bug, 130/143 stopped by SIGINT/SIGTERM and resumable.
BAD_INPUT, OUT_OF_MEMORY, DISK_OR_DRIVE, LOSS_NOT_FINITE = 2, 3, 4, 5

NO_SECRETS = "remove it, because settings are saved in files and pictures; log in with `hf auth login`, or set HF_TOKEN"
# An access token of the Hub, or in a URL the user's name and password, or a token as CivitAI's.
_SECRET = re.compile(r"hf_[A-Za-z0-9]{30,}|(?<=://)[^/@\s]+(?=@)|(?<=[?&]token=)[^&\s]+")

# What to do about an error of a disk, by its number.
_DISK_ADVICE = (
    dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some disk space")
    | dict.fromkeys((errno.EACCES, errno.EPERM), "you have no permission: change that, or choose another folder")
    | {errno.EROFS: "it is read-only: choose another folder, or check the disk or Drive"}
    | {errno.ENAMETOOLONG: "choose a shorter name", errno.EFBIG: "choose a disk for larger files"}
    | dict.fromkeys(
        (errno.EIO, errno.ENOTCONN, errno.ESTALE, errno.ETIMEDOUT, errno.ENODEV, errno.ENXIO, errno.EBUSY),
        "check that the disk or Drive is connected and works",
    )
)
_FOLDER_IS_GONE = "its folder is not there: check that the disk or Drive is mounted"
_MEMORY_ERRORS = ("OutOfMemoryError", "out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")


class UserError(Exception):
    """Something that the user can fix: one line that says what happened and what to do, and the exit code for it.

    Secrets in the message are redacted.
    """

    def __init__(self, message: str, exit_code: int = BAD_INPUT) -> None:
        super().__init__(redact(message))
        self.exit_code = exit_code


def holds_secret(text: str) -> bool:
    return bool(_SECRET.search(text))


def redact(text: str) -> str:
    return _SECRET.sub("***", text)


def first_line(error: BaseException, most: int = 200) -> str:
    """The first line of a library's error, truncated to `most` characters; its type if it has no text."""
    lines = str(error).strip().splitlines()
    return lines[0][:most] if lines else type(error).__name__


def explain(error: BaseException, advice: str) -> UserError | None:
    """A memory or disk error as a UserError, None for any other; `advice` is the next step when memory ran out."""
    # Matched by text: this file does not import torch, and not all libraries raise torch.OutOfMemoryError.
    message = f"{type(error).__name__}: {error}" if isinstance(error, RuntimeError) else ""
    if isinstance(error, MemoryError) or any(words in message for words in _MEMORY_ERRORS):
        return UserError(f"out of memory: {advice}", OUT_OF_MEMORY)
    if isinstance(error, OSError) and (fix := disk_advice(error)):
        name = error.filename2 or error.filename or "a file"  # when copying: the destination
        name = os.fsdecode(name) if isinstance(name, bytes) else name
        reason = f"{name} could not be read or written ({error.strerror})"
        return UserError(f"{reason}: {fix}, then run the same command again", DISK_OR_DRIVE)
    return None


def disk_advice(error: OSError) -> str:
    """What to do about a disk or Drive that is full, gone, failing or not ours to use; empty if that is not it.

    A missing file whose folder is there, or one that exists already, is not.
    """
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
        return "" if all(map(os.path.isdir, map(_folder_of, names))) else _FOLDER_IS_GONE
    return _DISK_ADVICE.get(error.errno or 0, "")


def _folder_of(name: str) -> str:
    return os.path.dirname(os.path.abspath(name))


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error is an out-of-memory error or was caused by one, as when capturing a CUDA graph fails."""
    while error is not None:
        explained = explain(error, "") if isinstance(error, Exception) else None
        if explained and explained.exit_code == OUT_OF_MEMORY:
            return True
        error = error.__cause__ or error.__context__
    return False
