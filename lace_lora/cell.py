"""A cell of the notebook: main.py in a subprocess with its output inline, and one line in place of a traceback."""

import io
import os
import queue
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from IPython.display import Image, Pretty, display
from PIL import Image as Pillow

from lace_lora.errors import UserError, explain
from lace_lora.process import die_with_parent, stop_requests

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 1100  # pixels, of a picture in a cell
# A frame of a progress bar, or what main.py prints in its place.
_PROGRESS = re.compile(r"[^:]+: .*?(\d+%\||\S+ of \S+ \w+(,|$))")
_FOR_THE_COMMAND_LINE = ("To draw with it: ", "Wrote ")
_TERMINAL_CODE = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


class CellError(Exception):
    """Shown as one line without a traceback; the cells below do not run."""

    def _render_traceback_(self) -> list[str]:  # IPython calls it
        return [f"Stopped: {self}"]


@contextmanager
def one_line() -> Iterator[None]:
    """Errors that a user can fix as CellErrors."""
    try:
        yield
    except UserError as error:
        raise CellError(error) from None
    except OSError as error:
        raise CellError(explain(error, "") or error) from None


def run_main(mode: str, settings: Path, *more: str, watch: Sequence[Path] = ()) -> list[str]:
    """Run main.py; show its lines, progress as one that changes, and the pictures `watch`; returns the lines.

    Colab's ■ is main.py's Ctrl-C.

    Raises:
        CellError: it failed, or was stopped.
    """
    command = [sys.executable, str(ROOT / "main.py"), "--mode", mode, "--config", str(settings), *more]
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
    shown, passed_on = _Shown(watch), 0
    # In a session of its own: an interrupt reaches the notebook alone, which passes it on.
    with stop_requests() as stops, subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace",
        start_new_session=True, preexec_fn=die_with_parent, env=environment,
    ) as program:  # fmt: skip
        try:
            for line in _lines(program):
                for number in stops[passed_on:]:
                    program.send_signal(number)
                    passed_on += 1
                shown.add(line)
        except BaseException:
            program.terminate()
            raise
    shown.add("")
    if shown.problem:
        raise CellError("\n".join(shown.problem))
    if passed_on and program.returncode:
        raise CellError("run this cell again to go on")
    if program.returncode:
        raise CellError(f"main.py ended with exit code {program.returncode}; see above")
    return shown.lines


def _lines(program: "subprocess.Popen[str]") -> Iterator[str]:
    """What it prints, until it ends; an empty line whenever it has printed nothing for a moment."""
    arrived: queue.Queue[str | None] = queue.Queue()

    def read() -> None:  # in a thread: what waits for a pipe cannot look at anything else
        for line in program.stdout or ():
            arrived.put(_TERMINAL_CODE.sub("", line).rstrip())
        arrived.put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = arrived.get(timeout=0.5)
        except queue.Empty:
            line = ""
        if line is None:
            return
        yield line


class _Shown:
    """What a cell shows of main.py: lines, progress as one that changes, and pictures."""

    def __init__(self, watch: Sequence[Path]) -> None:
        self.progress, self.pictures = _Output(), [_Picture(path) for path in watch]
        self.lines: list[str] = []
        self.problem: list[str] = []  # an error, which may have several lines, its last

    def add(self, line: str) -> None:
        for picture in self.pictures:
            picture.update()
        if line.startswith("error: ") or self.problem:
            self.problem += [line.removeprefix("error: ")] if line else []
        elif _PROGRESS.match(line):
            self.progress.show(Pretty(line))
        elif line:
            self.lines.append(line)
            if not line.startswith(_FOR_THE_COMMAND_LINE):
                print(line)


class _Output:
    """A place in a cell's output whose content is replaced."""

    handle: Any = None

    def show(self, content: object) -> None:
        if self.handle:
            self.handle.update(content)
        else:
            self.handle = display(content, display_id=True)


class _Picture(_Output):
    """A picture file, shown whenever it changes."""

    def __init__(self, path: Path) -> None:
        self.path, self.shown = path, 0

    def update(self) -> None:
        with suppress(OSError):  # not there yet, or Drive fails for a moment
            changed = self.path.stat().st_mtime_ns
            if changed != self.shown:
                self.show(Image(small_jpeg(self.path.read_bytes())))
                self.shown = changed


def small_jpeg(content: bytes, width: int = WIDTH) -> bytes:
    """A picture of at most that width, in few bytes: a notebook is saved with all its pictures."""
    picture, file = Pillow.open(io.BytesIO(content)).convert("RGB"), io.BytesIO()
    picture.thumbnail((width, picture.height))
    picture.save(file, "JPEG", quality=82)
    return file.getvalue()
