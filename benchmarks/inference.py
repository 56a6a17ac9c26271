"""Measure drawing on this machine's GPU, next to diffusers' own pipelines used as documented, as a Markdown table.

    python -m benchmarks.inference [--work FOLDER]

builds SDXL base and refiner at their real shapes with random weights (speed and memory do not depend on them) and a
LoRA of rank 16, and runs `main.py --mode inference` as a user would, at 1024² and 30 steps. `--work` keeps the models
for the next run (14 GB); `benchmarks/train.py` uses the same folder. The time of a picture is the difference between 40
pictures and 8, divided by 32: it includes everything except start-up. The time of 24 pictures with diffusers is
extrapolated from 4. Needs psutil, which is in requirements-dev.txt.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import train
from benchmarks.train import ROOT, Run, watch
from lace_lora.config import Config

PROMPT = "a photo of <myspecialstyle>"
PLAIN_PICTURES = 4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder to keep the models in; empty: a temporary one")
    parser.add_argument("--plain", type=Path, help=argparse.SUPPRESS)  # the plain flow, in a process of its own
    options = parser.parse_args()
    if options.plain:
        draw_plainly(options.work, options.plain)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        work = options.work or Path(folder)
        train.prepare(work, photos=0)
        with tempfile.TemporaryDirectory(dir=work) as runs:
            measure(work, Path(runs))
    return 0


def measure(work: Path, runs: Path) -> None:
    """Run everything and print the table."""
    lora = make_lora(work, runs / "lora.safetensors")
    print(f"{train.machine()}; 1024², 30 steps, bf16, with a LoRA of rank 16.\n")
    plain = watch([sys.executable, "-m", "benchmarks.inference", "--work", str(work), "--plain", str(lora)])
    run_ours(work, runs / "first", lora, "num_images=1")  # fills Triton's cache and the page cache
    whole = run_ours(work, runs / "whole", lora, "num_images=24")
    each = {}
    for flow in ("img2img", "ensemble"):
        few, many = (
            run_ours(work, runs / f"{flow}{count}", lora, f"num_images={count}", f"refiner_flow={flow}")
            for count in (8, 40)
        )
        each[flow] = (many.seconds - few.seconds) / 32
    batch_1 = run_ours(work, runs / "alone", lora, "num_images=2", "inference_batch_size=1")
    extrapolated = plain.seconds + (24 - PLAIN_PICTURES) * plain.step
    rows = [
        ("per picture, default flow", f"{plain.step:.2f} s", f"{each['img2img']:.2f} s"),
        ("per picture, ensemble flow", "", f"{each['ensemble']:.2f} s"),
        ("24 pictures, from the command to the gallery page", f"about {extrapolated:.0f} s", f"{whole.seconds:.0f} s"),
        ("peak GPU memory, batch 1", f"{plain.gpu:.1f} GiB", f"{batch_1.gpu:.1f} GiB"),
        ("peak GPU memory, batch size chosen automatically", "", f"{whole.gpu:.1f} GiB"),
        ("peak host memory", f"{plain.host:.1f} GiB", f"{whole.host:.1f} GiB"),
    ]
    print("| measurement | diffusers' pipelines | this program |\n|---|---|---|")
    for name, other, own in rows:
        print(f"| {name} | {other} | {own} |")


def run_ours(work: Path, folder: Path, lora: Path, *overrides: str) -> Run:
    command = [
        sys.executable, str(ROOT / "main.py"), "--mode", "inference", f"pretrained_model={work / 'model' / 'base'}",
        f"refiner_model={work / 'model' / 'refiner'}", f"lora_path={lora}", f"output_dir={folder}", "variant=",
        "mixed_precision=bf16", f"instance_prompt={PROMPT}", *overrides,
    ]  # fmt: skip
    run = watch(command)
    print(folder.name, run, file=sys.stderr, flush=True)
    return run


def make_lora(work: Path, path: Path) -> Path:
    """A LoRA of rank 16 for the base's UNet, made without loading its weights."""
    from diffusers import UNet2DConditionModel

    from lace_lora.sdxl import lora_weights

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(work / "model" / "base" / "unet"))
        lora_weights.add_lora({"unet": unet}, Config())
    unet.to_empty(device="cpu")
    for name, weight in unet.named_parameters():
        if "lora_" in name:
            weight.data = 0.02 * torch.randn(weight.shape)
    lora_weights.save_lora(path, lora_weights.lora_state({"unet": unet}), {})
    return path


def draw_plainly(work: Path, lora: Path) -> None:
    """Base pipeline with the LoRA, its latents to the refiner's, both on the GPU, one picture after another."""
    from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline

    model = work / "model"
    base = StableDiffusionXLPipeline.from_pretrained(model / "base", torch_dtype=torch.bfloat16).to("cuda")
    base.load_lora_weights(str(lora.parent), weight_name=lora.name)
    refiner = StableDiffusionXLImg2ImgPipeline.from_pretrained(
        model / "refiner", text_encoder_2=base.text_encoder_2, tokenizer_2=base.tokenizer_2, vae=base.vae,
        torch_dtype=torch.bfloat16,
    ).to("cuda")  # fmt: skip
    for pipeline in (base, refiner):
        pipeline.set_progress_bar_config(disable=True)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(PLAIN_PICTURES):
            began = time.monotonic()
            generator = torch.Generator("cuda").manual_seed(number)
            common = {"prompt": PROMPT, "num_inference_steps": 30, "guidance_scale": 5.0, "generator": generator}
            latents = base(**common, height=1024, width=1024, output_type="latent").images
            refiner(**common, image=latents, strength=0.2).images[0].save(Path(folder, f"{number}.png"))
            print(f"Seconds a step: {time.monotonic() - began:.3f}")
    print(f"{torch.cuda.max_memory_allocated() / train.GIB} GiB of GPU memory")


if __name__ == "__main__":
    sys.exit(main())
