"""What PyTorch makes of a UNet in many passes, in one each, by Triton: GEGLU, norms with what stands around them.

The group norm is `group_norm.py`'s.

At 512² the passes are so short that launching them takes as long as they do; at 1024² it is memory traffic that counts.
Convolutions on tensor cores want channels-last pictures, but PyTorch's group norm and diffusers' transformer do not
keep them: without what follows, every step copies pictures, and the weights of all convolutions, from one layout into
the other and back.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

_COLUMNS, _BLOCK = 1024, 1024


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


_BLOCK = 1024

_TILE = {"PIXELS": 128, "CHANNELS": 64}  # of a program


class GroupNorm(nn.Module):
    def __init__(self, norm: nn.GroupNorm, silu: bool) -> None:
        super().__init__()
        self.weight, self.bias, self.groups, self.eps, self.silu = (
            norm.weight, norm.bias, norm.num_groups, norm.eps, silu,
        )  # fmt: skip

    def forward(self, pictures: Tensor, shift: Tensor | None = None) -> Tensor:
        """Of (n, c, h, w), after adding a frozen (n, c)."""
        return _GroupNormFunction.apply(pictures, shift, self)


class _GroupNormFunction(torch.autograd.Function):
    """Statistics first, as sums of each tile, which are added up for each group; then all elements are normalized."""

    @staticmethod
    def forward(ctx: Any, pictures: Tensor, shift: Tensor | None, norm: GroupNorm) -> Tensor:
        pictures = pictures.contiguous(memory_format=torch.channels_last)
        count, channels, height, width = pictures.shape
        sizes = height * width, channels, norm.groups
        tiles = triton.cdiv(height * width, _TILE["PIXELS"])
        grid = tiles, triton.cdiv(channels, _TILE["CHANNELS"]), count
        notes = pictures.new_empty(count, channels, tiles, 2, dtype=torch.float32)
        out = torch.empty_like(pictures)
        _moments[grid](pictures, shift, notes, *sizes, **_TILE)
        sums = _added_up(notes, norm.groups)
        _normalize[grid](pictures, shift, sums, norm.weight, norm.bias, out, *sizes, norm.eps, SILU=norm.silu, **_TILE)
        ctx.save_for_backward(pictures, shift, sums)
        ctx.norm, ctx.grid, ctx.sizes = norm, grid, sizes
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (pictures, shift, sums), norm, sizes = ctx.saved_tensors, ctx.norm, ctx.sizes
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        notes = sums.new_empty(len(pictures), pictures.shape[1], ctx.grid[0], 2)
        of_pictures = torch.empty_like(pictures)
        inputs, options = (pictures, shift, sums, norm.weight, norm.bias, gradient), {"SILU": norm.silu} | _TILE
        _back_moments[ctx.grid](*inputs, notes, *sizes, norm.eps, **options)
        back_sums = _added_up(notes, norm.groups)
        _back_normalize[ctx.grid](*inputs, back_sums, of_pictures, *sizes, norm.eps, **options)
        return of_pictures, None, None


def _added_up(notes: Tensor, groups: int) -> Tensor:
    """Pairs of (n, channels, tiles, 2) to sums of each group, (n, groups, 2)."""
    count, channels, tiles, _ = notes.shape
    sums = notes.new_empty(count, groups, 2)
    _add_up[(count * groups,)](notes, sums, channels // groups * tiles, BLOCK=_BLOCK)
    return sums


@triton.jit(do_not_specialize=["pairs"])
def _add_up(notes, sums, pairs, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    group = tl.program_id(0).to(tl.int64)
    one = tl.zeros([BLOCK], tl.float32)
    other = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, pairs, BLOCK):
        index = begin + tl.arange(0, BLOCK)
        place = notes + (group * pairs + index) * 2
        one += tl.load(place, mask=index < pairs, other=0.0)
        other += tl.load(place + 1, mask=index < pairs, other=0.0)
    tl.store(sums + group * 2, tl.sum(one))
    tl.store(sums + group * 2 + 1, tl.sum(other))


@triton.jit
def _tile(pixels, channels, groups, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):  # type: ignore[no-untyped-def]
    """This program's channels, the groups they are in, and where its elements (pixels, channels) and its notes are."""
    picture = tl.program_id(2).to(tl.int64)
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    real = channel < channels
    place = (picture * pixels + pixel[:, None]) * channels + channel[None, :]
    row = picture * channels + channel  # of (n, channels)
    group = picture * groups + channel // (channels // groups)
    return channel, real, row, group, place, (pixel < pixels)[:, None] & real[None, :]


@triton.jit
def _load(x, shift, row, real, place, inside):  # type: ignore[no-untyped-def]
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if shift is not None:
        value += tl.load(shift + row, mask=real, other=0.0).to(tl.float32)[None, :]
    return tl.where(inside, value, 0.0)


@triton.jit
def _note(notes, row, real, one, other):  # type: ignore[no-untyped-def]
    """The sums of a tile's columns, where `_add_up` reads them."""
    place = notes + (row * tl.num_programs(0) + tl.program_id(0)) * 2
    tl.store(place, tl.sum(one, axis=0), mask=real)
    tl.store(place + 1, tl.sum(other, axis=0), mask=real)


@triton.jit
def _mean_and_rstd(sums, group, real, size, eps):  # type: ignore[no-untyped-def]
    """Of each channel's group, as rows."""
    mean = tl.load(sums + group * 2, mask=real, other=0.0) / size
    variance = tl.load(sums + group * 2 + 1, mask=real, other=0.0) / size - mean * mean
    return mean[None, :], (1 / tl.sqrt(tl.maximum(variance, 0.0) + eps))[None, :]


@triton.jit(do_not_specialize=["pixels"])
def _moments(x, shift, notes, pixels, channels, groups, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):  # type: ignore[no-untyped-def]
    _, real, row, _, place, inside = _tile(pixels, channels, groups, PIXELS, CHANNELS)
    value = _load(x, shift, row, real, place, inside)
    _note(notes, row, real, value, value * value)


@triton.jit(do_not_specialize=["pixels"])
def _normalize(  # type: ignore[no-untyped-def]
    x, shift, sums, weight, bias, out, pixels, channels, groups, eps,
    SILU: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    channel, real, row, group, place, inside = _tile(pixels, channels, groups, PIXELS, CHANNELS)
    mean, rstd = _mean_and_rstd(sums, group, real, pixels * (channels // groups), eps)
    value = (_load(x, shift, row, real, place, inside) - mean) * rstd
    value = value * _row(weight, channel, real) + _row(bias, channel, real)
    if SILU:
        value *= tl.sigmoid(value)
    tl.store(out + place, value, mask=inside)


@triton.jit
def _row(values, channel, real):  # type: ignore[no-untyped-def]
    return tl.load(values + channel, mask=real, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _back(value, gradient, weight, bias, channel, real, place, inside, SILU: tl.constexpr):  # type: ignore[no-untyped-def]
    """The gradient of a normalized value."""
    scale = _row(weight, channel, real)
    upstream = tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32)
    if SILU:
        before = value * scale + _row(bias, channel, real)
        share = tl.sigmoid(before)
        upstream *= share * (1 + before * (1 - share))
    return upstream * scale


@triton.jit(do_not_specialize=["pixels"])
def _back_moments(  # type: ignore[no-untyped-def]
    x, shift, sums, weight, bias, gradient, notes, pixels, channels, groups, eps,
    SILU: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    channel, real, row, group, place, inside = _tile(pixels, channels, groups, PIXELS, CHANNELS)
    mean, rstd = _mean_and_rstd(sums, group, real, pixels * (channels // groups), eps)
    value = (_load(x, shift, row, real, place, inside) - mean) * rstd
    slope = _back(value, gradient, weight, bias, channel, real, place, inside, SILU)
    _note(notes, row, real, slope, slope * value)


@triton.jit(do_not_specialize=["pixels"])
def _back_normalize(  # type: ignore[no-untyped-def]
    x, shift, sums, weight, bias, gradient, back_sums, of_x, pixels, channels, groups, eps,
    SILU: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    channel, real, row, group, place, inside = _tile(pixels, channels, groups, PIXELS, CHANNELS)
    size = pixels * (channels // groups)
    mean, rstd = _mean_and_rstd(sums, group, real, size, eps)
    mean_slope = tl.load(back_sums + group * 2, mask=real, other=0.0)[None, :] / size
    mean_product = tl.load(back_sums + group * 2 + 1, mask=real, other=0.0)[None, :] / size
    value = (_load(x, shift, row, real, place, inside) - mean) * rstd
    slope = _back(value, gradient, weight, bias, channel, real, place, inside, SILU)
    tl.store(of_x + place, rstd * (slope - mean_slope - value * mean_product), mask=inside)
