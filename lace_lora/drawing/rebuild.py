"""`main.py --mode inference rebuild=PATH`: one picture redrawn from the recipe inside it."""

import logging
import tempfile
from dataclasses import replace
from pathlib import Path

import yaml
from PIL import Image, ImageChops

from lace_lora.config import PICTURE, Config, dump_config, load_config, settings_that_affect
from lace_lora.drawing.plan import check_input, find_lora, importing_torch, lora_name, picture_settings
from lace_lora.errors import UserError
from lace_lora.files import check_writable, counted, free_name
from lace_lora.pictures import image_files, recipe
from lace_lora.pictures.recipe import Drawn, Recipe
from lace_lora.sdxl import hub

logger = logging.getLogger(__name__)


def run(config: Config, dry_run: bool = False) -> Path:
    """Draw the picture `rebuild` with those that shared its batch, and write it into `output_dir` under a new name.

    Its settings come from its recipe. Models, LoRA and folders come from `config`: an untrusted picture must not choose
    what is downloaded or opened.

    Raises:
        UserError: the file contains no usable recipe, or it was drawn with a different LoRA.
        OSError, MemoryError, RuntimeError: disk and memory errors, which main.py explains.
    """
    original = Path(str(config.rebuild))
    recorded = recipe.read(original)
    config = _with_settings_of(recorded, original, config)
    lora = find_lora(config)
    settings = picture_settings(config, lora)
    if settings["lora_sha256"] != recorded.settings.get("lora_sha256"):
        raise UserError(f"{original} was drawn with a different LoRA than {lora}: set lora_path to the picture's LoRA")
    # The ensemble's base stops early, for the refiner; otherwise a base picture needs no refiner.
    refine = config.refine and (recorded.refined or config.refiner_flow == "ensemble")
    drawn = replace(config, refine=refine, save_base=not recorded.refined)
    output_dir = Path(config.output_dir)
    names = output_dir, f"rebuilt_{original.stem}", f".{config.image_format}"
    if dry_run:
        path = free_name(*names)
        others = counted(len(recorded.batch) - 1, "other")
        print(f"Would redraw {original}, with {others} of its batch, and save it as {path}")
        check_input(drawn, lora, output_dir)
    hub.require_gpu(drawn, "drawing with SDXL on a CPU takes hours")
    if dry_run:
        return path
    before = image_files.open_finished(original)
    check_writable(output_dir)
    picture = _draw(recorded, replace(drawn, **hub.fetch_models(drawn, lora)), lora)
    output_dir.mkdir(parents=True, exist_ok=True)
    path = free_name(*names)
    again = replace(recorded, settings=recipe.without_folders(settings), lora_name=lora_name(config, lora))
    recipe.save_picture(path, picture, again)
    print(f"{path}: {_compared(before, path)}")
    return path


def _with_settings_of(recorded: Recipe, original: Path, config: Config) -> Config:
    """The picture's settings in place of the user's, read as strictly as a settings file."""
    settings = {"original_size": None} | recorded.settings  # pictures drawn before it was a setting
    needed = [name for name in settings_that_affect(PICTURE) if name != "revision"]
    with tempfile.TemporaryDirectory(prefix="lace-lora-") as folder:
        file = Path(folder, "config.yaml")
        try:
            if missing := [name for name in needed if name not in settings]:
                raise UserError(f"{missing[0]} is missing")
            own = {name: settings[name] for name in needed if name not in recipe.MODELS}
            file.write_text(yaml.safe_dump(yaml.safe_load(dump_config(config)) | own), encoding="utf-8")
            config = load_config(file)
            if recorded.refined and not config.refine:
                raise UserError("the picture is refined, but its setting refine is false")
        except (UserError, RecursionError, UnicodeError, yaml.YAMLError) as error:
            reason = "; ".join(str(error).replace(f"{file}:", "").splitlines())
            raise UserError(f"rebuild: the recipe in {original} has invalid settings: {reason}") from None
    mine = recipe.without_folders({name: getattr(config, name) for name in recipe.MODELS})
    for name, model in mine.items():
        if settings[name] != model:
            logger.warning("%s was drawn with %s: %s, but your setting is %s", original, name, settings[name], model)
    return config


def _draw(recorded: Recipe, config: Config, lora: Path | None) -> Image.Image:
    batch: list[Drawn] = []
    with importing_torch():
        from lace_lora.drawing import phases
    with tempfile.TemporaryDirectory(prefix="lace-lora-") as latents:
        phases.draw_pictures(config, lora, [recorded.batch], Path(latents), batch.append)
    drawn = next(one for one in batch if one.design == recorded.design)
    picture = drawn.refined if recorded.refined else drawn.base
    assert picture is not None
    return picture


def _compared(original: Image.Image, path: Path) -> str:
    again = image_files.open_finished(path)
    if again.size != original.size:
        return f"{again.width}x{again.height} pixels, but the original has {original.width}x{original.height}"
    most = max(int(high) for _, high in ImageChops.difference(original, again).getextrema())  # type: ignore[misc]
    if not most:
        return "identical to the original, pixel by pixel"
    return f"differs from the original by at most {most} of 255: other hardware, models or versions round differently"
