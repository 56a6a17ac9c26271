"""How refining changed a picture, and which ones are flagged."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageFilter

from helpers import gradient
from lace_lora.drawing import refining


def lace() -> Image.Image:
    return Image.effect_noise((64, 64), 80).convert("RGB")


def test_equal_pictures_have_no_change() -> None:
    assert refining.compare(lace(), lace().copy(), 0.0)["latent_change"] == 0
    picture = lace()
    assert refining.compare(picture, picture, 0.0) == {"latent_change": 0, "edge_change": 0}
    assert refining.compare(Image.new("RGB", (64, 64)), gradient(64, 64), 1.0)["edge_change"] == 0


def test_the_picture_before_refining_is_saved_with_its_changes(tmp_path: Path) -> None:
    base, refined = lace(), lace().filter(ImageFilter.GaussianBlur(1))
    refining.save_before(tmp_path / "000", base, refined, 0.25)
    assert refining.read_changes(tmp_path / "000") == refining.compare(base, refined, 0.25)
    with Image.open(tmp_path / "000.jpg") as before:
        assert before.size == base.size


def test_without_a_base_picture_there_is_the_change_of_the_latents(tmp_path: Path) -> None:
    refining.save_before(tmp_path / "000", None, lace(), 0.25)
    assert refining.read_changes(tmp_path / "000") == {"latent_change": 0.25}
    assert [path.name for path in tmp_path.iterdir()] == ["000.json"]


@pytest.mark.parametrize("content", [None, b"", b"no JSON", b"\xff", b"[1]", b'{"latent_change": "far"}'])
def test_no_changes_where_none_were_saved(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "000.json").write_bytes(content)
    assert refining.read_changes(tmp_path / "000") == {}


def test_softer_is_below_zero_and_sharper_above() -> None:
    sharp = lace()
    soft = sharp.filter(ImageFilter.GaussianBlur(2))
    weaker, stronger = (refining.compare(*pair, 0.1)["edge_change"] for pair in ((sharp, soft), (soft, sharp)))
    assert -1 < weaker < -0.5
    assert stronger == pytest.approx(1 / (1 + weaker) - 1, rel=0.01)


@pytest.mark.parametrize(
    ("measured", "flagged"),
    [
        ([], []),
        ([{}, {}], []),
        ([{"latent_change": 0.1, "edge_change": 0.0}] * 5, []),
        ([{"latent_change": 0.1 + 0.001 * step, "edge_change": 0.05} for step in range(9)], []),
        ([*({"latent_change": 0.1 + 0.001 * step, "edge_change": 0.0} for step in range(9)),
          {"latent_change": 0.2, "edge_change": 0.0}], [9]),
        ([{"latent_change": 0.1, "edge_change": 0.0}, {"latent_change": 0.1, "edge_change": -0.2}, {}], [1]),
    ],
)  # fmt: skip
def test_outliers_are_flagged(measured: list[dict[str, Any]], flagged: list[int]) -> None:
    warnings = refining.warnings(measured)
    assert len(warnings) == len(measured)
    assert [index for index, warning in enumerate(warnings) if warning] == flagged
    assert all("refiner_strength" in warning for warning in warnings if warning)
