"""What PyTorch makes of a UNet in many passes, in one each, by Triton: GEGLU, norms with what stands around them.

The group norm is `group_norm.py`'s.

At 512² the passes are so short that launching them takes as long as they do; at 1024² it is memory traffic that counts.
Convolutions on tensor cores want channels-last pictures, but PyTorch's group norm and diffusers' transformer do not
keep them: without what follows, every step copies pictures, and the weights of all convolutions, from one layout into
the other and back.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from group_norm import GroupNorm

_COLUMNS, _BLOCK = 1024, 1024


def use_kernels(model: UNet2DConditionModel | AutoencoderKL) -> None:
    """Let a frozen UNet or VAE on a GPU calculate by these, in channels-last layout: SDXL's, or one of its family.

    Its parameters may change: what is added anyway takes convolutions' biases along, since each is a pass of its own.
    From then on the model must stay where it is, in its number format.
    """
    model.to(memory_format=torch.channels_last)
    for module in list(model.modules()):
        plain = isinstance(module, ResnetBlock2D) and _is_plain(module)
        for name, child in list(module.named_children()):
            if isinstance(child, GEGLU):
                setattr(module, name, _Geglu(child))
            elif isinstance(child, nn.GroupNorm) and not isinstance(module, Attention):  # where it is of rows
                setattr(module, name, GroupNorm(child, silu=plain))
        if plain:
            first = _move_bias(module.conv1, module.time_emb_proj)
            second = _move_bias(module.conv2, module.conv_shortcut)
            module.forward = partial(_resnet, module, first, second)
        if isinstance(module, Upsample2D) and _only_doubles(module):
            module.forward = partial(_upsample, module, module.forward)
        if isinstance(module, Transformer2DModel) and module.use_linear_projection:
            module.forward = partial(_transformer, module)
        if isinstance(module, BasicTransformerBlock) and module.norm_type == "layer_norm":
            module.forward = partial(_transformer_block, module)


def try_out(device: torch.device, dtype: torch.dtype) -> None:
    """Build and run one of the kernels.

    Raises:
        OSError, RuntimeError, CalledProcessError: Triton finds no C compiler or no Python.h, or cannot keep its files.
    """
    _GegluFunction.apply(torch.zeros(1, 2 * _COLUMNS, device=device, dtype=dtype))


def _is_plain(block: Any) -> bool:
    extras = (block.upsample, block.downsample, block.dropout.p)
    # "group" is what a VAE's decoder calls a norm that knows no timestep.
    return not any(extras) and block.time_embedding_norm in ("default", "group") and block.output_scale_factor == 1


def _only_doubles(module: Any) -> bool:
    plain = module.use_conv and module.interpolate and not module.use_conv_transpose and module.norm is None
    return plain and module.name == "conv" and module.channels % 4 == 0


def _move_bias(source: Any, target: Any) -> Tensor | None:
    """Take a bias away from `source`: to `target`, whose output is added anyway, or to the caller if that is None."""
    bias, source.bias = source.bias.data, None
    if target is None:
        return bias
    target.bias.data += bias
    return None


def _resnet(
    self: Any, first: Any, second: Tensor | None, hidden_states: Tensor, temb: Tensor | None, *_: Any
) -> Tensor:
    """ResnetBlock2D's forward, whose norms end in SiLU here; `first` and `second` are biases that it has to add."""
    shortcut = hidden_states
    if self.conv_shortcut is not None:  # 1x1: a product, which adds the bias as it goes
        weight = self.conv_shortcut.weight.flatten(1)
        shortcut = F.linear(hidden_states.permute(0, 2, 3, 1), weight, self.conv_shortcut.bias).permute(0, 3, 1, 2)
    hidden_states = self.conv1(self.norm1(hidden_states))
    shift = first.repeat(len(hidden_states), 1) if temb is None else self.time_emb_proj(F.silu(temb))
    hidden_states = self.conv2(self.norm2(hidden_states, shift))
    return hidden_states + shortcut if second is None else _AddBiased.apply(hidden_states, shortcut, second)


def _upsample(self: Any, plain: Any, hidden_states: Tensor, output_size: Any = None, *_: Any) -> Tensor:
    """Upsample2D's forward, for drawing: each pixel four times, copied by eight bytes at once.

    Where a side is of one pixel, its channels need not be side by side in what PyTorch calls contiguous.
    """
    if torch.is_grad_enabled() or output_size is not None or 1 in hidden_states.shape[-2:]:
        return plain(hidden_states, output_size)
    bytes8 = hidden_states.permute(0, 2, 3, 1).contiguous().view(torch.int64)[:, :, None, :, None]
    doubled = bytes8.expand(-1, -1, 2, -1, 2, -1).flatten(3, 4).flatten(1, 2).view(hidden_states.dtype)
    return self.conv(doubled.permute(0, 3, 1, 2))


def _transformer(self: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> tuple[Tensor]:
    """Transformer2DModel's forward on channels-last pictures, whose pixels are tokens already."""
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
    """BasicTransformerBlock's forward, with each addition and the norm after it as one.

    What a block adds at its end is left to the next one: (tokens, change) are to be summed.
    """
    if change is None:
        normed = self.norm1(tokens)
    else:
        tokens, normed = _AddNorm.apply(tokens, change, self.norm1)
    tokens, normed = _AddNorm.apply(tokens, self.attn1(normed), self.norm2)
    tokens, normed = _AddNorm.apply(tokens, self.attn2(normed, encoder_hidden_states=text), self.norm3)
    return tokens, self.ff(normed)


class _AddNorm(torch.autograd.Function):
    """The sum of (…, c) and (…, c), and its layer norm."""

    @staticmethod
    def forward(ctx: Any, one: Tensor, other: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
        one, other = one.contiguous(), other.contiguous()
        width = one.shape[-1]
        total, normed = torch.empty_like(one), torch.empty_like(one)
        statistics = one.new_empty(one.numel() // width, 2, dtype=torch.float32)
        _add_norm[(len(statistics),)](
            one, other, norm.weight, norm.bias, total, normed, statistics, width, norm.eps,
            BLOCK=triton.next_power_of_2(width),
        )  # fmt: skip
        ctx.save_for_backward(total, statistics)
        ctx.weight = norm.weight
        return total, normed

    @staticmethod
    def backward(ctx: Any, of_total: Tensor, of_normed: Tensor) -> tuple[Tensor, Tensor, None]:
        total, statistics = ctx.saved_tensors
        width, gradient = total.shape[-1], torch.empty_like(total)
        _add_norm_backward[(len(statistics),)](
            total, ctx.weight, statistics, of_total.contiguous(), of_normed.contiguous(), gradient, width,
            BLOCK=triton.next_power_of_2(width),
        )  # fmt: skip
        return gradient, gradient, None


@triton.jit
def _add_norm(one, other, weight, bias, total, normed, statistics, width, eps, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside, place = column < width, row * width + column
    value = tl.load(one + place, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(other + place, mask=inside, other=0.0).to(tl.float32)
    value = value.to(total.dtype.element_ty)
    tl.store(total + place, value, mask=inside)
    value = value.to(tl.float32)
    mean = tl.sum(value) / width
    centred = tl.where(inside, value - mean, 0.0)
    rstd = 1 / tl.sqrt(tl.sum(centred * centred) / width + eps)
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + place, centred * rstd * scale + shift, mask=inside)
    tl.store(statistics + row * 2, mean)
    tl.store(statistics + row * 2 + 1, rstd)


@triton.jit
def _add_norm_backward(  # type: ignore[no-untyped-def]
    total, weight, statistics, of_total, of_normed, gradient, width, BLOCK: tl.constexpr
):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside, place = column < width, row * width + column
    mean, rstd = tl.load(statistics + row * 2), tl.load(statistics + row * 2 + 1)
    value = (tl.load(total + place, mask=inside, other=0.0).to(tl.float32) - mean) * rstd
    value = tl.where(inside, value, 0.0)
    slope = tl.load(of_normed + place, mask=inside, other=0.0).to(tl.float32)
    slope *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    through = rstd * (slope - tl.sum(slope) / width - value * (tl.sum(slope * value) / width))
    tl.store(gradient + place, tl.load(of_total + place, mask=inside, other=0.0).to(tl.float32) + through, mask=inside)


class _Geglu(nn.Module):
    def __init__(self, module: GEGLU) -> None:
        super().__init__()
        self.proj = module.proj

    def forward(self, hidden_states: Tensor) -> Tensor:
        return _GegluFunction.apply(self.proj(hidden_states))


class _GegluFunction(torch.autograd.Function):
    """hidden * gelu(gate) of (…, [hidden, gate])."""

    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        ctx.save_for_backward(both)
        width = both.shape[-1] // 2
        out = both.new_empty(*both.shape[:-1], width)
        _geglu[both.numel() // (2 * width), triton.cdiv(width, _COLUMNS)](both, out, width, BLOCK=_COLUMNS)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        [both] = ctx.saved_tensors
        width, of_both = both.shape[-1] // 2, torch.empty_like(both)
        grid = both.numel() // (2 * width), triton.cdiv(width, _COLUMNS)
        _geglu_backward[grid](both, gradient.contiguous(), of_both, width, BLOCK=_COLUMNS)
        return of_both


@triton.jit
def _halves(both, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    place = row * 2 * width + column
    hidden = tl.load(both + place, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(both + place + width, mask=inside, other=0.0).to(tl.float32)
    return hidden, gate, 0.5 * (1 + tl.math.erf(gate * 0.7071067811865476)), place, row * width + column, inside


@triton.jit
def _geglu(both, out, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    hidden, gate, share, _, place, inside = _halves(both, width, BLOCK)
    tl.store(out + place, hidden * gate * share, mask=inside)


@triton.jit
def _geglu_backward(both, gradient, of_both, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    hidden, gate, share, place, out_place, inside = _halves(both, width, BLOCK)
    upstream = tl.load(gradient + out_place, mask=inside, other=0.0).to(tl.float32)
    slope = share + gate * 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    tl.store(of_both + place, upstream * gate * share, mask=inside)
    tl.store(of_both + place + width, upstream * hidden * slope, mask=inside)


class _AddBiased(torch.autograd.Function):
    """The sum of two channels-last (n, c, h, w) and a frozen (c,)."""

    @staticmethod
    def forward(_: Any, one: Tensor, other: Tensor, bias: Tensor) -> Tensor:
        one, other = (value.contiguous(memory_format=torch.channels_last) for value in (one, other))
        out = torch.empty_like(one)
        _add_biased[(triton.cdiv(one.numel(), _BLOCK),)](one, other, bias, out, one.numel(), len(bias), BLOCK=_BLOCK)
        return out

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        return gradient, gradient, None


@triton.jit
def _add_biased(one, other, bias, out, size, channels, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    value = tl.load(one + index, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(other + index, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + index, value + tl.load(bias + index % channels).to(tl.float32), mask=inside)
