"""What a picture file says of its own making: ours, to make it again from, and A1111's text, which viewers read."""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image, PngImagePlugin

from config import UserError
from data_utils import write_atomically
from gallery import Design

# A1111's names; another one stays as diffusers has it.
_SAMPLERS = {
    "EulerDiscreteScheduler": "Euler", "EulerAncestralDiscreteScheduler": "Euler a", "DDIMScheduler": "DDIM",
    "DPMSolverMultistepScheduler": "DPM++ 2M", "UniPCMultistepScheduler": "UniPC",
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """All that one picture depends on."""

    design: Design
    refined: bool
    batch: Sequence[Design]  # whom it was drawn with: rounding depends on it
    settings: dict[str, Any]  # inference.RECIPE_SETTINGS, and the LoRA's SHA-256 sum
    lora_name: str = ""


def save_picture(path: Path, picture: Image.Image, recipe: Recipe) -> None:
    """Write a PNG or JPEG with its recipe inside; its name never stands for half of it.

    A PNG holds `prompt`, `seed`, `settings` and `batch` (both JSON) and A1111's `parameters` as text chunks; a JPEG
    holds the first four as a JSON comment, without the list of all prompts, which may not fit, and the last in EXIF.
    """
    design, content = recipe.design, io.BytesIO()
    batch = {"refined": recipe.refined, "designs": [[one.index, one.prompt, one.seed] for one in recipe.batch]}
    if path.suffix == ".png":
        text = PngImagePlugin.PngInfo()
        text.add_itxt("parameters", parameters(recipe))
        text.add_itxt("prompt", design.prompt)
        text.add_itxt("seed", str(design.seed))
        text.add_itxt("settings", json.dumps(recipe.settings, ensure_ascii=False))
        text.add_itxt("batch", json.dumps(batch, ensure_ascii=False))
        picture.save(content, format="PNG", pnginfo=text)
    else:
        own = {name: value for name, value in recipe.settings.items() if name != "prompts"}
        comment = {"prompt": design.prompt, "seed": design.seed, "settings": own, "batch": batch}
        exif = Image.Exif()
        user_comment = b"UNICODE\0" + parameters(recipe).encode("utf-16-be")
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = user_comment
        as_json = json.dumps(comment, ensure_ascii=False).encode()
        picture.save(content, format="JPEG", quality=95, subsampling=0, comment=as_json, exif=exif)
    write_atomically(path, content.getvalue())


def parameters(recipe: Recipe) -> str:
    """The text that Stable Diffusion web UI (A1111) writes, and that Forge, InvokeAI and viewers of pictures read."""
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
        "Model": Path(settings["pretrained_model"]).stem,
    }
    if recipe.refined:
        facts["Refiner"] = Path(settings["refiner_model"]).stem
        if settings["refiner_flow"] == "ensemble":
            facts["Refiner switch at"] = f"{settings['refiner_start']:g}"
        else:
            facts["Refiner strength"] = f"{settings['refiner_strength']:g}"
    facts["Version"] = "lace-lora"
    return "\n".join([*lines, ", ".join(f"{name}: {_quoted(str(value))}" for name, value in facts.items())])


def _quoted(value: str) -> str:
    """As A1111 writes what would fall apart otherwise."""
    return json.dumps(value, ensure_ascii=False) if set(value) & set(',:"\n') else value


def read(path: Path) -> Recipe:
    """What `save_picture` wrote.

    Raises:
        UserError: the file is not a picture of this program's, or of a version that wrote less.
    """
    try:
        with Image.open(path, formats=("PNG", "JPEG")) as picture:
            info = dict(picture.info)
        if picture.format == "JPEG":
            info = json.loads(info["comment"])
        else:
            info |= {name: json.loads(info[name]) for name in ("settings", "batch")}
        batch = [Design(int(index), str(prompt), int(seed)) for index, prompt, seed in info["batch"]["designs"]]
        mine = next(design for design in batch if (design.prompt, design.seed) == (info["prompt"], int(info["seed"])))
        return Recipe(mine, bool(info["batch"]["refined"]), batch, dict(info["settings"]))
    except (OSError, ValueError, KeyError, TypeError, SyntaxError, StopIteration) as error:
        reason = str(error).split("\n")[0] or type(error).__name__
        advice = "name a PNG or JPEG that `--mode inference` has written"
        raise UserError(f"rebuild: {path} holds no recipe to make it again from ({reason}): {advice}") from error
