"""The fused LoRA against peft's own; tests/training/test_train_step.py does the same for a whole step."""

from typing import Any

import pytest
import torch

from helpers import Make
from lace_lora.fast import fused_lora
from lace_lora.fast.fused_lora import FusedLora
from lace_lora.sdxl import lora_weights, models
from training_helpers import CPU, random_batch

BOTH_TARGETS = pytest.mark.parametrize("targets", ["attention", "attention+feedforward"])


def make_unet(settings: Make, rank: int, targets: str) -> tuple[Any, dict[str, torch.nn.Parameter]]:
    """A UNet and its LoRA, which is not without effect as a new one would be."""
    config = settings(rank=rank, lora_alpha=2.0 * rank, lora_targets=targets)
    unet = models.load_unet(config.pretrained_model, None, CPU, torch.float32)
    torch.manual_seed(0)
    lora = lora_weights.add_lora({"unet": unet}, config)
    for weight in lora.values():
        weight.data += 0.05 * torch.randn(weight.shape)
    return unet, lora


def predict(unet: Any) -> torch.Tensor:
    batch = random_batch(2)
    added = {"text_embeds": batch.pooled_prompt_embeds, "time_ids": batch.time_ids}
    return unet(batch.latents, batch.timesteps, batch.prompt_embeds, added_cond_kwargs=added).sample


@BOTH_TARGETS
@pytest.mark.parametrize("rank", [3, 8])  # with rows of padding, and without
@pytest.mark.parametrize("few_tokens", [0, 10**6])  # by two matmuls, and by one
def test_predictions_and_gradients_are_those_of_peft(
    settings: Make, monkeypatch: pytest.MonkeyPatch, rank: int, few_tokens: int, targets: str
) -> None:
    monkeypatch.setattr(fused_lora, "_FEW_TOKENS", few_tokens)
    (plain, expected), (unet, lora) = (make_unet(settings, rank, targets) for _ in range(2))
    fused = FusedLora(unet, 2.0)
    for _ in range(2):  # gradients add up
        results = predict(plain), predict(unet)
        torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)
        for result in results:
            result.square().mean().backward()
        fused.collect_gradients()
    for name, weight in lora.items():
        scale = float(expected[name].grad.abs().max())  # type: ignore[union-attr]
        assert scale > 0
        torch.testing.assert_close(weight.grad, expected[name].grad, rtol=1e-4, atol=1e-4 * scale)


@BOTH_TARGETS
def test_peft_s_weights_and_gradients_are_views_into_one_parameter(settings: Make, targets: str) -> None:
    unet, lora = make_unet(settings, 3, targets)
    assert any(".ff." in name for name in lora) == ("feedforward" in targets)
    before = {name: weight.detach().clone() for name, weight in lora.items()}
    fused = FusedLora(unet, 2.0)
    assert fused.weights.numel() == sum(weight.numel() for weight in lora.values())
    assert all(torch.equal(weight, before[name]) for name, weight in lora.items())
    fused.weights.data.mul_(2)
    fused.gradients.fill_(3)
    assert all(torch.equal(weight, 2 * before[name]) for name, weight in lora.items())
    assert all(weight.grad is not None and weight.grad.eq(3).all() for weight in lora.values())


def test_unflatten_and_flatten_are_inverse(settings: Make) -> None:
    unet, lora = make_unet(settings, 3, "attention+feedforward")
    fused = FusedLora(unet, 2.0)
    parts = fused.unflatten(fused.weights.data)
    assert {f"unet.{name}" for name in parts} == lora.keys()
    assert all(torch.equal(part, lora[f"unet.{name}"]) for name, part in parts.items())
    assert torch.equal(fused.flatten(parts), fused.weights.data)
    step = torch.tensor(7.0)
    assert all(torch.equal(part, step) for part in fused.unflatten(step).values())
    assert torch.equal(fused.flatten(fused.unflatten(step)), step)
    del parts[next(iter(parts))]
    with pytest.raises(KeyError):
        fused.flatten(parts)
