"""Tensors that take long to compute and are the same in the next run, as files in the user's cache folder.

Nothing depends on these files: a damaged one is replaced, and without write access the next run only takes longer.
"""

import hashlib
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from lace_lora.files import json_digest, write_atomically

logger = logging.getLogger("train_lora")

MAX_BYTES = 4 * 2**30  # of all files together; beyond that the least recently used ones are deleted


def cached(key: dict[str, Any], make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors that `make` returns, from the file of an earlier run if that had an equal key.

    The key is all that the tensors depend on, in types that JSON has.
    """
    folder = Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"), "lace-lora")
    if str(folder).startswith("~"):
        logger.warning("no cache, because your home folder is not known: the next run has to encode again")
        return make()
    name = json_digest(key, length=32)
    try:
        for file in folder.glob(f"{name}-*.safetensors"):
            content = file.read_bytes()
            if file.name == _file_name(name, content):
                with suppress(OSError):
                    os.utime(file)
                return load(content)
            logger.warning("%s is damaged: computing it again", file)
    except OSError as error:
        logger.warning("%s cannot be read (%s): computing it again", error.filename or folder, error.strerror)
    tensors = make()
    content = save(tensors)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for damaged in folder.glob(f"{name}-*.safetensors"):
            damaged.unlink(missing_ok=True)
        write_atomically(folder / _file_name(name, content), content)
        total = 0
        # All files: what a killed write left behind goes too, when it is the oldest.
        for file in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True):
            total += file.stat().st_size
            if total > MAX_BYTES:
                file.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("cannot write to the cache %s (%s): the next run has to encode again", folder, error.strerror)
    return tensors


def _file_name(name: str, content: bytes) -> str:
    return f"{name}-{hashlib.sha256(content).hexdigest()[:32]}.safetensors"


def stamps(path: Path) -> list[Any]:
    """Name, size and time of a file, or of each in a folder: if they are equal, so is the content, most likely."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
