"""What prompts are to SDXL's two UNets."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import lora_weights
import models
from config import Config


@dataclass(frozen=True)
class Embeddings:
    """What n prompts and one negative prompt are to a UNet."""

    prompt_embeds: Tensor  # (n, 77, c)
    pooled_prompt_embeds: Tensor  # (n, p)
    negative_prompt_embeds: Tensor  # (1, 77, c)
    negative_pooled_prompt_embeds: Tensor  # (1, p)

    def to(self, device: torch.device, dtype: torch.dtype) -> "Embeddings":
        return Embeddings(**{name: value.to(device, dtype) for name, value in vars(self).items()})

    def rows(self, index: Sequence[int]) -> dict[str, Tensor]:
        """One row for each picture of a batch, as keyword arguments of a pipeline; without waiting for a GPU."""
        return {
            "prompt_embeds": torch.stack([self.prompt_embeds[row] for row in index]),
            "pooled_prompt_embeds": torch.stack([self.pooled_prompt_embeds[row] for row in index]),
            "negative_prompt_embeds": self.negative_prompt_embeds.expand(len(index), -1, -1),
            "negative_pooled_prompt_embeds": self.negative_pooled_prompt_embeds.expand(len(index), -1),
        }


def for_both(
    config: Config, prompts: list[str], lora: Path | None, device: torch.device, dtype: torch.dtype
) -> tuple[Embeddings, Embeddings]:
    """Embeddings for the base and for the refiner, which reads the second text encoder alone, and its own prompts.

    The LoRA's part for the text encoders, if it has one, is the base's: the refiner was never trained with it.
    """
    tokenizers = models.load_tokenizers(config.pretrained_model)
    text_encoders = models.load_text_encoders(config, device, dtype)
    models.warn_of_long([*prompts, config.negative_prompt or "", config.refiner_prompt or ""], tokenizers[0])
    second = partial(models.encode_prompts, tokenizers=tokenizers[1:], text_encoders=text_encoders[1:])
    zeros = models.zeros_for_empty_prompt(config.refiner_model, default=False) if config.refine else False
    refiner = embed([config.refiner_prompt or prompt for prompt in prompts], config.negative_prompt, second, zeros)
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
        return Embeddings(prompt_embeds, pooled, torch.zeros_like(prompt_embeds[:1]), torch.zeros_like(pooled[:1]))
    embeds, negative_pooled = encode([negative or ""])
    return Embeddings(prompt_embeds, pooled, embeds.cpu(), negative_pooled.cpu())
