"""Checkpoints: folders that are published atomically and verified.

`publish` lets the caller write files on a local disk, notes their sizes and SHA-256 sums in a manifest, copies all
beside their final place, flushes them, and gives the folder its name by a rename. `verify` reads everything back and
compares it with what was written locally, so that bytes lost on the way to Drive are detected.
"""

import errno
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from lace_lora.files import file_sha256, json_digest, name_in_errors, remove_unfinished

MANIFEST = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_DISPLACED = re.compile(r"\.(checkpoint-\d+)\.\d+\.old")


def publish(output_dir: Path, step: int, write: Callable[[Path], None], keep: int, spared: Path | None = None) -> Path:
    """Write `output_dir/checkpoint-<step>` through `write(folder)`, then drop the oldest beyond `keep`.

    `spared` is never dropped, nor counted: the checkpoint that the user has named.

    Raises:
        OSError: a disk is full or gone; an older checkpoint of the same name is untouched.
    """
    folder = output_dir / f"checkpoint-{step}"
    temporary = output_dir / f".{folder.name}.{os.getpid()}.tmp"
    # One for each output folder, so that the next write removes what a killed one left in it.
    local = Path(tempfile.gettempdir(), f"lace-lora-{json_digest(str(output_dir.absolute()))}")
    for leftover in (temporary, local):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        local.mkdir(mode=0o700)
        with name_in_errors(local):
            write(local)
        written = sorted(local.iterdir())
        files = {path.name: {"size": path.stat().st_size, "sha256": file_sha256(path)} for path in written}
        temporary.mkdir()  # not its parents: a Drive that is gone must not be replaced by a folder of that name
        manifest = temporary / MANIFEST
        with name_in_errors(folder):
            for path in written:
                shutil.copyfile(path, temporary / path.name)
                _flush(temporary / path.name)
            manifest.write_text(json.dumps({"step": step, "files": files}, indent=2) + "\n")
            _flush(manifest)
            _flush(temporary)
        if folder.exists():  # one of the same step: a rename cannot replace a full folder
            os.replace(folder, output_dir / f".{folder.name}.{os.getpid()}.old")
        os.replace(temporary, folder)
        _flush(output_dir)
    finally:
        for unfinished in (temporary, local):
            shutil.rmtree(unfinished, ignore_errors=True)
    if reason := verify(folder):
        folder.stat()  # raises if the disk is gone
        raise OSError(errno.EIO, f"verification after writing failed: {reason}", str(folder))
    clean_up(output_dir)
    left = {path.resolve() for path in (folder, spared) if path}
    others = [path for path, _ in checkpoints(output_dir) if path.resolve() not in left]  # some newer: damaged ones
    for path in others[: max(0, len(others) + 1 - keep)]:
        # Renamed first, so that a killed removal does not leave half a checkpoint.
        leaving = output_dir / f".{path.name}.{os.getpid()}.tmp"
        os.replace(path, leaving)
        shutil.rmtree(leaving)
    return folder


class Publisher:
    """Publishes in the background, one checkpoint at a time. Its OSError is raised by the next `wait` or `poll`."""

    def __init__(self) -> None:
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.pending: Future[Path] | None = None
        self.seconds = 0.0  # that the last one took

    def publish(
        self, output_dir: Path, step: int, write: Callable[[Path], None], keep: int, spared: Path | None = None
    ) -> None:
        """Start; what `write` reads must not change until `wait` returns."""
        self.wait()

        def timed() -> Path:
            began = time.monotonic()
            folder = publish(output_dir, step, write, keep, spared)
            self.seconds = time.monotonic() - began
            return folder

        self.pending = self.thread.submit(timed)

    def wait(self) -> None:
        if self.pending:
            ended, self.pending = self.pending, None
            ended.result()

    def poll(self) -> None:
        """`wait`, but only if the writing has ended."""
        if self.pending and self.pending.done():
            self.wait()


def _flush(path: Path) -> None:
    """Make a file's bytes, or a folder's names, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some drives do not support it for a folder
        if path.is_file() or error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def verify(folder: Path) -> str:
    """Why the checkpoint is not complete, or an empty string if every byte is as it was written."""
    if not folder.is_dir():
        return "no such folder"
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        for name, written in manifest["files"].items():
            path = folder / Path(name).name
            if path.stat().st_size != written["size"]:
                return f"{name} has {path.stat().st_size} bytes instead of {written['size']}"
            if file_sha256(path) != written["sha256"]:
                return f"{name} is damaged"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    return ""


def checkpoints(output_dir: Path) -> list[tuple[Path, int]]:
    """All checkpoint folders with their steps, oldest first, complete or not."""
    if not output_dir.is_dir():
        return []
    found = [(path, _NAME.fullmatch(path.name)) for path in output_dir.iterdir() if path.is_dir()]
    return sorted(((path, int(match[1])) for path, match in found if match), key=lambda item: item[1])


def newest(output_dir: Path, origin: str = "") -> tuple[Path | None, list[str]]:
    """The checkpoint with the most steps that verifies, and a line for each that is skipped, with the reason.

    With an `origin`, see `origin_of`, only checkpoints of runs that began there.
    """
    skipped: list[str] = []
    for path, _ in reversed(checkpoints(output_dir)):
        with suppress(OSError, ValueError, AttributeError):  # damage, which `verify` finds
            if origin and read_state(path).get("origin") != origin:
                continue
        if not (reason := verify(path)):
            return path, skipped
        skipped.append(f"{path.name}: {reason}")
    return None, skipped


def named(output_dir: Path, setting: str | None) -> Path | None:
    """The folder that `resume_from_checkpoint` names; None where it names none. A name alone is in the output folder.

    As in diffusers' scripts, but those look in the output folder whatever the path is.
    """
    if not setting or setting == "latest":
        return None
    return (output_dir if _NAME.fullmatch(setting.rstrip("/")) else Path()) / setting


def read_state(folder: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint that verifies: its step, fingerprint and origin, and numbers of the optimizer."""
    return json.loads((folder / "state.json").read_text())


def origin_of(folder: Path) -> str:
    """What checkpoints of runs that begin at this one record as their origin: the SHA-256 of its manifest."""
    return file_sha256(folder / MANIFEST)


def clean_up(output_dir: Path) -> None:
    """Remove temporary files of killed writes, and restore a checkpoint that was being replaced.

    Only call this while holding the folder's lock: another run's unfinished writes look the same.
    """
    for path in output_dir.glob(".checkpoint-*.old"):
        if (match := _DISPLACED.fullmatch(path.name)) and not (output_dir / match[1]).exists():
            os.replace(path, output_dir / match[1])
        elif match:
            shutil.rmtree(path, ignore_errors=True)
    remove_unfinished(output_dir)
