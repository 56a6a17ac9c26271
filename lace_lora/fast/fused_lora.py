"""The LoRA of a UNet in a few large matmuls: peft's weights and results with a fraction of its kernels.

At 512² an SDXL step is thousands of kernels of a few microseconds, and most of them were peft's: each of its 560
linears casts its two matrices, multiplies, scales and adds on its own, and does it all again backwards. Here

- linears that read the same input are one matmul: q, k and v of a self-attention, and the keys and values of all
  cross-attentions, since all of them read the same caption; each linear of a feed-forward is one of its own;
- all weights lie in one flat fp32 buffer, and so do their gradients: one cast before a step and one sum after it,
  instead of a thousand;
- everything in between is in the UNet's dtype, so that there is no autocast.

peft's layers stay, but their weights become views into these buffers: code that saves or restores the LoRA need not
know, and an optimizer can update `weights` as one parameter. `benchmarks/train.py` measures what this gains.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

from lace_lora.fast.attention import AttentionProcessor, attentions, fuse_weights

# Up to this many tokens, one matmul is faster than two: it saves 0.6 ms of a step at 512² on an H100. Beyond that, the
# LoRA's additional rows cost another wave on the SMs.
_FEW_TOKENS = 2048
# Rows start at a multiple of this many elements: attention kernels read 16 bytes at once, and are wrong on others.
_ALIGNMENT = 8


class FusedLora:
    """Replaces the attention of a UNet that has a peft LoRA, without dropout, and the feed-forward layers that have it.

    Args:
        scale: alpha / rank, the factor of what the LoRA adds.

    Attributes:
        weights: the whole LoRA as one flat fp32 parameter: all A, then all B. `gradients` is its gradient.
    """

    def __init__(self, unet: UNet2DConditionModel, scale: float) -> None:
        self.scale = scale
        self.side_stream = SideStream(unet.device)
        self.fused: list[FusedLinears] = []
        self.keys_values: dict[Any, tuple[Tensor, Tensor]] = {}  # of the caption, for each cross-attention
        by_width: dict[int, list[Any]] = {}  # cross-attentions: the linears of one matmul have one shape
        for attention in attentions(unet):
            if attention.is_cross_attention:
                by_width.setdefault(attention.inner_dim, []).append(attention)
                self._replace(attention, attention.to_q)
            else:
                self._replace(attention, attention.to_q, attention.to_k, attention.to_v)
        self.caption_readers = [
            (same_width, self._fuse(*(linear for one in same_width for linear in (one.to_k, one.to_v))))
            for same_width in by_width.values()
        ]
        for name, layer in unet.named_modules():
            if ".ff." in name and isinstance(layer, LoraLayer):
                layer.forward = self._fuse_one(layer)
        self._flatten_weights({id(weight): name for name, weight in unet.named_parameters()})
        unet.register_forward_pre_hook(self._before_forward, with_kwargs=True)

    def _replace(self, attention: Any, *projections: Any) -> None:
        project, out = self._fuse(*projections), self._fuse_one(attention.to_out[0])

        def query_key_value(hidden_states: Tensor) -> tuple[Tensor, ...]:
            return project(hidden_states) + self.keys_values.get(attention, ())

        attention.set_processor(AttentionProcessor(query_key_value, out))

    def _fuse(self, *linears: Any) -> "FusedLinears":
        self.fused.append(FusedLinears(linears, self.side_stream))
        return self.fused[-1]

    def _fuse_one(self, linear: Any) -> Callable[[Tensor], Tensor]:
        fused = self._fuse(linear)
        return lambda inputs: fused(inputs)[0]

    def _flatten_weights(self, names: dict[int, str]) -> None:
        """Make the weights, and their gradients, of peft's layers views into flat buffers.

        Matmuls read and write copies in the UNet's dtype. Those of A lie in the matrices of `FusedLinears`; those of B,
        and both gradients, are flat too.
        """
        lora_a = [weight for fused in self.fused for weight in fused.lora_a]
        lora_b = [weight for fused in self.fused for weight in fused.lora_b]
        halves = [sum(weight.numel() for weight in half) for half in (lora_a, lora_b)]
        self.shapes = {names[id(weight)]: weight.shape for weight in lora_a + lora_b}
        self.weights = torch.nn.Parameter(torch.cat([weight.detach().flatten() for weight in lora_a + lora_b]))
        self.weights.grad = self.gradients = torch.zeros_like(self.weights)
        values, gradients = self.unflatten(self.weights.data), self.unflatten(self.gradients)
        for name, weight in zip(self.shapes, lora_a + lora_b, strict=True):
            weight.data, weight.grad = values[name], gradients[name]

        gradient_copies = torch.zeros_like(self.gradients, dtype=self.fused[0].weight.dtype)
        down, self.up = self.weights.data.split(halves)
        self.down_gradient, self.up_gradient = self.gradients.split(halves)
        self.down_gradient_copy, self.up_gradient_copy = gradient_copies.split(halves)
        self.up_copy = torch.zeros_like(self.up_gradient_copy)

        down_shapes, up_shapes = [fused.down.shape for fused in self.fused], [fused.up_shape for fused in self.fused]
        self.downs = _views(down, down_shapes)
        buffers = (self.up_copy, up_shapes), (self.down_gradient_copy, down_shapes), (self.up_gradient_copy, up_shapes)
        views_of_each = zip(*(_views(flat, shapes) for flat, shapes in buffers), strict=True)
        for fused, views in zip(self.fused, views_of_each, strict=True):
            fused.up, fused.down_gradient, fused.up_gradient = views

    def unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        """What belongs to each weight, by its name in the UNet; a scalar belongs to each of them."""
        if not flat.dim():
            return {name: flat.clone() for name in self.shapes}
        return dict(zip(self.shapes, _views(flat, self.shapes.values()), strict=True))

    def flatten(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The reverse of `unflatten`.

        Raises:
            KeyError: a weight is missing.
        """
        tensors = {name: parts[name] for name in self.shapes}
        if not any(tensor.dim() for tensor in tensors.values()):
            return next(iter(tensors.values()))
        return torch.cat([tensor.flatten().expand(self.shapes[name].numel()) for name, tensor in tensors.items()])

    @torch.no_grad()
    def _before_forward(self, _unet: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Copy the weights as they are now, and compute what all cross-attentions need of the captions."""
        torch._foreach_copy_([fused.down for fused in self.fused], self.downs)
        torch.mul(self.up, self.scale, out=self.up_copy)
        captions = named["encoder_hidden_states"] if "encoder_hidden_states" in named else arguments[2]
        with torch.enable_grad():
            for same_width, fused in self.caption_readers:
                outputs = fused(captions)
                pairs = zip(outputs[::2], outputs[1::2], strict=True)
                self.keys_values.update(zip(same_width, pairs, strict=True))

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """After each backward, and after `side_stream.join`: add its gradients to those of the weights."""
        self.down_gradient += self.down_gradient_copy
        self.up_gradient.add_(self.up_gradient_copy, alpha=self.scale)


def _views(flat: Tensor, shapes: Iterable[torch.Size]) -> list[Tensor]:
    """The parts of a flat tensor, each in its shape."""
    shapes = list(shapes)
    parts = flat.split([shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


class FusedLinears:
    """n linears (k -> d) that read the same input, with their LoRA of rank r: frozen weights W, A (down) and B (up).

    Without a bias, W and A are rows of one matrix, so that one matmul reads the input.
    """

    weight: Tensor  # (n * d, k)
    down: Tensor  # (n * r, k), a copy of peft's lora_A
    up: Tensor  # (n, d, r), a copy of lora_B times the scale
    down_gradient: Tensor
    up_gradient: Tensor

    def __init__(self, linears: Sequence[Any], side_stream: "SideStream") -> None:
        self.side_stream = side_stream
        layers = [linear.base_layer for linear in linears]
        self.lora_a = [linear.lora_A["default"].weight for linear in linears]
        self.lora_b = [linear.lora_B["default"].weight for linear in linears]
        self.count, self.width, self.bias = len(layers), layers[0].out_features, layers[0].bias
        rank = len(self.lora_a[0])
        self.up_shape = torch.Size((self.count, self.width, rank))
        self.rows = (self.count * self.width, self.count * rank, -self.count * rank % _ALIGNMENT)
        self.down = layers[0].weight.new_zeros(self.rows[1], layers[0].in_features)
        self.weight = self.matrix = layers[0].weight.data
        if self.bias is None:
            padding = self.down.new_zeros(self.rows[2], layers[0].in_features)
            self.matrix = fuse_weights(layers, self.down, padding)
            self.weight, self.down, _ = self.matrix.split(self.rows)
        # Only makes autograd call `backward` where the input itself needs no gradient. On the CPU, since autograd would
        # wait for the stream that it was first used on, which a graph cannot be captured with.
        self.anchor = torch.zeros((), requires_grad=True)

    def __call__(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """Inputs (..., k) to the outputs (..., d) of each linear."""
        outputs = _FusedMatmul.apply(inputs, self.anchor, self)
        return outputs.unbind(-2) if self.count > 1 else (outputs.squeeze(-2),)  # unbinding one copies its gradient

    def each(self, side_by_side: Tensor) -> Tensor:
        """(tokens, n * x) as (n, tokens, x)."""
        return side_by_side.unflatten(1, (self.count, -1)).transpose(0, 1)


class _FusedMatmul(torch.autograd.Function):
    """y = x Wᵀ + x Aᵀ Bᵀ for all linears at once; the gradients of A and B go straight into their buffers."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, _anchor: Tensor, fused: FusedLinears) -> Tensor:
        tokens = inputs.reshape(-1, inputs.shape[-1])
        if fused.bias is None and len(tokens) <= _FEW_TOKENS:
            outputs, low, _ = (tokens @ fused.matrix.T).split(fused.rows, dim=1)
        else:
            outputs, low = F.linear(tokens, fused.weight, fused.bias), tokens @ fused.down.T
        fused.each(outputs).baddbmm_(fused.each(low), fused.up.transpose(1, 2))
        ctx.save_for_backward(tokens, low)
        ctx.fused = fused
        return outputs.unflatten(1, (fused.count, fused.width)).unflatten(0, inputs.shape[:-1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None]:
        fused: FusedLinears = ctx.fused
        tokens, low = ctx.saved_tensors
        grad_outputs = gradient.reshape(len(tokens), -1)
        grad_low = torch.empty_like(low)
        torch.bmm(fused.each(grad_outputs), fused.up, out=fused.each(grad_low))
        with fused.side_stream(tokens, low, grad_low, grad_outputs):
            torch.bmm(fused.each(grad_outputs).transpose(1, 2), fused.each(low), out=fused.up_gradient)
            torch.mm(grad_low.T, tokens, out=fused.down_gradient)
        if not ctx.needs_input_grad[0]:
            return None, None, None
        grad_tokens = (grad_outputs @ fused.weight).addmm_(grad_low, fused.down)
        return grad_tokens.view(*gradient.shape[:-2], -1), None, None


class SideStream:
    """A second stream on a GPU, for gradients that nothing waits for before the end of the backward pass."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.in_use: tuple[Tensor, ...] = ()

    @contextmanager
    def __call__(self, *tensors: Tensor) -> Iterator[None]:
        """Run what follows there. `tensors` live until the next call: the allocator does not track this stream."""
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
