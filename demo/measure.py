"""Measure the demo's pictures against held-out lace, which training never saw.

    python -m demo.measure FOLDER... [--judge FILE]

prints, for the base and the refined pictures of each folder, their distance to `demo/held_out`, the share classified as
lace, their crispness, and how well their threads hold together (`demo/soundness.py`). The judge is a small classifier
trained by `demo/making/teach.py` on drawings of textiles and lace. Sets of pictures are compared in its features: by
texture statistics alone, a plain net would pass as lace.
"""

import argparse
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

import data_utils
from demo.making.draw_textiles import ALL_OVER, COLOURS, PATTERNS, SIDE, Textile, choose
from demo.soundness import soundness
from lace_lora.config import IMAGE_EXTENSIONS, Config
from lace_lora.drawing import phases
from lace_lora.pictures import image_files
from lace_lora.pictures.recipe import Design
from lace_lora.sdxl import models
from lace_lora.sdxl.vae import to_tensor

HERE = Path(__file__).resolve().parent
JUDGE_FILE = HERE / "model" / "judge.safetensors"
KINDS = [*PATTERNS, "lace", "threads"]


class Judge(nn.Module):
    """Which of `KINDS` a picture shows, and which colours; pictures are (n, 3, SIDE, SIDE) from 0 to 1."""

    spread: Tensor

    def __init__(self, widths: Sequence[int] = (3, 32, 64, 128, 192), kinds: int = len(KINDS)) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(narrow, wide, 3, 2, 1), nn.BatchNorm2d(wide), nn.ReLU(),
                nn.Conv2d(wide, wide, 3, 1, 1), nn.BatchNorm2d(wide), nn.ReLU(),
            )
            for narrow, wide in zip(widths[:-1], widths[1:], strict=True)
        )  # fmt: skip
        self.kind = nn.Linear(2 * (widths[-2] + widths[-1]), kinds)
        self.colour = nn.Linear(2 * (widths[-2] + widths[-1]), len(COLOURS))
        # The features' std over textiles, so that all weigh the same in a distance.
        self.register_buffer("spread", torch.ones(self.kind.in_features))

    def features(self, pictures: Tensor) -> Tensor:
        """Means and maxima over the last two stages, (n, d), not yet divided by `spread`."""
        maps = [pictures * 2 - 1]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return torch.cat([pooled for last in maps[-2:] for pooled in (last.mean((2, 3)), last.amax((2, 3)))], dim=1)

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the kinds (n, 22) and, each on its own, of the colours (n, 13)."""
        features = self.features(pictures)
        return self.kind(features), self.colour(features)


def load_judge(path: Path = JUDGE_FILE) -> Judge:
    """A judge of any width, so that an earlier one can say whether a change is only the new ruler's."""
    tensors = {name: value.float() for name, value in load_file(path).items()}
    widths = [3, *(len(tensors[f"stages.{stage}.0.weight"]) for stage in range(4))]
    judge = Judge(widths, len(tensors["kind.weight"]))
    judge.load_state_dict(tensors, strict=False)
    return judge.eval()


@torch.no_grad()
def in_chunks(work: Callable[[Tensor], Tensor], pictures: Tensor, size: int = 64) -> Tensor:
    return torch.cat([work(chunk) for chunk in pictures.split(size)])


def features_of(judge: Judge, pictures: Tensor) -> Tensor:
    return in_chunks(lambda chunk: judge.features(chunk) / judge.spread, pictures)


def kinds_of(judge: Judge, pictures: Tensor) -> list[str]:
    return [KINDS[index] for index in in_chunks(lambda chunk: judge(chunk)[0].argmax(1), pictures).tolist()]


def lace_share(judge: Judge, pictures: Tensor) -> float:
    """Share of the pictures that the judge classifies as lace."""
    return kinds_of(judge, pictures).count("lace") / len(pictures)


def energy_distance(one: Tensor, other: Tensor) -> float:
    """How far two sets of features (n, d) and (m, d) lie apart: 0 for sets of one distribution.

    Székely and Rizzo 2013, "Energy statistics: a class of statistics based on distances"; the root of it, with
    pairs of a picture and itself left out.
    """

    def within(features: Tensor) -> Tensor:
        return torch.cdist(features, features).sum() / (len(features) * (len(features) - 1))

    squared = 2 * torch.cdist(one, other).mean() - within(one) - within(other)
    return float(squared.clamp(min=0).sqrt())


def crispness(pictures: Tensor) -> float:
    """Mean size of the differences between neighbouring pixels' lightness, in grey levels of 255."""
    grey = pictures.mean(1)
    across, down = grey.diff(dim=2).abs().mean(), grey.diff(dim=1).abs().mean()
    return float((across + down) / 2 * 255)


def open_squares(paths: Sequence[Path], side: int = SIDE) -> list[Image.Image]:
    """Picture files, cut and resized as for training."""
    kinds = image_files.formats_of(IMAGE_EXTENSIONS)
    opened = [image_files.open_picture(path, formats=kinds)[0] for path in paths]
    return [image_files.fit(picture, (side, side))[0] for picture in opened]


def held_out_lace() -> Tensor:
    """The held-out lace, as (n, 3, SIDE, SIDE) from 0 to 1."""
    return read_pixels(data_utils.list_images(HERE / "held_out"))


def read_pixels(paths: Sequence[Path]) -> Tensor:
    """Picture files as (n, 3, SIDE, SIDE) from 0 to 1."""
    return to_pixels(open_squares(paths))


def to_pixels(pictures: Sequence[Image.Image]) -> Tensor:
    """Pictures of one size as (n, 3, h, w) from 0 to 1."""
    return torch.stack([to_tensor(picture) for picture in pictures]) / 2 + 0.5


# --- does the base model draw what the prompt says?


def plain_prompts(count: int, seed: int = 3) -> list[tuple[str, Textile]]:
    """Prompts that name a pattern and its colours plainly, and what each asks for; all patterns in turn."""
    choices = random.Random(seed)
    asked = []
    for index in range(count):
        pattern = list(PATTERNS)[index % len(PATTERNS)]
        textile = choose(choices, pattern, 0.5, {"figure": "solid", "direction": "", "layout": ALL_OVER})
        what = f"{textile.colour} {pattern} on {textile.ground}" if pattern != "plain" else f"plain {textile.colour}"
        asked.append((f"a photo of {what} {textile.material}", textile))
    return asked


def draw_prompts(model: Path, prompts: Sequence[str], lora: Path | None = None, steps: int = 20) -> Tensor:
    """One base picture for each prompt, seeds counting from 0, as (n, 3, SIDE, SIDE) from 0 to 1."""
    config = Config(
        pretrained_model=str(model), refine=False, width=SIDE, height=SIDE, num_inference_steps=steps, variant=None
    )
    designs = [Design(index, prompt, index) for index, prompt in enumerate(prompts)]
    drawn: dict[int, Any] = {}
    batches = [designs[start : start + 20] for start in range(0, len(designs), 20)]
    with tempfile.TemporaryDirectory() as folder:
        phases.draw_pictures(config, lora, batches, Path(folder), lambda d: drawn.update({d.design.index: d.base}))
    return to_pixels([drawn[index] for index in range(len(designs))])


def prompt_adherence(judge: Judge, pictures: Tensor, asked: Sequence[Textile]) -> tuple[float, float]:
    """Share of the pictures that show the pattern asked for, and share with all the colours asked for."""
    kinds = kinds_of(judge, pictures)
    seen = in_chunks(lambda chunk: judge(chunk)[1] > 0, pictures)
    names = list(COLOURS)
    patterns = sum(kind == textile.pattern for kind, textile in zip(kinds, asked, strict=True))
    colours = sum(
        all(row[names.index(colour)] for colour in textile.colours)
        for row, textile in zip(seen.tolist(), asked, strict=True)
    )
    return patterns / len(asked), colours / len(asked)


# --- do pictures look like lace?


@dataclass(frozen=True)
class Figures:
    """A set of pictures compared with the held-out lace."""

    distance: float  # energy distance in the judge's features
    lace: float  # share classified as lace
    crispness: float

    def __str__(self) -> str:
        distance = f"distance to lace {self.distance:.2f}"
        return f"{distance}, classified as lace {self.lace:.0%}, crispness {self.crispness:.1f}"


@cache
def reference(path: Path = JUDGE_FILE) -> tuple[Judge, Tensor]:
    """The judge, and the features of the held-out lace."""
    judge = load_judge(path)
    return judge, features_of(judge, held_out_lace())


def figures(paths: Sequence[Path], judge_file: Path = JUDGE_FILE) -> Figures:
    """The figures of a set of picture files."""
    judge, lace = reference(judge_file)
    pictures = read_pixels(paths)
    distance = energy_distance(features_of(judge, pictures), lace)
    return Figures(distance, lace_share(judge, pictures), crispness(pictures))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="output folders of `main.py --mode inference`")
    parser.add_argument("--judge", type=Path, default=JUDGE_FILE, help="another judge's file, such as an earlier one")
    arguments = parser.parse_args()
    models.prepare_process()
    for folder in arguments.folders:
        for kind in ("base", "refined"):
            if paths := sorted(folder.glob(f"{kind}_output_*")):
                print(f"{folder}, {kind}: {figures(paths, arguments.judge)}\n  {soundness(read_pixels(paths))}")


if __name__ == "__main__":
    main()
