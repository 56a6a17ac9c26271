"""Packages that a training needs are looked for before anything else."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import train
from helpers import Make, names, refused


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Hides a package, as if it were not installed."""
    find_spec = importlib.util.find_spec

    def hide(package: str) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else find_spec(name))

    return hide


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize(
    ("package", "changes", "otherwise"),
    [
        ("torch", {}, ""),
        ("accelerate", {}, ""),
        ("matplotlib", {}, ""),
        ("tensorboard", {"report_to": "tensorboard"}, ", or set report_to: none"),
        ("prodigyopt", {"optimizer": "prodigy", "learning_rate": 1.0}, ", or set optimizer: adamw"),
        ("xformers", {"attention": "xformers"}, ", or set attention: auto"),
    ],
)
def test_a_missing_package_is_reported_before_a_picture_is_opened(
    package: str, changes: dict[str, Any], otherwise: str, dry_run: bool, without: Callable[[str], None],
    settings: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    without(package)
    message = refused(lambda: train.run(settings(**changes), dry_run), package)
    assert message == f"{package} is not installed: run `pip install {package}`{otherwise}"
    assert capsys.readouterr().out == ""
    assert "lora" not in names(tmp_path)


@pytest.mark.parametrize("package", ["tensorboard", "prodigyopt", "xformers"])
def test_a_package_that_is_not_used_may_be_missing(
    package: str, without: Callable[[str], None], settings: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    without(package)
    train.run(settings(), dry_run=True)
    assert "Would start at step 0" in capsys.readouterr().out
