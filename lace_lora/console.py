"""Printing cannot end a run: to a pipe whose reader is gone, a log on a full disk, a closed or an ASCII terminal.

Nor can a library's warning, which PYTHONWARNINGS=error would make an error.
"""

import io
import os
import select
import sys
import warnings
from contextlib import suppress
from typing import Any


class _Output(io.FileIO):
    """A file descriptor for output; what it cannot write is dropped."""

    def write(self, data: bytes) -> int:  # type: ignore[override]
        rest = memoryview(data)
        with suppress(OSError):
            while rest:
                written = super().write(rest)
                if written is None:  # it does not block, and is full
                    select.select([], [self], [])
                rest = rest[written or 0 :]
        return len(data)


def protect() -> None:
    """For entry points to call before anything is logged or opened.

    Text that the output's encoding lacks is written as escapes. A notebook's own streams stay as they are.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed, so that the next file opened would get what is written to standard output or error
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name) or io.TextIOWrapper(io.FileIO(number, "w", closefd=False), encoding="utf-8")
        if type(stream) is io.TextIOWrapper and stream.fileno() == number:
            raw: Any = _Output(number, "w", closefd=False)
            lines, unbuffered = stream.line_buffering, stream.write_through
            output = raw if unbuffered else io.BufferedWriter(raw)
            text = io.TextIOWrapper(output, stream.encoding, "backslashreplace", None, lines, unbuffered)
            setattr(sys, name, text)
    if any(option.startswith("error") for option in sys.warnoptions):
        warnings.resetwarnings()
