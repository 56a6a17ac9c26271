"""Schedulers and seeds; the latents themselves are compared as pictures in tests/drawing/test_phases.py."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler

from helpers import Make, refused
from lace_lora.sdxl import sampling


def test_the_refiners_noise_is_not_the_bases(settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    class Pipeline:
        def __call__(self, *, generator: list[torch.Generator], **_: Any) -> SimpleNamespace:
            return SimpleNamespace(images=torch.randn(64, generator=generator[0]))

    monkeypatch.setattr(sampling, "_pipeline", lambda *_, **__: Pipeline())
    base = sampling.base_latents(None, None, {}, [5], settings())
    refined = sampling.refined_latents(None, None, None, {}, base, [5], settings())
    assert torch.equal(base, torch.randn(64, generator=torch.Generator().manual_seed(5)))
    assert not torch.allclose(base, refined)


def test_a_scheduler_is_the_variant_known_by_its_name(tiny: Path) -> None:
    config = EulerDiscreteScheduler.from_pretrained(tiny / "base" / "scheduler").config
    for name, change in (
        ("UniPCMultistepScheduler", {"solver_type": 5}),
        ("EulerDiscreteScheduler", {"beta_end": "x"}),
    ):
        refused(lambda n=name, c=change: sampling.make_scheduler(n, {**config, **c}), "cannot use the model's")  # type: ignore[misc]
    config = {**config, "algorithm_type": "dpmsolver", "predict_x0": False}
    assert sampling.make_scheduler("DPMSolverMultistepScheduler", config).config.algorithm_type == "dpmsolver++"
    assert sampling.make_scheduler("UniPCMultistepScheduler", config).config.predict_x0
