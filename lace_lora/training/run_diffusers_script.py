"""What accelerate runs with `train_script`: diffusers' script, with flags from our settings and only the used pictures.

    accelerate launch --module lace_lora.training.run_diffusers_script --config lora_output/config.yaml --job job.json

Its result is saved under the same file names as ours.
"""

import json
import logging
import os
import runpy
import sys
import traceback
from dataclasses import replace
from pathlib import Path

from lace_lora import console
from lace_lora.config import LORA_FILE, Config
from lace_lora.errors import UserError, explain, first_line
from lace_lora.files import write_atomically
from lace_lora.process import ADVICE, Stopped
from lace_lora.sdxl import lora_weights, models
from lace_lora.training import diffusers_script, launch, results

logger = logging.getLogger("train_lora")

SCRIPT_FOLDER = "train_script"  # in lora_output_dir: what the script writes
_PRECISIONS = {"float32": "no", "float16": "fp16", "bfloat16": "bf16"}  # accelerate's names by PyTorch's


def main() -> int:
    is_main = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.INFO if is_main else logging.ERROR, format="%(message)s")
    models.prepare_process()
    return launch.run_job(
        "Run diffusers' training script", lambda config, job, folder, _stop: run(config, job, folder / "pictures")
    )


def run(config: Config, job: launch.Job, pictures: Path) -> str:
    """Run the script in this process, on links to the used pictures in `pictures`; returns the closing line.

    Raises:
        UserError: the script failed, or its checkpoints were trained with different settings or pictures.
    """
    script = Path(str(config.train_script)).absolute()
    folder = Path(config.lora_output_dir, SCRIPT_FOLDER).absolute()
    folder.mkdir(exist_ok=True)
    pictures.mkdir(exist_ok=True)
    fingerprint_file = folder / "learns.json"  # of the script's checkpoints, which do not contain it
    if fingerprint_file.exists() and json.loads(fingerprint_file.read_text()) != job.fingerprint:
        raise UserError(f"{folder} was trained with other settings or pictures: set lora_output_dir to a new folder")
    write_atomically(fingerprint_file, json.dumps(job.fingerprint).encode())
    diffusers_script.hand_over(map(Path, job.captions), pictures, config.image_extensions)
    if set(job.captions.values()) != {config.instance_prompt}:
        logger.warning("%s trains every picture with instance_prompt: captions have no effect", script.name)
    dtype = models.pick_dtype(config.mixed_precision, models.pick_device(config.device))
    precision = _PRECISIONS[str(dtype).removeprefix("torch.")]
    flags = diffusers_script.flags_of(script)
    _run_as_main(script, diffusers_script.command_line(config, flags, pictures, folder, precision))
    if os.environ.get("RANK", "0") != "0":
        return ""
    state = lora_weights.read_state(folder / LORA_FILE)
    job = replace(job, captions=dict.fromkeys(job.captions, config.instance_prompt))
    layers, kind = models.layers_per_block(config.pretrained_model), models.load_noise_scheduler(config).config
    # The script's alpha is its rank.
    result = results.save_results(config, state, config.rank, config.max_train_steps, job, layers, kind.prediction_type)
    return f"trained {config.max_train_steps} steps with {script.name} and saved the LoRA to {result}"


def _run_as_main(script: Path, arguments: list[str]) -> None:
    sys.argv = [str(script), *arguments]
    see_above = "see its output above"
    try:
        runpy.run_path(str(script), run_name="__main__")
    except Stopped as stop:
        raise Stopped("stopped; run the same command again to resume from the script's checkpoint, if any") from stop
    except ModuleNotFoundError as error:
        raise UserError(f"{script} needs {error.name}, which is not installed: pip install {error.name}") from error
    except ImportError as error:  # a library is there in another version
        advice = "use the script of your diffusers version"
        raise UserError(f"{script} does not fit the installed packages ({first_line(error)}): {advice}") from error
    except SystemExit as end:
        if end.code:
            raise UserError(f"{script} ended with exit code {end.code}; {see_above}") from end
    except Exception as error:
        if explain(error, ADVICE):
            raise
        traceback.print_exc()
        raise UserError(f"{script} failed with {type(error).__name__}; {see_above}", exit_code=1) from error


if __name__ == "__main__":
    console.protect()
    sys.exit(main())
