"""What is known before anything is drawn: prompts, the LoRA file, and the settings recorded with each picture."""

import gc
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lace_lora.config import LORA_FILE, ORIGINAL_SIZE, PICTURE, Config
from lace_lora.errors import NO_SECRETS, UserError, holds_secret
from lace_lora.files import file_sha256, free_space, is_safetensors, read_text
from lace_lora.sdxl import hub
from lace_lora.sdxl.model_kind import NOT_SAFETENSORS, read_header


def read_prompts(config: Config) -> list[str]:
    """The prompts of `prompts_file` or `prompt`, or the instance prompt.

    Raises:
        UserError: the file cannot be read, is empty, or contains a secret.
    """
    if not config.prompts_file:
        return list(config.prompt or [config.instance_prompt])
    path = Path(config.prompts_file)
    try:
        lines = read_text(path).splitlines()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"prompts_file: cannot read {path} ({reason}): check the path, or save it as UTF-8") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"prompts_file: {path} is empty: write one prompt per line")
    if any(map(holds_secret, prompts)):
        raise UserError(f"prompts_file: {path} contains an access token or a password: {NO_SECRETS}")
    return prompts


def without_token(config: Config, prompts: list[str]) -> list[str]:
    """A warning for each prompt that does not call for our LoRA's style; another one may have another token."""
    if config.lora_scale == 0 or config.lora_path:
        return []
    advice = f"add it, or little of your style will show (in quotes: 'prompt=a photo of {config.token}')"
    return [
        f"prompt {text!r} does not contain {config.token}: {advice}" for text in prompts if config.token not in text
    ]


def find_lora(config: Config) -> Path | None:
    """The LoRA file to draw with; None when `lora_scale` is 0.

    Raises:
        UserError: it does not exist, or is not a .safetensors file.
    """
    if config.lora_scale == 0:
        return None
    path = _lora_file(config)
    if not path.is_file():
        advice = (
            "train one first (--mode train); if you have, give the same settings, as with --config "
            "FOLDER/config.yaml, where FOLDER is the LoRA's; or set lora_path, or lora_scale=0 to draw without one"
        )
        raise UserError(f"no LoRA found at {path}: {advice}")
    if not is_safetensors(path):
        raise UserError(f"{path} {NOT_SAFETENSORS}")
    return path


def _lora_file(config: Config) -> Path:
    path = Path(config.lora_path or config.lora_output_dir)
    return path / LORA_FILE if path.is_dir() or not path.suffix else path


def as_trained(config: Config) -> Config:
    """The settings with the `original_size` of the LoRA's training, where none is set and the pictures are smaller.

    What was learnt from large photos shows less where SDXL is told to draw a small one. With `lora_scale` 0, too, so
    that pictures with and without the LoRA differ in that alone. A damaged file is refused later.
    """
    said = ""
    if (lora := _lora_file(config)).is_file():
        with suppress(UserError):
            said = read_header(lora)[1].get(ORIGINAL_SIZE, "")
    return config.with_photo_size(int(said) if re.fullmatch("[0-9]{1,5}", said) else None)


def picture_settings(config: Config, lora: Path | None) -> dict[str, Any]:
    """The settings that affect a picture, and the LoRA's SHA-256."""
    return config.subset(PICTURE) | {"lora_sha256": file_sha256(lora) if lora else None}


def lora_name(config: Config, lora: Path | None) -> str:
    """The LoRA's name in other programs: for them, training writes a file that is named after the token."""
    return "" if lora is None else config.lora_name if lora.name == LORA_FILE else lora.stem


def check_input(config: Config, lora: Path | None, output: Path) -> None:
    """For a dry run: check the LoRA, the models that are on this machine, and the output folder; print what is left.

    Raises:
        UserError: one of them cannot be used.
    """
    for model in hub.check_models(config, lora, download=False):
        print("Would first download", model)
    print(f"Free disk space in {output}: {free_space(output):.1f} GB")


@contextmanager
def importing_torch() -> Iterator[None]:
    """For importing phases.py, and with it torch: no garbage collection during it, nor later of the imported objects.

    Collecting took 1.5 s of the 7.7 of importing, and a quarter of a second each time that a model was freed.
    """
    if "torch" in sys.modules or not gc.isenabled():  # in a notebook, do not freeze the user's objects
        yield
        return
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()
