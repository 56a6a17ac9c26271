"""A finished training's files: the LoRA for diffusers and for kohya's programs, and a card with its trigger words."""

import json
import re
from collections import Counter
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lace_lora.config import LORA_FILE, Config
from lace_lora.files import numbered, write_atomically
from lace_lora.sdxl.lora_weights import kohya_state, save_lora
from lace_lora.training.launch import Job


def save_results(
    config: Config, state: dict[str, Tensor], alpha: float, steps: int, job: Job, layers_per_block: int,
    prediction_type: str,
) -> Path:  # fmt: skip
    """Write the LoRA for kohya's programs and, last, since it marks training as finished, for diffusers; returns that.

    Files of an earlier training are kept as `<name>-step<n>`, where n is the number of steps it had.

    Args:
        state: as `lora_weights.lora_state` gives it, with nothing folded in.
        layers_per_block: of the UNet, on which kohya's names depend.
        prediction_type: of the model's noise scheduler.
    """
    folder = Path(config.lora_output_dir)
    # A1111 and InvokeAI read the trigger words from here alone.
    card = {
        "description": config.instance_prompt,
        "sd version": "SDXL",
        "preferred weight": 1.0,
        "activation text": trigger_words(config.instance_prompt),
    }
    card_file, kohya_file = (folder / f"{config.lora_name}.{suffix}" for suffix in ("json", "safetensors"))
    for path in (card_file, kohya_file, folder / LORA_FILE):
        _keep_earlier(path, config.lora_file)
    write_atomically(card_file, json.dumps(card, indent=2, ensure_ascii=False).encode())
    metadata = kohya_metadata(config, alpha, steps, job, prediction_type) | job.metadata
    save_lora(kohya_file, kohya_state(state, alpha, layers_per_block), metadata)
    scale = alpha / config.rank
    folded = {key: weight * scale if "lora_B" in key else weight for key, weight in state.items()}
    origin = {"origin": job.origin} if job.origin else {}
    learnt = {"step": str(steps), "learns": json.dumps(job.fingerprint), **origin}
    save_lora(folder / LORA_FILE, folded, learnt | job.metadata)
    return folder / LORA_FILE


def _keep_earlier(path: Path, lora_file: Path) -> None:
    """Copy a file of an earlier training under a name with its steps; it stays until its replacement is complete."""
    if not path.exists():
        return
    content, ending = path.read_bytes(), "earlier"
    with suppress(SafetensorError, OSError, KeyError, ValueError):  # not a LoRA of ours: its steps are unknown
        with safe_open(lora_file if path.suffix == ".json" else path, framework="numpy") as file:
            metadata = file.metadata() or {}
        ending = f"step{int(metadata.get('step') or metadata['ss_steps'])}"
    names = numbered(path.parent, f"{path.stem}-{ending}", path.suffix)
    kept = next(name for name in names if not name.exists() or name.read_bytes() == content)
    if not kept.exists():
        write_atomically(kept, content)


def trigger_words(instance_prompt: str) -> str:
    """The tokens in angle brackets that trigger the style, or the whole prompt if there are none."""
    return ", ".join(dict.fromkeys(re.findall(r"<[^<>\s]+>", instance_prompt))) or instance_prompt


def kohya_metadata(config: Config, alpha: float, steps: int, job: Job, prediction_type: str) -> dict[str, str]:
    """What kohya's programs show of a LoRA: base model, size, captions. Keys and values as sd-scripts write them."""
    name, captions, side = config.lora_name, list(job.captions.values()), config.resolution
    tags = Counter(tag for caption in captions for part in caption.split(",") if (tag := part.strip().lower()))
    model = str(job.fingerprint.get("pretrained_model", config.pretrained_model))
    buckets = {"0": {"resolution": [side, side], "count": len(captions)}}
    alike = ("max_train_steps", "learning_rate", "lr_scheduler", "optimizer", "seed", "gradient_accumulation_steps")
    return {f"ss_{setting}": str(getattr(config, setting)) for setting in alike} | {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": name,
        "modelspec.date": datetime.now().isoformat(timespec="seconds"),
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.prediction_type": "v" if prediction_type == "v_prediction" else "epsilon",
        "modelspec.trigger_phrase": trigger_words(config.instance_prompt),
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_v2": "False",
        "ss_sd_model_name": model if re.fullmatch(r"[\w-]+/[\w.-]+", model) else Path(model).name,  # no one's folders
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(config.rank),
        "ss_network_alpha": str(alpha),
        "ss_resolution": f"({side}, {side})",
        "ss_output_name": name,
        "ss_training_started_at": str(job.started),
        "ss_steps": str(steps),
        "ss_num_train_images": str(len(captions)),
        "ss_batch_size_per_device": str(config.train_batch_size),
        "ss_bucket_info": json.dumps({"buckets": buckets, "mean_img_ar_error": 0.0}),
        "ss_dataset_dirs": json.dumps({f"1_{name}": {"n_repeats": 1, "img_count": len(captions)}}),
        "ss_tag_frequency": json.dumps({f"1_{name}": tags}, ensure_ascii=False),
    }
