"""`main.py --mode inference`: prompts and LoRA to a folder of refined pictures with a contact sheet and a page.

Here everything is planned, checked and written; `draw.py` does the drawing. Nothing here imports torch before a
picture has to be drawn.
"""

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

import checkpoint
import gallery
import hub
import supervise
from config import DISK_OR_DRIVE, Config, UserError
from data_utils import numbered, write_atomically
from gallery import Card, Design

logger = logging.getLogger(__name__)

LORA_FILE = "pytorch_lora_weights.safetensors"
# Settings that say what a picture looks like; together with prompts and LoRA they are its recipe.
RECIPE_SETTINGS = (
    "pretrained_model", "revision", "pretrained_vae", "refiner_model", "lora_scale",
    "num_images", "width", "height", "num_inference_steps",
    "guidance_scale", "negative_prompt", "scheduler", "seed", "mixed_precision", "inference_batch_size", "refine",
    "refiner_flow", "refiner_strength", "refiner_start", "aesthetic_score", "negative_aesthetic_score", "image_format",
    "save_base",
)  # fmt: skip
ADVICE = "set inference_batch_size: 1, or a smaller width and height"


def run(config: Config, dry_run: bool = False) -> Path:
    """Draw `num_images` pictures, or the ones still missing, and return their folder.

    `dry_run` stops before anything is written.

    Raises:
        UserError: whatever the user can mend, with its exit code.
    """
    prompts = read_prompts(config)
    if len(prompts) > config.num_images:
        left_over = len(prompts) - config.num_images
        logger.warning("%d of %d prompts get no picture: num_images is %d", left_over, len(prompts), config.num_images)
    designs = [Design(index, prompts[index % len(prompts)], config.seed + index) for index in range(config.num_images)]
    lora = find_lora(config)
    recipe = {name: getattr(config, name) for name in RECIPE_SETTINGS}
    recipe |= {"prompts": prompts, "lora_sha256": _sha256(lora) if lora else None}
    folder = choose_folder(Path(config.output_dir), recipe)
    missing = [batch for batch in _batches(designs, config) if not all(_is_drawn(folder, d, config) for d in batch)]
    if dry_run:
        _print_plan(config, prompts, lora, folder, sum(map(len, missing)))
        return folder
    try:
        if missing:
            folder.mkdir(parents=True, exist_ok=True)
            with supervise.sole_use(folder):
                checkpoint.sweep(folder)
                models = hub.fetch_models(config)
                _write_manifest(folder, recipe, designs, config)
                _draw(replace(config, **models), lora, missing, folder, recipe)
        elif (folder / gallery.PAGE).exists():
            print("Finished already; other settings get a folder of their own.")
        if missing or not (folder / gallery.PAGE).exists():
            _publish(folder, designs, recipe, config)
    except (OSError, MemoryError, RuntimeError) as error:
        if explained := supervise.explain(error, ADVICE):
            raise UserError(*explained) from error
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
        raise UserError(f"prompts_file: {path} cannot be read as UTF-8 text ({error})") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"prompts_file: {path} is empty; write a prompt on each line")
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


def choose_folder(wanted: Path, recipe: dict[str, Any]) -> Path:
    """The folder of this recipe: `wanted`, or `wanted-2`, `wanted-3` … where other pictures are there already."""
    for folder in numbered(wanted.parent, wanted.name):
        if not _holds_pictures(folder) or _recipe_of(folder) == json.loads(json.dumps(recipe)):
            return folder
    raise AssertionError("names do not end")


def _holds_pictures(folder: Path) -> bool:
    ours = ("refined_output_*", "base_output_*", gallery.MANIFEST, gallery.PAGE, gallery.CONTACT_SHEET)
    return any(any(folder.glob(pattern)) for pattern in ours)


def _recipe_of(folder: Path) -> Any:
    try:
        recipe = json.loads((folder / gallery.MANIFEST).read_text(encoding="utf-8"))["recipe"]
        # A setting that an older version did not have was what is its default now.
        return {name: Config.__dataclass_fields__[name].default for name in RECIPE_SETTINGS} | recipe
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _batches(designs: list[Design], config: Config) -> Iterator[list[Design]]:
    """Who shares a batch is fixed by the settings alone, so that a resumed run makes the very same pictures."""
    for start in range(0, len(designs), config.inference_batch_size):
        yield designs[start : start + config.inference_batch_size]


def _files(folder: Path, design: Design, config: Config) -> dict[bool, Path]:
    """The files of one design, by whether they are refined."""
    kinds = ([True] if config.refine else []) + ([False] if config.save_base or not config.refine else [])
    return {refined: folder / design.file_name(config.image_format, refined) for refined in kinds}


def _is_drawn(folder: Path, design: Design, config: Config) -> bool:
    return all(path.exists() for path in _files(folder, design, config).values())


def _draw(config: Config, lora: Path | None, batches: list[list[Design]], folder: Path, recipe: dict[str, Any]) -> None:
    import draw  # brings torch

    def save(design: Design, picture: Image.Image, refined: bool) -> None:
        gallery.save_picture(_files(folder, design, config)[refined], picture, design, recipe)

    draw.draw_pictures(config, lora, batches, save)


def _write_manifest(folder: Path, recipe: dict[str, Any], designs: list[Design], config: Config) -> None:
    rows = []
    for design in designs:
        files = _files(folder, design, config).items()
        names = {"refined" if refined else "base": path.name for refined, path in files}
        rows.append({"prompt": design.prompt, "seed": design.seed, "files": names})
    content = json.dumps({"recipe": recipe, "pictures": rows}, indent=2, ensure_ascii=False) + "\n"
    write_atomically(folder / gallery.MANIFEST, content.encode())


def _publish(folder: Path, designs: list[Design], recipe: dict[str, Any], config: Config) -> None:
    """Contact sheet and page over all finished pictures."""
    files = [_files(folder, design, config) for design in designs]
    cards = [Card(d, f[config.refine], f.get(not config.refine)) for d, f in zip(designs, files, strict=True)]
    pictures = []
    for card in cards:
        with Image.open(card.file) as picture:
            pictures.append(picture.convert("RGB"))
    write_atomically(folder / gallery.CONTACT_SHEET, gallery.contact_sheet(pictures))
    write_atomically(folder / gallery.PAGE, gallery.page(folder.name, cards, recipe).encode())


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
