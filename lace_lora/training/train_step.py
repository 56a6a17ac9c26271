"""A share of a training step, forward and backward: fast where that is right, in as much memory as there is.

The fast way is three things. `fused_lora.py` calculates the LoRA in a few large products, on CPUs and CUDA's GPUs.
`gpu_kernels.py` does the passes between products in one each, on NVIDIA GPUs since Ampere. `captured.py` replays all of
it as a CUDA graph. `benchmarks/train.py` measures what each brings.

The optimizer is left out of the graph on purpose: what the CPU does for it is hidden behind the graph's own work, and
any optimizer can be used.
"""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lace_lora.config import Config
from lace_lora.errors import is_out_of_memory
from lace_lora.fast.cuda_graph import CaptureError, CudaGraphs
from lace_lora.fast.drawing_unet import use_kernels_if_possible
from lace_lora.fast.fused_lora import FusedLora
from lace_lora.sdxl import models
from lace_lora.training.batches import Batch
from lace_lora.training.optimizer import Weights

logger = logging.getLogger("train_lora")

_ALL = "unet.lora"  # the name of the weights as one


class TrainStep:
    """Adds the gradients of batches to those of the LoRA.

    Args:
        networks: the UNet, and both text encoders if they train, with their LoRA.
        loss: of a batch on the device, as a scalar: the mean over its pictures.
        dtype: the number format of the frozen weights.
    """

    def __init__(
        self,
        config: Config,
        networks: dict[str, Any],
        loss: Callable[[Batch], Tensor],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.networks, self.loss, self.device, self.dtype = networks, loss, device, dtype
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.at_once = config.train_batch_size * (2 if config.with_prior_preservation else 1)
        self.checkpointing = False
        self.fused: FusedLora | None = None
        self.captured: CudaGraphs | None = None
        if reason := why_plain(config, device):
            logger.info("the plain way of training, since %s", reason)
        else:
            self.fused = FusedLora(networks["unet"], config.alpha / config.rank)
            use_kernels_if_possible(networks["unet"])
            if device.type == "cuda":
                self.captured = CudaGraphs(self._learn_from, device)
        if config.gradient_checkpointing:
            self._checkpoint()

    def train(self, mode: bool = True) -> None:
        for network in self.networks.values():
            network.train(mode)

    def autocast(self) -> AbstractContextManager[Any]:
        """The plain way mixes fp32 and `dtype` as PyTorch does; the fast one is in `dtype` all through."""
        return torch.autocast(self.device.type, self.dtype, enabled=not self.fused and self.dtype != torch.float32)

    def gradients(self) -> list[Tensor]:
        """All that there are, in one piece if they are kept so."""
        if self.fused:
            return [self.fused.gradients]
        return [p.grad for network in self.networks.values() for p in network.parameters() if p.grad is not None]

    def trainable_params(self, lora: Weights) -> Weights:
        """The weights for an optimizer: as one if they lie side by side, since a thousand cost the CPU 20 ms a step."""
        return {_ALL: self.fused.weights} if self.fused else lora

    def split_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """An optimizer's state of what `trainable_params` gave, by `<what>.<weight>`, as if it had got each on its own."""
        if not self.fused:
            return state
        parts = {key.partition(".")[0]: self.fused.unflatten(value) for key, value in state.items()}
        return {f"{what}.unet.{name}": part for what, named in parts.items() for name, part in named.items()}

    def merge_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The reverse of `split_state`.

        Raises:
            KeyError: something is missing of a weight.
        """
        if not self.fused:
            return state
        parts: dict[str, dict[str, Tensor]] = {}
        for key, value in state.items():
            what, _, name = key.partition(".unet.")
            parts.setdefault(what, {})[name] = value
        return {f"{what}.{_ALL}": self.fused.flatten(named) for what, named in parts.items()}

    def __call__(self, share: Batch) -> Tensor:
        """Learn from this process's share of a step, a few pictures at once; returns the mean loss over the share.

        Where memory runs out it begins again with fewer at once, which changes results by rounding only.

        Raises:
            RuntimeError: not even one picture at a time, with checkpointing and without a graph, fits.
        """
        only_graphs = True  # may be what is in the way: those of other shapes
        while True:
            try:
                return torch.stack([self._pass(part) for part in share.split(self.at_once)]).sum()
            except RuntimeError as error:
                nothing_left = self.at_once == 1 and self.checkpointing and not self.captured
                if nothing_left or not is_out_of_memory(error):
                    raise
            # Not in the clause above, where the error holds on to what is to be freed.
            for gradient in self.gradients():
                gradient.zero_()
            if not (self.forget_graphs() and only_graphs):
                self._save_memory()
            only_graphs = False

    def _pass(self, batch: Batch) -> Tensor:
        if self.device.type == "cuda":
            batch = batch.pinned()
        if self.captured:
            try:
                return self.captured(*vars(batch).values())
            except CaptureError as error:
                if is_out_of_memory(error):
                    raise
                logger.warning("no CUDA graph here (%s): steps are several times slower at small sizes", error)
                self.captured = None
        return self._learn(batch.to(self.device))

    def _learn_from(self, *values: Tensor) -> Tensor:
        return self._learn(Batch(*values))

    def _learn(self, batch: Batch) -> Tensor:
        """Forward and backward over a batch on the device; returns its loss."""
        try:
            with self.autocast():
                loss = self.loss(batch)
            self.scaler.scale(loss).backward()
        finally:
            if self.fused:
                self.fused.side_stream.join()  # even then: a graph's capture must not end with a stream astray
        if self.fused:
            self.fused.collect_gradients()
        return loss.detach()

    def _save_memory(self) -> None:
        """One step down: a smaller part of the batch at once, then checkpointing, then no graph."""
        if self.at_once > 1:
            self.at_once = max(size for size in range(1, self.at_once) if self.at_once % size == 0)
            logger.warning("out of memory: a step still learns from as many pictures, but %d at once", self.at_once)
        elif not self.checkpointing:
            self._checkpoint()
            logger.warning("out of memory: gradient checkpointing from here on, a third slower")
        else:
            self.captured = None
            logger.warning("out of memory: no CUDA graph from here on, which takes less memory and more time")

    def forget_graphs(self) -> bool:
        """Give back the memory that graphs keep between steps, if there are any; the next step makes them anew."""
        had_any = self.captured is not None and self.captured.forget()
        models.free(self.device)
        return had_any

    def _checkpoint(self) -> None:
        self.checkpointing = True
        if self.captured:  # so that the first step with it is a plain one again
            self.captured = CudaGraphs(self._learn_from, self.device)
        # Nothing random is in the fast way, and a graph cannot be captured where generators are read.
        again = partial(checkpoint, use_reentrant=False, preserve_rng_state=not self.fused)
        for name, network in self.networks.items():
            if name == "unet":
                network.enable_gradient_checkpointing(again)
            else:
                network.gradient_checkpointing_enable()


def why_plain(config: Config, device: torch.device) -> str:
    """What of the settings the fast way cannot do, or where; empty if it can do all."""
    if device.type not in ("cuda", "cpu"):
        return f"the fast one has never been tried on {device.type}"
    if config.lora_dropout:
        return "lora_dropout drops inputs of each linear on its own"
    if config.train_text_encoder:
        return "the text encoders train too"
    if config.attention == "xformers":
        return "attention is xformers'"
    return ""
