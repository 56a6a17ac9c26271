"""The loss on pictures that are never trained on, with the same noise at the same timesteps each time."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lace_lora.errors import first_line, is_out_of_memory
from lace_lora.seeds import stream
from lace_lora.training.batches import Batch, Encoded
from lace_lora.training.train_step import TrainStep

TIMESTEPS = (100, 300, 500, 700)  # from fine threads to composition; at the last ones a style hardly matters

logger = logging.getLogger("train_lora")


@dataclass
class Validation:
    """What the loss on held-out pictures is measured with."""

    held_out: Encoded
    loss: Callable[[Batch], Tensor]  # of a batch on the device: the mean over its pictures, none weighted
    seed: int
    at_once: int  # pictures in a batch, if there is the memory

    def measure(self, train_step: TrainStep, step: int) -> float | None:
        """The mean loss; if it cannot be measured, the log says why, and training goes on."""
        try:
            train_step.train(False)
            return self._within_memory(train_step)
        except Exception as error:  # what only watches a training costs it nothing
            reason = "out of memory" if is_out_of_memory(error) else first_line(error)
            logger.warning("no validation loss at step %d: %s", step, reason)
            return None
        finally:
            train_step.train()

    def _within_memory(self, train_step: TrainStep) -> float:
        """With that many pictures at once or, if memory runs out, one by one and without the training's CUDA graphs."""
        try:
            return self._mean_loss(train_step)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        # Not in the clause above, where the error holds on to what is to be freed.
        train_step.drop_graphs()
        self.at_once = 1
        return self._mean_loss(train_step)

    @torch.no_grad()
    def _mean_loss(self, train_step: TrainStep) -> float:
        batches = make_batches(self.held_out, self.seed, self.at_once)
        with train_step.autocast():
            sums = [self.loss(batch.to(train_step.device)) * len(batch.caption) for batch in batches]
        return float(torch.stack(sums).sum()) / sum(len(batch.caption) for batch in batches)


def make_batches(held_out: Encoded, seed: int, size: int) -> list[Batch]:
    """Every picture at each of `TIMESTEPS` with noise of its own, in batches of at most `size` of one shape."""
    made: list[Batch] = []
    for bucket in held_out.buckets:
        pictures = torch.tensor(bucket).repeat_interleave(len(TIMESTEPS))
        latents = torch.stack([held_out.latents.mean[picture][0] for picture in pictures.tolist()])
        noise = [
            torch.randn(latents.shape[1:], generator=stream(seed, "validation", picture, timestep))
            for picture in bucket
            for timestep in TIMESTEPS
        ]
        captions = held_out.caption[pictures]
        whole = Batch(
            latents=latents,
            noise=torch.stack(noise),
            timesteps=torch.tensor(TIMESTEPS).repeat(len(bucket)),
            time_ids=held_out.latents.time_ids[pictures],
            caption=captions,
            prompt_embeds=held_out.prompt_embeds[captions],
            pooled_prompt_embeds=held_out.pooled_prompt_embeds[captions],
            weights=torch.ones(len(pictures)),
        )
        rows = zip(*(value.split(size) for value in vars(whole).values()), strict=True)
        made += [Batch(*values) for values in rows]
    return made
