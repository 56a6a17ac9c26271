"""`main.py --mode inference rebuild=PATH`: one picture made again from what it says of itself."""

import logging
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from PIL import Image, ImageChops

import hub
import inference
import recipe
import supervise
from config import Config, UserError, dump_config, load_config
from data_utils import numbered
from gallery import Design

logger = logging.getLogger(__name__)


def run(config: Config, dry_run: bool = False) -> Path:
    """Draw the picture `rebuild` with those that shared its batch, and write it into `output_dir` under a new name.

    Its settings are the ones that it carries; those of `config` say only where models, LoRA and folders are.

    Raises:
        UserError: the file holds no recipe, or the LoRA is another one; else as `inference.run`.
    """
    original = Path(str(config.rebuild))
    wanted = recipe.read(original)
    config = replace(_with_settings(config, wanted.settings, original), save_base=not wanted.refined)
    lora = inference.find_lora(config)
    if (inference.sha256(lora) if lora else None) != wanted.settings.get("lora_sha256"):
        raise UserError(f"{original} was drawn with another LoRA than {lora}: name that one with lora_path")
    places = numbered(Path(config.output_dir), f"{original.stem}-rebuilt", original.suffix)
    place = next(path for path in places if not path.exists())
    if dry_run:
        print(f"Would draw {original} again, with {len(wanted.batch) - 1} others of its batch, into {place}")
        return place
    import draw  # brings torch

    def finish(design: Design, base: Image.Image | None, refined: Image.Image | None, _: float | None) -> None:
        picture = refined if wanted.refined else base
        if design == wanted.design and picture:
            place.parent.mkdir(parents=True, exist_ok=True)
            recipe.save_picture(place, picture, replace(wanted, lora_name=inference.lora_name(config, lora)))

    try:
        config = replace(config, **hub.fetch_models(config))
        with tempfile.TemporaryDirectory(prefix="lace-lora-") as kept:
            draw.draw_pictures(config, lora, [wanted.batch], Path(kept), finish)
    except (OSError, MemoryError, RuntimeError) as error:
        if explained := supervise.explain(error, inference.ADVICE):
            raise UserError(*explained) from error
        raise
    print(f"{place}: {_compared(original, place)}")
    return place


def _with_settings(config: Config, settings: dict[str, Any], original: Path) -> Config:
    """The settings of the picture in place of the user's, as strictly read as a settings file."""
    own = {name: settings[name] for name in inference.RECIPE_SETTINGS if name in settings}
    with tempfile.TemporaryDirectory(prefix="lace-lora-") as folder:
        file = Path(folder, "config.yaml")
        file.write_text(yaml.safe_dump(yaml.safe_load(dump_config(config)) | own), encoding="utf-8")
        try:
            return load_config(file)
        except UserError as error:
            reason = str(error).replace(f"{file}:", "").strip()
            raise UserError(f"rebuild: {original} carries settings that cannot be used: {reason}") from None


def _compared(original: Path, again: Path) -> str:
    with Image.open(original) as one, Image.open(again) as other:
        extrema = ImageChops.difference(one.convert("RGB"), other.convert("RGB")).getextrema()
    most = max(int(high) for _, high in extrema)  # type: ignore[misc]
    if not most:
        return "equal to the original, pixel by pixel"
    return f"no pixel differs by more than {most} of 255: another machine or other versions round otherwise"
