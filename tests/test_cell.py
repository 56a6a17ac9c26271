"""A cell of the notebook: what it shows of main.py, and how it ends."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from PIL import Image

from helpers import ROOT
from lace_lora import cell
from lace_lora.cell import CellError, run_main


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A main.py to be written by the test, in place of ours."""
    monkeypatch.setattr(cell, "ROOT", tmp_path)
    return tmp_path / "main.py"


def test_progress_is_one_line_that_changes(program: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frames = [
        "training: 3 of 10 steps,  2.00step/s, 00:01 left, mean loss=0.1156",
        "drawing samples: : 4 of 10 steps, ?step/s, ? left",
        "Fetching 12 files:  25%|██▌       | 3/12 [00:00<00:01]",
        "\x1b[Amodel.safetensors:  50%|█████     | 3.4G/6.9G [00:30<00:30, 110MB/s]",
    ]
    program.write_text(f"print({chr(13).join(frames)!r})\nprint('Pictures in x: 3 used, 1 skipped')\nprint('done')")
    assert run_main("train", Path("x")) == ["Pictures in x: 3 used, 1 skipped", "done"]
    printed = capsys.readouterr().out
    assert printed.endswith("Pictures in x: 3 used, 1 skipped\ndone\n")


def test_an_error_of_several_lines_is_the_cells_end(program: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program.write_text("import sys\nprint('first')\nsys.exit('error: no pictures\\nnor settings')")
    with pytest.raises(CellError, match="^no pictures\nnor settings$"):
        run_main("train", Path("x"))
    assert capsys.readouterr().out == "first\n"


def test_a_program_that_crashes_says_so(program: Path) -> None:
    program.write_text("import os\nos.abort()")
    with pytest.raises(CellError, match="exit code -6"):
        run_main("train", Path("x"))


def test_a_picture_is_shown_whenever_it_changes(program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched, shown = tmp_path / "samples.png", []
    monkeypatch.setattr(cell._Picture, "show", lambda _, content: shown.append(content))
    program.write_text(
        "import shutil, time\nfor name in 'ab':\n    time.sleep(1)\n"
        f"    shutil.copy({str(tmp_path)!r} + f'/{{name}}.png', {str(watched)!r})\n"
    )
    for name, width in (("a", 20), ("b", 4000)):
        Image.new("RGBA", (width, 10)).save(tmp_path / f"{name}.png")
    run_main("train", Path("x"), watch=[watched, tmp_path / "never.png"])
    assert len(shown) == 2


def test_each_interrupt_reaches_the_program(program: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program.write_text(
        "import signal, sys, time\nstops = []\nsignal.signal(signal.SIGINT, lambda *_: stops.append(1))\n"
        "until = time.time() + 20\nwhile len(stops) < 2 and time.time() < until: time.sleep(0.05)\n"
        "print('stops:', len(stops))\nsys.exit(130)"
    )

    def interrupt() -> None:
        for _ in range(2):
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    threading.Thread(target=interrupt).start()
    with pytest.raises(CellError, match="^run this cell again to go on$"):
        run_main("train", Path("x"))
    assert "stops: 2" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is before


def test_the_program_ends_with_the_cell(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ValueError

    monkeypatch.setattr(cell._Shown, "add", fail)
    program.write_text("import time\nprint('x')\ntime.sleep(60)")
    started = time.monotonic()
    with pytest.raises(ValueError, match="^$"):
        run_main("train", Path("x"))
    assert time.monotonic() - started < 20
    assert not psutil.Process().children()


@pytest.mark.skipif(sys.platform != "linux", reason="a kernel's service, of Linux alone")
def test_the_program_ends_with_a_killed_notebook(program: Path) -> None:
    program.write_text("import time\ntime.sleep(60)")
    code = (
        "import pathlib, sys; from lace_lora import cell; cell.ROOT = pathlib.Path(sys.argv[1]); cell.run_main('', '')"
    )
    notebook = psutil.Popen([sys.executable, "-c", code, str(program.parent)], cwd=ROOT)
    # A child that has only been forked has its parent's command line, and does not know yet whom to follow.
    while not (children := [child for child in notebook.children() if str(program) in child.cmdline()]):
        time.sleep(0.05)
    notebook.kill()
    notebook.wait()
    assert not psutil.wait_procs(children, timeout=20)[1]
