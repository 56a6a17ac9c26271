"""Before the first step: captions and pictures through their encoders, once; pictures of the class, if any, drawn."""

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from torch import Tensor
from tqdm.auto import tqdm

from lace_lora import seeds
from lace_lora.config import Config
from lace_lora.files import write_atomically
from lace_lora.pictures import image_files
from lace_lora.sdxl import models, prompts, sampling
from lace_lora.sdxl.prompts import Embeddings
from lace_lora.sdxl.prompts import embed as embed_prompts
from lace_lora.sdxl.vae import decode_latents
from lace_lora.training import batches, cache, class_pictures, latents
from lace_lora.training.launch import Job


@dataclass
class Preview:
    """What sample grids need besides the UNet."""

    embed: Callable[[], Embeddings]  # the prompt's, by the text encoders as they are now
    vae: AutoencoderKL  # parked on the CPU


@dataclass
class Captions:
    """The different captions for text encoders that train; both empty if they do not."""

    tokens: list[Tensor]  # (U, 77) for each encoder
    encoders: dict[str, torch.nn.Module]  # by diffusers' names

    def read(self, batch: batches.Batch) -> batches.Batch:
        """The batch with the embeddings of the encoders as they are now; as it is, if they do not train."""
        if not self.encoders:
            return batch
        tokens = [ids.to(batch.caption.device)[batch.caption] for ids in self.tokens]
        prompt_embeds, pooled = prompts.encode_tokens(tokens, list(self.encoders.values()))
        return replace(batch, prompt_embeds=prompt_embeds, pooled_prompt_embeds=pooled)


def encode(
    config: Config, job: Job, accelerator: Accelerator, dtype: torch.dtype
) -> tuple[batches.Encoded, Captions, Preview]:
    """Everything a step needs, encoded; the encoders are freed, but those that train."""
    device = accelerator.device
    texts = list(job.captions.values())
    instances = len(texts)
    if config.with_prior_preservation:
        texts += [config.class_prompt] * config.num_class_images
    different = list(dict.fromkeys(texts))

    tokenizers = prompts.load_tokenizers(config.pretrained_model)
    prompts.warn_of_long([*different, config.validation_prompt or ""], tokenizers[0])
    text_encoders = prompts.load_text_encoders(config, device, dtype)
    encode_prompts = partial(prompts.encode_prompts, tokenizers=tokenizers, text_encoders=text_encoders)
    zeros = prompts.zeros_for_empty_prompt(config.pretrained_model, default=True)
    embed = partial(embed_prompts, negative=config.negative_prompt, encode=encode_prompts, zeros=zeros)
    caption_ids, prompt_embeds, pooled = batches.encode_captions(texts, encode_prompts)
    of_class = embed([config.class_prompt])
    embed_preview: Callable[[], Embeddings] = partial(embed, [config.validation_prompt or config.instance_prompt])
    captions = Captions([], {})
    if config.train_text_encoder:
        named = dict(zip(("text_encoder", "text_encoder_2"), text_encoders, strict=True))
        captions = Captions(prompts.tokenize(different, tokenizers), named)
    else:
        embed_preview = partial(_same, embed_preview())
        del text_encoders, encode_prompts, embed
        models.free(device)

    contents = {Path(path): job.contents[path] for path in job.captions}
    encoded = _encode_pictures(config, contents, image_files.formats_of(config.image_extensions), accelerator, dtype)
    if config.with_prior_preservation:
        missing = {Path(path): number for path, number in job.class_to_draw.items()}
        draw_missing(config, missing, of_class, accelerator, dtype)
        contents = {Path(path): digest for path, digest in job.class_pictures.items()}
        contents |= {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in missing}
        # In the same order whether they were there or not: a run that goes on finds all of them there.
        encoded += _encode_pictures(config, dict(sorted(contents.items())), class_pictures.kinds(), accelerator, dtype)
    data = batches.Encoded(encoded, caption_ids, prompt_embeds, pooled, instances)
    return data, captions, Preview(embed_preview, models.load_vae(config, torch.device("cpu"), dtype))


def _same(conditions: Embeddings) -> Embeddings:
    return conditions


def _encode_pictures(
    config: Config, contents: dict[Path, str], kinds: tuple[str, ...], accelerator: Accelerator, dtype: torch.dtype
) -> latents.Latents:
    device = accelerator.device
    shapes = latents.shapes(config.resolution, config.aspect_ratio_buckets)
    source, subfolder = models.vae_place(config)
    place = Path(source) if Path(source).is_file() else Path(source, subfolder)
    depends_on = [cache.stamps(place), config.variant, str(dtype), device.type]
    load_vae = partial(models.load_vae, config, device, dtype)
    with accelerator.local_main_process_first():  # the others find what it has kept
        encoded = latents.encode_pictures(load_vae, contents, shapes, config.random_flip, kinds, depends_on)
    models.free(device)
    return encoded


def draw_missing(
    config: Config,
    missing: dict[Path, int],
    conditions: Embeddings,
    accelerator: Accelerator,
    dtype: torch.dtype,
) -> None:
    """Draw the pictures of the class that are not there, each process its share."""
    share = list(missing.items())[accelerator.process_index :: accelerator.num_processes]
    if share:
        _draw_class(config, dict(share), conditions, accelerator.device, dtype)
    accelerator.wait_for_everyone()


def _draw_class(
    config: Config, files: dict[Path, int], conditions: Embeddings, device: torch.device, dtype: torch.dtype
) -> None:
    config = replace(config, refine=False)
    unet = models.load_unet(config.pretrained_model, config.variant, device, dtype, config.attention)
    vae = models.load_vae(config, device, dtype)
    scheduler = sampling.make_scheduler(config.scheduler, models.load_noise_scheduler(config).config)
    row = conditions.to(device, dtype).rows([0])
    for path, number in tqdm(files.items(), desc="drawing the class", unit="picture"):
        seed = seeds.stream_seed(config.seed, "class", number)
        drawn = sampling.base_latents(unet, scheduler, row, [seed], config)
        content = io.BytesIO()
        decode_latents(vae, drawn)[0].save(content, format="PNG")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content.getvalue())  # one by one, so that a stop costs one
    del unet, vae
    models.free(device)
