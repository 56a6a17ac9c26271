"""Checkpoints are published atomically and verified."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import wait
from pathlib import Path

import pytest

from helpers import ROOT, names, snapshot
from lace_lora.training import checkpoint

CONTENT = {"weights.bin": bytes(range(256)) * 40, "state.json": b'{"step": 4}\n', "empty.bin": b""}


def write(folder: Path) -> None:
    for name, content in CONTENT.items():
        (folder / name).write_bytes(content)


def test_a_published_checkpoint_is_complete(tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    folder = checkpoint.publish(tmp_path / "lora", 4, write, keep=2)
    assert folder == tmp_path / "lora" / "checkpoint-4"
    assert names(folder) == {*CONTENT, "manifest.json"}
    assert {name: (folder / name).read_bytes() for name in CONTENT} == CONTENT
    assert checkpoint.verify(folder) == ""
    assert names(folder.parent) == {"checkpoint-4"}


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize("damage", [Path.unlink, flip_a_bit, cut_short, lengthen, zero])
@pytest.mark.parametrize("name", ["weights.bin", "state.json"])
def test_damage_of_a_file_is_found(tmp_path: Path, name: str, damage: Callable[[Path], None]) -> None:
    folder = checkpoint.publish(tmp_path, 4, write, keep=2)
    damage(folder / name)
    assert name in checkpoint.verify(folder)


@pytest.mark.parametrize(
    "content", [None, b"", b"{", b"[]", b"{}", b'{"files": 3}', b"\xff\xfe", b'{"files": {"a": 1}}']
)
def test_damage_of_the_manifest_is_found(tmp_path: Path, content: bytes | None) -> None:
    folder = checkpoint.publish(tmp_path, 4, write, keep=2)
    (folder / "manifest.json").unlink()
    if content is not None:
        (folder / "manifest.json").write_bytes(content)
    assert checkpoint.verify(folder)
    assert checkpoint.newest(tmp_path) == (None, [f"checkpoint-4: {checkpoint.verify(folder)}"])


def test_the_newest_complete_one_is_found(tmp_path: Path) -> None:
    for step in (2, 10, 9):
        checkpoint.publish(tmp_path, step, write, keep=5)
    assert checkpoint.checkpoints(tmp_path) == [(tmp_path / f"checkpoint-{step}", step) for step in (2, 9, 10)]
    assert checkpoint.newest(tmp_path) == (tmp_path / "checkpoint-10", [])
    flip_a_bit(tmp_path / "checkpoint-10" / "weights.bin")
    assert checkpoint.newest(tmp_path) == (tmp_path / "checkpoint-9", ["checkpoint-10: weights.bin is damaged"])


def test_only_checkpoint_folders_count(tmp_path: Path) -> None:
    for name in ("checkpoint-x", "checkpoint-", "my-checkpoint-3", "checkpoint-3.old", ".checkpoint-5.1.tmp"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-7").write_text("a file")
    assert checkpoint.checkpoints(tmp_path) == []
    assert checkpoint.newest(tmp_path / "missing") == (None, [])


@pytest.mark.parametrize(("keep", "left"), [(1, {8}), (2, {6, 8}), (3, {4, 6, 8}), (9, {2, 4, 6, 8})])
def test_the_oldest_beyond_the_limit_are_deleted(tmp_path: Path, keep: int, left: set[int]) -> None:
    for step in (2, 4, 6, 8):
        checkpoint.publish(tmp_path, step, write, keep)
    assert names(tmp_path) == {f"checkpoint-{step}" for step in left}


def test_the_named_one_is_neither_deleted_nor_counted(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        checkpoint.publish(tmp_path, step, write, keep=1, spared=tmp_path / "x" / ".." / "checkpoint-2")
    assert [step for _, step in checkpoint.checkpoints(tmp_path)] == [2, 4]


def test_a_new_one_is_never_dropped_for_later_damaged_ones(tmp_path: Path) -> None:
    for step in (6, 8):
        zero(checkpoint.publish(tmp_path, step, write, keep=2) / "weights.bin")
    checkpoint.publish(tmp_path, 4, write, keep=1)
    assert checkpoint.newest(tmp_path)[0] == tmp_path / "checkpoint-4"


def test_one_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    zero(checkpoint.publish(tmp_path, 4, write, keep=2) / "weights.bin")
    folder = checkpoint.publish(tmp_path, 4, write, keep=2)
    assert checkpoint.verify(folder) == ""
    assert names(tmp_path) == {"checkpoint-4"}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), RuntimeError("cuda")])
def test_a_writer_that_fails_leaves_everything_as_it_was(tmp_path: Path, error: BaseException) -> None:
    def fail(folder: Path) -> None:
        (folder / "weights.bin").write_bytes(b"half")
        raise error

    published = checkpoint.publish(tmp_path, 4, write, keep=1)
    before = snapshot(published)
    for step in (4, 6):
        with pytest.raises(type(error)):
            checkpoint.publish(tmp_path, step, fail, keep=1)
    assert snapshot(published) == before
    assert names(tmp_path) == {"checkpoint-4"}


# Where a write can be killed: the n-th call of one of these, in a process that replaces an older checkpoint-4.
KILLS = [("shutil", "copyfile", 1), ("shutil", "copyfile", 3), ("os", "replace", 1), ("os", "replace", 2)]


@pytest.mark.parametrize(("module", "function", "call"), KILLS)
def test_a_write_that_is_killed_leaves_a_complete_checkpoint_or_none(
    module: str, function: str, call: int, tmp_path: Path
) -> None:
    older = checkpoint.publish(tmp_path, 4, lambda folder: put(folder / "weights.bin", b"older"), keep=2)
    code = f"""
import os, shutil, sys
sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}, {str(ROOT / "tests")!r}]
import test_checkpoint
from lace_lora.training import checkpoint
from pathlib import Path
real, calls = {module}.{function}, []
def die(source, target):
    calls.append(target)
    if len(calls) == {call}:
        if {function!r} == "copyfile":
            Path(target).write_bytes(Path(source).read_bytes()[:10])
        os.kill(os.getpid(), 9)
    return real(source, target)
{module}.{function} = die
checkpoint.publish(Path({str(tmp_path)!r}), 4, test_checkpoint.write, 2)
"""
    killed = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert all(name == older.name or name.startswith(".checkpoint-4.") for name in names(tmp_path))
    checkpoint.clean_up(tmp_path)
    assert names(tmp_path) == {older.name}
    assert checkpoint.verify(older) == ""
    assert (older / "weights.bin").read_bytes() == b"older"
    checkpoint.publish(tmp_path, 6, write, keep=2)
    assert names(tmp_path) == {older.name, "checkpoint-6"}


def put(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def test_a_missing_output_folder_is_not_created_again(tmp_path: Path) -> None:
    (tmp_path / "drive").mkdir()
    checkpoint.publish(tmp_path / "drive", 4, write, keep=2)
    (tmp_path / "drive").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError):
        checkpoint.publish(tmp_path / "drive", 6, write, keep=2)
    assert names(tmp_path) == {"elsewhere"}


def test_a_folder_that_vanishes_during_verification_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verify = checkpoint.verify

    def unmount(folder: Path) -> str:
        (tmp_path / "drive").rename(tmp_path / "elsewhere")
        return verify(folder)

    (tmp_path / "drive").mkdir()
    monkeypatch.setattr(checkpoint, "verify", unmount)
    with pytest.raises(FileNotFoundError):
        checkpoint.publish(tmp_path / "drive", 4, write, keep=2)
    assert verify(tmp_path / "elsewhere" / "checkpoint-4") == ""


def test_corruption_while_copying_to_drive_is_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def copy(source: Path, target: Path) -> None:
        Path(target).write_bytes(Path(source).read_bytes())
        if Path(target).name == "weights.bin":
            flip_a_bit(Path(target))

    monkeypatch.setattr(checkpoint.shutil, "copyfile", copy)
    with pytest.raises(OSError, match="weights.bin is damaged"):
        checkpoint.publish(tmp_path, 4, write, keep=2)


def test_everything_is_flushed_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, os.replace

    def note_flush(descriptor: int) -> None:
        order.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def note_name(source: Path, target: Path) -> None:
        order.append(f"named {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(checkpoint.os, "fsync", note_flush)
    monkeypatch.setattr(checkpoint.os, "replace", note_name)
    checkpoint.publish(tmp_path, 4, write, keep=2)
    folder = f".checkpoint-4.{os.getpid()}.tmp"
    assert order == [*sorted(CONTENT), "manifest.json", folder, "named checkpoint-4", tmp_path.name]


def test_clean_up_removes_only_this_programs_files(tmp_path: Path) -> None:
    for name in (".checkpoint-4.77.tmp", ".checkpoint-4.77.old", ".checkpoint-mine", "checkpoint-4", ".hidden"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    (tmp_path / ".metrics.csv.77.tmp").write_text("half")
    (tmp_path / ".mine.tmp").write_text("mine")
    checkpoint.clean_up(tmp_path)
    assert names(tmp_path) == {".checkpoint-mine", "checkpoint-4", ".hidden", ".mine.tmp"}


def test_a_disk_that_loses_bytes_is_a_disk_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def replace(source: Path, target: Path) -> None:
        os.rename(source, target)
        cut_short(Path(target) / "weights.bin")

    monkeypatch.setattr(checkpoint.os, "replace", replace)
    with pytest.raises(OSError, match="verification after writing failed") as caught:
        checkpoint.publish(tmp_path, 4, write, keep=2)
    assert caught.value.errno
    assert caught.value.filename == str(tmp_path / "checkpoint-4")


def test_the_manifest_names_every_file_with_its_size(tmp_path: Path) -> None:
    folder = checkpoint.publish(tmp_path, 4, write, keep=2)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["step"] == 4
    assert {name: seal["size"] for name, seal in manifest["files"].items()} == {n: len(c) for n, c in CONTENT.items()}


def test_a_publisher_writes_in_the_background_and_raises_an_error_at_the_next_call(tmp_path: Path) -> None:
    publisher, go_on = checkpoint.Publisher(), threading.Event()

    def slowly(folder: Path) -> None:
        assert go_on.wait(10)
        write(folder)

    publisher.publish(tmp_path, 4, slowly, keep=2)
    publisher.poll()  # still writing
    assert checkpoint.checkpoints(tmp_path) == []
    go_on.set()
    publisher.wait()
    assert checkpoint.verify(tmp_path / "checkpoint-4") == ""

    def fail(_: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    publisher.publish(tmp_path, 6, fail, keep=2)
    assert publisher.pending
    wait([publisher.pending])
    with pytest.raises(OSError, match="No space left"):
        publisher.poll()
    publisher.publish(tmp_path, 6, fail, keep=2)
    with pytest.raises(OSError, match="No space left"):
        publisher.publish(tmp_path, 8, write, keep=2)
    publisher.publish(tmp_path, 8, write, keep=2)
    publisher.wait()
    publisher.wait()
    assert [step for _, step in checkpoint.checkpoints(tmp_path)] == [4, 8]
