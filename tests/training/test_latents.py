"""Pictures to latents: against the VAE and diffusers' own time ids, shapes, and what is cached for the next run."""

import threading
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image, ImageOps

import data_utils
from helpers import Make, contents
from lace_lora.config import Config
from lace_lora.errors import UserError
from lace_lora.pictures import crops
from lace_lora.sdxl import models
from lace_lora.sdxl.vae import encode_pixels
from lace_lora.training import latents
from lace_lora.training.latents import Latents

CPU = torch.device("cpu")
SQUARE = crops.Cropping([(64, 64)])


@pytest.fixture(autouse=True)
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def encode(config: Config, paths: Iterable[Path], cropping: crops.Cropping = SQUARE, mirrored: bool = False) -> Latents:
    load_vae = partial(models.load_vae, config, CPU, torch.float32)
    return latents.encode_pictures(load_vae, contents(paths), cropping, mirrored)


def test_pictures_are_encoded_as_the_vae_does(settings: Make, photos: Path) -> None:
    path = photos / "lace_1.jpg"
    found = encode(settings(), [path], mirrored=True)
    vae = models.load_vae(settings(), CPU, torch.float32)
    # By hand: 96x72 to 85x64, the middle 64 columns.
    square = Image.open(path).convert("RGB").resize((85, 64), Image.Resampling.LANCZOS).crop((10, 0, 74, 64))
    for version, picture in enumerate((square, ImageOps.mirror(square))):
        pixels = torch.from_numpy(np.array(picture, dtype=np.float32)).permute(2, 0, 1)[None]
        posterior = vae.encode(pixels / 127.5 - 1).latent_dist
        torch.testing.assert_close(found.mean[0][version], posterior.mean[0] * 0.13025)
        torch.testing.assert_close(found.std[0][version], posterior.std[0] * 0.13025)
    # Mirrored latents are not the latents of the mirrored picture.
    assert (found.mean[0][1] - found.mean[0][0].flip(-1)).abs().max() > 1e-3


def test_time_ids_equal_the_pipelines(settings: Make, photos: Path) -> None:
    config = settings()
    pipeline = StableDiffusionXLPipeline.from_pretrained(config.pretrained_model, torch_dtype=torch.float32)
    paths = data_utils.list_images(photos)
    for row, path in zip(encode(config, paths).time_ids, paths, strict=True):
        width, height = Image.open(path).size
        scaled = (round(height * 64 / min(width, height)), round(width * 64 / min(width, height)))
        top_left = (round((scaled[0] - 64) / 2), round((scaled[1] - 64) / 2))
        expected = pipeline._get_add_time_ids((height, width), top_left, (64, 64), torch.float32, 128)
        assert torch.equal(row, expected[0])


def test_a_picture_that_is_deleted_or_changed_is_reported(settings: Make, photos: Path, tmp_path: Path) -> None:
    picture = tmp_path / "lace.jpg"
    picture.write_bytes((photos / "lace_0.jpg").read_bytes())
    known = contents([picture])
    load_vae = partial(models.load_vae, settings(), CPU, torch.float32)
    picture.write_bytes((photos / "lace_1.jpg").read_bytes())
    with pytest.raises(UserError, match=r"lace.jpg was changed while"):
        latents.encode_pictures(load_vae, known, SQUARE)
    picture.unlink()
    with pytest.raises(UserError, match=r"lace.jpg can no longer be read"):
        latents.encode_pictures(load_vae, known, SQUARE)


def test_buckets_are_sdxls_at_1024_and_of_about_one_area_at_any_size() -> None:
    assert crops.shapes(512, buckets=False) == [(512, 512)]
    full = crops.shapes(1024, buckets=True)
    assert len(full) == len(set(full)) == 41
    assert {(1024, 1024), (2048, 512), (512, 2048), (832, 1216), (1216, 832), (704, 1344)} <= set(full)
    for resolution in (512, 768, 1024):
        for height, width in crops.shapes(resolution, buckets=True):
            assert height % 32 == width % 32 == 0
            assert 0.83 < height * width / resolution**2 < 1.08
    assert crops.shapes(64, buckets=True)  # the demo's size


def test_each_picture_gets_the_bucket_with_the_nearest_aspect_ratio(settings: Make, tmp_path: Path) -> None:
    sizes = {(200, 200): (128, 128), (300, 200): (96, 160), (200, 400): (192, 96), (2000, 100): (64, 256)}
    paths = []
    for width, height in sizes:
        paths.append(tmp_path / f"{width}x{height}.jpg")
        Image.radial_gradient("L").resize((width, height)).convert("RGB").save(paths[-1])
    found = encode(settings(), paths, cropping=crops.Cropping(crops.shapes(128, buckets=True)))
    for mean, ids, shape in zip(found.mean, found.time_ids.tolist(), sizes.values(), strict=True):
        assert tuple(mean.shape) == (1, 4, shape[0] // 8, shape[1] // 8)
        assert tuple(ids[4:]) == shape
    # By hand: 300x200 covers 160x96 at 160x107.
    assert found.time_ids[1].tolist() == [200, 300, 6, 0, 96, 160]


def test_a_second_run_needs_neither_vae_nor_pictures(settings: Make, photos: Path) -> None:
    paths = data_utils.list_images(photos)
    first = encode(settings(), paths, mirrored=True, cropping=crops.Cropping(crops.shapes(64, buckets=True)))

    def load_nothing() -> Any:
        raise AssertionError("the VAE is loaded")

    options: dict[str, Any] = {"mirrored": True, "cropping": crops.Cropping(crops.shapes(64, buckets=True))}
    known = {Path("gone") / str(number): digest for number, digest in enumerate(contents(paths).values())}
    again = latents.encode_pictures(load_nothing, known, **options)
    assert all(map(torch.equal, first.mean + first.std, again.mean + again.std))
    assert torch.equal(first.time_ids, again.time_ids)
    others: list[dict[str, Any]] = [{"mirrored": False}, {"cropping": SQUARE}, {"depends_on": "another VAE"}]
    for other in others:
        with pytest.raises(AssertionError, match="the VAE is loaded"):
            latents.encode_pictures(load_nothing, known, **(options | other))
    with pytest.raises(AssertionError, match="the VAE is loaded"):
        latents.encode_pictures(load_nothing, dict(list(known.items())[:-1]), **options)


def test_turned_versions_are_encoded_as_the_vae_does(settings: Make, photos: Path) -> None:
    load_vae = partial(models.load_vae, settings(), CPU, torch.float32)
    found = latents.encode_pictures(load_vae, contents([photos / "lace_1.jpg"]), SQUARE, mirrored=True, turned=True)
    [(square, _)] = crops.open_views(photos / "lace_1.jpg", SQUARE, ("JPEG",))
    both = (square, ImageOps.mirror(square))
    expected = [*both, *(each.rotate(angle) for each in both for angle in (90, 180, 270))]
    pixels = torch.stack([torch.from_numpy(np.array(each, dtype=np.float32)).permute(2, 0, 1) for each in expected])
    posterior = load_vae().encode(pixels / 127.5 - 1).latent_dist
    torch.testing.assert_close(found.mean[0], posterior.mean * 0.13025, rtol=1e-4, atol=1e-5)


def test_only_views_that_are_drawn_are_encoded(settings: Make, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_vae = partial(models.load_vae, settings(), CPU, torch.float32)
    known = contents(data_utils.list_images(photos)[:3])
    cropping = crops.Cropping([(32, 32)], share=0.5, most=3, seed=7)
    everything = latents.encode_pictures(load_vae, known, cropping)
    assert [tuple(mean.shape) for mean in everything.mean] == [(1, 4, 4, 4)] * 9
    drawn = dict(zip(known, ([True, False, True], [False] * 3, [False, True, False]), strict=True))
    encoded: list[int] = []

    def counting(vae: Any, pixels: torch.Tensor, path: Path) -> Any:
        encoded.append(len(pixels))
        return encode_pixels(vae, pixels, path)

    monkeypatch.setattr(latents, "encode_pixels", counting)
    some = latents.encode_pictures(load_vae, known, cropping, drawn=drawn)
    assert encoded == [1, 1, 1]
    for view, is_drawn in enumerate(each for row in drawn.values() for each in row):
        if is_drawn:
            assert torch.equal(some.mean[view], everything.mean[view])
            assert torch.equal(some.std[view], everything.std[view])
            assert torch.equal(some.time_ids[view], everything.time_ids[view])
        else:
            assert some.mean[view].numel() == 0
    again = latents.encode_pictures(load_vae, known, cropping, drawn=drawn)
    assert len(encoded) == 3  # from the cache
    assert all(map(torch.equal, some.mean, again.mean))
    latents.encode_pictures(load_vae, known, crops.Cropping([(32, 32)], 0.5, 3, seed=8), drawn=drawn)
    assert len(encoded) == 6  # other close-ups


def test_few_pictures_are_in_memory_at_once() -> None:
    lock = threading.Lock()
    begun: list[Path] = []
    used: list[Path] = []

    def note(path: Path) -> Path:
        with lock:
            begun.append(path)
            assert len(begun) - len(used) <= 9
        time.sleep(0.001)
        return path

    paths = [Path(str(number)) for number in range(60)]
    for path in latents._prefetch(note, paths):
        with lock:
            used.append(path)
    assert used == paths
