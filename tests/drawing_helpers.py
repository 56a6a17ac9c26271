"""Drawing in this process, for several test files."""

import gc
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image, ImageChops

from lace_lora.config import Config
from lace_lora.drawing import phases
from lace_lora.pictures.recipe import Design, Drawn

PROMPT, NEGATIVE = "a photo of <myspecialstyle>", "blurry"
Pictures = dict[tuple[int, bool], Image.Image]

gc.freeze()  # as inference.py does: else a third of the time of these tests goes into collecting garbage


def drawn(config: Config, lora: Path | None, seeds: list[int], batch_size: int = 1, prompt: str = PROMPT) -> Pictures:
    """Every picture by (seed, refined)."""
    designs = [Design(index, prompt, seed) for index, seed in enumerate(seeds)]
    groups = [designs[start : start + batch_size] for start in range(0, len(designs), batch_size)]
    pictures: Pictures = {}

    def finish(drawn: Drawn) -> None:
        both = ((False, drawn.base), (True, drawn.refined))
        pictures.update({(drawn.design.seed, is_refined): picture for is_refined, picture in both if picture})

    with tempfile.TemporaryDirectory() as latents:
        phases.draw_pictures(config, lora, groups, Path(latents), finish)
    return pictures


def difference(one: Image.Image, two: Image.Image) -> int:
    """The largest difference of any channel of any pixel, 0..255."""
    extrema: Any = ImageChops.difference(one, two).getextrema()
    return max(high for _, high in extrema)
