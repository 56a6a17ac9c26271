"""The settings: one flat, typed, frozen dataclass.

A setting is declared once, in `Config`: name, type, default, range and the line that explains it. config.yaml,
`main.py --help` and documentation.md are tested against that declaration. `settings_file.py` reads them.
"""

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

# Exit codes of main.py. 0 is done, 1 a bug of ours, 130/143 stopped by SIGINT/SIGTERM and resumable.
BAD_INPUT, OUT_OF_MEMORY, DISK_OR_DRIVE, LOSS_NOT_FINITE = 2, 3, 4, 5

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


NO_SECRETS = "settings are written into files and pictures, so log in with `hf auth login`, or set HF_TOKEN"
# A hub's access token, or the user's name and password in a URL.
_SECRET = re.compile(r"hf_[A-Za-z0-9]{30,}|(?<=://)[^/@\s]+(?=@)")


def holds_secret(text: str) -> bool:
    return bool(_SECRET.search(text))


def without_secrets(text: str) -> str:
    return _SECRET.sub("***", text)


class UserError(Exception):
    """What a user can mend: one sentence that says what happened and what to do, and the exit code for it.

    Secrets in the message are blotted out, whoever quoted them.
    """

    def __init__(self, message: str, exit_code: int = BAD_INPUT) -> None:
        super().__init__(without_secrets(message))
        self.exit_code = exit_code


def setting(default: Any, explanation: str, **rules: Any) -> Any:
    """A field of `Config`. Rules: `group` (opens a group), `least`, `most`, `above`, `multiple_of`, `each_of`."""
    return field(default=default, metadata={"explanation": explanation, **rules})


@dataclass(frozen=True)
class Config:
    drive_mount_path: str = setting("/content/drive", "where Google Drive is mounted in Colab", group="paths")
    images_dir: str = setting("/content/drive/MyDrive/babanne-images", "folder with your pictures")
    lora_output_dir: str = setting(
        "/content/drive/MyDrive/lora_output", "folder for the LoRA, its checkpoints, samples and logs"
    )
    output_dir: str = setting("/content/drive/MyDrive/refined_output", "folder for the new pictures")
    pretrained_model: str = setting(
        "stabilityai/stable-diffusion-xl-base-1.0",
        "base model: a hub name, a folder in diffusers' layout, or a .safetensors checkpoint",
    )
    refiner_model: str = setting(
        "stabilityai/stable-diffusion-xl-refiner-1.0",
        "refiner: a hub name, a folder in diffusers' layout, or a .safetensors checkpoint",
    )
    pretrained_vae: str | None = setting(
        None,
        "another VAE, in the model's number format, e.g. madebyollin/sdxl-vae-fp16-fix; empty: its own",
    )
    revision: str | None = setting(None, "branch, tag or commit of pretrained_model on the hub; empty means its newest")
    variant: str | None = setting("fp16", "which weight files to prefer, half the download; plain ones if absent")
    report: str | None = setting(None, "also write the report on the pictures to this file, as JSON")

    instance_prompt: str = setting(
        "a photo of <myspecialstyle>", "what every picture shows, with the token to teach", group="concept"
    )
    class_prompt: str = setting(
        "a photo of a painting", "the wider class your pictures belong to, for prior preservation"
    )
    with_prior_preservation: bool = setting(
        False, "keep what class_prompt draws as it is, by learning pictures of it too"
    )
    class_data_dir: str | None = setting(
        None, "pictures of the class; missing ones are drawn; empty means class_images in lora_output_dir"
    )
    num_class_images: int = setting(100, "how many pictures of the class there should be", least=1)
    prior_loss_weight: float = setting(1.0, "weight of the class pictures in the loss", least=0)
    image_extensions: tuple[str, ...] = setting(
        (".jpg",), "files taken as pictures, e.g. [.jpg, .jpeg, .png]", each_of=IMAGE_EXTENSIONS
    )
    min_image_size: int = setting(256, "pictures with a shorter side (pixels) below this are passed over", least=8)
    min_images: int = setting(3, "with fewer good pictures than this, training does not start", least=1)
    skip_bad_images: bool = setting(False, "train even if more than a tenth of the pictures cannot be taken")
    random_flip: bool = setting(False, "also learn every picture mirrored")

    resolution: int = setting(512, "side of the training square in pixels", group="training", least=64, multiple_of=8)
    aspect_ratio_buckets: bool = setting(
        False, "cut each picture to the one of SDXL's shapes that is most like it; false: to a square"
    )
    train_batch_size: int = setting(2, "pictures per step on each GPU", least=1)
    gradient_accumulation_steps: int = setting(1, "batches summed before each update; saves memory", least=1)
    max_train_steps: int = setting(1000, "how many updates to make", least=1)
    learning_rate: float = setting(1e-4, "learning rate of the LoRA", above=0)
    train_text_encoder: bool = setting(False, "also train the attention of both text encoders")
    text_encoder_lr: float = setting(
        5e-6, "learning rate of the text encoders; Prodigy uses learning_rate for all", above=0
    )
    optimizer: Literal["adamw", "prodigy"] = setting(
        "adamw", "adamw, or prodigy, which finds the rate by itself: set learning_rate to 1 for it"
    )
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = setting("constant", "course of the learning rate, by diffusers' names")
    lr_warmup_steps: int = setting(0, "steps over which the learning rate rises from 0", least=0)
    lr_num_cycles: int = setting(1, "cosine_with_restarts: how many times it starts again from the top", least=1)
    lr_power: float = setting(1.0, "polynomial: its exponent", above=0)
    rank: int = setting(16, "rank of the LoRA: how much it can learn, and its file size", least=1)
    lora_alpha: float | None = setting(None, "strength of the LoRA while training; empty means equal to rank", above=0)
    lora_dropout: float = setting(0.0, "share of LoRA inputs dropped, against learning by heart", least=0, most=0.99)
    snr_gamma: float | None = setting(None, "min-SNR weighting of the loss, e.g. 5.0; empty is off", above=0)
    noise_offset: float = setting(
        0.0, "shift of the noise's brightness, e.g. 0.05, for very dark or light pictures", least=0
    )
    adam_beta1: float = setting(0.9, "the optimizer's first beta", least=0, most=0.9999)
    adam_beta2: float = setting(0.999, "the optimizer's second beta", least=0, most=0.99999)
    adam_weight_decay: float = setting(0.01, "the optimizer's weight decay", least=0)
    adam_epsilon: float = setting(1e-8, "the optimizer's epsilon", above=0)
    max_grad_norm: float = setting(1.0, "gradients are clipped to this norm", above=0)
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = setting(
        "auto", "number format of the frozen model; auto: bf16, fp16 on older GPUs, no on a CPU"
    )
    attention: Literal["auto", "sdpa", "xformers"] = setting(
        "auto", "who calculates attention: sdpa is PyTorch's own, and what auto takes; xformers must be installed"
    )
    gradient_checkpointing: bool = setting(False, "less memory, a third slower")
    seed: int = setting(42, "same seed, same run and same pictures", least=0, most=2**63 - 1)
    checkpointing_steps: int = setting(250, "a checkpoint every so many steps", least=1)
    checkpoints_total_limit: int = setting(2, "how many checkpoints to keep", least=1)
    resume_from_checkpoint: str | None = setting(
        "latest", "latest goes on where the last run stopped; or a checkpoint folder; empty: a new run in a new folder"
    )
    validation_prompt: str | None = setting(None, "prompt of the sample pictures; empty means instance_prompt")
    validation_steps: int = setting(250, "a grid of sample pictures every so many steps; 0 is off", least=0)
    num_validation_images: int = setting(4, "pictures in a sample grid", least=1, most=64)
    report_to: Literal["tensorboard", "none"] = setting("tensorboard", "where curves go besides metrics.csv")
    accelerate_config: str | None = setting(None, "your own accelerate file, for several GPUs or machines")
    train_script: str | None = setting(None, "train with diffusers' train_dreambooth_lora_sdxl.py at this path instead")

    prompt: tuple[str, ...] | None = setting(None, "one prompt or a list; empty means instance_prompt", group="drawing")
    prompts_file: str | None = setting(None, "text file with a prompt on each line, instead of prompt")
    negative_prompt: str | None = setting(None, "what the pictures should not show")
    num_images: int = setting(24, "how many pictures to draw, spread over the prompts", least=1, most=100_000)
    width: int = setting(1024, "width of a picture in pixels", least=64, multiple_of=8)
    height: int = setting(1024, "height of a picture in pixels", least=64, multiple_of=8)
    num_inference_steps: int = setting(30, "denoising steps", least=1, most=499)
    guidance_scale: float = setting(5.0, "how strictly the prompt is followed; 1 is off", least=1)
    scheduler: Literal[
        "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler",
        "UniPCMultistepScheduler", "DDIMScheduler",
    ] = setting(
        "EulerDiscreteScheduler", "sampler, by diffusers' name; DPM-Solver++ is DPMSolverMultistepScheduler"
    )  # fmt: skip
    lora_path: str | None = setting(None, "LoRA file or folder to draw with; empty means lora_output_dir")
    lora_scale: float = setting(1.0, "strength of the LoRA in the pictures; 0 is the plain base", least=0)
    inference_batch_size: int | None = setting(None, "pictures drawn at once; empty: as many as pay and fit", least=1)
    rebuild: str | None = setting(None, "a picture that this program has drawn: make it again, from its own recipe")

    refine: bool = setting(True, "refine every picture; false saves base pictures only", group="refining")
    refiner_flow: Literal["img2img", "ensemble"] = setting(
        "img2img", "img2img: finished base latents; ensemble: the refiner takes over at refiner_start"
    )
    refiner_strength: float = setting(0.2, "img2img: how much the refiner repaints", above=0, most=1)
    refiner_start: float = setting(0.8, "ensemble: share of the steps that the base makes", above=0, most=0.99)
    refiner_prompt: str | None = setting(None, "what the refiner is to see; empty means the prompt of the picture")
    aesthetic_score: float = setting(6.0, "score the refiner aims at", least=0, most=10)
    negative_aesthetic_score: float = setting(2.5, "score the refiner keeps away from", least=0, most=10)

    image_format: Literal["png", "jpg"] = setting("png", "file format of the pictures", group="saving")
    save_base: bool = setting(False, "also save every picture as it was before refining")

    def __post_init__(self) -> None:
        """Checks over several settings; one setting's own type and range are `load_config`'s to check."""
        problems = []
        if not self.instance_prompt.strip():
            problems.append("instance_prompt is empty: describe your pictures, e.g. a photo of <myspecialstyle>")
        if self.with_prior_preservation and not self.class_prompt.strip():
            problems.append("class_prompt is empty, and with_prior_preservation needs it: e.g. a photo of lace")
        if self.with_prior_preservation and self.aspect_ratio_buckets:
            problems.append(
                "with_prior_preservation and aspect_ratio_buckets are both true: class pictures are square, keep one"
            )
        if self.optimizer == "prodigy" and self.learning_rate < 0.1:
            problems.append("optimizer prodigy finds the rate by itself, times learning_rate: set learning_rate to 1")
        if self.prompt is not None and self.prompts_file is not None:
            problems.append("prompt and prompts_file are both set: keep one of them")
        if self.prompt is not None and not all(prompt.strip() for prompt in self.prompt or [""]):
            problems.append("prompt holds an empty prompt: write one, or leave the key empty for instance_prompt")
        if self.refine and self.refiner_flow == "img2img" and self.num_inference_steps * self.refiner_strength < 1:
            problems.append(
                f"refiner_strength {self.refiner_strength:g} of {self.num_inference_steps} num_inference_steps is less "
                "than one step: raise one of them"
            )
        secret = [name for name, value in vars(self).items() if holds_secret(repr(value))]
        problems += [f"{name} holds a token or a password: {NO_SECRETS}" for name in secret]
        if problems:
            raise UserError("\n".join(problems))

    @property
    def alpha(self) -> float:
        """LoRA alpha in force: `lora_alpha`, or the rank where it is empty."""
        return float(self.rank if self.lora_alpha is None else self.lora_alpha)

    @property
    def lora_name(self) -> str:
        """Name of the LoRA for ComfyUI and the like: the token's word, or the output folder's where there is none."""
        word = re.search(r"<([\w-]+)>", self.instance_prompt)
        return word[1] if word else Path(self.lora_output_dir).absolute().name


def describe() -> str:
    """Every setting with its default and explanation, by group: the part of `--help` that lists the keys."""
    lines: list[str] = []
    for item in dataclasses.fields(Config):
        if group := item.metadata.get("group"):
            lines += ["", f"{group}:"]
        default = list(item.default) if isinstance(item.default, tuple) else item.default
        lines.append(f"  {item.name}={'' if default is None else default}")
        lines.append(f"      {item.metadata['explanation']}")
    return "\n".join(lines).strip()
