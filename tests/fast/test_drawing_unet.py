"""The UNet and VAE decoder for drawing against diffusers' own, and what remains of a run that is interrupted."""

import copy
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from drawing_helpers import Pictures, difference, drawn
from helpers import Make
from lace_lora.config import Config
from lace_lora.drawing import phases
from lace_lora.fast import drawing_unet
from lace_lora.pictures.recipe import Design, Drawn
from lace_lora.sdxl import models, sampling

CUDA = torch.device("cuda")


def inputs(rows: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """As a pipeline calls the tiny UNet."""
    generator = torch.Generator().manual_seed(rows)
    sizes = {"sample": (rows, 4, 8, 12), "encoder_hidden_states": (rows, 77, 256), "text_embeds": (rows, 128)}
    values = {name: torch.randn(size, generator=generator).to(device, dtype) for name, size in sizes.items()}
    conditions = {"text_embeds": values.pop("text_embeds"), "time_ids": torch.ones(rows, 6, device=device)}
    return values | {"timestep": torch.tensor(500), "added_cond_kwargs": conditions, "return_dict": False}


def test_nothing_changes_on_a_cpu(settings: Make) -> None:
    unet = models.load_unet(settings().pretrained_model, None, torch.device("cpu"), torch.float32)
    before = unet.forward
    drawing_unet.make_fast(unet)
    assert unet.forward == before


@pytest.mark.parametrize("blank", [0, 1, 2, 3])
@torch.no_grad()
def test_fused_matmuls_give_the_same_prediction(settings: Make, blank: int) -> None:
    unet = models.load_unet(settings().pretrained_model, None, torch.device("cpu"), torch.float32)
    given = inputs(4, torch.device("cpu"), torch.float32)
    given["encoder_hidden_states"][:blank] = 0
    [expected] = unet(**given)
    caption_weights = drawing_unet._fuse_attention(unet)
    captions = drawing_unet._without_empty_prompts(given["encoder_hidden_states"])
    assert len(captions) == 4 - blank
    [got] = unet(**given | {"encoder_hidden_states": captions @ caption_weights.T})
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_empty_prompts_after_a_written_one_stay() -> None:
    embeddings = torch.zeros(4, 2, 3)
    assert len(drawing_unet._without_empty_prompts(embeddings)) == 4
    embeddings[2, 1, 0] = -1
    assert torch.equal(drawing_unet._without_empty_prompts(embeddings), embeddings[2:])


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-3), (torch.bfloat16, 3e-2), (torch.float16, 1e-2)])
@torch.no_grad()
def test_a_fast_unet_predicts_what_the_plain_one_does(settings: Make, dtype: torch.dtype, tolerance: float) -> None:
    unet = models.load_unet(settings().pretrained_model, None, CUDA, dtype)
    plain = copy.deepcopy(unet)
    drawing_unet.make_fast(unet)
    for rows in (2, 2, 4, 2, 4, 4):  # a warm-up, a capture, then replays
        given = inputs(rows, CUDA, dtype)
        [expected], [got] = plain(**given), unet(**given)
        assert (got - expected).float().norm() < tolerance * expected.float().norm()
    assert len(unet.forward.replayed.cuda_graphs.graphs) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("blank", [1, 2, 4])
@torch.no_grad()
def test_rows_with_empty_prompts_are_predicted_as_by_the_plain_unet(settings: Make, blank: int) -> None:
    unet = models.load_unet(settings().pretrained_model, None, CUDA, torch.float32)
    plain = copy.deepcopy(unet)
    drawing_unet.make_fast(unet)
    given = inputs(4, CUDA, torch.float32)
    for _ in range(3):
        given["encoder_hidden_states"] = given["encoder_hidden_states"].clone()
        given["encoder_hidden_states"][:blank] = 0
        [expected], [got] = plain(**given), unet(**given)
        assert (got - expected).norm() < 3e-3 * expected.norm()


@pytest.mark.gpu
@torch.no_grad()
def test_a_fast_vae_decodes_what_the_plain_one_does(settings: Make) -> None:
    vae = models.load_vae(settings(), CUDA, torch.float32)
    plain = copy.deepcopy(vae)
    drawing_unet.make_decoder_fast(vae)
    for seed in range(3):  # a warm-up, a capture, a replay
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed)).to(CUDA)
        expected = plain.decode(latents).sample
        torch.testing.assert_close(vae.decode(latents).sample, expected, rtol=1e-2, atol=1e-2)
    assert vae.decoder.forward.cuda_graphs.graphs


@pytest.mark.gpu
def test_pictures_are_those_of_the_plain_unet(settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = drawn(settings(mixed_precision="bf16"), None, [1, 2])
    monkeypatch.setattr(drawing_unet, "make_fast", lambda _: None)
    plain = drawn(settings(mixed_precision="bf16"), None, [1, 2])
    assert all(difference(fast[key], plain[key]) < 40 for key in plain)  # bf16, and random weights


def drawn_in_parts(config: Config, seeds: list[int], stop_at: int, latents_folder: Path) -> Pictures:
    """As `drawn`, by a run that is stopped at its n-th batch, and one that goes on."""
    groups = [[Design(index, "lace", seed)] for index, seed in enumerate(seeds)]
    calls = 0
    real = {name: getattr(sampling, name) for name in ("base_latents", "refined_latents")}

    def counted(name: str):  # type: ignore[no-untyped-def]
        def call(*arguments: object, **named: object) -> torch.Tensor:
            nonlocal calls
            calls += 1
            if calls == stop_at:
                raise KeyboardInterrupt
            return real[name](*arguments, **named)

        return call

    pictures: Pictures = {}

    def finish(one: Drawn) -> None:
        pictures.update({(one.design.seed, False): one.base, (one.design.seed, True): one.refined})  # type: ignore[dict-item]

    with pytest.MonkeyPatch.context() as patch:
        for name in real:
            patch.setattr(sampling, name, counted(name))
        with pytest.raises(KeyboardInterrupt):
            phases.draw_pictures(config, None, groups, latents_folder, finish)
        assert len(list(latents_folder.iterdir())) == stop_at - 1
        pictures.clear()
        phases.draw_pictures(config, None, groups, latents_folder, finish)
    assert calls == 2 * len(seeds) + 1  # nothing was made twice
    return pictures


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_an_interrupted_run_draws_identical_pictures(
    settings: Make, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, seeds = settings(mixed_precision="bf16" if device == "cuda" else "no"), [1, 2, 3]
    uninterrupted = drawn(config, None, seeds, prompt="lace")
    for stop_at, roomy in ((2, False), (3, True), (5, False), (6, True)):
        monkeypatch.setattr(phases, "_VAE_PICTURES", 0 if roomy else 10**6)
        with tempfile.TemporaryDirectory() as latents:
            interrupted = drawn_in_parts(config, seeds, stop_at, Path(latents))
        assert interrupted.keys() == uninterrupted.keys()
        assert all(difference(interrupted[key], uninterrupted[key]) == 0 for key in uninterrupted), (stop_at, roomy)


def test_damaged_latents_are_computed_again(settings: Make, tmp_path: Path) -> None:
    config, groups = settings(), [[Design(0, "lace", 1)]]
    pictures: list[Image.Image | None] = []
    for _ in range(2):
        phases.draw_pictures(config, None, groups, tmp_path, lambda drawn: pictures.append(drawn.refined))
        [*files] = tmp_path.iterdir()
        assert len(files) == 2
        for file in files:
            file.write_bytes(file.read_bytes()[:-3])
    one, other = pictures
    assert one is not None
    assert other is not None
    assert difference(one, other) == 0
