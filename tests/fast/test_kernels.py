"""Each kernel against the PyTorch operations that it replaces, on a GPU or in Triton's interpreter (conftest.py)."""

import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU

from kernel_helpers import DEVICE, close, random_input, values_and_gradients

pytest.importorskip("triton", reason="only for Linux on x86-64")
from lace_lora.fast import kernels  # noqa: E402

pytestmark: list[pytest.MarkDecorator] = [pytest.mark.gpu] if os.environ.get("TEST_GPU") else []


def with_random_weights(norm: Any) -> Any:
    norm.weight.data.normal_()
    norm.bias.data.normal_()
    return norm.to(DEVICE).requires_grad_(False)


def test_geglu() -> None:
    torch.manual_seed(0)
    module = GEGLU(24, 20).to(DEVICE)
    inputs = random_input(2, 3, 24)
    close(
        values_and_gradients(lambda values: kernels.Geglu.apply(module.proj(values)), inputs),
        values_and_gradients(module, inputs),
    )


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(("channels", "groups", "height", "width"), [(40, 2, 6, 5), (3, 1, 9, 7)])
def test_group_norm(silu: bool, channels: int, groups: int, height: int, width: int) -> None:
    torch.manual_seed(0)
    norm = with_random_weights(torch.nn.GroupNorm(groups, channels))
    inputs = random_input(2, channels, height, width)

    def ours(pictures: torch.Tensor, shift: torch.Tensor | None = None) -> torch.Tensor:
        return kernels.GroupNorm.apply(pictures, shift, norm, silu)

    close(
        values_and_gradients(ours, inputs),
        values_and_gradients(lambda pictures: F.silu(norm(pictures)) if silu else norm(pictures), inputs),
    )
    assert ours(inputs).is_contiguous(memory_format=torch.channels_last)
    shift = random_input(2, channels).detach()
    close(
        values_and_gradients(lambda pictures: ours(pictures, shift), inputs),
        values_and_gradients(lambda pictures: ours(pictures + shift[:, :, None, None]), inputs),
    )


def test_addition_and_layer_norm() -> None:
    torch.manual_seed(0)
    norm = with_random_weights(torch.nn.LayerNorm(24))
    one, other = random_input(2, 3, 24), random_input(2, 3, 24)
    close(
        values_and_gradients(lambda a, b: kernels.AddLayerNorm.apply(a, b, norm), one, other),
        values_and_gradients(lambda a, b: (a + b, norm(a + b)), one, other),
    )


def test_addition_with_bias() -> None:
    torch.manual_seed(0)
    one, other = random_input(2, 12, 5, 3), random_input(2, 12, 5, 3)
    bias = torch.randn(12).to(DEVICE)
    close(
        values_and_gradients(lambda a, b: kernels.AddWithBias.apply(a, b, bias), one, other),
        values_and_gradients(lambda a, b: a + b + bias[:, None, None], one, other),
    )
