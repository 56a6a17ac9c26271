"""`train_script: path` in main.py: the flags of diffusers' own script, read from its source, which is not run here.

The script is `train_dreambooth_lora_sdxl.py`, in place of train_lora.py; accelerate runs it by
`run_diffusers_script.py`.
"""

import ast
import logging
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image

from lace_lora.config import SCRIPT, Config
from lace_lora.errors import UserError
from lace_lora.pictures import image_files
from lace_lora.sdxl import hub
from lace_lora.training import class_pictures

logger = logging.getLogger(__name__)

# Where the script has another name for a setting.
_FLAG_OF = {"pretrained_vae": "pretrained_vae_model_name_or_path"}


def check(config: Config) -> None:
    """Warn of changed settings that the script has no flag for.

    Raises:
        UserError: the file is not that script; a model in a single file, which it cannot read.
    """
    path = Path(str(config.train_script))
    flags = flags_of(path)
    for setting in ("pretrained_model", "pretrained_vae"):
        if Path(getattr(config, setting) or "").is_file():
            raise UserError(f"train_script reads no single-file model: set {setting} to a Hub model or a folder")
    changed = [name for name, value in config.subset(SCRIPT).items() if value != getattr(Config, name)]
    if lost := [name for name in changed if _FLAG_OF.get(name, name) not in flags]:
        logger.warning("%s has no option for these settings, so they have no effect: %s", path.name, ", ".join(lost))


def flags_of(path: Path) -> dict[str, bool]:
    """The flags that a script declares, and whether each is a switch without a value."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"train_script: {path} cannot be read as a Python script ({error})") from error
    flags: dict[str, bool] = {}
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument":
            names = [part.value for part in call.args if isinstance(part, ast.Constant)]
            switch = any(word.arg == "action" for word in call.keywords)
            flags |= {str(name).removeprefix("--"): switch for name in names}
    if not {"instance_data_dir", "pretrained_model_name_or_path", "output_dir"} <= set(flags):
        raise UserError(f"train_script: {path} is not diffusers' train_dreambooth_lora_sdxl.py: options are missing")
    return flags


def hand_over(pictures: Iterable[Path], folder: Path, extensions: Iterable[str]) -> None:
    """Fill the script's folder: links to pictures, and PNG copies in RGB, upright, of those it opens wrongly or not.

    Several processes of one run may do this at the same time.
    """
    formats = image_files.formats_of(list(extensions))
    for number, path in enumerate(pictures):
        link = folder / f"{number:05d}{path.suffix}"
        copy = link.with_suffix(".png")
        if _opens_alike(path):
            with suppress(FileExistsError):  # by another process of this run
                link.symlink_to(path.absolute())
        elif not copy.exists():
            picture, _ = image_files.open_picture(path, formats=formats)
            unfinished = folder.with_name(f"{copy.name}.{os.getpid()}")  # the script takes every file of its folder
            picture.save(unfinished, format="PNG", **image_files.PNG_OPTIONS)
            os.replace(unfinished, copy)


def _opens_alike(path: Path) -> bool:
    """Whether the script, which converts to RGB whatever it opens, sees a picture as we do, but for colour profiles."""
    try:
        with Image.open(path, formats=("JPEG", "PNG", "WEBP", "BMP", "TIFF")) as picture:
            return picture.mode in ("RGB", "L", "1") and "transparency" not in picture.info
    except Image.UnidentifiedImageError:
        return False


def command_line(config: Config, flags: dict[str, bool], pictures: Path, folder: Path, precision: str) -> list[str]:
    """The script's arguments for these settings."""
    values: dict[str, Any] = {_FLAG_OF.get(name, name): value for name, value in config.subset(SCRIPT).items()}
    values |= {
        "pretrained_model_name_or_path": config.pretrained_model,
        "variant": config.variant if hub.weight_files(Path(config.pretrained_model, "unet"), config.variant) else None,
        "instance_data_dir": pictures,
        "output_dir": folder,
        "mixed_precision": precision,
        "center_crop": True,  # as in train_lora.py
        "enable_xformers_memory_efficient_attention": config.attention == "xformers",
        "resume_from_checkpoint": "latest" if any(folder.glob("checkpoint-*")) else None,
    }
    if config.with_prior_preservation:
        # With larger batches the script pairs pictures and prompts wrongly: it repeats [instance, class] over a row of
        # all instances and then all classes.
        names = ("with_prior_preservation", "class_prompt", "num_class_images", "prior_loss_weight")
        values |= {name: getattr(config, name) for name in names} | {
            "train_batch_size": 1,
            "gradient_accumulation_steps": config.train_batch_size * config.gradient_accumulation_steps,
            "class_data_dir": class_pictures.folder_of(config).absolute(),
        }
    arguments = []
    for name, value in values.items():
        if name in flags and value is not None and value is not False:
            arguments += [f"--{name}"] if flags[name] else [f"--{name}={value}"]
    return arguments
