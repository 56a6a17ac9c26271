"""Errors that a user can fix, each with its exit code; errors of memory and disks in a user's terms; redaction."""

import errno
import os
import re

# Exit codes of main.py. 0 is done, 1 a bug of ours, 130/143 stopped by SIGINT/SIGTERM and resumable.
BAD_INPUT, OUT_OF_MEMORY, DISK_OR_DRIVE, LOSS_NOT_FINITE = 2, 3, 4, 5

NO_SECRETS = "settings are written into files and pictures, so log in with `hf auth login`, or set HF_TOKEN"
# A hub's access token, or the user's name and password in a URL.
_SECRET = re.compile(r"hf_[A-Za-z0-9]{30,}|(?<=://)[^/@\s]+(?=@)")

_DISK_ERRORS = (
    errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ENOTCONN, errno.ESTALE, errno.ENOENT, errno.ENOTDIR,
    errno.EISDIR, errno.EEXIST, errno.EACCES, errno.EPERM, errno.ETIMEDOUT, errno.ENODEV, errno.EBUSY,
    errno.ENAMETOOLONG,
)  # fmt: skip
_MEMORY_ERRORS = ("OutOfMemoryError", "out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")


class UserError(Exception):
    """Something that the user can fix: one line that says what happened and what to do, and the exit code for it.

    Secrets in the message are redacted, whoever quoted them.
    """

    def __init__(self, message: str, exit_code: int = BAD_INPUT) -> None:
        super().__init__(redact(message))
        self.exit_code = exit_code


def holds_secret(text: str) -> bool:
    return bool(_SECRET.search(text))


def redact(text: str) -> str:
    return _SECRET.sub("***", text)


def first_line(error: BaseException, most: int = 200) -> str:
    """What an error of a library says, cut to what fits into a message of ours; its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0][:most] if lines else type(error).__name__


def explain(error: Exception, advice: str) -> UserError | None:
    """An error of memory, for which `advice` helps, or of a disk, in a user's terms; None for any other."""
    # By words, since this file does not import torch, and not all of its libraries raise torch.OutOfMemoryError.
    message = f"{type(error).__name__}: {error}" if isinstance(error, RuntimeError) else ""
    if isinstance(error, MemoryError) or any(words in message for words in _MEMORY_ERRORS):
        return UserError(f"out of memory: {advice}", OUT_OF_MEMORY)
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        fix = "make room, or see that the folder is there, then run the same command again"
        name = os.fsdecode(error.filename2 or error.filename or "a file")  # of a copy, where it was to go
        return UserError(f"{name} could not be written or read ({error.strerror}): {fix}", DISK_OR_DRIVE)
    return None


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error is one of memory, or was raised because of one, as when a CUDA graph's capture breaks off."""
    while error is not None:
        explained = explain(error, "") if isinstance(error, Exception) else None
        if explained and explained.exit_code == OUT_OF_MEMORY:
            return True
        error = error.__cause__ or error.__context__
    return False
