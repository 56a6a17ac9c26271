"""`train_script: path`: diffusers' own train_dreambooth_lora_sdxl.py in place of train_lora.py, from the same settings.

`main.py` checks the script; accelerate runs this file, which gives the script its flags and a folder with nothing but
the good pictures, and puts its result where ours would be.
"""

import argparse
import ast
import json
import logging
import os
import runpy
import sys
import traceback
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import class_pictures
import hub
from config import Config, UserError
from data_utils import write_atomically
from settings_file import load_config
from supervise import ADVICE, Stopped, StopSignal, explain, hold_shared, report_outcome

logger = logging.getLogger("train_lora")

# Where the script calls a setting otherwise.
FLAG_OF = {"pretrained_vae": "pretrained_vae_model_name_or_path"}
# Settings that are done with before the script starts, or that it gets in another way.
OURS = {
    "drive_mount_path", "images_dir", "lora_output_dir", "output_dir", "pretrained_model", "refiner_model", "variant",
    "revision", "report", "image_extensions", "min_image_size", "min_images", "skip_bad_images", "class_prompt",
    "with_prior_preservation", "class_data_dir", "num_class_images", "prior_loss_weight", "mixed_precision",
    "attention", "resume_from_checkpoint", "report_to", "accelerate_config", "train_script",
}  # fmt: skip
SCRIPT_FOLDER = "train_script"  # in lora_output_dir: what the script writes


def main() -> int:
    parser = argparse.ArgumentParser(description="Run a training script; launched by `main.py --mode train`.")
    parser.add_argument("--config", required=True, type=Path, help="resolved settings")
    parser.add_argument("--job", required=True, type=Path, help="what train.py worked out: captions, models")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    def work(_stop: StopSignal) -> str:
        job = json.loads(arguments.job.read_text())
        config = replace(load_config(arguments.config), **job["models"])
        hold_shared(Path(config.lora_output_dir))
        return run(config, job, arguments.job.parent / "pictures")

    return report_outcome(work, arguments.job.parent)


def check(config: Config) -> None:
    """Name the settings that the script has no flag for.

    Raises:
        UserError: the script is not there, or is not one; a model in a single file, which it cannot read.
    """
    path = Path(str(config.train_script))
    flags = flags_of(path)
    if Path(config.pretrained_model).is_file():
        raise UserError("train_script reads no model in a single file: name a hub model or a folder, or leave it empty")
    if lost := without_flag(config, flags):
        logger.warning("%s has no flag for: %s; they have no effect", path.name, ", ".join(lost))


def flags_of(path: Path) -> dict[str, bool]:
    """The flags that a script declares, and whether each is a switch; read from its source, which is not run."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"train_script: {path} cannot be read as a Python script ({error})") from error
    flags: dict[str, bool] = {}
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument":
            names = [part.value for part in call.args if isinstance(part, ast.Constant)]
            switch = any(word.arg == "action" for word in call.keywords)
            flags |= {str(name).removeprefix("--"): switch for name in names}
    if not {"instance_data_dir", "pretrained_model_name_or_path", "output_dir"} <= set(flags):
        raise UserError(f"train_script: {path} is not diffusers' train_dreambooth_lora_sdxl.py: its flags are missing")
    return flags


def without_flag(config: Config, flags: dict[str, bool]) -> list[str]:
    """Settings of the training that differ from their defaults and that the script knows nothing of."""
    fields = Config.__dataclass_fields__
    names = list(fields)
    training = names[: names.index("prompt")]  # what follows is about drawing
    changed = [name for name in training if name not in OURS and getattr(config, name) != fields[name].default]
    return [name for name in changed if FLAG_OF.get(name, name) not in flags]


def run(config: Config, job: dict[str, Any], pictures: Path) -> str:
    """Run the script in this process, with links to the good pictures in `pictures`; returns the closing sentence."""
    import lora_weights
    import models

    script = Path(str(config.train_script)).absolute()
    folder = Path(config.lora_output_dir, SCRIPT_FOLDER).absolute()
    folder.mkdir(exist_ok=True)
    pictures.mkdir(exist_ok=True)
    _own(folder / "learns.json", job["learns"])
    for number, path in enumerate(job["captions"]):
        with suppress(FileExistsError):  # another process of this run made it
            (pictures / f"{number:05d}{Path(path).suffix}").symlink_to(Path(path).absolute())
    if set(job["captions"].values()) != {config.instance_prompt}:
        logger.warning("%s learns every picture with the instance prompt: captions have no effect", script.name)
    dtype = models.pick_dtype(config.mixed_precision, models.pick_device())
    precision = {"float32": "no", "float16": "fp16", "bfloat16": "bf16"}[str(dtype).removeprefix("torch.")]
    _run_as_main(script, command_line(config, flags_of(script), pictures, folder, precision))
    if os.environ.get("RANK", "0") != "0":
        return ""
    learnt = lora_weights.read_lora(folder / lora_weights.LORA_FILE)
    job["captions"] = dict.fromkeys(job["captions"], config.instance_prompt)
    layers, kind = models.layers_per_block(config.pretrained_model), models.load_noise_scheduler(config).config
    # The script's alpha is its rank.
    place = lora_weights.save_results(
        config, learnt, config.rank, config.max_train_steps, job, layers, kind.prediction_type
    )
    return f"trained {config.max_train_steps} steps with {script.name}; the LoRA is {place}"


def _own(path: Path, learns: dict[str, Any]) -> None:
    """The script's checkpoints do not say what they have learnt: a file beside them does.

    Raises:
        UserError: they have learnt something else.
    """
    if path.exists() and json.loads(path.read_text()) != learns:
        raise UserError(f"{path.parent} has learnt something else: to start anew, set lora_output_dir to a new folder")
    write_atomically(path, json.dumps(learns).encode())


def command_line(config: Config, flags: dict[str, bool], pictures: Path, folder: Path, precision: str) -> list[str]:
    """The script's arguments for these settings."""
    values: dict[str, Any] = {
        FLAG_OF.get(name, name): getattr(config, name) for name in Config.__dataclass_fields__ if name not in OURS
    }
    values |= {
        "pretrained_model_name_or_path": config.pretrained_model,
        "variant": config.variant if hub.has_weights(Path(config.pretrained_model, "unet"), config.variant) else None,
        "instance_data_dir": pictures,
        "output_dir": folder,
        "mixed_precision": precision,
        "center_crop": True,  # as ours
        "enable_xformers_memory_efficient_attention": config.attention == "xformers",
        "resume_from_checkpoint": "latest" if any(folder.glob("checkpoint-*")) else None,
    }
    if config.with_prior_preservation:
        # With larger batches the script pairs pictures and prompts wrongly: it repeats [instance, class] over a row of
        # all instances and then all classes.
        values |= {
            "train_batch_size": 1,
            "gradient_accumulation_steps": config.train_batch_size * config.gradient_accumulation_steps,
            "with_prior_preservation": True,
            "class_data_dir": class_pictures.folder_of(config).absolute(),
            "class_prompt": config.class_prompt,
            "num_class_images": config.num_class_images,
            "prior_loss_weight": config.prior_loss_weight,
        }
    arguments = []
    for name, value in values.items():
        if name in flags and value is not None and value is not False:
            arguments += [f"--{name}"] if flags[name] else [f"--{name}={value}"]
    return arguments


def _run_as_main(script: Path, arguments: list[str]) -> None:
    sys.argv = [str(script), *arguments]
    said = "what it printed above says why"
    try:
        runpy.run_path(str(script), run_name="__main__")
    except Stopped as stop:
        raise Stopped("stopped; the same command goes on from the script's last checkpoint, if it made one") from stop
    except ModuleNotFoundError as error:
        raise UserError(f"{script} needs {error.name}, which is not installed: pip install {error.name}") from error
    except ImportError as error:  # what it asks for is in another version
        raise UserError(f"{script} does not fit the installed packages: {str(error).splitlines()[0]}") from error
    except SystemExit as end:
        if end.code:
            raise UserError(f"{script} ended with code {end.code}; {said}") from end
    except Exception as error:
        if explain(error, ADVICE):
            raise
        traceback.print_exc()
        raise UserError(f"{script} failed with {type(error).__name__}; {said}", exit_code=1) from error


if __name__ == "__main__":
    sys.exit(main())
