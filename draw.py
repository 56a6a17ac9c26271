"""Drawing in phases: prompts to embeddings, base latents, refined latents, pictures; never two big models in memory.

The denoising is diffusers' own pipelines', each given the one model it needs and embeddings made beforehand.
"""

import gc
import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm.auto import tqdm

import decode
import embeddings
import fast_unet
import hub
import lora_weights
import models
from batches import stream_seed
from config import Config, UserError
from data_utils import write_atomically
from gallery import Design

logger = logging.getLogger(__name__)

MOST_AT_ONCE = 4  # more make a picture no faster: 27.5 ms a step for each of 4 at 1024² on an H100, 30 for one alone
# Of a GPU's memory in 16 bits: the UNet with what else is needed, and a picture with guidance by a million of pixels.
_UNET_BYTES, _PICTURE_BYTES = 7 * 2**30, 2**29
_ROOM = 12  # pictures that the VAE takes the place of, at most, where it works beside a UNet


def pictures_at_once(config: Config) -> int:
    """The size of batches that pays and fits on this machine's device."""
    return max(1, min(MOST_AT_ONCE, _fitting(config)))


def _has_room(config: Config, batch_size: int) -> bool:
    """Whether the VAE can work beside a UNet: at 1024² in bf16 on 22 GiB, but not on a T4."""
    return _fitting(config) >= batch_size + _ROOM


def _fitting(config: Config) -> int:
    """How many pictures would fit beside a UNet in what is free of a GPU's memory now; 1 on other devices."""
    device = models.pick_device()
    if device.type != "cuda":
        return 1
    free, _ = torch.cuda.mem_get_info()
    by_format = models.pick_dtype(config.mixed_precision, device).itemsize / 2
    return int((free / by_format - _UNET_BYTES) // (_PICTURE_BYTES * config.width * config.height / 1e6))


def draw_pictures(
    config: Config, lora: Path | None, batches: Sequence[Sequence[Design]], kept: Path, finish: decode.Finish
) -> None:
    """Draw all batches, phase by phase, and hand each picture to `finish`, on several threads and in any order.

    Args:
        kept: folder for the latents of each phase; a run that was interrupted goes on from what is there.

    Raises:
        UserError: base or refiner would make no step, a model or the LoRA cannot be loaded, or the device cannot do
            what is asked for.
    """
    device = models.pick_device()
    _draw_in_phases(config, lora, batches, kept, finish, device)
    free(device)  # in a notebook, other work comes after


def _draw_in_phases(
    config: Config, lora: Path | None, batches: Sequence[Sequence[Design]], kept: Path, finish: decode.Finish,
    device: torch.device,
) -> None:  # fmt: skip
    dtype = models.pick_dtype(config.mixed_precision, device)
    logger.info("drawing on %s in %s", device, str(dtype).removeprefix("torch."))
    scheduler = make_scheduler(config.scheduler, models.load_noise_scheduler(config).config)
    base_steps, refiner_steps = planned_steps(config, scheduler)
    prompts = list(dict.fromkeys(design.prompt for batch in batches for design in batch))
    rows = [[prompts.index(design.prompt) for design in batch] for batch in batches]
    seeds = [[design.seed for design in batch] for batch in batches]
    base_files, refined_files = (
        [kept / f"{kind}_{batch[0].index:03d}.safetensors" for batch in batches] for kind in ("base", "refined")
    )
    last_files = refined_files if config.refine else base_files
    # Whether pictures are saved while the last UNet is at work; asked before anything is on the GPU.
    meanwhile = _has_room(config, len(batches[0])) and not all(file.exists() for file in last_files)
    both = embeddings.for_both(config, prompts, lora, device, dtype)
    for_base, for_refiner = (one.to(device, dtype) for one in both)
    free(device)

    def load_base() -> UNet2DConditionModel:
        unet = _load_unet(config, config.pretrained_model, device, dtype, lora)
        if config.refine:
            hub.read_ahead(config.refiner_model, ["unet"], config.variant)
        return unet

    def draw(unet: UNet2DConditionModel, number: int, on_step: Callable[[], object]) -> Tensor:
        return base_latents(unet, scheduler, for_base.rows(rows[number]), seeds[number], config, on_step)

    last = _phase("drawing", base_steps, base_files, load_base, draw)
    base: Iterable[Tensor] = last if meanwhile and not config.refine else list(last)
    vae = models.load_vae(config, device, dtype, drawing=True)
    refined: Iterable[Tensor | None] = [None] * len(batches)
    if config.refine:
        begun = [unfinished.to(device, dtype) for unfinished, _ in base]  # now: later, copying waits for the GPU's work

        def refine(unet: UNet2DConditionModel, number: int, on_step: Callable[[], object]) -> Tensor:
            conditions = for_refiner.rows(rows[number])
            return refined_latents(unet, vae, scheduler, conditions, begun[number], seeds[number], config, on_step)

        load_refiner = partial(_load_unet, config, config.refiner_model, device, dtype)
        last = _phase("refining", refiner_steps, refined_files, load_refiner, refine)
        refined = last if meanwhile else list(last)
    fast_unet.make_decoder_fast(vae)
    with closing(last):
        _save_all(config, vae, batches, zip(base, refined, strict=True), finish, quiet=meanwhile)
    if memory := models.peak_memory(device):
        logger.info(memory)


def _save_all(
    config: Config, vae: AutoencoderKL, batches: Sequence[Sequence[Design]],
    latents: Iterable[tuple[Tensor, Tensor | None]], finish: decode.Finish, quiet: bool,
) -> None:  # fmt: skip
    """Decode the latents of base and refiner and finish their pictures; `quiet` where another bar is on the screen."""
    with tqdm(total=sum(map(len, batches)), desc="saving", unit="picture", disable=quiet) as bar:

        def finish_and_tell(*picture: Any) -> None:
            finish(*picture)
            bar.update()

        with decode.saving(vae, config, finish_and_tell) as save:
            for batch, ((_, finished), refined) in zip(batches, latents, strict=True):
                save(batch, finished, refined)


def _load_unet(
    config: Config, source: str, device: torch.device, dtype: torch.dtype, lora: Path | None = None
) -> UNet2DConditionModel:
    unet = models.load_unet(source, config.variant, device, dtype, config.attention)
    if lora:
        lora_weights.merge_lora({"unet": unet}, lora, config.lora_scale)
    if config.attention != "xformers":
        fast_unet.make_fast(unet)
    return unet


def _phase(
    name: str,
    steps: int,
    files: Sequence[Path],
    load: Callable[[], UNet2DConditionModel],
    make: Callable[[UNet2DConditionModel, int, Callable[[], object]], Tensor],
) -> Generator[Tensor, None, None]:
    """The latents of each batch in turn, on the CPU, from its file if an earlier run has made it.

    Each is given, and written to its file, once the next one has been ordered. At the end, or when this is closed, the
    UNet is freed.
    """
    kept = [_read(file) for file in files]
    missing = sum(value is None for value in kept)
    if not missing:
        yield from (value for value in kept if value is not None)
        return
    unet = load()
    device, done = unet.device, (len(files) - missing) * steps
    try:
        previous: Future[Tensor] | None = None
        with tqdm(total=len(files) * steps, initial=done, desc=name, unit="step") as bar, ThreadPoolExecutor(1) as pool:
            for number, (file, value) in enumerate(zip(files, kept, strict=True)):
                made = make(unet, number, bar.update) if value is None else value
                if made.device.type != "cuda":  # others may be used by one thread only
                    made = made.cpu()
                current = pool.submit(_keep, made, file if value is None else None)
                if previous:
                    yield previous.result()  # a full disk is told now
                previous = current
            if previous:
                yield previous.result()
    finally:
        del unet
        free(device)


def _keep(latents: Tensor, file: Path | None) -> Tensor:
    latents = latents.cpu()
    if file:
        write_atomically(file, save({"made": latents}))
    return latents


def _read(file: Path) -> Tensor | None:
    try:
        return load_file(file)["made"]
    except (FileNotFoundError, SafetensorError, KeyError):
        return None


def free(device: torch.device) -> None:
    """Give the memory of models that are no longer referenced back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


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
