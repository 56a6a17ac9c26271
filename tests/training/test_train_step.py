"""The fast way of learning against the plain one, and what happens when memory runs out."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

import train_lora
from helpers import Make
from lace_lora.config import Config
from lace_lora.fast.cuda_graph import CudaGraphs
from lace_lora.sdxl import lora_weights, models
from lace_lora.training import batches
from lace_lora.training.encode import Captions
from lace_lora.training.train_step import TrainStep, why_plain
from training_helpers import CPU, noise_schedule, random_batch


def make_learner(config: Config, device: torch.device = CPU, plain: bool = False) -> tuple[TrainStep, Any]:
    """A train_step and its LoRA, which is not without effect as a new one would be."""
    dtype = models.pick_dtype(config.mixed_precision, device)
    unet = models.load_unet(config.pretrained_model, None, device, dtype)
    torch.manual_seed(0)
    lora = lora_weights.add_lora({"unet": unet}, config)
    for weight in lora.values():
        weight.data += 0.05 * torch.randn(weight.shape).to(device)
    loss = partial(train_lora._loss, config, Captions([], {}), unet, noise_schedule())
    with pytest.MonkeyPatch.context() as patch:
        if plain:
            patch.setattr("train_step.why_plain", lambda *_: "the test wants it")
        train_step = TrainStep(config, {"unet": unet}, loss, device, dtype)
    assert (train_step.fused is None) == plain
    return train_step, lora


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
@pytest.mark.gpu
@pytest.mark.parametrize("rank", [3, 8])
@pytest.mark.parametrize(("precision", "tolerance"), [("no", 0.005), ("bf16", 0.05), ("fp16", 0.02)])
def test_graphs_and_kernels_learn_what_the_plain_way_does(
    settings: Make, precision: str, tolerance: float, rank: int
) -> None:
    config, gpu = settings(train_batch_size=2, mixed_precision=precision, rank=rank), torch.device("cuda")
    (plain, expected), (fast, lora) = make_learner(config, gpu, plain=True), make_learner(config, gpu)
    for round_ in range(4):  # a plain call, a capture, two replays
        batch = replace(random_batch(2), weights=torch.full((2,), 1.0 + round_))
        torch.testing.assert_close(fast(batch), plain(batch), rtol=1e-2, atol=1e-3)
    assert fast.captured is not None
    assert len(fast.captured.graphs) == 1
    assert norms(expected, lora) < tolerance


# As on a T4, or where Triton finds no compiler.
@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_graphs_without_kernels_learn_the_same(
    settings: Make, precision: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("Failed to find C compiler.\nPlease specify one")

    monkeypatch.setattr("gpu_kernels.try_out", fail)
    config, gpu = settings(train_batch_size=2, mixed_precision=precision), torch.device("cuda")
    (plain, expected), (fast, lora) = make_learner(config, gpu, plain=True), make_learner(config, gpu)
    assert "Failed to find C compiler" in caplog.text
    assert not any(type(module).__module__ == "gpu_kernels" for module in fast.networks["unet"].modules())
    for _ in range(4):
        batch = random_batch(2)
        torch.testing.assert_close(fast(batch), plain(batch), rtol=1e-2, atol=1e-3)
    assert fast.captured is not None
    assert fast.captured.graphs
    assert norms(expected, lora) < 0.05


@pytest.mark.gpu
def test_a_graph_for_each_shape_and_no_graph_for_what_waits() -> None:
    gpu = torch.device("cuda")
    stream = torch.cuda.current_stream()
    waits = CudaGraphs(lambda values: values.sum() * values.sum().item(), gpu)
    waits(torch.ones(2, device=gpu))
    with pytest.raises(RuntimeError, match="captur"):
        waits(torch.ones(2, device=gpu))
    assert torch.rand(2, device=gpu).min() > 0  # nothing of it is left behind
    assert torch.cuda.current_stream() == stream
    captured = CudaGraphs(lambda one, other: one.sum() - other.sum(), gpu)
    for count in (2, 3, 2, 3, 2, 3):
        one, other = torch.randn(count), torch.randn(2 * count)
        torch.testing.assert_close(captured(one.pin_memory(), other.to(gpu)).cpu(), one.sum() - other.sum())
    assert len(captured.graphs) == 2


@pytest.mark.gpu
def test_learning_that_cannot_be_captured_goes_on_without_a_graph(
    settings: Make, caplog: pytest.LogCaptureFixture
) -> None:
    config, gpu = settings(train_batch_size=2, mixed_precision="bf16"), torch.device("cuda")
    (plain, expected), (fast, lora) = make_learner(config, gpu, plain=True), make_learner(config, gpu)
    loss = fast.loss
    fast.loss = lambda batch: loss(batch) + 0 * batch.latents.sum().item()
    for _ in range(3):
        batch = random_batch(2)
        torch.testing.assert_close(fast(batch), plain(batch), rtol=1e-2, atol=1e-3)
    assert fast.captured is None
    assert "no CUDA graph here" in caplog.text
    assert norms(expected, lora) < 0.05


@pytest.mark.gpu
def test_graphs_of_other_shapes_go_before_fewer_pictures_are_learnt_at_once(settings: Make) -> None:
    train_step, _ = make_learner(settings(train_batch_size=2, mixed_precision="bf16"), torch.device("cuda"))
    square, wide = random_batch(2), random_batch(2)
    wide = replace(wide, latents=wide.latents.repeat(1, 1, 1, 2), noise=wide.noise.repeat(1, 1, 1, 2))
    loss = train_step.loss

    def scarce(batch: batches.Batch) -> torch.Tensor:
        if batch.latents.shape[-1] == wide.latents.shape[-1] and train_step.captured and train_step.captured.graphs:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss(batch)

    train_step.loss = scarce
    for batch in (square, square, square, wide):
        train_step(batch)
    assert train_step.captured is not None
    assert not train_step.captured.graphs
    train_step(square)
    assert len(train_step.captured.graphs) == 1  # at once, since that shape has been called before
    assert (train_step.at_once, train_step.checkpointing) == (2, False)


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
    for device in ("cpu", "cuda"):
        said = why_plain(settings(**changes), torch.device(device))
        assert reason in said
        assert bool(said) == bool(reason)
    assert why_plain(settings(**changes), torch.device("mps"))


class Scarce:
    """A loss that runs out of memory, as a GPU does, with more than so many pictures without checkpointing."""

    def __init__(self, train_step: TrainStep, most: int) -> None:
        self.train_step, self.loss, self.most = train_step, train_step.loss, most

    def __call__(self, batch: batches.Batch) -> torch.Tensor:
        loss = self.loss(batch)
        if len(batch.caption) > self.most and not self.train_step.checkpointing:
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
    train_step, _ = make_learner(settings(train_batch_size=2))

    def full(_: batches.Batch) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    train_step.loss = full
    with pytest.raises(torch.OutOfMemoryError):
        train_step(random_batch(2))
    assert train_step.checkpointing


def test_other_errors_change_nothing(settings: Make) -> None:
    train_step, _ = make_learner(settings(train_batch_size=2))

    def broken(_: batches.Batch) -> torch.Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    train_step.loss = broken
    with pytest.raises(RuntimeError, match="mat1"):
        train_step(random_batch(2))
    assert train_step.at_once == 2
