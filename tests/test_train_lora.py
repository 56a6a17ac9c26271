"""The training step against formulas and diffusers, and whole runs against uninterrupted ones."""

import json
import math
import shutil
import threading
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import compute_snr
from PIL import Image
from safetensors.torch import load_file, save_file

import data_utils
import train_lora
from helpers import Make, contents, gradient, jpg, refused, snapshot
from lace_lora import seeds
from lace_lora.config import LORA_FILE
from lace_lora.errors import LOSS_NOT_FINITE, UserError
from lace_lora.pictures import image_files
from lace_lora.process import Stopped
from lace_lora.sdxl import lora_weights, models, prompts, sampling
from lace_lora.sdxl.vae import to_tensor
from lace_lora.training import batches, checkpoint, class_pictures
from lace_lora.training.encode import encode
from lace_lora.training.loss import loss_weights, training_loss
from lace_lora.training.metrics import Metrics
from training_helpers import CPU, StopAt, as_json, job_of, make_run, noise_schedule, random_batch, train_here


class Echo(torch.nn.Module):
    """Stands in for a UNet where only the loss's own arithmetic matters: predicts half of its noisy input."""

    dtype = torch.float32

    def forward(self, sample: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor]:
        return (sample / 2,)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_loss_equals_the_formula(prediction_type: str, gamma: float | None) -> None:
    batch, schedule = random_batch(4), noise_schedule(prediction_type)
    loss = training_loss(Echo(), batch, schedule, gamma)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas_cumprod = torch.cumprod(1 - betas, 0)[batch.timesteps]
    expected = 0.0
    for index, alpha in enumerate(alphas_cumprod.tolist()):
        latents, noise = batch.latents[index].double(), batch.noise[index].double()
        noisy = math.sqrt(alpha) * latents + math.sqrt(1 - alpha) * noise
        velocity = math.sqrt(alpha) * noise - math.sqrt(1 - alpha) * latents
        target = noise if prediction_type == "epsilon" else velocity
        snr = alpha / (1 - alpha)
        weight = 1.0 if gamma is None else min(snr, gamma) / (snr + (prediction_type == "v_prediction"))
        expected += weight * ((noisy / 2 - target) ** 2).mean().item() / 4
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_snr_weights_equal_diffusers() -> None:
    schedule, timesteps = noise_schedule(), torch.arange(0, 1000, 7)
    snr = compute_snr(schedule, timesteps)
    expected = torch.stack([snr, torch.full_like(snr, 5.0)], dim=1).min(dim=1)[0] / snr
    torch.testing.assert_close(loss_weights(timesteps, schedule, 5.0), expected)


def test_only_the_lora_changes(settings: Make) -> None:
    run = make_run(settings())
    before = {name: value.clone() for name, value in run.unet.state_dict().items()}
    train_lora.update(run, 0, 1.0, False)
    changed = {name for name, value in run.unet.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)


def test_accumulated_batches_equal_one_large_batch(settings: Make) -> None:
    once = make_run(settings(train_batch_size=4))
    summed = make_run(settings(train_batch_size=2, gradient_accumulation_steps=2))
    for step in range(2):
        loss_once, norm_once, _ = train_lora.update(once, step, 1.0, False)
        loss_summed, norm_summed, _ = train_lora.update(summed, step, 1.0, False)
        torch.testing.assert_close(loss_once, loss_summed, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(norm_once, norm_summed, rtol=1e-4, atol=1e-6)


def test_gradients_are_clipped(settings: Make) -> None:
    run = make_run(settings(max_grad_norm=1e-4))
    seen: list[float] = []

    def note(*_: Any) -> None:
        seen.append(math.sqrt(sum(float(w.grad.pow(2).sum()) for w in run.lora.values() if w.grad is not None)))

    run.optimizer.register_step_pre_hook(note)
    _, norm, _ = train_lora.update(run, 0, 1.0, False)
    assert norm > 1e-3
    assert seen[0] == pytest.approx(1e-4, rel=0.01)


def test_gradient_checkpointing_changes_nothing(settings: Make) -> None:
    plain, saving = make_run(settings()), make_run(settings(gradient_checkpointing=True))
    for run in (plain, saving):
        run.unet.train()
        train_lora.update(run, 0, 1.0, False)
    for name, weight in plain.lora.items():
        torch.testing.assert_close(weight, saving.lora[name])


def test_cached_latents_give_the_loss_of_encoding_in_the_step(settings: Make, photos: Path) -> None:
    config = settings()
    vae = models.load_vae(config, CPU, torch.float32)
    tokenizers, encoders = (
        prompts.load_tokenizers(config.pretrained_model),
        prompts.load_text_encoders(config, CPU, torch.float32),
    )
    captions = {str(path): f"lace number {index}" for index, path in enumerate(data_utils.list_images(photos))}
    data, _, _ = encode(config, job_of(captions), Accelerator(), torch.float32)
    run = make_run(config, data)
    batch = batches.step_batch(data, config.seed, 3, 2, 1000)
    cached = training_loss(run.unet, batch, run.noise_scheduler, None)

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
    direct = training_loss(run.unet, uncached, run.noise_scheduler, None)
    torch.testing.assert_close(cached, direct, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_dropout": 0.1, "random_flip": True},
        {"optimizer": "prodigy", "learning_rate": 1.0, "noise_offset": 0.1},
        {"train_text_encoder": True, "text_encoder_lr": 1e-2, "gradient_checkpointing": True},
        {"with_prior_preservation": True, "num_class_images": 3, "class_prompt": "a net"},
        {"aspect_ratio_buckets": True, "gradient_accumulation_steps": 2},
    ],
)
def test_a_run_in_three_parts_equals_the_straight_one(settings: Make, tmp_path: Path, changes: dict[str, Any]) -> None:
    options = {"max_train_steps": 6, "lr_scheduler": "cosine", **changes}
    straight = settings(lora_output_dir=str(tmp_path / "straight"), **options)
    parted = settings(lora_output_dir=str(tmp_path / "parted"), checkpointing_steps=3, **options)
    train_here(straight)
    resume = None
    for step in (2, 4):
        there = class_pictures.existing(parted)
        with pytest.raises(Stopped, match=f"stopped at step {step}"):
            train_here(parted, resume, StopAt(2), there)
        resume = tmp_path / "parted" / f"checkpoint-{step}"
    train_here(parted, resume, of_class=class_pictures.existing(parted))
    for name in (LORA_FILE, "checkpoint-6/training_state.safetensors"):
        expected, got = load_file(tmp_path / "straight" / name), load_file(tmp_path / "parted" / name)
        assert expected.keys() == got.keys()
        assert all(torch.equal(expected[key], got[key]) for key in expected)
    rows = [(tmp_path / folder / "metrics.csv").read_text().splitlines() for folder in ("straight", "parted")]
    without_seconds = [[line.rpartition(",")[0] for line in lines] for lines in rows]
    assert without_seconds[0] == without_seconds[1]
    assert len(rows[0]) == 7


def test_training_learns_and_starts_are_reproducible(settings: Make, tmp_path: Path) -> None:
    results = []
    for name in ("one", "two"):
        train_here(settings(lora_output_dir=str(tmp_path / name)))
        results.append(load_file(tmp_path / name / LORA_FILE))
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])
    assert any(tensor.abs().max() > 0 for key, tensor in results[0].items() if "lora_B" in key)


def test_learning_rate_follows_diffusers_schedule(settings: Make, tmp_path: Path) -> None:
    train_here(settings(max_train_steps=5, lr_scheduler="cosine", lr_warmup_steps=2))
    lines = (tmp_path / "lora" / "metrics.csv").read_text().splitlines()[1:]
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], 1e-2)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=2, num_training_steps=5)
    for line in lines:
        assert float(line.split(",")[2]) == pytest.approx(schedule.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        schedule.step()


def test_an_update_without_finite_loss_is_left_out(settings: Make) -> None:
    run = make_run(settings())
    train_lora.update(run, 0, 1.0, False)
    before = [weight.clone() for weight in run.lora.values()]
    moments = [tensor.clone() for state in run.optimizer.state.values() for tensor in state.values()]
    latents = run.data.latents
    broken = replace(latents, mean=[mean * torch.nan for mean in latents.mean])
    good, run.data = run.data, replace(run.data, latents=broken)
    loss, _, _ = train_lora.update(run, 1, 1.0, False)
    assert loss.isnan()
    assert all(map(torch.equal, before, run.lora.values()))
    assert all(map(torch.equal, moments, (t for state in run.optimizer.state.values() for t in state.values())))
    run.data = good
    train_lora.update(run, 2, 1.0, False)
    assert not all(map(torch.equal, before, run.lora.values()))


@pytest.mark.parametrize(
    ("losses", "norms", "ending", "good"),
    [
        ([1.0, 1.0], [1.0, 1.0], True, True),
        ([math.nan, 1.0], [math.nan, 1.0], True, True),
        ([1.0, math.nan], [1.0, math.nan], False, False),
        ([1.0, math.nan], [1.0, math.nan], True, True),
        ([1.0, *[math.nan] * 5, 1.0], [1.0] * 7, False, None),
        ([1.0, *[math.inf] * 4], [1.0] * 5, False, False),
        ([1.0, *[math.inf] * 5], [1.0] * 6, False, None),
        ([1.0] * 25, [1.0, *[math.inf] * 24], True, True),  # as fp16 does while it looks for its scale
        ([1.0] * 26, [1.0, *[math.inf] * 25], False, None),
    ],
)
def test_how_many_updates_may_be_left_out(
    losses: list[float], norms: list[float], ending: bool, good: bool | None, settings: Make
) -> None:
    log = Metrics(settings(), first_step=0, quiet=True)
    log.rows = [{"step": 7, "loss": loss, "grad_norm": norm} for loss, norm in zip(losses, norms, strict=True)]
    if good is None:
        refused(lambda: log.check_finite(ending), "not a finite number at step 7.*learning_rate", LOSS_NOT_FINITE)
    else:
        assert log.check_finite(ending) == good


def test_a_loss_that_is_not_finite_stops_the_run(settings: Make, tmp_path: Path) -> None:
    config = settings(max_train_steps=40, learning_rate=1e30, checkpointing_steps=1)
    with pytest.raises(UserError, match="not a finite number") as caught:
        train_here(config)
    assert caught.value.exit_code == LOSS_NOT_FINITE
    assert not (tmp_path / "lora" / LORA_FILE).exists()
    for folder in (tmp_path / "lora").glob("checkpoint-*"):
        assert all(tensor.isfinite().all() for tensor in load_file(folder / "training_state.safetensors").values())


def test_checkpoint_of_another_model_is_refused(settings: Make, tmp_path: Path) -> None:
    train_here(settings(max_train_steps=2))
    with pytest.raises(UserError, match="does not fit this model"):
        train_here(settings(rank=8), resume=tmp_path / "lora" / "checkpoint-2")


def test_text_encoders_learn_what_the_whole_gradient_says(settings: Make, photos: Path) -> None:
    """Against the plain way: captions through a pipeline's encoders in the step, and autograd over everything."""
    config = settings(train_text_encoder=True)
    captions = {str(path): f"lace number {index % 2}" for index, path in enumerate(data_utils.list_images(photos))}
    data, read, _ = encode(config, job_of(captions), Accelerator(), torch.float32)
    run = make_run(config, data)
    torch.manual_seed(3)
    lora = lora_weights.add_lora(read.encoders, config)
    for weight in lora.values():
        weight.data = torch.randn(weight.shape) * 0.1
    assert {name.partition(".")[0] for name in lora} == {"text_encoder", "text_encoder_2"}
    batch = batches.step_batch(data, config.seed, 0, 4, 1000)
    training_loss(run.unet, read.read(batch), run.noise_scheduler, None).backward()
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
    training_loss(run.unet, direct, run.noise_scheduler, None).backward()
    # SDXL reads the layer before the last of the first encoder: nothing comes back to that one.
    settings_of_first: Any = read.encoders["text_encoder"].config
    last = f"text_encoder.encoder.layers.{settings_of_first.num_hidden_layers - 1}."
    assert got.keys() == {name for name in lora if not name.replace("text_model.", "").startswith(last)}
    for name, gradient_there in got.items():
        torch.testing.assert_close(gradient_there, lora[name].grad, rtol=1e-4, atol=1e-8)
    assert sum(float(gradient.abs().sum()) for gradient in got.values()) > 0


def test_a_checkpoint_of_before_text_encoders_could_train_is_gone_on_with(settings: Make, tmp_path: Path) -> None:
    train_here(settings(max_train_steps=4))
    shutil.copytree(tmp_path / "lora", tmp_path / "old")
    folder = tmp_path / "old" / "checkpoint-2"
    names = load_file(folder / "training_state.safetensors")
    save_file(
        {key.replace(".unet.", ".", 1): value for key, value in names.items()}, folder / "training_state.safetensors"
    )
    state = json.loads((folder / "state.json").read_text())
    del state["optimizer"]
    (folder / "state.json").write_text(json.dumps(state))
    train_here(settings(max_train_steps=4, lora_output_dir=str(tmp_path / "again")), folder)
    expected, got = (load_file(tmp_path / name / LORA_FILE) for name in ("lora", "again"))
    assert all(torch.equal(expected[key], got[key]) for key in expected)


def test_sample_pictures_that_are_black_do_not_end_the_training(
    settings: Make, tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(tiny / "base", tmp_path / "base")
    [file] = (tmp_path / "base" / "vae").glob("*.safetensors")
    broken = load_file(file)
    broken["decoder.conv_out.bias"].fill_(torch.nan)
    save_file(broken, file, metadata={"format": "pt"})
    train_here(settings(pretrained_model=str(tmp_path / "base"), validation_steps=2, num_validation_images=1))
    assert (tmp_path / "lora" / LORA_FILE).exists()
    assert "no sample pictures at step 2" in caplog.text


def test_what_the_text_encoders_learnt_is_saved(settings: Make, tmp_path: Path) -> None:
    train_here(settings(train_text_encoder=True, text_encoder_lr=1e-2, validation_steps=2, num_validation_images=1))
    for name in (LORA_FILE, f"checkpoint-4/{LORA_FILE}"):
        state = load_file(tmp_path / "lora" / name)
        for prefix in ("unet.", "text_encoder.text_model.", "text_encoder_2.text_model."):
            learnt = [tensor.abs().max() > 0 for key, tensor in state.items() if key.startswith(prefix) and "_B" in key]
            assert sum(learnt) >= len(learnt) - 4  # all but the first encoder's last layer, which SDXL does not read
            assert sum(learnt) > 4
    grids = [(tmp_path / "lora" / "samples" / f"step-00000{step}.png").read_bytes() for step in (2, 4)]
    assert grids[0] != grids[1]


def test_missing_class_pictures_are_drawn_by_the_base_and_kept(settings: Make, tmp_path: Path) -> None:
    config = settings(with_prior_preservation=True, num_class_images=3, class_prompt="a net", max_train_steps=1)
    train_here(config)
    drawn = sorted((tmp_path / "lora" / "class_images").iterdir())
    assert len(drawn) == 3
    assert len({path.read_bytes() for path in drawn}) == 3
    assert class_pictures.existing(config) == contents(drawn)
    before = snapshot(tmp_path / "lora" / "class_images")
    again = replace(config, lora_output_dir=str(tmp_path / "again"), class_data_dir=str(tmp_path / "lora/class_images"))
    train_here(again, of_class=class_pictures.existing(again))
    assert snapshot(tmp_path / "lora" / "class_images") == before
    # With another prompt they are of no use, and with a larger number only the rest is drawn.
    assert class_pictures.existing(replace(config, class_prompt="a stripe")) == {}
    more = class_pictures.to_draw(replace(config, num_class_images=5), drawn)
    assert list(more.values()) == [3, 4]


def test_pictures_of_the_class_are_known_by_content_and_drawn_ones_by_their_settings(
    settings: Make, tmp_path: Path
) -> None:
    folder = tmp_path / "nets"
    folder.mkdir()
    config = settings(class_data_dir=str(folder), num_class_images=3, class_prompt="a net")

    def learnt(**changes: Any) -> dict[str, Any]:
        changed = replace(config, **changes)
        return class_pictures.fingerprint(changed, class_pictures.existing(changed))

    jpg(folder / "mine.jpg", gradient())
    before = learnt()
    for path in class_pictures.to_draw(config, class_pictures.existing(config)):
        gradient().save(path)
    assert learnt() == before  # drawn or to be drawn
    (folder / "mine.jpg").rename(folder / "renamed.jpg")
    assert learnt() == before
    assert learnt(seed=7) == before | {"seed": 7}
    assert learnt(num_class_images=4) == before | {"num_class_images": 4}
    assert learnt(seed=7, num_class_images=1) == learnt(num_class_images=1)  # none is drawn
    jpg(folder / "renamed.jpg", gradient(turn=1))
    assert learnt() != before


def test_class_pictures_have_time_ids_and_captions_of_their_own(settings: Make, photos: Path, tmp_path: Path) -> None:
    own = jpg(tmp_path / "net.jpg", gradient(200, 120))
    config = settings(with_prior_preservation=True, num_class_images=1, class_prompt="a net")
    captions = {str(path): "lace" for path in data_utils.list_images(photos)}
    job = replace(job_of(captions), class_pictures=as_json(contents([own])))
    data, _, _ = encode(config, job, Accelerator(), torch.float32)
    assert (data.instances, len(data.caption)) == (5, 6)
    assert data.latents.time_ids[5].tolist() == [120.0, 200.0, 0.0, 22.0, 64.0, 64.0]  # 200 x 120 scaled to 107 x 64
    assert data.caption.tolist() == [0, 0, 0, 0, 0, 1]
    tokenizers = prompts.load_tokenizers(config.pretrained_model)
    encoders = prompts.load_text_encoders(config, CPU, torch.float32)
    assert torch.equal(data.prompt_embeds[1:], prompts.encode_prompts(["a net"], tokenizers, encoders)[0])


def test_prior_preservation_adds_the_class_loss_by_its_weight(settings: Make) -> None:
    batch, schedule = random_batch(4), noise_schedule()
    weighted = replace(batch, weights=torch.tensor([2.0, 1.0, 2.0, 1.0]))
    parts = [replace(batch, **{k: v[rows] for k, v in vars(batch).items()}) for rows in ([0, 2], [1, 3])]
    mine, other = (training_loss(Echo(), part, schedule, 5.0) for part in parts)
    torch.testing.assert_close(training_loss(Echo(), weighted, schedule, 5.0), mine + 0.5 * other)


@pytest.mark.parametrize("changes", [{}, {"lora_dropout": 0.1}])
def test_a_checkpoint_is_of_its_step_however_long_its_writing_takes(
    settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    train_here(settings(lora_output_dir=str(tmp_path / "quick"), max_train_steps=3, **changes))
    update, publish, learnt_more = train_lora.update, checkpoint.publish, threading.Event()

    def note(run: train_lora.Run, step: int, *arguments: Any) -> Any:
        result = update(run, step, *arguments)
        if step == 2:  # the third step: what was learnt in the second is gone from the weights
            learnt_more.set()
        return result

    def slowly(*arguments: Any) -> Path:
        assert learnt_more.wait(60)
        return publish(*arguments)

    monkeypatch.setattr(train_lora, "update", note)
    monkeypatch.setattr(checkpoint, "publish", slowly)
    train_here(settings(lora_output_dir=str(tmp_path / "slow"), max_train_steps=3, **changes))
    for name in (LORA_FILE, "training_state.safetensors"):
        expected, got = (load_file(tmp_path / run / "checkpoint-2" / name) for run in ("quick", "slow"))
        assert all(torch.equal(expected[key], got[key]) for key in expected)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_run_in_parts_equals_the_straight_one_on_a_gpu_within_rounding(
    settings: Make, tmp_path: Path, precision: str
) -> None:
    options = {"max_train_steps": 9, "mixed_precision": precision, "learning_rate": 1e-3}
    train_here(settings(lora_output_dir=str(tmp_path / "straight"), **options))
    parted = settings(lora_output_dir=str(tmp_path / "parted"), checkpointing_steps=3, **options)
    for resume, stop in ((None, 3), ("checkpoint-3", 3), ("checkpoint-6", None)):
        with pytest.raises(Stopped) if stop else nullcontext():
            train_here(parted, tmp_path / "parted" / resume if resume else None, StopAt(stop))
    expected, got = (load_file(tmp_path / run / LORA_FILE) for run in ("straight", "parted"))
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=2e-3)


@pytest.mark.parametrize("most", [1, 0])
def test_sample_pictures_without_memory_are_drawn_one_by_one_or_not_at_all(
    settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, most: int
) -> None:
    config = settings(max_train_steps=2, validation_steps=2, num_validation_images=3, train_batch_size=2)
    train_here(replace(config, lora_output_dir=str(tmp_path / "plenty")))
    drawn = sampling.base_latents

    def scarce(*arguments: Any) -> torch.Tensor:
        if len(arguments[3]) > most:  # seeds
            raise torch.OutOfMemoryError("CUDA out of memory")
        return drawn(*arguments)

    monkeypatch.setattr(sampling, "base_latents", scarce)
    train_here(config)
    grids = [tmp_path / run / "samples" / "step-000002.png" for run in ("plenty", "lora")]
    if most:
        plenty, few = (torch.from_numpy(np.array(Image.open(grid))).int() for grid in grids)
        assert (plenty - few).abs().max() <= 2
    else:
        assert not grids[1].exists()
        assert "no sample pictures at step 2: out of memory" in caplog.text


@pytest.mark.parametrize("changes", [{}, {"optimizer": "prodigy", "learning_rate": 1.0}])
@pytest.mark.parametrize("plain_first", [False, True])
def test_either_way_of_learning_goes_on_from_the_others_checkpoint(
    settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], plain_first: bool
) -> None:
    config = settings(max_train_steps=4, checkpointing_steps=2, **changes)
    train_here(replace(config, lora_output_dir=str(tmp_path / "straight")))
    ways = iter(["the test wants it", ""] if plain_first else ["", "the test wants it"])
    monkeypatch.setattr("train_step.why_plain", lambda *_: next(ways))
    with pytest.raises(Stopped):
        train_here(config, stop=StopAt(2))
    train_here(config, resume=tmp_path / "lora" / "checkpoint-2")
    straight, mixed = (load_file(tmp_path / run / "pytorch_lora_weights.safetensors") for run in ("straight", "lora"))
    # Together: Adam makes steps of the same size of gradients that are rounding and no more.
    distance = sum((mixed[name] - weight).pow(2).sum() for name, weight in straight.items())
    assert distance / sum(weight.pow(2).sum() for weight in straight.values()) < 1e-6


def test_sample_grids_do_not_disturb_the_training(settings: Make, tmp_path: Path) -> None:
    plain = settings(lora_output_dir=str(tmp_path / "plain"))
    watched = settings(
        lora_output_dir=str(tmp_path / "watched"), validation_steps=2, num_validation_images=2, num_inference_steps=5
    )
    for config in (plain, watched):
        train_here(config)
    expected, got = (load_file(tmp_path / name / LORA_FILE) for name in ("plain", "watched"))
    assert all(torch.equal(expected[key], got[key]) for key in expected)
    grids = sorted(path.name for path in (tmp_path / "watched" / "samples").iterdir())
    assert grids == ["step-000002.png", "step-000004.png"]


def test_checkpoint_state_says_what_was_learnt(settings: Make, tmp_path: Path) -> None:
    train_here(settings(max_train_steps=2))
    state = json.loads((tmp_path / "lora" / "checkpoint-2" / "state.json").read_text())
    assert state["step"] == 2
    assert state["learns"] == {"rank": 4}
