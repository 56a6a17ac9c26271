"""`main.py --mode train`: check everything, write the annotations and the job, launch accelerate and wait for it.

No model is loaded here and torch is not imported: whatever is wrong with the input is reported within seconds.
"""

import json
import logging
import os
import shlex
import statistics
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path

import data_utils
from lace_lora import files, process
from lace_lora.config import LORA_FILE, Config, dump_config
from lace_lora.errors import DISK_OR_DRIVE, UserError, disk_advice
from lace_lora.pictures import checking, crops, gallery, image_files, photo_folder
from lace_lora.pictures.checking import Picture
from lace_lora.sdxl import hub
from lace_lora.training import captions, checkpoint, class_pictures, diffusers_script, launch, plan, resuming, selection

logger = logging.getLogger(__name__)

MAX_BROKEN = 0.1  # share of the pictures
LEFT_OUT = ("too small", "duplicate")  # reasons of pictures that are skipped, but not broken
MISSING = "not found"  # the reason for a line of the annotations without a picture


def run(config: Config, dry_run: bool = False) -> None:
    """Train the LoRA, resume its training, or report that it is finished. `dry_run` stops before anything is written.

    Where captions are missing that the caption model is to write, only these are written, for the user to correct.

    Raises:
        UserError: whatever the user can fix, with its exit code.
    """
    launch.check_packages(config)
    if config.accelerate_config:
        launch.check_accelerate_config(Path(config.accelerate_config))
    if config.train_script:
        diffusers_script.check(config)
    usable, annotations, to_caption = check_dataset(config)
    pictures, held_out = selection.split(config, usable)
    views = selection.views(config, pictures)
    selection.print_split(views, held_out)
    for warning in plan.warnings(config, [annotations.captions[picture.path] for picture in pictures], views.values()):
        logger.warning("warning: %s", warning)
    # No earlier run had the captions that are still to be written.
    captions_then = annotations.captions | dict.fromkeys(to_caption, "")
    init_lora = resuming.find_init_lora(config)
    fingerprint = resuming.run_fingerprint(config, usable, captions_then, init_lora)
    output_dir = Path(config.lora_output_dir)
    with nullcontext(0) if dry_run else _locked_output_dir(output_dir) as lock:
        class_files = class_pictures.existing(config) if config.with_prior_preservation else {}
        if config.with_prior_preservation and not config.train_script:  # the script draws its own
            fingerprint |= class_pictures.fingerprint(config, class_files)
        origin = resuming.find_origin(config)
        changes = resuming.picture_changes(config, usable)
        finished = resuming.finished_step(config, fingerprint, origin, changes)
        if finished >= config.max_train_steps and config.resume_from_checkpoint:
            print(f"Finished already: {config.lora_file} has {finished} steps. Raise max_train_steps to train further.")
            return
        resume, origin = resuming.find_resume_checkpoint(config, fingerprint, origin, changes)
        if finished and resume is None and not config.train_script:
            raise UserError(
                f"{config.lora_file} is finished, and no checkpoint is left to resume from: {resuming.START_OVER}"
            )
        downloads = _downloads(config, init_lora, to_caption)
        first_step = checkpoint.read_state(resume)["step"] if resume else 0
        print("\n".join(plan.describe(config, list(views.values()), first_step, downloads)))
        if dry_run:
            _print_plan(config, annotations, len(to_caption), len(class_files), resume)
        hub.require_gpu(config, "training SDXL on a CPU takes days")
        if dry_run:
            return
        if to_caption:
            _write_captions(config, to_caption, lock)
            return
        models = hub.fetch_models(replace(config, refine=False), init_lora)
        models["init_lora"] = str(init_lora) if init_lora else None
        with tempfile.TemporaryDirectory(prefix="lace-lora-") as folder:
            job_file, accelerate_file = Path(folder, "job.json"), Path(folder, "accelerate.yaml")
            command = launch.build_command(config, accelerate_file, job_file)
            _write_run_files(config, annotations, usable)
            to_draw = class_pictures.to_draw(config, class_files) if config.with_prior_preservation else {}
            job = launch.Job(
                captions={str(picture.path): annotations.captions[picture.path] for picture in pictures},
                contents={str(picture.path): picture.sha256 for picture in usable},
                fingerprint=fingerprint,
                resume=str(resume) if resume else None,
                origin=origin,
                models=models,
                class_pictures={str(path): digest for path, digest in class_files.items()},
                class_to_draw={str(path): number for path, number in to_draw.items()},
                views={str(path): count for path, count in views.items()},
                original_size=round(statistics.median(min(picture.width, picture.height) for picture in pictures)),
                held_out={str(picture.path): annotations.captions[picture.path] for picture in held_out},
            )
            accelerate_file.write_text(launch.ACCELERATE_SETTINGS)
            _run_job(command, job, job_file, lock, output_dir)
    _print_results(config)


def _write_captions(config: Config, to_caption: dict[Path, Path], lock: int) -> None:
    """Have the caption model write these files, in a process of its own, and say where they are."""
    with tempfile.TemporaryDirectory(prefix="lace-lora-") as folder:
        job_file, config_file = Path(folder, "job.json"), Path(folder, "config.yaml")
        job = launch.Job(to_caption={str(path): str(file) for path, file in to_caption.items()})
        config_file.write_text(dump_config(config), encoding="utf-8")
        command = launch.captions_command(config_file, job_file)
        _run_job(command, job, job_file, lock, Path(config.lora_output_dir))


def _run_job(command: list[str], job: launch.Job, job_file: Path, lock: int, output_dir: Path) -> None:
    """Run a process with its job and wait for its end; prints its closing line."""
    job_file.write_text(json.dumps(asdict(job)))
    files.share_lock(lock, output_dir)
    print(process.run(command, job_file.parent))


def _downloads(config: Config, init_lora: Path | None, to_caption: Collection[Path]) -> list[str]:
    """The models of which something is still to be downloaded."""
    missing = hub.check_models(replace(config, refine=False), init_lora, download=False)
    if to_caption and not hub.find_caption_model(str(config.caption_model), weights=True, download=False):
        missing.append(str(config.caption_model))
    return missing


def check_dataset(config: Config) -> tuple[list[Picture], data_utils.Annotations, dict[Path, Path]]:
    """Print the report on the pictures, and write it and the preview if they are set.

    Returns:
        The pictures to train on, all captions, and the files of captions that the caption model is to write.

    Raises:
        UserError: the pictures are too few, or too many are bad; report or preview cannot be written (exit 4).
    """
    where = config.image_extensions, config.recursive, _other_folders(config)
    images = image_files.named_as_pictures(config.images_dir, *where)
    found = _checked(config, images)
    captioned, _ = data_utils.caption_files(config.images_dir, images)
    to_caption = captions.files(config, [path for path in images if path not in captioned])
    written = {path: to_caption.pop(path) for path, file in list(to_caption.items()) if file.exists()}
    pictures = photo_folder.without_duplicates(found, config.images_dir, captioned | written)
    used = [picture.path for picture in pictures if picture.used]
    annotations = data_utils.plan_annotations(
        config.images_dir, config.instance_prompt, used, config.lora_output_dir, written
    )
    checked = set(images)
    others = {path: os.path.exists(path) for path in annotations.captions if path not in checked}
    missing = [path for path, is_there in others.items() if not is_there]
    if annotations.by_user:
        found += _checked(config, [path for path, is_there in others.items() if is_there])
        pictures = photo_folder.without_duplicates(found, config.images_dir, annotations.captions)
    pictures += [Picture(path, reason=f"{MISSING}: a line of {annotations.path.name}") for path in missing]
    print(data_utils.report_text(config.images_dir, pictures, annotations, config.instance_prompt, *where))
    if config.report:
        # A file name's undecodable bytes become JSON's own escapes.
        _write("report", Path(config.report), data_utils.report_json(pictures).encode(errors="backslashreplace"))
    trainable = _trainable(config, pictures, annotations)
    if config.preview:
        _write_preview(config, Path(config.preview), trainable)
    left = set() if annotations.by_user else {picture.path for picture in trainable}
    return trainable, annotations, {path: file for path, file in to_caption.items() if path in left}


def _other_folders(config: Config) -> set[Path]:
    """Folders whose pictures are not for training, even if they are in `images_dir`."""
    results = (config.lora_output_dir, config.output_dir, class_pictures.folder_of(config))
    return {Path(folder).resolve() for folder in results}


def _write_preview(config: Config, path: Path, pictures: Sequence[Picture]) -> None:
    if path.is_file() and not gallery.is_sheet(path):
        raise UserError(f"preview: {path} exists and is no preview: set it to another file", DISK_OR_DRIVE)
    names = {picture.path: photo_folder.shown(picture.path, config.images_dir) for picture in pictures}
    try:
        content = crops.preview(names, crops.Cropping.of(config), image_files.formats_of(config.image_extensions))
    except image_files.BROKEN as error:
        raise UserError(f"preview: a picture can no longer be read ({error}): run the same command again") from error
    _write("preview", path, content)
    print(f"Wrote {path}: {files.counted(len(pictures), 'picture')}, cropped as for training")


def _write(setting: str, path: Path, content: bytes) -> None:
    try:
        files.write_atomically(path, content)
    except OSError as error:
        raise UserError(
            f"{setting}: cannot write {path} ({error.strerror}): set it to a file that you can write", DISK_OR_DRIVE
        ) from error


def _checked(config: Config, paths: Sequence[Path]) -> list[Picture]:
    """Pictures as checked; those that this program drew are skipped."""
    formats = image_files.formats_of(config.image_extensions)
    pictures = checking.check_pictures(paths, config.min_image_size, formats)
    return [replace(one, reason="not a photo: drawn by this program") if one.drawn else one for one in pictures]


def _trainable(config: Config, pictures: Sequence[Picture], annotations: data_utils.Annotations) -> list[Picture]:
    """The pictures that are both usable and annotated."""
    rewrite = f"correct {annotations.path}, or delete it to have it written again"
    photos = [picture for picture in pictures if not picture.drawn]
    good = [picture for picture in photos if picture.used]
    bad = sum(not picture.used and not picture.reason.startswith(LEFT_OUT) for picture in photos)
    if bad > len(photos) * MAX_BROKEN and good and not config.skip_bad_images:
        missing = any(picture.reason.startswith(MISSING) for picture in photos)
        raise UserError(
            f"{bad} of {files.counted(len(photos), 'picture')} cannot be used, more than a tenth: "
            f"fix or remove those listed above, {rewrite + ', ' if missing else ''}"
            "or set skip_bad_images: true to train without them"
        )
    pictures = [picture for picture in good if picture.path in annotations.captions]
    if left_out := len(good) - len(pictures):
        message = "skipped %s that your own %s does not list; delete it to have it written again"
        logger.warning(message, files.counted(left_out, "picture"), annotations.path)
    if not pictures and annotations.by_user:
        raise UserError(f"no pictures to train on: see the list above, then {rewrite}")
    if not pictures:
        where = config.images_dir, config.image_extensions, config.recursive, _other_folders(config)
        raise UserError(f"no pictures to train on: {photo_folder.nothing_usable(*where)}")
    if len(pictures) < config.min_images:
        raise UserError(
            f"only {files.counted(len(pictures), 'picture')} to train on, but min_images is {config.min_images}: "
            "see the list above, then add pictures or lower min_images"
        )
    return pictures


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


def _write_run_files(config: Config, annotations: data_utils.Annotations, pictures: Sequence[Picture]) -> None:
    """Write annotations, resolved settings and what the pictures are, by their SHA-256."""
    folder, names = Path(config.lora_output_dir), resuming.picture_names(config, pictures)
    with _disk_errors(folder):
        data_utils.write_annotations(annotations)
        files.write_atomically(folder / resuming.PICTURES_FILE, json.dumps(names, indent=2).encode())
        files.write_atomically(folder / "config.yaml", dump_config(config).encode())


@contextmanager
def _disk_errors(output_dir: Path) -> Iterator[None]:
    """Turn disk errors into one-line errors."""
    try:
        yield
    except OSError as error:
        advice = disk_advice(error) or "set lora_output_dir to a folder that you can write to"
        reason = f"cannot write {error.filename or output_dir} ({error.strerror})"
        raise UserError(f"{reason}: {advice}", DISK_OR_DRIVE) from error


def _print_plan(
    config: Config, annotations: data_utils.Annotations, to_caption: int, class_count: int, resume: Path | None
) -> None:
    """What a real run would do; nothing is written."""
    output_dir = Path(config.lora_output_dir)
    if to_caption:
        written = f"{files.counted(to_caption, 'caption')} to {captions.folder_of(config)}"
        print(f"Would write {written}, and stop for you to correct them; the same command then goes on:")
    start = f"Would resume from {resume}" if resume else "Would start at step 0"
    print(start, f"and train up to step {config.max_train_steps}")
    print("Would read" if annotations.by_user else "Would write", annotations.path)
    if config.with_prior_preservation:
        missing = config.num_class_images - class_count
        print(f"Would use {files.counted(class_count, 'existing class picture')}, and first draw {missing} more")
    watching = ["metrics.csv", "loss.png"]
    watching += ["logs for TensorBoard"] if config.report_to == "tensorboard" else []
    watching += ["samples.png and samples"] if config.validation_steps else []
    print(f"Would write {output_dir}/config.yaml, checkpoints, {', '.join(watching)}, {LORA_FILE}")
    print(f"  and {config.lora_name}.safetensors, the same LoRA for ComfyUI, A1111, Forge and InvokeAI, with its card")


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
