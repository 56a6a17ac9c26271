"""Before the first step: captions and pictures go through their encoders, once; missing class pictures are drawn."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor

from lace_lora.config import IMAGE_EXTENSIONS, Config
from lace_lora.files import file_sha256
from lace_lora.pictures import crops
from lace_lora.pictures.image_files import formats_of
from lace_lora.sdxl import models, prompts
from lace_lora.training import batches, latents
from lace_lora.training.cache import stamps
from lace_lora.training.launch import Job
from lace_lora.training.samples import SampleInputs, draw_class_pictures


@dataclass
class Captions:
    """The unique captions, and after them the empty prompt, for text encoders that train; empty if they do not."""

    tokens: list[Tensor]  # (U + 1, 77) for each encoder
    encoders: dict[str, torch.nn.Module]  # by diffusers' names
    zeros: bool  # whether the embeddings of the empty prompt are zeros

    def read(self, batch: batches.Batch) -> batches.Batch:
        """The batch with the embeddings of the encoders as they are now; unchanged if they do not train."""
        if not self.encoders:
            return batch
        tokens = [ids.to(batch.caption.device)[batch.caption] for ids in self.tokens]
        prompt_embeds, pooled = prompts.encode_tokens(tokens, list(self.encoders.values()))
        if self.zeros:
            has_caption = (batch.caption != batches.EMPTY_PROMPT)[:, None]
            prompt_embeds, pooled = prompt_embeds * has_caption[..., None], pooled * has_caption
        return replace(batch, prompt_embeds=prompt_embeds, pooled_prompt_embeds=pooled)


def encode(
    config: Config, job: Job, accelerator: Accelerator, dtype: torch.dtype,
    load_unet: Callable[[], UNet2DConditionModel],
) -> tuple[batches.Encoded, Captions, SampleInputs | None]:  # fmt: skip
    """Encode everything that a step needs; also returns what sample grids need, on the process that draws them.

    The encoders are freed, except those that are trained. `load_unet` is called only if class pictures are to be drawn.
    """
    device = accelerator.device
    to_draw = dict(list(job.class_to_draw.items())[accelerator.process_index :: accelerator.num_processes])
    class_count = len(job.class_pictures) + len(job.class_to_draw)
    captions_of_views, drawn = _views(config, job, accelerator.num_processes)
    to_train = [*captions_of_views, *[config.class_prompt] * class_count]
    unique, caption = batches.unique_captions([*to_train, *job.held_out.values()])

    tokenizers = prompts.load_tokenizers(config.pretrained_model)
    prompts.warn_of_long([*unique, config.validation_prompt or ""], tokenizers[0])
    text_encoders = prompts.load_text_encoders(config, device, dtype)
    encode_prompts = partial(prompts.encode_prompts, tokenizers=tokenizers, text_encoders=text_encoders)
    zeros = prompts.zeros_for_empty_prompt(config.pretrained_model, default=True)
    embed = partial(prompts.embed, negative=config.negative_prompt, encode=encode_prompts, zeros=zeros)
    embeddings = embed(unique, negative=None)  # those of the empty prompt too, as drawing has it
    class_embeddings = embed([config.class_prompt]) if to_draw else None
    embed_sample = partial(embed, [config.validation_prompt or config.instance_prompt])
    captions = Captions([], {}, zeros)
    if config.train_text_encoder:
        named = dict(zip(("text_encoder", "text_encoder_2"), text_encoders, strict=True))
        captions = Captions(prompts.tokenize([*unique, ""], tokenizers), named, zeros)
    else:
        embed_sample = partial(replace, embed_sample())  # a copy of these embeddings each time
        del text_encoders, encode_prompts, embed
        models.free(device)

    load_vae = cache(partial(models.load_vae, config, device, dtype))
    encode_files = partial(_encode_files, config, load_vae, accelerator, dtype)
    cropping = crops.Cropping.of(config)
    contents = {path: job.contents[path] for path in job.captions}
    encoded = encode_files(
        contents, config.image_extensions, cropping, drawn, mirrored=config.random_flip, turned=config.random_rotate
    )
    if class_count:
        if class_embeddings:
            noise_scheduler = models.load_noise_scheduler(config)
            draw_class_pictures(config, to_draw, load_unet(), load_vae(), noise_scheduler, class_embeddings)
        accelerator.wait_for_everyone()
        class_drawn = {path: file_sha256(Path(path)) for path in job.class_to_draw}
        # In the same order whether they existed or not: a resumed run finds all of them there.
        class_files = dict(sorted((job.class_pictures | class_drawn).items()))
        whole = crops.Cropping(cropping.shapes)
        encoded += encode_files(class_files, IMAGE_EXTENSIONS, whole, mirrored=config.random_flip)
    data = batches.Encoded(
        latents=encoded,
        caption=caption[: len(to_train)],
        prompt_embeds=torch.cat([embeddings.prompt_embeds, embeddings.negative_prompt_embeds]),
        pooled_prompt_embeds=torch.cat([embeddings.pooled_prompt_embeds, embeddings.negative_pooled_prompt_embeds]),
        instances=len(captions_of_views),
    )
    if job.held_out:
        contents = {path: job.contents[path] for path in job.held_out}
        encoded = encode_files(contents, config.image_extensions, crops.Cropping(cropping.shapes))
        held_out = replace(data, latents=encoded, caption=caption[len(to_train) :], instances=len(contents))
        data = replace(data, held_out=held_out)
    sample_inputs = None
    if config.validation_steps and accelerator.is_main_process:
        sample_inputs = SampleInputs(embed_sample, load_vae().to("cpu"))
    del encode_files, load_vae
    models.free(device)
    return data, captions, sample_inputs


def _views(config: Config, job: Job, processes: int) -> tuple[list[str], dict[Path, list[bool]] | None]:
    """The caption of every view of the pictures to train on, and which of them the run will see; all, if that is None.

    With several shapes all are encoded: how many pictures each has is not known before.
    """
    views = {path: job.views.get(path, 1) for path in job.captions}
    captions = [
        text + (config.crop_caption if number else "")
        for path, text in job.captions.items()
        for number in range(views[path])
    ]
    if config.aspect_ratio_buckets:
        return captions, None
    draws = config.train_batch_size * config.gradient_accumulation_steps * processes * config.max_train_steps
    seen = iter(batches.seen(len(captions), config.seed, draws))
    return captions, {Path(path): list(islice(seen, count)) for path, count in views.items()}


def _encode_files(
    config: Config, load_vae: Callable[[], AutoencoderKL], accelerator: Accelerator, dtype: torch.dtype,
    contents: dict[str, str], extensions: Sequence[str], cropping: crops.Cropping,
    drawn: dict[Path, list[bool]] | None = None, mirrored: bool = False, turned: bool = False,
) -> latents.Latents:  # fmt: skip
    """Picture files, each with its SHA-256, to latents; several processes encode them once."""
    source, subfolder = models.vae_source(config)
    path = Path(source) if Path(source).is_file() else Path(source, subfolder)
    depends_on = [stamps(path), config.variant, str(dtype), accelerator.device.type]
    by_path, formats = {Path(path): digest for path, digest in contents.items()}, formats_of(extensions)
    with accelerator.local_main_process_first():  # the others find its cache
        return latents.encode_pictures(load_vae, by_path, cropping, mirrored, turned, formats, depends_on, drawn)
