"""Drawing against diffusers' pipelines driven by hand, with the LoRA loaded the plain way."""

import errno
import json
import shutil
import tempfile
import threading
import weakref
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UniPCMultistepScheduler,
)

from drawing_helpers import NEGATIVE, PROMPT, difference, drawn
from helpers import Make, refused
from lace_lora.config import LORA_FILE, Config
from lace_lora.drawing import phases, saving
from lace_lora.errors import UserError
from lace_lora.pictures.recipe import Design, Drawn
from lace_lora.sdxl import lora_weights, models, sampling
from lace_lora.seeds import stream_seed


@pytest.fixture(scope="module")
def lora(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA that changes pictures visibly."""
    unet = models.load_unet(str(tiny / "base"), None, torch.device("cpu"), torch.float32)
    config = Config(rank=4)
    generator = torch.Generator().manual_seed(3)
    for weight in lora_weights.add_lora({"unet": unet}, config).values():
        weight.data = torch.randn(weight.shape, generator=generator) * 0.2
    path = tmp_path_factory.mktemp("lora") / LORA_FILE
    lora_weights.save_lora(path, lora_weights.lora_state({"unet": unet}, 1.0), {})
    return path


@pytest.mark.parametrize(
    ("flow", "scheduler"),
    [
        ("img2img", EulerDiscreteScheduler),
        ("img2img", DPMSolverMultistepScheduler),
        ("ensemble", EulerDiscreteScheduler),
        ("ensemble", EulerAncestralDiscreteScheduler),
        ("ensemble", DPMSolverMultistepScheduler),
        ("ensemble", UniPCMultistepScheduler),
        ("ensemble", DDIMScheduler),
    ],
)
def test_pictures_equal_those_of_diffusers_pipelines(settings: Make, lora: Path, flow: str, scheduler: Any) -> None:
    told = 160 if scheduler is EulerDiscreteScheduler else None
    config = settings(
        refiner_flow=flow, scheduler=scheduler.__name__, negative_prompt=NEGATIVE, save_base=True,
        refiner_strength=0.4, refiner_start=0.6, aesthetic_score=7.0, height=72, original_size=told,
    )  # fmt: skip
    ours = drawn(config, lora, [11])

    base = StableDiffusionXLPipeline.from_pretrained(config.pretrained_model, torch_dtype=torch.float32)
    in_full = {"clip_sample": False, "set_alpha_to_one": False}  # as in SDXL's own file, but not this model's
    base.scheduler = scheduler.from_config(base.scheduler.config, **in_full if scheduler is DDIMScheduler else {})
    refiner = StableDiffusionXLImg2ImgPipeline.from_pretrained(
        config.refiner_model, vae=base.vae, text_encoder_2=base.text_encoder_2, tokenizer_2=base.tokenizer_2,
        scheduler=base.scheduler, torch_dtype=torch.float32,
    )  # fmt: skip
    base.load_lora_weights(str(lora.parent), weight_name=lora.name)
    common = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "num_inference_steps": 5, "guidance_scale": 5.0}
    common |= {"original_size": (180, 160)} if told else {}  # of the pictures' shape, 72 x 64
    seen: list[Any] = []
    step = base.scheduler.step

    @wraps(step)
    def recording(*given: Any, **named: Any) -> Any:
        seen.append(given)
        return step(*given, **named)

    base.scheduler.step = recording
    latents = base(
        **common, width=64, height=72, output_type="latent", denoising_end=0.6 if flow == "ensemble" else None,
        generator=torch.Generator().manual_seed(11),
    ).images  # fmt: skip
    picture = refiner(
        **common, image=latents, aesthetic_score=7.0,
        generator=torch.Generator().manual_seed(stream_seed(11, "refiner")),
        **({"denoising_start": 0.6} if flow == "ensemble" else {"strength": 0.4}),
    ).images[0]  # fmt: skip
    if flow == "ensemble":  # what is left without the noise that the base predicted last
        noise, timestep, noisy = seen[2]
        alpha = base.scheduler.alphas_cumprod[int(timestep)]
        scale = 1.0 if scheduler.__name__.startswith("Euler") else alpha**0.5
        latents = noisy / scale - ((1 - alpha) / alpha) ** 0.5 * noise
    with torch.no_grad():
        pixels = base.vae.decode(latents / base.vae.config.scaling_factor).sample
    unrefined = base.image_processor.postprocess(pixels)[0]
    assert difference(ours[11, True], picture) <= 1
    assert difference(ours[11, False], unrefined) <= 1
    assert difference(ours[11, True], ours[11, False]) > 5  # the refiner does do something


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction"])
def test_the_refiner_is_sampled_with_its_own_scheduler(
    settings: Make, tiny: Path, tmp_path: Path, predicts: str
) -> None:
    """The base of these tests predicts noise."""
    shutil.copytree(tiny / "refiner", tmp_path / "refiner")
    path = tmp_path / "refiner" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": predicts}))
    config = settings(refiner_model=str(tmp_path / "refiner"), refiner_strength=0.6, scheduler="DDIMScheduler")
    seen: list[str] = []
    step = DDIMScheduler.step

    def noting(self: Any, *given: Any, **named: Any) -> Any:
        seen.append(self.config.prediction_type)
        return step(self, *given, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DDIMScheduler, "step", wraps(step)(noting))
        drawn(config, None, [1])
    assert seen == ["epsilon"] * 5 + [predicts] * 3


def test_same_seed_same_picture_other_seed_another(settings: Make, lora: Path) -> None:
    first, again = drawn(settings(), lora, [1, 2]), drawn(settings(), lora, [1])
    assert difference(first[1, True], again[1, True]) == 0
    assert difference(first[1, True], first[2, True]) > 5


def test_a_picture_is_the_same_in_any_batch(settings: Make, lora: Path) -> None:
    alone, together = drawn(settings(), lora, [1, 2, 3]), drawn(settings(), lora, [1, 2, 3], batch_size=2)
    assert all(difference(alone[key], together[key]) <= 2 for key in alone)


def test_what_changes_a_base_picture_and_what_does_not(settings: Make, lora: Path) -> None:
    plain = drawn(settings(refine=False), None, [1])
    assert set(plain) == {(1, False)}

    def from_plain(lora: Path | None = None, prompt: str = PROMPT, **changes: Any) -> int:
        pictures = drawn(settings(refine=False, **changes), lora, [1], prompt=prompt)
        return difference(plain[1, False], pictures[1, False])

    assert from_plain(lora, lora_scale=0.0) == 0
    assert from_plain(lora) > 5
    assert from_plain(prompt="red dots") > 0
    assert from_plain(negative_prompt="blurry") > 0


def test_the_base_of_the_ensemble_is_not_decoded_unless_it_is_saved(settings: Make) -> None:
    assert set(drawn(settings(refiner_flow="ensemble"), None, [1])) == {(1, True)}


@pytest.mark.parametrize(("flow", "steps"), [("img2img", 10), ("ensemble", 10), ("ensemble", 15)])
def test_progress_bars_reach_their_totals(
    settings: Make, flow: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: dict[str, float] = {}

    class Counting(phases.Progress):
        def close(self) -> None:
            made[self.desc] = self.n - (self.total or 0)
            super().close()

    monkeypatch.setattr(phases, "Progress", Counting)
    monkeypatch.setattr(phases, "_VAE_PICTURES", 10**6)
    drawn(settings(refiner_flow=flow, num_inference_steps=steps), None, [1, 2])
    assert made == {"drawing": 0, "refining": 0, "saving": 0}


class Unet(torch.nn.Module):
    device = torch.device("cpu")


def test_a_batch_is_passed_on_once_the_next_one_is_queued(tmp_path: Path) -> None:
    """So that a GPU never waits for Python between two batches. Batches of an earlier run are not computed again."""
    events: list[str] = []
    files = [tmp_path / f"{number}.safetensors" for number in range(4)]

    def make(_unet: Any, number: int, on_step: Any) -> torch.Tensor:
        events.append(f"made {number}")
        on_step()
        return torch.full((1, 4, 2, 2), float(number))

    def on_batch(number: int, latents: torch.Tensor) -> None:
        assert files[number].exists()
        assert latents.eq(number).all()
        events.append(f"handed on {number}")

    def run(load: Any) -> list[torch.Tensor]:
        events.clear()
        return phases.run_phase("drawing", 1, files, load, make, on_batch)

    first = run(Unet)
    assert events == [
        "made 0", "made 1", "handed on 0", "made 2", "handed on 1", "made 3", "handed on 2", "handed on 3",
    ]  # fmt: skip
    files[1].unlink()
    again = run(Unet)
    assert events == ["made 1", "handed on 0", "handed on 1", "handed on 2", "handed on 3"]
    from_files = run(None)  # without a UNet
    assert events == [f"handed on {number}" for number in range(4)]
    assert all(torch.equal(one, other) for made in (again, from_files) for one, other in zip(first, made, strict=True))


@pytest.mark.parametrize("fails_in", ["make", "on_batch", "writing"])
def test_a_failed_phase_frees_its_unet_and_keeps_its_latents(tmp_path: Path, fails_in: str) -> None:
    """Batch 1 is the one that fails; the writing of batch 0 has ended by then."""
    unets: list[Any] = []

    def load() -> Any:
        unet = Unet()
        unets.append(weakref.ref(unet))
        return unet

    def fail(where: str, number: int) -> None:
        if where == fails_in and number == 1:
            raise OSError(errno.ENOSPC, "no space")

    def make(_: Any, number: int, on_step: Any) -> torch.Tensor:
        fail("make", number)
        return torch.zeros(1, 4, 2, 2)

    files = [tmp_path / f"{number}.safetensors" for number in range(4)]
    if fails_in == "writing":
        files[1] = tmp_path / "no such folder" / "1.safetensors"
    with pytest.raises(OSError, match="[Nn]o s") as error:
        phases.run_phase("drawing", 1, files, load, lambda *given: make(*given), lambda n, _: fail("on_batch", n))
    assert error.tb
    if fails_in != "make":  # whose frame, in the traceback, has the UNet
        assert unets[0]() is None
    assert [file.exists() for file in files[:2]] == [True, fails_in == "on_batch"]
    assert not files[3].exists()


def test_pictures_are_saved_while_others_are_refined(settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phases, "_VAE_PICTURES", 0)
    refined_latents, first_is_saved = sampling.refined_latents, threading.Event()
    seen: list[bool] = []

    def refine(*given: Any) -> torch.Tensor:
        seen.append(first_is_saved.wait(30 if len(seen) == 2 else 0))
        return refined_latents(*given)

    def finish(drawn: Drawn) -> None:
        if drawn.design.index == 0:
            first_is_saved.set()

    monkeypatch.setattr(sampling, "refined_latents", refine)
    batches = [[Design(index, PROMPT, 1)] for index in range(3)]
    with tempfile.TemporaryDirectory() as latents:
        phases.draw_pictures(settings(), None, batches, Path(latents), finish)
    assert seen == [False, False, True]


@pytest.mark.parametrize("changes", [{}, {"refine": False}, {"refiner_flow": "ensemble", "save_base": True}])
def test_pictures_are_the_same_if_saved_in_the_background(
    settings: Make, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    monkeypatch.setattr(phases, "_VAE_PICTURES", 10**6)
    afterwards = drawn(settings(**changes), None, [1, 2])
    monkeypatch.setattr(phases, "_VAE_PICTURES", 0)
    meanwhile = drawn(settings(**changes), None, [1, 2])
    assert afterwards.keys() == meanwhile.keys()
    assert all(difference(afterwards[key], meanwhile[key]) == 0 for key in afterwards)


@pytest.mark.parametrize("refine", [True, False])
def test_a_full_disk_while_others_are_refined_ends_the_phase(
    settings: Make, monkeypatch: pytest.MonkeyPatch, refine: bool
) -> None:
    load, unets, open_bars = phases._load_unet, list[Any](), set[str]()

    class Bar(phases.Progress):
        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **named)
            if not named.get("disable"):
                open_bars.add(named["desc"])

        def close(self) -> None:
            super().close()
            open_bars.discard(getattr(self, "desc", ""))  # one that is not shown has none

    def noted(*given: Any) -> Any:
        unet = load(*given)
        unets.append(weakref.ref(unet))
        return unet

    def full(*_: Any) -> None:
        assert open_bars
        raise OSError(errno.ENOSPC, "no space")

    for place, name, value in (
        (phases, "_VAE_PICTURES", 0), (phases, "_load_unet", noted), (phases, "Progress", Bar),
        (saving.os, "cpu_count", lambda: 1),
    ):  # fmt: skip
        monkeypatch.setattr(place, name, value)
    batches = [[Design(index, PROMPT, 1)] for index in range(4)]
    with tempfile.TemporaryDirectory() as latents, pytest.raises(OSError, match="no space") as error:
        phases.draw_pictures(settings(refine=refine), None, batches, Path(latents), full)
    assert error.tb  # holds its frames, as a notebook does
    assert not open_bars
    assert [unet() for unet in unets] == [None] * (2 if refine else 1)


@pytest.mark.parametrize(
    ("free", "dtype", "side", "at_once", "meanwhile"),
    [
        (78.0, torch.bfloat16, 1024, 4, True),
        (22.0, torch.bfloat16, 1024, 4, True),  # an L4
        (22.0, torch.bfloat16, 1536, 4, False),
        (22.0, torch.float32, 1024, 4, False),
        (14.6, torch.float16, 1024, 4, False),  # a T4
        (8.3, torch.float16, 1024, 2, False),
        (7.0, torch.bfloat16, 1024, 1, False),
    ],
)
def test_batch_size_and_background_saving_by_memory(
    monkeypatch: pytest.MonkeyPatch, free: float, dtype: torch.dtype, side: int, at_once: int, meanwhile: bool
) -> None:
    monkeypatch.setattr(models, "pick_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(models, "pick_dtype", lambda *_: dtype)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(free * 2**30), 80 * 2**30))
    config = Config(width=side, height=side)
    assert phases.pictures_at_once(config) == at_once
    assert phases._has_room(config, at_once) == meanwhile
    assert not phases._has_room(config, 200)


def test_each_picture_of_a_batch_is_of_its_own_prompt(settings: Make) -> None:
    together: dict[Any, Any] = {}
    batch = [Design(0, PROMPT, 1), Design(1, "red dots", 2)]
    with tempfile.TemporaryDirectory() as latents:
        phases.draw_pictures(
            settings(refine=False), None, [batch], Path(latents),
            lambda drawn: together.update({(drawn.design.seed, False): drawn.base}),
        )  # fmt: skip
    for design in batch:
        alone = drawn(settings(refine=False), None, [design.seed], prompt=design.prompt)
        assert difference(alone[design.seed, False], together[design.seed, False]) <= 2


@pytest.mark.parametrize("scheduler", ["EulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_a_base_without_a_step_is_refused_before_anything_is_loaded(
    settings: Make, scheduler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(phases, "embed_for_both", None)
    config = settings(refiner_flow="ensemble", num_inference_steps=8, refiner_start=0.1, scheduler=scheduler)
    refused(lambda: drawn(config, None, [1]), "the base would get no steps")


@pytest.mark.parametrize(("flow", "refiners"), [("ensemble", 0), ("img2img", 1)])
def test_the_ensemble_has_the_noise_levels_of_the_base(
    settings: Make, flow: str, refiners: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[bool] = []
    load = models.load_noise_scheduler

    def recording(config: Config, refiner: bool = False) -> Any:
        loaded.append(refiner)
        return load(config, refiner)

    monkeypatch.setattr(models, "load_noise_scheduler", recording)
    drawn(settings(refiner_flow=flow), None, [1])
    assert loaded.count(True) == refiners


def test_an_ensemble_without_refiner_steps_is_refused(settings: Make, tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny / "base", tmp_path / "base")
    scheduler = tmp_path / "base" / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"timestep_spacing": "trailing"}))
    config = settings(pretrained_model=str(tmp_path / "base"), refiner_flow="ensemble", num_inference_steps=4)
    refused(lambda: drawn(config, None, [1]), "the refiner would get no steps")


def test_a_missing_refiner_is_a_one_line_error(settings: Make) -> None:
    with pytest.raises(UserError, match="cannot be loaded"):
        drawn(settings(refiner_model="no-such-folder/refiner"), None, [1])
