"""What takes long to calculate and comes out the same in the next run, in files in the user's cache folder.

Nothing depends on these files: a damaged one is made anew, and a folder that cannot be written to costs time only.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from lace_lora.files import write_atomically

logger = logging.getLogger("train_lora")

MOST_BYTES = 4 * 2**30  # of all files together; the least recently used ones go


def remembered(key: dict[str, Any], make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What `make` gives, from an earlier run if that had an equal key.

    Args:
        key: all that the tensors depend on, as JSON takes it.
    """
    name = _digest(json.dumps(key, sort_keys=True).encode())
    for file in folder().glob(f"{name}-*.safetensors"):
        try:
            content = file.read_bytes()
        except OSError as error:
            logger.warning("%s cannot be read (%s): calculated anew", file, error.strerror)
            continue
        if file.name == _file_name(name, content):
            with suppress(OSError):
                os.utime(file)
            return load(content)
        logger.warning("%s is damaged: calculated anew", file)
    tensors = make()
    content = save(tensors)
    try:
        folder().mkdir(mode=0o700, parents=True, exist_ok=True)
        for damaged in folder().glob(f"{name}-*.safetensors"):
            damaged.unlink(missing_ok=True)
        write_atomically(folder() / _file_name(name, content), content)
        _drop_oldest()
    except OSError as error:
        logger.warning("%s cannot keep this for the next run (%s)", folder(), error.strerror)
    return tensors


def _file_name(name: str, content: bytes) -> str:
    return f"{name}-{_digest(content)}.safetensors"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _drop_oldest() -> None:
    """Leftovers of writes that were killed go with the rest, by their age."""
    total = 0
    for file in sorted(folder().iterdir(), key=lambda path: path.stat().st_mtime, reverse=True):
        total += file.stat().st_size
        if total > MOST_BYTES:
            file.unlink(missing_ok=True)


def folder() -> Path:
    """Where the XDG base directory specification puts it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser(), "lace-lora")


def stamps(place: Path) -> list[Any]:
    """Name, size and time of a file, or of each in a folder: they tell that its content is the same, without a look."""
    files = [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file())
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
