"""Progress: bars where they can be redrawn, lines where each frame of a bar would stay."""

import io
import sys

import pytest

from lace_lora import progress
from lace_lora.progress import Progress, duration


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(output: io.StringIO, monkeypatch: pytest.MonkeyPatch, steps: int = 500) -> str:
    now = 0.0
    monkeypatch.setattr(sys, "stderr", output)
    monkeypatch.setattr("tqdm.std.time", lambda: now)
    bar = Progress(total=steps, desc="training", unit="step", ascii=" #")
    monkeypatch.setattr(bar, "_time", lambda: now)
    for _ in range(steps):
        now += 0.1
        bar.update()
    bar.set_postfix({"mean loss": "0.1234"}, refresh=False)
    bar.close()
    return output.getvalue()


def test_a_file_or_a_pipe_gets_a_line_every_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown(io.StringIO(), monkeypatch).splitlines()
    assert 5 <= len(lines) <= 7  # 500 steps in 50 seconds
    assert lines[0] == "training: 101 of 500 steps, 10.00step/s, 00:39 left"
    assert lines[-1] == "training: 500 of 500 steps, 10.00step/s, 00:00 left, mean loss=0.1234"
    assert not any("\r" in line or "#" in line for line in lines)


def test_a_terminal_gets_one_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(Terminal(), monkeypatch)
    assert text.count("\n") == 1
    assert text.rstrip().rpartition("\r")[2].startswith("training: 100%|##########| 500/500")


def test_a_hidden_bar_shows_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    with Progress(total=2, desc="saving", disable=True) as bar:
        bar.update(2)
    assert capsys.readouterr().err == ""


def test_without_a_time_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for output, expected in ((io.StringIO(), "training: 0 of 8 steps\n"), (Terminal(), "| 0/8 [00:00]")):
        monkeypatch.setattr(sys, "stderr", output)
        bar = Progress(total=8, desc="training", unit="step", timed=False)
        bar.refresh()
        assert expected in output.getvalue()
        bar.close()


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (3600, "60 min"), (7500, "2 h 5 min")]
)
def test_durations_are_for_people(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected
