"""A function of tensors, replayed from CUDA graphs: what costs Python and the driver milliseconds is said once."""

import gc
from collections.abc import Callable

import torch
from torch import Tensor

Kind = tuple[tuple[torch.Size, torch.dtype], ...]  # shapes and number formats of inputs


class CaptureError(RuntimeError):
    """The function does what a graph cannot hold, or memory ran out."""


class CudaGraphs:
    """Calls `function`, which launches work on the GPU and returns a tensor, from a graph for each kind of inputs.

    The first call with a new kind is made plainly, on a stream of its own, so that libraries choose their kernels and
    make their buffers; the second one is captured. All graphs share one pool of memory, since one runs at a time.

    `function` must not wait for the GPU, nor draw random numbers on it, and whatever it writes to must stay in place.
    """

    def __init__(self, function: Callable[..., Tensor], device: torch.device) -> None:
        self.function, self.device = function, device
        self.called: set[Kind] = set()
        self.graphs: dict[Kind, tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, *inputs: Tensor) -> Tensor:
        """
        Args:
            inputs: in pinned memory or on the GPU.

        Raises:
            CaptureError: there can be no graph of this function; nothing was done.
        """
        kind = tuple((value.shape, value.dtype) for value in inputs)
        if kind not in self.called:
            output = self._on_own_stream(self._moved(inputs))
            self.called.add(kind)
            return output
        if kind not in self.graphs:
            self.graphs[kind] = self._capture(self._moved(inputs))
        graph, places, output = self.graphs[kind]
        for place, value in zip(places, inputs, strict=True):
            place.copy_(value, non_blocking=True)
        graph.replay()
        return output.clone()

    def forget(self) -> bool:
        """Let go of all graphs, so that their memory can be freed, and tell whether there were any."""
        had, self.graphs, self.pool = bool(self.graphs), {}, torch.cuda.graph_pool_handle()
        return had

    def _moved(self, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        """In memory of their own, since a graph reads its inputs where they were when it was captured."""
        return [torch.empty_like(value, device=self.device).copy_(value, non_blocking=True) for value in inputs]

    def _on_own_stream(self, inputs: list[Tensor]) -> Tensor:
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        try:
            with torch.cuda.stream(stream):
                return self.function(*inputs)
        finally:  # without memory too: nobody may write to what is still being read
            current.wait_stream(stream)

    def _capture(self, places: list[Tensor]) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]:
        gc.collect()  # a graph that is no longer used must not be destroyed while another one is captured
        torch.cuda.empty_cache()  # the pool cannot use what the first call left behind
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # Of this thread: others may copy from the GPU meanwhile.
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                output = self.function(*places)
        except RuntimeError as error:
            # PyTorch stays on the stream of the capture, and leaves its generator as if that still went on: no random
            # number could be drawn any more.
            torch.cuda.set_stream(stream)
            fresh = torch.Generator(self.device).graphsafe_get_state()
            torch.cuda.default_generators[torch.cuda.current_device()].graphsafe_set_state(fresh)
            reason = str(error).strip().split("\n")[0]
            raise CaptureError(reason) from error
        return graph, places, output
