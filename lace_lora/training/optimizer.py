"""The LoRA's update: the optimizer, its schedule, skipping updates that are not finite, and its state as tensors."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor

from lace_lora.config import Config
from lace_lora.errors import UserError

_SHARED_STATE = ("d", "d_max", "d_numerator", "k")  # of Prodigy, for all weights; AdamW has none
_FLAT_STATE = ("s", "p0")  # of Prodigy, for each weight, but flattened

Weights = dict[str, torch.nn.Parameter]


def make_optimizer(config: Config, lora: Weights) -> torch.optim.Optimizer:
    """AdamW or Prodigy over the UNet's LoRA and, at a rate of their own, the text encoders'.

    Prodigy (Mishchenko and Defazio 2023, "Prodigy: An Expeditiously Adaptive Parameter-Free Learner") has the options
    that diffusers' scripts give it.

    Raises:
        UserError: Prodigy is selected but not installed.
    """
    prodigy = config.optimizer == "prodigy"
    rates = {True: config.learning_rate, False: config.learning_rate if prodigy else config.text_encoder_lr}
    groups = []
    for of_unet, rate in rates.items():
        weights = [weight for name, weight in lora.items() if name.startswith("unet.") == of_unet]
        groups += [{"params": weights, "lr": rate, "initial_lr": rate}] if weights else []
    options: dict[str, Any] = {
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
        "weight_decay": config.adam_weight_decay,
    }
    if not prodigy:
        return torch.optim.AdamW(groups, fused=True, **options)
    try:
        from prodigyopt import Prodigy
    except ImportError as error:
        advice = "pip install prodigyopt, or set optimizer: adamw"
        raise UserError(f"optimizer is prodigy, which is not installed: {advice}") from error
    return Prodigy(groups, decouple=True, use_bias_correction=True, safeguard_warmup=True, **options)


def rate_factor_at(config: Config) -> Callable[[int], float]:
    """The learning rate's schedule as a function of the step, so that a resumed run needs no state of it."""
    # polynomial ends at a rate of 1e-7, so it has to know the rate it begins at.
    dummy = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], max(config.learning_rate, 1e-6))
    return get_scheduler(
        config.lr_scheduler, dummy, num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_train_steps, num_cycles=config.lr_num_cycles, power=config.lr_power,
    ).lr_lambdas[0]  # fmt: skip


def update_weights(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, loss: Tensor, factor: float, max_grad_norm: float
) -> Tensor:
    """One update from the gradients; skipped where the loss or a gradient is not finite.

    Args:
        factor: of every learning rate, from the schedule.

    Returns:
        The gradients' norm before clipping.
    """
    scaler.unscale_(optimizer)
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    grad_norm = torch.nn.utils.clip_grad_norm_(weights, max_grad_norm)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    not_finite = ~(loss + grad_norm).isfinite()
    if optimizer.defaults.get("fused"):
        # It skips its step where this is 1, without waiting for the GPU; the scaler sets it itself.
        optimizer.found_inf = not_finite.float()  # type: ignore[attr-defined]
        scaler.step(optimizer)
    elif not not_finite:
        scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=False)  # CUDA graphs and the flat buffer rely on their addresses
    return grad_norm


def optimizer_state(optimizer: torch.optim.Optimizer, names: Iterable[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All that an exact resume needs: tensors by `<what>.<weight>`, and numbers for JSON."""
    state = optimizer.state_dict()
    tensors = {
        f"{key}.{name}": torch.as_tensor(value)
        for index, name in enumerate(names)
        for key, value in state["state"].get(index, {}).items()
    }
    group = state["param_groups"][0]  # Prodigy keeps the same numbers in every group
    return tensors, {key: group[key] for key in _SHARED_STATE if key in group}


def restore_optimizer(
    optimizer: torch.optim.Optimizer, names: Iterable[str], tensors: dict[str, Tensor], shared: dict[str, Any]
) -> None:
    """Restore what `optimizer_state` returned; learning rates and the like come from the settings of this run.

    Raises KeyError if the state belongs to other weights.
    """
    index_of = {name: index for index, name in enumerate(names)}
    state: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for key, value in tensors.items():
        what, _, name = key.partition(".")
        state[index_of[name]][what] = value.flatten() if what in _FLAT_STATE and value.dim() else value
    groups = [group | shared for group in optimizer.state_dict()["param_groups"]]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
