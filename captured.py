"""A function of a batch, replayed from CUDA graphs: what costs Python and the driver milliseconds is said once."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from batches import Batch


class CaptureError(RuntimeError):
    """The function does what a graph cannot hold, or memory ran out."""


class Captured:
    """Calls `function`, which launches work on the GPU and returns a tensor, from a graph for each shape of batch.

    The first call with a shape is made plainly, on a stream of its own, so that libraries choose their kernels and
    make their buffers; the second one is captured. All graphs share one pool of memory, since one runs at a time.

    `function` must not wait for the GPU, nor draw random numbers on it, and whatever it writes to must stay in place.
    """

    def __init__(self, function: Callable[[Batch], Tensor], device: torch.device) -> None:
        self.function, self.device = function, device
        self.called: set[Any] = set()
        self.graphs: dict[Any, tuple[torch.cuda.CUDAGraph, Batch, Tensor]] = {}
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, batch: Batch) -> Tensor:
        """
        Args:
            batch: in pinned memory or on the GPU.

        Raises:
            CaptureError: there can be no graph of this function; nothing was done.
        """
        shape = batch.latents.shape
        if shape not in self.called:
            output = self._on_own_stream(batch.to(self.device))
            self.called.add(shape)
            return output
        if shape not in self.graphs:
            self.graphs[shape] = self._capture(batch.to(self.device))
        graph, inputs, output = self.graphs[shape]
        for name, value in vars(batch).items():
            getattr(inputs, name).copy_(value, non_blocking=True)
        graph.replay()
        return output.clone()

    def forget(self) -> bool:
        """Let go of all graphs, so that their memory can be freed, and tell whether there were any."""
        had, self.graphs, self.pool = bool(self.graphs), {}, torch.cuda.graph_pool_handle()
        return had

    def _on_own_stream(self, batch: Batch) -> Tensor:
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            output = self.function(batch)
        current.wait_stream(stream)
        return output

    def _capture(self, inputs: Batch) -> tuple[torch.cuda.CUDAGraph, Batch, Tensor]:
        torch.cuda.empty_cache()  # the pool cannot use what the first call left behind
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, pool=self.pool):
                output = self.function(inputs)
        except RuntimeError as error:
            # PyTorch stays on the stream of the capture, and leaves its generator as if that still went on: no random
            # number could be drawn any more.
            torch.cuda.set_stream(stream)
            fresh = torch.Generator(self.device).graphsafe_get_state()
            torch.cuda.default_generators[torch.cuda.current_device()].graphsafe_set_state(fresh)
            reason = str(error).strip().split("\n")[0]
            raise CaptureError(reason) from error
        return graph, inputs, output
