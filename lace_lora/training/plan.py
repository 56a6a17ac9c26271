"""Before a training: what it will take, and which settings are most likely not meant. Without torch."""

from collections.abc import Collection, Sequence
from pathlib import Path

from huggingface_hub.constants import HF_HUB_CACHE

from lace_lora import drive, machine
from lace_lora.config import Config
from lace_lora.files import counted, free_space
from lace_lora.progress import duration
from lace_lora.sdxl import hub
from lace_lora.training import launch

LORA_WEIGHTS = {"attention": 1_451_520, "attention+feedforward": 2_616_320}  # per rank, in SDXL's UNet
# Seconds of a step on GPUs that were measured, by (resolution, batch size): bf16, without checkpointing.
STEP_SECONDS = {
    "NVIDIA H100 80GB HBM3": {
        (512, 1): 0.024, (512, 2): 0.030, (512, 4): 0.045, (512, 8): 0.070, (768, 2): 0.051,
        (1024, 1): 0.051, (1024, 2): 0.079, (1024, 4): 0.147,
    }
}  # fmt: skip
MANY_EPOCHS = 150
HIGH_RATE = 0.1  # for adamw
SAMPLES_MEMORY = 7.3  # GiB, measured at 512², rank 16, with gradient_checkpointing, whose steps take 5.9 there


def gpu_memory(config: Config) -> float:
    """Peak GPU memory of training SDXL in 16 bits, in GiB.

    Fitted to 15 measurements on an H100 in bf16, of 512² to 1024², batches of 1 to 8, ranks 16 to 128: within 0.3.
    With checkpointing, samples take more than the training; that was measured at 512² only. In fp16 and without Triton
    one training was measured, of 1024² and batch 2: 11.9 where this says 14.2. With feed-forward layers none was: what
    they add is computed, from the size of their LoRA and of the inputs that its gradients need.
    """
    pictures = config.train_batch_size * (config.resolution / 512) ** 2  # of 512²
    pictures *= 2 if config.with_prior_preservation else 1
    per_picture = 0.17 if config.gradient_checkpointing else 1.09 if config.lora_targets == "attention" else 1.33
    lora = 0.0277 * (config.rank * LORA_WEIGHTS[config.lora_targets] / LORA_WEIGHTS["attention"] - 16)
    size = 5.5 + per_picture * pictures + lora + (3.2 if config.train_text_encoder else 0)
    return max(size, SAMPLES_MEMORY + lora) if config.gradient_checkpointing and config.validation_steps else size


def pictures_per_step(config: Config) -> int:
    """The effective batch: over all micro-batches and all processes."""
    return config.train_batch_size * config.gradient_accumulation_steps * launch.processes(config)


def disk_space(config: Config) -> float:
    """GB of checkpoints and LoRA files of SDXL, with one checkpoint more while it is written."""
    weights = 4 * LORA_WEIGHTS[config.lora_targets] * config.rank  # bytes in fp32
    # A checkpoint has the LoRA for drawing, its weights, and two moments of each.
    return (4 * weights * (config.checkpoints_total_limit + 1) + 2 * weights) / 1e9


def describe(config: Config, views: Sequence[int], first_step: int, downloads: Sequence[str]) -> list[str]:
    """What a training will take, a line for each question that people ask.

    Args:
        views: how many each picture has to train on.
        downloads: models of which something is still to be downloaded.
    """
    is_sdxl = hub.is_full_size(config.pretrained_model)
    is_measured = is_sdxl and not config.train_script  # the script takes its own time and memory
    batch = pictures_per_step(config)
    epochs = config.max_train_steps * batch / sum(views)
    times = f"{epochs:,.0f} times" if epochs >= 1.5 else "once" if epochs >= 1 else "at most once"
    pictures = counted(len(views), "picture")
    seen, each = (pictures, "picture") if sum(views) == len(views) else (f"{sum(views)} views of {pictures}", "view")
    lines = [
        *_hardware(config, is_sdxl, is_measured),
        f"steps: {first_step} to {config.max_train_steps}, each of {batch} of the {seen}; "
        f"every {each} is seen {times} in all ({epochs:.1f} epochs)",
    ]
    if seconds := _seconds(config, config.max_train_steps - first_step) if is_measured else None:
        lines.append(f"time: {duration(seconds)} of steps (computed from measurements of this kind of GPU)")
    elif is_measured:
        lines.append("time: not measured for this computer; the training says it after its first steps")
    cache = Path(HF_HUB_CACHE)
    lines += [f"download: {model}, to {cache} with {free_space(cache):.1f} GB free" for model in downloads]
    output_dir = Path(config.lora_output_dir)
    on_drive = drive.in_colab() and output_dir.is_relative_to(config.drive_mount_path)
    needed = f"; needed: {disk_space(config):.1f} GB (computed)" if is_measured else ""
    where = "Google Drive" if on_drive else "disk"
    lines.append(f"{where}: {free_space(output_dir):.1f} GB free for {output_dir}{needed}")
    uploaded = "results go to your own Google Drive, nothing else is uploaded" if on_drive else "nothing is uploaded"
    lines.append(f"privacy: your pictures are read on this machine only; {uploaded}")
    if config.pretrained_model == hub.BASE_LAYOUT:
        lines.append("licence: for results of SDXL 1.0, its own: CreativeML Open RAIL++-M")
    elif is_sdxl:
        lines.append(f"licence: for results of {config.pretrained_model}, its own: see its page")
    return lines


def _hardware(config: Config, is_sdxl: bool, is_measured: bool) -> list[str]:
    """The GPU, and what a training of SDXL by this program takes of its memory."""
    gpu = machine.find_gpu() if config.device == "auto" else None
    if gpu is None:
        none = "none (device is cpu)" if config.device == "cpu" else "none that NVIDIA's driver reports"
        return [f"GPU: {none}" + ("" if is_sdxl else "; a model this small needs none")]
    dtype = gpu.dtype(config.mixed_precision)
    lines = [f"GPU: {gpu.name}, {gpu.free:.1f} of {gpu.total:.1f} GiB free; precision: {dtype}"]
    if is_measured:
        needed = gpu_memory(config) * (2 if dtype == "no" else 1)
        at_most = "at most " if dtype == "fp16" else ""
        fits = "" if needed < gpu.free else ": more than is free, so it will train with less at once, which is slower"
        basis = "computed from measurements of an H100"
        basis += "" if config.lora_targets == "attention" else ", and from the sizes of the feed-forward layers"
        lines.append(f"GPU memory: {at_most}{needed:.1f} GiB needed ({basis}){fits}")
    return lines


def _seconds(config: Config, steps: int) -> float | None:
    """How long the steps take, without samples, if that was measured."""
    gpu = machine.find_gpu() if config.device == "auto" else None
    slower = config.gradient_checkpointing or config.train_text_encoder or config.with_prior_preservation
    slower = slower or config.lora_targets != "attention" or launch.processes(config) > 1
    if gpu is None or slower or gpu.dtype(config.mixed_precision) != "bf16":
        return None
    step = STEP_SECONDS.get(gpu.name, {}).get((config.resolution, config.train_batch_size))
    return step * steps * config.gradient_accumulation_steps if step else None


def warnings(config: Config, captions: Collection[str], views: Collection[int] = ()) -> list[str]:
    """Settings that are most likely not meant, each with what to do.

    Args:
        captions: those of the pictures.
        views: how many each picture has; one, if they are left out.
    """
    found = []
    without = [caption for caption in captions if config.token not in caption]
    if without:
        found.append(
            f"{len(without)} of {counted(len(captions), 'caption')} without {config.token}, such as {without[0]!r}: "
            "add it, since prompts with it will call for the style"
        )
    if config.token not in (config.validation_prompt or config.token):
        shown = f"validation_prompt {config.validation_prompt!r} does not contain {config.token}"
        found.append(f"{shown}: add it, or the samples will not show what is learnt")
    if not config.token:
        found.append(
            f"instance_prompt {config.instance_prompt!r} has no token: add a made-up word in angle brackets, such as "
            "<myspecialstyle>, or the style is learnt for every use of these words"
        )
    if config.optimizer == "adamw" and config.learning_rate >= HIGH_RATE:
        found.append(
            f"learning_rate is {config.learning_rate:g}, far too high for adamw: 1e-4 is usual; 1 is for prodigy"
        )
    count = sum(views) or len(captions)
    epochs = config.max_train_steps * pictures_per_step(config) / count
    if epochs > MANY_EPOCHS:
        few = round(100 * count / pictures_per_step(config))
        found.append(
            f"max_train_steps is {config.max_train_steps}: each of {counted(count, 'view' if views else 'picture')} "
            f"would be seen {epochs:,.0f} times, which may copy pictures rather than their style: {few} steps are 100 "
            "times"
        )
    for name in ("lora_output_dir", "output_dir"):
        if Path(getattr(config, name)).resolve() == Path(config.images_dir).resolve():
            found.append(f"{name} is the same folder as images_dir: set another one, to keep results and photos apart")
    return found
