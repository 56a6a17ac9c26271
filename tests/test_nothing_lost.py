"""What survives kills, stops and full disks, tested with real runs."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import inference
from helpers import ROOT, Make, RunHere, main_py, names, refused
from lace_lora import errors, files
from lace_lora.config import LORA_FILE, Config, dump_config
from lace_lora.errors import DISK_OR_DRIVE, UserError
from lace_lora.sdxl import lora_weights
from lace_lora.training import checkpoint
from training_helpers import StopAt, train_here

KILLS = int(os.environ.get("KILLS", "2"))  # `make torture` asks for 100
slow = pytest.mark.skipif(KILLS < 50, reason="takes minutes: make torture")
Start = Callable[..., psutil.Popen]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts `main.py --mode train`; what it prints goes to `output.txt`."""
    started: list[psutil.Popen] = []

    def begin(config: Config) -> psutil.Popen:
        path = tmp_path / "my.yaml"
        path.write_text(dump_config(config))
        command = [sys.executable, str(ROOT / "main.py"), "--mode", "train", "--config", str(path)]
        with open(tmp_path / "output.txt", "w") as output:
            started.append(psutil.Popen(command, stdout=output, stderr=output, start_new_session=True))
        return started[-1]

    yield begin
    for process in started:
        if process.is_running():
            kill_all(process_tree(process))


def process_tree(process: psutil.Popen) -> list[psutil.Process]:
    """A process and all below it, the deepest first."""
    return [*reversed(process.children(recursive=True)), process]


def signal_all(tree: list[psutil.Process], number: signal.Signals) -> None:
    for member in tree:
        with contextlib.suppress(ProcessLookupError):
            os.kill(member.pid, number)


def kill_all(tree: list[psutil.Process]) -> None:
    """kill -9 for all at one instant, so that none can react to another's end."""
    signal_all(tree, signal.SIGSTOP)
    signal_all(tree, signal.SIGKILL)
    psutil.wait_procs(tree, timeout=20)


def kill_during_write(tree: list[psutil.Process], folder: Path) -> None:
    """The same while a checkpoint is being written, which is short: checked while all processes are suspended."""

    def is_writing() -> bool:
        return any(name.startswith(".checkpoint-") for name in os.listdir(folder))

    while True:
        while not is_writing():
            assert tree[-1].is_running(), "it ended before it could be killed"
        signal_all(tree, signal.SIGSTOP)
        wait_for(lambda: all(member.status() == psutil.STATUS_STOPPED for member in tree))
        if is_writing():
            break
        signal_all(tree, signal.SIGCONT)
    kill_all(tree)


def latest_step(folder: Path) -> int:
    """The step of the newest checkpoint by name."""
    return max((step for _, step in checkpoint.checkpoints(folder)), default=0)


def wait_for(condition: Callable[[], bool], process: psutil.Popen | None = None, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, "the process ended before it happened"
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


def test_a_run_killed_at_any_moment_equals_an_uninterrupted_one(settings: Make, start: Start, tmp_path: Path) -> None:
    options = {"max_train_steps": 6 * KILLS + 12, "checkpointing_steps": 1}
    train_here(settings(lora_output_dir=str(tmp_path / "uninterrupted"), **options))

    killed, folder, output = settings(**options), tmp_path / "lora", tmp_path / "output.txt"
    chance, resumed = random.Random(KILLS), []
    for index in range(KILLS):
        before = latest_step(folder)
        process = start(killed)
        wait_for(lambda before=before: latest_step(folder) > before, process)  # type: ignore[misc]
        tree = process_tree(process)
        if index % 2:
            kill_during_write(tree, folder)
            assert any(folder.glob(".checkpoint-*"))
        else:
            time.sleep(chance.uniform(0, 0.2))
            assert process.poll() is None, "it ended before it could be killed"
            kill_all(tree)
        reasons = [checkpoint.verify(path) for path, _ in checkpoint.checkpoints(folder)]
        assert reasons, "no checkpoint is left"
        assert not any(reasons), "half a checkpoint has a final name"
        resumed.append(resumed_from(output))
    assert start(killed).wait(3600) == 0, output.read_text()
    resumed.append(resumed_from(output))
    assert resumed[0] == 0
    assert all(earlier < later for earlier, later in zip(resumed[:-1], resumed[1:], strict=True)), resumed
    print(f"{KILLS} kills, {KILLS // 2} of them amid the writing of a checkpoint; resumed from {resumed}")
    for name in (LORA_FILE, f"checkpoint-{killed.max_train_steps}/training_state.safetensors"):
        expected, actual = load_file(tmp_path / "uninterrupted" / name), load_file(folder / name)
        assert expected.keys() == actual.keys()
        assert all(torch.equal(expected[key], actual[key]) for key in expected), name
    rows = [(tmp_path / name / "metrics.csv").read_text().splitlines() for name in ("uninterrupted", "lora")]
    assert [line.rpartition(",")[0] for line in rows[0]] == [line.rpartition(",")[0] for line in rows[1]]
    assert not list(folder.glob(".*")), "leftovers of dead writes"


def resumed_from(output: Path) -> int:
    lines = [line for line in output.read_text().splitlines() if "resuming from" in line]
    return int(lines[0].rpartition("-")[2]) if lines else 0


# The others are shown in tests/test_process.py, with processes that take no seconds to start.
@pytest.mark.parametrize(
    ("recipient", "number"),
    [
        ("main", signal.SIGINT),
        *(
            pytest.param(recipient, number, marks=slow)
            for recipient in ("main", "group", "launcher")
            for number in (signal.SIGINT, signal.SIGTERM)
            if (recipient, number) != ("main", signal.SIGINT)
        ),
    ],
)
def test_a_stop_saves_and_the_same_command_resumes(
    recipient: str, number: signal.Signals, settings: Make, start: Start, tmp_path: Path
) -> None:
    step = stop(recipient, number, settings(max_train_steps=100_000, checkpointing_steps=5), start, tmp_path)
    assert start(settings(max_train_steps=step + 1, checkpointing_steps=5)).wait(120) == 0
    assert resumed_from(tmp_path / "output.txt") == step


@pytest.mark.parametrize(
    ("recipient", "number"), [("launcher", signal.SIGTERM), pytest.param("main", signal.SIGINT, marks=slow)]
)
def test_a_stop_of_two_processes_saves(
    recipient: str, number: signal.Signals, settings: Make, start: Start, two_processes: str, tmp_path: Path
) -> None:
    config = settings(max_train_steps=100_000, checkpointing_steps=5, accelerate_config=two_processes)
    stop(recipient, number, config, start, tmp_path)
    assert "one of 2 processes" in (tmp_path / "output.txt").read_text()


def stop(recipient: str, number: signal.Signals, config: Config, start: Start, tmp_path: Path) -> int:
    """Stop a training after some steps, check all that a stop promises, and return the step it was saved at."""
    process = start(config)
    wait_for(lambda: latest_step(tmp_path / "lora") >= 5, process)
    tree = process.children(recursive=True)
    began = time.monotonic()
    if recipient == "group":
        os.killpg(process.pid, number)
    else:
        launcher = next(child for child in process.children() if "lace_lora.process" in child.cmdline())
        os.kill(process.pid if recipient == "main" else launcher.pid, number)
    assert process.wait(30) == 128 + number
    _, left = psutil.wait_procs(tree, timeout=5)
    assert not left
    assert time.monotonic() - began < 10
    output = (tmp_path / "output.txt").read_text()
    step = latest_step(tmp_path / "lora")
    assert output.splitlines()[-1] == f"stopped at step {step}; run the same command again to resume"
    assert "Traceback" not in output
    [answer] = [line for line in output.splitlines() if line.startswith("stopping: saving step ")]
    assert answer.endswith("; press Ctrl-C again to leave now, without saving")
    assert checkpoint.verify(tmp_path / "lora" / f"checkpoint-{step}") == ""
    return step


@slow
def test_a_stop_of_two_processes_waits_for_a_slow_disk(
    settings: Make, start: Start, two_processes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # torch kills the remaining processes thirty seconds after the first process of a job has exited with an error.
    code = tmp_path / "slow" / "sitecustomize.py"
    code.parent.mkdir()
    code.write_text(
        "import os, time\nreal = os.replace\n"
        "def replace(source, target):\n"
        "    time.sleep(40 * (os.path.basename(str(target)) == 'checkpoint-5'))\n"
        "    real(source, target)\n"
        "os.replace = replace\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(code.parent))
    process = start(settings(max_train_steps=100_000, checkpointing_steps=5, accelerate_config=two_processes))
    wait_for(lambda: any((tmp_path / "lora").glob(".checkpoint-5.*")), process)
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 130
    step = latest_step(tmp_path / "lora")
    assert (tmp_path / "output.txt").read_text().splitlines()[-1].startswith(f"stopped at step {step};")
    assert checkpoint.verify(tmp_path / "lora" / f"checkpoint-{step}") == ""


@slow
def test_a_second_stop_exits_immediately_and_keeps_the_last_checkpoint(
    settings: Make, start: Start, tmp_path: Path
) -> None:
    process = start(settings(max_train_steps=100_000, checkpointing_steps=5))
    wait_for(lambda: latest_step(tmp_path / "lora") >= 5, process)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.01)
    assert process.wait(30) == 130
    assert "stopped immediately" in (tmp_path / "output.txt").read_text()
    newest, skipped = checkpoint.newest(tmp_path / "lora")
    assert newest is not None
    assert not skipped


def test_a_second_run_in_the_same_folder_is_refused_until_the_first_ends(
    settings: Make, start: Start, run_here: RunHere, tmp_path: Path
) -> None:
    process = start(settings(max_train_steps=100_000, checkpointing_steps=2))
    wait_for(lambda: latest_step(tmp_path / "lora") >= 2, process)
    code, printed = run_here("--mode", "train", "--config", str(tmp_path / "my.yaml"))
    assert code == 2
    assert f"another run is using {tmp_path / 'lora'}" in printed
    [training] = [one for one in process.children(recursive=True) if "train_lora.py" in str(one.cmdline())]
    training.suspend()  # main is killed, and the training has not noticed yet
    process.kill()
    process.wait(10)
    with pytest.raises(UserError, match="another run"), files.lock_for_one_run(tmp_path / "lora"):
        pass
    training.kill()
    psutil.wait_procs([training], timeout=10)
    with files.lock_for_one_run(tmp_path / "lora"):
        pass


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of eight megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a small disk")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path, leave: int) -> Path:
    ballast = disk / "ballast"
    with open(ballast, "wb") as file:
        file.write(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - leave))
    return ballast


def test_a_full_disk_does_not_damage_saved_checkpoints(settings: Make, small_disk: Path) -> None:
    config = settings(lora_output_dir=str(small_disk / "lora"), max_train_steps=2)
    folder = small_disk / "lora"
    train_here(config)
    before, ballast = names(folder), fill(small_disk, leave=100_000)
    with pytest.raises(OSError, match="No space left") as caught:
        train_here(settings(lora_output_dir=str(folder), max_train_steps=4), resume=folder / "checkpoint-2")
    explained = errors.explain(caught.value, "")
    assert explained is not None
    assert f"{folder}/.checkpoint-4." in str(explained), "the file that could not be written"
    assert explained.exit_code == DISK_OR_DRIVE
    assert checkpoint.newest(folder) == (folder / "checkpoint-2", [])
    assert names(folder) == before
    ballast.unlink()
    train_here(settings(lora_output_dir=str(folder), max_train_steps=4), resume=folder / "checkpoint-2")
    assert checkpoint.newest(folder) == (folder / "checkpoint-4", [])


@pytest.mark.parametrize("kind", ["lora", "local"])
def test_a_full_disk_is_reported_wherever_it_is(
    kind: str, settings: Make, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The finished LoRA on a full Drive, and a checkpoint on its way over a full local disk."""
    fill(small_disk, leave=20_000)
    if kind == "local":
        monkeypatch.setattr("tempfile.tempdir", str(small_disk))
        with pytest.raises(OSError, match=f"No space left.*{small_disk}"):  # it says which disk
            train_here(settings(max_train_steps=2))
        assert not names(tmp_path / "lora") & {"checkpoint-2", LORA_FILE}
        return
    with pytest.raises(OSError, match=f"No space left.*{LORA_FILE}"):
        lora_weights.save_lora(small_disk / LORA_FILE, {"weight": torch.zeros(10_000)}, {})
    assert names(small_disk) == {"ballast"}


# Full while the base draws, and while pictures are saved.
@pytest.mark.parametrize("leave", [20_000, 80_000])
def test_a_full_disk_leaves_no_half_picture(settings: Make, small_disk: Path, leave: int) -> None:
    ballast = fill(small_disk, leave)
    config = settings(output_dir=str(small_disk / "pictures"), lora_scale=0, save_base=True, num_images=4)
    refused(lambda: inference.run(config), "No space left on device.*free some disk space", DISK_OR_DRIVE)
    hidden = {inference.UNFINISHED, inference.BEFORE}
    drawn = names(small_disk / "pictures") - {"manifest.json", *hidden}
    wanted = {f"{kind}_output_00{index}.png" for kind in ("base", "refined") for index in range(4)}
    assert drawn < wanted
    unfinished = list((small_disk / "pictures" / inference.UNFINISHED).rglob("*.*"))
    assert all(path.suffix == ".safetensors" for path in unfinished)
    assert len([path for path in unfinished if path.name.startswith("refined")]) == (4 if leave > 50_000 else 0)
    for name in drawn:
        Image.open(small_disk / "pictures" / name).load()
    ballast.unlink()
    inference.run(config)
    assert names(small_disk / "pictures") == wanted | {
        "manifest.json", "contact_sheet.png", "gallery.html", inference.BEFORE,
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's writer
@pytest.mark.parametrize("report_to", ["none", "tensorboard"])
def test_a_folder_that_vanishes_is_a_disk_error_and_is_not_created_again(
    report_to: str, settings: Make, tmp_path: Path
) -> None:
    class Unmount(StopAt):
        @property
        def requested(self) -> bool:
            self.asked += 1
            if self.asked == 3:
                while not (tmp_path / "lora" / "checkpoint-2").exists():
                    time.sleep(0.01)  # it is written while training goes on
                (tmp_path / "lora").rename(tmp_path / "elsewhere")
            return False

    config = settings(max_train_steps=8, report_to=report_to)
    with pytest.raises(OSError, match="No such file") as caught:
        train_here(config, stop=Unmount(None))
    assert errors.explain(caught.value, "") is not None
    assert not (tmp_path / "lora").exists()
    assert checkpoint.newest(tmp_path / "elsewhere") == (tmp_path / "elsewhere" / "checkpoint-2", [])


def test_a_lost_drive_is_a_one_line_error_and_no_traceback(settings: Make, start: Start, tmp_path: Path) -> None:
    process = start(settings(max_train_steps=100_000, checkpointing_steps=30, report_to="tensorboard"))
    wait_for(lambda: any((tmp_path / "lora").glob("logs/*")), process)
    (tmp_path / "lora").rename(tmp_path / "elsewhere")
    assert process.wait(300) == 4
    output = (tmp_path / "output.txt").read_text()
    last = output.splitlines()[-1]
    assert last.startswith(f"error: {tmp_path}/lora/.checkpoint-")
    assert "could not be read or written (No such file or directory): its folder is not there: check that" in last
    assert "Traceback" not in output
    assert not (tmp_path / "lora").exists()


def test_a_training_finishes_without_what_only_watches_it(settings: Make, tmp_path: Path) -> None:
    """Nobody reads what it prints, and the variables of another launch and of a notebook are still set."""
    config = settings(max_train_steps=3, report_to="tensorboard")
    (tmp_path / "my.yaml").write_text(dump_config(config))
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "logs").write_text("a file where TensorBoard's folder should be")
    (tmp_path / "lora" / "loss.png").mkdir()
    left_over = {
        "RANK": "3", "WORLD_SIZE": "seven", "LOCAL_RANK": "1", "MASTER_ADDR": "none.invalid",
        "TORCHELASTIC_RUN_ID": "x", "ACCELERATE_USE_DEEPSPEED": "true", "OMPI_COMM_WORLD_SIZE": "4",
        "MPLBACKEND": "module://none", "COLUMNS": "0", "PYTHONIOENCODING": "ascii", "PYTHONWARNINGS": "error",
    }  # fmt: skip
    reader, writer = os.pipe()
    command = [sys.executable, str(ROOT / "main.py"), "--mode", "train", "--config", str(tmp_path / "my.yaml")]
    process = subprocess.Popen(command, stdout=writer, stderr=writer, env=os.environ | left_over)
    os.close(writer)
    os.close(reader)
    assert process.wait(120) == 0
    assert checkpoint.newest(tmp_path / "lora") == (tmp_path / "lora" / "checkpoint-3", [])
    assert {LORA_FILE, "metrics.csv"} < names(tmp_path / "lora")


CANARY = "hf_" + "Canary" * 6


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (f"pretrained_model=https://lace:{CANARY}@hub.example/model", "pretrained_model contains an access token"),
        (f"lora_path=https://models.example/1?type=x&token={CANARY[3:]}", "lora_path contains an access token"),
        (f"validation_prompt=lace {CANARY}", "validation_prompt contains an access token"),
        (f"prompt=[one, {CANARY}]", "prompt contains an access token"),
        (f"hub_token={CANARY}", "unknown key 'hub_token'; remove it, because settings are saved in files"),
        (f"--hub_token={CANARY}", "unrecognized arguments: --hub_token=***"),
        (f"rank={CANARY}", "rank is '***', not a whole number"),
        (CANARY, "'***' is not of the form key=value"),
        (f"rank=my own token is {CANARY}", "rank is 'my own token is ***'"),
    ],
)
def test_a_token_in_a_setting_is_refused_and_redacted(
    override: str, message: str, run_here: RunHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text("")
    code, printed = run_here("--mode", "train", override)
    assert code == 2
    assert message in printed
    assert CANARY not in printed
    assert names(tmp_path) == {"config.yaml"}


def test_no_secret_is_written_anywhere(
    settings: Make, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", CANARY)
    monkeypatch.setenv("HF_ENDPOINT", f"http://lace:{CANARY}@127.0.0.1:9")
    config = settings(max_train_steps=1, validation_steps=1, num_validation_images=1, report_to="tensorboard")
    process = start(config)
    lines: set[str] = set()
    while process.poll() is None:
        for member in psutil.process_iter(["cmdline"]):
            lines.add(" ".join(member.info["cmdline"] or []))
        time.sleep(0.05)
    assert process.returncode == 0, (tmp_path / "output.txt").read_text()
    drawn = main_py("--mode", "inference", "--config", str(tmp_path / "my.yaml"), "num_images=1")
    assert drawn.returncode == 0, drawn.stderr
    failed = main_py("--mode", "inference", "--config", str(tmp_path / "my.yaml"), "pretrained_model=lace/none")
    assert failed.returncode in (2, 4)
    assert CANARY not in drawn.stdout + drawn.stderr + failed.stdout + failed.stderr
    assert not [line for line in lines if CANARY in line]
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 12
    assert not [path for path in written if CANARY.encode() in path.read_bytes()]
