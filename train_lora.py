"""The script that accelerate launches: encode everything once, loop over cached latents, save the LoRA.

    accelerate launch train_lora.py --config lora_output/config.yaml --job job.json

`train.py` writes both files. How the run ended is written beside the job file, as outcome.json, because the launcher
turns every failure into exit code 1.
"""

import json
import logging
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache, partial
from pathlib import Path

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from diffusers import DDPMScheduler
from safetensors.torch import load_file, save
from torch import Tensor

from lace_lora import console, seeds
from lace_lora.config import LORA_FILE, Config
from lace_lora.errors import UserError
from lace_lora.process import Stopped, StopSignal
from lace_lora.sdxl import lora_weights, models
from lace_lora.training import batches, checkpoint, launch, optimizer, results, samples, validation
from lace_lora.training.encode import encode
from lace_lora.training.loss import training_loss
from lace_lora.training.metrics import READ_EVERY, SAMPLING, SAVING, VALIDATING, Metrics, PendingScalars
from lace_lora.training.train_step import TrainStep

logger = logging.getLogger("train_lora")


def main() -> int:
    is_main = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.INFO if is_main else logging.ERROR, format="%(message)s")
    threading.excepthook = _ignore_disk_errors_in_threads
    models.prepare_process()
    return launch.run_job("Train a LoRA", lambda config, job, _folder, stop: train(config, job, stop))


def _ignore_disk_errors_in_threads(failure: threading.ExceptHookArgs) -> None:
    """TensorBoard raises its thread's disk error again when we next log, so the thread's traceback is suppressed."""
    if not isinstance(failure.exc_value, OSError):
        threading.__excepthook__(failure)


@dataclass
class Run:
    """What the loop works with, on one process."""

    config: Config
    job: launch.Job
    data: batches.Encoded
    lora: dict[str, torch.nn.Parameter]
    noise_scheduler: DDPMScheduler
    optimizer: torch.optim.Optimizer
    train_step: TrainStep
    accelerator: Accelerator
    sample_inputs: samples.SampleInputs | None  # where sample grids are drawn
    held_out: validation.Validation | None = None  # where pictures are held out, on the process that measures
    publisher: checkpoint.Publisher = field(default_factory=checkpoint.Publisher)
    stop_flag: PendingScalars | None = None  # with several processes: above 0 if one was to stop, a step ago


def train(config: Config, job: launch.Job, stop: StopSignal) -> str:
    """The whole run on this process; returns the closing message.

    Raises:
        Stopped: a stop was requested; a checkpoint of the last step is saved.
        UserError: see `loop`. Disk and out-of-memory errors are passed on.
    """
    # The others wait while the first encodes pictures or draws samples, longer than NCCL's ten minutes.
    timeout = InitProcessGroupKwargs(timeout=timedelta(hours=6))
    accelerator = Accelerator(cpu=config.device == "cpu", kwargs_handlers=[timeout])
    device, world = accelerator.device, accelerator.num_processes
    dtype = models.pick_dtype(config.mixed_precision, device)
    others = f", one of {world} processes" if world > 1 else ""
    logger.info("training on %s in %s%s", device, str(dtype).removeprefix("torch."), others)
    # Loaded once, for class pictures and for training.
    load_unet = cache(
        partial(models.load_unet, config.pretrained_model, config.variant, device, dtype, config.attention)
    )
    data, captions, sample_inputs = encode(config, job, accelerator, dtype, load_unet)

    unet, noise_scheduler = load_unet(), models.load_noise_scheduler(config)
    networks = {"unet": unet} | captions.encoders
    torch.manual_seed(seeds.stream_seed(config.seed, "lora"))
    lora = lora_weights.add_lora(networks, config)
    if config.init_lora and not job.resume:
        lora_weights.begin_from(networks, lora_weights.read_lora(Path(config.init_lora)), config.alpha)

    def loss(batch: batches.Batch, snr_gamma: float | None = config.snr_gamma) -> Tensor:
        return training_loss(unet, captions.read(batch), noise_scheduler, snr_gamma)

    train_step = TrainStep(config, networks, loss, device, dtype)
    lora_optimizer = optimizer.make_optimizer(config, train_step.trainable_params(lora))
    run = Run(config, job, data, lora, noise_scheduler, lora_optimizer, train_step, accelerator, sample_inputs)
    if data.held_out and config.validation_steps and accelerator.is_main_process:
        unweighted, at_once = partial(loss, snr_gamma=None), 4 * config.train_batch_size
        run.held_out = validation.Validation(data.held_out, unweighted, config.seed, at_once)
    first_step = restore(run, Path(job.resume)) if job.resume else 0

    stop.deferred = True
    log = Metrics(config, first_step, accelerator.is_main_process)
    stop.answer = log.answer_stop
    try:
        steps = loop(run, log, first_step, stop)
    finally:
        log.close()
    accelerator.wait_for_everyone()  # the launcher terminates the others once one has exited with an error
    accelerator.end_training()
    if steps < config.max_train_steps:
        raise Stopped(f"stopped at step {steps}; run the same command again to resume")
    if accelerator.is_main_process:
        results.save_results(
            config, lora_weights.lora_state(networks), config.alpha, steps, job,
            unet.config.layers_per_block, noise_scheduler.config.prediction_type,
        )  # fmt: skip
    memory = models.peak_memory(device)
    return f"trained {steps} steps and saved the LoRA to {config.lora_file}" + (f" ({memory})" if memory else "")


def loop(run: Run, log: Metrics, first_step: int, stop: StopSignal) -> int:
    """Run the optimizer steps, with checkpoints and sample grids in between; returns the last step.

    Raises:
        UserError: the loss is not finite (exit 5); the last checkpoint stays as it was.
    """
    config, is_main = run.config, run.accelerator.is_main_process
    factor_at = optimizer.rate_factor_at(config)
    done, stopping = first_step, False
    run.train_step.train()
    if not done:
        validate(run, log, 0)
        draw_samples(run, log, 0)
    while done < config.max_train_steps and not stopping:
        factor = factor_at(done)
        loss, grad_norm, stopping = update(run, done, factor, lambda: stop.requested)
        done += 1
        log.record(done, loss, config.learning_rate * factor, grad_norm)
        ending = stopping or done == config.max_train_steps
        if not stopping:
            validate(run, log, done)
        saving = ending or done % config.checkpointing_steps == 0
        if saving or done % READ_EVERY == 0:
            run.publisher.poll()
            log.writing = run.publisher.seconds
            log.read(latest=saving)
            # The weights just before a series of NaN losses may be their cause: do not save them.
            saving = log.check_finite(ending) and saving
        if saving and is_main:
            with log.label(SAVING):
                run.publisher.wait()
                log.write_rows()
                save_checkpoint(run, done)
                log.draw_curve()  # while the checkpoint is written
        if not stopping:
            draw_samples(run, log, done)
    with log.label(SAVING):
        run.publisher.wait()
    return done


def validate(run: Run, log: Metrics, step: int) -> None:
    """Measure the loss on held-out pictures, on the process and in the steps that do; the last one does."""
    if run.held_out and (step % run.config.validation_steps == 0 or step == run.config.max_train_steps):
        with log.label(VALIDATING):
            loss = run.held_out.measure(run.train_step, step)
        if not step:  # the first forward pass of a process takes longer: no later one is expected to
            del log.others[VALIDATING]
        if loss is not None:
            log.record_validation(step, loss)


def draw_samples(run: Run, log: Metrics, step: int) -> None:
    """Draw the samples of a step, on the process and in the steps that draw any; the last one does."""
    if run.sample_inputs and (step % run.config.validation_steps == 0 or step == run.config.max_train_steps):
        with log.label(SAMPLING):
            strip = samples.draw_samples(
                run.config, step, run.train_step, run.noise_scheduler, run.sample_inputs, run.job.original_size
            )
        log.show_samples(strip, step)


def update(
    run: Run, step: int, factor: float, stop_requested: Callable[[], bool] = lambda: False
) -> tuple[Tensor, Tensor, bool]:
    """One optimizer step over the whole effective batch; `factor` is the learning rate's, from the schedule.

    Returns:
        The loss (mean over the batch), the gradients' norm before clipping, and whether to stop: several
        processes stop one step after the first request, so that none waits for its GPU to read the flag.
    """
    config, world, rank = run.config, run.accelerator.num_processes, run.accelerator.process_index
    # For dropout; all other randomness is part of the batch.
    torch.manual_seed(seeds.stream_seed(config.seed, "dropout", step, rank))
    batch = batches.step_batch(
        run.data, config.seed, step, config.train_batch_size * config.gradient_accumulation_steps * world,
        run.noise_scheduler.config.num_train_timesteps, config.noise_offset, config.prior_loss_weight,
        config.caption_dropout,
    ).shard(rank, world)  # fmt: skip
    loss = run.train_step(batch)
    stop = stop_requested()
    if world > 1:
        before = run.stop_flag
        loss, run.stop_flag = _average(run, loss, stop)
        stop = before is not None and before.read()[0] > 0
    grad_norm = optimizer.update_weights(run.optimizer, run.train_step.scaler, loss, factor, config.max_grad_norm)
    return loss, grad_norm, stop


def _average(run: Run, loss: Tensor, stop_requested: bool) -> tuple[Tensor, PendingScalars]:
    """Average gradients, loss and stop flag over all processes, in one all-reduce."""
    gradients = run.train_step.gradients()
    stop_flag = loss.new_full((1,), float(stop_requested))  # filled by a kernel, so without a host-to-device copy
    flat = torch.cat([*(gradient.flatten() for gradient in gradients), loss[None], stop_flag])
    flat = run.accelerator.reduce(flat, "mean")
    sizes = [gradient.numel() for gradient in gradients]
    for gradient, averaged in zip(gradients, flat[:-2].split(sizes), strict=True):
        gradient.copy_(averaged.view_as(gradient))
    return flat[-2], PendingScalars(flat[-1])


def save_checkpoint(run: Run, step: int) -> None:
    """Publish `checkpoint-<step>`: the LoRA file, and all that an exact resume needs.

    Everything is copied before this returns; training continues while the copy is written, hashed and verified.
    """
    config, train_step = run.config, run.train_step
    tensors, numbers = optimizer.optimizer_state(run.optimizer, train_step.trainable_params(run.lora))
    tensors = train_step.split_state(tensors)
    tensors |= {f"lora.{name}": weight.detach() for name, weight in run.lora.items()}
    tensors = {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    lora = lora_weights.lora_state(train_step.networks, config.alpha / config.rank)  # copies, since it multiplies
    scaler = train_step.scaler.state_dict()
    state = {"step": step, "learns": run.job.fingerprint, "origin": run.job.origin}
    state |= {"scaler": scaler, "optimizer": numbers}

    def write(folder: Path) -> None:
        lora_weights.save_lora(folder / LORA_FILE, lora, {"step": str(step)} | run.job.metadata)
        (folder / "training_state.safetensors").write_bytes(save(tensors))
        (folder / "state.json").write_text(json.dumps(state, indent=2) + "\n")

    folder = Path(config.lora_output_dir)
    named = checkpoint.named(folder, config.resume_from_checkpoint)
    run.publisher.publish(folder, step, write, config.checkpoints_total_limit, named)


def restore(run: Run, folder: Path) -> int:
    """Restore LoRA, optimizer and loss scaler from a verified checkpoint; returns its step."""
    state = checkpoint.read_state(folder)
    tensors = load_file(folder / "training_state.safetensors")
    trained = run.train_step.trainable_params(run.lora)
    try:
        with torch.no_grad():
            for name, weight in run.lora.items():
                weight.copy_(tensors.pop(f"lora.{name}"))
        tensors = run.train_step.merge_state(tensors)
        optimizer.restore_optimizer(run.optimizer, trained, tensors, state["optimizer"])
    except (KeyError, RuntimeError) as error:
        raise UserError(f"{folder} does not match this model: set lora_output_dir to a new folder") from error
    if state["scaler"]:
        run.train_step.scaler.load_state_dict(state["scaler"])
    logger.info("resuming from %s", folder)
    return int(state["step"])


if __name__ == "__main__":
    console.protect()
    sys.exit(main())
