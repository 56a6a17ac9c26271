"""Everything encoded before the first step, against encoding in the step itself."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import data_utils
from helpers import Make, contents, gradient, jpg
from lace_lora import seeds
from lace_lora.pictures import crops, image_files
from lace_lora.sdxl import lora_weights, models, prompts
from lace_lora.sdxl.vae import to_tensor
from lace_lora.training import batches
from lace_lora.training.loss import training_loss
from training_helpers import CPU, as_json, encode_here, job_of, make_run


def test_cached_latents_give_the_loss_of_encoding_in_the_step(settings: Make, photos: Path) -> None:
    config = settings()
    vae = models.load_vae(config, CPU, torch.float32)
    tokenizers, encoders = (
        prompts.load_tokenizers(config.pretrained_model),
        prompts.load_text_encoders(config, CPU, torch.float32),
    )
    captions = {str(path): f"lace number {index}" for index, path in enumerate(data_utils.list_images(photos))}
    data, _, _ = encode_here(config, job_of(captions))
    run = make_run(config, data)
    batch = batches.step_batch(data, config.seed, 3, 2, 1000)
    cached = training_loss(run.train_step.networks["unet"], batch, run.noise_scheduler, None)

    # The same two pictures, found by their time ids and captions, encoded here and now.
    chosen = [int((data.prompt_embeds == embeds).flatten(1).all(1).nonzero()[0]) for embeds in batch.prompt_embeds]
    paths = [Path(list(captions)[index]) for index in chosen]
    embeds, pooled = prompts.encode_prompts([captions[str(path)] for path in paths], tokenizers, encoders)
    squares = [image_files.fit(image_files.open_picture(path)[0], (64, 64))[0] for path in paths]
    posterior = vae.encode(torch.stack([to_tensor(square) for square in squares])).latent_dist
    stream = seeds.stream(config.seed, "step", 3)
    torch.randint(1, (2,), generator=stream)  # the draw of mirrored versions comes first
    sampled = (posterior.mean + posterior.std * torch.randn(2, 4, 8, 8, generator=stream)) * vae.config.scaling_factor
    uncached = replace(batch, latents=sampled, prompt_embeds=embeds, pooled_prompt_embeds=pooled)
    direct = training_loss(run.train_step.networks["unet"], uncached, run.noise_scheduler, None)
    torch.testing.assert_close(cached, direct, rtol=1e-4, atol=1e-5)


def test_text_encoders_get_the_gradients_of_a_plain_backward(settings: Make, photos: Path) -> None:
    """Against the plain way: captions through a pipeline's encoders in the step, and autograd over everything."""
    config = settings(train_text_encoder=True)
    captions = {str(path): f"lace number {index % 2}" for index, path in enumerate(data_utils.list_images(photos))}
    data, read, _ = encode_here(config, job_of(captions))
    run = make_run(config, data)
    torch.manual_seed(3)
    lora = lora_weights.add_lora(read.encoders, config)
    for weight in lora.values():
        weight.data = torch.randn(weight.shape) * 0.1
    assert {name.partition(".")[0] for name in lora} == {"text_encoder", "text_encoder_2"}
    batch = batches.step_batch(data, config.seed, 0, 4, 1000)
    training_loss(run.train_step.networks["unet"], read.read(batch), run.noise_scheduler, None).backward()
    got = {name: weight.grad.clone() for name, weight in lora.items() if weight.grad is not None}

    for weight in lora.values():
        weight.grad = None
    tokenizers = prompts.load_tokenizers(config.pretrained_model)
    texts = [list(dict.fromkeys(captions.values()))[index] for index in batch.caption.tolist()]
    tokens = prompts.tokenize(texts, tokenizers)
    first, second = (
        encoder(ids, output_hidden_states=True) for encoder, ids in zip(read.encoders.values(), tokens, strict=True)
    )
    embeds = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    direct = replace(batch, prompt_embeds=embeds, pooled_prompt_embeds=second.text_embeds)
    training_loss(run.train_step.networks["unet"], direct, run.noise_scheduler, None).backward()
    # SDXL reads the layer before the last of the first encoder: nothing comes back to that one.
    settings_of_first: Any = read.encoders["text_encoder"].config
    last = f"text_encoder.encoder.layers.{settings_of_first.num_hidden_layers - 1}."
    assert got.keys() == {name for name in lora if not name.replace("text_model.", "").startswith(last)}
    for name, gradient_there in got.items():
        torch.testing.assert_close(gradient_there, lora[name].grad, rtol=1e-4, atol=1e-8)
    assert sum(float(gradient.abs().sum()) for gradient in got.values()) > 0


def test_class_pictures_have_time_ids_and_captions_of_their_own(settings: Make, photos: Path, tmp_path: Path) -> None:
    own = jpg(tmp_path / "net.jpg", gradient(200, 120))
    config = settings(with_prior_preservation=True, num_class_images=1, class_prompt="a net")
    captions = {str(path): "lace" for path in data_utils.list_images(photos)}
    job = replace(job_of(captions), class_pictures=as_json(contents([own])))
    data, _, _ = encode_here(config, job)
    assert (data.instances, len(data.caption)) == (5, 6)
    assert data.latents.time_ids[5].tolist() == [120.0, 200.0, 0.0, 22.0, 64.0, 64.0]  # 200 x 120 scaled to 107 x 64
    assert data.caption.tolist() == [0, 0, 0, 0, 0, 1]
    tokenizers = prompts.load_tokenizers(config.pretrained_model)
    encoders = prompts.load_text_encoders(config, CPU, torch.float32)
    assert torch.equal(data.prompt_embeds[1:2], prompts.encode_prompts(["a net"], tokenizers, encoders)[0])


@pytest.mark.parametrize(
    ("validation_steps", "cached", "loads"), [(0, False, 1), (2, False, 1), (2, True, 1), (0, True, 0)]
)
def test_the_vae_is_loaded_once_and_only_if_it_is_needed(
    settings: Make, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    validation_steps: int, cached: bool, loads: int,
) -> None:  # fmt: skip
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = settings(validation_steps=validation_steps)
    job = job_of({str(path): "lace" for path in data_utils.list_images(photos)})
    if cached:
        encode_here(config, job)
    load_vae, loaded = models.load_vae, []

    def note(*arguments: Any) -> Any:
        loaded.append(arguments)
        return load_vae(*arguments)

    monkeypatch.setattr(models, "load_vae", note)
    _, _, preview = encode_here(config, job)
    assert len(loaded) == loads
    assert (preview is not None) == (validation_steps > 0)


@pytest.fixture
def close_ups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Close-ups of small photos, as if SDXL drew smaller pictures."""
    monkeypatch.setattr(crops, "DRAWN_SIDE", 64)


@pytest.mark.usefixtures("close_ups")
def test_close_ups_are_encoded_with_captions_of_their_own(settings: Make, photos: Path) -> None:
    config = settings(resolution=32, crops_per_image=3, crop_caption=" seen closely", max_train_steps=50)
    paths = data_utils.list_images(photos)
    captions = {str(path): f"lace number {index}" for index, path in enumerate(paths)}
    views = dict(zip(captions, (3, 3, 3, 1, 3), strict=True))
    large = [path for path in captions if views[path] == 3]
    data, _, _ = encode_here(config, job_of({path: captions[path] for path in large}, views=views))
    assert data.instances == len(data.latents.mean) == 12
    tokenizers, encoders = (
        prompts.load_tokenizers(config.pretrained_model),
        prompts.load_text_encoders(config, CPU, torch.float32),
    )
    for view in range(12):
        path, number = large[view // 3], view % 3
        caption = captions[path] + (" seen closely" if number else "")
        embeds, _ = prompts.encode_prompts([caption], tokenizers, encoders)
        torch.testing.assert_close(data.prompt_embeds[data.caption[view]], embeds[0], rtol=1e-4, atol=1e-5)
        height, width = data.latents.time_ids[view, :2].tolist()
        assert (width < 72) == (number > 0)


@pytest.mark.usefixtures("close_ups")
@pytest.mark.parametrize("turned", [False, True])
def test_class_pictures_are_not_turned_and_have_no_close_ups(
    settings: Make, photos: Path, tmp_path: Path, turned: bool
) -> None:
    config = settings(
        resolution=32, crops_per_image=3, random_rotate=turned, random_flip=True, with_prior_preservation=True
    )
    own, of_class = data_utils.list_images(photos)[:2], data_utils.list_images(photos)[2:]
    job = job_of({str(path): "lace" for path in own}, views={str(path): 3 for path in own},
                 class_pictures=as_json(contents(of_class)))  # fmt: skip
    data, _, _ = encode_here(config, job)
    assert [len(mean) for mean in data.latents.mean] == [8 if turned else 2] * 6 + [2] * 3
    for step in range(5):
        assert len(batches.step_batch(data, config.seed, step, 2, 1000).caption) == 4


@pytest.mark.usefixtures("close_ups")
def test_a_short_training_encodes_what_it_sees_alone(settings: Make, photos: Path) -> None:
    config = settings(resolution=32, crops_per_image=3, max_train_steps=2)
    captions = {str(path): "lace" for path in data_utils.list_images(photos)}
    views = dict.fromkeys(captions, 3)
    short, _, _ = encode_here(config, job_of(captions, views=views))
    long, _, _ = encode_here(replace(config, max_train_steps=50), job_of(captions, views=views))
    size = config.train_batch_size
    assert sum(mean.numel() > 0 for mean in short.latents.mean) == 2 * size < len(long.latents.mean)
    assert all(mean.numel() for mean in long.latents.mean)
    for step in range(2):
        batch, other = (batches.step_batch(data, config.seed, step, size, 1000) for data in (short, long))
        assert torch.equal(batch.latents, other.latents)
        assert torch.equal(batch.time_ids, other.time_ids)


@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("train_text_encoder", [True, False])
def test_a_dropped_caption_becomes_what_drawing_has_without_a_prompt(
    settings: Make, tiny: Path, photos: Path, tmp_path: Path, zeros: bool, train_text_encoder: bool
) -> None:
    base = shutil.copytree(tiny / "base", tmp_path / "base")
    index = json.loads((base / "model_index.json").read_text())
    (base / "model_index.json").write_text(json.dumps(index | {"force_zeros_for_empty_prompt": zeros}))
    config = settings(pretrained_model=str(base), train_text_encoder=train_text_encoder, negative_prompt="blurry")
    captions = {str(path): f"lace {index}" for index, path in enumerate(data_utils.list_images(photos))}
    data, read, _ = encode_here(config, job_of(captions))
    plain = read.read(batches.step_batch(data, 1, 0, 64, 1000))
    batch = read.read(batches.step_batch(data, 1, 0, 64, 1000, caption_dropout=0.5))
    empty = batch.caption == batches.EMPTY_PROMPT
    assert 0 < empty.sum() < 64
    drawn, _ = prompts.embed_for_both(
        replace(config, negative_prompt=None, refine=False), ["a"], None, CPU, torch.float32
    )
    expected = {
        "prompt_embeds": drawn.negative_prompt_embeds,
        "pooled_prompt_embeds": drawn.negative_pooled_prompt_embeds,
    }
    for name, embeds in expected.items():
        assert embeds.any() != zeros
        got = getattr(batch, name)
        torch.testing.assert_close(got[empty], embeds.expand_as(got[empty]), rtol=1e-4, atol=1e-5)
        assert torch.equal(got[~empty], getattr(plain, name)[~empty])
