"""`main.py --mode train`: check everything, write the annotations and the job, launch accelerate, see it through.

No model is loaded here and torch is not imported: whatever can be wrong with the input is said within seconds.
"""

import hashlib
import json
import logging
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

import checkpoint
import class_pictures
import data_utils
import foreign_script
import hub
import image_files
import launcher
import supervise
from config import DISK_OR_DRIVE, Config, UserError
from image_files import Picture
from settings_file import dump_config

logger = logging.getLogger(__name__)

LORA_FILE = "pytorch_lora_weights.safetensors"
# A run cannot go on when one of these changes: it would be learning something else.
LEARNT_SETTINGS = (
    "pretrained_model", "revision", "resolution", "rank", "lora_alpha", "seed", "train_text_encoder", "optimizer",
    "with_prior_preservation", "pretrained_vae", "aspect_ratio_buckets",
)  # fmt: skip
MOST_BAD = 0.1  # share of the pictures
ANEW = "to start anew, set lora_output_dir to a new folder"


def run(config: Config, dry_run: bool = False) -> None:
    """Train the LoRA, or go on training it, or say that it is finished. `dry_run` stops before anything is written.

    Raises:
        UserError: whatever the user can mend, with its exit code.
    """
    if config.accelerate_config:
        launcher.check_accelerate_config(Path(config.accelerate_config))
    if config.train_script:
        foreign_script.check(config)
    taken, annotations = look_at_pictures(config)
    learns = what_is_learnt(config, taken, annotations.captions)
    output_dir = Path(config.lora_output_dir)
    with nullcontext(0) if dry_run else _own(output_dir) as lock:
        finished = finished_step(config, learns)
        if finished is not None and finished >= config.max_train_steps and config.resume_from_checkpoint:
            print(f"Finished already: {_lora_file(config)} has {finished} steps. Set max_train_steps higher to go on.")
            return
        of_class = class_pictures.pictures_there(config) if config.with_prior_preservation else {}
        if config.with_prior_preservation and not config.train_script:  # which draws its own
            learns |= class_pictures.what_is_learnt(config, of_class)
        resume = where_to_go_on(config, learns)
        if finished is not None and resume is None and not config.train_script:
            raise UserError(f"{_lora_file(config)} is finished, and no checkpoint is left to go on from: {ANEW}")
        if dry_run:
            _print_plan(config, annotations, of_class, resume)
            return
        models = hub.fetch_models(replace(config, refine=False))
        with tempfile.TemporaryDirectory(prefix="lace-lora-") as folder:
            job_file, config_file = Path(folder, "job.json"), Path(folder, "accelerate.yaml")
            command = launcher.build_command(config, config_file, job_file)
            _write_run_files(config, taken, finished)
            captions = data_utils.read_annotations(annotations.path)
            job = make_job(taken, captions, learns, resume, models)
            if config.with_prior_preservation:
                missing = class_pictures.pictures_to_draw(config, of_class)
                job["class_pictures"] = {str(path): digest for path, digest in of_class.items()}
                job["class_to_draw"] = {str(path): number for path, number in missing.items()}
            job_file.write_text(json.dumps(job))
            config_file.write_text(launcher.accelerate_settings())
            supervise.share(lock, output_dir)
            print(supervise.run(command, Path(folder)))


def look_at_pictures(config: Config) -> tuple[list[Picture], data_utils.Annotations]:
    """The pictures to train on and all captions, after the report on them is printed and, if wanted, written."""
    kinds = image_files.formats(config.image_extensions)
    images = data_utils.named_as_pictures(config.images_dir, config.image_extensions)
    pictures = image_files.check_pictures(images, config.min_image_size, kinds)
    annotations = data_utils.plan_annotations(
        config.images_dir, config.instance_prompt, [p.path for p in pictures if p.taken], config.lora_output_dir
    )
    others = [path for path in annotations.captions if path not in images]
    pictures += image_files.check_pictures(others, config.min_image_size, kinds)
    print(data_utils.report_text(config.images_dir, pictures, annotations, config.instance_prompt))
    if config.report:
        _write_report(Path(config.report), pictures)
    return _trainable(config, pictures, annotations), annotations


def _write_report(path: Path, pictures: Sequence[Picture]) -> None:
    try:
        # A file name's broken letters become JSON's own escapes.
        data_utils.write_atomically(path, data_utils.report_json(pictures).encode(errors="backslashreplace"))
    except OSError as error:
        raise UserError(f"report: {path} cannot be written ({error.strerror})", DISK_OR_DRIVE) from error


def _trainable(config: Config, pictures: Sequence[Picture], annotations: data_utils.Annotations) -> list[Picture]:
    """The pictures that are both good and annotated.

    Raises:
        UserError: they are too few, or too many of all are bad.
    """
    good = [picture for picture in pictures if picture.taken]
    bad = len(pictures) - len(good)
    if bad > len(pictures) * MOST_BAD and good and not config.skip_bad_images:
        raise UserError(
            f"{bad} of {len(pictures)} pictures cannot be taken: mend or remove those in the list above, "
            "or set skip_bad_images: true to train without them"
        )
    taken = [picture for picture in good if picture.path in annotations.captions]
    if len(taken) < len(good):
        left_out = len(good) - len(taken)
        logger.warning("%d pictures are not in %s, which is yours: they are left out", left_out, annotations.path)
    if not taken:
        raise UserError("no pictures to train on: see the list above, and set images_dir or image_extensions")
    if len(taken) < config.min_images:
        raise UserError(
            f"{len(taken)} pictures to train on, and min_images is {config.min_images}: see the list above, "
            "add pictures, or set min_images lower"
        )
    return taken


def what_is_learnt(config: Config, pictures: Sequence[Picture], captions: dict[Path, str]) -> dict[str, Any]:
    """All that must stay the same when a run goes on, by name; pictures and captions by the hash of their contents."""
    learns: dict[str, Any] = {name: getattr(config, name) for name in LEARNT_SETTINGS}
    learns["lora_alpha"] = config.alpha
    if config.with_prior_preservation:
        learns["class_prompt"] = config.class_prompt
    if config.train_script:
        learns["train_script"] = True
    learns["pictures"] = _digest(sorted(picture.sha256 for picture in pictures))
    learns["captions"] = _digest(sorted([picture.sha256, captions[picture.path]] for picture in pictures))
    return learns


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def finished_step(config: Config, learns: dict[str, Any]) -> int | None:
    """How many steps the LoRA in `lora_output_dir` was trained; None when there is none.

    Raises:
        UserError: it is not ours, or has learnt something else: it is never overwritten.
    """
    path = _lora_file(config)
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
        step, learnt = int(metadata["step"]), json.loads(metadata["learns"])
    except (SafetensorError, OSError, KeyError, ValueError):
        raise UserError(f"{path} is there already and does not come from this program: {ANEW}") from None
    _must_match(learnt, learns, path)
    return step


def where_to_go_on(config: Config, learns: dict[str, Any]) -> Path | None:
    """The checkpoint to resume from, proven whole; None begins anew.

    Raises:
        UserError: checkpoints are there but none is whole or wanted, or they have learnt something else.
    """
    output_dir, wanted = Path(config.lora_output_dir), config.resume_from_checkpoint
    found = checkpoint.checkpoints(output_dir)
    if not wanted:
        if found or _lora_file(config).exists():
            raise UserError(f"{output_dir} holds an earlier run, and resume_from_checkpoint is empty: {ANEW}")
        return None
    if wanted == "latest":
        folder, passed_over = checkpoint.newest(output_dir)
        for reason in passed_over:
            logger.warning("passed over %s", reason)
        if found and folder is None:
            raise UserError(f"no checkpoint in {output_dir} is whole ({'; '.join(passed_over)}): {ANEW}")
    else:
        folder = Path(wanted)
        if reason := checkpoint.verify(folder):
            raise UserError(f"resume_from_checkpoint: {folder} cannot be used: {reason}")
    if folder is not None:
        state = json.loads((folder / "state.json").read_text())
        _must_match(state["learns"], learns, folder)
    return folder


def _must_match(learnt: dict[str, Any], learns: dict[str, Any], place: Path) -> None:
    # A setting that an older version did not have was what is its default now.
    learnt = {name: Config.__dataclass_fields__[name].default for name in LEARNT_SETTINGS} | learnt
    changes = [
        f"{name} (was {learnt.get(name)}, is {value})" if name in Config.__dataclass_fields__ else name
        for name, value in learns.items()
        if learnt.get(name) != value
    ]
    if changes:
        raise UserError(f"{place} has learnt something else; changed: {', '.join(changes)}. Set them back, or, {ANEW}")


def make_job(
    pictures: Sequence[Picture],
    captions: dict[Path, str],
    learns: dict[str, Any],
    resume: Path | None,
    models: dict[str, Any],
) -> dict[str, Any]:
    """What the training process is told besides the settings, as JSON; `models` are settings, as paths."""
    return {
        "captions": {str(picture.path): captions[picture.path] for picture in pictures},
        "contents": {str(picture.path): picture.sha256 for picture in pictures},
        "learns": learns,
        "resume": str(resume) if resume else None,
        "models": models,
    }


@contextmanager
def _own(output_dir: Path) -> Iterator[int]:
    """The output folder, made if missing and locked for this run; it goes again where nothing was written into it."""
    is_new = not output_dir.exists()
    with _writing(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
    try:
        with supervise.sole_use(output_dir) as lock:
            with _writing(output_dir):  # before it is decided where to go on: a checkpoint may get its name back
                checkpoint.sweep(output_dir)
                checkpoint.sweep(output_dir / "samples")
            yield lock
    finally:
        if is_new:
            with suppress(OSError):  # not empty: kept
                output_dir.rmdir()


def _write_run_files(config: Config, taken: Sequence[Picture], finished: int | None) -> None:
    """Annotations and the resolved settings; a finished LoRA that is to be trained further keeps a name of its own."""
    output_dir = Path(config.lora_output_dir)
    with _writing(output_dir):
        data_utils.create_annotations(
            config.images_dir, config.instance_prompt, images=[p.path for p in taken], fallback_dir=output_dir
        )
        data_utils.write_atomically(output_dir / "config.yaml", dump_config(config).encode())
        was = f"step{finished}" if finished is not None else "earlier"  # or not of this program at all
        for path in (
            _lora_file(config),
            *(output_dir / f"{config.lora_name}{end}" for end in (".safetensors", ".json")),
        ):
            if path.exists():
                names = data_utils.numbered(output_dir, f"{path.stem}-{was}", path.suffix)
                path.rename(next(name for name in names if not name.exists()))


@contextmanager
def _writing(output_dir: Path) -> Iterator[None]:
    """Turns an error of the disk into a sentence."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{error.filename or output_dir} cannot be written ({error.strerror}): "
            "make room, or set lora_output_dir to a folder that you can write to",
            DISK_OR_DRIVE,
        ) from error


def _print_plan(
    config: Config, annotations: data_utils.Annotations, of_class: dict[Path, str], resume: Path | None
) -> None:
    """What a real run would do; nothing is written."""
    output_dir = Path(config.lora_output_dir)
    print(f"Would go on from {resume}" if resume else "Would begin at step 0", f"up to step {config.max_train_steps}")
    print("Would read" if annotations.by_user else "Would write", annotations.path)
    if config.with_prior_preservation:
        missing = config.num_class_images - len(of_class)
        print(f"Would learn {len(of_class)} class pictures that are there, and draw {missing} more first")
    print(f"Would write {output_dir}/config.yaml, checkpoints, metrics.csv, loss.png, {LORA_FILE}")
    print(f"  and {config.lora_name}.safetensors, the same for ComfyUI, A1111, Forge and InvokeAI")
    disk = next(folder for folder in (output_dir.absolute(), *output_dir.absolute().parents) if folder.exists())
    print(f"Free on that disk: {shutil.disk_usage(disk).free / 1e9:.1f} GB")
    print("Would run:", shlex.join(launcher.build_command(config, Path("accelerate.yaml"), Path("job.json"))))


def _lora_file(config: Config) -> Path:
    return Path(config.lora_output_dir) / LORA_FILE
