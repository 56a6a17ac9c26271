"""Latents to finished pictures, on threads, while the GPU works on the next ones."""

import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from diffusers import AutoencoderKL
from torch import Tensor

from lace_lora.config import Config
from lace_lora.errors import UserError
from lace_lora.pictures.recipe import Design, Drawn
from lace_lora.sdxl import sampling
from lace_lora.sdxl.vae import PendingPicture, decode_each


class PictureSaver:
    """Decodes batches of latents and calls `finish` with each design, on several threads at once.

    On exit, the context manager waits for all of them.

    Raises:
        UserError: a picture would be black (exit 5). All others are finished first.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        config: Config,
        finish: Callable[[Drawn], object],
        on_finished: Callable[[], object] = lambda: None,
    ) -> None:
        self.vae, self.finish, self.on_finished = vae, finish, on_finished
        # The ensemble's base has no finished picture: what it predicts at the hand-over is decoded only if it is saved.
        self.decodes_base = not sampling.is_ensemble(config) or config.save_base
        self.threads = min(16, os.cpu_count() or 1)
        self.pool = ThreadPoolExecutor(self.threads)
        self.pending: deque[Future[None]] = deque()
        self.black: list[UserError] = []

    def __enter__(self) -> "PictureSaver":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        with self.pool:  # which waits for its threads in any case
            while self.pending and not error:
                self._wait_for_oldest()
        if self.black and not error:
            raise self.black[0]

    def save_batch(self, designs: Sequence[Design], base: Tensor, refined: Tensor | None) -> None:
        """Decode the finished latents of the base, (n, 4, h, w), and the refined ones, and leave the rest to threads.

        Waits while all threads are busy.

        Raises:
            OSError: an earlier picture could not be saved.
        """
        nothing = [None] * len(designs)
        before = decode_each(self.vae, base) if self.decodes_base else nothing
        after = nothing if refined is None else decode_each(self.vae, refined)
        changes = nothing if refined is None else latent_changes(base, refined)
        for picture in zip(designs, before, after, changes, strict=True):
            if len(self.pending) == self.threads:
                self._wait_for_oldest()
            self.pending.append(self.pool.submit(self._finish, *picture))

    def _finish(
        self, design: Design, base: PendingPicture | None, refined: PendingPicture | None, change: float | None
    ) -> None:
        self.finish(Drawn(design, base.wait() if base else None, refined.wait() if refined else None, change))
        self.on_finished()

    def _wait_for_oldest(self) -> None:
        try:
            self.pending.popleft().result()
        except UserError as error:  # a black picture; the others are still saved
            self.black.append(error)


def latent_changes(before: Tensor, after: Tensor) -> list[float]:
    """How far apart latents (n, 4, h, w) are, as a share of the norm of those before."""
    before, after = before.float().flatten(1), after.float().flatten(1)
    return ((after - before).norm(dim=1) / before.norm(dim=1)).tolist()
