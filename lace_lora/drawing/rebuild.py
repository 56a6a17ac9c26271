"""`main.py --mode inference rebuild=PATH`: one picture drawn again from the recipe inside it."""

import logging
import tempfile
from dataclasses import replace
from pathlib import Path

import yaml
from PIL import Image, ImageChops

from lace_lora.config import PICTURE, Config, dump_config, load_config, settings_that_affect
from lace_lora.drawing.plan import Drawn, find_lora, importing_torch, lora_name, picture_settings
from lace_lora.errors import UserError
from lace_lora.files import free_name
from lace_lora.pictures import image_files, recipe
from lace_lora.pictures.recipe import Recipe
from lace_lora.sdxl import hub

logger = logging.getLogger(__name__)


def run(config: Config, dry_run: bool = False) -> Path:
    """Draw the picture `rebuild` with those that shared its batch, and write it into `output_dir` under a new name.

    Its settings are the ones that it carries. Where models, LoRA and folders are, `config` says: a picture from
    anywhere must not choose what is downloaded or opened.

    Raises:
        UserError: the file holds no usable recipe, or the LoRA is another one.
        OSError, MemoryError, RuntimeError: of disk and memory, which main.py explains.
    """
    original = Path(str(config.rebuild))
    wanted = recipe.read(original)
    config = _with_settings_of(wanted, original, config)
    lora = find_lora(config)
    settings = picture_settings(config, lora)
    if settings["lora_sha256"] != wanted.settings.get("lora_sha256"):
        raise UserError(f"{original} was drawn with another LoRA than {lora}: name that one with lora_path")
    names = Path(config.output_dir), f"rebuilt_{original.stem}", f".{config.image_format}"
    if dry_run:
        place = free_name(*names)
        print(f"Would draw {original} again, with {len(wanted.batch) - 1} others of its batch, into {place}")
        return place
    before = image_files.open_finished(original)
    picture = _draw(wanted, config, lora)
    place = free_name(*names)
    place.parent.mkdir(parents=True, exist_ok=True)
    again = replace(wanted, settings=recipe.without_folders(settings), lora_name=lora_name(config, lora))
    recipe.save_picture(place, picture, again)
    print(f"{place}: {_compared(before, place)}")
    return place


def _with_settings_of(wanted: Recipe, original: Path, config: Config) -> Config:
    """The picture's settings in place of the user's, read as strictly as a settings file."""
    recorded = wanted.settings
    needed = [name for name in settings_that_affect(PICTURE) if name != "revision"]
    with tempfile.TemporaryDirectory(prefix="lace-lora-") as folder:
        file = Path(folder, "config.yaml")
        try:
            if missing := [name for name in needed if name not in recorded]:
                raise UserError(f"{missing[0]} is missing")
            own = {name: recorded[name] for name in needed if name not in recipe.MODELS}
            file.write_text(yaml.safe_dump(yaml.safe_load(dump_config(config)) | own), encoding="utf-8")
            config = load_config(file)
            if wanted.refined and not config.refine:
                raise UserError("refined, and refine is false")
        except (UserError, RecursionError, UnicodeError, yaml.YAMLError) as error:
            reason = "; ".join(str(error).replace(f"{file}:", "").splitlines())
            raise UserError(f"rebuild: {original} carries settings that cannot be used: {reason}") from None
    mine = recipe.without_folders({name: getattr(config, name) for name in recipe.MODELS})
    for name, model in mine.items():
        if recorded[name] != model:
            logger.warning("%s was drawn with %s: %s, and yours is %s", original, name, recorded[name], model)
    return config


def _draw(wanted: Recipe, config: Config, lora: Path | None) -> Image.Image:
    # The ensemble's base stops early, for the refiner; otherwise a base picture needs no refiner.
    refine = config.refine and (wanted.refined or config.refiner_flow == "ensemble")
    config = replace(config, refine=refine, save_base=not wanted.refined)
    config = replace(config, **hub.fetch_models(config))
    batch: list[Drawn] = []
    with importing_torch():
        from lace_lora.drawing import phases
    with tempfile.TemporaryDirectory(prefix="lace-lora-") as latents:
        phases.draw_pictures(config, lora, [wanted.batch], Path(latents), batch.append)
    drawn = next(one for one in batch if one.design == wanted.design)
    picture = drawn.refined if wanted.refined else drawn.base
    assert picture is not None
    return picture


def _compared(original: Image.Image, place: Path) -> str:
    again = image_files.open_finished(place)
    if again.size != original.size:
        return f"{again.width}x{again.height} pixels, and the original has {original.width}x{original.height}"
    most = max(int(high) for _, high in ImageChops.difference(original, again).getextrema())  # type: ignore[misc]
    if not most:
        return "equal to the original, pixel by pixel"
    return f"no pixel differs by more than {most} of 255: another machine, model or version rounds differently"
