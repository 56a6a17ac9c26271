"""Progress: a bar on a terminal and in a notebook; in a file or a pipe a line every few seconds."""

import sys
from collections.abc import Callable
from typing import Any

from tqdm.std import tqdm

SECONDS = 10.0  # between lines
_COUNT = "{desc}: {n_fmt} of {total_fmt} {unit}s"
_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"  # without a time


def duration(seconds: float) -> str:
    """For people: `40 s`, `12 min`, `2 h 5 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


class Progress(tqdm):
    """tqdm's bar, or lines in its place where a bar would be a thousand frames of it.

    Args:
        timed: whether the time left follows from the number that is done, and is shown.
    """

    def __init__(self, *arguments: Any, timed: bool = True, **options: Any) -> None:
        if not shows_bars():
            line = _COUNT + (", {rate_fmt}, {remaining} left" if timed else "") + "{postfix}"
            options |= {"mininterval": SECONDS, "maxinterval": SECONDS, "bar_format": line, "delay": 1e-9}
        elif not timed:
            options["bar_format"] = _BAR
        super().__init__(*arguments, **options)

    @staticmethod
    def status_printer(file: Any) -> Callable[[str], None]:
        """What tqdm calls with each frame."""
        if shows_bars():
            return tqdm.status_printer(file)
        return lambda frame: print(frame, file=file, flush=True) if frame else None

    def close(self) -> None:
        if not shows_bars() and not self.disable:
            if self.n > self.last_print_n:
                self.refresh()
            self.sp = None  # nothing to clear, and no line to end
        super().close()


def shows_bars() -> bool:
    return sys.stderr.isatty() or "ipykernel" in sys.modules
