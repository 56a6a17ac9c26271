"""Models by name, against a small hub on this machine: what is downloaded and cached, how failures are reported."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from hub_server import Hub
from original_names import original_checkpoint, original_refiner
from safetensors.torch import save_file

from helpers import ROOT, Make, refused
from lace_lora.config import Config
from lace_lora.sdxl import hub, models, prompts

BASE, REFINER = "lace/base", "lace/refiner"
FETCH = """
import json, sys
from lace_lora.sdxl import hub
from lace_lora.config import Config
print(json.dumps(hub.fetch_models(Config(pretrained_model="lace/base", refiner_model="lace/refiner"))))
"""


@pytest.fixture
def server(tiny: Path, tmp_path: Path) -> Iterator[Hub]:
    shutil.copytree(tiny / "base", tmp_path / "base")
    shutil.copytree(tiny / "refiner", tmp_path / "refiner")
    for folder in ("base", "refiner"):  # what real repositories have besides
        (tmp_path / folder / "README.md").write_text("about")
        (tmp_path / folder / "sd_xl.safetensors").write_bytes(b"x" * 60_000)
        (tmp_path / folder / "unet" / "model.onnx").write_bytes(b"x")
    (tmp_path / "refiner" / "vae").mkdir()
    (tmp_path / "refiner" / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"x")
    with Hub({BASE: tmp_path / "base", REFINER: tmp_path / "refiner"}) as running:
        yield running


Fetch = Callable[..., dict[str, Path]]


@pytest.fixture
def fetch(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fetch:
    """`fetch_models` from that hub, with a cache of its own, and without waiting between attempts."""
    # huggingface_hub reads its environment when it is imported.
    place = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    for name, value in {
        "ENDPOINT": server.url, "HUGGINGFACE_CO_URL_TEMPLATE": place,
        "HF_HUB_CACHE": str(tmp_path / "cache" / "hub"), "HF_TOKEN_PATH": str(tmp_path / "cache" / "token"),
        "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True,
    }.items():  # fmt: skip
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr(time, "sleep", lambda _: None)

    def run(**settings: Any) -> dict[str, Path]:
        models = hub.fetch_models(Config(**{"pretrained_model": BASE, "refiner_model": REFINER, **settings}))
        return {setting: Path(place) for setting, place in models.items() if place}

    return run


def assert_refused(call: Callable[[], object], part: str, code: int) -> None:
    assert "\n" not in refused(call, part, code)


def weights(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}


def test_only_what_is_needed_is_downloaded_once(server: Hub, tiny: Path, tmp_path: Path) -> None:
    environment = os.environ | {
        "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "",
    }  # fmt: skip

    def fetch() -> tuple[dict[str, Path], str]:
        """In a process of its own, as a user's."""
        done = subprocess.run(
            [sys.executable, "-c", FETCH], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=200,
            check=True,
        )  # fmt: skip
        return {key: Path(path) for key, path in json.loads(done.stdout).items() if path}, done.stderr

    found, progress = fetch()
    expected = {str(path.relative_to(tiny / "base")) for path in (tiny / "base").rglob("*.*") if path.is_file()}
    cached = {str(path.relative_to(found["pretrained_model"])) for path in found["pretrained_model"].rglob("*.*")}
    assert cached == expected
    # Files of equal content, such as two vocabularies, are downloaded once.
    assert {name.removeprefix(f"{BASE}/") for name in server.asked if name.startswith(BASE)} <= expected
    assert weights(found["pretrained_model"]) == weights(tiny / "base")
    refiner = [name.removeprefix(f"{REFINER}/") for name in server.asked if name.startswith(REFINER)]
    assert sorted(refiner) == [
        "model_index.json", "scheduler/scheduler_config.json", "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ]  # fmt: skip
    assert "100%" in progress
    assert len(server.asked) == len(set(server.asked))
    asked = len(server.asked)
    assert fetch()[0] == found
    assert len(server.asked) == asked


def test_without_a_connection_the_cache_is_enough(server: Hub, fetch: Fetch) -> None:
    found = fetch()
    server.shutdown()
    server.server_close()
    assert fetch() == found


def test_the_hub_is_asked_twice_for_a_model(fetch: Fetch, monkeypatch: pytest.MonkeyPatch) -> None:
    """For its small files, and once these are checked for its weights."""
    asked: list[str] = []
    download = huggingface_hub.snapshot_download

    def counting(source: str, **options: Any) -> str:
        asked.append(source)
        return str(download(source, **options))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", counting)
    fetch(variant=None)
    assert sorted(asked) == sorted([BASE, REFINER] * 2)


def test_an_unused_refiner_is_not_downloaded(server: Hub, fetch: Fetch) -> None:
    fetch(refine=False)
    assert not any(name.startswith(REFINER) for name in server.asked)


def test_the_variant_is_downloaded_where_there_is_one(server: Hub, fetch: Fetch, tmp_path: Path) -> None:
    for part in ("unet", "text_encoder"):  # not of the others
        [plain] = (tmp_path / "base" / part).glob("*.safetensors")
        shutil.copy(plain, plain.with_suffix(".fp16.safetensors"))
    found = fetch()["pretrained_model"]
    assert sorted(weights(found)) == [
        "text_encoder/model.fp16.safetensors", "text_encoder_2/model.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors", "vae/diffusion_pytorch_model.safetensors",
    ]  # fmt: skip
    assert sorted(weights(fetch(variant=None)["pretrained_model"]))[-2:] == [
        "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors",
    ]  # fmt: skip


def test_a_revision(server: Hub, fetch: Fetch) -> None:
    found = fetch(revision="old")
    assert found["pretrained_model"].name == "b" * 40
    assert found["refiner_model"].name == "a" * 40
    assert_refused(lambda: fetch(revision="none"), "revision none", 2)


def test_another_vae(server: Hub, fetch: Fetch, tiny: Path) -> None:
    server.repositories["lace/vae"] = tiny / "base" / "vae"
    found = fetch(pretrained_vae="lace/vae")
    assert sorted(path.name for path in found["pretrained_vae"].iterdir()) == [
        "config.json", "diffusion_pytorch_model.safetensors",
    ]  # fmt: skip
    assert f"{BASE}/vae/diffusion_pytorch_model.safetensors" not in server.asked


def test_a_whole_model_as_vae(server: Hub, fetch: Fetch, tiny: Path) -> None:
    server.repositories["lace/other"] = tiny / "base"
    found = fetch(pretrained_vae="lace/other")["pretrained_vae"]
    assert weights(found) == weights(tiny / "base" / "vae")
    asked = {name for name in server.asked if name.startswith("lace/other")}
    assert {Path(name).parent.name for name in asked if name.endswith(".safetensors")} <= {"vae"}


@pytest.mark.parametrize("setting", ["pretrained_model", "refiner_model", "pretrained_vae"])
def test_a_model_of_another_kind_is_not_downloaded(server: Hub, fetch: Fetch, tmp_path: Path, setting: str) -> None:
    folder = {"refiner_model": "refiner"}.get(setting, "base")
    shutil.copytree(tmp_path / folder, tmp_path / "edm")
    for file, change in (("vae", {"latents_mean": [1, 1, 1, 1]}), ("unet", {"in_channels": 9})):
        path = tmp_path / "edm" / file / "config.json"
        if path.exists():
            path.write_text(json.dumps(json.loads(path.read_text()) | change))
    server.repositories["lace/edm"] = tmp_path / "edm"
    assert_refused(
        lambda: fetch(**{setting: "lace/edm"}), "lace/edm has a (UNet with in_channels 9|VAE with latents_mean)", 2
    )
    assert not [name for name in server.asked if name.endswith(".safetensors")]


def test_models_are_checked_without_a_download(server: Hub, fetch: Fetch, tmp_path: Path) -> None:
    config = Config(pretrained_model=BASE, refiner_model=REFINER)
    assert hub.check_models(config, download=False) == [BASE, REFINER]
    assert not server.asked
    assert not (tmp_path / "cache").exists()
    found = fetch()
    assert hub.check_models(config, download=False) == []
    next((found["pretrained_model"] / "unet").glob("*.safetensors")).unlink()
    assert hub.check_models(config, download=False) == [BASE]
    for lost in (found["pretrained_model"] / "vae", found["refiner_model"] / "scheduler"):
        shutil.rmtree(lost)
        assert hub.check_models(config, download=False)[-1] == (BASE if lost.name == "vae" else REFINER)
        fetch()
    cached = found["refiner_model"] / "unet" / "config.json"
    content = cached.read_text().replace('"in_channels": 4', '"in_channels": 9')
    cached.unlink()
    cached.write_text(content)
    refused(lambda: hub.check_models(config, download=False), "lace/refiner has a UNet with in_channels 9")
    another_vae = replace(config, pretrained_vae="lace/vae", refine=False)
    assert hub.check_models(another_vae, download=False) == ["lace/vae"]
    for name in ("not a name", "./none", "none.SAFETENSORS"):
        refused(lambda name=name: hub.check_models(Config(pretrained_model=name), download=False), name)  # type: ignore[misc]


def test_a_caption_model_is_looked_at_before_its_weights_are_downloaded(
    server: Hub, fetch: Fetch, tmp_path: Path
) -> None:
    (tmp_path / "captions").mkdir()
    for file in ("config.json", "vocab.txt", "chat_template.jinja", "model.safetensors", "pytorch_model.bin"):
        (tmp_path / "captions" / file).write_text(file)
    server.repositories["lace/captions"] = tmp_path / "captions"
    assert hub.find_caption_model("lace/captions", weights=True, download=False) is None
    assert not server.asked
    assert hub.find_caption_model("lace/captions", weights=False)
    small = [f"lace/captions/{file}" for file in ("chat_template.jinja", "config.json", "vocab.txt")]
    assert sorted(server.asked) == small
    assert hub.find_caption_model("lace/captions", weights=True, download=False) is None
    place = hub.find_caption_model("lace/captions", weights=True)
    assert sorted(server.asked) == sorted([*small, "lace/captions/model.safetensors"])
    assert hub.find_caption_model("lace/captions", weights=True, download=False) == place
    (tmp_path / "captions" / "model.safetensors").unlink()
    server.repositories["lace/pickle"] = tmp_path / "captions"
    pickle = partial(hub.find_caption_model, "lace/pickle", weights=True)
    assert_refused(pickle, "lace/pickle has no safetensors weights", 2)
    assert_refused(partial(hub.find_caption_model, "lace/none", weights=True), "is neither a model on the Hub nor", 2)


def test_a_missing_file(server: Hub, fetch: Fetch, tmp_path: Path) -> None:
    (tmp_path / "base" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (tmp_path / "base" / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    assert_refused(lambda: fetch(), "lace/base has no safetensors weights in unet", 2)


def test_a_repository_of_another_layout(server: Hub, fetch: Fetch, tmp_path: Path) -> None:
    for path in [path for path in (tmp_path / "base").iterdir() if path.is_dir()]:
        shutil.rmtree(path)
    (tmp_path / "base" / "model_index.json").unlink()
    assert_refused(lambda: fetch(), "lace/base has no unet/config.json", 2)
    assert not any(name.endswith(".safetensors") for name in server.asked)


def test_a_gated_model(server: Hub, fetch: Fetch) -> None:
    server.gated.add(BASE)
    assert_refused(lambda: fetch(), "hf auth login", 2)


def test_a_token_that_expired(server: Hub, fetch: Fetch) -> None:
    server.token_expired = True
    assert_refused(lambda: fetch(), "hf auth login", 2)


@pytest.mark.parametrize("name", ["lace/nothing", "not a name"])
def test_an_invalid_model_name(fetch: Fetch, name: str) -> None:
    assert_refused(lambda: fetch(pretrained_model=name), name, 2)


def test_a_dropped_download_resumes(server: Hub, fetch: Fetch, tiny: Path) -> None:
    server.drops = 1
    assert weights(fetch()["pretrained_model"]) == weights(tiny / "base")
    assert len(server.asked) == len(set(server.asked)) + 1


def test_a_connection_that_keeps_dropping(server: Hub, fetch: Fetch, tiny: Path) -> None:
    server.drops = 1000
    assert_refused(lambda: fetch(), "run the same command again", 4)
    server.drops = 0
    assert weights(fetch()["pretrained_model"]) == weights(tiny / "base")


def test_no_connection_and_no_cache(server: Hub, fetch: Fetch) -> None:
    server.shutdown()
    server.server_close()
    assert_refused(lambda: fetch(), "the Hub cannot be reached", 4)


def test_paths_are_not_looked_up(tmp_path: Path, tiny: Path) -> None:
    def fetched(model: str) -> str:
        return hub.fetch_models(Config(pretrained_model=model, refine=False))["pretrained_model"]

    assert fetched(str(tiny / "base")) == str(tiny / "base")
    for name in ("no/such/folder", "./none", str(tmp_path / "none"), "none.safetensors"):
        refused(partial(fetched, name), "no model found at")
    (tmp_path / "model.safetensors").write_bytes(b"a pickle, say")
    refused(lambda: fetched(str(tmp_path / "model.safetensors")), "is damaged or incomplete")


def test_a_checkpoint_in_one_file(server: Hub, fetch: Fetch, tiny: Path, tmp_path: Path) -> None:
    server.repositories = {hub.BASE_LAYOUT: tmp_path / "base", hub.REFINER_LAYOUT: tmp_path / "refiner"}
    files = {"pretrained_model": tmp_path / "lace.safetensors", "refiner_model": tmp_path / "refine.safetensors"}
    save_file(original_checkpoint(tiny / "base"), files["pretrained_model"])
    save_file(original_refiner(tiny / "refiner", tiny / "base"), files["refiner_model"])
    assert fetch(**{key: str(path) for key, path in files.items()}) == files
    assert not any(name.endswith(".safetensors") for name in server.asked)
    assert {"/".join(name.split("/")[:2]) for name in server.asked} == {hub.BASE_LAYOUT, hub.REFINER_LAYOUT}


def test_a_checkpoint_in_one_file_without_a_download(server: Hub, fetch: Fetch, tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "lace.safetensors"
    as_wide_as_sdxl = {"model.diffusion_model.label_emb.0.0.weight": torch.zeros(1, 128 + 6 * 256)}
    save_file(original_checkpoint(tiny / "base") | as_wide_as_sdxl, file)
    config = Config(pretrained_model=str(file), refine=False)
    assert hub.check_models(config, download=False) == [f"the settings and vocabulary of {file}"]
    assert not server.asked


def test_weights_are_in_one_form(tmp_path: Path) -> None:
    """In one file, or in shards: never mixed, since either may be left over from another version."""
    for end in ("-00001-of-00002", "-00002-of-00002", ".fp16", ""):
        (tmp_path / f"diffusion_pytorch_model{end}.safetensors").write_bytes(b"")
    assert [path.name for path in hub.weight_files(tmp_path, None)] == ["diffusion_pytorch_model.safetensors"]
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    assert len(hub.weight_files(tmp_path, None)) == 2
    assert len(hub.weight_files(tmp_path, "fp16")) == 1


@pytest.mark.parametrize("name", ["lace.safetensors", "LACE.SAFETENSORS"])
def test_parts_of_a_single_file_equal_those_of_the_folder(
    settings: Make, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    file = tmp_path / name
    save_file(original_checkpoint(tiny / "base"), file)
    monkeypatch.setattr(hub, "_download", lambda *_: tiny / "base")
    cpu = torch.device("cpu")
    loaded = []
    for config in (settings(), settings(pretrained_model=str(file))):
        parts = [models.load_unet(config.pretrained_model, None, cpu, torch.float32)]
        parts += [models.load_vae(config, cpu, torch.float32), *prompts.load_text_encoders(config, cpu, torch.float32)]
        loaded.append([part.state_dict() for part in parts])
        tokens = prompts.load_tokenizers(config.pretrained_model)[0]("lace").input_ids
    assert tokens == prompts.load_tokenizers(str(tiny / "base"))[0]("lace").input_ids
    for folder, single in zip(*loaded, strict=True):
        assert folder.keys() == single.keys()
        assert all(torch.equal(folder[name], single[name]) for name in folder)


@pytest.mark.parametrize("one_file", [False, True])
def test_reading_ahead_reads_all_weights(
    tiny: Path, tmp_path: Path, one_file: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    started: list[threading.Thread] = []
    thread, real = threading.Thread, open

    def recording(path: Any, *options: Any, **named: Any) -> Any:
        read.append(Path(path).parent.name)
        return real(path, *options, **named)

    def starting(**named: Any) -> threading.Thread:
        started.append(thread(**named))
        return started[-1]

    monkeypatch.setattr(hub, "open", recording, raising=False)
    monkeypatch.setattr(threading, "Thread", starting)
    source = tiny / "base"
    if one_file:
        source = tmp_path / "model.safetensors"
        source.write_bytes(b"x" * 100)
    hub.read_ahead(str(source), ["text_encoder", "unet"], "fp16")
    started[0].join()
    assert read == ([tmp_path.name] if one_file else ["text_encoder", "unet"])
    hub.read_ahead(str(tmp_path / "missing"), ["unet"], None)
    started[1].join()
