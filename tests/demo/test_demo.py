"""The demo's teaching material: textiles drawn and described as they are, no lace among them, and correct distances."""

import hashlib
import json
import random
from typing import Any

import pytest
import torch
from transformers import CLIPTokenizer

from demo import measure
from demo.making import draw_textiles, draw_threads
from demo.making.draw_textiles import COLOURS, PATTERNS, SIDE, Textile, caption, choose, draw
from demo.measure import KINDS
from helpers import ROOT

TOKEN = "myspecialstyle"


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_textile_has_its_two_colours_and_is_the_same_for_the_same_seed(pattern: str) -> None:
    fixed = {"colour": "white", "ground": "black", "figure": "solid", "material": "cotton"}
    pictures, textiles = draw(pattern, 2, 5, **fixed)
    assert pictures.shape == (2, 3, SIDE, SIDE)
    assert torch.equal(pictures, draw(pattern, 2, 5, **fixed)[0])
    assert {textile.colour for textile in textiles} == {"white"}
    for picture in pictures:
        light = (picture.float().mean(0) > 128).float().mean()
        assert light > 0.9 if pattern == "plain" else 0.03 < light < 0.97


def test_outlined_figures_cover_less_than_solid_ones() -> None:
    fixed = {"colour": "white", "ground": "black", "material": "cotton"}
    solid, outlined = (
        draw("diamonds", 2, 5, figure=figure, **fixed)[0].float().mean() for figure in ("solid", "outlined")
    )
    assert outlined < 0.7 * solid


def test_a_crop_moves_what_is_seen_and_a_small_photo_is_not_sharp() -> None:
    fixed = {"colour": "white", "ground": "black", "figure": "solid", "material": "cotton", "layout": "medallion"}

    def look(original: tuple[int, int], crop: tuple[int, int]) -> torch.Tensor:
        return draw("diamonds", 2, 5, original=original, crop=crop, **fixed)[0].float()

    def middle(pictures: torch.Tensor, dim: int) -> float:
        light = (pictures.mean(1) > 128).float().sum((0, dim))
        return float((light * torch.arange(SIDE)).sum() / light.sum())

    centred, left, top = look((512, 768), (0, 64)), look((512, 768), (0, 16)), look((384, 256), (100, 0))
    assert middle(left, 1) - middle(centred, 1) == pytest.approx(48, abs=1)
    assert middle(centred, 2) - middle(top, 2) == pytest.approx(36, abs=1)
    small, large = (look((side, side), (0, 0)).diff(dim=3).square().mean() for side in (96, 256))
    assert small < 0.7 * large


def test_corded_figures_are_lit_and_cast_a_shadow() -> None:
    fixed: dict[str, Any] = {
        "colour": "white",
        "ground": "grey",
        "material": "cotton",
        "layout": "all over",
        "original": (256, 256),
    }
    solid, corded = (draw("rings", 2, 5, figure=figure, **fixed)[0].float().mean(1) for figure in ("solid", "corded"))
    thread = solid > 190
    assert corded[thread].std() > 1.5 * solid[thread].std()
    assert corded[~thread].mean() < 0.97 * solid[~thread].mean()


def test_threads_are_the_same_for_the_same_seed_and_fine() -> None:
    pictures, textiles = draw_threads.draw(12, 3)
    assert all(textile.colour != textile.ground for textile in textiles)
    assert pictures.shape == (12, 3, SIDE, SIDE)
    assert torch.equal(pictures, draw_threads.draw(12, 3)[0])
    pixels = pictures.float() / 255
    assert measure.crispness(pixels) > 1.5 * measure.crispness(draw("plain", 12, 3)[0].float() / 255)


@pytest.mark.parametrize("layout", draw_textiles.LAYOUTS)
def test_a_layout_covers_less_than_all_over(layout: str) -> None:
    fixed = {"colour": "white", "ground": "black", "figure": "solid", "material": "cotton"}
    everywhere, there = (
        draw("diamonds", 4, 5, layout=name, **fixed)[0].float().mean((1, 2, 3)) for name in ("all over", layout)
    )
    assert torch.all(there > 15), "the darkest cloth with nothing on it is no lighter"
    assert there.mean() < 0.9 * everywhere.mean()


def test_captions_say_what_is_there_and_never_lace_nor_the_token() -> None:
    choices = random.Random(1)
    for index in range(4000):
        textile = choose(choices, list(PATTERNS)[index % len(PATTERNS)], choices.random(), {})
        text = caption(textile, choices)
        assert "lace" not in text
        assert TOKEN not in text
        if textile.pattern in ("net", "trellis"):  # with an edge they would be lace
            assert textile.layout == "all over"
        named = set(text.replace(",", "").split()) & set(COLOURS)
        assert named <= textile.colours, (text, textile)


def test_textiles_side_by_side_can_be_told_apart() -> None:
    choices = random.Random(2)
    for _ in range(500):
        textile = choose(choices, "dots", 0.5, {})
        assert {textile.colour, textile.ground} not in draw_textiles.ALIKE
        assert textile.colour != textile.ground


def test_energy_distance_grows_with_what_differs() -> None:
    generator = torch.Generator().manual_seed(0)
    one, same = torch.randn(200, 4, generator=generator), torch.randn(200, 4, generator=generator)
    distances = [measure.energy_distance(one, same + shift) for shift in (0, 1, 3)]
    assert distances[0] < 0.2 < distances[1] < distances[2]


def test_energy_distance_of_points() -> None:
    # 2 * 3 - 0 - 0, by hand: every pair across is 3 apart, every pair within is not apart.
    assert measure.energy_distance(torch.zeros(2, 1), torch.full((3, 1), 3.0)) == pytest.approx(6**0.5)


def test_crispness_is_in_grey_levels() -> None:
    steps = torch.arange(SIDE).float().expand(1, 3, SIDE, SIDE) / 255
    assert measure.crispness(steps) == pytest.approx(0.5)  # one level across, none down
    assert measure.crispness(torch.full((1, 3, 8, 8), 0.5)) == 0


def test_prompts_name_what_is_asked_for() -> None:
    for prompt, textile in measure.plain_prompts(40):
        assert textile.pattern in prompt
        assert all(colour in prompt for colour in textile.colours)


def test_prompt_adherence_counts_patterns_and_colours_separately() -> None:
    class Fixed(measure.Judge):
        def forward(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            kinds, colours = torch.zeros(len(pictures), len(KINDS)), -torch.ones(len(pictures), len(COLOURS))
            kinds[:, measure.KINDS.index("dots")] = 1
            colours[:, [list(COLOURS).index("red"), list(COLOURS).index("white")]] = 1
            return kinds, colours

    asked = [
        Textile(pattern, "red", ground, "silk", 0.5, "", "solid", "all over")
        for pattern, ground in (("dots", "white"), ("dots", "blue"), ("net", "white"), ("net", "black"))
    ]
    assert measure.prompt_adherence(Fixed(), torch.zeros(4, 3, 8, 8), asked) == (0.5, 0.5)


def test_the_model_is_small_complete_and_without_duplicates() -> None:
    files = [path for path in (ROOT / "demo" / "model").rglob("*") if path.is_file()]
    weights = {str(path.relative_to(ROOT / "demo" / "model")): path for path in files if path.suffix == ".safetensors"}
    assert len({hashlib.sha256(path.read_bytes()).digest() for path in weights.values()}) == len(weights) == 6
    assert sum(path.stat().st_size for path in weights.values()) <= 40_000_000
    assert max(path.stat().st_size for path in files) <= 20_000_000
    assert {path.suffix for path in files} == {".safetensors", ".json", ".txt", ".md"}
    assert "refiner/vae" not in str(weights), "it shares the base's"
    assert measure.lace_share(measure.load_judge(), measure.held_out_lace()) == 1


def test_the_base_draws_what_the_prompt_says() -> None:
    asked = measure.plain_prompts(20)
    pictures = measure.draw_prompts(ROOT / "demo" / "model" / "base", [prompt for prompt, _ in asked], steps=10)
    patterns, colours = measure.prompt_adherence(measure.load_judge(), pictures, [textile for _, textile in asked])
    assert patterns >= 0.75
    assert colours >= 0.8


def test_both_tokenizers_read_the_words_as_the_weights_know_them() -> None:
    base = ROOT / "demo" / "model" / "base"
    vocabularies = [json.loads((base / name / "vocab.json").read_text()) for name in ("tokenizer", "tokenizer_2")]
    assert vocabularies[0] == vocabularies[1]
    assert [vocabularies[0][f"{word}</w>"] for word in ("net", "new", "wave", "wavy")] == [839, 840, 846, 847]
    for name in ("tokenizer", "tokenizer_2"):
        tokenizer = CLIPTokenizer.from_pretrained(base / name)
        assert tokenizer("net").input_ids[1:-1] == [839]
        assert (base / name / "merges.txt").read_bytes() == (ROOT / "demo" / "making" / "merges.txt").read_bytes()
