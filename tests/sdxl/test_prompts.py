"""Prompts to embeddings, equal to those of diffusers' own pipelines."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from transformers import CLIPTokenizer

from lace_lora.config import Config
from lace_lora.sdxl import lora_weights, prompts
from sdxl_helpers import CPU, PROMPTS, TEXT, add_trained_lora, config_for

Encoders = tuple[list[CLIPTokenizer], list[torch.nn.Module]]


@pytest.fixture(scope="module")
def config(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    return config_for(tiny, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def base(tiny: Path) -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline.from_pretrained(tiny / "base", torch_dtype=torch.float32)


@pytest.fixture(scope="module")
def encoders(config: Config) -> Encoders:
    tokenizers = prompts.load_tokenizers(config.pretrained_model)
    return tokenizers, prompts.load_text_encoders(config, CPU, torch.float32)


def test_prompt_embeddings_equal_the_pipelines(base: StableDiffusionXLPipeline, encoders: Encoders) -> None:
    embeds, pooled = prompts.encode_prompts(PROMPTS, *encoders)
    expected, _, expected_pooled, _ = base.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    assert torch.equal(embeds, expected)
    assert torch.equal(pooled, expected_pooled)


def test_refiner_embeddings_equal_the_pipelines(
    tiny: Path, base: StableDiffusionXLPipeline, encoders: Encoders
) -> None:
    refiner = StableDiffusionXLImg2ImgPipeline.from_pretrained(
        tiny / "refiner", vae=base.vae, text_encoder_2=base.text_encoder_2, tokenizer_2=base.tokenizer_2
    )
    embeds, pooled = prompts.encode_prompts(PROMPTS, *(both[1:] for both in encoders))
    expected, _, expected_pooled, _ = refiner.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    assert torch.equal(embeds, expected)
    assert torch.equal(pooled, expected_pooled)


def test_the_loras_part_for_the_text_encoders_is_for_the_base_alone(config: Config, tmp_path: Path) -> None:
    trained = dict(zip(TEXT, prompts.load_text_encoders(config, CPU, torch.float32), strict=True))
    state = lora_weights.lora_state(add_trained_lora(trained, config), config.alpha / config.rank)
    state |= {f"unet.conv_in.lora_{end}.weight": torch.zeros(1, 1) for end in "AB"}
    lora_weights.save_lora(tmp_path / "lora.safetensors", state, {})
    lora = lora_weights.read_lora(tmp_path / "lora.safetensors")
    plain, plain_refiner = prompts.embed_for_both(config, PROMPTS, None, CPU, torch.float32)
    base, refiner = prompts.embed_for_both(config, PROMPTS, lora, CPU, torch.float32)
    assert all(torch.equal(value, vars(plain_refiner)[name]) for name, value in vars(refiner).items())
    half = base.prompt_embeds.shape[-1] // 2
    change = (base.prompt_embeds - plain.prompt_embeds).abs()
    assert change[..., :half].max() > 0.05
    assert change[..., half:].max() > 0.05
    both = prompts.load_tokenizers(config.pretrained_model), list(trained.values())
    torch.testing.assert_close(base.prompt_embeds, prompts.encode_prompts(PROMPTS, *both)[0], rtol=1e-4, atol=1e-4)


def test_too_long_prompts_give_a_warning(encoders: Encoders, caplog: pytest.LogCaptureFixture) -> None:
    prompts.warn_of_long(["white lace", "white lace " * 40, ""], encoders[0][0])
    [warning] = caplog.messages
    assert warning.startswith("SDXL reads only the first 77 tokens")
    assert "white lace white lace" in warning
