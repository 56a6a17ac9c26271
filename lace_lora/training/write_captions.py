"""What `main.py --mode train` runs first with a `caption_model`: it writes the captions that are missing.

    python -m lace_lora.training.write_captions --config config.yaml --job job.json

One process, however many train.
"""

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
)

from lace_lora import console
from lace_lora.config import Config
from lace_lora.errors import UserError, explain, first_line
from lace_lora.files import counted, one_line, remove_unfinished, write_atomically
from lace_lora.pictures import crops, image_files
from lace_lora.progress import Progress
from lace_lora.sdxl import hub, models
from lace_lora.training import captions, launch

MAX_TOKENS = 60  # SDXL reads 77, those of the instance prompt included
REQUEST = "Describe this picture in one short sentence."  # for models that chat


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    models.prepare_process()
    return launch.run_job("Write captions", lambda config, job, _folder, _stop: write(config, job.to_caption))


def write(config: Config, to_caption: Mapping[str, str]) -> str:
    """Write the caption file of each picture: the instance prompt, a comma, and what the model says; closing line.

    Raises:
        UserError: the model cannot be used, or a picture can no longer be read.
    """
    with _one_line_errors(config):
        processor, model = _load(config)
    for folder in {Path(file).parent for file in to_caption.values()}:
        folder.mkdir(parents=True, exist_ok=True)
        remove_unfinished(folder)
    whole = crops.Cropping(crops.shapes(config.resolution, config.aspect_ratio_buckets))
    formats = image_files.formats_of(config.image_extensions)
    for path, file in Progress(to_caption.items(), desc="writing captions", unit="picture"):
        try:
            [(picture, _)] = crops.open_views(Path(path), whole, formats)  # what training sees of it
        except image_files.BROKEN as error:
            raise UserError(f"{path} can no longer be read ({error}): run the same command again") from error
        with _one_line_errors(config):
            description = _describe(picture, processor, model)
        caption = ", ".join(filter(None, (one_line(config.instance_prompt), one_line(description))))
        write_atomically(Path(file), f"{caption}\n".encode())  # one by one, so that a stop loses at most one
    return (
        f"wrote {counted(len(to_caption), 'caption')} to {captions.folder_of(config)}: read and correct them, then run "
        "the same command again, which trains with them as they are then"
    )


def _load(config: Config) -> tuple[Any, Any]:
    """The processor and the model. Whether it is of the right kind is checked before its weights are downloaded."""
    name, safe = str(config.caption_model), {"trust_remote_code": False}
    device = models.pick_device(config.device)
    place = hub.find_caption_model(name, weights=False)
    kind = AutoConfig.from_pretrained(place, **safe)
    if type(kind) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise ValueError(f"a model of type {kind.model_type} writes no captions")
    processor = AutoProcessor.from_pretrained(place, **safe)
    model, report = AutoModelForImageTextToText.from_pretrained(
        hub.find_caption_model(name, weights=True), dtype=models.pick_dtype(config.mixed_precision, device),
        use_safetensors=True, output_loading_info=True, **safe,
    )  # fmt: skip
    if missing := sorted(report["missing_keys"]):  # which transformers fills with random numbers
        raise ValueError(f"it has no weights for {missing[0]}")
    return processor, model.to(device).eval()


@torch.inference_mode()
def _describe(picture: Image.Image, processor: Any, model: Any) -> str:
    """What a picture shows, the most likely words."""
    if getattr(processor, "chat_template", None):
        content = [{"type": "image", "image": picture}, {"type": "text", "text": REQUEST}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt",
        )  # fmt: skip
    else:
        inputs = processor(images=picture, return_tensors="pt")
    inputs = inputs.to(model.device, model.dtype)
    tokens = model.generate(**inputs, max_new_tokens=MAX_TOKENS, do_sample=False)
    # A decoder repeats the request before its answer.
    repeated = 0 if "input_ids" not in inputs or model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    return str(processor.batch_decode(tokens[:, repeated:], skip_special_tokens=True)[0])


@contextmanager
def _one_line_errors(config: Config) -> Iterator[None]:
    """Errors of transformers as one line."""
    try:
        yield
    except (SafetensorError, OSError, *models.BAD_CONTENT) as error:
        if explained := explain(error, "choose a smaller caption_model, or set device: cpu"):
            raise explained from error
        advice = f"choose an image-to-text model of transformers, such as {hub.CAPTION_MODEL}"
        raise UserError(
            f"caption_model: {config.caption_model} cannot be used ({first_line(error)}): {advice}"
        ) from error


if __name__ == "__main__":
    console.protect()
    sys.exit(main())
