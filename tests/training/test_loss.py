"""The loss against its formula and diffusers."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.training_utils import compute_snr

from lace_lora.training.loss import loss_weights, training_loss
from training_helpers import noise_schedule, random_batch


class Echo(torch.nn.Module):
    """Stands in for a UNet where only the loss's own arithmetic matters: predicts half of its noisy input."""

    dtype = torch.float32

    def forward(self, sample: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor]:
        return (sample / 2,)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_loss_equals_the_formula(prediction_type: str, gamma: float | None) -> None:
    batch, schedule = random_batch(4), noise_schedule(prediction_type)
    loss = training_loss(Echo(), batch, schedule, gamma)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas_cumprod = torch.cumprod(1 - betas, 0)[batch.timesteps]
    expected = 0.0
    for index, alpha in enumerate(alphas_cumprod.tolist()):
        latents, noise = batch.latents[index].double(), batch.noise[index].double()
        noisy = math.sqrt(alpha) * latents + math.sqrt(1 - alpha) * noise
        velocity = math.sqrt(alpha) * noise - math.sqrt(1 - alpha) * latents
        target = noise if prediction_type == "epsilon" else velocity
        snr = alpha / (1 - alpha)
        weight = 1.0 if gamma is None else min(snr, gamma) / (snr + (prediction_type == "v_prediction"))
        expected += weight * ((noisy / 2 - target) ** 2).mean().item() / 4
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_snr_weights_equal_diffusers() -> None:
    schedule, timesteps = noise_schedule(), torch.arange(0, 1000, 7)
    snr = compute_snr(schedule, timesteps)
    expected = torch.stack([snr, torch.full_like(snr, 5.0)], dim=1).min(dim=1)[0] / snr
    torch.testing.assert_close(loss_weights(timesteps, schedule, 5.0), expected)


def test_prior_preservation_adds_the_class_loss_by_its_weight() -> None:
    batch, schedule = random_batch(4), noise_schedule()
    weighted = replace(batch, weights=torch.tensor([2.0, 1.0, 2.0, 1.0]))
    parts = [replace(batch, **{k: v[rows] for k, v in vars(batch).items()}) for rows in ([0, 2], [1, 3])]
    mine, other = (training_loss(Echo(), part, schedule, 5.0) for part in parts)
    torch.testing.assert_close(training_loss(Echo(), weighted, schedule, 5.0), mine + 0.5 * other)
