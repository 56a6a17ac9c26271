"""AdamW and Prodigy: their rates, their schedule, and their state restored bit by bit."""

import json
import sys

import pytest
import torch
from diffusers.optimization import get_scheduler

from helpers import refused
from lace_lora.config import Config
from lace_lora.training.optimizer import (
    make_optimizer,
    optimizer_state,
    rate_factor_at,
    restore_optimizer,
    update_weights,
)

SCALER = torch.amp.GradScaler("cpu", enabled=False)


def made_up() -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    names = ("unet.a", "unet.b", "text_encoder.c")
    return {name: torch.nn.Parameter(torch.randn(3, 4, generator=generator)) for name in names}


def make_steps(optimizer: torch.optim.Optimizer, lora: dict[str, torch.nn.Parameter], steps: range) -> None:
    for step in steps:
        for index, weight in enumerate(lora.values()):
            weight.grad = (weight.detach() - index) * (1 + step % 3)
        update_weights(optimizer, SCALER, torch.ones(()), 1.0, 1e9)


def test_text_encoders_have_a_rate_of_their_own() -> None:
    lora = made_up()
    config = Config(learning_rate=1e-2, text_encoder_lr=1e-3, adam_weight_decay=0.0)
    before = {name: weight.detach().clone() for name, weight in lora.items()}
    optimizer = make_optimizer(config, lora)
    for weight in lora.values():
        weight.grad = torch.ones_like(weight)
    update_weights(optimizer, SCALER, torch.ones(()), 0.5, 1e9)
    # Adam's first step is its rate, whatever the gradient.
    for name, rate in (("unet.a", 5e-3), ("unet.b", 5e-3), ("text_encoder.c", 5e-4)):
        torch.testing.assert_close(before[name] - lora[name], torch.full((3, 4), rate), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "prodigy"])
def test_a_restored_optimizer_continues_bit_by_bit(optimizer: str) -> None:
    config = Config(optimizer=optimizer, learning_rate=1.0 if optimizer == "prodigy" else 1e-2)  # type: ignore[arg-type]
    straight, parted = made_up(), made_up()
    make_steps(make_optimizer(config, straight), straight, range(40))
    first = make_optimizer(config, parted)
    make_steps(first, parted, range(25))
    tensors, numbers = optimizer_state(first, parted)
    second = make_optimizer(config, parted)
    restore_optimizer(second, parted, tensors, json.loads(json.dumps(numbers)))
    make_steps(second, parted, range(25, 40))
    assert all(map(torch.equal, straight.values(), parted.values()))


def test_prodigy_finds_the_rate_by_itself() -> None:
    lora = made_up()
    optimizer = make_optimizer(Config(optimizer="prodigy", learning_rate=1.0, adam_weight_decay=0.0), lora)
    make_steps(optimizer, lora, range(300))
    for index, weight in enumerate(lora.values()):  # the minimum that the gradients lead to
        torch.testing.assert_close(weight.detach(), torch.full((3, 4), float(index)), rtol=0, atol=0.05)
    assert optimizer.param_groups[0]["d"] > 1e-4  # from 1e-6


def test_prodigy_skips_updates_that_are_not_finite() -> None:
    lora = made_up()
    optimizer = make_optimizer(Config(optimizer="prodigy", learning_rate=1.0), lora)
    make_steps(optimizer, lora, range(3))
    before = [weight.detach().clone() for weight in lora.values()]
    for weight in lora.values():
        weight.grad = torch.full_like(weight, torch.nan)
    update_weights(optimizer, SCALER, torch.ones(()), 1.0, 1.0)
    assert all(map(torch.equal, before, lora.values()))


def test_prodigy_that_is_not_installed_is_a_one_line_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    refused(lambda: make_optimizer(Config(optimizer="prodigy", learning_rate=1.0), made_up()), "pip install prodigyopt")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cosine_with_restarts", {"num_cycles": 3}),
        ("polynomial", {"power": 2.0}),
        ("linear", {}),
        ("constant", {}),
    ],
)
def test_the_schedule_is_diffusers(name: str, options: dict[str, float]) -> None:
    settings = {f"lr_{key}": value for key, value in options.items()}
    factor = rate_factor_at(Config(lr_scheduler=name, lr_warmup_steps=4, max_train_steps=30, **settings))  # type: ignore[arg-type]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 1e-4)
    schedule = get_scheduler(name, optimizer, num_warmup_steps=4, num_training_steps=30, **options)
    for step in range(30):
        assert factor(step) == pytest.approx(schedule.get_last_lr()[0] / 1e-4, abs=1e-9)
        optimizer.step()
        schedule.step()
    if options:
        usual = rate_factor_at(Config(lr_scheduler=name, lr_warmup_steps=4, max_train_steps=30))  # type: ignore[arg-type]
        assert any(abs(factor(step) - usual(step)) > 0.1 for step in range(30))
