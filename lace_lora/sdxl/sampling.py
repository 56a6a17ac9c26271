"""The latents of one batch, by the base and by the refiner: schedulers, steps, seeds.

diffusers' own pipelines denoise; each is given the one model it needs and precomputed embeddings.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor

from lace_lora.config import Config
from lace_lora.errors import UserError, first_line
from lace_lora.sdxl.models import BAD_CONTENT
from lace_lora.seeds import stream_seed


def make_scheduler(name: str, config: Any) -> Any:
    """A scheduler by diffusers' class name, over the model's own noise schedule.

    Raises:
        UserError: it cannot be made of the model's config.
    """
    # DPM++ and UniPC also have variants that predict noise: not what people know by these names, and without an x0. And
    # latents reach beyond the -1 to 1 that DDIM would clip to.
    variants: dict[str, dict[str, Any]] = {
        "DDIMScheduler": {"clip_sample": False, "set_alpha_to_one": False},
        "DPMSolverMultistepScheduler": {"algorithm_type": "dpmsolver++"},
        "UniPCMultistepScheduler": {"predict_x0": True},
    }
    try:
        scheduler = getattr(diffusers, name).from_config(config, **variants.get(name, {}))
        scheduler.set_timesteps(2)  # which reads what the constructor does not
        return scheduler
    except BAD_CONTENT as error:
        advice = "choose another scheduler, or a model with SDXL's scheduler config"
        raise UserError(f"{name} cannot use the model's scheduler config ({first_line(error)}): {advice}") from error


def is_ensemble(config: Config) -> bool:
    return config.refine and config.refiner_flow == "ensemble"


def planned_steps(config: Config, scheduler: Any) -> tuple[int, int]:
    """How many steps base and refiner do. The ensemble hands over at a timestep, not after a number of steps.

    Raises:
        UserError: one of them would have no step.
    """
    steps = config.num_inference_steps
    if not is_ensemble(config):
        return steps, int(steps * config.refiner_strength)
    scheduler.set_timesteps(steps)
    of_all = scheduler.config.num_train_timesteps
    base = int((scheduler.timesteps >= round(of_all - config.refiner_start * of_all)).sum())
    if base in (0, steps):
        left_out, where = ("refiner", "lower") if base else ("base", "higher")
        raise UserError(f"the {left_out} would get no steps: set refiner_start {where}, or raise num_inference_steps")
    return base, steps - base


def base_latents(
    unet: UNet2DConditionModel,
    scheduler: Any,
    embeddings: dict[str, Tensor],
    seeds: Sequence[int],
    config: Config,
    on_step: Callable[[], object] = lambda: None,
) -> Tensor:
    """The finished latents of a batch, (n, 4, height / 8, width / 8).

    For the ensemble (2, n, 4, height / 8, width / 8): the latents where the refiner takes over, and the finished ones
    (x0) predicted there, in one tensor, so that one copy brings them from the GPU.

    Args:
        embeddings: keyword arguments of the pipeline, a row for each picture: see `Embeddings.rows`.
        seeds: one for each picture.
    """
    pipeline = _pipeline(StableDiffusionXLPipeline, unet=unet, scheduler=scheduler)
    arguments = embeddings | _arguments(config, seeds, on_step) | {"width": config.width, "height": config.height}
    if not is_ensemble(config):
        return pipeline(**arguments).images
    with _recording_x0(scheduler) as predicted:
        latents = pipeline(**arguments, denoising_end=config.refiner_start).images
    return torch.stack([latents, predicted[0].to(latents)])


@contextmanager
def _recording_x0(scheduler: Any) -> Iterator[list[Tensor]]:
    """A list with the finished latents (x0) that the scheduler's last step predicted."""
    step, predicted = scheduler.step, list[Tensor]()

    @wraps(step)  # pipelines look at its signature
    def step_and_record_x0(*arguments: Any, **named: Any) -> tuple[Tensor]:
        result = step(*arguments, **named | {"return_dict": True})
        # Solvers of a higher order keep it for their next steps.
        predicted[:] = [
            result.pred_original_sample if "pred_original_sample" in result else scheduler.model_outputs[-1]
        ]
        return (result.prev_sample,)

    scheduler.step = step_and_record_x0
    try:
        yield predicted
    finally:
        del scheduler.step  # restores the class's method


def refined_latents(
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    scheduler: Any,
    embeddings: dict[str, Tensor],
    latents: Tensor,
    seeds: Sequence[int],
    config: Config,
    on_step: Callable[[], object] = lambda: None,
) -> Tensor:
    """Latents of the base (n, 4, h, w) through the refiner: finished ones, or for the ensemble those at the hand-over.

    Only the configuration of the VAE is used.
    """
    parts = {"unet": unet, "vae": vae, "scheduler": scheduler}
    flow = {"strength": config.refiner_strength}
    if is_ensemble(config):
        flow = {"denoising_start": config.refiner_start}
    # With the seeds themselves, the refiner's noise would equal the noise that the base started from.
    seeds = [stream_seed(seed, "refiner") for seed in seeds]
    return _pipeline(StableDiffusionXLImg2ImgPipeline, **parts, requires_aesthetics_score=True)(
        **embeddings,
        **_arguments(config, seeds, on_step),
        **flow,
        image=latents,
        aesthetic_score=config.aesthetic_score,
        negative_aesthetic_score=config.negative_aesthetic_score,
        target_size=(config.height, config.width),
    ).images


def _pipeline(kind: Any, **parts: Any) -> Any:
    """A diffusers pipeline of the models that it needs, since embeddings are given to it, without a progress bar."""
    unneeded = dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    pipeline = kind(**unneeded | parts, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _arguments(config: Config, seeds: Sequence[int], on_step: Callable[[], object]) -> dict[str, Any]:
    """What both pipelines are called with."""

    def after_step(_pipeline: Any, _step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        on_step()
        return values

    return {
        "num_inference_steps": config.num_inference_steps,
        "original_size": _original_size(config),
        "guidance_scale": config.guidance_scale,
        # On the CPU, so that the noise is the same on every machine.
        "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
        "output_type": "latent",
        "callback_on_step_end": after_step,
    }


def _original_size(config: Config) -> tuple[int, int]:
    """Height and width of the photo that SDXL is told to draw, of the picture's shape: section 2.2 of its paper."""
    scale = (config.original_size or min(config.height, config.width)) / min(config.height, config.width)
    return round(config.height * scale), round(config.width * scale)
