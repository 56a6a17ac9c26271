"""Show on the demo model what prior preservation does: how far the class pictures drift while a style is trained.

    python -m benchmarks.prior_preservation [--steps 300] [--pictures 24] [key=value ...]

trains on the demo's lace without and with `with_prior_preservation`, draws the class's prompt with the base and with
both LoRAs from the same seeds, and prints the mean pixel difference to the base's pictures, and how close the token's
pictures come to lace. Exit code 1 unless prior preservation at least halves the drift.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageChops, ImageStat

from demo import proof

CLASS_PROMPT = "a photo of fabric"
MAX_DRIFT = 0.5  # share of the drift without it


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--pictures", type=int, default=24)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, for training and drawing")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        drifts = measure(Path(folder), options.steps, options.pictures, options.overrides)
    return int(drifts["with"] > MAX_DRIFT * drifts["without"])


def measure(folder: Path, steps: int, pictures: int, overrides: Sequence[str] = ()) -> dict[str, float]:
    """Drift of the class pictures (mean pixel difference, 0 to 255) without and with prior preservation."""
    common = ["refine=false", f"max_train_steps={steps}", f"num_images={pictures}", *overrides]
    prior = ["with_prior_preservation=true", f"class_prompt={CLASS_PROMPT}", f"num_class_images={pictures}"]
    of_class = f"prompt={CLASS_PROMPT}"
    proof.draw(folder, "base", *common, of_class, *proof.WITHOUT_LORA)
    print("| prior preservation | drift of the class pictures | token's distance to lace | classified as lace |")
    print("|---|---|---|---|")
    drifts = {}
    for name, extra in (("without", []), ("with", prior)):
        run = folder / name
        proof.train(run, *common, *extra)
        token = proof.draw(run, "token", *common)["base"]
        proof.draw(run, "class", *common, of_class)
        drifts[name] = drift(folder / "base", run / "class")
        print(f"| {name} | {drifts[name]:.1f} | {token.distance:.2f} | {token.lace:.0%} |", flush=True)
    return drifts


def drift(one: Path, other: Path) -> float:
    """Mean pixel difference between pictures of the same names."""
    differences = []
    for path in sorted(one.glob("base_output_*")):
        with Image.open(path) as first, Image.open(other / path.name) as second:
            differences += ImageStat.Stat(ImageChops.difference(first, second)).mean
    return sum(differences) / len(differences)


if __name__ == "__main__":
    sys.exit(main())
