"""Which pictures are trained on, in how many views, and which are held out. Without torch."""

from collections.abc import Sequence
from pathlib import Path

from lace_lora.config import Config
from lace_lora.pictures import crops
from lace_lora.pictures.checking import Picture

MANY = 40  # pictures, of which some are held out


def split(config: Config, pictures: Sequence[Picture]) -> tuple[list[Picture], list[Picture]]:
    """The pictures to train on, and those held out to measure the loss on, which their contents alone choose.

    So they are mostly the same when there are more pictures, and in the same order when files are renamed.
    """
    count = 0
    if config.validation_fraction and not config.train_script and len(pictures) >= MANY:
        count = min(max(round(config.validation_fraction * len(pictures)), 4), 24)
    held_out = sorted(pictures, key=lambda picture: picture.sha256)[:count]
    return [picture for picture in pictures if picture not in held_out], held_out


def print_split(views: dict[Path, int], held_out: Sequence[Picture]) -> None:
    if close_ups := sum(views.values()) - len(views):
        print(f"  views        {sum(views.values())}: all of each picture, and {close_ups} close-ups")
    if held_out:
        print(f"  held out     {len(held_out)}: not trained on, to measure the loss on (validation_fraction)")


def views(config: Config, pictures: Sequence[Picture]) -> dict[Path, int]:
    """How many views each picture has for training: all of it, and close-ups."""
    cropping = crops.Cropping.of(config)
    return {picture.path: cropping.views(picture.width, picture.height) for picture in pictures}
