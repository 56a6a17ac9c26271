"""The script that accelerate launches: encode everything once, loop over cached latents, save the LoRA.

    accelerate launch train_lora.py --config lora_output/config.yaml --job job.json

`train.py` writes both files. What becomes of the run is written beside the job file, as outcome.json, because the
launcher turns every failure into exit code 1.
"""

import argparse
import json
import logging
import os
import re
import sys
import threading
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from diffusers import DDPMScheduler, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save
from torch import Tensor

from lace_lora import files, seeds
from lace_lora.config import LORA_FILE, Config, load_config
from lace_lora.errors import UserError, is_out_of_memory
from lace_lora.files import hold_shared_lock
from lace_lora.pictures import gallery
from lace_lora.process import Stopped, StopSignal, report_outcome
from lace_lora.sdxl import lora_weights, models, sampling
from lace_lora.sdxl.vae import decode_latents
from lace_lora.training import batches, checkpoint, results
from lace_lora.training.encode import Captions, Preview, encode
from lace_lora.training.launch import Job
from lace_lora.training.loss import training_loss
from lace_lora.training.metrics import READ_EVERY, Metrics, PendingScalars
from lace_lora.training.optimizer import (
    make_optimizer,
    optimizer_state,
    rate_factor_at,
    restore_optimizer,
    update_weights,
)
from lace_lora.training.train_step import TrainStep

logger = logging.getLogger("train_lora")


def main() -> int:
    parser = argparse.ArgumentParser(description="Train a LoRA; launched by `main.py --mode train`.")
    parser.add_argument("--config", required=True, type=Path, help="resolved settings")
    parser.add_argument("--job", required=True, type=Path, help="what train.py worked out: captions, where to go on")
    arguments = parser.parse_args()
    is_main = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.INFO if is_main else logging.ERROR, format="%(message)s")
    threading.excepthook = _leave_disks_to_others
    models.prepare_process()

    def work(stop: StopSignal) -> str:
        job = Job.load(arguments.job)
        config = replace(load_config(arguments.config), **job.models)
        hold_shared_lock(Path(config.lora_output_dir))
        return train(config, job, stop)

    return report_outcome(work, arguments.job.parent)


def _leave_disks_to_others(failure: threading.ExceptHookArgs) -> None:
    """TensorBoard's thread hands its error on to whoever logs, so that a lost Drive need not be a traceback too."""
    if not isinstance(failure.exc_value, OSError):
        threading.__excepthook__(failure)


@dataclass
class Run:
    """What the loop works with. One process of `world`, the `rank`-th."""

    config: Config
    job: Job  # see train.make_job
    data: batches.Encoded
    networks: lora_weights.Networks  # the UNet, and both text encoders if they train
    lora: dict[str, torch.nn.Parameter]
    noise_scheduler: DDPMScheduler
    optimizer: torch.optim.Optimizer
    train_step: TrainStep
    accelerator: Accelerator
    preview: Preview
    publisher: checkpoint.Publisher = field(default_factory=checkpoint.Publisher)
    wish: PendingScalars | None = None  # of any process to stop, as of the step before

    @property
    def folder(self) -> Path:
        return Path(self.config.lora_output_dir)

    @property
    def unet(self) -> UNet2DConditionModel:
        return self.networks["unet"]


def train(config: Config, job: Job, stop: StopSignal) -> str:
    """The whole run on this process; returns the closing sentence.

    Raises:
        Stopped, UserError: see `loop`; OSError and out-of-memory errors as they come.
    """
    # The others wait for the first while it encodes pictures or draws samples, longer than the ten minutes of NCCL.
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=6))])
    device, world = accelerator.device, accelerator.num_processes
    dtype = models.pick_dtype(config.mixed_precision, device)
    others = f", one of {world} processes" if world > 1 else ""
    logger.info("training on %s in %s%s", device, str(dtype).removeprefix("torch."), others)
    data, captions, preview = encode(config, job, accelerator, dtype)

    unet = models.load_unet(config.pretrained_model, config.variant, device, dtype, config.attention)
    networks = {"unet": unet} | captions.encoders
    torch.manual_seed(seeds.stream_seed(config.seed, "lora"))
    lora = lora_weights.add_lora(networks, config)
    noise_scheduler = models.load_noise_scheduler(config)
    loss = partial(_loss, config, captions, unet, noise_scheduler)
    train_step = TrainStep(config, networks, loss, device, dtype)
    optimizer = make_optimizer(config, train_step.trainable_params(lora))
    run = Run(config, job, data, networks, lora, noise_scheduler, optimizer, train_step, accelerator, preview)
    first_step = restore(run, Path(job.resume)) if job.resume else 0

    stop.deferred = True
    log = Metrics(config, first_step, quiet=not accelerator.is_main_process)
    try:
        steps = loop(run, log, first_step, stop)
    finally:
        log.close()
    accelerator.wait_for_everyone()  # the first to leave with a code of its own takes the others along
    accelerator.end_training()
    if steps < config.max_train_steps:
        raise Stopped(f"stopped at step {steps}; the same command goes on from there")
    place = run.folder / LORA_FILE
    if accelerator.is_main_process:
        state, kind = lora_weights.lora_state(networks), noise_scheduler.config.prediction_type
        results.save_results(config, state, config.alpha, steps, job, unet.config.layers_per_block, kind)
    memory = models.peak_memory(device)
    return f"trained {steps} steps; the LoRA is {place}" + (f" ({memory})" if memory else "")


def loop(run: Run, log: Metrics, first_step: int, stop: StopSignal) -> int:
    """Make the optimizer's steps, with checkpoints and sample grids between them; returns the step reached.

    Raises:
        UserError: the loss is not finite (exit 5); the last checkpoint stays as it was.
    """
    config, is_main = run.config, run.accelerator.is_main_process
    factor_at = rate_factor_at(config)
    done = first_step
    stopping = False
    run.train_step.train()
    while done < config.max_train_steps and not stopping:
        factor = factor_at(done)
        loss, grad_norm, stopping = update(run, done, factor, stop.requested)
        done += 1
        log.record(done, loss, config.learning_rate * factor, grad_norm)
        ending = stopping or done == config.max_train_steps
        saving = ending or done % config.checkpointing_steps == 0
        if saving or done % READ_EVERY == 0:
            run.publisher.look()
            log.read(latest=saving)
            # What came before a row of bad losses may be their cause: no checkpoint of that.
            saving = log.check_finite(ending) and saving
        if saving and is_main:
            run.publisher.wait()
            log.publish()
            save_checkpoint(run, done)
        if config.validation_steps and done % config.validation_steps == 0 and is_main and not stopping:
            draw_samples(run, done)
    run.publisher.wait()
    return done


def update(run: Run, step: int, factor: float, stop_requested: bool) -> tuple[Tensor, Tensor, bool]:
    """One optimizer step over the whole effective batch; `factor` is the learning rate's, from the schedule.

    Returns:
        The loss (mean over the batch), the gradients' norm before clipping, and whether all processes are to stop. Of
        several they do one step after the first of them wants to, so that none waits for its GPU to hear of it.
    """
    config, world, rank = run.config, run.accelerator.num_processes, run.accelerator.process_index
    # Dropout's draws; everything else random comes with the batch.
    torch.manual_seed(seeds.stream_seed(config.seed, "dropout", step, rank))
    batch = batches.step_batch(
        run.data, config.seed, step, config.train_batch_size * config.gradient_accumulation_steps * world,
        run.noise_scheduler.config.num_train_timesteps, config.noise_offset, config.prior_loss_weight,
    ).share(rank, world)  # fmt: skip
    loss = run.train_step(batch)
    if world > 1:
        before = run.wish
        loss, run.wish = _average(run, loss, stop_requested)
        stop_requested = before is not None and before.read()[0] > 0
    grad_norm = update_weights(run.optimizer, run.train_step.scaler, loss, factor, config.max_grad_norm)
    return loss, grad_norm, stop_requested


def _loss(
    config: Config, captions: Captions, unet: UNet2DConditionModel, noise_scheduler: DDPMScheduler, batch: batches.Batch
) -> Tensor:
    return training_loss(unet, captions.read(batch), noise_scheduler, config.snr_gamma)


def _average(run: Run, loss: Tensor, stop_requested: bool) -> tuple[Tensor, PendingScalars]:
    """Gradients, loss and the wish to stop averaged over all processes, in one message."""
    gradients = run.train_step.gradients()
    wish = loss.new_full((1,), float(stop_requested))  # a value that a kernel takes along, not one to be copied
    flat = torch.cat([*(gradient.flatten() for gradient in gradients), loss[None], wish])
    flat = run.accelerator.reduce(flat, "mean")
    sizes = [gradient.numel() for gradient in gradients]
    for gradient, averaged in zip(gradients, flat[:-2].split(sizes), strict=True):
        gradient.copy_(averaged.view_as(gradient))
    return flat[-2], PendingScalars(flat[-1])


def save_checkpoint(run: Run, step: int) -> None:
    """Publish `checkpoint-<step>`: the LoRA as it will be used, and all that an exact resume needs.

    All of it is copied here and now; training goes on while the copy is written, hashed and read back.
    """
    tensors, numbers = optimizer_state(run.optimizer, run.train_step.trainable_params(run.lora))
    tensors = run.train_step.split_state(tensors) | {
        f"lora.{name}": weight.detach() for name, weight in run.lora.items()
    }
    tensors = _copied(tensors)
    lora = _copied(lora_weights.lora_state(run.networks, run.config.alpha / run.config.rank))
    state = {
        "step": step,
        "learns": run.job.fingerprint,
        "scaler": run.train_step.scaler.state_dict(),
        "optimizer": numbers,
    }

    def write(folder: Path) -> None:
        lora_weights.save_lora(folder / LORA_FILE, lora, {"step": str(step)})
        (folder / "training_state.safetensors").write_bytes(save(tensors))
        (folder / "state.json").write_text(json.dumps(state, indent=2) + "\n")

    run.publisher.publish(run.folder, step, write, run.config.checkpoints_total_limit)


def _copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def restore(run: Run, folder: Path) -> int:
    """Put a verified checkpoint back into LoRA, optimizer and loss scaler; returns its step."""
    state = json.loads((folder / "state.json").read_text())
    # Before text encoders could train, names had no network in front.
    tensors = {
        re.sub(r"^(\w+)\.(?!unet\.|text_encoder)", r"\1.unet.", name): tensor
        for name, tensor in load_file(folder / "training_state.safetensors").items()
    }
    try:
        with torch.no_grad():
            for name, weight in run.lora.items():
                weight.copy_(tensors.pop(f"lora.{name}"))
        tensors = run.train_step.merge_state(tensors)
        restore_optimizer(run.optimizer, run.train_step.trainable_params(run.lora), tensors, state.get("optimizer", {}))
    except (KeyError, RuntimeError) as error:
        raise UserError(f"{folder} does not fit this model: to start anew, set another lora_output_dir") from error
    if state["scaler"]:
        run.train_step.scaler.load_state_dict(state["scaler"])
    logger.info("going on from %s", folder)
    return int(state["step"])


def draw_samples(run: Run, step: int) -> None:
    """Draw a grid with the LoRA as it is now, at training size, into `samples/step-<step>.png`."""
    run.train_step.train(False)
    try:
        pictures = sample_pictures(run)
    except UserError as error:  # of the VAE, or of drawing in fp16: the LoRA need not be at fault
        logger.warning("no sample pictures at step %d: %s", step, error)
        return
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        logger.warning("no sample pictures at step %d: out of memory", step)
        return
    finally:
        run.preview.vae.to("cpu")
        run.train_step.train()
    path = run.folder / "samples" / f"step-{step:06d}.png"
    path.parent.mkdir(exist_ok=True)
    files.write_atomically(path, gallery.contact_sheet(pictures, side=512))


def sample_pictures(run: Run) -> list[Image.Image]:
    """As many at once as training takes, or, where memory runs out, one after another and without graphs beside."""
    try:
        return _drawn(run, run.config.train_batch_size)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    run.train_step.forget_graphs()
    return _drawn(run, 1)


@torch.no_grad()
def _drawn(run: Run, at_once: int) -> list[Image.Image]:
    config = replace(run.config, width=run.config.resolution, height=run.config.resolution, refine=False)
    embeddings = run.preview.embed().to(run.unet.device, run.unet.dtype)
    scheduler = sampling.make_scheduler(config.scheduler, run.noise_scheduler.config)
    seeds = [config.seed + index for index in range(config.num_validation_images)]
    vae = run.preview.vae.to(run.accelerator.device)
    pictures = []
    for start in range(0, len(seeds), at_once):
        some = seeds[start : start + at_once]
        with run.train_step.autocast():
            conditions = embeddings.rows([0] * len(some))
            latents = sampling.base_latents(run.unet, scheduler, conditions, some, config)
        pictures += decode_latents(vae, latents)
    return pictures


if __name__ == "__main__":
    sys.exit(main())
