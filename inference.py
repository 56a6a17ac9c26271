"""`main.py --mode inference`: prompts and LoRA to a folder of refined pictures with a contact sheet and a page.

torch is not imported before a picture has to be drawn.
"""

import logging
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from lace_lora import errors, files
from lace_lora.config import Config
from lace_lora.drawing import refining
from lace_lora.drawing.output_folder import BEFORE, UNFINISHED, OutputFolder, is_there
from lace_lora.drawing.plan import check_input, importing_torch, lora_name, without_token
from lace_lora.errors import UserError
from lace_lora.pictures import gallery, recipe
from lace_lora.pictures.gallery import Card, Preview
from lace_lora.pictures.recipe import Drawn, Recipe
from lace_lora.sdxl import hub

logger = logging.getLogger(__name__)

ADVICE = "set inference_batch_size: 1, or a smaller width and height"


def run(config: Config, dry_run: bool = False) -> Path:
    """Draw `num_images` pictures, or those still missing, and return their folder; with `rebuild`, redraw one.

    `dry_run` stops before anything is written.

    Raises:
        UserError: whatever the user can fix, with its exit code.
    """
    if config.rebuild:
        from lace_lora.drawing import rebuild

        return rebuild.run(config, dry_run)
    try:
        return _run(config, dry_run)
    except (OSError, MemoryError, RuntimeError) as error:
        if explained := errors.explain(error, ADVICE):
            raise explained from error
        raise


def _run(config: Config, dry_run: bool) -> Path:
    folder = OutputFolder(config)
    config = folder.config
    for warning in without_token(config, folder.prompts):
        logger.warning("warning: %s", warning)
    if dry_run:
        missing, size = len(folder.missing()), f"{config.width}x{config.height}"
        if config.original_size:
            size += f" (as of a photo of {config.original_size})"
        print(f"Would draw {missing} of {files.counted(config.num_images, 'picture')}, {size}, into {folder.path}")
        refining_is = config.refiner_flow if config.refine else "off"
        print(f"LoRA: {folder.lora or 'none (lora_scale is 0)'}; refining: {refining_is}")
        print("\n".join(f"prompt: {prompt}" for prompt in folder.prompts))
        check_input(config, folder.lora, folder.path)
    if folder.missing():
        hub.require_gpu(config, "drawing with SDXL on a CPU takes hours")
    if dry_run:
        return folder.path
    pages = [folder.path / name for name in (gallery.CONTACT_SHEET, gallery.PAGE)]
    if not folder.missing() and all(map(is_there, pages)):
        print("Finished already. With other settings, the pictures go to a new folder.")
        shutil.rmtree(folder.path / UNFINISHED, ignore_errors=True)
    else:
        files.check_writable(folder.path)  # before gigabytes are downloaded
        models = hub.fetch_models(config, folder.lora) if folder.missing() else {}
        folder.path.mkdir(parents=True, exist_ok=True)
        with files.lock_for_one_run(folder.path):
            if folder.has_other_pictures(folder.path):
                raise UserError(f"another run has written to {folder.path} in the meantime: run the same command again")
            files.remove_unfinished(folder.path)
            try:
                previews = _draw(folder, replace(config, **models)) if folder.missing() else {}
            except BaseException:
                with suppress(OSError):  # of a full disk, say
                    folder.update_manifest()
                raise
            _publish(folder, previews)
            shutil.rmtree(folder.path / UNFINISHED, ignore_errors=True)
    print(f"{files.counted(len(folder.designs), 'picture')}: {folder.path}")
    print(f"contact sheet: {folder.path / gallery.CONTACT_SHEET}")
    print(f"gallery page: {folder.path / gallery.PAGE}")
    return folder.path


def _draw(folder: OutputFolder, config: Config) -> dict[Path, Preview]:
    """Draw the batches with missing pictures; returns the previews of what was drawn, by file."""
    if not (folder.path / UNFINISHED).exists():  # otherwise the base latents may exist already
        hub.read_ahead(config.pretrained_model, ["text_encoder", "text_encoder_2", "unet"], config.variant)
    with importing_torch():
        from lace_lora.drawing import phases  # brings torch, which takes seconds

    batches = folder.missing_batches(phases.pictures_at_once(config))
    batch_of = {design: batch for batch in batches for design in batch}
    # For the latents of this recipe in batches of this size only.
    latents_folder = folder.path / UNFINISHED / files.json_digest([folder.recipe, folder.batch_size()])
    for subfolder in (latents_folder, folder.path / BEFORE):
        subfolder.mkdir(parents=True, exist_ok=True)
    settings, name = recipe.without_folders(folder.settings), lora_name(config, folder.lora)
    previews: dict[Path, Preview] = {}

    def save(drawn: Drawn) -> None:  # on several threads
        missing = {kind: path for kind, path in folder.files(drawn.design).items() if not is_there(path)}
        if missing and drawn.refined and drawn.latent_change is not None:  # first, so that every picture has it
            refining.save_before(folder.before(drawn.design), drawn.base, drawn.refined, drawn.latent_change)
        for kind, path in missing.items():
            is_refined = kind == "refined"
            picture = drawn.refined if is_refined else drawn.base
            assert picture is not None
            recipe.save_picture(path, picture, Recipe(drawn.design, is_refined, batch_of[drawn.design], settings, name))
            if is_refined == config.refine:  # the one that is shown; now, while the GPU is busy, not at the end
                previews[path] = gallery.make_preview(path, picture if path.suffix == ".png" else None)

    phases.draw_pictures(config, folder.lora, batches, latents_folder, save)
    return previews


def _publish(folder: OutputFolder, previews: dict[Path, Preview]) -> None:
    """Write the contact sheet, the page and the complete manifest of all finished pictures."""
    measured = folder.write_manifest(folder.batch_size())
    cards = []
    for design, changes, warning in zip(folder.designs, measured, refining.warnings(measured), strict=True):
        paths = folder.files(design)
        before = [folder.before(design).with_suffix(".jpg"), paths.get("base")] if folder.config.refine else []
        base = next((path for path in before if path and path.exists()), None)
        cards.append(Card(design, next(iter(paths.values())), base, **changes, warning=warning))
    older = [card.file for card in cards if card.file not in previews]
    with ThreadPoolExecutor() as pool:  # Pillow releases the GIL
        previews = previews | dict(zip(older, pool.map(gallery.make_preview, older), strict=True))
        sheet = pool.submit(gallery.contact_sheet, [previews[card.file].small for card in cards])
        embedded = {path: preview.attributes for path, preview in previews.items()}
        page = gallery.page(folder.path.name, cards, recipe.without_folders(folder.recipe), embedded)
    files.write_atomically(folder.path / gallery.CONTACT_SHEET, sheet.result())
    files.write_atomically(folder.path / gallery.PAGE, page.encode())
