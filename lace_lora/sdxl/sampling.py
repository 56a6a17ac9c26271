"""The latents of one batch, by the base and by the refiner: schedulers, steps, seeds.

diffusers' own pipelines denoise; each is given the one model it needs and embeddings made beforehand.
"""

from collections.abc import Callable, Sequence
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
    """A scheduler by diffusers' class name, over the model's own noise schedule."""
    # DPM++ and UniPC also have variants that predict noise: not what people know by these names, and without an x0. And
    # latents reach beyond the -1 to 1 that DDIM would clip to.
    variants: dict[str, dict[str, Any]] = {
        "DDIMScheduler": {"clip_sample": False, "set_alpha_to_one": False},
        "DPMSolverMultistepScheduler": {"algorithm_type": "dpmsolver++"},
        "UniPCMultistepScheduler": {"predict_x0": True},
    }
    return getattr(diffusers, name).from_config(config, **variants.get(name, {}))


def planned_steps(config: Config, scheduler: Any) -> tuple[int, int]:
    """How many steps base and refiner make. The ensemble hands over at a timestep, wherever among the steps that is.

    Raises:
        UserError: one of them would have no step.
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
    """One for each picture, on the CPU, so that the noise is the same on every machine."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def refiner_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """Streams of their own: with the same seeds, the refiner's noise would equal the noise the base started from."""
    return base_generators([stream_seed(seed, "refiner") for seed in seeds])


def base_latents(
    unet: UNet2DConditionModel,
    scheduler: Any,
    embeddings: dict[str, Tensor],
    seeds: Sequence[int],
    config: Config,
    on_step: Callable[[], object] = lambda: None,
) -> Tensor:
    """The finished latents of a batch, (n, 4, height / 8, width / 8).

    Args:
        embeddings: keyword arguments of the pipeline, a row for each picture: see `Embeddings.rows`.
        seeds: one for each picture.
    """
    return _run_base(unet, scheduler, embeddings, seeds, config, on_step)


def latents_for_ensemble(
    unet: UNet2DConditionModel,
    scheduler: Any,
    embeddings: dict[str, Tensor],
    seeds: Sequence[int],
    config: Config,
    on_step: Callable[[], object] = lambda: None,
) -> Tensor:
    """The latents of a batch where the ensemble's refiner takes over, and the finished ones (x0) predicted there.

    Both in one tensor, (2, n, 4, height / 8, width / 8), so that one copy brings them from the GPU.
    """
    step, predicted = scheduler.step, list[Tensor]()

    @wraps(step)  # pipelines look at its signature
    def step_and_note_x0(*arguments: Any, **named: Any) -> tuple[Tensor]:
        result = step(*arguments, **named | {"return_dict": True})
        # Solvers of a higher order keep it for their next steps.
        predicted[:] = [
            result.pred_original_sample if "pred_original_sample" in result else scheduler.model_outputs[-1]
        ]
        return (result.prev_sample,)

    scheduler.step = step_and_note_x0
    try:
        latents = _run_base(unet, scheduler, embeddings, seeds, config, on_step, denoising_end=config.refiner_start)
    finally:
        del scheduler.step  # the method of its class is back
    return torch.stack([latents, predicted[0].to(latents)])


def _run_base(
    unet: UNet2DConditionModel,
    scheduler: Any,
    embeddings: dict[str, Tensor],
    seeds: Sequence[int],
    config: Config,
    on_step: Callable[[], object],
    denoising_end: float | None = None,
) -> Tensor:
    return _pipeline(StableDiffusionXLPipeline, unet, scheduler)(
        **embeddings,
        width=config.width,
        height=config.height,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        denoising_end=denoising_end,
        generator=base_generators(seeds),
        output_type="latent",
        callback_on_step_end=_after_step(on_step),
    ).images


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
    pipeline = _pipeline(StableDiffusionXLImg2ImgPipeline, unet, scheduler, vae, requires_aesthetics_score=True)
    if config.refiner_flow == "ensemble":
        flow = {"denoising_start": config.refiner_start}
    else:
        flow = {"strength": config.refiner_strength}
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


def _pipeline(kind: Any, unet: UNet2DConditionModel, scheduler: Any, vae: Any = None, **options: Any) -> Any:
    """A diffusers pipeline of the one model that it needs, since embeddings are given to it, without a progress bar."""
    pipeline = kind(
        vae=vae, text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None,
        unet=unet, scheduler=scheduler, add_watermarker=False, **options,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _after_step(on_step: Callable[[], object]) -> Callable[..., dict[str, Any]]:
    def callback(_pipeline: Any, _step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        on_step()
        return values

    return callback
