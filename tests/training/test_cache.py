"""What is cached from run to run, and that nothing depends on it."""

import logging
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch

from lace_lora.training import cache


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "lace-lora"


class Counted:
    """Makes another tensor each time."""

    made = 0

    def __call__(self) -> dict[str, torch.Tensor]:
        self.made += 1
        return {"value": torch.tensor(float(self.made))}


def test_cache_hit_and_cache_miss(own_folder: Path) -> None:
    make = Counted()
    keys: list[dict[str, Any]] = [{"a": 1, "b": 3}, {"b": 3, "a": 1}, {"a": 2, "b": 3}, {"a": 1, "b": 3}]
    assert [float(cache.cached(key, make)["value"]) for key in keys] == [1, 1, 2, 1]
    assert len(list(own_folder.iterdir())) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-2]),
        lambda path: path.write_bytes(path.read_bytes()[:-1] + b"!"),
        lambda path: path.write_text("x"),
    ],
)
def test_a_damaged_file_is_replaced(own_folder: Path, caplog: pytest.LogCaptureFixture, damage: object) -> None:
    make = Counted()
    cache.cached({}, make)
    [file] = own_folder.iterdir()
    damage(file)  # type: ignore[operator]
    assert float(cache.cached({}, make)["value"]) == 2
    assert str(file) in caplog.text
    assert float(cache.cached({}, make)["value"]) == 2
    assert len(list(own_folder.iterdir())) == 1


def test_a_folder_without_write_access_gives_a_warning(own_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    own_folder.write_text("a file where the folder should be")
    make = Counted()
    with caplog.at_level(logging.WARNING):
        assert [float(cache.cached({}, make)["value"]) for _ in range(2)] == [1, 2]
    assert "cannot write to the cache" in caplog.text


def test_the_least_recently_used_files_are_deleted(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = Counted()
    cache.cached({"number": 0}, make)
    [file] = own_folder.iterdir()
    monkeypatch.setattr(cache, "MAX_BYTES", 4 * file.stat().st_size)
    killed = own_folder / ".killed.1.tmp"
    killed.write_bytes(b"half of one")
    os.utime(killed, (0, 0))
    for number in range(1, 4):
        for path in own_folder.iterdir():  # as if some time had passed
            at = path.stat().st_mtime - 10
            os.utime(path, (at, at))
        cache.cached({"number": number}, make)
    cache.cached({"number": 0}, make)
    cache.cached({"number": "new"}, make)
    assert len(list(own_folder.iterdir())) == 4
    assert not killed.exists()
    assert float(cache.cached({"number": 0}, make)["value"]) == 1
    assert float(cache.cached({"number": 1}, make)["value"]) == 6


def test_other_users_of_the_machine_cannot_read_the_folder(own_folder: Path) -> None:
    cache.cached({}, Counted())
    assert stat.S_IMODE(own_folder.stat().st_mode) == 0o700


def test_stamps_change_with_the_file(tmp_path: Path) -> None:
    file = tmp_path / "weights" / "deep" / "model.safetensors"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"one")
    before = cache.stamps(tmp_path / "weights")
    assert before == cache.stamps(tmp_path / "weights") != []
    at = file.stat()[stat.ST_MTIME] + 5
    os.utime(file, (at, at))
    assert before != cache.stamps(tmp_path / "weights")
    assert cache.stamps(file) == cache.stamps(file.parent)


@pytest.mark.parametrize("cannot", ["find", "list", "read"])
def test_a_cache_that_cannot_be_had_is_a_warning(
    cannot: str, own_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make = Counted()
    cache.cached({}, make)
    [file] = own_folder.iterdir()
    if cannot == "find":  # a user without an entry, and no HOME
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.delenv("HOME")
        monkeypatch.setattr("os.getuid", lambda: 2**31 - 7)
        monkeypatch.chdir(own_folder)
    elif cannot == "list":
        monkeypatch.setenv("XDG_CACHE_HOME", str(file.parent / ("x" * 300)))
    else:
        file.unlink()
        file.mkdir()
    assert float(cache.cached({}, make)["value"]) == 2
    assert "again" in caplog.text
    assert [path.name for path in own_folder.iterdir()] == [file.name]
