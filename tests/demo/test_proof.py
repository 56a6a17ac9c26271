"""`make proof` in short: training on lace moves the demo's drawings to lace, and nothing else would pass for it."""

from pathlib import Path

import pytest

from demo import proof
from demo.measure import Figures

SHORT = ["max_train_steps=150", "checkpointing_steps=1000", "num_images=12", "refine=false"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Figures:
    """The token's pictures without a LoRA."""
    return proof.draw(tmp_path_factory.mktemp("base"), "base", *SHORT, *proof.WITHOUT_LORA)["base"]


def is_near_lace(pictures: Figures, base: Figures) -> bool:
    return pictures.lace >= 0.5 and pictures.distance <= 0.75 * base.distance


def test_training_on_lace_draws_lace(tmp_path: Path, base: Figures) -> None:
    proof.train(tmp_path, *SHORT)
    token = proof.draw(tmp_path, "token", *SHORT)["base"]
    assert is_near_lace(token, base), (token, base)
    assert proof.draw(tmp_path, "plain", *SHORT, *proof.WITHOUT_LORA)["base"] == base


def test_training_on_stripes_does_not(tmp_path: Path, base: Figures) -> None:
    proof.train(tmp_path, *SHORT, f"images_dir={proof.draw_stripes(tmp_path / 'stripes')}")
    token = proof.draw(tmp_path, "token", *SHORT)["base"]
    assert not is_near_lace(token, base), (token, base)


def test_a_learning_rate_next_to_zero_changes_nothing(tmp_path: Path, base: Figures) -> None:
    proof.train(tmp_path, *SHORT, "learning_rate=1e-12", "max_train_steps=40")
    token = proof.draw(tmp_path, "token", *SHORT)["base"]
    assert token.distance == pytest.approx(base.distance, abs=0.02)
    assert token.lace == base.lace == 0
