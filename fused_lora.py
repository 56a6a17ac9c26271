"""The LoRA of a UNet's attention in few large products: peft's weights and results, in a fraction of its kernels.

At 512² an SDXL step is thousands of kernels of a few microseconds, and most of them were peft's: each of its 560
linears casts its two matrices, multiplies, scales and adds on its own, and does it all backwards. Here

- linears that read the same input are one product: q, k and v of a self-attention, and the keys and values of all
  cross-attentions, since all of them read the same caption;
- the weights of all linears lie in one fp32 buffer, their copy in the UNet's format in another, and so do gradients:
  one cast before a step and one sum after it, in place of a thousand;
- everything on the way is in the UNet's format, so there is no autocast.

peft's layers stay where they are, but what they hold are views into these buffers: whoever saves, restores, clips or
updates the LoRA need not know. What this gains is measured by `benchmarks/train.py`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor


class FusedLora:
    """Takes over the attention of a UNet that has a LoRA of peft's, without dropout.

    Args:
        scale: alpha / rank, by which the LoRA acts.
    """

    def __init__(self, unet: UNet2DConditionModel, scale: float) -> None:
        self.scale = scale
        self.groups: list[Group] = []
        self.aside = Aside(unet.device)
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
        self._share_buffers()
        unet.register_forward_pre_hook(self._read_text, with_kwargs=True)

    def group(self, *linears: Any) -> "Group":
        self.groups.append(Group(linears, self.aside))
        return self.groups[-1]

    def _share_buffers(self) -> None:
        """Lay all A, then all B, into one buffer each: fp32 weights, their gradients, and both in the UNet's format."""
        weights = [weight for group in self.groups for weight in group.downs]
        self.border = sum(weight.numel() for weight in weights)
        weights += [weight for group in self.groups for weight in group.ups]
        self.weights = torch.cat([weight.detach().flatten() for weight in weights])
        self.gradients = torch.zeros_like(self.weights)
        start = 0
        for weight in weights:
            part = slice(start, start := start + weight.numel())
            weight.data, weight.grad = self.weights[part].view_as(weight), self.gradients[part].view_as(weight)
        self.copies = torch.zeros_like(self.weights, dtype=self.groups[0].weight.dtype)
        self.copy_gradients = torch.zeros_like(self.copies)
        start = 0
        for group in self.groups:
            part = slice(start, start := start + group.down_shape.numel())
            group.down, group.down_gradient = (
                buffer[part].view(group.down_shape) for buffer in (self.copies, self.copy_gradients)
            )
        for group in self.groups:
            part = slice(start, start := start + group.up_shape.numel())
            group.up, group.up_gradient = (
                buffer[part].view(group.up_shape) for buffer in (self.copies, self.copy_gradients)
            )

    @torch.no_grad()
    def _read_text(self, _unet: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Before each forward: the weights as they are now, and what all cross-attentions see of the captions."""
        self.copies[: self.border].copy_(self.weights[: self.border])
        torch.mul(self.weights[self.border :], self.scale, out=self.copies[self.border :])
        with torch.enable_grad():
            text = named["encoder_hidden_states"] if "encoder_hidden_states" in named else arguments[2]
            self.read = {width: group(text) for width, group in self.readers.items()}

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """After each backward: add what it found to the weights' gradients."""
        self.aside.join()
        self.gradients[: self.border] += self.copy_gradients[: self.border]
        self.gradients[self.border :].add_(self.copy_gradients[self.border :], alpha=self.scale)


class Group:
    """n linears (k -> d) that read the same input: their frozen weights as one, and their LoRA of rank r."""

    down: Tensor  # (n * r, k), peft's lora_A
    up: Tensor  # (n, d, r), lora_B, times the scale
    down_gradient: Tensor
    up_gradient: Tensor

    def __init__(self, linears: Sequence[Any], aside: "Aside") -> None:
        self.aside = aside
        layers = [linear.base_layer for linear in linears]
        self.downs = [linear.lora_A["default"].weight for linear in linears]
        self.ups = [linear.lora_B["default"].weight for linear in linears]
        self.count, self.width = len(layers), layers[0].out_features
        self.weight, self.bias = layers[0].weight.data, layers[0].bias  # (n * d, k)
        if self.count > 1:
            self.weight = torch.cat([layer.weight.data for layer in layers])
            for layer, part in zip(layers, self.weight.split(self.width), strict=True):
                layer.weight.data = part
        rank = len(self.downs[0])
        self.down_shape = torch.Size((self.count * rank, layers[0].in_features))
        self.up_shape = torch.Size((self.count, self.width, rank))
        # Makes autograd call `backward` where the input itself needs no gradient: that is all it is for. On the CPU,
        # since autograd would wait for the stream that it was first used on, which a graph cannot be captured with.
        self.anchor = torch.zeros((), requires_grad=True)

    def __call__(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """Inputs (..., k) to the outputs (..., d) of each linear."""
        outputs = _Product.apply(inputs, self.anchor, self)
        return outputs.unbind(-2) if self.count > 1 else (outputs.squeeze(-2),)  # unbinding one makes a copy backwards

    def members(self, side_by_side: Tensor) -> Tensor:
        """(tokens, n * x) as (n, tokens, x)."""
        return side_by_side.view(len(side_by_side), self.count, -1).transpose(0, 1)


class Aside:
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
        low = tokens @ group.down.T
        outputs = F.linear(tokens, group.weight, group.bias)
        group.members(outputs).baddbmm_(group.members(low), group.up.transpose(1, 2))
        ctx.save_for_backward(tokens, low)
        ctx.group = group
        return outputs.view(*inputs.shape[:-1], group.count, group.width)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None]:
        group: Group = ctx.group
        tokens, low = ctx.saved_tensors
        of_outputs = gradient.reshape(len(tokens), -1)
        of_low = torch.empty_like(low)
        torch.bmm(group.members(of_outputs), group.up, out=group.members(of_low))
        with group.aside(tokens, low, of_low, of_outputs):
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
        return self.out(_attend(query, key, value, attention.heads))[0]


class CrossAttention:
    """The same where keys and values of the caption are there already."""

    def __init__(self, lora: FusedLora, attention: Any, place: int) -> None:
        self.project, self.out = lora.group(attention.to_q), lora.group(attention.to_out[0])
        self.lora, self.place = lora, place

    def __call__(self, attention: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        [query] = self.project(hidden_states)
        key, value = self.lora.read[attention.inner_dim][2 * self.place : 2 * self.place + 2]
        return self.out(_attend(query, key, value, attention.heads))[0]


def _attend(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Attention of (batch, tokens, width), by PyTorch's fastest kernel."""
    split = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (query, key, value))
    return F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
