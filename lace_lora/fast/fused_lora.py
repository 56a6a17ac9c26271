"""The LoRA of a UNet's attention in few large products: peft's weights and results, in a fraction of its kernels.

At 512² an SDXL step is thousands of kernels of a few microseconds, and most of them were peft's: each of its 560
linears casts its two matrices, multiplies, scales and adds on its own, and does it all backwards. Here

- linears that read the same input are one product: q, k and v of a self-attention, and the keys and values of all
  cross-attentions, since all of them read the same caption;
- the weights of all linears lie in one fp32 buffer, their copy in the UNet's format in another, and so do gradients:
  one cast before a step and one sum after it, in place of a thousand;
- everything on the way is in the UNet's format, so there is no autocast.

peft's layers stay where they are, but what they hold are views into these buffers: whoever saves or restores the LoRA
need not know, and whoever updates it can take `weights` as one. What this gains is measured by `benchmarks/train.py`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor

from lace_lora.fast.attention import attend

# Up to so many tokens it pays to make one product of two: 0.6 ms of a step at 512² on an H100. Beyond, the rows that
# the LoRA adds cost the GPU's processors another round.
_FEW = 2048

# Numbers that rows begin at a multiple of: attention on GPUs, which reads 16 bytes at once, is wrong on others.
_ALIGNED = 8


class FusedLora:
    """Takes over the attention of a UNet that has a LoRA of peft's, without dropout.

    Args:
        scale: alpha / rank, by which the LoRA acts.

    Attributes:
        weights: all of the LoRA in one row, in fp32, with its gradient.
    """

    weights: torch.nn.Parameter

    def __init__(self, unet: UNet2DConditionModel, scale: float) -> None:
        self.scale = scale
        self.groups: list[Group] = []
        self.side_stream = SideStream(unet.device)
        self.read: dict[int, tuple[Tensor, ...]] = {}  # keys and values of the caption, by width
        attentions = [module for name, module in unet.named_modules() if name.endswith((".attn1", ".attn2"))]
        places: dict[int, list[Any]] = {}  # cross-attentions by width: members of one product have one shape
        for attention in attentions:
            if attention.is_cross_attention:
                alike = places.setdefault(attention.inner_dim, [])
                attention.set_processor(CrossAttention(self, attention, len(alike)))
                alike.append(attention)
            else:
                attention.set_processor(SelfAttention(self, attention))
        self.readers = {
            width: self.group(*(linear for one in alike for linear in (one.to_k, one.to_v)))
            for width, alike in places.items()
        }
        self._share_buffers({id(weight): name for name, weight in unet.named_parameters()})
        unet.register_forward_pre_hook(self._read_text, with_kwargs=True)

    def group(self, *linears: Any) -> "Group":
        self.groups.append(Group(linears, self.side_stream))
        return self.groups[-1]

    def _share_buffers(self, names: dict[int, str]) -> None:
        """Lay all A, then all B, into one buffer each: fp32 weights, their gradients, and both in the UNet's format."""
        weights = [weight for group in self.groups for weight in group.downs]
        self.border = sum(weight.numel() for weight in weights)
        weights += [weight for group in self.groups for weight in group.ups]
        self.shapes = {names[id(weight)]: weight.shape for weight in weights}
        self.weights = torch.nn.Parameter(torch.cat([weight.detach().flatten() for weight in weights]))
        self.weights.grad = self.gradients = torch.zeros_like(self.weights)
        views = (self.unflatten(row).values() for row in (self.weights.data, self.gradients))
        for weight, value, gradient in zip(weights, *views, strict=True):
            weight.data, weight.grad = value, gradient
        kind = self.groups[0].weight.dtype
        self.copies = torch.zeros_like(self.gradients[self.border :], dtype=kind)
        self.copy_gradients = torch.zeros_like(self.gradients, dtype=kind)
        downs, ups = [group.down.shape for group in self.groups], [group.up_shape for group in self.groups]
        self.sources = _cut(self.weights.data[: self.border], downs)
        gradients = _cut(self.copy_gradients, downs + ups)
        for number, (group, copy) in enumerate(zip(self.groups, _cut(self.copies, ups), strict=True)):
            group.up, group.down_gradient, group.up_gradient = copy, gradients[number], gradients[number - len(ups)]

    def unflatten(self, row: Tensor) -> dict[str, Tensor]:
        """What there is of all weights in one row, or once for all, for each by its name in the UNet."""
        if not row.dim():
            return {name: row.clone() for name in self.shapes}
        return dict(zip(self.shapes, _cut(row, self.shapes.values()), strict=True))

    def flatten(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The reverse of `unflatten`.

        Raises:
            KeyError: one is missing.
        """
        wanted = [parts[name] for name in self.shapes]
        if not any(part.dim() for part in wanted):
            return wanted[0]
        sizes = [shape.numel() for shape in self.shapes.values()]
        return torch.cat([part.flatten().expand(size) for part, size in zip(wanted, sizes, strict=True)])

    @torch.no_grad()
    def _read_text(self, _unet: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Before each forward: the weights as they are now, and what all cross-attentions see of the captions."""
        torch._foreach_copy_([group.down for group in self.groups], self.sources)
        torch.mul(self.weights[self.border :], self.scale, out=self.copies)
        with torch.enable_grad():
            text = named["encoder_hidden_states"] if "encoder_hidden_states" in named else arguments[2]
            self.read = {width: group(text) for width, group in self.readers.items()}

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """After each backward, and after `side_stream.join`: add what it found to the weights' gradients."""
        self.gradients[: self.border] += self.copy_gradients[: self.border]
        self.gradients[self.border :].add_(self.copy_gradients[self.border :], alpha=self.scale)


def _cut(row: Tensor, shapes: Iterable[torch.Size]) -> list[Tensor]:
    """The parts of a row that lie side by side, each in its shape."""
    shapes = list(shapes)
    return [part.view(shape) for part, shape in zip(row.split([s.numel() for s in shapes]), shapes, strict=True)]


class Group:
    """n linears (k -> d) that read the same input: their frozen weights as one, and their LoRA of rank r.

    Where there is no bias, the first product of the LoRA can be one with the frozen ones.
    """

    matrix: Tensor  # (n * d, k), or with the LoRA's n * r rows and a few of nothing
    weight: Tensor  # (n * d, k)
    down: Tensor  # (n * r, k), peft's lora_A
    up: Tensor  # (n, d, r), lora_B, times the scale
    down_gradient: Tensor
    up_gradient: Tensor

    def __init__(self, linears: Sequence[Any], side_stream: "SideStream") -> None:
        self.side_stream = side_stream
        layers = [linear.base_layer for linear in linears]
        self.downs = [linear.lora_A["default"].weight for linear in linears]
        self.ups = [linear.lora_B["default"].weight for linear in linears]
        self.count, self.width, self.bias = len(layers), layers[0].out_features, layers[0].bias
        rank = len(self.downs[0])
        self.up_shape = torch.Size((self.count, self.width, rank))
        rows, low_rows = self.count * self.width, self.count * rank
        self.down = layers[0].weight.new_zeros(low_rows, layers[0].in_features)
        self.weight = self.matrix = layers[0].weight.data
        self.parts = (rows, low_rows, -low_rows % _ALIGNED)
        if self.bias is None:
            nothing = self.down.new_zeros(self.parts[2], layers[0].in_features)
            self.matrix = torch.cat([*(layer.weight.data for layer in layers), self.down, nothing])
            self.weight, self.down, _ = self.matrix.split(self.parts)
            for layer, part in zip(layers, self.weight.split(self.width), strict=True):
                layer.weight.data = part
        # Makes autograd call `backward` where the input itself needs no gradient: that is all it is for. On the CPU,
        # since autograd would wait for the stream that it was first used on, which a graph cannot be captured with.
        self.anchor = torch.zeros((), requires_grad=True)

    def __call__(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """Inputs (..., k) to the outputs (..., d) of each linear."""
        outputs = _Product.apply(inputs, self.anchor, self)
        return outputs.unbind(-2) if self.count > 1 else (outputs.squeeze(-2),)  # unbinding one makes a copy backwards

    def members(self, side_by_side: Tensor) -> Tensor:
        """(tokens, n * x) as (n, tokens, x)."""
        return side_by_side.unflatten(1, (self.count, -1)).transpose(0, 1)


class SideStream:
    """A second stream on a GPU, for gradients that nothing waits for before the end of the backward pass."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.in_use: tuple[Tensor, ...] = ()

    @contextmanager
    def __call__(self, *tensors: Tensor) -> Iterator[None]:
        """Do what follows there. `tensors` are kept until the next use, since memory is managed for one stream."""
        if self.stream is None:
            yield
            return
        self.join()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            yield
        self.in_use = tensors

    def join(self) -> None:
        if self.stream and self.in_use:
            torch.cuda.current_stream().wait_stream(self.stream)
        self.in_use = ()


class _Product(torch.autograd.Function):
    """y = x Wᵀ + x Aᵀ Bᵀ for all linears of a group; the gradients of A and B go straight to where they belong."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, _anchor: Tensor, group: Group) -> Tensor:
        tokens = inputs.reshape(-1, inputs.shape[-1])
        if group.bias is None and len(tokens) <= _FEW:
            outputs, low, _ = (tokens @ group.matrix.T).split(group.parts, dim=1)
        else:
            outputs, low = F.linear(tokens, group.weight, group.bias), tokens @ group.down.T
        group.members(outputs).baddbmm_(group.members(low), group.up.transpose(1, 2))
        ctx.save_for_backward(tokens, low)
        ctx.group = group
        return outputs.unflatten(1, (group.count, group.width)).unflatten(0, inputs.shape[:-1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None]:
        group: Group = ctx.group
        tokens, low = ctx.saved_tensors
        of_outputs = gradient.reshape(len(tokens), -1)
        of_low = torch.empty_like(low)
        torch.bmm(group.members(of_outputs), group.up, out=group.members(of_low))
        with group.side_stream(tokens, low, of_low, of_outputs):
            torch.bmm(group.members(of_outputs).transpose(1, 2), group.members(low), out=group.up_gradient)
            torch.mm(of_low.T, tokens, out=group.down_gradient)
        if not ctx.needs_input_grad[0]:
            return None, None, None
        of_tokens = (of_outputs @ group.weight).addmm_(of_low, group.down)
        return of_tokens.view(*gradient.shape[:-2], -1), None, None


class SelfAttention:
    """diffusers' attention processor for a group of q, k and v."""

    def __init__(self, lora: FusedLora, attention: Any) -> None:
        self.project = lora.group(attention.to_q, attention.to_k, attention.to_v)
        self.out = lora.group(attention.to_out[0])

    def __call__(self, attention: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        query, key, value = self.project(hidden_states)
        return self.out(attend(query, key, value, attention.heads))[0]


class CrossAttention:
    """The same where keys and values of the caption are there already."""

    def __init__(self, lora: FusedLora, attention: Any, place: int) -> None:
        self.project, self.out = lora.group(attention.to_q), lora.group(attention.to_out[0])
        self.lora, self.place = lora, place

    def __call__(self, attention: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        [query] = self.project(hidden_states)
        key, value = self.lora.read[attention.inner_dim][2 * self.place : 2 * self.place + 2]
        return self.out(attend(query, key, value, attention.heads))[0]
