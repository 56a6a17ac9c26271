"""Prompts to embeddings: SDXL's tokenizers and text encoders."""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lace_lora.config import Config
from lace_lora.errors import UserError, first_line
from lace_lora.sdxl import lora_weights
from lace_lora.sdxl.lora_weights import Lora
from lace_lora.sdxl.models import load_part

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Embeddings:
    """n prompts and one negative prompt, encoded for a UNet."""

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


def embed_for_both(
    config: Config, prompts: list[str], lora: Lora | None, device: torch.device, dtype: torch.dtype
) -> tuple[Embeddings, Embeddings]:
    """Embeddings for the base and for the refiner, which has the second text encoder alone, and prompts of its own.

    The LoRA, if it trained the text encoders, is for the base only: the refiner was never trained with it.
    """
    tokenizers = load_tokenizers(config.pretrained_model)
    text_encoders = load_text_encoders(config, device, dtype)
    warn_of_long([*prompts, config.negative_prompt or "", config.refiner_prompt or ""], tokenizers[0])
    second = partial(encode_prompts, tokenizers=tokenizers[1:], text_encoders=text_encoders[1:])
    zeros = zeros_for_empty_prompt(config.refiner_model, default=False) if config.refine else False
    refiner = embed([config.refiner_prompt or prompt for prompt in prompts], config.negative_prompt, second, zeros)
    if lora:
        networks = dict(zip(("text_encoder", "text_encoder_2"), text_encoders, strict=True))
        lora_weights.merge_lora(networks, lora, config.lora_scale)
    both = partial(encode_prompts, tokenizers=tokenizers, text_encoders=text_encoders)
    zeros = zeros_for_empty_prompt(config.pretrained_model, default=True)
    return embed(prompts, config.negative_prompt, both, zeros), refiner


def load_tokenizers(source: str) -> list[CLIPTokenizer]:
    """Both tokenizers; of prompts with 77 tokens, as CLIP was trained, whatever their settings say.

    Raises:
        UserError: one is damaged.
    """
    tokenizers = []
    for folder in ("tokenizer", "tokenizer_2"):
        try:
            tokenizer = load_part(CLIPTokenizer, source, folder)
        except UserError:
            raise
        except Exception as error:  # what the tokenizers library raises has no other class
            where = Path(source, folder)
            raise UserError(f"{where} cannot be loaded ({first_line(error)}): download the model again") from error
        tokenizer.model_max_length = 77
        tokenizers.append(tokenizer)
    return tokenizers


def load_text_encoders(config: Config, device: torch.device, dtype: torch.dtype) -> list[torch.nn.Module]:
    """Both text encoders, frozen: CLIP ViT-L, then OpenCLIP bigG, the one with the pooled projection."""
    parts = ((CLIPTextModel, "text_encoder"), (CLIPTextModelWithProjection, "text_encoder_2"))
    encoders = [load_part(part, config.pretrained_model, folder, config.variant, dtype) for part, folder in parts]
    return [encoder.to(device).eval().requires_grad_(False) for encoder in encoders]


def warn_of_long(texts: Iterable[str], tokenizer: CLIPTokenizer) -> None:
    """Warn of each text that has more tokens than the text encoders read."""
    for text in texts:
        if len(tokenizer(text).input_ids) > tokenizer.model_max_length:  # start and end included
            logger.warning("SDXL reads only the first 77 tokens (about 50 words) and ignores the rest of: %.60s…", text)


def zeros_for_empty_prompt(source: str, default: bool) -> bool:
    """`force_zeros_for_empty_prompt` of the model's pipeline: whether no negative prompt means zeros, not \"\"."""
    if not Path(source, "model_index.json").is_file():
        return default
    return bool(DiffusionPipeline.load_config(source).get("force_zeros_for_empty_prompt", default))


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


@torch.no_grad()
def encode_prompts(
    prompts: list[str], tokenizers: list[CLIPTokenizer], text_encoders: list[torch.nn.Module]
) -> tuple[Tensor, Tensor]:
    """Prompts as SDXL reads them: both encoders' penultimate hidden states, and the second one's pooled projection.

    With the second tokenizer and encoder alone, the embeddings are the refiner's. SDXL paper, section 2.1.

    Returns:
        prompt_embeds (n, 77, sum of hidden sizes) and pooled_prompt_embeds (n, projection size).
    """
    return encode_tokens(tokenize(prompts, tokenizers), text_encoders)


def tokenize(prompts: list[str], tokenizers: list[CLIPTokenizer]) -> list[Tensor]:
    """Token ids (n, 77) for each tokenizer."""
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    return [each(prompts, max_length=each.model_max_length, **options).input_ids for each in tokenizers]


def encode_tokens(tokens: list[Tensor], text_encoders: list[torch.nn.Module]) -> tuple[Tensor, Tensor]:
    """`encode_prompts` of token ids, with gradients where the encoders train."""
    hidden_states = []
    for token_ids, text_encoder in zip(tokens, text_encoders, strict=True):
        device: Any = text_encoder.device
        output = text_encoder(token_ids.to(device), output_hidden_states=True)
        hidden_states.append(output.hidden_states[-2])
    return torch.cat(hidden_states, dim=-1), output.text_embeds
