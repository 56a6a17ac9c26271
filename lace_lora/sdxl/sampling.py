"""The latents of one batch, by the base and by the refiner: samplers, steps, seeds.

The denoising is diffusers' own pipelines', each given the one model it needs and embeddings made beforehand.
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
from lace_lora.errors import UserError
from lace_lora.seeds import stream_seed


def make_scheduler(name: str, config: Any) -> Any:
    """A sampler by diffusers' class name, over the model's own noise schedule."""
    # Of these solvers there are kinds that predict noise: not what people know by their names, nor what has an x0. And
    # latents reach beyond the -1 to 1 that DDIM was written for.
    kinds: dict[str, dict[str, Any]] = {
        "DDIMScheduler": {"clip_sample": False, "set_alpha_to_one": False},
        "DPMSolverMultistepScheduler": {"algorithm_type": "dpmsolver++"},
        "UniPCMultistepScheduler": {"predict_x0": True},
    }
    return getattr(diffusers, name).from_config(config, **kinds.get(name, {}))


def planned_steps(config: Config, scheduler: Any) -> tuple[int, int]:
    """How many steps base and refiner make; the ensemble's cut is at a timestep, wherever among the steps that is.

    Raises:
        UserError: the cut leaves one of them none.
    """
    steps = config.num_inference_steps
    if not (config.refine and config.refiner_flow == "ensemble"):
        return steps, int(steps * config.refiner_strength)
    scheduler.set_timesteps(steps)
    of_all = scheduler.config.num_train_timesteps
    base = int((scheduler.timesteps >= round(of_all - config.refiner_start * of_all)).sum())
    if base in (0, steps):
        left_out, where = ("refiner", "lower") if base else ("base", "higher")
        raise UserError(f"no step is left for the {left_out}: set refiner_start {where}, or num_inference_steps higher")
    return base, steps - base


def base_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One generator for each picture, on the CPU so that every machine draws the same noise."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def refiner_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """Streams of their own: seeded alike, the refiner's noise would equal the noise the picture began as."""
    return base_generators([stream_seed(seed, "refiner") for seed in seeds])


def base_latents(
    unet: UNet2DConditionModel,
    scheduler: Any,
    embeddings: dict[str, Tensor],
    seeds: Sequence[int],
    config: Config,
    on_step: Callable[[], object] = lambda: None,
) -> Tensor:
    """Latents of a batch, (2, n, 4, height / 8, width / 8): as they go on from here, and as finished as can be told.

    The two are the same, but in the ensemble's flow: the refiner wants them noisy.
    """
    pipeline = _pipeline(StableDiffusionXLPipeline, unet, scheduler)
    hand_over = config.refiner_start if config.refine and config.refiner_flow == "ensemble" else None
    with _noting_finished(scheduler) as finished:
        latents = pipeline(
            **embeddings,
            width=config.width,
            height=config.height,
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            denoising_end=hand_over,
            generator=base_generators(seeds),
            output_type="latent",
            callback_on_step_end=_after_step(on_step),
        ).images
    return torch.stack([latents, finished[-1].to(latents) if hand_over else latents])


def _pipeline(kind: Any, unet: UNet2DConditionModel, scheduler: Any, vae: Any = None, **options: Any) -> Any:
    """A pipeline of diffusers' without the parts that have done their work already, and without a bar."""
    pipeline = kind(
        vae=vae, text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None,
        unet=unet, scheduler=scheduler, add_watermarker=False, **options,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@contextmanager
def _noting_finished(scheduler: Any) -> Iterator[list[Tensor]]:
    """Gives what a scheduler took for the finished latents (x0) at its last step, as the only item of a list."""
    step, noted = scheduler.step, list[Tensor]()

    @wraps(step)
    def noting(*arguments: Any, **named: Any) -> tuple[Tensor]:
        result = step(*arguments, **named | {"return_dict": True})
        # Solvers of a higher order keep it for their next steps.
        noted[:] = [result.pred_original_sample if "pred_original_sample" in result else scheduler.model_outputs[-1]]
        return (result.prev_sample,)

    scheduler.step = noting
    try:
        yield noted
    finally:
        del scheduler.step


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
    """Base latents through the refiner, in either flow. The VAE is asked for its configuration only."""
    pipeline = _pipeline(StableDiffusionXLImg2ImgPipeline, unet, scheduler, vae, requires_aesthetics_score=True)
    flow = {"strength": config.refiner_strength}
    if config.refiner_flow == "ensemble":
        flow = {"denoising_start": config.refiner_start}
    return pipeline(
        **embeddings,
        **flow,
        image=latents,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        aesthetic_score=config.aesthetic_score,
        negative_aesthetic_score=config.negative_aesthetic_score,
        original_size=(config.height, config.width),
        target_size=(config.height, config.width),
        generator=refiner_generators(seeds),
        output_type="latent",
        callback_on_step_end=_after_step(on_step),
    ).images


def _after_step(on_step: Callable[[], object]) -> Callable[..., dict[str, Any]]:
    def callback(_pipeline: Any, _step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        on_step()
        return values

    return callback
