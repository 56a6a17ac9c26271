"""Group norm of channels-last pictures by Triton, with the addition before it and the SiLU after it.

Tiles of pixels and channels are whole lines of memory; by group, which is 4 channels wide in a VAE, reading took four
times as long.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

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
