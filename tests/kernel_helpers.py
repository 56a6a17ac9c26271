"""Values and gradients of two functions, compared: for tests of the Triton kernels."""

from typing import Any

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def random_input(*shape: int) -> torch.Tensor:
    return (3 * torch.randn(shape) + 1).to(DEVICE).requires_grad_()


def values_and_gradients(function: Any, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Its outputs, and the gradients of its inputs for random ones of the outputs."""
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(output.shape, generator=generator).to(DEVICE) for output in outputs]
    return (*outputs, *torch.autograd.grad(outputs, inputs, upstream))


def close(ours: Any, theirs: Any) -> None:
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
