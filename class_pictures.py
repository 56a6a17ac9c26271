"""Prior preservation's pictures of the class: those that are there, and those that the base has to draw.

Ruiz et al. 2022, "DreamBooth", section 3.3: what the class's prompt draws is kept as it is by learning it too.
"""

import hashlib
import json
import logging
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import image_files
from config import IMAGE_EXTENSIONS, Config, UserError
from data_utils import named_as_pictures

logger = logging.getLogger(__name__)

# What a drawn picture looks like: other settings get other files.
DRAWN_BY = ("class_prompt", "pretrained_model", "revision", "width", "height", "num_inference_steps", "guidance_scale",
            "scheduler", "negative_prompt", "seed")  # fmt: skip
_DRAWN = re.compile(r"class_[0-9a-f]{8}_\d{4,}\.png")


def folder_of(config: Config) -> Path:
    return Path(config.class_data_dir or Path(config.lora_output_dir, "class_images"))


def pictures_there(config: Config) -> dict[Path, str]:
    """The good pictures of the class, at most `num_class_images`; none that were drawn with other settings.

    Returns:
        The SHA-256 of each.
    """
    folder, digest = folder_of(config), _digest(config)
    if config.class_data_dir and not folder.is_dir():
        raise UserError(f"class_data_dir: {folder} is no folder: make it, or leave the key empty")
    if not folder.is_dir():
        return {}
    found = sorted(named_as_pictures(folder, IMAGE_EXTENSIONS), key=_is_drawn)  # the user's own come first
    fit = [path for path in found if not _is_drawn(path) or path.name.startswith(f"class_{digest}_")]
    pictures = image_files.check_pictures(fit, 1, kinds())
    for picture in pictures:
        if not picture.taken:
            logger.warning("class picture %s is passed over: %s", picture.path, picture.reason)
    good = [picture for picture in pictures if picture.taken][: config.num_class_images]
    return {picture.path: picture.sha256 for picture in good}


def pictures_to_draw(config: Config, there: Collection[Path]) -> dict[Path, int]:
    """Files of the pictures that are still missing, each with its number, which stands for its seed.

    For the settings as the user wrote them: the training process knows models as paths, and would find other names.
    """
    missing: dict[Path, int] = {}
    number = 0
    while len(there) + len(missing) < config.num_class_images:
        path = folder_of(config) / f"class_{_digest(config)}_{number:04d}.png"
        if path not in there:
            missing[path] = number
        number += 1
    return missing


def what_is_learnt(config: Config, there: dict[Path, str]) -> dict[str, Any]:
    """What says which pictures of the class are learnt: the user's own by content, drawn ones by their settings."""
    of_the_users = sorted(content for path, content in there.items() if not _is_drawn(path))
    learns: dict[str, Any] = {"num_class_images": config.num_class_images, "class_pictures": of_the_users}
    if len(of_the_users) < config.num_class_images:
        learns |= {name: getattr(config, name) for name in DRAWN_BY}
    return learns


def kinds() -> tuple[str, ...]:
    """The decoders that class pictures may take: they may be of any kind that is known."""
    return image_files.formats(IMAGE_EXTENSIONS)


def _is_drawn(path: Path) -> bool:
    return bool(_DRAWN.fullmatch(path.name))


def _digest(config: Config) -> str:
    recipe = {name: getattr(config, name) for name in DRAWN_BY}
    return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:8]
