"""Attention processors."""

import torch.nn.functional as F
from torch import Tensor


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Attention of (batch, tokens, width), by PyTorch's fastest kernel."""
    split = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (query, key, value))
    return F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
