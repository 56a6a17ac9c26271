"""A frozen model as fast as its GPU allows: `gpu_kernels.py` where they run, and for drawing a CUDA graph of the UNet.

On a CPU nothing is changed, and drawing there is diffusers' own, number for number.
"""

import importlib.util
import logging
import subprocess
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor

from captured import Captured, CaptureError

logger = logging.getLogger("train_lora")


def use_kernels_if_possible(model: UNet2DConditionModel | AutoencoderKL) -> bool:
    """Let a frozen model calculate by Triton's kernels: for NVIDIA GPUs since Ampere, if there is a C compiler."""
    device = model.device
    if device.type != "cuda" or torch.version.cuda is None or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        from gpu_kernels import try_out, use_kernels

        try_out(device, model.dtype)
    except (ImportError, OSError, RuntimeError, subprocess.CalledProcessError) as error:
        reason = str(error).strip().split("\n")[0]
        logger.warning("Triton cannot build its kernels here (%s): steps are slower without them", reason)
        return False
    use_kernels(model)
    return True


def make_fast(unet: UNet2DConditionModel) -> None:
    """For drawing on a GPU, once the LoRA is merged: fewer and larger products, kernels, and a graph of each shape.

    A step of SDXL at 1024² with guidance takes 31 ms so, in place of 67, on an H100.
    """
    if unet.device.type != "cuda" or unet.config.time_cond_proj_dim is not None:  # distilled: reads guidance too
        return
    for name, module in unet.named_modules():
        if name.endswith(".attn1"):
            module.set_processor(_SelfAttention(module))
        elif name.endswith(".attn2"):
            module.set_processor(_CrossAttention())
    use_kernels_if_possible(unet)
    unet.forward = _Replayed(unet)


class _Replayed:
    """A UNet's forward from CUDA graphs, as diffusers' pipelines call it; plain where there can be none."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self.plain = unet.forward
        self.captured: Captured | None = Captured(self._forward, unet.device)

    def __call__(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        *,
        added_cond_kwargs: dict[str, Tensor],
        **_: Any,
    ) -> tuple[Tensor]:
        conditions = added_cond_kwargs["text_embeds"], added_cond_kwargs["time_ids"]
        inputs = sample, timestep.to(sample.device), encoder_hidden_states, *conditions
        if self.captured:
            try:
                return (self.captured(*inputs),)
            except CaptureError as error:
                logger.warning("no CUDA graph here (%s): drawing is slower without", error)
                self.captured = None
        return (self._forward(*inputs),)

    def _forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, text_embeds: Tensor, time_ids: Tensor
    ) -> Tensor:
        conditions = {"text_embeds": text_embeds, "time_ids": time_ids}
        return self.plain(sample, timestep, encoder_hidden_states, added_cond_kwargs=conditions, return_dict=False)[0]


class _SelfAttention:
    """diffusers' attention processor with q, k and v as one product; their weights become views of one."""

    def __init__(self, attention: Any) -> None:
        layers = [attention.to_q, attention.to_k, attention.to_v]
        self.weight = torch.cat([layer.weight.data for layer in layers])
        for layer, part in zip(layers, self.weight.chunk(3), strict=True):
            layer.weight.data = part

    def __call__(self, attention: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        query, key, value = F.linear(hidden_states, self.weight).chunk(3, dim=-1)
        return attention.to_out[0](attend(query, key, value, attention.heads))


class _CrossAttention:
    def __call__(
        self, attention: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, *_: Any, **__: Any
    ) -> Tensor:
        key, value = attention.to_k(encoder_hidden_states), attention.to_v(encoder_hidden_states)
        return attention.to_out[0](attend(attention.to_q(hidden_states), key, value, attention.heads))


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Attention of (batch, tokens, width), by PyTorch's fastest kernel."""
    split = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (query, key, value))
    return F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
