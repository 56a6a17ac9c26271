"""main.py's process, the launcher and the training process, as real processes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from helpers import ROOT
from lace_lora import errors, process
from lace_lora.errors import UserError
from lace_lora.training.launch import ACCELERATE_SETTINGS

# Like accelerate's: any failure becomes 1, and its own end is not passed on.
LAUNCHER = "import subprocess, sys; sys.exit(1 if subprocess.run([sys.executable, *sys.argv[1:]]).returncode else 0)"

TRAINING = """
import errno, os, signal, sys, time
from pathlib import Path
ROOT, FOLDER, KIND = sys.argv[1:]
sys.path.insert(0, ROOT)
if KIND == "starting":
    Path(FOLDER, "pid").write_text(str(os.getpid()))
    time.sleep(1.2)
from lace_lora import errors
from lace_lora import process
from lace_lora.errors import UserError

class OutOfMemoryError(RuntimeError):
    pass

def wait(stop, heeds):
    Path(FOLDER, "pid").write_text(str(os.getpid()))
    for _ in range(3000):
        if heeds and stop.requested:
            raise process.Stopped("saved at step 7; run the same command again to resume")
        time.sleep(0.01)

def work(stop):
    if KIND == "good":
        return "trained 8 steps"
    if KIND == "user":
        raise UserError("the loss is not finite: lower it", 5)
    if KIND == "disk":
        raise OSError(errno.ENOSPC, "No space left on device", "lora/checkpoint-4")
    if KIND == "memory":
        raise MemoryError
    if KIND == "gpu":
        raise OutOfMemoryError("CUDA out of memory")
    if KIND == "bug":
        raise ZeroDivisionError("a bug")
    if KIND == "exits":
        sys.exit("a library that ends the process")
    if KIND == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if KIND == "forks":
        if os.fork() == 0:
            os.setsid()
            Path(FOLDER, "pid").write_text(str(os.getpid()))
            time.sleep(60)
            os._exit(0)
        while not Path(FOLDER, "pid").exists():
            time.sleep(0.01)
        return "trained 8 steps"
    stop.deferred = KIND != "encoding"
    wait(stop, heeds=KIND != "deaf")

sys.exit(process.report_outcome(work, Path(FOLDER)))
"""

MAIN = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from lace_lora import errors
from lace_lora import process
from lace_lora.errors import UserError
try:
    print(process.run(sys.argv[3:], Path(sys.argv[2])))
except UserError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""

Start = Callable[..., subprocess.Popen[str]]


def launch(folder: Path, kind: str, single: bool = False) -> list[str]:
    """The command for a launcher with the training below it, or, as accelerate's with a single process, in itself."""
    launcher = [sys.executable] if single else [sys.executable, "-c", LAUNCHER]
    return [*launcher, "-c", TRAINING, str(ROOT), str(folder), kind]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a main process with a training of some kind and waits until that is running."""
    started = []

    def begin(kind: str, single: bool = False) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", MAIN, str(ROOT), str(tmp_path), *launch(tmp_path, kind, single)]
        started.append(subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        soon(lambda: (tmp_path / "pid").exists() and bool((tmp_path / "pid").read_text()))
        return started[-1]

    yield begin
    for one in started:
        one.kill()
        one.communicate()


def soon(condition: Callable[[], bool], seconds: float = 15) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def training_has_ended(folder: Path) -> None:
    pid = int((folder / "pid").read_text())
    soon(lambda: not alive(pid))


def test_a_success_returns_the_closing_line(tmp_path: Path) -> None:
    assert process.run(launch(tmp_path, "good"), tmp_path) == "trained 8 steps"


@pytest.mark.parametrize(
    ("kind", "code", "output"),
    [
        ("user", 5, "the loss is not finite: lower it"),
        ("disk", 4, "lora/checkpoint-4 could not be read or written (No space left on device)"),
        ("memory", 3, "out of memory: set gradient_checkpointing"),
        ("gpu", 3, "out of memory: set gradient_checkpointing"),
        ("killed", 3, "the training process was killed"),
        ("bug", 1, "a bug in this program"),
        ("exits", 1, "a bug in this program"),
    ],
)
def test_the_error_message_of_a_failure_is_passed_on(
    kind: str, code: int, output: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError) as caught:
        process.run(launch(tmp_path, kind), tmp_path)
    assert caught.value.exit_code == code
    assert output in str(caught.value)
    assert ("ZeroDivisionError: a bug" in capfd.readouterr().err) == (kind == "bug")


def test_a_launcher_that_never_starts_the_training(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="could not start the training \\(exit code 9\\)") as caught:
        process.run([sys.executable, "-c", "raise SystemExit(9)"], tmp_path)
    assert caught.value.exit_code == 2


def test_a_thread_of_a_web_interface_can_train(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(process.run, launch(tmp_path, "good"), tmp_path).result() == "trained 8 steps"


def test_signal_handlers_are_restored(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(UserError):
        process.run(launch(tmp_path, "user"), tmp_path)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize("recipient", ["main", "training"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_lets_the_training_save(
    number: int, code: int, recipient: str, single: bool, start: Start, tmp_path: Path
) -> None:
    main = start("loop", single)
    os.kill(main.pid if recipient == "main" else int((tmp_path / "pid").read_text()), number)
    _, output = main.communicate(timeout=15)
    assert main.returncode == code
    assert output == "saved at step 7; run the same command again to resume\n"
    training_has_ended(tmp_path)


@pytest.mark.parametrize(
    ("kind", "output"), [("encoding", "stopped before training started"), ("starting", "the same command")]
)
@pytest.mark.parametrize("single", [True, False])
def test_a_stop_before_the_loop_ends_it_at_once(
    kind: str, output: str, single: bool, start: Start, tmp_path: Path
) -> None:
    main = start(kind, single)
    main.send_signal(signal.SIGINT)
    _, err = main.communicate(timeout=15)
    assert main.returncode == 130
    assert output in err
    assert "Traceback" not in err
    training_has_ended(tmp_path)


def test_a_second_stop_kills_an_unresponsive_training(start: Start, tmp_path: Path) -> None:
    main = start("deaf")
    main.send_signal(signal.SIGINT)
    time.sleep(0.7)
    assert main.poll() is None
    main.send_signal(signal.SIGINT)
    _, output = main.communicate(timeout=15)
    assert main.returncode == 130
    assert output.startswith(
        "stopped immediately; run the same command again: it resumes from the last checkpoint, if "
    )
    training_has_ended(tmp_path)


@pytest.mark.parametrize("single", [True, False])
def test_when_main_is_killed_the_training_saves_and_no_orphan_is_left(
    single: bool, start: Start, tmp_path: Path
) -> None:
    main = start("loop", single)
    main.kill()
    main.wait()
    training_has_ended(tmp_path)
    outcome = json.loads((tmp_path / "outcome.json").read_text())
    assert outcome == {"exit_code": 143, "message": "saved at step 7; run the same command again to resume"}


def test_a_launcher_that_ends_before_the_training_lets_it_save(tmp_path: Path) -> None:
    """As torch's does, which ends half a minute after the signal: here at once."""
    leave = "import subprocess, sys, time; subprocess.Popen([sys.executable, *sys.argv[1:]], start_new_session=True)"
    wait = "; import pathlib\nwhile not pathlib.Path(sys.argv[-2], 'pid').exists(): time.sleep(0.02)"
    command = [sys.executable, "-c", leave + wait, "-c", TRAINING, str(ROOT), str(tmp_path), "loop"]
    with pytest.raises(UserError, match="saved at step 7") as caught:
        process.run(command, tmp_path)
    assert caught.value.exit_code == 143


def test_a_process_forked_by_the_training_does_not_keep_main_waiting(tmp_path: Path) -> None:
    began = time.monotonic()
    assert process.run(launch(tmp_path, "forks", single=True), tmp_path) == "trained 8 steps"
    assert time.monotonic() - began < 30
    forked = int((tmp_path / "pid").read_text())
    assert alive(forked)
    os.kill(forked, signal.SIGKILL)


def test_no_file_in_the_current_folder_is_imported_in_place_of_a_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "colorsys.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    training = (
        "import sys, colorsys, lace_lora.process as p; sys.exit(p.report_outcome(lambda _: p.__file__, p.Path('.')))"
    )
    assert process.run([sys.executable, "-c", training], tmp_path) == str(ROOT / "lace_lora" / "process.py")


def test_accelerates_launcher_is_the_training_process_if_that_is_a_single_one(
    tmp_path: Path,
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\nfrom pathlib import Path\nfrom lace_lora import process\n"
        "output = [__name__, *sys.argv[1:], os.environ['OMP_NUM_THREADS'], os.environ['ACCELERATE_MIXED_PRECISION']]\n"
        "output += [str('LACE_LORA_LAUNCHER' in os.environ), str(os.getpgrp() == os.getpid())]\n"
        "sys.exit(process.report_outcome(lambda _: ' '.join(output), Path(sys.argv[1])))\n"
    )
    (tmp_path / "accelerate.yaml").write_text(ACCELERATE_SETTINGS.replace("use_cpu: false", "use_cpu: true"))
    command = [sys.executable, "-m", "lace_lora.process", "--config_file", str(tmp_path / "accelerate.yaml")]
    command += ["--num_cpu_threads_per_process", "3", "--quiet", str(script), str(tmp_path)]
    assert process.run(command, tmp_path) == f"__main__ {tmp_path} 3 no False True"


def test_a_training_that_is_killed_from_outside(start: Start, tmp_path: Path) -> None:
    main = start("loop")
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    _, output = main.communicate(timeout=15)
    assert main.returncode == 3
    assert "the training process was killed" in output


def test_remaining_processes_of_the_group_are_killed(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, pathlib\n"
        "left = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"pathlib.Path({str(tmp_path)!r}, 'pid').write_text(str(left.pid))"
    )
    with pytest.raises(UserError):
        process.run([sys.executable, "-c", code], tmp_path)
    training_has_ended(tmp_path)


def report(folder: Path, rank: str, work: Callable[[process.StopSignal], str]) -> int | None:
    """report_outcome in a process of its own, as one of several; the exit code in the outcome file, if there is one."""
    pid = os.fork()
    if pid == 0:
        os.environ["LOCAL_RANK"] = rank
        os._exit(process.report_outcome(work, folder))
    os.waitpid(pid, 0)
    outcome = folder / "outcome.json"
    return json.loads(outcome.read_text())["exit_code"] if outcome.exists() else None


def test_of_several_processes_the_first_reports_success_and_any_a_failure(tmp_path: Path) -> None:
    def fail(_: process.StopSignal) -> str:
        raise MemoryError

    assert report(tmp_path, "1", lambda _: "done") is None
    assert report(tmp_path, "0", lambda _: "done") == 0
    assert report(tmp_path, "1", fail) == 3
    assert report(tmp_path, "0", lambda _: "done") == 3


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (PermissionError(13, "no", "x"), "you have no permission"),
        (OSError(28, "no", "x"), "free some disk space"),
        (OSError(122, "no", b"x"), "free some disk space"),
        (OSError(30, "no"), "it is read-only"),
        (OSError(5, "no", 3), "check that the disk or Drive is connected"),
        (OSError(116, "no", "x"), "check that the disk or Drive is connected"),
        (FileNotFoundError(2, "no", "/nowhere/at all/x"), "check that the disk or Drive is mounted"),
        (NotADirectoryError(20, "no", f"{__file__}/x"), "check that the disk or Drive is mounted"),
        (FileNotFoundError(2, "no", __file__, None, "/nowhere/x"), "check that the disk or Drive is mounted"),
        (OSError(36, "no", "x" * 999), "choose a shorter name"),
    ],
)
def test_disk_errors_are_user_errors_each_with_its_advice(error: OSError, advice: str) -> None:
    explained = errors.explain(error, "buy more")
    assert explained
    assert explained.exit_code == 4
    assert advice in str(explained)
    assert ("disk space" in str(explained)) == ("disk space" in advice)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("x"), RuntimeError("shape"), OSError("no number"), KeyError("x"), FileExistsError(17, "no", "x"),
        IsADirectoryError(21, "no", "x"), OSError(39, "not empty", "x"), FileNotFoundError(2, "no", __file__ + ".tmp"),
        FileNotFoundError(2, "no"), BrokenPipeError(32, "no"),
    ],
)  # fmt: skip
def test_a_bug_is_not_reported_as_a_user_error(error: Exception) -> None:
    assert errors.explain(error, "buy more") is None


def test_out_of_host_memory_is_explained() -> None:
    import torch

    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50)
    explained = errors.explain(caught.value, "take less")
    assert explained is not None
    assert (str(explained), explained.exit_code) == ("out of memory: take less", 3)
