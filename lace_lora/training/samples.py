"""Pictures drawn during a training: class pictures by the base model, and sample grids with the LoRA as it is then."""

import io
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from PIL import Image
from tqdm.auto import tqdm

from lace_lora import seeds
from lace_lora.config import Config
from lace_lora.errors import UserError, is_out_of_memory
from lace_lora.files import write_atomically
from lace_lora.pictures import gallery
from lace_lora.sdxl import sampling
from lace_lora.sdxl.prompts import Embeddings
from lace_lora.sdxl.vae import decode_latents
from lace_lora.training.train_step import TrainStep

logger = logging.getLogger("train_lora")


@dataclass
class Preview:
    """What sample grids need besides the UNet."""

    embed: Callable[[], Embeddings]  # the validation prompt's, by the text encoders as they are now
    vae: AutoencoderKL  # parked on the CPU between grids


def draw_class_pictures(
    config: Config, numbers: Mapping[Path, int], unet: UNet2DConditionModel, vae: AutoencoderKL,
    noise_scheduler: DDPMScheduler, embeddings: Embeddings,
) -> None:  # fmt: skip
    """Draw files for prior preservation, each with the seed that its number stands for."""
    picture_seeds = [seeds.stream_seed(config.seed, "class", number) for number in numbers.values()]
    pictures = _draw(config, unet, vae, noise_scheduler, embeddings, picture_seeds, at_once=1)
    drawn = tqdm(pictures, desc="drawing the class", unit="picture", total=len(numbers))
    for path, picture in zip(numbers, drawn, strict=True):
        content = io.BytesIO()
        picture.save(content, format="PNG")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content.getvalue())  # one by one, so that a stop costs one


def draw_samples(
    config: Config, step: int, train_step: TrainStep, unet: UNet2DConditionModel, noise_scheduler: DDPMScheduler,
    preview: Preview,
) -> None:  # fmt: skip
    """Draw a grid at training size into `samples/step-<step>.png`; where that is impossible, log why and go on."""
    square = replace(config, width=config.resolution, height=config.resolution)
    sample_seeds = [config.seed + index for index in range(config.num_validation_images)]

    def draw(at_once: int) -> list[Image.Image]:
        vae = preview.vae.to(unet.device)
        return list(_draw(square, unet, vae, noise_scheduler, preview.embed(), sample_seeds, at_once,
                          train_step.autocast))  # fmt: skip

    train_step.train(False)
    try:
        pictures = _within_memory(draw, train_step, config.train_batch_size)
    except UserError as error:  # of the VAE, or of drawing in fp16: the LoRA need not be at fault
        logger.warning("no sample pictures at step %d: %s", step, error)
        return
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        logger.warning("no sample pictures at step %d: out of memory", step)
        return
    finally:
        preview.vae.to("cpu")
        train_step.train()
    path = Path(config.lora_output_dir, "samples", f"step-{step:06d}.png")
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, gallery.contact_sheet(pictures, side=512))


def _within_memory(draw: Callable[[int], list[Image.Image]], train_step: TrainStep, at_once: int) -> list[Image.Image]:
    """As many pictures at once as training takes, or, where memory runs out, one by one and without CUDA graphs."""
    try:
        return draw(at_once)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    # Not in the clause above, where the error holds on to what is to be freed.
    train_step.forget_graphs()
    return draw(1)


def _draw(
    config: Config, unet: UNet2DConditionModel, vae: AutoencoderKL, noise_scheduler: DDPMScheduler,
    embeddings: Embeddings, picture_seeds: Sequence[int], at_once: int,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Iterator[Image.Image]:  # fmt: skip
    """A picture for each seed by the base model, all from the embeddings' first row, `at_once` of them in a batch.

    Raises:
        UserError: a picture is not of finite numbers (exit 5).
    """
    config = replace(config, refine=False)
    embeddings = embeddings.to(unet.device, unet.dtype)
    scheduler = sampling.make_scheduler(config.scheduler, noise_scheduler.config)
    for start in range(0, len(picture_seeds), at_once):
        batch = picture_seeds[start : start + at_once]
        with torch.no_grad(), autocast():
            latents = sampling.base_latents(unet, scheduler, embeddings.rows([0] * len(batch)), batch, config)
        yield from decode_latents(vae, latents)
