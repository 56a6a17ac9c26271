"""Teach the demo's tiny SDXL what textiles are, from pictures drawn on the spot: about 18 minutes on one H100.

    python -m demo.teach [--work FOLDER] [--until STAGE]

Goes through `STAGES` in order and keeps each one's result in the work folder, so that the same command goes on with
the first stage that is missing; the last one writes `demo/model`. Seeds and numbers of steps are fixed. The base
never sees lace, nor the demo's token: that is left for the LoRA. `--small` runs everything in miniature, to see that
it runs.
"""

import argparse
import json
import math
import multiprocessing
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTokenizer

import data_utils
from demo import build_model, draw_lace, measure
from demo.draw_textiles import COLOURS, FINE, PATTERNS, SIDE, Textile, caption, draw

HERE = Path(__file__).resolve().parent
SCALING_FACTOR = 0.13025  # SDXL's; the latents are brought to its scale, not the factor to the latents
CAPTIONS = 3  # ways each picture is described
TEST_SEED, LACE_SEED = 90_000, 7000
REFINED_TIMESTEPS = 200  # SDXL's refiner knows the last 200 of 1000 only


@dataclass(frozen=True)
class Amounts:
    """How much of everything: `FULL` for the real thing."""

    at_once: int  # pictures drawn at once
    drawings: int  # of each pattern, times `at_once`
    lace: int  # pictures for the judge
    vae: int  # steps
    decoder: int
    judge: int
    unet: int
    refiner: int
    batch: int  # of the UNets; the others' are shares of it
    prompts: int


FULL = Amounts(64, 55, 768, vae=4800, decoder=1400, judge=700, unet=10_800, refiner=1200, batch=256, prompts=200)
SMALL = Amounts(2, 1, 8, vae=3, decoder=3, judge=3, unet=3, refiner=3, batch=12, prompts=4)


@dataclass
class Workshop:
    """Where the stages' results lie, and what they share."""

    folder: Path
    amounts: Amounts
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    figures: dict[str, float] = field(default_factory=dict)

    def path(self, stage: str) -> Path:
        return self.folder / f"{stage}.safetensors"

    def save(self, stage: str, **networks: nn.Module) -> None:
        tensors = {
            f"{name}.{key}": value.detach().half().cpu().contiguous()
            for name, network in networks.items()
            for key, value in network.state_dict().items()
        }
        save_file(tensors, self.path(stage))

    def load(self, stage: str, **networks: nn.Module) -> None:
        tensors = load_file(self.path(stage))
        for name, network in networks.items():
            own = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
            network.load_state_dict(own)
            network.float().to(self.device).eval()

    def note(self, **figures: float) -> None:
        """Print figures and keep them for the model card."""
        self.figures |= {name: round(value, 4) for name, value in figures.items()}
        print("  " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()), flush=True)
        (self.folder / "figures.json").write_text(json.dumps(self.figures, indent=2) + "\n")

    @cached_property
    def tokenizers(self) -> tuple[CLIPTokenizer, CLIPTokenizer]:
        return build_model.write_tokenizers(self.folder / "tokenizers")

    @cached_property
    def parts(self) -> build_model.Parts:
        """All networks as they begin, in fp32."""
        with torch.device(self.device):
            return build_model.make_parts(build_model.TINY, self.tokenizers[0], seed=0)

    @cached_property
    def drawings(self) -> tuple[Tensor, list[Textile]]:
        """The textiles to learn from, uint8 (n, 3, SIDE, SIDE), pattern after pattern."""
        return draw_all(self.amounts.drawings, self.amounts.at_once, 1000, self.device)

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
    def captions(self) -> tuple[Tensor, Tensor]:
        """Token ids of every drawing's captions by both tokenizers, each (n, CAPTIONS, 77)."""
        choices = random.Random(5)
        texts = [caption(textile, choices) for textile in self.drawings[1] for _ in range(CAPTIONS)]
        first, second = (tokenize(tokenizer, texts) for tokenizer in self.tokenizers)
        return first.view(-1, CAPTIONS, 77).to(self.device), second.view(-1, CAPTIONS, 77).to(self.device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=HERE / "teaching", help="folder for the stages' results")
    parser.add_argument("--until", choices=STAGES, default="assemble", help="the last stage to run")
    parser.add_argument("--small", action="store_true", help="everything in miniature")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    workshop = Workshop(arguments.work, SMALL if arguments.small else FULL)
    if (arguments.work / "figures.json").exists():
        workshop.figures = json.loads((arguments.work / "figures.json").read_text())
    for name, stage in STAGES.items():
        if not workshop.path(name).exists():
            print(name, flush=True)
            torch.manual_seed(0)
            start = time.monotonic()
            stage(workshop)
            workshop.note(**{f"{name}_seconds": time.monotonic() - start})
        if name == arguments.until:
            return


# --- stages


def teach_vae(work: Workshop) -> None:
    """Encoder and decoder together, on cuts of all kinds of drawings; then the latents' scale is made SDXL's."""
    vae, pictures = work.parts.vae, work.drawings[0]
    learner = Learner([vae], 1e-3, work.amounts.vae, averaging=0.998)

    def loss(pixels: Tensor) -> Tensor:
        mean, log_variance = vae.quant_conv(vae.encoder(pixels.bfloat16())).float().chunk(2, dim=1)
        latents = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        rebuilt = vae.decoder(vae.post_quant_conv(latents.bfloat16())).float()
        divergence = (mean.square() + log_variance.exp() - 1 - log_variance).mean() / 2
        return difference(rebuilt, pixels) + 3e-4 * divergence

    # Small cuts first, many at once; whole pictures at the end, for what is far apart in them.
    for side, share, size in ((SIDE // 2, 0.7, 0.375), (SIDE, 0.3, 0.125)):
        pixels = torch.empty(max(3, int(work.amounts.batch * size)), 3, side, side, device=work.device)
        learner.run(share, partial(loss, pixels), partial(fill_with_cuts, pixels, pictures))
    learner.finish()
    standardise_latents(vae, pictures)
    report_vae(work, vae)
    work.save("vae", vae=vae)


def teach_decoder(work: Workshop) -> None:
    """The decoder alone, against a critic that tells blurred pictures from sharp ones; the latents stay as they are."""
    vae, pictures = work.parts.vae, work.drawings[0]
    work.load("vae", vae=vae)
    decoder = nn.ModuleList([vae.decoder, vae.post_quant_conv])
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    critic = Critic().to(work.device)
    learner = Learner([decoder], 4e-4, work.amounts.decoder, averaging=0.998)
    rival = torch.optim.AdamW(critic.parameters(), 4e-4, betas=(0.5, 0.99))
    vae.encoder.bfloat16()
    vae.quant_conv.bfloat16()
    pixels = torch.empty(max(3, work.amounts.batch // 6), 3, SIDE // 2, SIDE // 2, device=work.device)

    def step() -> None:
        fill_with_cuts(pixels, pictures)
        with torch.no_grad():
            latents = vae.quant_conv(vae.encoder(pixels.bfloat16())).chunk(2, dim=1)[0]
            # A sampled latent is never quite what the encoder would have made.
            latents = latents + 0.02 * latents.std() * torch.randn_like(latents)
        rebuilt = vae.decoder(vae.post_quant_conv(latents)).float()
        with torch.autocast(work.device, torch.bfloat16):
            (difference(rebuilt, pixels) - 0.03 * critic(rebuilt).float().mean()).backward()
            learner.step()
            rival.zero_grad()
            real, fake = critic(pixels).float(), critic(rebuilt.detach()).float()
            (F.relu(1 - real).mean() + F.relu(1 + fake).mean()).backward()
        rival.step()

    for _ in progress("decoder", work.amounts.decoder):
        learner.schedule()
        step()
    learner.finish()
    report_vae(work, vae.float())
    work.save("decoder", vae=vae)


def teach_judge(work: Workshop) -> None:
    """The classifier that measures all others, on drawings of textiles and lace, also as the VAE shows them."""
    (pictures, textiles), judge = work.drawings, measure.Judge().to(work.device)
    lace = draw_laces(work.amounts.lace, work.device)
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
                with torch.no_grad():
                    shown = rebuild(work.vae, shown.float())
            shown = (shown + torch.randn_like(shown) * 0.03 * random.random()).clamp(0, 1)
            kind, colour = judge(shown)
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
    test, shown_there = draw_all(4, work.amounts.at_once, TEST_SEED, work.device)
    pattern, both = measure.obeyed(judge, test.float() / 255, shown_there)
    held_out = held_out_lace().to(work.device)
    work.note(
        judge_patterns=pattern, judge_colours=both, judge_lace=measure.lace_share(judge, held_out),
        judge_false_lace=measure.lace_share(judge, test.float() / 255),
    )  # fmt: skip
    save_file({name: value.half().cpu() for name, value in judge.state_dict().items()}, work.path("judge"))


def teach_unet(work: Workshop) -> None:
    """The base's UNet and both text encoders together, from captions to latents."""
    parts, size = work.parts, work.amounts.batch
    encoders = [parts.text_encoder, parts.text_encoder_2]
    batch = DiffusionBatch(size, 6, work)
    learner = Learner([parts.unet, *encoders], 1e-3, work.amounts.unet)

    def loss() -> Tensor:
        first, second = (
            encoder(ids, output_hidden_states=True) for encoder, ids in zip(encoders, batch.ids, strict=True)
        )
        embeds = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        return diffusion_loss(parts.unet, batch, embeds, second.text_embeds)

    everything = torch.arange(len(work.latents), device=work.device)
    learner.run(1, loss, partial(batch.fill, work.latents, everything, timesteps=1000, dropped=0.06))
    learner.finish()
    work.save("unet", unet=parts.unet, text_encoder=parts.text_encoder, text_encoder_2=parts.text_encoder_2)


def teach_refiner(work: Workshop) -> None:
    """The refiner's UNet on the last timesteps, mostly of fine drawings, half of them drawn finer still."""
    parts = work.parts
    work.load("unet", text_encoder_2=parts.text_encoder_2)
    encoder = parts.text_encoder_2.bfloat16().requires_grad_(False)
    batch = DiffusionBatch(work.amounts.batch, 5, work)
    learner = Learner([parts.refiner_unet], 1e-3, work.amounts.refiner)
    pictures, textiles = work.drawings
    is_fine = [textile.pattern in FINE or textile.figure != "solid" for textile in textiles]
    fine = torch.tensor(is_fine, device=work.device).nonzero()[:, 0]
    finer = torch.cat([encode(work.vae, shrunk(chunk)) for chunk in pictures[fine].split(512)])
    latents = torch.cat([work.latents, finer])
    everything = torch.arange(len(pictures), device=work.device)
    # Row i of `latents` is described by the captions of drawing `described[i]`.
    described = torch.cat([everything, fine])

    def loss() -> Tensor:
        encoded = encoder(batch.ids[1], output_hidden_states=True)
        return diffusion_loss(parts.refiner_unet, batch, encoded.hidden_states[-2], encoded.text_embeds)

    fill = partial(batch.fill, latents, described, timesteps=REFINED_TIMESTEPS, dropped=0.0)
    learner.run(1, loss, fill)
    learner.finish()
    work.save("refiner", unet=parts.refiner_unet)


def assemble(work: Workshop) -> None:
    """Put all parts into `demo/model` as a hub would hold them, and measure the base by its pictures."""
    parts, folder = work.parts, HERE / "model" if work.amounts is FULL else work.folder / "model"
    work.load("decoder", vae=parts.vae)
    work.load("unet", unet=parts.unet, text_encoder=parts.text_encoder, text_encoder_2=parts.text_encoder_2)
    work.load("refiner", unet=parts.refiner_unet)
    build_model.write(folder, parts, build_model.write_tokenizers(folder))
    (folder / "judge.safetensors").write_bytes(work.path("judge").read_bytes())
    asked = measure.spoken_prompts(work.amounts.prompts)
    pictures = measure.draw_prompts(folder / "base", [prompt for prompt, _ in asked])
    judge = measure.load_judge(folder / "judge.safetensors")
    pattern, colours = measure.obeyed(judge, pictures, [textile for _, textile in asked])
    work.note(base_patterns=pattern, base_colours=colours)


STAGES: dict[str, Callable[[Workshop], None]] = {
    "vae": teach_vae,
    "decoder": teach_decoder,
    "judge": teach_judge,
    "unet": teach_unet,
    "refiner": teach_refiner,
    "assemble": assemble,
}


# --- learning


class Learner:
    """bf16 networks that learn through fp32 copies of their weights, with AdamW, clipping and a running average."""

    def __init__(self, networks: Sequence[nn.Module], rate: float, steps: int, averaging: float = 0.999) -> None:
        self.networks, self.peak, self.steps, self.done = networks, rate, steps, 0
        self.averaging = min(averaging, 1 - 10 / max(steps, 20))
        for network in networks:
            network.train().to(torch.bfloat16)
        self.weights: list[Tensor] = [weight for network in networks for weight in network.parameters()]
        self.exact = [weight.detach().float() for weight in self.weights]
        self.average = [weight.clone() for weight in self.exact]
        # Gradients at fixed places, so that a graph can be replayed over them.
        self.gradients = [torch.zeros_like(weight) for weight in self.weights]
        self.exact_gradients = [torch.zeros_like(weight) for weight in self.exact]
        pairs = zip((*self.weights, *self.exact), (*self.gradients, *self.exact_gradients), strict=True)
        for weight, gradient in pairs:
            weight.grad = gradient
        on_gpu = self.weights[0].is_cuda
        self.rate = torch.tensor(rate, device=self.weights[0].device)
        self.optimizer = torch.optim.AdamW(
            self.exact, self.rate, betas=(0.9, 0.99), weight_decay=0.01, fused=on_gpu, capturable=on_gpu
        )

    def schedule(self) -> None:
        """The rate rises over the first steps and falls along a cosine to a fiftieth."""
        share = self.done / self.steps
        self.done += 1
        rise = min(1.0, self.done / min(300, max(1, self.steps // 4)))
        self.rate.fill_(self.peak * rise * (0.02 + 0.98 * (1 + math.cos(math.pi * share)) / 2))

    @torch.no_grad()
    def step(self) -> None:
        """From the gradients of the bf16 weights to new weights; the gradients are zero afterwards."""
        torch._foreach_copy_(self.exact_gradients, self.gradients)
        nn.utils.clip_grad_norm_(self.exact, 1.0, foreach=True)
        self.optimizer.step()
        torch._foreach_copy_(self.weights, self.exact)
        torch._foreach_zero_(self.gradients)
        torch._foreach_lerp_(self.average, self.exact, 1 - self.averaging)

    def run(self, share: float, loss: Callable[[], Tensor], fill: Callable[[], None]) -> None:
        """Make this share of the steps; `fill` puts the next batch where `loss` reads it."""
        shown = torch.zeros((), device=self.rate.device)

        def once() -> None:
            value = loss()
            value.backward()
            self.step()
            shown.lerp_(value.detach(), 0.02)

        step = replayed(once, fill)
        for index in progress("step", round(self.steps * share)):
            self.schedule()
            fill()
            step()
            if index % 500 == 499:
                print(f"  step {self.done}: loss {shown.item():.4f}", flush=True)

    def finish(self) -> None:
        """The networks in fp32 with their averaged weights."""
        for network in self.networks:
            network.float().eval()
        with torch.no_grad():
            for weight, average in zip(self.weights, self.average, strict=True):
                weight.copy_(average)
                weight.grad = None


def replayed(once: Callable[[], None], fill: Callable[[], None]) -> Callable[[], None]:
    """`once` as a CUDA graph, whose thousands of small kernels start at once; as it is without a GPU."""
    if not torch.cuda.is_available():
        return once
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            fill()
            once()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        once()
    return graph.replay


def progress(what: str, steps: int) -> Iterable[int]:
    """Count steps, and say now and then how fast they are."""
    start = time.monotonic()
    for step in range(steps):
        yield step
        if (step + 1) % 1000 == 0:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            print(f"  {what} {step + 1}: {(step + 1) / (time.monotonic() - start):.1f} a second", flush=True)


class DiffusionBatch:
    """The inputs of one training step, at fixed places in memory so that a graph can be replayed over them."""

    def __init__(self, size: int, numbers: int, work: Workshop) -> None:
        device, cells = work.device, SIDE // 8
        self.size, self.work = size, work
        self.latents = torch.zeros(size, 4, cells, cells, device=device)
        self.noise = torch.zeros_like(self.latents)
        self.timesteps = torch.zeros(size, dtype=torch.long, device=device)
        self.ids = [torch.zeros(size, 77, dtype=torch.long, device=device) for _ in range(2)]
        self.kept = torch.ones(size, 1, device=device)
        self.time_ids = torch.zeros(size, numbers, device=device)
        self.blank = [tokenize(tokenizer, [""]).to(device) for tokenizer in work.tokenizers]
        self.alphas_cumprod = DDPMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
        ).alphas_cumprod.to(device)

    def fill(self, latents: Tensor, described: Tensor, timesteps: int, dropped: float) -> None:
        """A batch by lot. Embeddings are zeroed (`dropped`) or captions blanked (4 %), which guidance needs."""
        size, device = self.size, self.latents.device
        chosen = torch.randint(len(latents), (size,), device=device)
        worded = torch.randint(CAPTIONS, (size,), device=device)
        lot = torch.rand(size, 1, device=device)
        self.latents.copy_(latents[chosen])
        self.noise.normal_()
        self.timesteps.random_(0, timesteps)
        self.kept.copy_(lot >= dropped)
        for ids, captions, blank in zip(self.ids, self.work.captions, self.blank, strict=True):
            words = captions[described[chosen], worded]
            ids.copy_(torch.where(lot > 0.96, blank, words))
        # Sizes and cuts say nothing about these pictures, so any are right.
        any_size = torch.randint(4, 25, (size, 2), device=device) * 64.0
        self.time_ids[:, :2] = torch.where(torch.rand(size, 1, device=device) < 0.5, float(SIDE), any_size)
        moved = torch.randint(0, 129, (size, 2), device=device) * (torch.rand(size, 1, device=device) < 0.3)
        self.time_ids[:, 2:4] = moved
        if self.time_ids.shape[1] == 6:
            self.time_ids[:, 4:] = SIDE
        else:
            self.time_ids[:, 4] = torch.rand(size, device=device) * 5 + 2  # the aesthetic score


def diffusion_loss(unet: UNet2DConditionModel, batch: DiffusionBatch, embeds: Tensor, pooled: Tensor) -> Tensor:
    """Noise prediction, min-SNR weighted with gamma 5, plus what is wrong over large areas.

    Colours are a matter of the error's mean over a picture, which is lost among its thousand others in the plain loss.
    """
    signal = batch.alphas_cumprod[batch.timesteps].view(-1, 1, 1, 1)
    noisy = signal.sqrt() * batch.latents + (1 - signal).sqrt() * batch.noise
    kept = batch.kept.to(embeds.dtype)
    conditions = {"text_embeds": pooled * kept, "time_ids": batch.time_ids}
    predicted = unet(
        noisy.to(embeds.dtype), batch.timesteps, embeds * kept[..., None], added_cond_kwargs=conditions,
        return_dict=False,
    )[0]  # fmt: skip
    error = predicted.float() - batch.noise
    snr = (signal / (1 - signal)).flatten()
    by_picture = error.square().mean((1, 2, 3))
    by_picture = by_picture + 50 * error.mean((2, 3)).square().mean(1)
    by_picture = by_picture + 5 * F.avg_pool2d(error, 8).square().mean((1, 2, 3))
    return (by_picture * snr.clamp(max=5) / snr).mean()


# --- pictures


def draw_all(rounds: int, at_once: int, seed: int, device: str) -> tuple[Tensor, list[Textile]]:
    """`rounds` times `at_once` pictures of every pattern."""
    pictures = torch.empty(len(PATTERNS) * rounds, at_once, 3, SIDE, SIDE, dtype=torch.uint8, device=device)
    textiles: list[Textile] = []
    for index in range(len(pictures)):
        pictures[index], shown = draw(list(PATTERNS)[index // rounds], at_once, seed + index, device)
        textiles += shown
    return pictures.flatten(0, 1), textiles


def draw_laces(count: int, device: str) -> Tensor:
    """Lace for the judge alone, of other seeds than the demo's two sets, uint8 (count, 3, SIDE, SIDE)."""
    with multiprocessing.get_context("spawn").Pool() as pool:
        return torch.stack(pool.map(draw_one_lace, range(count))).to(device)


def draw_one_lace(index: int) -> Tensor:
    lace = draw_lace.Lace(np.random.default_rng([LACE_SEED, index]))
    draw_lace.DESIGNS[index % len(draw_lace.DESIGNS)](lace)
    cloth = draw_lace.CLOTHS[index * 5 % len(draw_lace.CLOTHS)]
    picture = draw_lace.photograph(lace, (SIDE, SIDE), cloth)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def held_out_lace() -> Tensor:
    return measure.load_pictures(data_utils.list_images(HERE / "held_out"))


def flipped(pictures: Tensor) -> Tensor:
    """Each picture mirrored or not, by lot."""
    lot = torch.rand(len(pictures), 1, 1, 1, device=pictures.device) < 0.5
    return torch.where(lot, pictures, pictures.flip(3))


def shrunk(pictures: Tensor) -> Tensor:
    """Pictures at half their size, mirrored to the right and below to fill the frame: threads become twice as fine."""
    half = F.avg_pool2d(pictures.float(), 2)
    row = torch.cat([half, half.flip(3)], dim=3)
    return torch.cat([row, row.flip(2)], dim=2).round().to(torch.uint8)


def fill_with_cuts(pixels: Tensor, pictures: Tensor) -> None:
    """Cuts of pictures from -1 to 1: a third as they are, a third two mixed by a third one's light, a third shrunk."""
    third, side = len(pixels) // 3, pixels.shape[-1]
    chosen = torch.randint(len(pictures), (len(pixels) + third,), device=pixels.device)
    whole = pictures[chosen]
    whole = torch.cat([whole[third : 2 * third], shrunk(whole[:third]), whole[2 * third :]])
    top, left = random.randrange(SIDE - side + 1), random.randrange(SIDE - side + 1)
    cut = flipped(whole[..., top : top + side, left : left + side].float() / 127.5 - 1)
    light = cut[-third:].mean(1, keepdim=True)
    low, high = light.amin((2, 3), True), light.amax((2, 3), True)
    share = (light - low) / (high - low + 0.05)
    cut[:third] = cut[:third] * share + cut[-third:] * (1 - share)
    pixels.copy_(cut[: len(pixels)])


def difference(rebuilt: Tensor, pixels: Tensor) -> Tensor:
    """How wrong a picture is: pixel by pixel, along its edges, and over larger areas."""
    error = rebuilt - pixels
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return error.abs().mean() + error.square().mean() + 0.5 * edges + 0.5 * F.avg_pool2d(error, 4).abs().mean()


@torch.no_grad()
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
    """Fold mean 0 and deviation 1 / SCALING_FACTOR of every latent channel into the two convolutions at its ends."""
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
    test, _ = draw_all(1, work.amounts.at_once, TEST_SEED, work.device)
    for name, pictures in (("textiles", test.float() / 255), ("lace", held_out_lace().to(work.device))):
        rebuilt = measure.in_chunks(lambda chunk: rebuild(vae, chunk), pictures)
        ratios = -10 * (rebuilt - pictures).square().mean((1, 2, 3)).log10()
        work.note(**{f"vae_psnr_{name}": ratios.mean().item()})


class Critic(nn.Sequential):
    """A patch discriminator: positive where a picture looks real."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for narrow, wide in ((3, 48), (48, 96), (96, 128)):
            layers += [nn.utils.spectral_norm(nn.Conv2d(narrow, wide, 4, 2, 1)), nn.LeakyReLU(0.2)]
        super().__init__(*layers, nn.utils.spectral_norm(nn.Conv2d(128, 1, 3, 1, 1)))


def labels(textiles: Sequence[Textile], device: str) -> tuple[Tensor, Tensor]:
    """Indices of the kinds (n,), and 1 for every colour that is there (n, 13)."""
    kinds = torch.tensor([measure.KINDS.index(textile.pattern) for textile in textiles], device=device)
    shares = [[float(name in textile.colours) for name in COLOURS] for textile in textiles]
    return kinds, torch.tensor(shares, device=device)


def tokenize(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> Tensor:
    """Token ids (n, 77)."""
    # By hand: the tokenizer's own padding takes most of its time.
    rows = tokenizer(list(texts), truncation=True, max_length=77).input_ids
    return torch.tensor([row + [tokenizer.pad_token_id] * (77 - len(row)) for row in rows])


if __name__ == "__main__":
    main()
