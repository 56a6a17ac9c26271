"""What training changed, after `make demo` has trained and drawn.

    python -m demo.story

draws the demo's designs once more without the LoRA, prints how close each set of pictures is to held-out lace and
how well its threads hold together, and shows them side by side in one picture, `demo/output/story.jpg`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import data_utils
import inference
from demo import measure
from demo.soundness import Soundness, soundness
from lace_lora.config import load_config
from lace_lora.pictures import gallery

HERE = Path(__file__).resolve().parent
SHOWN, SIDE, GAP, TITLE = 6, 192, 6, 30  # pictures in a row, and pixels


def main() -> None:
    """Draw without the LoRA, measure, and make the picture."""
    config = load_config(HERE / "config.yaml")
    output = Path(config.output_dir).parent
    drawn = inference.run(config)  # finished already: this only finds the folder
    without_lora = dataclasses.replace(config, lora_scale=0.0, refine=False, output_dir=str(output / "without_lora"))
    plain = inference.run(without_lora)
    sets = {
        "before: the base model, same prompt and seeds": sorted(plain.glob("base_output_*")),
        "after: with the LoRA": sorted(drawn.glob("base_output_*")),
        "after: with the LoRA, refined": sorted(drawn.glob("refined_output_*")),
    }
    print()
    for name, paths in sets.items():
        print(f"{name:46} {measure.figures(paths)}")
    lace = data_utils.list_images(Path(config.images_dir), config.image_extensions)
    _, *with_lora = sets.values()
    print_soundness(*(soundness(measure.read_pixels(paths)) for paths in (lace, *with_lora)))
    draw_story(sets | {"the lace it was trained on": lace}).save(output / "story.jpg", quality=85)
    print(f"\nside by side: {output / 'story.jpg'}\ngallery page: {drawn / gallery.PAGE}")


def print_soundness(lace: Soundness, drawn: Soundness, refined: Soundness) -> None:
    """Whether the drawings hold together as lace, and whether they are blurred, beside the lace they are to be like."""
    print()
    for what, name, digits in (
        ("loose ends per picture", "loose_ends", 0), ("loose pieces per picture", "loose_pieces", 1),
        ("thread width in pixels", "thread_width", 1),
    ):  # fmt: skip
        counts = [f"{getattr(found, name):.{digits}f}" for found in (lace, drawn, refined)]
        print("{}: {} in the lace it learnt from, {} drawn, {} refined".format(what, *counts))


def draw_story(rows: Mapping[str, Sequence[Path]]) -> Image.Image:
    """A row of pictures under each title."""
    width, height = SHOWN * (SIDE + GAP) + GAP, SIDE + GAP + TITLE
    story = Image.new("RGB", (width, len(rows) * height + GAP), "white")
    pen, font = ImageDraw.Draw(story), ImageFont.load_default(size=16)
    for row, (title, paths) in enumerate(rows.items()):
        pen.text((GAP, row * height + GAP), title, fill="black", font=font)
        for column, square in enumerate(measure.open_squares(paths[:SHOWN], SIDE)):
            story.paste(square, (GAP + column * (SIDE + GAP), row * height + TITLE))
    return story


if __name__ == "__main__":
    main()
