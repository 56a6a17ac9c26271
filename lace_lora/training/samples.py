"""Pictures drawn during a training: class pictures by the base model, and sample grids with the LoRA as it is then."""

import io
import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from PIL import Image
from torch import Tensor

from lace_lora import seeds
from lace_lora.config import Config
from lace_lora.errors import UserError, first_line, is_out_of_memory
from lace_lora.fast import drawing_unet
from lace_lora.files import write_atomically
from lace_lora.pictures import gallery
from lace_lora.pictures.image_files import open_finished
from lace_lora.progress import Progress
from lace_lora.sdxl import sampling
from lace_lora.sdxl.prompts import Embeddings
from lace_lora.sdxl.vae import decode_latents
from lace_lora.training.train_step import TrainStep

MAX_COLUMNS = 40  # of the strip, which is at most 8192 pixels wide
SAMPLES = "samples"  # in lora_output_dir: the folder of single steps, and with .png the strip of all

logger = logging.getLogger("train_lora")


@dataclass
class SampleInputs:
    """What sample grids need besides the UNet."""

    embed: Callable[[], Embeddings]  # the validation prompt's, by the text encoders as they are now
    vae: AutoencoderKL  # parked on the CPU between grids


def draw_class_pictures(
    config: Config, numbers: Mapping[str, int], unet: UNet2DConditionModel, vae: AutoencoderKL,
    noise_scheduler: DDPMScheduler, embeddings: Embeddings,
) -> None:  # fmt: skip
    """Draw files for prior preservation, each with the seed that its number stands for."""
    for name, number in Progress(numbers.items(), desc="drawing class pictures", unit="picture"):
        seed = seeds.stream_seed(config.seed, "class", number)
        [picture] = decode_latents(
            vae, _latents(replace(config, original_size=None), unet, noise_scheduler, embeddings, [seed])
        )
        content = io.BytesIO()
        picture.save(content, format="PNG")
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content.getvalue())  # one by one, so that a stop loses at most one


def draw_samples(
    config: Config,
    step: int,
    train_step: TrainStep,
    noise_scheduler: DDPMScheduler,
    sample_inputs: SampleInputs,
    original_size: int | None,
) -> Image.Image | None:
    """Draw the samples of a step into `samples/step-<step>.png`, and add them to `samples.png`, which is returned.

    If that is not possible, the log says why, and training goes on.
    """
    square = replace(config, width=config.resolution, height=config.resolution).with_photo_size(original_size)
    sample_seeds = [config.seed + index for index in range(config.num_validation_images)]

    def draw(at_once: int) -> list[Image.Image]:
        unet = train_step.networks["unet"]
        vae, embeddings, pictures = sample_inputs.vae.to(train_step.device), sample_inputs.embed(), []
        for start in range(0, len(sample_seeds), at_once):
            batch = sample_seeds[start : start + at_once]
            with train_step.autocast(), drawing_unet.replaying(unet) if train_step.fused else nullcontext():
                latents = _latents(square, unet, noise_scheduler, embeddings, batch)
            pictures += decode_latents(vae, latents)
        return pictures

    path = Path(config.lora_output_dir, SAMPLES, f"step-{step:06d}.png")
    try:
        train_step.train(False)
        # Drawing takes a quarter of a training step's memory, unless that computes its activations again.
        at_once = config.train_batch_size * (1 if train_step.checkpointing else 4)
        pictures = train_step.within_memory(draw, at_once)
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, gallery.column(pictures))
        return _write_strip(path)
    except Exception as error:  # whatever it is, the LoRA need not be at fault, and the next checkpoint has to be saved
        reason = "out of memory" if is_out_of_memory(error) else first_line(error)
        logger.warning("no sample pictures at step %d: %s", step, reason)
        return None
    finally:
        train_step.train()
        sample_inputs.vae.to("cpu")


def _write_strip(newest: Path) -> Image.Image:
    """Samples of steps up to the newest, a column each, on one picture; those damaged or of another size are left out.

    Of more than `MAX_COLUMNS` it has some at even distances, the first and the newest among them.
    """
    files = [path for path in sorted(newest.parent.glob("step-*.png")) if path.name <= newest.name]
    files = [path for path in files if path.stem[5:].isdecimal()]  # not Drive's copies, "step-000250 (1).png"
    gaps = min(len(files), MAX_COLUMNS) - 1
    columns = {}
    for path in [files[place * (len(files) - 1) // gaps] for place in range(gaps)] + [newest]:
        try:
            columns[f"step {int(path.stem[5:])}"] = open_finished(path)
        except (UserError, OSError) as error:
            logger.warning("left out of the strip of samples: %s", first_line(error))
    size = columns[f"step {int(newest.stem[5:])}"].size
    content = gallery.strip({name: column for name, column in columns.items() if column.size == size})
    write_atomically(newest.parent.with_suffix(".png"), content)
    return Image.open(io.BytesIO(content))


@torch.no_grad()
def _latents(
    config: Config, unet: UNet2DConditionModel, noise_scheduler: DDPMScheduler, embeddings: Embeddings, batch: list[int]
) -> Tensor:
    """The base model's latents for a batch of seeds, all from the embeddings' first row."""
    scheduler = sampling.make_scheduler(config.scheduler, noise_scheduler.config)
    rows = embeddings.to(unet.device, unet.dtype).rows([0] * len(batch))
    # Whatever refiner_flow says: the ensemble's base would stop where the refiner takes over.
    return sampling.base_latents(unet, scheduler, rows, batch, replace(config, refine=False))
