"""`make proof` in short: training on lace moves the demo's pictures to lace, and drawing without the LoRA does not.

`make proof` itself, which takes much longer, also trains on stripes and with a learning rate close to zero.
"""

from pathlib import Path

import pytest

import inference
from demo import measure, proof
from demo.measure import Figures
from helpers import ROOT
from lace_lora.config import load_config


def draw(folder: Path, name: str, *overrides: str) -> Figures:
    """A few base pictures of the token, drawn in this process."""
    config = load_config(
        proof.HERE / "config.yaml",
        [
            f"lora_output_dir={folder / 'lora'}", f"output_dir={folder / name}", f"seed={proof.SEED}",
            "num_images=8", "num_inference_steps=10", "refine=false", *overrides,
        ],
    )  # fmt: skip
    return measure.figures(sorted(inference.run(config).glob("base_output_*")))


def is_near_lace(pictures: Figures, base: Figures) -> bool:
    return pictures.distance <= 0.7 * base.distance  # so few steps make nothing that the judge classifies as lace


def test_training_on_lace_draws_lace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    # Half the batch and twice the learning rate of the demo, which is enough to see it.
    proof.train(tmp_path, "max_train_steps=80", "train_batch_size=2", "learning_rate=4e-3", "checkpointing_steps=1000")
    token, base = draw(tmp_path, "token"), draw(tmp_path, "base", "lora_scale=0")
    assert is_near_lace(token, base), (token, base)
    assert not is_near_lace(base, base)
    assert base.lace == 0
