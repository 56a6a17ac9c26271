"""Triton kernels that do in one pass what takes PyTorch several: norms fused with their neighbours, GEGLU, additions.

At 512² the passes are so short that launching them takes as long as they do; at 1024² it is memory traffic that counts.
Convolutions on tensor cores want channels-last pictures, but PyTorch's group norm and diffusers' transformer do not
keep that layout: without these kernels, and `patching.py`, every step copies pictures, and the weights of all
convolutions, from one layout into the other and back.

All of them compute in fp32 and store in the dtype of their inputs.
"""

# mypy: disallow-untyped-defs=False
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

_BLOCK = 1024  # elements of a program
_TILE = {"PIXELS": 128, "CHANNELS": 64}  # of a program of the group norm


class AddLayerNorm(torch.autograd.Function):
    """The sum of (…, c) and (…, c), and its layer norm."""

    @staticmethod
    def forward(ctx: Any, one: Tensor, other: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
        one, other = one.contiguous(), other.contiguous()
        width = one.shape[-1]
        total, normed = torch.empty_like(one), torch.empty_like(one)
        statistics = one.new_empty(one.numel() // width, 2, dtype=torch.float32)
        tensors = one, other, norm.weight, norm.bias, total, normed, statistics
        _add_layer_norm[(len(statistics),)](*tensors, width, norm.eps, BLOCK=triton.next_power_of_2(width))
        ctx.save_for_backward(total, statistics)
        ctx.weight = norm.weight
        return total, normed

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, grad_normed: Tensor) -> tuple[Tensor, Tensor, None]:
        total, statistics = ctx.saved_tensors
        width, grad_input = total.shape[-1], torch.empty_like(total)
        tensors = total, ctx.weight, statistics, grad_total.contiguous(), grad_normed.contiguous(), grad_input
        _add_layer_norm_backward[(len(statistics),)](*tensors, width, BLOCK=triton.next_power_of_2(width))
        return grad_input, grad_input, None


@triton.jit
def _add_layer_norm(one, other, weight, bias, total, normed, statistics, width, eps, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    mask, offset = column < width, row * width + column
    value = tl.load(one + offset, mask=mask, other=0.0).to(tl.float32)
    value += tl.load(other + offset, mask=mask, other=0.0).to(tl.float32)
    value = value.to(total.dtype.element_ty)
    tl.store(total + offset, value, mask=mask)
    value = value.to(tl.float32)
    mean = tl.sum(value) / width
    centred = tl.where(mask, value - mean, 0.0)
    rstd = 1 / tl.sqrt(tl.sum(centred * centred) / width + eps)
    scale = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(normed + offset, centred * rstd * scale + shift, mask=mask)
    tl.store(statistics + row * 2, mean)
    tl.store(statistics + row * 2 + 1, rstd)


@triton.jit
def _add_layer_norm_backward(
    total, weight, statistics, grad_total, grad_normed, grad_input, width, BLOCK: tl.constexpr
):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    mask, offset = column < width, row * width + column
    mean, rstd = tl.load(statistics + row * 2), tl.load(statistics + row * 2 + 1)
    value = (tl.load(total + offset, mask=mask, other=0.0).to(tl.float32) - mean) * rstd
    value = tl.where(mask, value, 0.0)
    grad = tl.load(grad_normed + offset, mask=mask, other=0.0).to(tl.float32)
    grad *= tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    through_norm = rstd * (grad - tl.sum(grad) / width - value * (tl.sum(grad * value) / width))
    direct = tl.load(grad_total + offset, mask=mask, other=0.0).to(tl.float32)
    tl.store(grad_input + offset, direct + through_norm, mask=mask)


class Geglu(torch.autograd.Function):
    """hidden * gelu(gate) of (…, [hidden, gate])."""

    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        ctx.save_for_backward(both)
        width = both.shape[-1] // 2
        out = both.new_empty(*both.shape[:-1], width)
        _geglu[both.numel() // (2 * width), triton.cdiv(width, _BLOCK)](both, out, width, BLOCK=_BLOCK)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Tensor:
        [both] = ctx.saved_tensors
        width, grad_both = both.shape[-1] // 2, torch.empty_like(both)
        grid = both.numel() // (2 * width), triton.cdiv(width, _BLOCK)
        _geglu_backward[grid](both, grad_out.contiguous(), grad_both, width, BLOCK=_BLOCK)
        return grad_both


@triton.jit
def _halves(both, width, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    offset = row * 2 * width + column
    hidden = tl.load(both + offset, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(both + offset + width, mask=mask, other=0.0).to(tl.float32)
    return hidden, gate, 0.5 * (1 + tl.math.erf(gate * 0.7071067811865476)), offset, row * width + column, mask


@triton.jit
def _geglu(both, out, width, BLOCK: tl.constexpr):
    hidden, gate, cdf, _, offset, mask = _halves(both, width, BLOCK)
    tl.store(out + offset, hidden * gate * cdf, mask=mask)


@triton.jit
def _geglu_backward(both, grad_out, grad_both, width, BLOCK: tl.constexpr):
    hidden, gate, cdf, offset, out_offset, mask = _halves(both, width, BLOCK)
    grad = tl.load(grad_out + out_offset, mask=mask, other=0.0).to(tl.float32)
    derivative = cdf + gate * 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    tl.store(grad_both + offset, grad * gate * cdf, mask=mask)
    tl.store(grad_both + offset + width, grad * hidden * derivative, mask=mask)


class AddWithBias(torch.autograd.Function):
    """The sum of two channels-last (n, c, h, w) and a frozen (c,)."""

    @staticmethod
    def forward(_: Any, one: Tensor, other: Tensor, bias: Tensor) -> Tensor:
        one, other = (value.contiguous(memory_format=torch.channels_last) for value in (one, other))
        out = torch.empty_like(one)
        _add_with_bias[(triton.cdiv(one.numel(), _BLOCK),)](one, other, bias, out, one.numel(), len(bias), BLOCK=_BLOCK)
        return out

    @staticmethod
    def backward(_: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad_out, grad_out, None


@triton.jit
def _add_with_bias(one, other, bias, out, size, channels, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < size
    value = tl.load(one + index, mask=mask, other=0.0).to(tl.float32)
    value += tl.load(other + index, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + index, value + tl.load(bias + index % channels).to(tl.float32), mask=mask)


class GroupNorm(torch.autograd.Function):
    """The group norm of channels-last (n, c, h, w), after adding a frozen (n, c) and, with `silu`, before SiLU.

    Statistics first: sums of each tile, which are added up for each group. Then all elements are normalized.
    """

    @staticmethod
    def forward(ctx: Any, pictures: Tensor, shift: Tensor | None, norm: nn.GroupNorm, silu: bool) -> Tensor:
        pictures = pictures.contiguous(memory_format=torch.channels_last)
        count, channels, height, width = pictures.shape
        sizes = height * width, channels, norm.num_groups
        tiles = triton.cdiv(height * width, _TILE["PIXELS"])
        grid = tiles, triton.cdiv(channels, _TILE["CHANNELS"]), count
        partials = pictures.new_empty(count, channels, tiles, 2, dtype=torch.float32)
        out = torch.empty_like(pictures)
        _moments[grid](pictures, shift, partials, *sizes, **_TILE)
        sums = _sum_partials(partials, norm.num_groups)
        _normalize[grid](pictures, shift, sums, norm.weight, norm.bias, out, *sizes, norm.eps, SILU=silu, **_TILE)
        ctx.save_for_backward(pictures, shift, sums)
        ctx.norm, ctx.silu, ctx.grid, ctx.sizes = norm, silu, grid, sizes
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None, None, None]:
        (pictures, shift, sums), norm, sizes = ctx.saved_tensors, ctx.norm, ctx.sizes
        grad_out = grad_out.contiguous(memory_format=torch.channels_last)
        partials = sums.new_empty(len(pictures), pictures.shape[1], ctx.grid[0], 2)
        grad_pictures = torch.empty_like(pictures)
        inputs, options = (pictures, shift, sums, norm.weight, norm.bias, grad_out), {"SILU": ctx.silu} | _TILE
        _backward_moments[ctx.grid](*inputs, partials, *sizes, norm.eps, **options)
        grad_sums = _sum_partials(partials, norm.num_groups)
        _backward_normalize[ctx.grid](*inputs, grad_sums, grad_pictures, *sizes, norm.eps, **options)
        return grad_pictures, None, None, None


def _sum_partials(partials: Tensor, groups: int) -> Tensor:
    """Pairs of (n, channels, tiles, 2) to sums of each group, (n, groups, 2)."""
    count, channels, tiles, _ = partials.shape
    sums = partials.new_empty(count, groups, 2)
    _sum_pairs[(count * groups,)](partials, sums, channels // groups * tiles, BLOCK=_BLOCK)
    return sums


@triton.jit(do_not_specialize=["pairs"])
def _sum_pairs(partials, sums, pairs, BLOCK: tl.constexpr):
    group = tl.program_id(0).to(tl.int64)
    one = tl.zeros([BLOCK], tl.float32)
    other = tl.zeros([BLOCK], tl.float32)
    for start in range(0, pairs, BLOCK):
        index = start + tl.arange(0, BLOCK)
        pair = partials + (group * pairs + index) * 2
        one += tl.load(pair, mask=index < pairs, other=0.0)
        other += tl.load(pair + 1, mask=index < pairs, other=0.0)
    tl.store(sums + group * 2, tl.sum(one))
    tl.store(sums + group * 2 + 1, tl.sum(other))


@triton.jit
def _tile(pixels, channels, groups, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """Of this program: channels and their mask, rows and groups of them, offsets (pixels, channels) and their mask."""
    picture = tl.program_id(2).to(tl.int64)
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    channel_mask = channel < channels
    offset = (picture * pixels + pixel[:, None]) * channels + channel[None, :]
    row = picture * channels + channel  # of (n, channels)
    group = picture * groups + channel // (channels // groups)
    return channel, channel_mask, row, group, offset, (pixel < pixels)[:, None] & channel_mask[None, :]


@triton.jit
def _load(x, shift, row, channel_mask, offset, mask):
    value = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
    if shift is not None:
        value += tl.load(shift + row, mask=channel_mask, other=0.0).to(tl.float32)[None, :]
    return tl.where(mask, value, 0.0)


@triton.jit
def _store_partials(partials, row, channel_mask, one, other):
    """The sums of a tile's columns, where `_sum_pairs` reads them."""
    pair = partials + (row * tl.num_programs(0) + tl.program_id(0)) * 2
    tl.store(pair, tl.sum(one, axis=0), mask=channel_mask)
    tl.store(pair + 1, tl.sum(other, axis=0), mask=channel_mask)


@triton.jit
def _mean_and_rstd(sums, group, channel_mask, size, eps):
    """Of each channel's group, as rows."""
    mean = tl.load(sums + group * 2, mask=channel_mask, other=0.0) / size
    variance = tl.load(sums + group * 2 + 1, mask=channel_mask, other=0.0) / size - mean * mean
    return mean[None, :], (1 / tl.sqrt(tl.maximum(variance, 0.0) + eps))[None, :]


@triton.jit(do_not_specialize=["pixels"])
def _moments(x, shift, partials, pixels, channels, groups, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    _, channel_mask, row, _, offset, mask = _tile(pixels, channels, groups, PIXELS, CHANNELS)
    value = _load(x, shift, row, channel_mask, offset, mask)
    _store_partials(partials, row, channel_mask, value, value * value)


@triton.jit(do_not_specialize=["pixels"])
def _normalize(
    x, shift, sums, weight, bias, out, pixels, channels, groups, eps,
    SILU: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    channel, channel_mask, row, group, offset, mask = _tile(pixels, channels, groups, PIXELS, CHANNELS)
    mean, rstd = _mean_and_rstd(sums, group, channel_mask, pixels * (channels // groups), eps)
    value = (_load(x, shift, row, channel_mask, offset, mask) - mean) * rstd
    value = value * _load_channels(weight, channel, channel_mask) + _load_channels(bias, channel, channel_mask)
    if SILU:
        value *= tl.sigmoid(value)
    tl.store(out + offset, value, mask=mask)


@triton.jit
def _load_channels(values, channel, channel_mask):
    return tl.load(values + channel, mask=channel_mask, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _grad_normalized(value, grad_out, weight, bias, channel, channel_mask, offset, mask, SILU: tl.constexpr):
    """The gradient of a normalized value."""
    scale = _load_channels(weight, channel, channel_mask)
    grad = tl.load(grad_out + offset, mask=mask, other=0.0).to(tl.float32)
    if SILU:
        before = value * scale + _load_channels(bias, channel, channel_mask)
        sigmoid = tl.sigmoid(before)
        grad *= sigmoid * (1 + before * (1 - sigmoid))
    return grad * scale


@triton.jit(do_not_specialize=["pixels"])
def _backward_moments(
    x, shift, sums, weight, bias, grad_out, partials, pixels, channels, groups, eps,
    SILU: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    channel, channel_mask, row, group, offset, mask = _tile(pixels, channels, groups, PIXELS, CHANNELS)
    mean, rstd = _mean_and_rstd(sums, group, channel_mask, pixels * (channels // groups), eps)
    value = (_load(x, shift, row, channel_mask, offset, mask) - mean) * rstd
    grad = _grad_normalized(value, grad_out, weight, bias, channel, channel_mask, offset, mask, SILU)
    _store_partials(partials, row, channel_mask, grad, grad * value)


@triton.jit(do_not_specialize=["pixels"])
def _backward_normalize(
    x, shift, sums, weight, bias, grad_out, grad_sums, grad_x, pixels, channels, groups, eps,
    SILU: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    channel, channel_mask, row, group, offset, mask = _tile(pixels, channels, groups, PIXELS, CHANNELS)
    size = pixels * (channels // groups)
    mean, rstd = _mean_and_rstd(sums, group, channel_mask, size, eps)
    mean_grad = tl.load(grad_sums + group * 2, mask=channel_mask, other=0.0)[None, :] / size
    mean_grad_value = tl.load(grad_sums + group * 2 + 1, mask=channel_mask, other=0.0)[None, :] / size
    value = (_load(x, shift, row, channel_mask, offset, mask) - mean) * rstd
    grad = _grad_normalized(value, grad_out, weight, bias, channel, channel_mask, offset, mask, SILU)
    tl.store(grad_x + offset, rstd * (grad - mean_grad - value * mean_grad_value), mask=mask)
