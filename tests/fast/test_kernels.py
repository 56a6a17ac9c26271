"""Each kernel against the passes of PyTorch that it stands for, on a GPU or in Triton's interpreter (conftest.py)."""

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.upsampling import Upsample2D
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton", reason="Triton comes with PyTorch's builds for GPUs")
from lace_lora.fast import (
    kernels,  # noqa: E402
    patching,  # noqa: E402
)

pytestmark: list[pytest.MarkDecorator] = [pytest.mark.gpu] if os.environ.get("TEST_GPU") else []
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def close(ours: Any, theirs: Any) -> None:
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def values_and_slopes(function: Any, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What it gives, and its gradients at made-up slopes of that."""
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    slopes = [torch.randn(output.shape, generator=generator).to(DEVICE) for output in outputs]
    return (*outputs, *torch.autograd.grad(outputs, inputs, slopes))


def made_up(*shape: int) -> torch.Tensor:
    return (3 * torch.randn(shape) + 1).to(DEVICE).requires_grad_()


def with_random_weights(norm: Any) -> Any:
    norm.weight.data.normal_()
    norm.bias.data.normal_()
    return norm.to(DEVICE).requires_grad_(False)


def test_geglu() -> None:
    torch.manual_seed(0)
    theirs = GEGLU(24, 20).to(DEVICE)
    inputs = made_up(2, 3, 24)
    close(values_and_slopes(patching._Geglu(theirs), inputs), values_and_slopes(theirs, inputs))


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(("channels", "groups", "height", "width"), [(40, 2, 6, 5), (3, 1, 9, 7)])
def test_group_norm(silu: bool, channels: int, groups: int, height: int, width: int) -> None:
    torch.manual_seed(0)
    norm = with_random_weights(torch.nn.GroupNorm(groups, channels))
    inputs = made_up(2, channels, height, width)
    ours = kernels.GroupNorm(norm, silu)
    close(
        values_and_slopes(ours, inputs),
        values_and_slopes(lambda pictures: F.silu(norm(pictures)) if silu else norm(pictures), inputs),
    )
    assert ours(inputs).is_contiguous(memory_format=torch.channels_last)
    shift = made_up(2, channels).detach()
    close(
        values_and_slopes(lambda pictures: ours(pictures, shift), inputs),
        values_and_slopes(lambda pictures: ours(pictures + shift[:, :, None, None]), inputs),
    )


def test_sum_and_layer_norm() -> None:
    torch.manual_seed(0)
    norm = with_random_weights(torch.nn.LayerNorm(24))
    one, other = made_up(2, 3, 24), made_up(2, 3, 24)
    close(
        values_and_slopes(lambda a, b: kernels._AddNorm.apply(a, b, norm), one, other),
        values_and_slopes(lambda a, b: (a + b, norm(a + b)), one, other),
    )


def test_sum_with_bias() -> None:
    torch.manual_seed(0)
    one, other = made_up(2, 12, 5, 3), made_up(2, 12, 5, 3)
    bias = torch.randn(12).to(DEVICE)
    close(
        values_and_slopes(lambda a, b: kernels._AddBiased.apply(a, b, bias), one, other),
        values_and_slopes(lambda a, b: a + b + bias[:, None, None], one, other),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(4, 6), (1, 1), (1, 3)])
@torch.no_grad()
def test_doubled_pixels(size: tuple[int, int], dtype: torch.dtype) -> None:
    module = Upsample2D(8, use_conv=True).to(DEVICE, dtype)
    pictures = torch.randn(2, 8, *size, device=DEVICE, dtype=dtype).to(memory_format=torch.channels_last)
    doubled = patching._upsample(module, module.forward, pictures)
    torch.testing.assert_close(doubled, module(pictures), rtol=1e-2, atol=1e-2)
    assert torch.equal(patching._upsample(module, module.forward, pictures, (3, 3)), module(pictures, (3, 3)))


@pytest.mark.skipif(DEVICE.type == "cpu", reason="the interpreter would take hours")
def test_a_unet_calculates_the_same_with_them(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_pretrained(tiny / "base", subfolder="unet").to(DEVICE).requires_grad_(False)
    for parameter in unet.parameters():
        parameter.normal_(std=0.1)
    noisy, text = made_up(2, 4, 8, 8), made_up(2, 77, unet.config.cross_attention_dim)
    width = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    added = {"text_embeds": torch.randn(2, width, device=DEVICE), "time_ids": torch.rand(2, 6, device=DEVICE)}

    def predict(noisy: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return unet(noisy, torch.tensor([3, 900]).to(DEVICE), text, added_cond_kwargs=added).sample

    theirs = values_and_slopes(predict, noisy, text)
    patching.use_kernels(unet)
    for ours in (predict, partial(checkpoint, predict, use_reentrant=False)):
        close(values_and_slopes(ours, noisy, text), theirs)
