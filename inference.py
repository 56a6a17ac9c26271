"""`main.py --mode inference`: prompts and LoRA to a folder of refined pictures with a contact sheet and a page.

Nothing here imports torch before a picture has to be drawn.
"""

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from lace_lora import errors, files
from lace_lora.config import Config
from lace_lora.drawing import output_folder, refining
from lace_lora.drawing.output_folder import BEFORE, UNFINISHED, Manifest, PictureFiles, missing_designs
from lace_lora.drawing.plan import Drawn, Plan, importing_torch, lora_name, plan_pictures
from lace_lora.errors import UserError
from lace_lora.files import write_atomically
from lace_lora.pictures import gallery, recipe
from lace_lora.pictures.gallery import Card, Preview
from lace_lora.pictures.recipe import Recipe
from lace_lora.sdxl import hub

ADVICE = "set inference_batch_size: 1, or a smaller width and height"


def run(config: Config, dry_run: bool = False) -> Path:
    """Draw `num_images` pictures, or the ones still missing, and return their folder; or one again, with `rebuild`.

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
    plan = plan_pictures(config)
    folder = output_folder.choose_folder(Path(config.output_dir), plan.recipe)
    if dry_run:
        _print_plan(plan, folder)
        return folder
    if not missing_designs(plan, folder) and (folder / gallery.PAGE).exists():
        print("Finished already; other settings get a folder of their own.")
        shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        with files.lock_for_one_run(folder):
            if not output_folder.is_free_for(folder, plan.recipe):
                raise UserError(f"another run has just drawn into {folder}: run the same command again")
            files.remove_unfinished(folder)
            manifest = Manifest(folder, plan)
            previews = _draw(plan, manifest) if missing_designs(plan, folder) else {}
            _publish(plan, manifest, previews)
            shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
    print(f"{len(plan.designs)} pictures: {folder}")
    print(f"contact sheet: {folder / gallery.CONTACT_SHEET}")
    print(f"page: {folder / gallery.PAGE}")
    return folder


def _print_plan(plan: Plan, folder: Path) -> None:
    config, missing = plan.config, len(missing_designs(plan, folder))
    print(f"Would draw {missing} of {config.num_images} pictures, {config.width}x{config.height}, into {folder}")
    print(f"LoRA: {plan.lora or 'none (lora_scale is 0)'}; refining: {config.refiner_flow if config.refine else 'off'}")
    print("\n".join(f"prompt: {prompt}" for prompt in plan.prompts))


def _draw(plan: Plan, manifest: Manifest) -> dict[Path, Preview]:
    """Draw the batches of which a picture is missing, and return the previews of what was drawn, by file."""
    folder, config = manifest.folder, replace(plan.config, **hub.fetch_models(plan.config))
    if not (folder / UNFINISHED).exists():  # else the base may have done its part
        hub.read_ahead(config.pretrained_model, ["text_encoder", "text_encoder_2", "unet"], config.variant)
    with importing_torch():
        from lace_lora.drawing import phases  # brings torch, which takes seconds

    batches = manifest.missing_batches(phases.pictures_at_once(config))
    batch_of = {design: batch for batch in batches for design in batch}
    latents_folder = manifest.latents_folder()
    for place in (latents_folder, folder / BEFORE):
        place.mkdir(parents=True, exist_ok=True)
    settings, name = recipe.without_folders(plan.settings), lora_name(config, plan.lora)
    previews: dict[Path, Preview] = {}

    def save(drawn: Drawn) -> None:  # on several threads
        own = Recipe(drawn.design, config.refine, batch_of[drawn.design], settings, name)
        previews.update(_save_missing(drawn, manifest.files(drawn.design), own))

    phases.draw_pictures(config, plan.lora, batches, latents_folder, save)
    return previews


def _save_missing(drawn: Drawn, files: PictureFiles, own: Recipe) -> dict[Path, Preview]:
    """Write the files of a design that do not exist, with their recipes inside, and return its new preview."""
    refined, base = (path if path and not path.exists() else None for path in (files.refined, files.base))
    if (refined or base) and drawn.refined and drawn.latent_change is not None:  # first, so that no picture is without
        refining.save_before(files.before, drawn.base, drawn.refined, drawn.latent_change)
    previews = {}
    for path, picture, is_refined in ((refined, drawn.refined, True), (base, drawn.base, False)):
        if path:
            assert picture is not None
            recipe.save_picture(path, picture, replace(own, refined=is_refined))
            if path == files.shown:  # now, while the GPU is at work, rather than at the end
                lossless = picture if path.suffix == ".png" else None
                previews[path] = gallery.make_preview(path, lossless)
    return previews


def _publish(plan: Plan, manifest: Manifest, previews: dict[Path, Preview]) -> None:
    """Contact sheet, page and the whole manifest, over all finished pictures."""
    measured = manifest.write()
    cards = []
    for design, changes, warning in zip(plan.designs, measured, refining.warnings(measured), strict=True):
        files = manifest.files(design)
        before = [path for path in (files.before.with_suffix(".jpg"), files.base) if path and path.exists()]
        base = before[0] if before and plan.config.refine else None
        cards.append(Card(design, files.shown, base, **changes, warning=warning))
    older = [card.file for card in cards if card.file not in previews]
    with ThreadPoolExecutor() as pool:  # Pillow works without Python's lock
        previews = previews | dict(zip(older, pool.map(gallery.make_preview, older), strict=True))
        sheet = pool.submit(gallery.contact_sheet, [previews[card.file].small for card in cards])
        embedded = {path: preview.attributes for path, preview in previews.items()}
        page = gallery.page(manifest.folder.name, cards, recipe.without_folders(plan.recipe), embedded)
    write_atomically(manifest.folder / gallery.CONTACT_SHEET, sheet.result())
    write_atomically(manifest.folder / gallery.PAGE, page.encode())
