"""A function of tensors as CUDA graphs, replayed with one launch, which saves milliseconds in Python and the driver."""

import gc
from collections.abc import Callable

import torch
from torch import Tensor

from lace_lora.errors import first_line

Signature = tuple[tuple[torch.Size, torch.dtype], ...]  # shape and dtype of each input


class CaptureError(RuntimeError):
    """The function cannot be captured in a CUDA graph, or memory ran out."""


class CudaGraphs:
    """Calls `function`, which launches work on the GPU and returns a tensor, with one CUDA graph per input signature.

    The first call with a new signature runs eagerly, on a side stream, to let libraries choose their kernels and
    allocate their buffers; the second captures it, the others replay. All graphs share one memory pool, since only one
    runs at a time.

    `function` must not wait for the GPU, nor draw random numbers on it, and whatever it writes to must stay in place.
    """

    def __init__(self, function: Callable[..., Tensor], device: torch.device) -> None:
        self.function, self.device = function, device
        self.warmed_up: set[Signature] = set()
        self.graphs: dict[Signature, tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The function's output. Inputs are in pinned memory or on the GPU.

        Raises:
            CaptureError: this function cannot be captured; none of it has run.
        """
        signature = tuple((value.shape, value.dtype) for value in inputs)
        if signature not in self.warmed_up:
            output = self._warm_up(self._static(inputs))
            self.warmed_up.add(signature)
            return output
        if signature not in self.graphs:
            self.graphs[signature] = self._capture(self._static(inputs))
        graph, static_inputs, output = self.graphs[signature]
        for static, value in zip(static_inputs, inputs, strict=True):
            static.copy_(value, non_blocking=True)
        graph.replay()
        return output.clone()

    def drop(self) -> None:
        """Drop all graphs, so that their memory can be freed."""
        self.graphs, self.pool = {}, torch.cuda.graph_pool_handle()

    def _static(self, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        """Copies of the inputs, since a graph reads from the addresses that it was captured with."""
        return [torch.empty_like(value, device=self.device).copy_(value, non_blocking=True) for value in inputs]

    def _warm_up(self, inputs: list[Tensor]) -> Tensor:
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        try:
            with torch.cuda.stream(stream):
                return self.function(*inputs)
        finally:  # after an error too: what the side stream still reads must not be written to
            current.wait_stream(stream)

    def _capture(self, static_inputs: list[Tensor]) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]:
        gc.collect()  # an unused graph must not be destroyed while another one is captured
        torch.cuda.empty_cache()  # the pool cannot use what the warm-up left cached
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # Errors for this thread only: others may copy from the GPU meanwhile.
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                output = self.function(*static_inputs)
        except RuntimeError as error:
            # PyTorch stays on the capture's stream, and its generator still assumes a capture, so that generating
            # random numbers would fail.
            torch.cuda.set_stream(stream)
            fresh = torch.Generator(self.device).graphsafe_get_state()
            torch.cuda.default_generators[torch.cuda.current_device()].graphsafe_set_state(fresh)
            raise CaptureError(first_line(error)) from error
        return graph, static_inputs, output
