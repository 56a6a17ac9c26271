"""`main.py --mode inference`: prompts and LoRA to a folder of refined pictures with a contact sheet and a page.

Here everything is planned, checked and written; `draw.py` does the drawing. Nothing here imports torch before a
picture has to be drawn.
"""

import gc
import hashlib
import json
import logging
import shutil
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from lace_lora import errors, files
from lace_lora.config import LORA_FILE, PICTURE, Config
from lace_lora.drawing import refining
from lace_lora.errors import DISK_OR_DRIVE, NO_SECRETS, UserError, holds_secret
from lace_lora.files import numbered, write_atomically
from lace_lora.pictures import gallery, recipe
from lace_lora.pictures.gallery import Card
from lace_lora.pictures.recipe import Design, Recipe
from lace_lora.sdxl import hub

logger = logging.getLogger(__name__)

# Inside the output folder: latents of each phase, until all is done, and what the page shows as before refining.
UNFINISHED, BEFORE = ".unfinished", ".before_refining"
ADVICE = "set inference_batch_size: 1, or a smaller width and height"


def run(config: Config, dry_run: bool = False) -> Path:
    """Draw `num_images` pictures, or the ones still missing, and return their folder.

    `dry_run` stops before anything is written.

    Raises:
        UserError: whatever the user can mend, with its exit code.
    """
    if config.rebuild:
        from lace_lora.drawing import rebuild

        return rebuild.run(config, dry_run)
    prompts = read_prompts(config)
    if len(prompts) > config.num_images:
        left_over = len(prompts) - config.num_images
        logger.warning("%d of %d prompts get no picture: num_images is %d", left_over, len(prompts), config.num_images)
    designs = [Design(index, prompts[index % len(prompts)], config.seed + index) for index in range(config.num_images)]
    lora = find_lora(config)
    recipe = settings_of(config, lora) | {"prompts": prompts}
    folder = choose_folder(Path(config.output_dir), recipe)

    def missing() -> list[Design]:
        return [design for design in designs if not _is_drawn(folder, design, config)]

    if dry_run:
        _print_plan(config, prompts, lora, folder, len(missing()))
        return folder
    try:
        if not missing() and (folder / gallery.PAGE).exists():
            print("Finished already; other settings get a folder of their own.")
            shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            with files.lock_for_one_run(folder):
                if choose_folder(Path(config.output_dir), recipe) != folder:
                    raise UserError(f"another run has just drawn into {folder}: run the same command again")
                files.remove_unfinished(folder)
                manifest = _Manifest(folder, recipe, designs, config)
                shown = {}
                if missing():
                    shown = _draw(replace(config, **hub.fetch_models(config)), lora, manifest)
                _publish(manifest, shown)
                shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
    except (OSError, MemoryError, RuntimeError) as error:
        if explained := errors.explain(error, ADVICE):
            raise explained from error
        raise
    print(f"{len(designs)} pictures: {folder}")
    print(f"contact sheet: {folder / gallery.CONTACT_SHEET}")
    print(f"page: {folder / gallery.PAGE}")
    return folder


def read_prompts(config: Config) -> list[str]:
    """The prompts of `prompts_file` or `prompt`, or the instance prompt."""
    if not config.prompts_file:
        return list(config.prompt or [config.instance_prompt])
    path = Path(config.prompts_file)
    try:
        lines = path.read_bytes().decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"prompts_file: {path} cannot be read ({reason})") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"prompts_file: {path} is empty; write a prompt on each line")
    if any(map(holds_secret, prompts)):
        raise UserError(f"prompts_file: {path} holds a token or a password: {NO_SECRETS}")
    return prompts


def find_lora(config: Config) -> Path | None:
    """The LoRA file to draw with; None when `lora_scale` is 0."""
    if config.lora_scale == 0:
        return None
    path = Path(config.lora_path or config.lora_output_dir)
    path = path / LORA_FILE if path.is_dir() or not path.suffix else path
    if not path.is_file():
        advice = "train one first (--mode train), name one with lora_path, or set lora_scale=0 for the plain base"
        raise UserError(f"there is no LoRA at {path}: {advice}")
    if path.suffix != ".safetensors":
        raise UserError(f"{path} is not a .safetensors file, and no other kind is loaded: it could run code")
    return path


def settings_of(config: Config, lora: Path | None) -> dict[str, Any]:
    """The part of the recipe that all pictures of a run have in common."""
    return config.subset(PICTURE) | {"lora_sha256": _sha256(lora) if lora else None}


def lora_name(config: Config, lora: Path | None) -> str:
    """As other programs know it: the file that training writes for them has the name of the token."""
    return "" if lora is None else config.lora_name if lora.name == LORA_FILE else lora.stem


def choose_folder(wanted: Path, recipe: dict[str, Any]) -> Path:
    """The folder of this recipe: `wanted`, or `wanted-2`, `wanted-3` … where other pictures are there already."""
    for folder in numbered(wanted.parent, wanted.name):
        if not _holds_pictures(folder) or _is_of(folder, recipe):
            return folder
    raise AssertionError("names do not end")


def _holds_pictures(folder: Path) -> bool:
    # Not the manifest alone, of a run that was refused.
    ours = ("refined_output_*", "base_output_*", gallery.PAGE, gallery.CONTACT_SHEET, f"{UNFINISHED}/*/*.safetensors")
    return any(any(folder.glob(pattern)) for pattern in ours)


def _is_of(folder: Path, recipe: dict[str, Any]) -> bool:
    """Whether the folder's manifest tells of this recipe."""
    try:
        noted = json.loads((folder / gallery.MANIFEST).read_text(encoding="utf-8"))["recipe"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(noted == json.loads(json.dumps(recipe)))


def _files(folder: Path, design: Design, config: Config) -> dict[bool, Path]:
    """The files of one design, by whether they are refined."""
    kinds = ([True] if config.refine else []) + ([False] if config.save_base or not config.refine else [])
    return {refined: folder / design.file_name(config.image_format, refined) for refined in kinds}


def _is_drawn(folder: Path, design: Design, config: Config) -> bool:
    return all(path.exists() for path in _files(folder, design, config).values())


@contextmanager
def importing() -> Iterator[None]:
    """For the import of draw.py, and with it torch: what libraries define stays, and is not searched for garbage.

    The search took 1.5 s of the 7.7 of importing, and a quarter of a second each time that a model was freed.
    """
    if "torch" in sys.modules or not gc.isenabled():  # another program's process, whose objects are not ours to keep
        yield
        return
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


class _Manifest:
    """manifest.json as it is made: the recipe, the size of batches, and of each picture its files and its refining."""

    def __init__(self, folder: Path, recipe: dict[str, Any], designs: Sequence[Design], config: Config) -> None:
        self.folder, self.recipe, self.designs, self.config = folder, recipe, designs, config
        self.path = folder / gallery.MANIFEST
        self.batch_size: int | None = config.inference_batch_size or self._batch_size_before()

    def _batch_size_before(self) -> int | None:
        if not _is_of(self.folder, self.recipe):
            return None
        size = json.loads(self.path.read_text(encoding="utf-8")).get("batch_size")
        return size if isinstance(size, int) and size > 0 else None

    def _row(self, design: Design) -> dict[str, Any]:
        files = _files(self.folder, design, self.config).items()
        names = {"refined" if refined else "base": path.name for refined, path in files}
        changes = refining.read_changes(_before(self.folder, design))
        row = {"prompt": design.prompt, "seed": design.seed, "files": names}
        return row | {"refining": changes} if changes else row

    def batches(self, size: int) -> Iterator[Sequence[Design]]:
        """Who shares a batch is noted before the first is drawn: a resumed run makes the very same pictures."""
        self.batch_size = self.batch_size or size
        self.write()
        for start in range(0, len(self.designs), self.batch_size):
            yield self.designs[start : start + self.batch_size]

    def kept(self) -> Path:
        """The folder for latents: of this recipe and these batches, and of no other that was left here."""
        plan = json.dumps([self.recipe, self.batch_size], sort_keys=True).encode()
        return self.folder / UNFINISHED / hashlib.sha256(plan).hexdigest()[:16]

    def write(self) -> list[dict[str, Any]]:
        """Returns the rows of the pictures as they are now."""
        rows = [self._row(design) for design in self.designs]
        content = {"recipe": self.recipe, "batch_size": self.batch_size, "pictures": rows}
        write_atomically(self.path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
        return rows


def _draw(config: Config, lora: Path | None, manifest: _Manifest) -> dict[Path, gallery.Shown]:
    """Draw the batches of which a picture is missing, and return what the page shows of them."""
    folder = manifest.folder
    if not (folder / UNFINISHED).exists():  # else it may be that the base has done its part
        hub.read_ahead(config.pretrained_model, ["text_encoder", "text_encoder_2", "unet"], config.variant)
    with importing():
        from lace_lora.drawing import phases  # brings torch, which takes seconds

    planned = manifest.batches(phases.pictures_at_once(config))
    batches = [batch for batch in planned if not all(_is_drawn(folder, one, config) for one in batch)]
    batch_of = {design: batch for batch in batches for design in batch}
    for place in (manifest.kept(), folder / BEFORE):
        place.mkdir(parents=True, exist_ok=True)
    settings = recipe.without_folders({name: value for name, value in manifest.recipe.items() if name != "prompts"})
    known_as = lora_name(config, lora)
    shown: dict[Path, gallery.Shown] = {}

    def save(design: Design, base: Image.Image | None, refined: Image.Image | None, moved: float | None) -> None:
        pictures = {False: base, True: refined}
        missing = {kind: path for kind, path in _files(folder, design, config).items() if not path.exists()}
        if missing and refined and moved is not None:  # first, so that no picture is without it
            refining.save_before(_before(folder, design), base, refined, moved)
        for is_refined, path in missing.items():
            picture = pictures[is_refined]
            assert picture is not None
            own = Recipe(design, is_refined, batch_of[design], settings, known_as)
            recipe.save_picture(path, picture, own)
            if is_refined == config.refine:  # now, while the GPU is at work, rather than at the end
                at_hand = picture if path.suffix == ".png" else None  # a JPEG is not what it was made from
                shown[path] = gallery.as_shown(path, at_hand)

    phases.draw_pictures(config, lora, batches, manifest.kept(), save)
    return shown


def _publish(manifest: _Manifest, shown: dict[Path, gallery.Shown]) -> None:
    """Contact sheet, page and the whole manifest, over all finished pictures."""
    folder, config = manifest.folder, manifest.config
    measured = [row.get("refining", {}) for row in manifest.write()]
    cards = []
    for design, changes, warning in zip(manifest.designs, measured, refining.warnings(measured), strict=True):
        files = _files(folder, design, config)
        kept = _before(folder, design).with_suffix(".jpg")
        before = next((path for path in (kept, files.get(False)) if path and path.exists()), None)
        cards.append(Card(design, files[config.refine], before if config.refine else None, **changes, warning=warning))
    with ThreadPoolExecutor() as pool:  # Pillow works without Python's lock
        older = [card.file for card in cards if card.file not in shown]
        shown = shown | dict(zip(older, pool.map(gallery.as_shown, older), strict=True))
        sheet = pool.submit(gallery.contact_sheet, [shown[card.file].small for card in cards])
        embedded = {path: one.attributes for path, one in shown.items()}
        page = gallery.page(folder.name, cards, recipe.without_folders(manifest.recipe), embedded)
    write_atomically(folder / gallery.CONTACT_SHEET, sheet.result())
    write_atomically(folder / gallery.PAGE, page.encode())


def _before(folder: Path, design: Design) -> Path:
    return folder / BEFORE / f"{design.index:03d}"


def _print_plan(config: Config, prompts: list[str], lora: Path | None, folder: Path, missing: int) -> None:
    print(f"Would draw {missing} of {config.num_images} pictures, {config.width}x{config.height}, into {folder}")
    print(f"LoRA: {lora or 'none (lora_scale is 0)'}; refining: {config.refiner_flow if config.refine else 'off'}")
    print("\n".join(f"prompt: {prompt}" for prompt in prompts))


def _sha256(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})", DISK_OR_DRIVE) from error
