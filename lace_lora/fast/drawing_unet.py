"""A frozen model as fast as its GPU allows: `gpu_kernels.py` where they run, and for drawing CUDA graphs.

On a CPU nothing is changed, and drawing there is diffusers' own, number for number.
"""

import importlib.util
import logging
import subprocess
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor

from lace_lora.fast.attention import attend
from lace_lora.fast.cuda_graph import CaptureError, CudaGraphs

logger = logging.getLogger("train_lora")


def make_decoder_fast(vae: AutoencoderKL) -> None:
    """For drawing on a GPU: kernels, and a graph of each shape."""
    if vae.device.type == "cuda":
        use_kernels_if_possible(vae)
        vae.decoder.forward = _Replayed(vae.decoder.forward, vae.device)


def make_fast(unet: UNet2DConditionModel) -> None:
    """For drawing on a GPU, once the LoRA is merged: fewer and larger products, kernels, and a graph of each shape.

    A step of SDXL at 1024² with guidance takes 30 ms so, in place of 67, on an H100.
    """
    if unet.device.type != "cuda" or unet.config.time_cond_proj_dim is not None:  # distilled: reads guidance too
        return
    of_text = _join_products(unet)
    use_kernels_if_possible(unet)
    unet.forward = _Forward(unet, of_text)


class _Replayed:
    """A function of tensors, from CUDA graphs; plain where there can be none."""

    def __init__(self, function: Callable[..., Tensor], device: torch.device) -> None:
        self.function = function
        self.captured: CudaGraphs | None = CudaGraphs(function, device)

    def __call__(self, *inputs: Tensor) -> Tensor:
        if self.captured:
            try:
                return self.captured(*inputs)
            except CaptureError as error:
                logger.warning("no CUDA graph here (%s): drawing is slower without", error)
                self.captured = None
        return self.function(*inputs)


class _Forward:
    """A UNet's forward, as diffusers' pipelines call it."""

    def __init__(self, unet: UNet2DConditionModel, of_text: Tensor) -> None:
        """`of_text` makes the keys and values of all layers of a text, as `_CrossAttention` wants them."""
        self.plain, self.of_text = unet.forward, of_text
        self.replayed = _Replayed(self._forward, unet.device)
        self.embeddings: Tensor | None = None  # the last ones, and
        self.text: Tensor  # what there is to read of them

    def __call__(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        *,
        added_cond_kwargs: dict[str, Tensor],
        **_: Any,
    ) -> tuple[Tensor]:
        if encoder_hidden_states is not self.embeddings:  # pipelines give the same ones at each step
            self.embeddings, self.text = encoder_hidden_states, _without_blank(encoder_hidden_states)
        conditions = added_cond_kwargs["text_embeds"], added_cond_kwargs["time_ids"]
        return (self.replayed(sample, timestep.to(sample.device), self.text, *conditions),)

    def _forward(self, sample: Tensor, timestep: Tensor, text: Tensor, text_embeds: Tensor, time_ids: Tensor) -> Tensor:
        conditions = {"text_embeds": text_embeds, "time_ids": time_ids}
        keys_and_values = F.linear(text, self.of_text)
        return self.plain(sample, timestep, keys_and_values, added_cond_kwargs=conditions, return_dict=False)[0]


def _join_products(unet: UNet2DConditionModel) -> Tensor:
    """Give attention fewer, larger products; returns the weight of the one that stands first, see `_CrossAttention`."""
    across = []
    for name, module in unet.named_modules():
        if name.endswith(".attn1"):
            module.set_processor(_SelfAttention(module))
        elif name.endswith(".attn2"):
            across.append(module)
    first = 0
    for module in across:
        module.set_processor(_CrossAttention(first, module.inner_dim))
        first += 2 * module.inner_dim
    return _joined([layer for module in across for layer in (module.to_k, module.to_v)])


def _without_blank(embeddings: Tensor) -> Tensor:
    """Embeddings (n, 77, c) without the first ones that are all zeros, as SDXL's are for no negative prompt."""
    written = embeddings.flatten(1).any(1).nonzero()
    return embeddings[int(written[0]) :] if len(written) else embeddings


def _joined(layers: Sequence[Any]) -> Tensor:
    """The weights of linear layers as one, of which theirs become views."""
    weight = torch.cat([layer.weight.data for layer in layers])
    for layer, part in zip(layers, weight.split([layer.out_features for layer in layers]), strict=True):
        layer.weight.data = part
    return weight


class _SelfAttention:
    """diffusers' attention processor with q, k and v as one product."""

    def __init__(self, attention: Any) -> None:
        self.weight = _joined([attention.to_q, attention.to_k, attention.to_v])

    def __call__(self, attention: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        query, key, value = F.linear(hidden_states, self.weight).chunk(3, dim=-1)
        return attention.to_out[0](attend(query, key, value, attention.heads))


class _CrossAttention:
    """The same with keys and values made beforehand, for all layers in one product; `first` is this layer's column.

    Pictures without a text, the first ones of a batch, would attend to zeros: what is left for them is the bias.
    """

    def __init__(self, first: int, width: int) -> None:
        self.columns = slice(first, first + 2 * width)

    def __call__(
        self, attention: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, *_: Any, **__: Any
    ) -> Tensor:
        key, value = encoder_hidden_states[..., self.columns].chunk(2, dim=-1)
        without = len(hidden_states) - len(key)
        attended = attend(attention.to_q(hidden_states[without:]), key, value, attention.heads)
        last = attention.to_out[0]
        if not without:
            return last(attended)
        output = torch.empty_like(hidden_states)
        output[:without].view(torch.int64).copy_(last.bias.view(torch.int64))  # by eight bytes at once
        torch.addmm(last.bias, attended.flatten(0, 1), last.weight.t(), out=output[without:].flatten(0, 1))
        return output


def use_kernels_if_possible(model: UNet2DConditionModel | AutoencoderKL) -> bool:
    """Let a frozen model calculate by Triton's kernels: for NVIDIA GPUs since Ampere, if there is a C compiler."""
    device = model.device
    if device.type != "cuda" or torch.version.cuda is None or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        from lace_lora.fast.patching import try_out, use_kernels

        try_out(device, model.dtype)
    except (ImportError, OSError, RuntimeError, subprocess.CalledProcessError) as error:
        reason = str(error).strip().split("\n")[0]
        logger.warning("Triton cannot build its kernels here (%s): steps are slower without them", reason)
        return False
    use_kernels(model)
    return True
