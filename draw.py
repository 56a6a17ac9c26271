"""Drawing: prompts to embeddings, base latents, refined latents, pictures; never two big models in memory.

The denoising is diffusers' own pipelines', each given the one model it needs and embeddings made beforehand.
"""

import gc
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

import lora_weights
import models
from batches import stream_seed
from config import LOSS_NOT_FINITE, Config, UserError
from gallery import Design

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Embeddings:
    """What one prompt and one negative prompt are to a UNet; rows are pictures of a batch."""

    prompt_embeds: Tensor  # (n, 77, c)
    pooled_prompt_embeds: Tensor  # (n, p)
    negative_prompt_embeds: Tensor  # (n, 77, c)
    negative_pooled_prompt_embeds: Tensor  # (n, p)

    def rows(self, index: Sequence[int], unet: UNet2DConditionModel) -> dict[str, Tensor]:
        """The rows for one batch, as keyword arguments of a pipeline."""
        return {name: value[list(index)].to(unet.device, unet.dtype) for name, value in vars(self).items()}


def draw_pictures(
    config: Config,
    lora: Path | None,
    batches: Sequence[Sequence[Design]],
    save: Callable[[Design, Image.Image, bool], None],
) -> None:
    """Draw all batches, phase by phase, and hand each picture to `save(design, picture, refined)`.

    Raises:
        UserError: a model or the LoRA cannot be loaded, or the device cannot do what is asked for.
    """
    device = models.pick_device()
    dtype = models.pick_dtype(config.mixed_precision, device)
    logger.info("drawing on %s in %s", device, str(dtype).removeprefix("torch."))
    prompts = list(dict.fromkeys(design.prompt for batch in batches for design in batch))
    base_embeddings, refiner_embeddings = embed_for_both(config, prompts, lora, device, dtype)
    scheduler = make_scheduler(config.scheduler, models.load_noise_scheduler(config).config)
    rows = [[prompts.index(design.prompt) for design in batch] for batch in batches]
    seeds = [[design.seed for design in batch] for batch in batches]
    free(device)

    unet = models.load_unet(config.pretrained_model, config.variant, device, dtype, config.attention)
    if lora:
        lora_weights.merge_lora({"unet": unet}, lora, config.lora_scale)
    with _progress("drawing", len(batches) * base_steps(config)) as bar:
        base = [
            base_latents(unet, scheduler, base_embeddings.rows(row, unet), seed, config, bar.update).cpu()
            for row, seed in zip(rows, seeds, strict=True)
        ]
    del unet
    free(device)

    vae = models.load_vae(config, device, dtype)
    latents = {False: base} if config.save_base or not config.refine else {}
    if config.refine:
        unet = models.load_unet(config.refiner_model, config.variant, device, dtype, config.attention)
        with _progress("refining", len(batches) * refiner_steps(config)) as bar:
            refine = partial(refined_latents, unet, vae, scheduler, config=config, on_step=bar.update)
            latents[True] = [
                refine(refiner_embeddings.rows(row, unet), single, seed).cpu()
                for row, single, seed in zip(rows, base, seeds, strict=True)
            ]
        del unet
        free(device)

    with _progress("saving", len(latents) * sum(map(len, batches))) as bar:
        for refined, batched in latents.items():
            for batch, single in zip(batches, batched, strict=True):
                for design, picture in zip(batch, decode(vae, single), strict=True):
                    save(design, picture, refined)
                    bar.update()
    if memory := models.peak_memory(device):
        logger.info(memory)


def _progress(what: str, total: int) -> tqdm:
    return tqdm(total=total, desc=what, unit="picture" if what == "saving" else "step")


def free(device: torch.device) -> None:
    """Give the memory of models that are no longer referenced back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def embed_for_both(
    config: Config, prompts: list[str], lora: Path | None, device: torch.device, dtype: torch.dtype
) -> tuple[Embeddings, Embeddings]:
    """Embeddings for the base and for the refiner, which reads the second text encoder alone; encoders are freed.

    The LoRA's part for the text encoders, if it has one, is the base's: the refiner was never trained with it.
    """
    tokenizers = models.load_tokenizers(config.pretrained_model)
    text_encoders = models.load_text_encoders(config, device, dtype)
    for prompt in prompts:
        if models.too_long(prompt, tokenizers[0]):
            logger.warning("SDXL reads the first 77 tokens of a prompt only; this one is longer: %.60s…", prompt)
    second = partial(models.encode_prompts, tokenizers=tokenizers[1:], text_encoders=text_encoders[1:])
    zeros = models.zeros_for_empty_prompt(config.refiner_model, default=False) if config.refine else False
    refiner = embed(prompts, config.negative_prompt, second, zeros)
    if lora:
        networks = dict(zip(("text_encoder", "text_encoder_2"), text_encoders, strict=True))
        lora_weights.merge_lora(networks, lora, config.lora_scale)
    both = partial(models.encode_prompts, tokenizers=tokenizers, text_encoders=text_encoders)
    zeros = models.zeros_for_empty_prompt(config.pretrained_model, default=True)
    return embed(prompts, config.negative_prompt, both, zeros), refiner


def embed(
    prompts: list[str], negative: str | None, encode: Callable[[list[str]], tuple[Tensor, Tensor]], zeros: bool
) -> Embeddings:
    """Embeddings of prompts and of the negative prompt; without one, zeros where the model was trained so."""
    encoded = [encode([prompt]) for prompt in prompts]
    prompt_embeds = torch.cat([embeds.cpu() for embeds, _ in encoded])
    pooled = torch.cat([pooled.cpu() for _, pooled in encoded])
    if not negative and zeros:
        return Embeddings(prompt_embeds, pooled, torch.zeros_like(prompt_embeds), torch.zeros_like(pooled))
    embeds, negative_pooled = encode([negative or ""])
    return Embeddings(
        prompt_embeds, pooled, embeds.cpu().expand_as(prompt_embeds), negative_pooled.cpu().expand_as(pooled)
    )


def make_scheduler(name: str, config: Any) -> Any:
    """A sampler by diffusers' class name, over the model's own noise schedule."""
    return getattr(diffusers, name).from_config(config)


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
    """Latents (n, 4, height / 8, width / 8) of a batch: finished, or noisy as the ensemble's refiner wants them."""
    pipeline = StableDiffusionXLPipeline(
        vae=None, text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None,
        unet=unet, scheduler=scheduler, add_watermarker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    hand_over = config.refiner_start if config.refine and config.refiner_flow == "ensemble" else None
    return pipeline(
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
    pipeline = StableDiffusionXLImg2ImgPipeline(
        vae=vae, text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None,
        unet=unet, scheduler=scheduler, requires_aesthetics_score=True, add_watermarker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    flow = {"strength": config.refiner_strength}
    if config.refiner_flow == "ensemble":
        flow = {"denoising_start": config.refiner_start}
    return pipeline(
        **embeddings,
        **flow,
        image=latents.to(unet.device, unet.dtype),
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


def base_steps(config: Config) -> int:
    """About how many steps the base makes; where the ensemble's cut falls exactly depends on the timesteps."""
    ensemble = config.refine and config.refiner_flow == "ensemble"
    return round(config.num_inference_steps * (config.refiner_start if ensemble else 1))


def refiner_steps(config: Config) -> int:
    """About how many steps the refiner makes."""
    if config.refiner_flow == "ensemble":
        return config.num_inference_steps - base_steps(config)
    return int(config.num_inference_steps * config.refiner_strength)


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor) -> list[Image.Image]:
    """Latents (n, 4, h, w) to pictures, one by one: decoding takes more memory than anything else.

    Raises:
        UserError: the picture would be black, since it is not of finite numbers (exit 5).
    """
    pictures = []
    for single in latents.to(vae.device, vae.dtype).split(1):
        pixels = vae.decode(single / vae.config.scaling_factor).sample[0]
        if not pixels.isfinite().all():
            at_fault = "latents" if not single.isfinite().all() else "VAE's output"
            advice = "set mixed_precision: bf16 or no, leave pretrained_vae empty, or try lora_scale=0"
            raise UserError(
                f"the {at_fault} is not of finite numbers, so that pictures are black: {advice}", LOSS_NOT_FINITE
            )
        values = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().contiguous()
        height, width, _ = values.shape
        pictures.append(Image.frombytes("RGB", (width, height), values.numpy().tobytes()))
    return pictures


def _after_step(on_step: Callable[[], object]) -> Callable[..., dict[str, Any]]:
    def callback(_pipeline: Any, _step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        on_step()
        return values

    return callback
