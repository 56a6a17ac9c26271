"""The loss on pictures that are never trained on, with the same noise at the same timesteps each time."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

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
            return train_step.within_memory(partial(self._mean_loss, train_step), self.at_once)
        except Exception as error:  # what only watches a training costs it nothing
            reason = "out of memory" if is_out_of_memory(error) else first_line(error)
            logger.warning("no validation loss at step %d: %s", step, reason)
            return None
        finally:
            train_step.train()

    @torch.no_grad()
    def _mean_loss(self, train_step: TrainStep, at_once: int) -> float:
        batches, total = make_batches(self.held_out, self.seed), torch.zeros((), device=train_step.device)
        count = sum(len(batch.caption) for batch in batches)
        self.at_once = at_once  # it stays at one once memory has run out
        with train_step.autocast():
            for batch in batches:
                for part in batch.split(at_once):
                    total += self.loss(part.to(train_step.device)) * (len(batch.caption) / count)
        return float(total)


def make_batches(held_out: Encoded, seed: int) -> list[Batch]:
    """Every picture at each of `TIMESTEPS` with noise of its own, in one batch for each shape."""
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
        made.append(
            Batch(
                latents=latents,
                noise=torch.stack(noise),
                timesteps=torch.tensor(TIMESTEPS).repeat(len(bucket)),
                time_ids=held_out.latents.time_ids[pictures],
                caption=captions,
                prompt_embeds=held_out.prompt_embeds[captions],
                pooled_prompt_embeds=held_out.pooled_prompt_embeds[captions],
                weights=torch.ones(len(pictures)),
            )
        )
    return made
