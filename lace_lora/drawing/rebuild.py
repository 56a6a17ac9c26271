"""`main.py --mode inference rebuild=PATH`: one picture made again from what it says of itself."""

import logging
import tempfile
from dataclasses import replace
from pathlib import Path

import yaml
from PIL import Image, ImageChops

import inference
from lace_lora.config import PICTURE, Config, dump_config, load_config, settings_that_affect
from lace_lora.errors import UserError
from lace_lora.files import numbered
from lace_lora.pictures import image_files, recipe
from lace_lora.pictures.recipe import Design, Recipe
from lace_lora.sdxl import hub

logger = logging.getLogger(__name__)


def run(config: Config, dry_run: bool = False) -> Path:
    """Draw the picture `rebuild` with those that shared its batch, and write it into `output_dir` under a new name.

    Its settings are the ones that it carries. Where models, LoRA and folders are, `config` says: a picture from
    anywhere must not choose what is downloaded or opened.

    Raises:
        UserError: the file holds no recipe that can be used, or the LoRA is another one. Errors of the disk and of
            memory go on as they are; main.py has the sentence for them.
    """
    original = Path(str(config.rebuild))
    wanted = recipe.read(original)
    config = _with_settings(config, wanted, original)
    lora = inference.find_lora(config)
    settings = inference.settings_of(config, lora)
    if settings["lora_sha256"] != wanted.settings.get("lora_sha256"):
        raise UserError(f"{original} was drawn with another LoRA than {lora}: name that one with lora_path")
    if dry_run:
        place = _free_name(config, original)
        print(f"Would draw {original} again, with {len(wanted.batch) - 1} others of its batch, into {place}")
        return place
    before = image_files.open_finished(original)
    again = replace(wanted, settings=recipe.without_folders(settings), lora_name=inference.lora_name(config, lora))
    places: list[Path] = []
    with inference.importing():
        from lace_lora.drawing import phases  # brings torch

    def finish(design: Design, base: Image.Image | None, refined: Image.Image | None, _: float | None) -> None:
        picture = refined if wanted.refined else base
        if design == wanted.design and picture:
            places.append(_free_name(config, original))
            places[0].parent.mkdir(parents=True, exist_ok=True)
            recipe.save_picture(places[0], picture, again)

    # The ensemble's base stops early, for the refiner; otherwise a base picture needs no refiner.
    refine = config.refine and (wanted.refined or config.refiner_flow == "ensemble")
    needed = replace(config, refine=refine, save_base=not wanted.refined)
    with_models = replace(needed, **hub.fetch_models(needed))
    with tempfile.TemporaryDirectory(prefix="lace-lora-") as kept:
        phases.draw_pictures(with_models, lora, [wanted.batch], Path(kept), finish)
    [place] = places
    print(f"{place}: {_compared(before, place)}")
    return place


def _with_settings(config: Config, wanted: Recipe, original: Path) -> Config:
    """The settings of the picture in place of the user's, as strictly read as a settings file."""
    said = wanted.settings
    own = {name: said[name] for name in settings_that_affect(PICTURE) if name not in (*recipe.MODELS, "revision")}
    with tempfile.TemporaryDirectory(prefix="lace-lora-") as folder:
        file = Path(folder, "config.yaml")
        try:
            file.write_text(yaml.safe_dump(yaml.safe_load(dump_config(config)) | own), encoding="utf-8")
            config = load_config(file)
            if wanted.refined and not config.refine:
                raise UserError("refined, and refine is false")
        except (UserError, RecursionError, UnicodeError, yaml.YAMLError) as error:
            reason = "; ".join(str(error).replace(f"{file}:", "").splitlines())
            raise UserError(f"rebuild: {original} carries settings that cannot be used: {reason}") from None
    mine = recipe.without_folders({name: getattr(config, name) for name in recipe.MODELS})
    for name, model in mine.items():
        if said[name] != model:
            logger.warning("%s was drawn with %s: %s, and yours is %s", original, name, said[name], model)
    return config


def _free_name(config: Config, original: Path) -> Path:
    names = numbered(Path(config.output_dir), f"rebuilt_{original.stem}", f".{config.image_format}")
    return next(path for path in names if not path.exists())


def _compared(original: Image.Image, place: Path) -> str:
    again = image_files.open_finished(place)
    if again.size != original.size:
        return f"{again.width}x{again.height} pixels, and the original has {original.width}x{original.height}"
    most = max(int(high) for _, high in ImageChops.difference(original, again).getextrema())  # type: ignore[misc]
    if not most:
        return "equal to the original, pixel by pixel"
    return f"no pixel differs by more than {most} of 255: another machine, model or version rounds otherwise"
