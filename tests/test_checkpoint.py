"""A checkpoint is whole and proven, or it is not there."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import checkpoint
from pictures import ROOT, names, snapshot

CONTENT = {"weights.bin": bytes(range(256)) * 40, "state.json": b'{"step": 4}\n', "empty.bin": b""}


def write(folder: Path) -> None:
    for name, content in CONTENT.items():
        (folder / name).write_bytes(content)


def test_a_published_checkpoint_is_whole(tmp_path: Path) -> None:
    folder = checkpoint.publish(tmp_path / "new" / "lora", 4, write, keep=2)
    assert folder == tmp_path / "new" / "lora" / "checkpoint-4"
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


def test_the_newest_whole_one_is_found(tmp_path: Path) -> None:
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
def test_the_oldest_beyond_the_limit_go(tmp_path: Path, keep: int, left: set[int]) -> None:
    for step in (2, 4, 6, 8):
        checkpoint.publish(tmp_path, step, write, keep)
    assert names(tmp_path) == {f"checkpoint-{step}" for step in left}


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

    kept = checkpoint.publish(tmp_path, 4, write, keep=1)
    before = snapshot(kept)
    for step in (4, 6):
        with pytest.raises(type(error)):
            checkpoint.publish(tmp_path, step, fail, keep=1)
    assert snapshot(kept) == before
    assert names(tmp_path) == {"checkpoint-4"}


def test_a_writer_that_is_killed_leaves_nothing_under_the_final_name(tmp_path: Path) -> None:
    code = (
        f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); import checkpoint; from pathlib import Path\n"
        "def die(folder): (folder / 'weights.bin').write_bytes(b'half'); os.kill(os.getpid(), 9)\n"
        f"checkpoint.publish(Path({str(tmp_path)!r}), 4, die, 2)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    [left] = names(tmp_path)
    assert re.fullmatch(r"\.checkpoint-4\..*", left)
    assert checkpoint.newest(tmp_path) == (None, [])
    checkpoint.publish(tmp_path, 6, write, keep=2)
    assert names(tmp_path) == {"checkpoint-6"}


def test_sweep_takes_only_what_is_ours(tmp_path: Path) -> None:
    for name in (".checkpoint-4.77.tmp", ".checkpoint-4.77.old", ".checkpoint-mine", "checkpoint-4", ".hidden"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    checkpoint.sweep(tmp_path)
    assert names(tmp_path) == {".checkpoint-mine", "checkpoint-4", ".hidden"}


def test_a_disk_that_loses_bytes_is_a_disk_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def replace(source: Path, target: Path) -> None:
        os.rename(source, target)
        cut_short(Path(target) / "weights.bin")

    monkeypatch.setattr(checkpoint.os, "replace", replace)
    with pytest.raises(OSError, match="did not read back") as caught:
        checkpoint.publish(tmp_path, 4, write, keep=2)
    assert caught.value.errno
    assert caught.value.filename == str(tmp_path / "checkpoint-4")


def test_the_manifest_names_every_file_with_its_size(tmp_path: Path) -> None:
    folder = checkpoint.publish(tmp_path, 4, write, keep=2)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["step"] == 4
    assert {name: seal["size"] for name, seal in manifest["files"].items()} == {n: len(c) for n, c in CONTENT.items()}
