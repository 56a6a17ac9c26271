"""Train the demo's tiny SDXL on textiles that are drawn on the fly: about half an hour on four H100s.

    python -m demo.making.teach [--work FOLDER] [--until STAGE]

runs the stages in `STAGES` in order and saves each one's result in the work folder (`demo/teaching`), so that the same
command resumes at the first missing stage; the last one writes `demo/model`. Seeds and numbers of steps are fixed. The
base never sees lace, nor the demo's token: that is left for the LoRA. `--small` is a smoke test: it runs everything in
miniature, and writes `model` into the work folder. Several GPUs work together, each on drawings of its own:
`torchrun --nproc-per-node 4 -m demo.making.teach`. One GPU learns from a quarter as much.
"""

import argparse
import json
import math
import multiprocessing
import os
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import CLIPTokenizer

from demo import measure
from demo.making import build_model, draw_lace, draw_threads
from demo.making.draw_textiles import COLOURS, FINE, PATTERNS, SIDE, Textile, caption, draw
from demo.making.learning import Critic, DiffusionBatch, Trainer, difference, diffusion_loss, progress, say, tokenize
from lace_lora.sdxl import models

DEMO = Path(__file__).resolve().parents[1]
SCALING_FACTOR = 0.13025  # SDXL's; the latents are brought to its scale, not the factor to the latents
CAPTIONS = 3  # ways each picture is described
TEST_SEED, LACE_SEED = 90_000, 7000
SMOOTHNESS = 0.5  # weight of what is wrong with pictures made of shrunk latents
DIVERGENCE = 3e-4  # weight of the latents' distance from a normal distribution
CRISPER = 0.2  # of the difference to sharpened pictures: guidance makes four times as much of it
REFINED_TIMESTEPS = 200  # SDXL's refiner knows the last 200 of 1000 only


@dataclass(frozen=True)
class Amounts:
    """How much of everything in each process: `FULL` for the real thing."""

    at_once: int  # pictures drawn at once
    drawings: int  # of each pattern, times `at_once`
    threads: int  # drawings of threads, times `at_once`
    lace: int  # pictures for the judge
    vae: int  # steps
    decoder: int
    judge: int
    unet: int
    polish: int
    refiner: int
    refined: int  # drawings for it
    batch: int  # of the UNets; the others' are shares of it
    prompts: int


FULL = Amounts(
    64, 24, 110, 384, vae=10_000, decoder=1500, judge=3000, unet=26_000, polish=10_000, refiner=4000, refined=8000,
    batch=128, prompts=200,
)  # fmt: skip
SMALL = Amounts(2, 1, 3, 8, vae=3, decoder=3, judge=3, unet=3, polish=3, refiner=3, refined=6, batch=12, prompts=4)


@dataclass
class Workshop:
    """Where the stages' results lie, and what they share."""

    folder: Path
    amounts: Amounts
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    process: PartialState = field(default_factory=partial(PartialState, cpu=not torch.cuda.is_available()))
    figures: dict[str, float] = field(default_factory=dict)

    def seed(self) -> None:
        """Begin the random numbers anew, in every process with others."""
        torch.manual_seed(self.process.process_index)
        random.seed(self.process.process_index)

    def path(self, stage: str) -> Path:
        return self.folder / f"{stage}.safetensors"

    def save(self, stage: str, **networks: nn.Module) -> None:
        states = {name: network.state_dict() for name, network in networks.items()}
        self.write(stage, {f"{name}.{key}": value for name, state in states.items() for key, value in state.items()})

    def write(self, stage: str, tensors: dict[str, Tensor]) -> None:
        if self.process.is_main_process:
            save_file(
                {name: value.detach().half().cpu().contiguous() for name, value in tensors.items()}, self.path(stage)
            )

    def load(self, stage: str, **networks: nn.Module) -> None:
        tensors = load_file(self.path(stage))
        for name, network in networks.items():
            own = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
            network.float().to(self.device).eval().load_state_dict(own)

    def note(self, **figures: float) -> None:
        """Print figures and save them for the model card."""
        self.figures |= {name: round(value, 4) for name, value in figures.items()}
        say(", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
        if self.process.is_main_process:
            (self.folder / "figures.json").write_text(json.dumps(self.figures, indent=2) + "\n")

    @cached_property
    def tokenizers(self) -> tuple[CLIPTokenizer, CLIPTokenizer]:
        with tempfile.TemporaryDirectory() as folder:
            return build_model.write_tokenizers(Path(folder))

    @cached_property
    def parts(self) -> build_model.Parts:
        """All networks as they begin, in fp32, the same in every process."""
        with torch.device(self.device):
            parts = build_model.make_parts(build_model.TINY, self.tokenizers[0], seed=0)
        self.seed()
        return parts

    @cached_property
    def drawings(self) -> tuple[Tensor, list[Textile]]:
        """What to learn from, uint8 (n, 3, SIDE, SIDE): textiles, pattern after pattern, then threads."""
        seed = 1000 + 10_000 * self.process.process_index
        return draw_all(self.amounts.drawings, self.amounts.threads, self.amounts.at_once, seed, self.device)

    @cached_property
    def threads(self) -> Tensor:
        """Which drawings are of threads."""
        count = self.amounts.threads * self.amounts.at_once
        return torch.arange(len(self.drawings[0]) - count, len(self.drawings[0]), device=self.device)

    @cached_property
    def fine(self) -> Tensor:
        """Which drawings have fine lines."""
        is_fine = [textile.pattern in FINE or textile.figure != "solid" for textile in self.drawings[1]]
        return torch.tensor(is_fine, device=self.device).nonzero()[:, 0]

    @cached_property
    def vae(self) -> AutoencoderKL:
        """The finished VAE."""
        self.load("decoder", vae=self.parts.vae)
        return self.parts.vae

    @cached_property
    def latents(self) -> Tensor:
        """Of all drawings, (n, 4, SIDE / 8, SIDE / 8), in the UNet's scale."""
        return encode(self.vae, self.drawings[0])

    @cached_property
    def views(self) -> Tensor:
        """Height and width of every drawing's photo, and top and left of the drawing in it, (n, 4)."""
        return torch.tensor([[*textile.original, *textile.crop] for textile in self.drawings[1]], device=self.device)

    @cached_property
    def captions(self) -> tuple[Tensor, Tensor]:
        """Token ids of every drawing's captions by both tokenizers, each (n, CAPTIONS, 77)."""
        return describe(self.drawings[1], self.tokenizers, self.device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=DEMO / "teaching", help="folder for the stages' results")
    parser.add_argument("--until", choices=STAGES, default="assemble", help="the last stage to run")
    parser.add_argument("--small", action="store_true", help="everything in miniature")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    models.prepare_process()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    workshop = Workshop(arguments.work, SMALL if arguments.small else FULL)
    if (arguments.work / "figures.json").exists():
        workshop.figures = json.loads((arguments.work / "figures.json").read_text())
    for name, stage in STAGES.items():
        if not workshop.path(name).exists():
            say(name)
            workshop.seed()
            start = time.monotonic()
            stage(workshop)
            workshop.note(**{f"{name}_seconds": time.monotonic() - start})
            workshop.process.wait_for_everyone()
        if name == arguments.until:
            return


# --- stages


def teach_vae(work: Workshop) -> None:
    """Encoder and decoder together, on cuts of all kinds of drawings; then the latents' scale is made SDXL's.

    Latents at half their size are to be the latents of the picture at half its size: without that, most of what they
    say lies in differences between neighbours, which are noise to a UNet. Kouzelis et al. 2025, "EQ-VAE".
    """
    vae, pictures = work.parts.vae, work.drawings[0]
    trainer = Trainer([vae], 1e-3, work.amounts.vae, averaging=0.998)

    def loss(pixels: Tensor) -> Tensor:
        mean, log_variance = vae.quant_conv(vae.encoder(pixels.bfloat16())).float().chunk(2, dim=1)
        latents = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        rebuilt = vae.decoder(vae.post_quant_conv(latents.bfloat16())).float()
        half = len(pixels) // 2
        shrunk_latents, shrunk_pixels = (F.avg_pool2d(each[:half], 2) for each in (latents, pixels))
        smaller = vae.decoder(vae.post_quant_conv(shrunk_latents.bfloat16())).float()
        divergence = (mean.square() + log_variance.exp() - 1 - log_variance).mean() / 2
        return difference(rebuilt, pixels) + SMOOTHNESS * difference(smaller, shrunk_pixels) + DIVERGENCE * divergence

    # Small cuts first, many at once; whole pictures at the end, for what is far apart in them.
    for side, share, size in ((SIDE // 2, 0.7, 0.375), (SIDE, 0.3, 0.125)):
        pixels = torch.empty(max(3, int(work.amounts.batch * size)), 3, side, side, device=work.device)
        trainer.run(share, partial(loss, pixels), partial(fill_with_cuts, pixels, pictures, work.threads))
    trainer.finish()
    standardise_latents(vae, pictures)
    report_vae(work, vae)
    work.save("vae", vae=vae)


def teach_decoder(work: Workshop) -> None:
    """The decoder alone, against a critic that tells blurred pictures from sharp ones; the latents stay as they are.

    Each process has a critic of its own.
    """
    vae, pictures = work.parts.vae, work.drawings[0]
    work.load("vae", vae=vae)
    decoder = nn.ModuleList([vae.decoder, vae.post_quant_conv])
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    critic = Critic().to(work.device)
    trainer = Trainer([decoder], 4e-4, work.amounts.decoder, averaging=0.998)
    rival = torch.optim.AdamW(critic.parameters(), 4e-4, betas=(0.5, 0.99))
    vae.encoder.bfloat16()
    vae.quant_conv.bfloat16()
    pixels = torch.empty(max(3, work.amounts.batch // 6), 3, SIDE // 2, SIDE // 2, device=work.device)

    def step() -> None:
        fill_with_cuts(pixels, pictures, work.threads)
        with torch.no_grad():
            latents = vae.quant_conv(vae.encoder(pixels.bfloat16())).chunk(2, dim=1)[0]
            # A sampled latent is never quite what the encoder would have made.
            latents = latents + 0.02 * latents.std() * torch.randn_like(latents)
        rebuilt = vae.decoder(vae.post_quant_conv(latents)).float()
        with torch.autocast(work.device, torch.bfloat16):
            (difference(rebuilt, pixels) - 0.03 * critic(rebuilt).float().mean()).backward()
            trainer.step()
            rival.zero_grad()
            real, fake = critic(pixels).float(), critic(rebuilt.detach()).float()
            (F.relu(1 - real).mean() + F.relu(1 + fake).mean()).backward()
        rival.step()

    for _ in progress("decoder", work.amounts.decoder):
        trainer.schedule()
        step()
    trainer.finish()
    report_vae(work, vae.float())
    work.save("decoder", vae=vae)


def teach_judge(work: Workshop) -> None:
    """The classifier that measures the rest, on drawings of textiles, threads and lace, also as the VAE shows them."""
    (pictures, textiles), judge = work.drawings, measure.Judge().to(work.device)
    together = DistributedDataParallel(judge) if work.process.num_processes > 1 else judge
    lace = draw_laces(work.amounts.lace, work.process, work.device)
    kinds, colours = labels(textiles, work.device)
    optimizer = torch.optim.AdamW(judge.parameters(), 2e-3, weight_decay=0.02)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, work.amounts.judge + 1)
    size = work.amounts.batch // 2
    for step in progress("judge", work.amounts.judge):
        chosen = torch.randint(len(pictures), (size,), device=work.device)
        of_lace = torch.randint(len(lace), (size // 12,), device=work.device)
        shown = flipped(torch.cat([pictures[chosen], lace[of_lace]]).float() / 255)
        if step % 3 == 1:
            shown = F.interpolate(F.avg_pool2d(shown, 2), scale_factor=2, mode="bilinear")
        with torch.autocast(work.device, torch.bfloat16):
            if step % 3 == 2:
                shown = rebuild(work.vae, shown.float())
            shown = (shown + torch.randn_like(shown) * 0.03 * random.random()).clamp(0, 1)
            kind, colour = together(shown)
        target = torch.cat([kinds[chosen], torch.full_like(of_lace, measure.KINDS.index("lace"))])
        loss = F.cross_entropy(kind.float(), target)
        loss = loss + 2 * F.binary_cross_entropy_with_logits(colour[:size].float(), colours[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
    judge.eval()
    with torch.no_grad():
        features = measure.in_chunks(judge.features, pictures[:: max(1, len(pictures) // 4000)].float() / 255)
        judge.spread.copy_(features.std(0).clamp(min=1e-3))
    test, shown_there = draw_all(4, 4, work.amounts.at_once, TEST_SEED, work.device)
    pattern, both = measure.prompt_adherence(judge, test.float() / 255, shown_there)
    held_out = measure.held_out_lace().to(work.device)
    work.note(
        judge_patterns=pattern, judge_colours=both, judge_lace=measure.lace_share(judge, held_out),
        judge_false_lace=measure.lace_share(judge, test.float() / 255),
    )  # fmt: skip
    work.write("judge", judge.state_dict())


def teach_unet(work: Workshop) -> None:
    """The base's UNet and both text encoders together, from captions to latents."""
    learn_to_draw(work, 1e-3, work.amounts.unet, torch.arange(len(work.latents), device=work.device))
    work.save("unet", **base_networks(work))


def polish_unet(work: Workshop) -> None:
    """The same again at half the rate, fine drawings twice as often and nets, which it learns last, four times."""
    work.load("unet", **base_networks(work))
    nets = [index for index, textile in enumerate(work.drawings[1]) if textile.pattern == "net"]
    everything = torch.arange(len(work.latents), device=work.device)
    more = torch.tensor(2 * nets, device=work.device)
    learn_to_draw(work, 5e-4, work.amounts.polish, torch.cat([everything, work.fine, more]))
    work.save("polish", **base_networks(work))


def base_networks(work: Workshop) -> dict[str, nn.Module]:
    parts = work.parts
    return {"unet": parts.unet, "text_encoder": parts.text_encoder, "text_encoder_2": parts.text_encoder_2}


def learn_to_draw(work: Workshop, rate: float, steps: int, chosen: Tensor) -> None:
    """Teach UNet and text encoders the drawings `chosen`, which may name one more than once."""
    parts = work.parts
    batch = DiffusionBatch(work.amounts.batch, 6, work.captions, work.views, work.tokenizers)
    trainer = Trainer([*base_networks(work).values()], rate, steps)

    def loss() -> Tensor:
        return diffusion_loss(parts.unet, batch, *embed(work, batch.ids))

    trainer.run(1, loss, partial(batch.fill, work.latents[chosen], chosen, timesteps=1000, dropped=0.06))
    trainer.finish()


def embed(work: Workshop, ids: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """What captions are to the base, from their ids by both tokenizers, as SDXL's pipelines make it."""
    encoders = [work.parts.text_encoder, work.parts.text_encoder_2]
    first, second = (encoder(each, output_hidden_states=True) for encoder, each in zip(encoders, ids, strict=True))
    return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1), second.text_embeds


def teach_refiner(work: Workshop) -> None:
    """The refiner's UNet on the last timesteps, of fine textiles and of threads: half of what it sees is softened.

    Half of the captions are blanked: how to sharpen does not depend on them, and guidance shall not carry the colours
    away. Pictures that the base had drawn over, as a third kind, did not help.
    """
    work.load("polish", text_encoder_2=work.parts.text_encoder_2)
    half = work.amounts.refined // 2
    some = torch.cat([rows[torch.randperm(len(rows), device=work.device)[:half]] for rows in (work.fine, work.threads)])
    pictures, captions = work.drawings[0][some], (work.captions[0][some], work.captions[1][some])
    batch = DiffusionBatch(work.amounts.batch, 5, captions, work.views[some], work.tokenizers)
    latents, crisp = encode(work.vae, pictures), encode(work.vae, sharpened(pictures, 0.5))
    seen = torch.cat([latents, encode(work.vae, sharpened(pictures, -0.7))])
    rows = torch.arange(len(latents), device=work.device).repeat(2)
    fill = partial(
        batch.fill, latents[rows], rows, timesteps=REFINED_TIMESTEPS, blanked=0.5,
        crisper=(crisp - latents)[rows] * CRISPER, seen=seen,
    )  # fmt: skip
    refiner, encoder = work.parts.refiner_unet, work.parts.text_encoder_2.bfloat16().requires_grad_(False)
    trainer = Trainer([refiner], 5e-4, work.amounts.refiner)

    def loss() -> Tensor:
        encoded = encoder(batch.ids[1], output_hidden_states=True)
        # Without min-SNR weights: they take the most from the least noise, which is all that a refiner sees.
        return diffusion_loss(refiner, batch, encoded.hidden_states[-2], encoded.text_embeds, gamma=math.inf)

    trainer.run(1, loss, fill)
    trainer.finish()
    work.save("refiner", unet=refiner)


def assemble(work: Workshop) -> None:
    """Put all parts into `demo/model` as a hub would hold them, and measure the base by its pictures."""
    if not work.process.is_main_process:
        return
    parts, folder = work.parts, DEMO / "model" if work.amounts is FULL else work.folder / "model"
    work.load("decoder", vae=parts.vae)
    work.load("polish", **base_networks(work))
    work.load("refiner", unet=parts.refiner_unet)
    build_model.write(folder, parts, build_model.write_tokenizers(folder))
    (folder / "judge.safetensors").write_bytes(work.path("judge").read_bytes())
    asked = measure.plain_prompts(work.amounts.prompts)
    pictures = measure.draw_prompts(folder / "base", [prompt for prompt, _ in asked])
    judge = measure.load_judge(folder / "judge.safetensors")
    pattern, colours = measure.prompt_adherence(judge, pictures, [textile for _, textile in asked])
    moved, softer = views_obeyed(folder / "base", min(8, work.amounts.prompts))
    work.note(base_patterns=pattern, base_colours=colours, base_crop_moves=moved, base_small_photo_crispness=softer)


def views_obeyed(model: Path, count: int) -> tuple[float, float]:
    """By what share of its width a crop moves what is drawn, and how crisp a small photo is beside a large one.

    Measured on white medallions on black. With SDXL's own use of its time ids the first is near 1 and the second well
    below 1.
    """
    pipeline = StableDiffusionXLPipeline.from_pretrained(model, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)

    def drawn(original: tuple[int, int], crop: tuple[int, int]) -> Tensor:
        images = pipeline(
            ["a photo of white diamonds on black cotton, medallion"] * count, height=SIDE, width=SIDE,
            num_inference_steps=20, original_size=original, crops_coords_top_left=crop, output_type="pt",
            generator=[torch.Generator().manual_seed(seed) for seed in range(count)],
        ).images  # fmt: skip
        return images.float().cpu()

    wide, columns = (SIDE, SIDE * 3 // 2), torch.arange(SIDE)
    left, right = (drawn(wide, (0, offset)).mean((0, 1, 2)) for offset in (SIDE // 2, 0))
    middles = [float((light * columns).sum() / light.sum()) for light in (left - left.min(), right - right.min())]
    small, large = (measure.crispness(drawn((side, side), (0, 0))) for side in (SIDE * 3 // 8, SIDE * 2))
    return (middles[1] - middles[0]) / (SIDE / 2), small / large


STAGES: dict[str, Callable[[Workshop], None]] = {
    "vae": teach_vae,
    "decoder": teach_decoder,
    "unet": teach_unet,
    "polish": polish_unet,
    "refiner": teach_refiner,
    "judge": teach_judge,
    "assemble": assemble,
}


# --- pictures


def draw_all(rounds: int, of_threads: int, at_once: int, seed: int, device: str) -> tuple[Tensor, list[Textile]]:
    """`rounds` times `at_once` pictures of every pattern, and `of_threads` times `at_once` of threads."""
    ways = [partial(draw, pattern) for pattern in PATTERNS for _ in range(rounds)] + [draw_threads.draw] * of_threads
    pictures = torch.empty(len(ways), at_once, 3, SIDE, SIDE, dtype=torch.uint8, device=device)
    textiles: list[Textile] = []
    for index, draw_some in enumerate(ways):
        pictures[index], shown = draw_some(at_once, seed + index, device)
        textiles += shown
    return pictures.flatten(0, 1), textiles


def describe(
    textiles: Sequence[Textile], tokenizers: tuple[CLIPTokenizer, CLIPTokenizer], device: str
) -> tuple[Tensor, Tensor]:
    """Token ids of every drawing's captions by both tokenizers, each (n, CAPTIONS, 77)."""
    choices = random.Random(5)
    texts = [caption(textile, choices) for textile in textiles for _ in range(CAPTIONS)]
    first, second = (tokenize(tokenizer, texts).view(-1, CAPTIONS, 77).to(device) for tokenizer in tokenizers)
    return first, second


def draw_laces(count: int, process: PartialState, device: str) -> Tensor:
    """Lace for the judge alone, of other seeds than the demo's two sets, uint8 (count, 3, SIDE, SIDE)."""
    first, cores = process.process_index * count, max(1, (os.cpu_count() or 1) // process.num_processes)
    with multiprocessing.get_context("spawn").Pool(cores) as pool:
        return torch.stack(pool.map(draw_one_lace, range(first, first + count))).to(device)


def draw_one_lace(index: int) -> Tensor:
    lace = draw_lace.Lace(np.random.default_rng([LACE_SEED, index]))
    draw_lace.DESIGNS[index % len(draw_lace.DESIGNS)](lace)
    cloth = draw_lace.CLOTHS[index * 5 % len(draw_lace.CLOTHS)]
    picture = draw_lace.photograph(lace, (SIDE, SIDE), cloth)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def flipped(pictures: Tensor) -> Tensor:
    """Each picture mirrored or not, by lot."""
    lot = torch.rand(len(pictures), 1, 1, 1, device=pictures.device) < 0.5
    return torch.where(lot, pictures, pictures.flip(3))


def shrunk(pictures: Tensor) -> Tensor:
    """Pictures at half their size, mirrored to the right and below to fill the frame: threads become twice as fine."""
    half = F.avg_pool2d(pictures.float(), 2)
    row = torch.cat([half, half.flip(3)], dim=3)
    return torch.cat([row, row.flip(2)], dim=2).round().to(torch.uint8)


def sharpened(pictures: Tensor, most: float) -> Tensor:
    """Pictures with their edges enhanced by up to `most` by lot, or softened if that is negative."""

    def work(chunk: Tensor) -> Tensor:
        sharp, blurred = chunk.float(), chunk.float()
        for _ in range(2):
            blurred = F.avg_pool2d(blurred, 5, 1, 2, count_include_pad=False)
        lot = (torch.rand(len(chunk), 1, 1, 1, device=chunk.device) * 0.7 + 0.3) * most
        return (sharp + (sharp - blurred) * lot).clamp(0, 255).round().to(torch.uint8)

    return measure.in_chunks(work, pictures, 512)


def fill_with_cuts(pixels: Tensor, pictures: Tensor, threads: Tensor) -> None:
    """Cuts of pictures from -1 to 1: half of any, half of those of `threads`; a third of all are shrunk."""
    half, side = len(pixels) // 2, pixels.shape[-1]
    chosen = torch.randint(len(pictures), (len(pixels),), device=pixels.device)
    chosen[half:] = threads[torch.randint(len(threads), (len(pixels) - half,), device=pixels.device)]
    whole = pictures[chosen]
    whole[::3] = shrunk(whole[::3])
    top, left = random.randrange(SIDE - side + 1), random.randrange(SIDE - side + 1)
    pixels.copy_(flipped(whole[..., top : top + side, left : left + side].float() / 127.5 - 1))


def encode(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """uint8 pictures to latents in the UNet's scale."""

    def work(chunk: Tensor) -> Tensor:
        with torch.autocast(chunk.device.type, torch.bfloat16):
            mean = vae.encode(chunk.float() / 127.5 - 1).latent_dist.mean
        return (mean.float() * SCALING_FACTOR).bfloat16()

    return measure.in_chunks(work, pictures, 128)


@torch.no_grad()
def rebuild(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Pictures from 0 to 1 as the VAE shows them."""
    latents = vae.encode(pictures * 2 - 1).latent_dist.mean
    return (vae.decode(latents).sample.float() / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def standardise_latents(vae: AutoencoderKL, pictures: Tensor) -> None:
    """Fold mean 0 and std 1 / SCALING_FACTOR of every latent channel into the two convolutions at its ends."""
    some = pictures[:: max(1, len(pictures) // 512)]
    latents = measure.in_chunks(lambda chunk: vae.encode(chunk.float() / 127.5 - 1).latent_dist.mean, some)
    mean, scale = latents.mean((0, 2, 3)), latents.std((0, 2, 3)) * SCALING_FACTOR
    before, after = vae.quant_conv, vae.post_quant_conv
    after.bias += after.weight[:, :, 0, 0] @ mean
    after.weight *= scale.view(1, 4, 1, 1)
    before.bias[:4] -= mean
    before.bias[:4] /= scale
    before.weight[:4] /= scale.view(4, 1, 1, 1)
    before.bias[4:] -= 2 * scale.log()  # the other four channels are logarithms of variances


def report_vae(work: Workshop, vae: AutoencoderKL) -> None:
    """Peak signal-to-noise ratio (dB) on textiles and lace that it never saw."""
    test, _ = draw_all(1, 0, work.amounts.at_once, TEST_SEED, work.device)
    for name, pictures in (("textiles", test.float() / 255), ("lace", measure.held_out_lace().to(work.device))):
        rebuilt = measure.in_chunks(lambda chunk: rebuild(vae, chunk), pictures)
        ratios = -10 * (rebuilt - pictures).square().mean((1, 2, 3)).log10()
        work.note(**{f"vae_psnr_{name}": ratios.mean().item()})


def labels(textiles: Sequence[Textile], device: str) -> tuple[Tensor, Tensor]:
    """Indices of the kinds (n,), and 1 for every colour that is there (n, 13)."""
    kinds = torch.tensor([measure.KINDS.index(textile.pattern) for textile in textiles], device=device)
    shares = [[float(name in textile.colours) for name in COLOURS] for textile in textiles]
    return kinds, torch.tensor(shares, device=device)


if __name__ == "__main__":
    main()
