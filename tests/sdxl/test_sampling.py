"""Schedulers and seeds; the latents themselves are compared as pictures in tests/drawing/test_phases.py."""

from pathlib import Path

import torch
from diffusers import EulerDiscreteScheduler

from lace_lora.sdxl import sampling


def test_the_refiners_noise_is_not_the_bases() -> None:
    base, refined = (
        torch.randn(64, generator=make([5])[0]) for make in (sampling.base_generators, sampling.refiner_generators)
    )
    assert not torch.allclose(base, refined)


def test_a_scheduler_is_the_variant_known_by_its_name(tiny: Path) -> None:
    config = EulerDiscreteScheduler.from_pretrained(tiny / "base" / "scheduler").config
    config = {**config, "algorithm_type": "dpmsolver", "predict_x0": False}
    assert sampling.make_scheduler("DPMSolverMultistepScheduler", config).config.algorithm_type == "dpmsolver++"
    assert sampling.make_scheduler("UniPCMultistepScheduler", config).config.predict_x0
