"""What PyTorch makes of a UNet in many passes, in one each, by Triton: GEGLU, norms with what stands around them.

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
from torch import Tensor, nn

_COLUMNS, _BLOCK = 1024, 1024
_CHUNKS = 16  # programs for each group of channels; each notes its sums, which the next kernel adds up


def use_kernels(model: UNet2DConditionModel | AutoencoderKL) -> None:
    """Let a frozen UNet or VAE on a GPU calculate by these, in channels-last layout: SDXL's, or one of its family.

    Its parameters may change: what is added anyway takes convolutions' biases along, since each is a pass of its own.
    """
    model.to(memory_format=torch.channels_last)
    for module in list(model.modules()):
        plain = isinstance(module, ResnetBlock2D) and _is_plain(module)
        for name, child in list(module.named_children()):
            if isinstance(child, GEGLU):
                setattr(module, name, _Geglu(child))
            elif isinstance(child, nn.GroupNorm) and not isinstance(module, Attention):  # where it is of rows
                setattr(module, name, _GroupNorm(child, silu=plain))
        if plain:
            if module.time_emb_proj is not None:
                _move_bias(module.conv1, module.time_emb_proj)
            if module.conv_shortcut is not None:
                _move_bias(module.conv2, module.conv_shortcut)
            module.forward = partial(_resnet, module)
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
    return not any(extras) and block.time_embedding_norm == "default" and block.output_scale_factor == 1


def _move_bias(source: Any, target: Any) -> None:
    target.bias.data += source.bias.data
    source.bias = None


def _resnet(self: Any, hidden_states: Tensor, temb: Tensor | None, *_: Any) -> Tensor:
    """ResnetBlock2D's forward, whose norms end in SiLU here; a VAE's knows no timestep."""
    shortcut = hidden_states
    if self.conv_shortcut is not None:  # 1x1: a product, which adds the bias as it goes
        weight = self.conv_shortcut.weight.flatten(1)
        shortcut = F.linear(hidden_states.permute(0, 2, 3, 1), weight, self.conv_shortcut.bias).permute(0, 3, 1, 2)
    hidden_states = self.conv1(self.norm1(hidden_states))
    shift = None if temb is None else self.time_emb_proj(F.silu(temb))
    hidden_states = self.norm2(hidden_states, shift)
    return self.conv2(hidden_states) + shortcut


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


class _GroupNorm(nn.Module):
    def __init__(self, norm: nn.GroupNorm, silu: bool) -> None:
        super().__init__()
        self.weight, self.bias, self.groups, self.eps, self.silu = (
            norm.weight, norm.bias, norm.num_groups, norm.eps, silu,
        )  # fmt: skip

    def forward(self, pictures: Tensor, shift: Tensor | None = None) -> Tensor:
        """Of (n, c, h, w), after adding a frozen (n, c)."""
        if pictures[0].numel() >= 2**31:  # the kernels count in 32 bits: a VAE's of eight megapixels and more
            pictures = pictures if shift is None else pictures + shift[..., None, None]
            normed = F.group_norm(pictures, self.groups, self.weight, self.bias, self.eps)
            return F.silu(normed) if self.silu else normed
        return _GroupNormFunction.apply(pictures, shift, self)


class _GroupNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pictures: Tensor, shift: Tensor | None, norm: _GroupNorm) -> Tensor:
        pictures = pictures.contiguous(memory_format=torch.channels_last)
        count, channels, height, width = pictures.shape
        sums = pictures.new_empty(count * norm.groups, _CHUNKS, 2, dtype=torch.float32)
        out = torch.empty_like(pictures)
        grid, sizes = (_CHUNKS, count * norm.groups), (height * width, channels, norm.groups)
        _moments[grid](pictures, shift, sums, *sizes, CHUNKS=_CHUNKS, BLOCK=_BLOCK)
        _normalize[grid](
            pictures, shift, sums, norm.weight, norm.bias, out, *sizes, norm.eps,
            SILU=norm.silu, CHUNKS=_CHUNKS, BLOCK=_BLOCK,
        )  # fmt: skip
        ctx.save_for_backward(pictures, shift, sums)
        ctx.norm, ctx.grid, ctx.sizes = norm, grid, sizes
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (pictures, shift, sums), norm = ctx.saved_tensors, ctx.norm
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        back_sums, of_pictures = torch.empty_like(sums), torch.empty_like(pictures)
        inputs, options = (pictures, shift, sums, norm.weight, norm.bias, gradient, back_sums), {
            "SILU": norm.silu, "CHUNKS": _CHUNKS, "BLOCK": _BLOCK,
        }  # fmt: skip
        _back_moments[ctx.grid](*inputs, *ctx.sizes, norm.eps, **options)
        _back_normalize[ctx.grid](*inputs, of_pictures, *ctx.sizes, norm.eps, **options)
        return of_pictures, None, None


_SIZES = ("pixels", "channels", "groups")


@triton.jit
def _part(pixels, channels, groups, CHUNKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """This program's part of the elements of its group of channels in its picture, and where they begin."""
    chunk, row = tl.program_id(0), tl.program_id(1)
    picture, group = (row // groups).to(tl.int64), row % groups
    width = channels // groups
    length = tl.cdiv(pixels * width, CHUNKS)
    first = chunk * length
    return row, group * width, picture * pixels * channels, width, first, tl.minimum(first + length, pixels * width)


@triton.jit
def _load(x, shift, base, pixels, own, place, inside):  # type: ignore[no-untyped-def]
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if shift is not None:
        value += tl.load(shift + base // pixels + own, mask=inside, other=0.0)
    return value


@triton.jit
def _total(sums, row, which: tl.constexpr, CHUNKS: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.sum(tl.load(sums + (row * CHUNKS + tl.arange(0, CHUNKS)) * 2 + which))


@triton.jit
def _mean_and_rstd(sums, row, count, eps, CHUNKS: tl.constexpr):  # type: ignore[no-untyped-def]
    mean = _total(sums, row, 0, CHUNKS) / count
    variance = _total(sums, row, 1, CHUNKS) / count - mean * mean
    return mean, 1 / tl.sqrt(tl.maximum(variance, 0.0) + eps)


@triton.jit(do_not_specialize=_SIZES)
def _moments(  # type: ignore[no-untyped-def]
    x, shift, sums, pixels, channels, groups, CHUNKS: tl.constexpr, BLOCK: tl.constexpr
):
    row, channel, base, width, first, last = _part(pixels, channels, groups, CHUNKS)
    total = tl.zeros([BLOCK], tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    for begin in range(first, last, BLOCK):
        index = begin + tl.arange(0, BLOCK)
        inside, own = index < last, channel + index % width
        place = base + index // width * channels + own
        value = _load(x, shift, base, pixels, own, place, inside)
        total += value
        squares += value * value
    note = sums + (row * CHUNKS + tl.program_id(0)) * 2
    tl.store(note, tl.sum(total))
    tl.store(note + 1, tl.sum(squares))


@triton.jit(do_not_specialize=_SIZES)
def _normalize(  # type: ignore[no-untyped-def]
    x, shift, sums, weight, bias, out, pixels, channels, groups, eps,
    SILU: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, channel, base, width, first, last = _part(pixels, channels, groups, CHUNKS)
    mean, rstd = _mean_and_rstd(sums, row, pixels * width, eps, CHUNKS)
    for begin in range(first, last, BLOCK):
        index = begin + tl.arange(0, BLOCK)
        inside, own = index < last, channel + index % width
        place = base + index // width * channels + own
        value = (_load(x, shift, base, pixels, own, place, inside) - mean) * rstd
        value = value * tl.load(weight + own, mask=inside, other=0.0) + tl.load(bias + own, mask=inside, other=0.0)
        if SILU:
            value *= tl.sigmoid(value)
        tl.store(out + place, value, mask=inside)


@triton.jit
def _back(value, gradient, weight, bias, place, own, inside, SILU: tl.constexpr):  # type: ignore[no-untyped-def]
    """The gradient of a normalized value."""
    scale = tl.load(weight + own, mask=inside, other=0.0).to(tl.float32)
    upstream = tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32)
    if SILU:
        before = value * scale + tl.load(bias + own, mask=inside, other=0.0)
        share = tl.sigmoid(before)
        upstream *= share * (1 + before * (1 - share))
    return upstream * scale


@triton.jit(do_not_specialize=_SIZES)
def _back_moments(  # type: ignore[no-untyped-def]
    x, shift, sums, weight, bias, gradient, back_sums, pixels, channels, groups, eps,
    SILU: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, channel, base, width, first, last = _part(pixels, channels, groups, CHUNKS)
    mean, rstd = _mean_and_rstd(sums, row, pixels * width, eps, CHUNKS)
    total = tl.zeros([BLOCK], tl.float32)
    products = tl.zeros([BLOCK], tl.float32)
    for begin in range(first, last, BLOCK):
        index = begin + tl.arange(0, BLOCK)
        inside, own = index < last, channel + index % width
        place = base + index // width * channels + own
        value = (_load(x, shift, base, pixels, own, place, inside) - mean) * rstd
        slope = _back(value, gradient, weight, bias, place, own, inside, SILU)
        total += slope
        products += tl.where(inside, slope * value, 0.0)
    note = back_sums + (row * CHUNKS + tl.program_id(0)) * 2
    tl.store(note, tl.sum(total))
    tl.store(note + 1, tl.sum(products))


@triton.jit(do_not_specialize=_SIZES)
def _back_normalize(  # type: ignore[no-untyped-def]
    x, shift, sums, weight, bias, gradient, back_sums, of_x, pixels, channels, groups, eps,
    SILU: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, channel, base, width, first, last = _part(pixels, channels, groups, CHUNKS)
    count = pixels * width
    mean, rstd = _mean_and_rstd(sums, row, count, eps, CHUNKS)
    mean_slope = _total(back_sums, row, 0, CHUNKS) / count
    mean_product = _total(back_sums, row, 1, CHUNKS) / count
    for begin in range(first, last, BLOCK):
        index = begin + tl.arange(0, BLOCK)
        inside, own = index < last, channel + index % width
        place = base + index // width * channels + own
        value = (_load(x, shift, base, pixels, own, place, inside) - mean) * rstd
        slope = _back(value, gradient, weight, bias, place, own, inside, SILU)
        tl.store(of_x + place, rstd * (slope - mean_slope - value * mean_product), mask=inside)
