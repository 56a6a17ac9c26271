"""Standard output and error whose other end is gone, full or absent."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers import ROOT

PRINT = """
import contextlib, os, sys, warnings
from lace_lora import console
console.protect()
for stream in (sys.stdout, sys.stderr):
    for _ in range(3):
        print("ó" * 100_000, file=stream, flush=True)
with open(sys.argv[1], "w") as opened:
    with contextlib.suppress(OSError):
        os.write(2, b"what a library prints")
    opened.write("done")
warnings.warn("of a library")
"""


def command(tmp_path: Path, redirected: str = "") -> list[str]:
    (tmp_path / "print.py").write_text(PRINT)
    return ["sh", "-c", f'exec "$0" "$1" "$2" {redirected}', sys.executable, *map(str, paths(tmp_path))]


def paths(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "print.py", tmp_path / "done"


@pytest.mark.parametrize("options", [{}, {"PYTHONUNBUFFERED": "1"}, {"PYTHONWARNINGS": "error"}])
@pytest.mark.parametrize("redirected", ["", ">/dev/full 2>&1", ">&- 2>&-", ">&- 2>&- <&-", "2>&-"])
def test_output_that_cannot_be_written_does_not_end_the_process(
    redirected: str, options: dict[str, str], tmp_path: Path
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | options
    process = subprocess.Popen(command(tmp_path, redirected), stdout=writer, stderr=writer, env=environment)
    os.close(writer)
    assert process.wait(60) == 0
    assert (tmp_path / "done").read_text() == "done"


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_all_is_written_to_a_slow_reader_in_the_encoding_it_has(encoding: str, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding}
    process = subprocess.Popen(command(tmp_path, "2>/dev/null"), stdout=writer, env=environment)
    os.close(writer)
    time.sleep(0.3)  # the pipe is full
    with open(reader, "rb") as opened:
        text = opened.read().decode(encoding)
    assert process.wait(60) == 0
    assert text == (("ó" if encoding == "utf-8" else "\\xf3") * 100_000 + "\n") * 3


def test_a_notebooks_own_output_stays_as_it_is(tmp_path: Path) -> None:
    code = (
        "import io, sys\nfrom lace_lora import console\n"
        "sys.stdout = own = io.StringIO()\nconsole.protect()\nsys.exit(sys.stdout is not own)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
