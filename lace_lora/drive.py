"""Google Drive in Colab: whether it is mounted, mounting it, and what the user can do when that is impossible."""

import importlib.util
import logging
import os
import sys
from pathlib import Path

from lace_lora.config import Config
from lace_lora.errors import DISK_OR_DRIVE, UserError

logger = logging.getLogger(__name__)


def ensure_mounted(config: Config) -> None:
    """Make the Drive folders of `config` reachable. Outside Colab, such folders are only a warning.

    Raises:
        UserError: Drive is not mounted and cannot be from here (exit 2), or mounting it failed (exit 4).
    """
    mount_path = config.drive_mount_path
    settings = {name: value for name, value in vars(config).items() if name != "drive_mount_path"}
    on_drive = [n for n, value in settings.items() if isinstance(value, str) and Path(value).is_relative_to(mount_path)]
    if on_drive and not in_colab() and not Path(mount_path).exists():
        advice = "set them to folders of this computer" if len(on_drive) > 1 else "set it to a folder of this computer"
        logger.warning("warning: %s on Google Drive, but this is not Colab: %s", _are(on_drive), advice)
    if not on_drive or not in_colab() or is_mounted(mount_path):
        return
    ipython = sys.modules.get("IPython")
    # google.colab.drive talks to the notebook's kernel only: not to a child of its shell, as `!python` is.
    if ipython is None or getattr(ipython.get_ipython(), "kernel", None) is None:
        raise UserError(
            f"Google Drive is not mounted at {mount_path}, and `!python` cannot mount it. Run these two lines in a "
            f"cell, then run this command again:\nfrom google.colab import drive\ndrive.mount({mount_path!r})"
        )
    from google.colab import drive

    try:
        drive.mount(mount_path)
    except (ValueError, RuntimeError, OSError) as error:
        advice = "allow the access that Colab asks for, or empty that folder, then run the same command again"
        reason = f"Google Drive could not be mounted at {mount_path} ({error})"
        raise UserError(f"{reason}: {advice}", DISK_OR_DRIVE) from error
    logger.info("Google Drive is mounted at %s", mount_path)


def _are(names: list[str]) -> str:
    return f"{', '.join(names)} {'are' if len(names) > 1 else 'is'}"


def in_colab() -> bool:
    try:
        return "COLAB_RELEASE_TAG" in os.environ or importlib.util.find_spec("google.colab") is not None
    except ModuleNotFoundError:  # no package `google` at all
        return False


def is_mounted(mount_path: str, mounts: str | Path = "/proc/mounts") -> bool:
    """Whether something is mounted at `mount_path`: by the mount table, which every process has, unlike Colab's API."""
    try:
        table = Path(mounts).read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return False
    points = (line.split(" ")[1] for line in table.splitlines() if line.count(" ") >= 2)
    # The table writes a space as \040.
    return any(point.replace("\\040", " ") == mount_path.rstrip("/") for point in points)
