"""The recipe inside a picture file: our JSON, for redrawing it, and A1111's text, which image viewers show."""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image, PngImagePlugin

from lace_lora.errors import UserError, first_line
from lace_lora.files import is_safetensors, write_atomically
from lace_lora.pictures.image_files import BROKEN, PNG_OPTIONS

TEXT = "lace-lora"  # the name of our text chunk in a PNG
MODELS = ("pretrained_model", "pretrained_vae", "refiner_model")  # settings that may be local folders
_MAX_BYTES = 65_000  # that fit into a JPEG segment
# A1111's names of schedulers; any other keeps diffusers' name.
_SAMPLERS = {
    "EulerDiscreteScheduler": "Euler", "EulerAncestralDiscreteScheduler": "Euler a", "DDIMScheduler": "DDIM",
    "DPMSolverMultistepScheduler": "DPM++ 2M", "UniPCMultistepScheduler": "UniPC",
}  # fmt: skip


@dataclass(frozen=True)
class Design:
    """One picture to draw."""

    index: int
    prompt: str
    seed: int


@dataclass(frozen=True)
class Drawn:
    """One finished design."""

    design: Design
    base: Image.Image | None  # also None in the ensemble's flow, unless it is to be saved
    refined: Image.Image | None
    latent_change: float | None  # see refining.py; None without refining


@dataclass(frozen=True)
class Recipe:
    """Everything that one picture depends on."""

    design: Design
    refined: bool
    batch: Sequence[Design]  # the designs it was drawn with: rounding depends on them
    settings: dict[str, Any]  # those that affect a picture, and the LoRA's SHA-256
    lora_name: str = ""


def save_picture(path: Path, picture: Image.Image, recipe: Recipe) -> None:
    """Write a PNG or JPEG atomically, with its recipe inside.

    A PNG contains our JSON and A1111's `parameters` as text chunks; a JPEG has ours as a comment and A1111's in EXIF,
    if they fit.
    """
    content, a1111 = io.BytesIO(), parameters(recipe)
    if path.suffix == ".png":
        text = PngImagePlugin.PngInfo()
        text.add_itxt("parameters", a1111)
        text.add_itxt(TEXT, _as_json(recipe, recipe.batch))
        picture.save(content, format="PNG", pnginfo=text, **PNG_OPTIONS)
    else:
        ours = (_as_json(recipe, batch).encode() for batch in (recipe.batch, [recipe.design]))
        comment = next((one for one in ours if len(one) < _MAX_BYTES), b"")
        exif, user_comment = Image.Exif(), b"UNICODE\0" + a1111.encode("utf-16-be")
        if len(user_comment) < _MAX_BYTES:
            exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = user_comment
        picture.save(content, format="JPEG", quality=95, subsampling=0, comment=comment, exif=exif)
    write_atomically(path, content.getvalue())


def _as_json(recipe: Recipe, batch: Sequence[Design]) -> str:
    prompts = list(dict.fromkeys(design.prompt for design in batch))
    content = {
        "prompt": recipe.design.prompt,
        "seed": recipe.design.seed,
        "refined": recipe.refined,
        "settings": recipe.settings,
        "prompts": prompts,
        "batch": [[design.index, prompts.index(design.prompt), design.seed] for design in batch],
    }
    return json.dumps(content, ensure_ascii=False)


def without_folders(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with only the last part of a local model's path: pictures are shown to others."""
    models = {name: settings[name] for name in MODELS if name in settings}
    return settings | {name: Path(value).name for name, value in models.items() if value and Path(value).exists()}


def parameters(recipe: Recipe) -> str:
    """The text that Stable Diffusion web UI (A1111) writes, and that Forge and picture viewers read."""
    settings, design = recipe.settings, recipe.design
    lora = f" <lora:{recipe.lora_name}:{settings['lora_scale']:g}>" if recipe.lora_name else ""
    lines = [f"{design.prompt}{lora}"]
    if settings["negative_prompt"]:
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    facts = {
        "Steps": settings["num_inference_steps"],
        "Sampler": _SAMPLERS.get(settings["scheduler"], settings["scheduler"]),
        "CFG scale": f"{settings['guidance_scale']:g}",
        "Seed": design.seed,
        "Size": f"{settings['width']}x{settings['height']}",
        "Model": _model(settings["pretrained_model"]),
    }
    refiner = _model(settings["refiner_model"])
    if recipe.refined and settings["refiner_flow"] == "ensemble":
        facts |= {"Refiner": refiner, "Refiner switch at": f"{settings['refiner_start']:g}"}
    elif recipe.refined:  # under names that A1111 does not read as its own refiner settings
        facts |= {"Refined with": refiner, "Refined strength": f"{settings['refiner_strength']:g}"}
    facts["Version"] = "lace-lora"
    return "\n".join([*lines, ", ".join(f"{name}: {_quoted(str(value))}" for name, value in facts.items())])


def _model(source: str) -> str:
    path = Path(source)
    return path.stem if is_safetensors(path) else path.name


def _quoted(value: str) -> str:
    """In quotes where A1111's parser would split it."""
    return json.dumps(value, ensure_ascii=False) if set(value) & set(',:"\n') else value


def is_drawn(content: bytes) -> bool:
    """Whether a picture file is this program's own: it has a recipe, or at least our text chunk."""
    try:
        with Image.open(io.BytesIO(content), formats=("PNG", "JPEG")) as picture:
            if TEXT in picture.info:
                return True
            comment = json.loads(picture.info.get("comment", b""))
    except (*BROKEN, RecursionError):  # another format, no comment, or another program's
        return False
    return isinstance(comment, dict) and {"prompt", "seed", "settings", "batch"} <= comment.keys()


def read(path: Path) -> Recipe:
    """The recipe that `save_picture` wrote into a file.

    Raises:
        UserError: the file was not drawn by this program, or its recipe is not valid.
    """
    try:
        with Image.open(path, formats=("PNG", "JPEG")) as picture:
            picture.load()
            content = json.loads(picture.info["comment" if picture.format == "JPEG" else TEXT])
        json.dumps(content, ensure_ascii=False).encode()  # refuses lone surrogates
        # The seeds of a drawing count up from a setting of at most 2**63 - 1.
        if not all(0 <= index < 100_000 and 0 <= seed < 2**63 + 100_000 for index, _, seed in content["batch"]):
            raise ValueError("an index or a seed is out of range")
        batch = [Design(int(index), content["prompts"][prompt], int(seed)) for index, prompt, seed in content["batch"]]
        own = next(one for one in batch if (one.prompt, one.seed) == (content["prompt"], content["seed"]))
        return Recipe(own, bool(content["refined"]), batch, dict(content["settings"]))
    except (*BROKEN, KeyError, IndexError, TypeError, StopIteration, RecursionError, OverflowError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else first_line(error)
        reason = "it contains none" if str(error) in (repr("comment"), repr(TEXT)) else reason
        advice = "name a PNG or JPEG as `--mode inference` wrote it; other programs remove the recipe"
        raise UserError(f"rebuild: no valid recipe in {path} ({reason}): {advice}") from error
