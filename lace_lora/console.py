"""Standard input, output and error that cannot end a run: closed, a pipe whose reader is gone, a log on a full disk."""

import io
import os
import select
import sys
from typing import Any


class _Output(io.FileIO):
    """A file descriptor for output; what it cannot write is dropped."""

    def write(self, data: bytes) -> int:  # type: ignore[override]
        try:
            while (written := super().write(data)) is None:  # it does not block, and is full
                select.select([], [self], [])
        except OSError:
            return len(data)
        return written


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
            output: Any = _Output(number, "w", closefd=False)
            lines, through = stream.line_buffering, stream.write_through  # through: with PYTHONUNBUFFERED
            output = output if through else io.BufferedWriter(output)
            text = io.TextIOWrapper(output, stream.encoding, "backslashreplace", None, lines, through)
            setattr(sys, name, text)
