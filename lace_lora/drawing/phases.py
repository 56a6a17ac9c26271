"""Drawing in phases: prompts to embeddings, base latents, refined latents, pictures; never two big models in memory.

`sampling.py` makes the latents of a batch; here is what is loaded, written and freed between batches and phases.
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
from tqdm.auto import tqdm

from lace_lora.config import Config
from lace_lora.drawing.plan import Drawn
from lace_lora.drawing.saving import PictureSaver
from lace_lora.fast import drawing_unet
from lace_lora.files import write_atomically
from lace_lora.pictures.recipe import Design
from lace_lora.sdxl import hub, lora_weights, models, sampling
from lace_lora.sdxl.lora_weights import Lora
from lace_lora.sdxl.prompts import embed_for_both

logger = logging.getLogger(__name__)

MOST_AT_ONCE = 4  # more make a picture no faster: 27.5 ms a step for each of 4 at 1024² on an H100, 30 for one alone
# GPU memory in 16 bits: the UNet with what else is needed, and a picture with guidance, per million pixels.
_UNET_BYTES, _PICTURE_BYTES = 7 * 2**30, 2**29
_ROOM = 12  # the VAE beside a UNet takes the memory of so many pictures at most

OnBatch = Callable[[int, Tensor], object]  # is given the number of a batch and its latents on the CPU
OnStep = Callable[[], object]


def pictures_at_once(config: Config) -> int:
    """The largest batch that is worth it and fits on this machine's device."""
    return max(1, min(MOST_AT_ONCE, _fitting(config)))


def _has_room(config: Config, batch_size: int) -> bool:
    """Whether the VAE can work beside a UNet: at 1024² in bf16 with 22 GiB, but not on a T4."""
    return _fitting(config) >= batch_size + _ROOM


def _fitting(config: Config) -> int:
    """How many pictures fit beside a UNet in the free memory of a GPU; 1 on other devices."""
    device = models.pick_device()
    if device.type != "cuda":
        return 1
    free, _ = torch.cuda.mem_get_info()
    relative_size = models.pick_dtype(config.mixed_precision, device).itemsize / 2
    return int((free / relative_size - _UNET_BYTES) // (_PICTURE_BYTES * config.width * config.height / 1e6))


def draw_pictures(
    config: Config,
    lora: Path | None,
    batches: Sequence[Sequence[Design]],
    latents_folder: Path,
    finish: Callable[[Drawn], object],
) -> None:
    """Draw all batches, phase by phase, and call `finish` with each design, on several threads and in any order.

    Args:
        latents_folder: for the latents of each phase; a run that was interrupted goes on from those.

    Raises:
        UserError: base or refiner would have no step, a model or the LoRA cannot be loaded, or the device cannot do
            what is asked for.
    """
    models.prepare_process()
    device = models.pick_device()
    _draw_in_phases(_Run(config, lora, batches, latents_folder, device), finish)
    models.free(device)  # in a notebook, other work comes after


def _draw_in_phases(run: "_Run", finish: Callable[[Drawn], object]) -> None:
    save_meanwhile = run.has_room_to_save()  # asked before anything is on the GPU
    run.embed()
    base = run.draw_base() if run.config.refine else None
    vae = models.load_vae(run.config, run.device, run.dtype, drawing=True)
    drawing_unet.make_decoder_fast(vae)
    last_phase = run.draw_base if base is None else partial(run.refine, vae, base)
    made = None if save_meanwhile else last_phase()
    # Where a phase has its bar on the screen, there is none for saving.
    with tqdm(total=sum(map(len, run.batches)), desc="saving", unit="picture", disable=save_meanwhile) as bar:

        def finish_and_count(drawn: Drawn) -> None:
            finish(drawn)
            bar.update()

        with PictureSaver(vae, run.config, finish_and_count) as saver:

            def save_batch(number: int, latents: Tensor) -> None:
                finished, refined = (latents, None) if base is None else (run.finished(base[number]), latents)
                saver.save_batch(run.batches[number], finished, refined)

            if made is None:
                last_phase(save_batch)
            else:
                for number, latents in enumerate(made):
                    save_batch(number, latents)
    if memory := models.peak_memory(run.device):
        logger.info(memory)


class _Run:
    """What the phases share, and each phase with its UNet.

    Latents of the base are (n, 4, h, w), but in the ensemble's flow (2, n, 4, h, w): see `latents_for_ensemble`.
    """

    def __init__(
        self,
        config: Config,
        lora_file: Path | None,
        batches: Sequence[Sequence[Design]],
        latents_folder: Path,
        device: torch.device,
    ) -> None:
        self.config, self.lora_file, self.batches, self.device = config, lora_file, batches, device
        self.dtype = models.pick_dtype(config.mixed_precision, device)
        logger.info("drawing on %s in %s", device, str(self.dtype).removeprefix("torch."))
        self.scheduler = sampling.make_scheduler(config.scheduler, models.load_noise_scheduler(config).config)
        self.base_steps, self.refiner_steps = sampling.planned_steps(config, self.scheduler)
        self.ensemble = config.refine and config.refiner_flow == "ensemble"
        self.prompts = list(dict.fromkeys(design.prompt for batch in batches for design in batch))
        self.rows = [[self.prompts.index(design.prompt) for design in batch] for batch in batches]
        self.seeds = [[design.seed for design in batch] for batch in batches]
        self.base_files, self.refined_files = (
            [latents_folder / f"{kind}_{batch[0].index:03d}.safetensors" for batch in batches]
            for kind in ("base", "refined")
        )

    def has_room_to_save(self) -> bool:
        """Whether pictures can be decoded and saved while the last UNet works, if it still has to."""
        last_files = self.refined_files if self.config.refine else self.base_files
        return _has_room(self.config, len(self.batches[0])) and not all(file.exists() for file in last_files)

    def embed(self) -> None:
        # Once for text encoders and UNet.
        self.lora = lora_weights.read_lora(self.lora_file) if self.lora_file else None
        both = embed_for_both(self.config, self.prompts, self.lora, self.device, self.dtype)
        self.for_base, self.for_refiner = (one.to(self.device, self.dtype) for one in both)
        models.free(self.device)

    def draw_base(self, on_batch: OnBatch | None = None) -> list[Tensor]:
        make_latents = sampling.latents_for_ensemble if self.ensemble else sampling.base_latents

        def load() -> UNet2DConditionModel:
            unet = _load_unet(self.config, self.config.pretrained_model, self.device, self.dtype, self.lora)
            if self.config.refine:
                hub.read_ahead(self.config.refiner_model, ["unet"], self.config.variant)
            return unet

        def draw(unet: UNet2DConditionModel, number: int, on_step: OnStep) -> Tensor:
            conditions = self.for_base.rows(self.rows[number])
            return make_latents(unet, self.scheduler, conditions, self.seeds[number], self.config, on_step)

        return run_phase("drawing", self.base_steps, self.base_files, load, draw, on_batch)

    def refine(self, vae: AutoencoderKL, base: Sequence[Tensor], on_batch: OnBatch | None = None) -> list[Tensor]:
        # All of them now: to copy one to a GPU later would wait for the work before it.
        started = [(latents[0] if self.ensemble else latents).to(self.device, self.dtype) for latents in base]
        load = partial(_load_unet, self.config, self.config.refiner_model, self.device, self.dtype)

        def refine(unet: UNet2DConditionModel, number: int, on_step: OnStep) -> Tensor:
            conditions, seeds = self.for_refiner.rows(self.rows[number]), self.seeds[number]
            return sampling.refined_latents(
                unet, vae, self.scheduler, conditions, started[number], seeds, self.config, on_step
            )

        return run_phase("refining", self.refiner_steps, self.refined_files, load, refine, on_batch)

    def finished(self, base_latents: Tensor) -> Tensor:
        """What a base picture is decoded from, (n, 4, h, w)."""
        return base_latents[1] if self.ensemble else base_latents


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
        files: one for each batch; a batch whose file an earlier run has written is not made again.
        make: makes the latents of batch number n, without waiting for a GPU.
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
        with tqdm(total=len(files) * steps, initial=done, desc=name, unit="step") as bar, ThreadPoolExecutor(1) as pool:
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
