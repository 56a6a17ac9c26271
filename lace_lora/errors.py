"""Errors that a user can fix, each with its exit code; memory and disk errors in users' terms; redaction of secrets."""

import errno
import os
import re

# Exit codes of main.py. 0 is done, 1 a bug, 130/143 stopped by SIGINT/SIGTERM and resumable.
BAD_INPUT, OUT_OF_MEMORY, DISK_OR_DRIVE, LOSS_NOT_FINITE = 2, 3, 4, 5

NO_SECRETS = "remove it, because settings are saved in files and pictures; log in with `hf auth login`, or set HF_TOKEN"
# An access token of the Hub, or the user's name and password in a URL.
_SECRET = re.compile(r"hf_[A-Za-z0-9]{30,}|(?<=://)[^/@\s]+(?=@)")

_DISK_ERRORS = (
    errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ENOTCONN, errno.ESTALE, errno.ENOENT, errno.ENOTDIR,
    errno.EISDIR, errno.EEXIST, errno.EACCES, errno.EPERM, errno.ETIMEDOUT, errno.ENODEV, errno.EBUSY,
    errno.ENAMETOOLONG,
)  # fmt: skip
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


def explain(error: Exception, advice: str) -> UserError | None:
    """A memory or disk error as a UserError, None for any other; `advice` is the next step when memory ran out."""
    # Matched by text: this file does not import torch, and not all libraries raise torch.OutOfMemoryError.
    message = f"{type(error).__name__}: {error}" if isinstance(error, RuntimeError) else ""
    if isinstance(error, MemoryError) or any(words in message for words in _MEMORY_ERRORS):
        return UserError(f"out of memory: {advice}", OUT_OF_MEMORY)
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        fix = "free some disk space, or make sure that the folder exists, then run the same command again"
        name = error.filename2 or error.filename or "a file"  # when copying: the destination
        name = os.fsdecode(name) if isinstance(name, bytes) else name
        return UserError(f"{name} could not be read or written ({error.strerror}): {fix}", DISK_OR_DRIVE)
    return None


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error is an out-of-memory error or was caused by one, as when capturing a CUDA graph fails."""
    while error is not None:
        explained = explain(error, "") if isinstance(error, Exception) else None
        if explained and explained.exit_code == OUT_OF_MEMORY:
            return True
        error = error.__cause__ or error.__context__
    return False
