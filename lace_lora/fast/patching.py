"""Replaces forwards of diffusers' modules, so that a frozen UNet or VAE runs on the Triton kernels. Needs Triton."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from lace_lora.fast import kernels


def use_kernels(model: UNet2DConditionModel | AutoencoderKL) -> None:
    """Make a frozen UNet or VAE of SDXL's family run on the kernels, in channels-last layout, on a GPU.

    Its biases change: those of convolutions move into additions that are there anyway, since each is a pass of its own.
    From then on the model must keep its device and dtype.
    """
    model.to(memory_format=torch.channels_last)
    modules: list[Any] = list(model.modules())
    for module in modules:
        plain = isinstance(module, ResnetBlock2D) and _is_plain(module)
        for child in module.children():
            if isinstance(child, nn.GroupNorm) and not isinstance(module, Attention):  # there it is of tokens
                child.forward = partial(_group_norm, child, plain)  # type: ignore[method-assign]
        if plain:
            first = _move_bias(module.conv1, module.time_emb_proj)
            second = _move_bias(module.conv2, module.conv_shortcut)
            module.forward = partial(_resnet, module, first, second)
        elif isinstance(module, Upsample2D) and _only_doubles(module):
            module.forward = partial(_upsample, module, module.forward)
        elif isinstance(module, Transformer2DModel) and module.use_linear_projection:
            module.forward = partial(_transformer, module)
        elif isinstance(module, BasicTransformerBlock) and module.norm_type == "layer_norm":
            module.forward = partial(_transformer_block, module)
        elif isinstance(module, GEGLU):
            module.forward = partial(_geglu, module)


def _is_plain(block: Any) -> bool:
    """Whether `_resnet` does all that a block does."""
    extras = (block.upsample, block.downsample, block.dropout.p)
    # "group" is what a VAE's decoder calls a norm without a time embedding.
    return not any(extras) and block.time_embedding_norm in ("default", "group") and block.output_scale_factor == 1


def _only_doubles(module: Any) -> bool:
    """Whether `_upsample` does all that a module does."""
    plain = module.use_conv and module.interpolate and not module.use_conv_transpose and module.norm is None
    return plain and module.name == "conv" and module.channels % 4 == 0


def _move_bias(source: Any, target: Any) -> Tensor | None:
    """Move a bias to `target`, whose output is added to that of `source` anyway; without a target, return it."""
    bias, source.bias = source.bias.data, None
    if target is None:
        return bias
    target.bias.data += bias
    return None


def _resnet(
    self: Any, first: Any, second: Tensor | None, hidden_states: Tensor, temb: Tensor | None, *_: Any
) -> Tensor:
    """ResnetBlock2D's forward where norms include SiLU; `first` and `second` are biases that it has to add."""
    shortcut = hidden_states
    if self.conv_shortcut is not None:  # 1x1: a matmul, which adds the bias at no cost
        weight = self.conv_shortcut.weight.flatten(1)
        shortcut = F.linear(hidden_states.permute(0, 2, 3, 1), weight, self.conv_shortcut.bias).permute(0, 3, 1, 2)
    hidden_states = self.conv1(self.norm1(hidden_states))
    shift = first.repeat(len(hidden_states), 1) if temb is None else self.time_emb_proj(F.silu(temb))
    hidden_states = self.conv2(self.norm2(hidden_states, shift))
    return hidden_states + shortcut if second is None else kernels.AddWithBias.apply(hidden_states, shortcut, second)


def _upsample(self: Any, plain: Any, hidden_states: Tensor, output_size: Any = None, *_: Any) -> Tensor:
    """Upsample2D's forward, for drawing: each pixel four times, copied eight bytes at a time.

    Not for a side of one pixel: there, channels need not be adjacent in what PyTorch calls contiguous.
    """
    if torch.is_grad_enabled() or output_size is not None or 1 in hidden_states.shape[-2:]:
        return plain(hidden_states, output_size)
    bytes8 = hidden_states.permute(0, 2, 3, 1).contiguous().view(torch.int64)[:, :, None, :, None]
    doubled = bytes8.expand(-1, -1, 2, -1, 2, -1).flatten(3, 4).flatten(1, 2).view(hidden_states.dtype)
    return self.conv(doubled.permute(0, 3, 1, 2))


def _transformer(self: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> tuple[Tensor]:
    """Transformer2DModel's forward on channels-last pictures, where pixels are tokens without a copy."""
    height, width = hidden_states.shape[-2:]
    tokens, change = self.proj_in(self.norm(hidden_states).permute(0, 2, 3, 1).flatten(1, 2)), None
    for block in self.transformer_blocks:
        call = block
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            call = partial(self._gradient_checkpointing_func, block)
        tokens, change = call(tokens, change, encoder_hidden_states)
    tokens = self.proj_out(tokens + change)
    return (tokens.unflatten(1, (height, width)).permute(0, 3, 1, 2) + hidden_states,)


def _transformer_block(self: Any, tokens: Tensor, change: Tensor | None, text: Tensor) -> tuple[Tensor, Tensor]:
    """BasicTransformerBlock's forward, with each addition and the norm after it in one kernel.

    The last addition is left to the next block: the result is the sum of (tokens, change).
    """
    if change is None:
        normed = self.norm1(tokens)
    else:
        tokens, normed = kernels.AddLayerNorm.apply(tokens, change, self.norm1)
    tokens, normed = kernels.AddLayerNorm.apply(tokens, self.attn1(normed), self.norm2)
    tokens, normed = kernels.AddLayerNorm.apply(tokens, self.attn2(normed, encoder_hidden_states=text), self.norm3)
    return tokens, self.ff(normed)


def _geglu(self: Any, hidden_states: Tensor) -> Tensor:
    return kernels.Geglu.apply(self.proj(hidden_states))


def _group_norm(self: Any, silu: bool, pictures: Tensor, shift: Tensor | None = None) -> Tensor:
    return kernels.GroupNorm.apply(pictures, shift, self, silu)
