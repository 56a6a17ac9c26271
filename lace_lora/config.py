"""Every setting, declared once, and the strict reader of config.yaml and `key=value`.

`Config` has each setting's name, type, default, range, explanation and what it affects. config.yaml, documentation.md
and `main.py --help` are tested against it. The reader reports all mistakes at once, each with its place.
"""

import dataclasses
import difflib
import enum
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from lace_lora.errors import NO_SECRETS, UserError, holds_secret, redact

LORA_FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for
ORIGINAL_SIZE = "original_size"  # in a LoRA's metadata: median shorter side of the photos that it was trained on
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".heic", ".heif", ".bmp", ".tif", ".tiff")


class Affects(enum.Flag):
    """What a setting affects, so that no other list of setting names is needed."""

    NOTHING = 0  # paths, speed, frequency
    TRAINING = enum.auto()  # a run cannot be resumed when it changes: it would learn something else
    CLASS_PICTURE = enum.auto()  # what a class picture that the base draws looks like
    PICTURE = enum.auto()  # part of a picture's recipe
    SCRIPT = enum.auto()  # a flag of diffusers' training script, if it has one of that name


NOTHING, TRAINING, SCRIPT = Affects.NOTHING, Affects.TRAINING, Affects.SCRIPT
CLASS_PICTURE, PICTURE = Affects.CLASS_PICTURE, Affects.PICTURE
DRAWN = CLASS_PICTURE | PICTURE


def setting(default: Any, affects: Affects, explanation: str, **rules: Any) -> Any:
    """A field of `Config`. Rules: `group` (opened), `least`, `most`, `above`, `multiple_of`, `each_of`, `ends_in`."""
    return field(default=default, metadata={"affects": affects, "explanation": explanation, **rules})


@dataclass(frozen=True)
class Config:
    drive_mount_path: str = setting("/content/drive", NOTHING, "where Drive is mounted in Colab", group="set these")
    images_dir: str = setting("/content/drive/MyDrive/babanne-images", NOTHING, "folder with your pictures")
    lora_output_dir: str = setting("/content/drive/MyDrive/lora_output", NOTHING, "folder for LoRA, samples, logs")
    output_dir: str = setting("/content/drive/MyDrive/refined_output", NOTHING, "folder for the new pictures")
    image_extensions: tuple[str, ...] = setting(
        (".jpg", ".jpeg", ".png", ".webp", ".heic"), NOTHING,
        "file extensions of the pictures to use: what phones and the web save as; others: .heif, .bmp, .tif, .tiff",
        each_of=IMAGE_EXTENSIONS,
    )  # fmt: skip
    recursive: bool = setting(False, NOTHING, "also use the pictures in subfolders of images_dir")
    instance_prompt: str = setting(
        "a photo of <myspecialstyle>", SCRIPT, "caption of your pictures, with a token: a made-up word for your style"
    )
    class_prompt: str = setting(
        "a photo of a painting",
        CLASS_PICTURE,
        "prompt for the general class of your pictures; only for with_prior_preservation",
    )
    pretrained_model: str = setting(
        "stabilityai/stable-diffusion-xl-base-1.0", TRAINING | DRAWN,
        "base model: a name on the Hugging Face Hub, a folder in diffusers format, or a .safetensors file",
    )  # fmt: skip
    refiner_model: str = setting(
        "stabilityai/stable-diffusion-xl-refiner-1.0", PICTURE, "refiner: a Hub name, a folder or a .safetensors file"
    )
    resolution: int = setting(512, TRAINING | SCRIPT, "training crop: side in pixels", least=64, multiple_of=8)
    train_batch_size: int = setting(2, SCRIPT, "pictures per batch on each GPU; more need more memory", least=1)
    gradient_checkpointing: bool = setting(False, SCRIPT, "save GPU memory; training is a third slower")
    max_train_steps: int = setting(1000, SCRIPT, "number of training steps; each updates the LoRA once", least=1)
    learning_rate: float = setting(1e-4, SCRIPT, "learning rate: how far each step changes the LoRA", above=0)
    rank: int = setting(16, TRAINING | SCRIPT, "rank of the LoRA: how much it can learn, and its file size", least=1)
    seed: int = setting(
        42,
        TRAINING | DRAWN | SCRIPT,
        "seed of all random numbers",
        least=0,
        most=2**63 - 1,
    )
    prompt: tuple[str, ...] | None = setting(None, NOTHING, "what to draw: a prompt or a list; empty: instance_prompt")
    negative_prompt: str | None = setting(None, DRAWN, "what the pictures should not show")
    num_images: int = setting(24, PICTURE, "number of pictures to draw, spread over the prompts", least=1, most=100_000)
    width: int = setting(1024, DRAWN, "width of a drawn picture in pixels", least=64, multiple_of=8)
    height: int = setting(1024, DRAWN, "height of a drawn picture in pixels", least=64, multiple_of=8)
    lora_scale: float = setting(1.0, PICTURE, "strength of the LoRA; 0 is the base model alone", least=0)
    refiner_strength: float = setting(
        0.2, PICTURE, "img2img: how strongly the refiner changes a picture; keep it at 0.2 or below", above=0, most=1
    )

    revision: str | None = setting(None, TRAINING | DRAWN, "pretrained_model's branch, tag or commit", group="models")
    variant: str | None = setting("fp16", NOTHING, "preferred weight files; fp16 halves the download")
    pretrained_vae: str | None = setting(
        None, TRAINING | PICTURE | SCRIPT, "another VAE, e.g. madebyollin/sdxl-vae-fp16-fix; empty: the model's own"
    )
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = setting(
        "auto", PICTURE, "dtype of the frozen model; auto means bf16, fp16 on older GPUs, no (fp32) on a CPU"
    )
    device: Literal["auto", "cpu"] = setting(
        "auto", NOTHING, "auto: a GPU, which SDXL needs; cpu: none, for days of training"
    )
    attention: Literal["auto", "sdpa", "xformers"] = setting(
        "auto", NOTHING, "attention implementation: auto is PyTorch's own, sdpa; xformers must be installed"
    )

    min_image_size: int = setting(
        256, NOTHING, "skip pictures with a shorter side below this", least=8, group="training"
    )
    validation_fraction: float = setting(
        0.05, SCRIPT, "share of the pictures held out to measure the loss on; 4 to 24 of 40 or more; 0: none",
        least=0, most=0.5,
    )  # fmt: skip
    min_images: int = setting(3, NOTHING, "minimum number of usable pictures", least=1)
    skip_bad_images: bool = setting(False, NOTHING, "train even if more than a tenth of the pictures cannot be read")
    crops_per_image: int | None = setting(
        None, SCRIPT, "views of each large picture: all of it, then close-ups; empty: up to 4; 1: no close-ups",
        least=1, most=16,
    )  # fmt: skip
    crop_caption: str = setting(", close-up", SCRIPT, "what is added to the caption of a close-up")
    caption_model: str | None = setting(
        None,
        SCRIPT,
        "what missing captions are written with, for you to correct, e.g. Salesforce/blip-image-captioning-large",
    )
    random_flip: bool = setting(False, SCRIPT, "also train on every picture mirrored")
    random_rotate: bool = setting(False, SCRIPT, "also train on every picture turned to all four sides, for textures")
    caption_dropout: float = setting(
        0.0, SCRIPT, "share of pictures trained on with the empty prompt, for guidance, e.g. 0.1", least=0, most=0.99
    )
    aspect_ratio_buckets: bool = setting(False, TRAINING | SCRIPT, "crop to SDXL's closest aspect ratio, not a square")
    with_prior_preservation: bool = setting(False, TRAINING, "preserve class_prompt by training on class pictures too")
    class_data_dir: str | None = setting(None, NOTHING, "folder of class pictures; empty: lora_output_dir/class_images")
    num_class_images: int = setting(100, NOTHING, "number of class pictures; missing ones are drawn first", least=1)
    prior_loss_weight: float = setting(1.0, NOTHING, "weight of the class pictures' loss", least=0)
    gradient_accumulation_steps: int = setting(1, SCRIPT, "batches accumulated per step: saves memory", least=1)
    train_text_encoder: bool = setting(False, TRAINING | SCRIPT, "also train the attention of both text encoders")
    text_encoder_lr: float = setting(5e-6, SCRIPT, "text encoders' learning rate; unused with prodigy", above=0)
    optimizer: Literal["adamw", "prodigy"] = setting(
        "adamw",
        TRAINING | SCRIPT,
        "adamw; or prodigy, which adapts the learning rate by itself: set learning_rate to 1 with it",
    )
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = setting("constant", SCRIPT, "learning-rate schedule, by diffusers' name")
    lr_warmup_steps: int = setting(0, SCRIPT, "steps over which the learning rate rises from 0", least=0)
    lr_num_cycles: int = setting(1, SCRIPT, "cosine_with_restarts: number of cycles", least=1)
    lr_power: float = setting(1.0, SCRIPT, "polynomial: its power; 1 is linear", above=0)
    lora_targets: Literal["attention", "attention+feedforward"] = setting(
        "attention", TRAINING | SCRIPT,
        "UNet layers that the LoRA adapts; with feed-forward it can learn more, in more time and memory",
    )  # fmt: skip
    lora_alpha: float | None = setting(None, TRAINING | SCRIPT, "LoRA scale is lora_alpha / rank; empty: 1", above=0)
    init_lora: str | None = setting(
        None, SCRIPT, "LoRA file or folder to begin with, ours or another program's; empty: a new LoRA"
    )
    lora_dropout: float = setting(0.0, SCRIPT, "LoRA dropout probability, against overfitting", least=0, most=0.99)
    snr_gamma: float | None = setting(None, SCRIPT, "min-SNR gamma for the loss, e.g. 5.0; empty is off", above=0)
    noise_offset: float = setting(0.0, SCRIPT, "noise offset, for very dark or bright pictures, e.g. 0.05", least=0)
    adam_beta1: float = setting(0.9, SCRIPT, "the optimizer's beta1", least=0, most=0.9999)
    adam_beta2: float = setting(0.999, SCRIPT, "the optimizer's beta2", least=0, most=0.99999)
    adam_weight_decay: float = setting(0.01, SCRIPT, "the optimizer's weight decay", least=0)
    adam_epsilon: float = setting(1e-8, SCRIPT, "the optimizer's epsilon", above=0)
    max_grad_norm: float = setting(1.0, SCRIPT, "gradients are clipped to this norm", above=0)
    checkpointing_steps: int = setting(250, SCRIPT, "number of steps between checkpoints", least=1)
    checkpoints_total_limit: int = setting(2, SCRIPT, "number of checkpoints to keep; older ones are deleted", least=1)
    resume_from_checkpoint: str | None = setting(
        "latest", NOTHING, "latest resumes the last run; or a checkpoint folder; empty: start over in a new folder"
    )
    validation_prompt: str | None = setting(None, SCRIPT, "prompt of the sample pictures; empty: instance_prompt")
    validation_steps: int = setting(
        250, SCRIPT, "number of steps between sample pictures, and losses on held-out ones; 0 means never", least=0
    )
    num_validation_images: int = setting(4, SCRIPT, "number of sample pictures each time", least=1, most=64)
    report_to: Literal["tensorboard", "none"] = setting("tensorboard", NOTHING, "where to log, besides metrics.csv")
    accelerate_config: str | None = setting(None, NOTHING, "your accelerate config file, for several GPUs or machines")
    train_script: str | None = setting(None, NOTHING, "path of diffusers' train_dreambooth_lora_sdxl.py, to use it")

    prompts_file: str | None = setting(None, NOTHING, "text file with one prompt per line", group="drawing")
    num_inference_steps: int = setting(30, DRAWN, "denoising steps per picture", least=1, most=499)
    guidance_scale: float = setting(5.0, DRAWN, "how closely the prompt is followed; 1 turns guidance off", least=1)
    original_size: int | None = setting(
        None, PICTURE, "shorter side of the photo that SDXL is told to draw; empty: as in the LoRA's training",
        least=64, most=16_384,
    )  # fmt: skip
    scheduler: Literal[
        "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler",
        "UniPCMultistepScheduler", "DDIMScheduler",
    ] = setting(
        "EulerDiscreteScheduler", DRAWN, "sampler, by diffusers' name; DPM-Solver++ is DPMSolverMultistepScheduler"
    )  # fmt: skip
    lora_path: str | None = setting(None, NOTHING, "LoRA file or folder to draw with; empty: lora_output_dir")
    inference_batch_size: int | None = setting(None, NOTHING, "pictures per batch; empty: automatic", least=1)

    refine: bool = setting(True, PICTURE, "refine every picture; false saves base pictures only", group="refining")
    refiner_flow: Literal["img2img", "ensemble"] = setting(
        "img2img", PICTURE, "img2img: repaints the base's finished latents; ensemble: takes over at refiner_start"
    )
    refiner_start: float = setting(0.8, PICTURE, "ensemble: share of steps that the base does", above=0, most=0.99)
    refiner_prompt: str | None = setting(None, PICTURE, "prompt for the refiner alone; empty: the picture's own")
    aesthetic_score: float = setting(6.0, PICTURE, "aesthetic score that the refiner aims at", least=0, most=10)
    negative_aesthetic_score: float = setting(
        2.5, PICTURE, "aesthetic score that it steers away from", least=0, most=10
    )

    image_format: Literal["png", "jpg"] = setting("png", PICTURE, "file format of the pictures", group="saving")
    save_base: bool = setting(False, PICTURE, "also save every picture as it was before refining")

    report: str | None = setting(None, NOTHING, "file for the report on your pictures, as JSON", group="single run")
    preview: str | None = setting(
        None, NOTHING, "PNG file for a sheet of your pictures as training crops them", ends_in=".png"
    )
    rebuild: str | None = setting(None, NOTHING, "path of a drawn picture: draw it again from its recipe")

    def __post_init__(self) -> None:
        """Checks over several settings; one setting's own type and range are `load_config`'s to check."""
        problems = []
        if not self.instance_prompt.strip():
            problems.append("instance_prompt is empty: describe your pictures, e.g. a photo of <myspecialstyle>")
        if self.with_prior_preservation and not self.class_prompt.strip():
            problems.append("class_prompt is empty, and with_prior_preservation needs it: e.g. a photo of lace")
        if self.with_prior_preservation and self.aspect_ratio_buckets:
            both = "with_prior_preservation and aspect_ratio_buckets are both true"
            problems.append(f"{both}: class pictures are square, so set one of them to false")
        if self.random_rotate and self.aspect_ratio_buckets:
            both = "random_rotate and aspect_ratio_buckets are both true"
            problems.append(f"{both}: a turned picture has another shape, so set one of them to false")
        if self.optimizer == "prodigy" and self.learning_rate < 0.1:
            problems.append(
                "optimizer prodigy adapts the learning rate and multiplies it by learning_rate: set that to 1"
            )
        if self.prompt is not None and self.prompts_file is not None:
            problems.append("prompt and prompts_file are both set: remove one of them")
        if self.prompt is not None and not all(prompt.strip() for prompt in self.prompt or [""]):
            problems.append(
                "prompt contains an empty prompt: remove it, or leave the setting empty to use instance_prompt"
            )
        if self.refine and self.refiner_flow == "img2img" and self.num_inference_steps * self.refiner_strength < 1:
            steps = f"refiner_strength {self.refiner_strength:g} times num_inference_steps {self.num_inference_steps}"
            problems.append(f"{steps} is less than one step: raise one of them")
        secret = [name for name, value in vars(self).items() if holds_secret(repr(value))]
        problems += [f"{name} contains an access token or a password: {NO_SECRETS}" for name in secret]
        if problems:
            raise UserError("\n".join(problems))

    def subset(self, affected: Affects) -> dict[str, Any]:
        """The settings that affect something, by name."""
        return {name: getattr(self, name) for name in settings_that_affect(affected)}

    @property
    def alpha(self) -> float:
        """LoRA alpha in force: `lora_alpha`, or the rank where it is empty."""
        return float(self.rank if self.lora_alpha is None else self.lora_alpha)

    @property
    def lora_file(self) -> Path:
        """The finished LoRA, for diffusers."""
        return Path(self.lora_output_dir, LORA_FILE)

    @property
    def lora_name(self) -> str:
        """Name of the LoRA for ComfyUI and the like: the token's word, or the output folder's where there is none."""
        return self.token[1:-1] or Path(os.path.abspath(self.lora_output_dir)).name  # without `..`

    def with_photo_size(self, original_size: int | None) -> "Config":
        """With this `original_size`, where none is set and the pictures are smaller."""
        is_larger = not self.original_size and (original_size or 0) > min(self.width, self.height)
        return dataclasses.replace(self, original_size=original_size) if is_larger else self

    @property
    def token(self) -> str:
        """The first word in angle brackets of `instance_prompt`, with them; empty if there is none."""
        word = re.search(r"<[\w-]+>", self.instance_prompt)
        return word[0] if word else ""


def settings_that_affect(affected: Affects) -> list[str]:
    return [item.name for item in dataclasses.fields(Config) if item.metadata["affects"] & affected]


def describe() -> str:
    """Every setting with its default and explanation, by group: the part of `--help` that lists the keys."""
    lines: list[str] = []
    for item in dataclasses.fields(Config):
        if group := item.metadata.get("group"):
            lines += ["", f"{group}:"]
        default = list(item.default) if isinstance(item.default, tuple) else item.default
        lines += [f"  {item.name}={'' if default is None else default}", f"      {item.metadata['explanation']}"]
    return "\n".join(lines).strip()


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a flat YAML file and `key=value` overrides into a `Config`.

    Raises:
        UserError: one line for every unknown key, wrong type or value out of range, each with its place.
    """
    hints = get_type_hints(Config)
    values: dict[str, Any] = {}
    problems: list[str] = []
    overrides = list(overrides)
    for place, key, node in [*_file_entries(Path(path)), *_override_entries(overrides, hints)]:
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1)
            advice = f"; did you mean {near[0]}?" if near else f"; {NO_SECRETS}" if "token" in key else ""
            problems.append(f"{place}: unknown key {key!r}{advice}")
            continue
        try:
            values[key] = _convert(node, hints[key])
            _check_range(values[key], Config.__dataclass_fields__[key].metadata)
        except ValueError as error:
            problems.append(f"{place}: {key} {error}")
    if problems:
        raise UserError("\n".join(problems))
    try:
        return Config(**values)
    except UserError as error:
        place = f"{path} and command line" if overrides else f"{path}"
        raise UserError("\n".join(f"{place}: {line}" for line in str(error).split("\n"))) from None


def dump_config(config: Config) -> str:
    """The resolved settings as YAML that `load_config` reads back to an equal `Config`."""
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in vars(config).items()}
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=1000)


def _file_entries(path: Path) -> Iterator[tuple[str, str, yaml.Node]]:
    """Of each setting in a file its place, for messages, its name and its value."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; copy config.yaml, or pass your settings file with --config") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = "is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else f"cannot be read ({error.strerror})"
        raise UserError(f"{path}: {reason}") from None
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or "it cannot be parsed"
        raise UserError(f"{path}:{mark.line + 1 if mark else 1}: not valid YAML: {reason}") from None
    if tree is None:
        return
    if not isinstance(tree, yaml.MappingNode):
        raise UserError(f"{path}:1: expected lines of `key: value`")
    seen: dict[str, int] = {}
    for key, value in tree.value:
        line, name = key.start_mark.line + 1, redact(str(key.value))[:60]
        if name in seen:
            raise UserError(f"{path}:{line}: {name} is set twice, here and on line {seen[name]}")
        seen[name] = line
        yield f"{path}:{line}", name, value


def _override_entries(overrides: Iterable[str], hints: dict[str, Any]) -> Iterator[tuple[str, str, yaml.Node]]:
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise UserError(
                f"command line: {override!r} is not of the form key=value: no spaces around =, and quotes around it"
            )
        wants_list = tuple in (get_origin(hints.get(key)), *map(get_origin, get_args(hints.get(key))))
        if wants_list and text.lstrip().startswith("["):
            try:
                node = yaml.compose(text, Loader=yaml.SafeLoader) or yaml.ScalarNode("", text)
            except (yaml.YAMLError, RecursionError):
                raise UserError(f"command line: {key} is not a list like [a, b]") from None
        else:
            # The text as it stands: `prompt=lace: white` is a prompt, not a mapping.
            node = yaml.ScalarNode(yaml.resolver.Resolver().resolve(yaml.ScalarNode, text, (True, False)), text)
        yield "command line", key, node


def _convert(node: yaml.Node, hint: Any) -> Any:
    """A YAML node as a value of the type `hint`; ValueError says what was expected instead."""
    options = get_args(hint) if get_origin(hint) is UnionType else (hint,)
    if isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null":
        if NoneType in options:
            return None
        raise ValueError("is empty and needs a value")
    wanted = next(option for option in options if option is not NoneType)
    if get_origin(wanted) is tuple:
        items = node.value if isinstance(node, yaml.SequenceNode) else [node]
        return tuple(_scalar(item, str) for item in items)
    return _scalar(node, wanted)


# What YAML makes of words by itself; any other tag was written by hand.
_KINDS = ("null", "bool", "int", "float", "str", "timestamp", "merge", "value")
_PLAIN_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in _KINDS}


def _scalar(node: yaml.Node, wanted: Any) -> Any:
    if not isinstance(node, yaml.ScalarNode) or node.tag not in _PLAIN_TAGS:
        raise ValueError(f"is not {_name(wanted)}")
    text, tag = node.value, node.tag.rpartition(":")[2]
    shown = redact(text)  # before it is cut, which could hide what it is
    shown = shown if len(shown) <= 40 else shown[:40] + "…"
    if wanted is str:
        if reason := not_utf8(text):
            raise ValueError(f"is {redact(text)!r}, which {reason}")
        path = os.path.expanduser(text) if text.startswith("~/") else text  # no prompt begins so
        if path.startswith("~/"):
            raise ValueError(f"is {shown!r}, but your home folder is not known: write the full path, or set HOME")
        return path
    if get_origin(wanted) is Literal:
        if text in get_args(wanted):
            return text
        # YAML reads a bare no as false; mixed_precision: no means the word.
        raise ValueError(f"is {shown!r}; choose one of {', '.join(get_args(wanted))}")
    with suppress(ValueError, KeyError):
        if wanted is bool and tag == "bool":
            return yaml.SafeLoader.bool_values[text.lower()]
        if wanted is int and tag == "int":
            return int(text.replace("_", ""))
        if wanted is float and tag in ("int", "float", "str") and math.isfinite(float(text)):
            return float(text)
    raise ValueError(f"is {shown!r}, not {_name(wanted)}")


def not_utf8(text: str) -> str:
    """Why an argument or a path is not UTF-8 text; an empty string if it is."""
    encoding = sys.getfilesystemencoding()
    advice = "change or rename it" if encoding == "utf-8" else f"Python reads it as {encoding}: set PYTHONUTF8=1"
    return f"is not UTF-8 text: {advice}" if any("\ud800" <= letter <= "\udfff" for letter in text) else ""


def _name(wanted: Any) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return names.get(wanted, "one of " + ", ".join(map(str, get_args(wanted))))


def _check_range(value: Any, rules: Any) -> None:
    if value is None:
        return
    if "least" in rules and value < rules["least"]:
        raise ValueError(f"is {value}; it must be at least {rules['least']}")
    if "most" in rules and value > rules["most"]:
        raise ValueError(f"is {value}; it must be at most {rules['most']}")
    if "above" in rules and value <= rules["above"]:
        raise ValueError(f"is {value}; it must be above {rules['above']}")
    if "multiple_of" in rules and value % rules["multiple_of"]:
        raise ValueError(f"is {value}; it must be a multiple of {rules['multiple_of']}")
    if "ends_in" in rules and not value.lower().endswith(rules["ends_in"]):
        raise ValueError(f"is {redact(value)!r}; it must end in {rules['ends_in']}")
    if "each_of" in rules and not (value and {item.lower() for item in value} <= set(rules["each_of"])):
        raise ValueError(f"is [{', '.join(value)}]; choose from {', '.join(rules['each_of'])}")
