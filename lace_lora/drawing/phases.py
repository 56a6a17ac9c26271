"""Drawing in phases: prompts to embeddings, base latents, refined latents, pictures; never two big models in memory.

`denoise.py` makes the latents of a batch; here is what is loaded, kept and freed between them.
"""

import logging
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm.auto import tqdm

from lace_lora.config import Config
from lace_lora.drawing import saving
from lace_lora.fast import drawing_unet
from lace_lora.files import write_atomically
from lace_lora.pictures.recipe import Design
from lace_lora.sdxl import hub, lora_weights, models, sampling
from lace_lora.sdxl.prompts import embed_for_both

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
    config: Config, lora: Path | None, batches: Sequence[Sequence[Design]], kept: Path, finish: saving.Finish
) -> None:
    """Draw all batches, phase by phase, and hand each picture to `finish`, on several threads and in any order.

    Args:
        kept: folder for the latents of each phase; a run that was interrupted goes on from what is there.

    Raises:
        UserError: base or refiner would make no step, a model or the LoRA cannot be loaded, or the device cannot do
            what is asked for.
    """
    models.prepare_process()
    device = models.pick_device()
    _draw_in_phases(config, lora, batches, kept, finish, device)
    models.free(device)  # in a notebook, other work comes after


def _draw_in_phases(
    config: Config, lora_file: Path | None, batches: Sequence[Sequence[Design]], kept: Path, finish: saving.Finish,
    device: torch.device,
) -> None:  # fmt: skip
    dtype = models.pick_dtype(config.mixed_precision, device)
    logger.info("drawing on %s in %s", device, str(dtype).removeprefix("torch."))
    scheduler = sampling.make_scheduler(config.scheduler, models.load_noise_scheduler(config).config)
    base_steps, refiner_steps = sampling.planned_steps(config, scheduler)
    prompts = list(dict.fromkeys(design.prompt for batch in batches for design in batch))
    rows = [[prompts.index(design.prompt) for design in batch] for batch in batches]
    seeds = [[design.seed for design in batch] for batch in batches]
    base_files, refined_files = (
        [kept / f"{kind}_{batch[0].index:03d}.safetensors" for batch in batches] for kind in ("base", "refined")
    )
    last_files = refined_files if config.refine else base_files
    # Whether pictures are saved while the last UNet is at work; asked before anything is on the GPU.
    meanwhile = _has_room(config, len(batches[0])) and not all(file.exists() for file in last_files)
    lora = lora_weights.read_lora(lora_file) if lora_file else None
    both = embed_for_both(config, prompts, lora, device, dtype)
    for_base, for_refiner = (one.to(device, dtype) for one in both)
    models.free(device)

    def load_base() -> UNet2DConditionModel:
        unet = _load_unet(config, config.pretrained_model, device, dtype, lora)
        if config.refine:
            hub.read_ahead(config.refiner_model, ["unet"], config.variant)
        return unet

    def draw(unet: UNet2DConditionModel, number: int, on_step: Callable[[], object]) -> Tensor:
        return sampling.base_latents(unet, scheduler, for_base.rows(rows[number]), seeds[number], config, on_step)

    last = _phase("drawing", base_steps, base_files, load_base, draw)
    base: Iterable[Tensor] = last if meanwhile and not config.refine else list(last)
    vae = models.load_vae(config, device, dtype, drawing=True)
    refined: Iterable[Tensor | None] = [None] * len(batches)
    if config.refine:
        begun = [unfinished.to(device, dtype) for unfinished, _ in base]  # now: later, copying waits for the GPU's work

        def refine(unet: UNet2DConditionModel, number: int, on_step: Callable[[], object]) -> Tensor:
            conditions = for_refiner.rows(rows[number])
            return sampling.refined_latents(
                unet, vae, scheduler, conditions, begun[number], seeds[number], config, on_step
            )

        load_refiner = partial(_load_unet, config, config.refiner_model, device, dtype)
        last = _phase("refining", refiner_steps, refined_files, load_refiner, refine)
        refined = last if meanwhile else list(last)
    drawing_unet.make_decoder_fast(vae)
    with closing(last):
        _save_all(config, vae, batches, zip(base, refined, strict=True), finish, quiet=meanwhile)
    if memory := models.peak_memory(device):
        logger.info(memory)


def _save_all(
    config: Config, vae: AutoencoderKL, batches: Sequence[Sequence[Design]],
    latents: Iterable[tuple[Tensor, Tensor | None]], finish: saving.Finish, quiet: bool,
) -> None:  # fmt: skip
    """Decode the latents of base and refiner and finish their pictures; `quiet` where another bar is on the screen."""
    with tqdm(total=sum(map(len, batches)), desc="saving", unit="picture", disable=quiet) as bar:

        def finish_and_tell(*picture: Any) -> None:
            finish(*picture)
            bar.update()

        with saving.saving(vae, config, finish_and_tell) as save:
            for batch, ((_, finished), refined) in zip(batches, latents, strict=True):
                save(batch, finished, refined)


def _load_unet(
    config: Config, source: str, device: torch.device, dtype: torch.dtype,
    lora: lora_weights.Lora | None = None,
) -> UNet2DConditionModel:  # fmt: skip
    unet = models.load_unet(source, config.variant, device, dtype, config.attention)
    if lora:
        lora_weights.merge_lora({"unet": unet}, lora, config.lora_scale)
    if config.attention != "xformers":
        drawing_unet.make_fast(unet)
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
        models.free(device)


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
