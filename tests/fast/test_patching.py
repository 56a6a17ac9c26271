"""Modules of diffusers' that run on the kernels against the same ones before, on a GPU or in Triton's interpreter."""

import copy
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from peft import LoraConfig, inject_adapter_in_model
from torch.utils.checkpoint import checkpoint

from kernel_helpers import DEVICE, close, random_input, values_and_gradients
from lace_lora.fast.fused_lora import FusedLora
from lace_lora.sdxl.lora_weights import UNET_TARGETS

pytest.importorskip("triton", reason="only for Linux on x86-64")
from lace_lora.fast import patching  # noqa: E402

pytestmark: list[pytest.MarkDecorator] = [pytest.mark.gpu] if os.environ.get("TEST_GPU") else []


def assert_patched_is_equal(module: Any, call: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> None:
    """`call(module, *inputs)` and the gradients of the inputs, with random weights, also of norms."""
    module = module.to(DEVICE).requires_grad_(False)
    for parameter in module.parameters():
        parameter.normal_(std=0.2)
    patched = copy.deepcopy(module)
    patching.use_kernels(patched)
    close(values_and_gradients(partial(call, patched), *inputs), values_and_gradients(partial(call, module), *inputs))


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)


@pytest.mark.parametrize("timestep", [True, False])
@pytest.mark.parametrize("out_channels", [8, 12])
def test_resnet(out_channels: int, timestep: bool) -> None:
    """With a shortcut where the number of channels changes; without a timestep as in a VAE's decoder."""
    kind: dict[str, Any] = {} if timestep else {"time_embedding_norm": "group"}
    block = ResnetBlock2D(
        in_channels=8, out_channels=out_channels, groups=4, temb_channels=16 if timestep else None, **kind
    )
    assert (block.conv_shortcut is None) == (out_channels == 8)
    temb = torch.randn(2, 16).to(DEVICE) if timestep else None
    assert_patched_is_equal(block, lambda module, pictures: module(pictures, temb), random_input(2, 8, 5, 3))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_transformer(checkpointing: bool) -> None:
    model = Transformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=8, num_layers=2, norm_num_groups=4,
        cross_attention_dim=6, use_linear_projection=True,
    )  # fmt: skip
    model.gradient_checkpointing = checkpointing
    model._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)

    def call(module: Any, pictures: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return module(pictures, encoder_hidden_states=text, return_dict=False)[0]

    assert_patched_is_equal(model, call, random_input(2, 8, 3, 5), random_input(2, 7, 6))


def test_a_transformer_with_a_fused_lora() -> None:
    """On the kernels, GEGLU's among them, against peft's own without them."""
    model: Any = Transformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=8, num_layers=2, norm_num_groups=4,
        cross_attention_dim=6, use_linear_projection=True,
    )  # fmt: skip
    inject_adapter_in_model(
        LoraConfig(r=2, lora_alpha=2, target_modules=list(UNET_TARGETS["attention+feedforward"])), model
    )
    model.to(DEVICE)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name).data.normal_(std=0.2)
    patched = copy.deepcopy(model)
    fused = FusedLora(patched, 1.0)
    patching.use_kernels(patched)
    pictures, text = random_input(2, 8, 3, 5), random_input(2, 7, 6)
    ours, theirs = (one(pictures, encoder_hidden_states=text, return_dict=False)[0] for one in (patched, model))
    close([ours], [theirs])
    for output in (ours, theirs):
        output.square().mean().backward()
    fused.side_stream.join()
    fused.collect_gradients()
    expected = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    gradients = fused.unflatten(fused.gradients)
    assert gradients.keys() == expected.keys()
    close(gradients.values(), [expected[name] for name in gradients])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(4, 6), (1, 1), (1, 3)])
@torch.no_grad()
def test_upsampling(size: tuple[int, int], dtype: torch.dtype) -> None:
    module = Upsample2D(8, use_conv=True).to(DEVICE, dtype)
    pictures = torch.randn(2, 8, *size, device=DEVICE, dtype=dtype).to(memory_format=torch.channels_last)
    doubled = patching._upsample(module, module.forward, pictures)
    torch.testing.assert_close(doubled, module(pictures), rtol=1e-2, atol=1e-2)
    assert torch.equal(patching._upsample(module, module.forward, pictures, (3, 3)), module(pictures, (3, 3)))


@pytest.mark.skipif(DEVICE.type == "cpu", reason="the interpreter would take hours")
def test_a_patched_unet_predicts_the_same(tiny: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(tiny / "base", subfolder="unet").to(DEVICE).requires_grad_(False)
    for parameter in unet.parameters():
        parameter.normal_(std=0.1)
    noisy, text = random_input(2, 4, 8, 8), random_input(2, 77, unet.config.cross_attention_dim)
    width = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    added = {"text_embeds": torch.randn(2, width, device=DEVICE), "time_ids": torch.rand(2, 6, device=DEVICE)}

    def predict(noisy: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return unet(noisy, torch.tensor([3, 900]).to(DEVICE), text, added_cond_kwargs=added).sample

    theirs = values_and_gradients(predict, noisy, text)
    patching.use_kernels(unet)
    for ours in (predict, partial(checkpoint, predict, use_reentrant=False)):
        close(values_and_gradients(ours, noisy, text), theirs)
