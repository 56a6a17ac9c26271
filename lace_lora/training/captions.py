"""Captions that `caption_model` writes: which exist, and which are missing. Text files, for the user to correct."""

from collections.abc import Iterable
from pathlib import Path

from lace_lora.config import Config


def folder_of(config: Config) -> Path:
    return Path(config.lora_output_dir, "captions")


def files(config: Config, pictures: Iterable[Path]) -> dict[Path, Path]:
    """The caption file of each picture of `images_dir`, whether it exists or not; none without a caption model.

    The folder has the subfolders of `images_dir`. Names keep the picture's extension, so no two pictures share a file.
    diffusers' script uses no captions.
    """
    if not config.caption_model or config.train_script:
        return {}
    folder = folder_of(config)
    return {path: folder / f"{path.relative_to(config.images_dir)}.txt" for path in pictures}
