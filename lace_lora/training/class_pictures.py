"""Prior preservation's class pictures: those that exist, and those that the base model has to draw.

Ruiz et al. 2022, "DreamBooth", section 3.3: training on them too keeps what the class prompt draws.
"""

import itertools
import logging
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from lace_lora.config import CLASS_PICTURE, IMAGE_EXTENSIONS, Config
from lace_lora.errors import UserError
from lace_lora.files import json_digest
from lace_lora.pictures import checking, image_files

logger = logging.getLogger(__name__)

_DRAWN = re.compile(r"class_[0-9a-f]{8}_\d{4,}\.png")


def folder_of(config: Config) -> Path:
    return Path(config.class_data_dir or Path(config.lora_output_dir, "class_images"))


def existing(config: Config) -> dict[Path, str]:
    """The good class pictures, each with its SHA-256, `num_class_images` at most; none drawn with other settings."""
    folder = folder_of(config)
    if config.class_data_dir and not folder.is_dir():
        raise UserError(f"class_data_dir: {folder} is not a folder: create it, or leave the key empty")
    if not folder.is_dir():
        return {}
    found = sorted(image_files.named_as_pictures(folder, IMAGE_EXTENSIONS), key=_is_drawn)  # the user's own first
    usable = [path for path in found if not _is_drawn(path) or path.name.startswith(_prefix(config))]
    pictures = checking.check_pictures(usable, 1, image_files.formats_of(IMAGE_EXTENSIONS))
    for picture in pictures:
        if not picture.used:
            logger.warning("class picture %s is skipped: %s", picture.path, picture.reason)
    good = [picture for picture in pictures if picture.used][: config.num_class_images]
    return {picture.path: picture.sha256 for picture in good}


def to_draw(config: Config, existing: Collection[Path]) -> dict[Path, int]:
    """Files of the missing pictures, each with the number that its seed comes from.

    Called with the settings as the user wrote them: their digest is in the names, and the training process has paths in
    place of model names.
    """
    numbered = ((folder_of(config) / f"{_prefix(config)}{number:04d}.png", number) for number in itertools.count())
    missing = ((path, number) for path, number in numbered if path not in existing)
    return dict(itertools.islice(missing, config.num_class_images - len(existing)))


def fingerprint(config: Config, existing: dict[Path, str]) -> dict[str, Any]:
    """The class pictures' part of a run's fingerprint: the user's own by content, drawn ones by their settings."""
    users_own = sorted(content for path, content in existing.items() if not _is_drawn(path))
    values: dict[str, Any] = {"num_class_images": config.num_class_images, "class_pictures": users_own}
    if len(users_own) < config.num_class_images:
        values |= config.subset(CLASS_PICTURE)
    return values


def _is_drawn(path: Path) -> bool:
    return bool(_DRAWN.fullmatch(path.name))


def _prefix(config: Config) -> str:
    """The prefix of the names of drawn pictures."""
    return f"class_{json_digest(config.subset(CLASS_PICTURE), length=8)}_"
