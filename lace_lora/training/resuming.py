"""Whether a training begins, resumes or is finished: what has to be as it was, what to go on from. Without torch."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lace_lora import files
from lace_lora.config import LORA_FILE, TRAINING, Config
from lace_lora.errors import UserError
from lace_lora.pictures import photo_folder
from lace_lora.pictures.checking import Picture
from lace_lora.sdxl import model_kind
from lace_lora.training import checkpoint, selection

logger = logging.getLogger(__name__)

PICTURES_FILE = "pictures.json"  # in lora_output_dir: the names of a run's pictures, those held out too, by SHA-256
START_OVER = "set lora_output_dir to a new folder to start over"
HELD_OUT = "which pictures are held out (validation_fraction)"  # in a run's fingerprint


def run_fingerprint(
    config: Config, pictures: Sequence[Picture], captions: dict[Path, str], init_lora: Path | None = None
) -> dict[str, Any]:
    """What must not change when a run is resumed, by name; pictures and captions as hashes of their contents."""
    fingerprint = config.subset(TRAINING) | {"lora_alpha": config.alpha}
    if config.with_prior_preservation:
        fingerprint["class_prompt"] = config.class_prompt
    if config.train_script:
        fingerprint["train_script"] = True
    if init_lora:
        fingerprint["init_lora"] = files.file_sha256(init_lora)
    training, held_out = selection.split(config, pictures)
    fingerprint[HELD_OUT] = files.json_digest([picture.sha256 for picture in held_out]) if held_out else ""
    most = max(selection.views(config, training).values(), default=1)
    fingerprint["crops_per_image"] = most
    if most > 1:
        fingerprint["crop_caption"] = config.crop_caption
    fingerprint["pictures"] = files.json_digest(sorted(picture.sha256 for picture in pictures))
    fingerprint["captions"] = files.json_digest(sorted([p.sha256, captions[p.path]] for p in pictures))
    return fingerprint


def find_init_lora(config: Config) -> Path | None:
    """The LoRA file to begin with.

    Raises:
        UserError: there is none, or it has another rank or other layers than the LoRA that is trained.
    """
    if not config.init_lora:
        return None
    path = Path(config.init_lora, LORA_FILE) if Path(config.init_lora).is_dir() else Path(config.init_lora)
    if not path.is_file():
        where = "set it to a .safetensors file or a training's folder; or leave it empty, if the run has begun already"
        raise UserError(f"init_lora: no LoRA found at {path}: {where}")
    model_kind.check_init_lora(path, config)
    return path


def find_origin(config: Config) -> str | None:
    """Which checkpoint `resume_from_checkpoint` names, as its run's checkpoints will record it; None if it names none.

    Raises:
        UserError: it is not a complete checkpoint.
    """
    folder = checkpoint.named(Path(config.lora_output_dir), config.resume_from_checkpoint)
    if folder is None:
        return None
    if reason := checkpoint.verify(folder):
        advice = "name a folder like checkpoint-500, or set it to latest"
        raise UserError(f"resume_from_checkpoint: {folder} cannot be used ({reason}): {advice}")
    return checkpoint.origin_of(folder)


def picture_names(config: Config, pictures: Sequence[Picture]) -> dict[str, str]:
    """The pictures by SHA-256, as `PICTURES_FILE` has them."""
    return {picture.sha256: photo_folder.shown(picture.path, config.images_dir) for picture in pictures}


def picture_changes(config: Config, pictures: Sequence[Picture]) -> str:
    """Which pictures are new or gone since the run in `lora_output_dir` began, in brackets; nothing, if not known."""
    try:
        former = json.loads(Path(config.lora_output_dir, PICTURES_FILE).read_text())
        names = picture_names(config, pictures)
        kinds = {
            "new": [name for digest, name in names.items() if digest not in former],
            "gone": [name for digest, name in former.items() if digest not in names],
        }
    except (OSError, ValueError, AttributeError):
        return ""
    found = [f"{len(them)} {kind}: {files.few(them)}" for kind, them in kinds.items() if them]
    return f" ({', and '.join(found)})" if found else ""


def finished_step(config: Config, fingerprint: dict[str, Any], origin: str | None, changes: str) -> int:
    """How many steps the LoRA in `lora_output_dir` was trained; 0 if there is none, or none of a run from `origin`.

    Raises:
        UserError: it is not of this program, or of other settings or pictures: it is never overwritten.
    """
    path = config.lora_file
    if not path.exists():
        return 0
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
        step, trained_on = int(metadata["step"]), json.loads(metadata["learns"])
    except (SafetensorError, OSError, KeyError, ValueError):
        raise UserError(f"{path} exists and is not a LoRA of this program: {START_OVER}") from None
    _must_match(trained_on, fingerprint, path, changes)
    return step if origin in (None, metadata.get("origin")) else 0


def find_resume_checkpoint(
    config: Config, fingerprint: dict[str, Any], origin: str | None, changes: str
) -> tuple[Path | None, str | None]:
    """The checkpoint to resume from, verified, and the origin of its run; None to start at step 0.

    A run that began at a named checkpoint, its `origin`, resumes from its own newest.

    Raises:
        UserError: there are checkpoints, but none is complete, or it has too many steps; resuming is off; settings or
            pictures have changed.
    """
    output_dir, requested = Path(config.lora_output_dir), config.resume_from_checkpoint
    if not requested:
        if checkpoint.checkpoints(output_dir) or config.lora_file.exists():
            raise UserError(
                f"{output_dir} contains an earlier run: set resume_from_checkpoint to latest, or {START_OVER}"
            )
        return None, None
    folder, skipped = checkpoint.newest(output_dir, origin or "")
    for reason in skipped:
        logger.warning("skipped an unusable checkpoint (%s)", reason)
    folder = folder or checkpoint.named(output_dir, requested)
    if folder is None:
        if skipped:
            raise UserError(f"no complete checkpoint in {output_dir} ({'; '.join(skipped)}): {START_OVER}")
        return None, None
    state = checkpoint.read_state(folder)
    _must_match(state["learns"], fingerprint, folder, changes)
    if state["step"] > config.max_train_steps:
        advice = f"raise it to {state['step']} or more, or set resume_from_checkpoint to a checkpoint with fewer steps"
        raise UserError(f"max_train_steps is {config.max_train_steps}, fewer than {folder} has: {advice}")
    return folder, origin or state.get("origin")


def _must_match(trained_on: dict[str, Any], fingerprint: dict[str, Any], path: Path, picture_changes: str) -> None:
    # As it was before there were these settings.
    trained_on = {"crops_per_image": 1, HELD_OUT: "", "lora_targets": "attention"} | trained_on
    changed = [name for name, value in fingerprint.items() if trained_on.get(name) != value]
    if "crops_per_image" in changed and "crop_caption" in changed:
        changed.remove("crop_caption")  # there were no close-ups
    if not changed:
        return

    def shown(name: str) -> str:
        if name == "pictures":
            return f"pictures{picture_changes}"
        if not hasattr(Config, name) or name == "init_lora":  # whose value is a hash
            return name
        return f"{name} (was {trained_on.get(name)}, is {fingerprint[name]})"

    more = ""
    if "pictures" in changed and {*changed} <= {"pictures", "captions", HELD_OUT, "crops_per_image"}:
        more = f"; to go on there from what it has learnt, set init_lora: {path}"
    raise UserError(
        f"{path} was trained with different settings or pictures; changed: {', '.join(map(shown, changed))}. "
        f"Change them back, or {START_OVER}{more}"
    )
