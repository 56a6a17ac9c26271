"""`main.py --mode train`: check everything, write the annotations and the job, launch accelerate and wait for it.

No model is loaded here and torch is not imported: whatever is wrong with the input is reported within seconds.
"""

import json
import logging
import os
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

import data_utils
from lace_lora import files, machine, process
from lace_lora.config import LORA_FILE, TRAINING, Config, dump_config
from lace_lora.errors import DISK_OR_DRIVE, UserError, disk_advice
from lace_lora.pictures import checking, image_files, preview
from lace_lora.pictures.checking import Picture
from lace_lora.sdxl import hub
from lace_lora.training import checkpoint, class_pictures, diffusers_script, launch, plan

logger = logging.getLogger(__name__)

MAX_SKIPPED = 0.1  # share of the pictures
MISSING = "not found"  # the reason for a line of the annotations without a picture
START_OVER = "set lora_output_dir to a new folder to start over"


def run(config: Config, dry_run: bool = False) -> None:
    """Train the LoRA, resume its training, or report that it is finished. `dry_run` stops before anything is written.

    Raises:
        UserError: whatever the user can fix, with its exit code.
    """
    launch.check_packages(config)
    if config.accelerate_config:
        launch.check_accelerate_config(Path(config.accelerate_config))
    if config.train_script:
        diffusers_script.check(config)
    pictures, annotations = check_dataset(config)
    for warning in plan.warnings(config, [annotations.captions[picture.path] for picture in pictures]):
        logger.warning("warning: %s", warning)
    fingerprint = run_fingerprint(config, pictures, annotations.captions)
    output_dir = Path(config.lora_output_dir)
    with nullcontext(0) if dry_run else _locked_output_dir(output_dir) as lock:
        class_files = class_pictures.existing(config) if config.with_prior_preservation else {}
        if config.with_prior_preservation and not config.train_script:  # the script draws its own
            fingerprint |= class_pictures.fingerprint(config, class_files)
        origin = find_origin(config)
        finished = finished_step(config, fingerprint, origin)
        if finished >= config.max_train_steps and config.resume_from_checkpoint:
            print(f"Finished already: {config.lora_file} has {finished} steps. Raise max_train_steps to train further.")
            return
        resume, origin = find_resume_checkpoint(config, fingerprint, origin)
        if finished and resume is None and not config.train_script:
            raise UserError(f"{config.lora_file} is finished, and no checkpoint is left to resume from: {START_OVER}")
        downloads = hub.check_models(replace(config, refine=False), download=False)
        first_step = checkpoint.read_state(resume)["step"] if resume else 0
        print("\n".join(plan.describe(config, len(pictures), first_step, downloads)))
        if dry_run:
            _print_plan(config, annotations, len(class_files), resume)
        if config.device == "auto" and hub.is_full_size(config.pretrained_model):
            machine.require_gpu("training SDXL on a CPU takes days")
        if dry_run:
            return
        models = hub.fetch_models(replace(config, refine=False))
        with tempfile.TemporaryDirectory(prefix="lace-lora-") as folder:
            job_file, accelerate_file = Path(folder, "job.json"), Path(folder, "accelerate.yaml")
            command = launch.build_command(config, accelerate_file, job_file)
            _write_run_files(config, annotations)
            to_draw = class_pictures.to_draw(config, class_files) if config.with_prior_preservation else {}
            job = launch.Job(
                captions={str(picture.path): annotations.captions[picture.path] for picture in pictures},
                contents={str(picture.path): picture.sha256 for picture in pictures},
                fingerprint=fingerprint,
                resume=str(resume) if resume else None,
                origin=origin,
                models=models,
                class_pictures={str(path): digest for path, digest in class_files.items()},
                class_to_draw={str(path): number for path, number in to_draw.items()},
            )
            job_file.write_text(json.dumps(asdict(job)))
            accelerate_file.write_text(launch.ACCELERATE_SETTINGS)
            files.share_lock(lock, output_dir)
            print(process.run(command, Path(folder)))
    _print_results(config)


def check_dataset(config: Config) -> tuple[list[Picture], data_utils.Annotations]:
    """Print the report on the pictures; write `report` and `preview` if set; returns those to train on, all captions.

    Raises:
        UserError: the pictures are too few, or too many are bad; the report cannot be written (exit 4).
    """
    images = image_files.named_as_pictures(config.images_dir, config.image_extensions, config.recursive)
    pictures = _checked(config, images)
    captioned, _ = data_utils.caption_files(config.images_dir, [picture.path for picture in pictures if picture.used])
    once = [picture.path for picture in data_utils.drop_duplicates(pictures, captioned) if picture.used]
    annotations = data_utils.plan_annotations(config.images_dir, config.instance_prompt, once, config.lora_output_dir)
    checked = set(images)
    others = {path: os.path.exists(path) for path in annotations.captions if path not in checked}
    missing = [path for path, is_there in others.items() if not is_there]
    pictures += _checked(config, [path for path, is_there in others.items() if is_there])
    pictures = data_utils.drop_duplicates(pictures, annotations.captions)
    pictures += [Picture(path, reason=f"{MISSING}: a line of {annotations.path.name}") for path in missing]
    print(data_utils.report_text(config.images_dir, pictures, annotations, config.instance_prompt))
    if config.report:
        # A file name's undecodable bytes become JSON's own escapes.
        path, content = Path(config.report), data_utils.report_json(pictures).encode(errors="backslashreplace")
        try:
            files.write_atomically(path, content)
        except OSError as error:
            raise UserError(
                f"report: cannot write {path} ({error.strerror}): set it to a file that you can write", DISK_OR_DRIVE
            ) from error
    used = _trainable(config, pictures, annotations)
    if config.preview:
        shapes = image_files.crop_shapes(config.resolution, config.aspect_ratio_buckets)
        formats = image_files.formats_of(config.image_extensions)
        preview.write(Path(config.preview), [picture.path for picture in used], shapes, formats)
        print(f"Your pictures as they will be cropped: {config.preview}")
    return used, annotations


def _checked(config: Config, paths: Sequence[Path]) -> list[Picture]:
    """Pictures as checked; those that this program drew are skipped."""
    formats = image_files.formats_of(config.image_extensions)
    pictures = checking.check_pictures(paths, config.min_image_size, formats)
    drawn = f"{checking.NO_PHOTO}: drawn by this program"
    return [replace(one, reason=drawn) if one.drawn else one for one in pictures]


def _trainable(config: Config, pictures: Sequence[Picture], annotations: data_utils.Annotations) -> list[Picture]:
    """The pictures that are both usable and annotated."""
    rewrite = f"correct {annotations.path}, or delete it to have it written again"
    good = [picture for picture in pictures if picture.used]
    broken = [picture for picture in pictures if picture.broken]
    if len(broken) > len(good + broken) * MAX_SKIPPED and good and not config.skip_bad_images:
        missing = any(picture.reason.startswith(MISSING) for picture in broken)
        raise UserError(
            f"{len(broken)} of {len(good + broken)} pictures cannot be used: fix or remove those in the list above, "
            f"{rewrite + ', ' if missing else ''}or set skip_bad_images: true to train without them"
        )
    found, pictures = pictures, [picture for picture in good if picture.path in annotations.captions]
    if left_out := len(good) - len(pictures):
        message = "%d pictures are skipped, because your own %s does not list them; delete it to have it written again"
        logger.warning(message, left_out, annotations.path)
    if not pictures and annotations.by_user:
        raise UserError(f"no pictures to train on: see the list above, then {rewrite}")
    if not pictures:
        there = data_utils.what_is_there(config.images_dir)
        raise UserError(f"no pictures to train on in {config.images_dir} ({there}): {_what_to_set(config, found)}")
    if len(pictures) < config.min_images:
        raise UserError(
            f"only {len(pictures)} pictures to train on, but min_images is {config.min_images}: see the list above, "
            "then add pictures or lower min_images"
        )
    return pictures


def _what_to_set(config: Config, pictures: Sequence[Picture]) -> str:
    """What may help where no picture can be used, by what is in the folder."""
    advice = [line.partition("to use them, ")[2] for line in data_utils.other_files(config.images_dir, pictures)]
    if found := list(filter(None, advice)):
        return ", and ".join(found)
    if any(picture.reason.startswith(checking.TOO_SMALL) for picture in pictures):
        return "use larger ones, or lower min_image_size"
    return "see the list above" if pictures else "set images_dir to the folder with your photos"


def run_fingerprint(config: Config, pictures: Sequence[Picture], captions: dict[Path, str]) -> dict[str, Any]:
    """What must not change when a run is resumed, by name; pictures and captions as hashes of their contents."""
    fingerprint = config.subset(TRAINING) | {"lora_alpha": config.alpha}
    if config.with_prior_preservation:
        fingerprint["class_prompt"] = config.class_prompt
    if config.train_script:
        fingerprint["train_script"] = True
    fingerprint["pictures"] = files.json_digest(sorted(picture.sha256 for picture in pictures))
    fingerprint["captions"] = files.json_digest(sorted([p.sha256, captions[p.path]] for p in pictures))
    return fingerprint


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


def finished_step(config: Config, fingerprint: dict[str, Any], origin: str | None) -> int:
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
    _must_match(trained_on, fingerprint, path)
    return step if origin in (None, metadata.get("origin")) else 0


def find_resume_checkpoint(
    config: Config, fingerprint: dict[str, Any], origin: str | None
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
    _must_match(state["learns"], fingerprint, folder)
    if state["step"] > config.max_train_steps:
        advice = f"raise it to {state['step']} or more, or set resume_from_checkpoint to a checkpoint with fewer steps"
        raise UserError(f"max_train_steps is {config.max_train_steps}, fewer than {folder} has: {advice}")
    return folder, origin or state.get("origin")


def _must_match(trained_on: dict[str, Any], fingerprint: dict[str, Any], path: Path) -> None:
    changes = [
        f"{name} (was {trained_on.get(name)}, is {value})" if hasattr(Config, name) else name
        for name, value in fingerprint.items()
        if trained_on.get(name) != value
    ]
    if changes:
        raise UserError(
            f"{path} was trained with different settings or pictures; changed: {', '.join(changes)}. "
            f"Change them back, or {START_OVER}"
        )


@contextmanager
def _locked_output_dir(output_dir: Path) -> Iterator[int]:
    """The output folder, created if missing and locked for this run; if nothing was written into it, it is removed."""
    is_new = not output_dir.exists()
    with _disk_errors(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
    try:
        with files.lock_for_one_run(output_dir) as lock:
            with _disk_errors(output_dir):  # first, since it may restore a checkpoint
                checkpoint.clean_up(output_dir)
                files.remove_unfinished(output_dir / "samples")
            yield lock
    finally:
        if is_new:
            with suppress(OSError):  # not empty
                output_dir.rmdir()


def _write_run_files(config: Config, annotations: data_utils.Annotations) -> None:
    """Write annotations and resolved settings."""
    with _disk_errors(Path(config.lora_output_dir)):
        data_utils.write_annotations(annotations)
        files.write_atomically(Path(config.lora_output_dir, "config.yaml"), dump_config(config).encode())


@contextmanager
def _disk_errors(output_dir: Path) -> Iterator[None]:
    """Turn disk errors into one-line errors."""
    try:
        yield
    except OSError as error:
        advice = disk_advice(error) or "set lora_output_dir to a folder that you can write to"
        reason = f"cannot write {error.filename or output_dir} ({error.strerror})"
        raise UserError(f"{reason}: {advice}", DISK_OR_DRIVE) from error


def _print_plan(config: Config, annotations: data_utils.Annotations, class_count: int, resume: Path | None) -> None:
    """What a real run would do; nothing is written."""
    output_dir = Path(config.lora_output_dir)
    start = f"Would resume from {resume}" if resume else "Would start at step 0"
    print(start, f"and train up to step {config.max_train_steps}")
    print("Would read" if annotations.by_user else "Would write", annotations.path)
    if config.with_prior_preservation:
        missing = config.num_class_images - class_count
        print(f"Would use {class_count} existing class pictures, and first draw {missing} more")
    print(f"Would write {output_dir}/config.yaml, checkpoints, metrics.csv, loss.png, {LORA_FILE}")
    print(f"  and {config.lora_name}.safetensors, the same LoRA for ComfyUI, A1111, Forge and InvokeAI")


def _print_results(config: Config) -> None:
    """Where everything is, and the command that draws with it."""
    folder = Path(config.lora_output_dir)
    written = {
        "for ComfyUI, A1111, Forge and InvokeAI": f"{config.lora_name}.safetensors",
        "samples, by step": "samples.png",
        "loss": "loss.png",
        "TensorBoard": "logs",
    }
    for what, name in written.items():
        if (folder / name).exists():
            command = "tensorboard --logdir " if name == "logs" else ""
            print(f"{what}: {command}{shlex.quote(str(folder / name)) if command else folder / name}")
    program = os.path.relpath(Path(__file__).with_name("main.py"))
    draw = ["python", program, "--mode", "inference", "--config", str(folder / "config.yaml")]
    print(f"To draw with it: {shlex.join(draw)}")
