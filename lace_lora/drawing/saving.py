"""Latents to pictures, which are handed on by threads while the device is at work on the next ones."""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from lace_lora.config import Config
from lace_lora.errors import UserError
from lace_lora.pictures.recipe import Design
from lace_lora.sdxl.vae import Decoded, decode_each

# Takes a design, its picture by the base and by the refiner, and how far refining moved its latents, if there are such;
# on several threads at once.
Finish = Callable[[Design, Image.Image | None, Image.Image | None, float | None], object]
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
            before = decode_each(vae, base) if show_base else nothing
            after = nothing if refined is None else decode_each(vae, refined)
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
