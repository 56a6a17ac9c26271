"""Training the demo's networks: bf16 steps replayed as a CUDA graph, the batches of a diffusion model, the losses."""

import math
import time
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from accelerate import PartialState
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTokenizer

from demo.making.build_model import NOISE_SCHEDULE
from demo.making.draw_textiles import SIDE


class Trainer:
    """Trains bf16 networks through fp32 copies of their weights, with AdamW, clipping and a running average.

    Several processes begin with the same weights and keep them the same, by the mean of their gradients.
    """

    def __init__(self, networks: Sequence[nn.Module], rate: float, steps: int, averaging: float = 0.999) -> None:
        self.networks, self.peak, self.steps, self.done = networks, rate, steps, 0
        self.averaging = min(averaging, 1 - 10 / max(steps, 20))
        for network in networks:
            network.train().to(torch.bfloat16)
        self.weights: list[Tensor] = [weight for network in networks for weight in network.parameters()]
        self.exact = [weight.detach().float() for weight in self.weights]
        self.average = [weight.clone() for weight in self.exact]
        # Gradients at fixed addresses, which a CUDA graph needs, and in one piece, which processes exchange fastest.
        self.all_gradients = self.weights[0].new_zeros(sum(weight.numel() for weight in self.weights))
        pieces = self.all_gradients.split([weight.numel() for weight in self.weights])
        self.gradients = [piece.view_as(weight) for piece, weight in zip(pieces, self.weights, strict=True)]
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
        if (processes := PartialState().num_processes) > 1:
            torch.distributed.all_reduce(self.all_gradients)
            self.all_gradients /= processes
        torch._foreach_copy_(self.exact_gradients, self.gradients)
        nn.utils.clip_grad_norm_(self.exact, 1.0, foreach=True)
        self.optimizer.step()
        torch._foreach_copy_(self.weights, self.exact)
        self.all_gradients.zero_()
        torch._foreach_lerp_(self.average, self.exact, 1 - self.averaging)

    def run(self, share: float, loss: Callable[[], Tensor], fill: Callable[[], None]) -> None:
        """Run this share of the steps; `fill` writes the next batch to where `loss` reads it."""
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
                say(f"step {self.done}: loss {shown.item():.4f}")

    def finish(self) -> None:
        """The networks in fp32 with their averaged weights."""
        for network in self.networks:
            network.float().eval()
        with torch.no_grad():
            for weight, average in zip(self.weights, self.average, strict=True):
                weight.copy_(average)
                weight.grad = None


def replayed(once: Callable[[], None], fill: Callable[[], None]) -> Callable[[], None]:
    """`once` as a CUDA graph, which replays its thousands of small kernels from one launch; unchanged without a GPU."""
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
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL's own thread may go on meanwhile
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
            say(f"{what} {step + 1}: {(step + 1) / (time.monotonic() - start):.1f} a second")


def say(message: str) -> None:
    if PartialState().is_main_process:
        print(f"  {message}", flush=True)


class DiffusionBatch:
    """The inputs of one training step, at the fixed addresses that a CUDA graph needs."""

    def __init__(
        self, size: int, numbers: int, captions: tuple[Tensor, Tensor], views: Tensor,
        tokenizers: tuple[CLIPTokenizer, CLIPTokenizer],
    ) -> None:  # fmt: skip
        device, cells = captions[0].device, SIDE // 8
        self.size, self.captions, self.views = size, captions, views
        self.latents = torch.zeros(size, 4, cells, cells, device=device)
        self.noise = torch.zeros_like(self.latents)
        self.timesteps = torch.zeros(size, dtype=torch.long, device=device)
        self.ids = [torch.zeros(size, 77, dtype=torch.long, device=device) for _ in range(2)]
        self.conditioned = torch.ones(size, 1, device=device)
        self.time_ids = torch.zeros(size, numbers, device=device)
        self.blank = [tokenize(tokenizer, [""]).to(device) for tokenizer in tokenizers]
        self.alphas_cumprod = DDPMScheduler(**NOISE_SCHEDULE).alphas_cumprod.to(device)

    def fill(
        self, latents: Tensor, described: Tensor, timesteps: int, dropped: float = 0.0, blanked: float = 0.04,
        crisper: Tensor | None = None, seen: Tensor | None = None,
    ) -> None:  # fmt: skip
        """A batch by lot. Shares of it have their embeddings zeroed or their captions blanked, which guidance needs.

        For a refiner, high aesthetic scores add `crisper` to the latents, and low ones take it off; `seen` is what it
        gets in their place, and the difference is part of the noise that it learns to take off. All are of the latents'
        shape.
        """
        size, device = self.size, self.latents.device
        chosen = torch.randint(len(latents), (size,), device=device)
        worded = torch.randint(self.captions[0].shape[1], (size,), device=device)
        lot = torch.rand(size, 1, device=device)
        self.latents.copy_(latents[chosen])
        self.noise.normal_()
        self.timesteps.random_(0, timesteps)
        self.conditioned.copy_(lot >= dropped)
        for ids, captions, blank in zip(self.ids, self.captions, self.blank, strict=True):
            words = captions[described[chosen], worded]
            ids.copy_(torch.where(lot > 1 - blanked, blank, words))
        self.time_ids[:, :4] = self.views[described[chosen]]
        if self.time_ids.shape[1] == 6:
            self.time_ids[:, 4:] = SIDE
        if crisper is not None and seen is not None:
            score = torch.rand(size, device=device) * 5 + 2
            self.time_ids[:, 4] = score
            self.latents.add_(crisper[chosen] * ((score - 4.5) / 2.5).view(-1, 1, 1, 1))
            signal = self.alphas_cumprod[self.timesteps].view(-1, 1, 1, 1)
            self.noise.add_((seen[chosen] - self.latents) * (signal / (1 - signal)).sqrt())


def diffusion_loss(
    unet: UNet2DConditionModel, batch: DiffusionBatch, embeds: Tensor, pooled: Tensor, gamma: float = 5
) -> Tensor:
    """Noise prediction, min-SNR weighted with `gamma`, plus what is wrong over large areas.

    Colours are a matter of the error's mean over a picture, which is lost among its thousand others in the plain loss.
    """
    signal = batch.alphas_cumprod[batch.timesteps].view(-1, 1, 1, 1)
    noisy = signal.sqrt() * batch.latents + (1 - signal).sqrt() * batch.noise
    conditioned = batch.conditioned.to(embeds.dtype)
    conditions = {"text_embeds": pooled * conditioned, "time_ids": batch.time_ids}
    predicted = unet(
        noisy.to(embeds.dtype), batch.timesteps, embeds * conditioned[..., None], added_cond_kwargs=conditions,
        return_dict=False,
    )[0]  # fmt: skip
    error = predicted.float() - batch.noise
    snr = (signal / (1 - signal)).flatten()
    by_picture = error.square().mean((1, 2, 3))
    by_picture = by_picture + 50 * error.mean((2, 3)).square().mean(1)
    by_picture = by_picture + 5 * F.avg_pool2d(error, 8).square().mean((1, 2, 3))
    return (by_picture * snr.clamp(max=gamma) / snr).mean()


def tokenize(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> Tensor:
    """Token ids (n, 77)."""
    # By hand: the tokenizer's own padding takes most of its time.
    rows = tokenizer(list(texts), truncation=True, max_length=77).input_ids
    return torch.tensor([row + [tokenizer.pad_token_id] * (77 - len(row)) for row in rows])


def difference(rebuilt: Tensor, pixels: Tensor) -> Tensor:
    """How wrong a picture is: pixel by pixel, most of all where threads begin and end, and over larger areas."""
    error, light = rebuilt - pixels, pixels.mean(1, keepdim=True)
    contrast = (F.max_pool2d(light, 3, 1, 1) + F.max_pool2d(-light, 3, 1, 1)) / 2  # from 0 to 1
    weighted = (error.square() * (1 + 3 * contrast)).mean()
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return weighted + 0.5 * error.abs().mean() + 0.5 * edges + F.avg_pool2d(error, 4).abs().mean()


class Critic(nn.Sequential):
    """A patch discriminator: positive where a picture looks real."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for narrow, wide in ((3, 48), (48, 96), (96, 128)):
            layers += [nn.utils.spectral_norm(nn.Conv2d(narrow, wide, 4, 2, 1)), nn.LeakyReLU(0.2)]
        super().__init__(*layers, nn.utils.spectral_norm(nn.Conv2d(128, 1, 3, 1, 1)))
