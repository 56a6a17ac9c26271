"""The fast training step against the plain one, and what happens when memory runs out."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from helpers import Make
from lace_lora.config import Config
from lace_lora.sdxl import lora_weights, models
from lace_lora.training import batches
from lace_lora.training.loss import training_loss
from lace_lora.training.train_step import TrainStep, reason_for_eager
from training_helpers import CPU, noise_schedule, random_batch


def make_train_step(config: Config, device: torch.device = CPU, plain: bool = False) -> tuple[TrainStep, Any]:
    """A train step and its LoRA, which is not without effect as a new one would be."""
    dtype = models.pick_dtype(config.mixed_precision, device)
    unet = models.load_unet(config.pretrained_model, None, device, dtype)
    torch.manual_seed(0)
    lora = lora_weights.add_lora({"unet": unet}, config)
    for weight in lora.values():
        weight.data += 0.05 * torch.randn(weight.shape).to(device)
    loss = partial(training_loss, unet, noise_scheduler=noise_schedule(), snr_gamma=config.snr_gamma)
    with pytest.MonkeyPatch.context() as patch:
        if plain:
            patch.setattr("lace_lora.training.train_step.reason_for_eager", lambda *_: "the test asks for it")
        train_step = TrainStep(config, {"unet": unet}, loss, device, dtype)
    assert (train_step.fused is None) == plain
    return train_step, lora


def distance(lora: Any, other: Any) -> float:
    """Of two LoRAs' gradients, relative to the norm of the first."""
    pairs = [(lora[name].grad.float(), other[name].grad.float()) for name in lora]
    difference = sum((one - two).pow(2).sum() for one, two in pairs).sqrt()
    return float(difference / sum(one.pow(2).sum() for one, _ in pairs).sqrt())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_checkpointing": True},
        {"rank": 3, "lora_alpha": 7.0},
        {"lora_targets": "attention+feedforward"},
        {"lora_targets": "attention+feedforward", "gradient_checkpointing": True},
    ],
)
def test_the_fast_step_has_the_gradients_of_the_plain_one(settings: Make, changes: dict[str, Any]) -> None:
    config = settings(train_batch_size=2, **changes)
    (plain, expected), (fast, lora) = make_train_step(config, plain=True), make_train_step(config)
    for batch in (random_batch(4), replace(random_batch(2), weights=torch.tensor([1.0, 3.0]))):
        torch.testing.assert_close(fast(batch), plain(batch), rtol=1e-6, atol=1e-6)
    assert distance(expected, lora) < 1e-5
    assert all(weight.grad.abs().max() > 0 for weight in lora.values())


# Even in fp32, since cuDNN rounds what convolutions read to TF32.
@pytest.mark.gpu
@pytest.mark.parametrize("targets", ["attention", "attention+feedforward"])
@pytest.mark.parametrize("rank", [3, 8])
@pytest.mark.parametrize(("precision", "tolerance"), [("no", 0.005), ("bf16", 0.05), ("fp16", 0.02)])
def test_graphs_and_kernels_have_the_gradients_of_the_plain_step(
    settings: Make, precision: str, tolerance: float, rank: int, targets: str
) -> None:
    config = settings(train_batch_size=2, mixed_precision=precision, rank=rank, lora_targets=targets)
    gpu = torch.device("cuda")
    (plain, expected), (fast, lora) = make_train_step(config, gpu, plain=True), make_train_step(config, gpu)
    for round_ in range(4):  # a warm-up, a capture, two replays
        batch = replace(random_batch(2), weights=torch.full((2,), 1.0 + round_))
        torch.testing.assert_close(fast(batch), plain(batch), rtol=1e-2, atol=1e-3)
    assert fast.cuda_graphs is not None
    assert len(fast.cuda_graphs.graphs) == 1
    assert distance(expected, lora) < tolerance


# As on a T4, or where Triton finds no compiler.
@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_graphs_without_kernels_have_them_too(
    settings: Make, precision: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("Failed to find C compiler.\nPlease specify one")

    monkeypatch.setattr("lace_lora.fast.kernels.Geglu.apply", fail)
    config, gpu = settings(train_batch_size=2, mixed_precision=precision), torch.device("cuda")
    (plain, expected), (fast, lora) = make_train_step(config, gpu, plain=True), make_train_step(config, gpu)
    assert "Failed to find C compiler" in caplog.text
    assert not any("forward" in vars(module) for module in fast.networks["unet"].modules())  # none is patched
    for _ in range(4):
        batch = random_batch(2)
        torch.testing.assert_close(fast(batch), plain(batch), rtol=1e-2, atol=1e-3)
    assert fast.cuda_graphs is not None
    assert fast.cuda_graphs.graphs
    assert distance(expected, lora) < 0.05


@pytest.mark.gpu
def test_a_step_that_cannot_be_captured_runs_without_a_graph(settings: Make, caplog: pytest.LogCaptureFixture) -> None:
    config, gpu = settings(train_batch_size=2, mixed_precision="bf16"), torch.device("cuda")
    (plain, expected), (fast, lora) = make_train_step(config, gpu, plain=True), make_train_step(config, gpu)
    loss = fast.loss
    fast.loss = lambda batch: loss(batch) + 0 * batch.latents.sum().item()
    for _ in range(3):
        batch = random_batch(2)
        torch.testing.assert_close(fast(batch), plain(batch), rtol=1e-2, atol=1e-3)
    assert fast.cuda_graphs is None
    assert "CUDA graphs failed" in caplog.text
    assert distance(expected, lora) < 0.05


@pytest.mark.gpu
def test_graphs_of_other_shapes_go_before_micro_batches_get_smaller(settings: Make) -> None:
    train_step, _ = make_train_step(settings(train_batch_size=2, mixed_precision="bf16"), torch.device("cuda"))
    square, wide = random_batch(2), random_batch(2)
    wide = replace(wide, latents=wide.latents.repeat(1, 1, 1, 2), noise=wide.noise.repeat(1, 1, 1, 2))
    loss = train_step.loss

    def out_of_memory(batch: batches.Batch) -> torch.Tensor:
        if (
            batch.latents.shape[-1] == wide.latents.shape[-1]
            and train_step.cuda_graphs
            and train_step.cuda_graphs.graphs
        ):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss(batch)

    train_step.loss = out_of_memory
    for batch in (square, square, square, wide):
        train_step(batch)
    assert train_step.cuda_graphs is not None
    assert not train_step.cuda_graphs.graphs
    train_step(square)
    assert len(train_step.cuda_graphs.graphs) == 1  # without another warm-up, since that shape has had one
    assert (train_step.micro_batch_size, train_step.checkpointing) == (2, False)


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
def test_settings_that_need_the_eager_step(settings: Make, changes: dict[str, Any], reason: str) -> None:
    for device in ("cpu", "cuda"):
        given = reason_for_eager(settings(**changes), torch.device(device))
        assert reason in given
        assert bool(given) == bool(reason)
    assert reason_for_eager(settings(**changes), torch.device("mps"))


class LossOutOfMemory:
    """A loss that runs out of memory, as a GPU does, for more than `most` pictures without checkpointing."""

    def __init__(self, train_step: TrainStep, most: int) -> None:
        self.train_step, self.loss, self.most = train_step, train_step.loss, most

    def __call__(self, batch: batches.Batch) -> torch.Tensor:
        loss = self.loss(batch)
        if len(batch.caption) > self.most and not self.train_step.checkpointing:
            loss.backward()  # which leaves gradients behind
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss


@pytest.mark.parametrize("plain", [False, True])
def test_less_memory_gives_the_same_gradients(settings: Make, caplog: pytest.LogCaptureFixture, plain: bool) -> None:
    config, batch = settings(train_batch_size=4, gradient_accumulation_steps=2), random_batch(8)
    plenty, expected = make_train_step(config, plain=plain)
    loss = plenty(batch)
    for most, micro_batch_size, checkpointing in ((2, 2, False), (1, 1, False), (0, 1, True)):
        limited, lora = make_train_step(config, plain=plain)
        limited.loss = LossOutOfMemory(limited, most)
        caplog.clear()
        torch.testing.assert_close(limited(batch), loss, rtol=1e-6, atol=1e-6)
        assert distance(expected, lora) < 1e-5, most
        assert (limited.micro_batch_size, limited.checkpointing) == (micro_batch_size, checkpointing)
        assert len(caplog.records) == {2: 1, 1: 2, 0: 3}[most]


def test_without_memory_savers_left_the_error_is_raised(settings: Make) -> None:
    train_step, _ = make_train_step(settings(train_batch_size=2))

    def full(_: batches.Batch) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    train_step.loss = full
    with pytest.raises(torch.OutOfMemoryError):
        train_step(random_batch(2))
    assert train_step.checkpointing


def test_other_errors_are_raised_unchanged(settings: Make) -> None:
    train_step, _ = make_train_step(settings(train_batch_size=2))

    def broken(_: batches.Batch) -> torch.Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    train_step.loss = broken
    with pytest.raises(RuntimeError, match="mat1"):
        train_step(random_batch(2))
    assert train_step.micro_batch_size == 2
