"""Random batches, and trainings in this process, for several test files."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from PIL import Image

import data_utils
import train_lora
from helpers import contents
from lace_lora.config import Config
from lace_lora.pictures import crops
from lace_lora.sdxl import lora_weights, models
from lace_lora.training import batches, class_pictures
from lace_lora.training.encode import Captions, encode
from lace_lora.training.latents import Latents
from lace_lora.training.launch import Job
from lace_lora.training.loss import training_loss
from lace_lora.training.optimizer import make_optimizer
from lace_lora.training.samples import SampleInputs
from lace_lora.training.train_step import TrainStep

CPU = torch.device("cpu")


def noise_schedule(prediction_type: str = "epsilon") -> DDPMScheduler:
    return DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type
    )


def random_batch(count: int) -> batches.Batch:
    generator = torch.Generator().manual_seed(5)
    return batches.Batch(
        latents=torch.randn(count, 4, 8, 8, generator=generator),
        noise=torch.randn(count, 4, 8, 8, generator=generator),
        timesteps=torch.randint(1000, (count,), generator=generator),
        time_ids=torch.tensor([[90.0, 70.0, 10.0, 0.0, 64.0, 64.0]] * count),
        caption=torch.arange(count),
        prompt_embeds=torch.randn(count, 77, 256, generator=generator),
        pooled_prompt_embeds=torch.randn(count, 128, generator=generator),
        weights=torch.ones(count),
    )


def make_run(config: Config, data: batches.Encoded | None = None) -> train_lora.Run:
    """The parts of a run on the CPU, with made-up encodings unless given."""
    unet = models.load_unet(config.pretrained_model, None, CPU, torch.float32)
    torch.manual_seed(0)
    lora = lora_weights.add_lora({"unet": unet}, config)
    if data is None:
        batch = random_batch(6)
        latents = Latents(list(batch.latents[:, None]), list(torch.zeros(6, 1, 4, 8, 8)), batch.time_ids)
        data = batches.Encoded(latents, torch.arange(6), batch.prompt_embeds, batch.pooled_prompt_embeds, 6)
    process: Any = SimpleNamespace(device=CPU, num_processes=1, process_index=0, is_main_process=True)
    noise_scheduler = noise_schedule()
    loss = partial(training_loss, unet, noise_scheduler=noise_scheduler, snr_gamma=config.snr_gamma)
    train_step = TrainStep(config, {"unet": unet}, loss, CPU, torch.float32)
    optimizer = make_optimizer(config, train_step.trainable_params(lora))
    job = Job({}, {}, {}, None, {})
    return train_lora.Run(config, job, data, lora, noise_scheduler, optimizer, train_step, process, None)


class StopAt:
    """A stop signal that comes before the n-th step is over."""

    deferred = False

    def __init__(self, step: int | None) -> None:
        self.step, self.asked = step, 0

    @property
    def requested(self) -> bool:
        self.asked += 1
        return self.step is not None and self.asked >= self.step


def as_json(by_path: dict[Path, Any]) -> dict[str, Any]:
    return {str(path): value for path, value in by_path.items()}


def job_of(captions: dict[str, str], **others: Any) -> Job:
    values: dict[str, Any] = {"fingerprint": {}, "resume": None, "models": {}} | others
    return Job(captions, as_json(contents(map(Path, captions | values.get("held_out", {})))), **values)


def encode_here(config: Config, job: Job) -> tuple[batches.Encoded, Captions, SampleInputs | None]:
    load_unet = partial(models.load_unet, config.pretrained_model, None, CPU, torch.float32)
    return encode(config, job, Accelerator(), torch.float32, load_unet)


def train_here(
    config: Config, resume: Path | None = None, stop: StopAt | None = None, of_class: Iterable[Path] = (),
    origin: str | None = None, held_out_count: int = 0,
) -> str:  # fmt: skip
    """Runs `train_lora.train` in this process, from scratch or from a checkpoint."""
    images = data_utils.list_images(config.images_dir)
    held_out = images[:held_out_count]
    to_draw = class_pictures.to_draw(config, list(of_class)) if config.with_prior_preservation else {}
    job = job_of(
        {str(path): config.instance_prompt for path in images[held_out_count:]},
        held_out={str(path): config.instance_prompt for path in held_out},
        class_pictures=as_json(contents(of_class)),
        class_to_draw=as_json(to_draw),
        views={str(path): crops.Cropping.of(config).views(*Image.open(path).size) for path in images},
        fingerprint={"rank": config.rank},
        resume=str(resume) if resume else None,
        origin=origin,
    )
    Path(config.lora_output_dir).mkdir(parents=True, exist_ok=True)
    return train_lora.train(config, job, stop or StopAt(None))  # type: ignore[arg-type]
