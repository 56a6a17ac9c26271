"""What attention in training and in drawing shares: fused weights, and PyTorch's fastest attention kernels."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor


def attentions(unet: UNet2DConditionModel) -> list[Any]:
    """All attention modules, in the order in which they are called."""
    return [module for name, module in unet.named_modules() if name.endswith((".attn1", ".attn2"))]


class AttentionProcessor:
    """diffusers' attention processor with other projections: `project` from hidden states to query, key and value, and
    `out` from the result of attention to hidden states.
    """

    def __init__(self, project: Callable[[Tensor], Iterable[Tensor]], out: Callable[[Tensor], Tensor]) -> None:
        self.project, self.out = project, out

    def __call__(self, attention: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        query, key, value = self.project(hidden_states)
        return self.out(attend(query, key, value, attention.heads))


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Attention of (batch, tokens, width), by PyTorch's fastest kernel."""
    split = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (query, key, value))
    return F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)


def fuse_weights(linears: Sequence[Any], *more_rows: Tensor) -> Tensor:
    """The weights of linears and `more_rows` as one matrix; the linears' own weights become views into it."""
    matrix = torch.cat([*(linear.weight.data for linear in linears), *more_rows])
    start = 0
    for linear in linears:
        linear.weight.data = matrix[start : start + linear.out_features]
        start += linear.out_features
    return matrix
