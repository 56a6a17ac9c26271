"""Prove that the program teaches a style: train and draw on the demo model, and compare the pictures with lace.

    python -m demo.proof [--seeds N]

trains on `demo/lace` with `demo/config.yaml`, draws the token with and without the LoRA, and control prompts that come
as close to lace as the base can, and checks the claims that it prints against held-out lace. Then it breaks the program
in three ways: drawing without the LoRA, training with a learning rate close to zero, and training on stripes instead of
lace. None of these may pass as lace by any measure. Exit code 1 if a claim does not hold or a broken program passes.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from demo import measure
from demo.making import draw_textiles
from demo.measure import Figures
from lace_lora.config import LORA_FILE
from lace_lora.sdxl import models

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
WITHOUT_LORA = ["lora_scale=0", "refine=false"]
# The prompts closest to lace that the base knows, on backgrounds as varied as the lace's.
CONTROL = "prompt=[" + ", ".join(
    f'"{what} on {ground} cotton"'
    for ground in ("black", "navy", "brown", "green")
    for what in ("white net", "embroidered white net", "white trellis")
) + "]"  # fmt: skip
SEED = 1000  # not the demo's, by which its settings were chosen
LACE, NEARER, FARTHER, ADHERENCE, UNCHANGED = 0.4, 0.45, 0.02, 0.4, 0.02


def train(folder: Path, *overrides: str) -> None:
    """A LoRA in `folder/lora`."""
    run("train", f"lora_output_dir={folder / 'lora'}", "validation_steps=0", f"seed={SEED}", *overrides)


def draw(folder: Path, name: str, *overrides: str) -> dict[str, Figures]:
    """Draw with the folder's LoRA, and measure the base pictures and, if there are any, the refined ones."""
    drawn = folder / name
    run("inference", f"lora_output_dir={folder / 'lora'}", f"output_dir={drawn}", f"seed={SEED}", *overrides)
    found = {kind: sorted(drawn.glob(f"{kind}_output_*")) for kind in ("base", "refined")}
    return {kind: measure.figures(paths) for kind, paths in found.items() if paths}


def run(mode: str, *overrides: str) -> None:
    """`python main.py`, its output shown only when it fails."""
    command = [sys.executable, str(ROOT / "main.py"), "--mode", mode, "--config", str(HERE / "config.yaml"), *overrides]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{done.stdout}{done.stderr}\n{mode} ended with exit code {done.returncode}")


def draw_stripes(folder: Path, count: int = 48) -> Path:
    """Striped cloth instead of lace."""
    folder.mkdir()
    pictures, _ = draw_textiles.draw("stripes", count, seed=0)
    for index, picture in enumerate(pictures):
        draw_textiles.sheet(picture[None], 1).save(folder / f"stripes_{index:02d}.jpg", quality=95)
    return folder


def adherence(lora: Path, prompts: int) -> float:
    """The share of other prompts whose pattern is drawn correctly with the LoRA loaded."""
    asked = measure.plain_prompts(prompts, seed=4)
    pictures = measure.draw_prompts(HERE / "model" / "base", [prompt for prompt, _ in asked], lora)
    return measure.prompt_adherence(measure.reference()[0], pictures, [textile for _, textile in asked])[0]


def near_lace(pictures: Figures, base: Figures) -> dict[str, bool]:
    """The claims about the token's pictures, and whether they hold."""
    return {
        f"at least {LACE:.0%} classified as lace": pictures.lace >= LACE,
        f"at most {NEARER:.0%} of the base's distance to lace": pictures.distance <= NEARER * base.distance,
    }


def report(title: str, pictures: dict[str, Figures], claims: dict[str, bool]) -> None:
    print(f"\n{title}")
    for name, figures in pictures.items():
        print(f"  {name:8} {figures}")
    for claim, holds in claims.items():
        print(f"  {'holds' if holds else 'FAILS'}: {claim}", flush=True)


def prove(folder: Path, seeds: int) -> bool:
    """Whether all claims hold for the unmodified program, and those about lace fail for every broken one."""
    count = f"num_images={seeds}"
    train(folder)
    base = draw(folder, "base", count, *WITHOUT_LORA)["base"]
    control = draw(folder, "control", count, *WITHOUT_LORA, CONTROL)["base"]
    token = draw(folder, "token", count)
    lora, refined = token["base"], token["refined"]
    followed = adherence(folder / "lora" / LORA_FILE, seeds)
    claims = near_lace(lora, base) | {
        "closer to lace than the control prompts": lora.distance < control.distance,
        f"refining adds at most {FARTHER:.0%} of the base's distance to lace": refined.distance
        <= lora.distance + FARTHER * base.distance,
        "refined is crisper": refined.crispness > lora.crispness,
        f"the LoRA follows {followed:.0%} of other prompts, at least {ADHERENCE:.0%}": followed >= ADHERENCE,
    }
    report("unmodified program", {"base": base, "control": control, "LoRA": lora, "refined": refined}, claims)

    unchanged = all(
        [
            is_detected(folder, base, count, "drawn without the LoRA", drawing=["lora_scale=0"], as_base=True),
            is_detected(folder, base, count, "a learning rate close to zero", ["learning_rate=1e-12"], as_base=True),
        ]
    )
    stripes = draw_stripes(folder / "stripes")
    other_style = is_detected(folder, base, count, "stripes instead of lace", [f"images_dir={stripes}"])
    return all(claims.values()) and unchanged and other_style


def is_detected(
    folder: Path, base: Figures, count: str, how: str, training: Sequence[str] = (), drawing: Sequence[str] = (),
    as_base: bool = False,
) -> bool:  # fmt: skip
    """Whether a broken program's pictures fail every claim about lace and, where it learns nothing, stay the base's."""
    if training:
        folder = folder / how.replace(" ", "-")
        train(folder, *training)
    pictures = draw(folder, how, count, "refine=false", *drawing)["base"]
    claims = near_lace(pictures, base)
    report(f"broken on purpose: {how}", {"token": pictures}, claims)
    if as_base and (abs(pictures.distance - base.distance) > UNCHANGED or pictures.lace != base.lace):
        print("  FAILS: the pictures are the same as the base's", flush=True)
        return False
    return not any(claims.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=48, help="pictures in each set (default: 48)")
    seeds = parser.parse_args().seeds
    models.prepare_process()
    with tempfile.TemporaryDirectory() as folder:
        is_proven = prove(Path(folder), seeds)
    print("\n" + ("proven" if is_proven else "NOT PROVEN"))
    return 0 if is_proven else 1


if __name__ == "__main__":
    sys.exit(main())
