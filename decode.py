"""Latents to pictures, which are handed on by threads while the device is at work on the next ones."""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from config import LOSS_NOT_FINITE, Config, UserError
from gallery import Design

# Takes a design, its picture by the base and by the refiner, and how far refining moved its latents, if there are such;
# on several threads at once.
Finish = Callable[[Design, Image.Image | None, Image.Image | None, float | None], object]
Decoded = Callable[[], Image.Image]
# Takes a batch, its latents (n, 4, h, w) as the base has finished them, and the refiner's, if it has refined them.
Save = Callable[[Sequence[Design], Tensor, Tensor | None], None]


@contextmanager
def saving(vae: AutoencoderKL, config: Config, finish: Finish) -> Iterator[Save]:
    """Gives what decodes batches and hands their pictures to `finish`, on threads; at the end all are finished.

    The ensemble's base has no finished picture, and what it would be at the hand-over is decoded only if wanted.

    Raises:
        UserError: a picture would be black (exit 5); all others are handed on before.
    """
    show_base = not config.refine or config.refiner_flow == "img2img" or config.save_base
    count = min(16, os.cpu_count() or 1)
    waiting: deque[Future[None]] = deque()
    black: list[UserError] = []

    def done(design: Design, before: Decoded | None, after: Decoded | None, moved: float | None) -> None:
        finish(design, before and before(), after and after(), moved)

    def wait_for(finished: Future[None]) -> None:
        try:
            finished.result()
        except UserError as error:  # the others are drawn all the same
            black.append(error)

    with ThreadPoolExecutor(count) as pool:

        def save(batch: Sequence[Design], base: Tensor, refined: Tensor | None) -> None:
            nothing = [None] * len(batch)
            before = _decoded(vae, base) if show_base else nothing
            after = nothing if refined is None else _decoded(vae, refined)
            moved = nothing if refined is None else _distances(base, refined)
            for each in zip(batch, before, after, moved, strict=True):
                if len(waiting) == count:
                    wait_for(waiting.popleft())
                waiting.append(pool.submit(done, *each))

        yield save
        for finished in waiting:
            wait_for(finished)
    if black:
        raise black[0]


def _distances(before: Tensor, after: Tensor) -> list[float]:
    """How far apart latents (n, 4, h, w) are, by the length of the first."""
    before, after = before.float().flatten(1), after.float().flatten(1)
    return ((after - before).norm(dim=1) / before.norm(dim=1)).tolist()


def decode(vae: AutoencoderKL, latents: Tensor) -> list[Image.Image]:
    """Latents (n, 4, h, w) to pictures, one by one: decoding takes more memory than anything else.

    Raises:
        UserError: the picture would be black, since it is not of finite numbers (exit 5).
    """
    return [picture() for picture in _decoded(vae, latents)]


def _decoded(vae: AutoencoderKL, latents: Tensor) -> Iterator[Decoded]:
    """Each of latents (n, 4, h, w), as it is asked for. All are copied at once: that means to wait for the GPU."""
    finite = latents.isfinite().flatten(1).all(dim=1)
    for row, is_finite in zip(latents.to(vae.device, vae.dtype).split(1), finite.tolist(), strict=True):
        yield _decode(vae, row, is_finite)


@torch.no_grad()
def _decode(vae: AutoencoderKL, latents: Tensor, latents_finite: bool) -> Decoded:
    """Have latents (1, 4, h, w) decoded, without waiting for a GPU; what is returned waits, and gives the picture."""
    pixels = vae.decode(latents / vae.config.scaling_factor).sample[0]
    levels = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()
    on_gpu = vae.device.type == "cuda"
    levels, finite = (value.to("cpu", non_blocking=on_gpu) for value in (levels, pixels.isfinite().all()))
    arrived = torch.cuda.Event(blocking=True) if on_gpu else None  # a thread that waits for it leaves the CPU alone
    if arrived:
        arrived.record()

    def picture() -> Image.Image:
        if arrived:
            arrived.synchronize()
        _check(latents_finite, "latents")
        _check(bool(finite), "VAE's output")
        height, width, _ = levels.shape
        return Image.frombytes("RGB", (width, height), levels.numpy().tobytes())

    return picture


def _check(finite: bool, name: str) -> None:
    if not finite:
        advice = "set mixed_precision: bf16 or no, leave pretrained_vae empty, or try lora_scale=0"
        raise UserError(f"the {name} is not of finite numbers, so that pictures are black: {advice}", LOSS_NOT_FINITE)
