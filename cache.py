"""What takes long to calculate and comes out the same in the next run, in files in the user's cache folder.

Nothing depends on these files: a damaged one is made anew, and a folder that cannot be written to costs time only.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from data_utils import write_atomically

logger = logging.getLogger("train_lora")

MOST_FILES = 8  # the least recently used one goes


def remembered(key: dict[str, Any], make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What `make` gives, from an earlier run if that had an equal key.

    Args:
        key: all that the tensors depend on, as JSON takes it.
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    file = folder() / f"{digest}.safetensors"
    try:
        tensors = load_file(file)
        os.utime(file)
        return tensors
    except FileNotFoundError:
        pass
    except (OSError, SafetensorError) as error:
        logger.warning("%s cannot be used (%s): calculated anew", file, error)
    tensors = make()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, save(tensors))
        by_age = sorted(file.parent.glob("*.safetensors"), key=lambda path: path.stat().st_mtime)
        for old in by_age[:-MOST_FILES]:
            old.unlink()
    except OSError as error:
        logger.warning("%s cannot be kept for the next run (%s)", file, error.strerror)
    return tensors


def folder() -> Path:
    """Where the XDG base directory specification puts it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser(), "lace-lora")


def stamps(place: Path) -> list[Any]:
    """Name, size and time of a file, or of each in a folder: they tell that its content is the same, without a look."""
    files = [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file())
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
