"""Drawing in phases: prompts to embeddings, base latents, refined latents, pictures; never two big models in memory.

`sampling.py` makes the latents of a batch; this module loads, writes and frees between batches and phases.
"""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from lace_lora.config import Config
from lace_lora.drawing.saving import PictureSaver
from lace_lora.fast import drawing_unet
from lace_lora.files import write_atomically
from lace_lora.pictures.recipe import Design, Drawn
from lace_lora.progress import Progress
from lace_lora.sdxl import hub, lora_weights, models, sampling
from lace_lora.sdxl.lora_weights import Lora
from lace_lora.sdxl.prompts import embed_for_both

logger = logging.getLogger(__name__)

# Larger batches are no faster per picture: a step takes 27.5 ms for each of 4 at 1024² on an H100, 30 for a single one.
MAX_BATCH_SIZE = 4
# GPU memory in 16 bits: UNet and overhead; a picture with guidance, per million pixels; the VAE, in pictures, at most.
_UNET_BYTES, _PICTURE_BYTES, _VAE_PICTURES = 7 * 2**30, 2**29, 12

Batches = Sequence[Sequence[Design]]
Finish = Callable[[Drawn], object]
OnBatch = Callable[[int, Tensor], object]  # gets the number of a batch and its latents on the CPU
OnStep = Callable[[], object]


def pictures_at_once(config: Config) -> int:
    """The largest batch that is worth it and fits on this machine's device."""
    return max(1, min(MAX_BATCH_SIZE, _pictures_that_fit(config)))


def _has_room(config: Config, batch_size: int) -> bool:
    """Whether the VAE fits next to a UNet: at 1024² in bf16 with 22 GiB, but not on a T4."""
    return _pictures_that_fit(config) >= batch_size + _VAE_PICTURES


def _pictures_that_fit(config: Config) -> int:
    """How many pictures fit next to a UNet in the free memory of a GPU; 1 on other devices."""
    device = models.pick_device(config.device)
    if device.type != "cuda":
        return 1
    free, _ = torch.cuda.mem_get_info()
    relative_size = models.pick_dtype(config.mixed_precision, device).itemsize / 2
    return int((free / relative_size - _UNET_BYTES) // (_PICTURE_BYTES * config.width * config.height / 1e6))


def draw_pictures(
    config: Config, lora_file: Path | None, batches: Batches, latents_folder: Path, finish: Finish
) -> None:
    """Draw all batches, phase by phase, and call `finish` with each design, on several threads and in any order.

    Args:
        latents_folder: for the latents of each phase; an interrupted run resumes from them.

    Raises:
        UserError: base or refiner would have no step, a model or the LoRA cannot be loaded, the device cannot do what
            is asked for, or a picture would be black (exit 5); the others are still saved.
    """
    models.prepare_process()
    device = models.pick_device(config.device)
    _draw_in_phases(config, lora_file, batches, latents_folder, finish, device)
    models.free(device)  # in a notebook, other work comes after


def _draw_in_phases(
    config: Config, lora_file: Path | None, batches: Batches, latents_folder: Path, finish: Finish, device: torch.device
) -> None:
    dtype = models.pick_dtype(config.mixed_precision, device)
    logger.info("drawing on %s in %s", device, str(dtype).removeprefix("torch."))
    ensemble = sampling.is_ensemble(config)  # one run through the noise levels, which are the base's
    scheduler, refiner_scheduler = (
        sampling.make_scheduler(config.scheduler, models.load_noise_scheduler(config, refiner).config)
        for refiner in (False, config.refine and not ensemble)
    )
    base_steps, refiner_steps = sampling.planned_steps(config, scheduler)
    numbers = [f"{batch[0].index:03d}.safetensors" for batch in batches]
    base_files, refined_files = ([latents_folder / f"{kind}_{n}" for n in numbers] for kind in ("base", "refined"))
    # Whether to save pictures while the last UNet works, if it still has to. Asked before anything is on the GPU.
    last_is_done = all(file.exists() for file in (refined_files if config.refine else base_files))
    save_in_background = not last_is_done and _has_room(config, len(batches[0]))
    prompts = list(dict.fromkeys(design.prompt for batch in batches for design in batch))
    rows = [[prompts.index(design.prompt) for design in batch] for batch in batches]
    seeds = [[design.seed for design in batch] for batch in batches]

    lora = lora_weights.read_lora(lora_file) if lora_file else None  # once for text encoders and UNet
    for_base, for_refiner = (one.to(device, dtype) for one in embed_for_both(config, prompts, lora, device, dtype))
    models.free(device)

    def load_base() -> UNet2DConditionModel:
        unet = _load_unet(config, config.pretrained_model, device, dtype, lora)
        if config.refine:
            hub.read_ahead(config.refiner_model, ["unet"], config.variant)
        return unet

    def draw(unet: UNet2DConditionModel, number: int, on_step: OnStep) -> Tensor:
        return sampling.base_latents(unet, scheduler, for_base.rows(rows[number]), seeds[number], config, on_step)

    def refine(unet: UNet2DConditionModel, number: int, on_step: OnStep) -> Tensor:
        own = (refiner_scheduler, for_refiner.rows(rows[number]))
        return sampling.refined_latents(unet, vae, *own, started[number], seeds[number], config, on_step)

    last_phase = partial(run_phase, "drawing", base_steps, base_files, load_base, draw)
    finished: list[Tensor] | None = None
    results = None if config.refine or save_in_background else last_phase()
    if config.refine:
        base = last_phase()
        # All at once: copying one later would wait for the work queued on the GPU.
        started = [(latents[0] if ensemble else latents).to(device, dtype) for latents in base]
        finished = [latents[1] if ensemble else latents for latents in base]
        load_refiner = partial(_load_unet, config, config.refiner_model, device, dtype)
        last_phase = partial(run_phase, "refining", refiner_steps, refined_files, load_refiner, refine)
    vae = models.load_vae(config, device, dtype, drawing=True)
    if config.refine and not save_in_background:
        results = last_phase()
    drawing_unet.make_decoder_fast(vae)
    _save_pictures(config, vae, batches, finished, results, last_phase, finish)
    if memory := models.peak_memory(device):
        logger.info(memory)


def _save_pictures(
    config: Config, vae: AutoencoderKL, batches: Batches, finished: list[Tensor] | None, results: list[Tensor] | None,
    last_phase: Callable[[OnBatch], object], finish: Finish,
) -> None:  # fmt: skip
    """Save the pictures of the last phase: its `results`, or, where there are none yet, during the phase.

    `finished` are the base's latents, where the last phase is the refiner's.
    """
    in_background = results is None
    bar = Progress(total=sum(map(len, batches)), desc="saving", unit="picture", disable=in_background)
    with bar, PictureSaver(vae, config, finish, bar.update) as saver:

        def save_batch(number: int, latents: Tensor) -> None:
            before_and_after = (finished[number], latents) if finished else (latents, None)
            saver.save_batch(batches[number], *before_and_after)

        if in_background:
            last_phase(save_batch)
        for number, latents in enumerate(results or ()):
            save_batch(number, latents)


def _load_unet(
    config: Config, source: str, device: torch.device, dtype: torch.dtype, lora: Lora | None = None
) -> UNet2DConditionModel:
    unet = models.load_unet(source, config.variant, device, dtype, config.attention)
    if lora:
        lora_weights.merge_lora({"unet": unet}, lora, config.lora_scale)
    if config.attention != "xformers":
        drawing_unet.make_fast(unet)
    return unet


def run_phase(
    name: str,
    steps: int,
    files: Sequence[Path],
    load_unet: Callable[[], UNet2DConditionModel],
    make: Callable[[UNet2DConditionModel, int, OnStep], Tensor],
    on_batch: OnBatch | None = None,
) -> list[Tensor]:
    """Run one UNet over all batches, and return their latents, on the CPU. The UNet is freed, however this ends.

    Args:
        steps: of one batch, for the progress bar.
        files: one for each batch; a batch whose file exists from an earlier run is not computed again.
        make: computes the latents of batch number n, without waiting for a GPU.
        on_batch: called with each batch in turn, as soon as its file is written.
    """
    found = [_read(file) for file in files]
    results: list[Tensor] = []

    def complete(latents: Tensor) -> None:
        results.append(latents)
        if on_batch:
            on_batch(len(results) - 1, latents)

    ready = [latents for latents in found if latents is not None]
    if len(ready) == len(files):
        for latents in ready:
            complete(latents)
        return results
    unet = load_unet()
    device, done = unet.device, len(ready) * steps
    try:
        bar = Progress(total=len(files) * steps, initial=done, desc=name, unit="step")
        with bar, ThreadPoolExecutor(1) as pool:
            pending: deque[Future[Tensor]] = deque()
            for number, (file, from_file) in enumerate(zip(files, found, strict=True)):
                made = make(unet, number, bar.update) if from_file is None else from_file
                if made.device.type != "cuda":  # other devices may be used by one thread only
                    made = made.cpu()
                pending.append(pool.submit(_write, made, file if from_file is None else None))
                if number:  # the GPU has this batch to work on while Python waits for the one before
                    complete(pending.popleft().result())
            complete(pending.popleft().result())
    finally:
        del unet
        models.free(device)
    return results


def _read(file: Path) -> Tensor | None:
    try:
        return load_file(file)["latents"]
    except (FileNotFoundError, SafetensorError, KeyError):
        return None


def _write(latents: Tensor, file: Path | None) -> Tensor:
    latents = latents.cpu()  # waits for the GPU
    if file:
        write_atomically(file, save({"latents": latents}))
    return latents
