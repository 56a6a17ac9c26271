"""Forward and backward of a training step: the fast path where it is valid, within the memory available.

Fast means three things, and `benchmarks/train.py` measures each: `fast/fused_lora.py` computes the LoRA in a few large
matmuls, on CPUs and NVIDIA GPUs; `fast/kernels.py` fuses the passes between matmuls, on NVIDIA GPUs since Ampere;
`fast/cuda_graph.py` replays all of it as a CUDA graph.

The optimizer stays outside the graph: what the CPU does for it is hidden behind the graph's work on the GPU, and any
optimizer can be used.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lace_lora.config import Config
from lace_lora.errors import is_out_of_memory
from lace_lora.fast.cuda_graph import CaptureError, CudaGraphs
from lace_lora.fast.fused_lora import FusedLora
from lace_lora.fast.triton_support import use_kernels_if_possible
from lace_lora.sdxl import models
from lace_lora.training.batches import Batch
from lace_lora.training.optimizer import Weights

logger = logging.getLogger("train_lora")

Loss = Callable[[Batch], Tensor]  # of a batch on the device, as a scalar: the mean over its pictures

Result = TypeVar("Result")

_FLAT = "unet.lora"  # the name of all weights as one parameter


class TrainStep:
    """Adds the gradients of batches to those of the LoRA.

    Args:
        networks: the UNet, and both text encoders if they train, with their LoRA.
        dtype: of the frozen weights.
    """

    def __init__(
        self, config: Config, networks: dict[str, Any], loss: Loss, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.networks, self.loss, self.device, self.dtype = networks, loss, device, dtype
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.micro_batch_size = config.train_batch_size * (2 if config.with_prior_preservation else 1)
        self.checkpointing = False
        self.fused: FusedLora | None = None
        self.cuda_graphs: CudaGraphs | None = None
        if reason := reason_for_eager(config, device):
            logger.info("training without the fused LoRA, CUDA graphs and Triton kernels, because %s", reason)
        else:
            self.fused = FusedLora(networks["unet"], config.alpha / config.rank)
            use_kernels_if_possible(networks["unet"])
            if device.type == "cuda":
                self.cuda_graphs = CudaGraphs(self._forward_backward, device)
        if config.gradient_checkpointing:
            self._start_checkpointing()

    def __call__(self, batch: Batch) -> Tensor:
        """Forward and backward over this process's part of the batch, by micro-batches; returns its mean loss.

        Where memory runs out, the step starts again in a way that needs less, which changes results by rounding only.

        Raises:
            RuntimeError: no way is left: not even one picture at a time, with checkpointing and without a graph, fits.
        """
        memory_savers = self._memory_savers()
        while True:
            try:
                losses = [self._micro_batch(part) for part in batch.split(self.micro_batch_size)]
                return torch.stack(losses).sum()
            except RuntimeError as error:
                if not is_out_of_memory(error) or not next(memory_savers, False):
                    raise
            # Not in the clause above, where the error still holds on to the memory that is to be freed.
            for gradient in self.gradients():
                gradient.zero_()
            self.drop_graphs()  # they were captured for what did not fit

    def _memory_savers(self) -> Iterator[bool]:
        """Change, each time that memory runs out in a step, what costs least; until nothing is left."""
        if self.cuda_graphs and self.cuda_graphs.graphs:
            yield True  # graphs of other shapes may take the memory that is missing
        while (whole := self.micro_batch_size) > 1:
            self.micro_batch_size = part = max(part for part in range(1, whole) if whole % part == 0)
            logger.warning("out of memory: using micro-batches of %d from now on; the batch size stays the same", part)
            yield True
        if not self.checkpointing:
            self._start_checkpointing()
            logger.warning("out of memory: using gradient checkpointing from now on; steps take a third longer")
            yield True
        if self.cuda_graphs:
            self.cuda_graphs = None
            logger.warning("out of memory: training without CUDA graphs from now on, which is slower but saves memory")
            yield True

    def drop_graphs(self) -> None:
        """Free the memory that CUDA graphs occupy between steps; the next step captures them again."""
        if self.cuda_graphs:
            self.cuda_graphs.drop()
        models.free(self.device)

    def within_memory(self, work: Callable[[int], Result], at_once: int) -> Result:
        """Work beside the steps, that many pictures at once or, if memory runs out, one by one and without graphs."""
        try:
            return work(at_once)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        # Not in the clause above, where the error holds on to what is to be freed.
        self.drop_graphs()
        return work(1)

    def _start_checkpointing(self) -> None:
        self.checkpointing = True
        if self.cuda_graphs:  # new ones, so that the first step with checkpointing is a warm-up
            self.cuda_graphs = CudaGraphs(self._forward_backward, self.device)
        # Nothing is random with the fused LoRA, and a graph cannot be captured where generators' states are read.
        function = partial(checkpoint, use_reentrant=False, preserve_rng_state=not self.fused)
        for name, network in self.networks.items():
            if name == "unet":
                network.enable_gradient_checkpointing(function)
            else:
                network.gradient_checkpointing_enable()

    def _micro_batch(self, batch: Batch) -> Tensor:
        if self.device.type == "cuda":
            batch = batch.pinned()
        if self.cuda_graphs:
            try:
                return self.cuda_graphs(*vars(batch).values())
            except CaptureError as error:
                if is_out_of_memory(error):
                    raise
                logger.warning("CUDA graphs failed (%s): steps are several times slower at low resolutions", error)
                self.cuda_graphs = None
        return self._forward_backward(*vars(batch.to(self.device)).values())

    def _forward_backward(self, *fields: Tensor) -> Tensor:
        """The loss of a batch, given by its fields on the device, after adding its gradients."""
        try:
            with self.autocast():
                loss = self.loss(Batch(*fields))
            self.scaler.scale(loss).backward()
        finally:
            if self.fused:
                self.fused.side_stream.join()  # after an error too: no stream may be left forked when a capture ends
        if self.fused:
            self.fused.collect_gradients()
        return loss.detach()

    def autocast(self) -> AbstractContextManager[Any]:
        """PyTorch's mix of fp32 and `dtype`; with the fused LoRA everything is in `dtype` already."""
        return torch.autocast(self.device.type, self.dtype, enabled=not self.fused and self.dtype != torch.float32)

    def train(self, mode: bool = True) -> None:
        for network in self.networks.values():
            network.train(mode)

    def gradients(self) -> list[Tensor]:
        """All gradients; of the fused LoRA as one flat tensor."""
        if self.fused:
            return [self.fused.gradients]
        return [p.grad for network in self.networks.values() for p in network.parameters() if p.grad is not None]

    def trainable_params(self, lora: Weights) -> Weights:
        """The weights for an optimizer, by name: one flat parameter if possible, since a thousand cost 20 ms a step."""
        return {_FLAT: self.fused.weights} if self.fused else lora

    def split_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The optimizer's state of `trainable_params` as that of each weight: `<what>.unet.<weight>`."""
        if not self.fused:
            return state
        split = {key.partition(".")[0]: self.fused.unflatten(value) for key, value in state.items()}
        return {f"{what}.unet.{name}": part for what, parts in split.items() for name, part in parts.items()}

    def merge_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The reverse of `split_state`.

        Raises:
            KeyError: the state of a weight is missing.
        """
        if not self.fused:
            return state
        split: dict[str, dict[str, Tensor]] = {}
        for key, value in state.items():
            what, _, name = key.partition(".unet.")
            split.setdefault(what, {})[name] = value
        return {f"{what}.{_FLAT}": self.fused.flatten(parts) for what, parts in split.items()}


def reason_for_eager(config: Config, device: torch.device) -> str:
    """Which setting or device needs peft's own LoRA and eager PyTorch; an empty string if none does."""
    reasons = {
        f"they are untested on {device.type}": device.type not in ("cuda", "cpu"),
        "lora_dropout drops inputs of each linear separately": config.lora_dropout > 0,
        "the text encoders are trained too": config.train_text_encoder,
        "attention is xformers": config.attention == "xformers",
    }
    return next((reason for reason, holds in reasons.items() if holds), "")
