"""The fast way of learning against the plain one, and what happens when memory runs out."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

import batches
import lora_weights
import models
import train_lora
from captured import Captured
from config import Config
from encode import Captions
from learner import Learner, why_plain
from pictures import Make
from test_train_lora import noise_schedule, random_batch

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def make_learner(config: Config, device: torch.device = CPU, plain: bool = False) -> tuple[Learner, Any]:
    """A learner and its LoRA, which is not without effect as a new one would be."""
    dtype = models.pick_dtype(config.mixed_precision, device)
    unet = models.load_unet(config.pretrained_model, None, device, dtype)
    torch.manual_seed(0)
    lora = lora_weights.add_lora({"unet": unet}, config)
    for weight in lora.values():
        weight.data += 0.05 * torch.randn(weight.shape).to(device)
    loss = partial(train_lora._loss, config, Captions([], {}), unet, noise_schedule())
    with pytest.MonkeyPatch.context() as patch:
        if plain:
            patch.setattr("learner.why_plain", lambda _: "the test wants it")
        learner = Learner(config, {"unet": unet}, loss, device, dtype)
    assert (learner.fused is None) == plain
    return learner, lora


def norms(lora: Any, other: Any) -> float:
    """The distance of two LoRAs' gradients, by the length of the first."""
    pairs = [(lora[name].grad.float(), other[name].grad.float()) for name in lora]
    distance = sum((one - two).pow(2).sum() for one, two in pairs).sqrt()
    return float(distance / sum(one.pow(2).sum() for one, _ in pairs).sqrt())


@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True}, {"rank": 3, "lora_alpha": 7.0}])
def test_the_fast_way_learns_what_the_plain_one_does(settings: Make, changes: dict[str, Any]) -> None:
    config = settings(train_batch_size=2, **changes)
    (plain, expected), (fast, lora) = make_learner(config, plain=True), make_learner(config)
    for batch in (random_batch(4), replace(random_batch(2), weights=torch.tensor([1.0, 3.0]))):
        torch.testing.assert_close(fast(batch), plain(batch), rtol=1e-6, atol=1e-6)
    assert norms(expected, lora) < 1e-5
    assert all(weight.grad.abs().max() > 0 for weight in lora.values())


# Even in fp32, since cuDNN rounds what convolutions read to TF32.
@needs_gpu
@pytest.mark.parametrize(("precision", "tolerance"), [("no", 0.005), ("bf16", 0.05), ("fp16", 0.02)])
def test_graphs_and_kernels_learn_what_the_plain_way_does(settings: Make, precision: str, tolerance: float) -> None:
    config, gpu = settings(train_batch_size=2, mixed_precision=precision), torch.device("cuda")
    (plain, expected), (fast, lora) = make_learner(config, gpu, plain=True), make_learner(config, gpu)
    for round_ in range(4):  # a plain call, a capture, two replays
        batch = replace(random_batch(2), weights=torch.full((2,), 1.0 + round_)).pinned()
        torch.testing.assert_close(fast(batch), plain(batch), rtol=1e-2, atol=1e-3)
    assert fast.captured is not None
    assert len(fast.captured.graphs) == 1
    assert norms(expected, lora) < tolerance


@needs_gpu
def test_a_graph_for_each_shape_and_no_graph_for_what_waits() -> None:
    gpu = torch.device("cuda")
    waits = Captured(lambda batch: batch.latents.sum() * batch.latents.sum().item(), gpu)
    waits(random_batch(2).pinned())
    with pytest.raises(RuntimeError, match="captur"):
        waits(random_batch(2).pinned())
    assert torch.rand(2, device=gpu).min() > 0  # nothing of it is left behind
    captured = Captured(lambda batch: batch.latents.sum(), gpu)
    for count in (2, 3, 2, 3, 2, 3):
        batch = random_batch(count)
        torch.testing.assert_close(captured(batch.pinned()).cpu(), batch.latents.sum())
    assert len(captured.graphs) == 2


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"optimizer": "prodigy", "learning_rate": 1.0}, ""),
        ({"lora_dropout": 0.1}, "lora_dropout"),
        ({"train_text_encoder": True}, "text encoders"),
        ({"attention": "xformers"}, "xformers"),
    ],
)
def test_what_is_learnt_the_plain_way(settings: Make, changes: dict[str, Any], reason: str) -> None:
    said = why_plain(settings(**changes))
    assert reason in said
    assert bool(said) == bool(reason)


class Scarce:
    """A loss that runs out of memory, as a GPU does, with more than so many pictures without checkpointing."""

    def __init__(self, learner: Learner, most: int) -> None:
        self.learner, self.loss, self.most = learner, learner.loss, most

    def __call__(self, batch: batches.Batch) -> torch.Tensor:
        loss = self.loss(batch)
        if len(batch.caption) > self.most and not self.learner.checkpointing:
            loss.backward()  # so that something of it is left behind
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize(("most", "at_once", "checkpointing"), [(2, 2, False), (1, 1, False), (0, 1, True)])
def test_less_memory_gives_the_same_gradients(
    settings: Make, caplog: pytest.LogCaptureFixture, plain: bool, most: int, at_once: int, checkpointing: bool
) -> None:
    config = settings(train_batch_size=4, gradient_accumulation_steps=2)
    (plenty, expected), (scarce, lora) = make_learner(config, plain=plain), make_learner(config, plain=plain)
    scarce.loss = Scarce(scarce, most)
    batch = random_batch(8)
    torch.testing.assert_close(scarce(batch), plenty(batch), rtol=1e-6, atol=1e-6)
    assert norms(expected, lora) < 1e-5
    assert (scarce.at_once, scarce.checkpointing) == (at_once, checkpointing)
    assert len(caplog.records) == {2: 1, 1: 2, 0: 3}[most]


def test_when_nothing_is_left_to_save_the_error_goes_on(settings: Make) -> None:
    learner, _ = make_learner(settings(train_batch_size=2))

    def full(_: batches.Batch) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    learner.loss = full
    with pytest.raises(torch.OutOfMemoryError):
        learner(random_batch(2))
    assert learner.checkpointing


def test_other_errors_change_nothing(settings: Make) -> None:
    learner, _ = make_learner(settings(train_batch_size=2))

    def broken(_: batches.Batch) -> torch.Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    learner.loss = broken
    with pytest.raises(RuntimeError, match="mat1"):
        learner(random_batch(2))
    assert learner.at_once == 2
