"""Loading the parts of a model: dtype, variant, safetensors only, and the errors when that fails."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save, save_file

from helpers import Make, refused
from lace_lora.errors import UserError
from lace_lora.sdxl import hub, models, prompts
from sdxl_helpers import CPU


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16)])
def test_dtype_goes_by_capability(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    assert models.pick_dtype("auto", torch.device("cuda")) == expected
    assert models.pick_dtype("auto", CPU) == torch.float32
    assert models.pick_dtype("no", torch.device("cuda")) == torch.float32
    if expected == torch.float16:
        with pytest.raises(UserError, match="use fp16 or auto"):
            models.pick_dtype("bf16", torch.device("cuda"))


def test_the_variant_is_preferred_if_it_exists(tiny: Path, tmp_path: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(tiny / "base", subfolder="unet")
    unet.save_pretrained(tmp_path / "unet")
    with torch.no_grad():
        unet.conv_out.bias.fill_(7)
    unet.save_pretrained(tmp_path / "unet", variant="fp16")
    chosen = models.load_unet(str(tmp_path), "fp16", CPU, torch.float32)
    plain = models.load_unet(str(tmp_path), None, CPU, torch.float32)
    absent = models.load_unet(str(tmp_path), "bf16", CPU, torch.float32)
    assert chosen.conv_out.bias[0] == 7
    assert plain.conv_out.bias[0] == absent.conv_out.bias[0] != 7


def test_a_model_that_is_a_pickle_is_never_opened(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "sprung",)

    (tmp_path / "unet").mkdir()
    torch.save({"weight": Trap()}, tmp_path / "unet" / "diffusion_pytorch_model.bin")
    (tmp_path / "unet" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="unet cannot be loaded"):
        models.load_unet(str(tmp_path), None, CPU, torch.float32)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("source", ["no/such-folder-or-repository", "empty"])
def test_a_missing_model_is_a_one_line_error(settings: Make, tmp_path: Path, source: str) -> None:
    (tmp_path / "empty" / "unet").mkdir(parents=True)
    place = str(tmp_path / source) if source == "empty" else source
    with pytest.raises(UserError, match="cannot be loaded") as caught:
        models.load_unet(place, "fp16", CPU, torch.float32)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_xformers_that_cannot_be_used_is_a_one_line_error(tiny: Path) -> None:
    message = refused(
        lambda: models.load_unet(str(tiny / "base"), None, CPU, torch.float32, "xformers"),
        "attention is xformers, which cannot be used here.*install the xformers version",
    )
    assert "\n" not in message
    for attention in ("auto", "sdpa"):
        models.load_unet(str(tiny / "base"), None, CPU, torch.float32, attention)


def test_the_vae_is_in_fp32_and_another_one_in_the_dtype_of_the_run(tiny: Path, settings: Make, tmp_path: Path) -> None:
    vae = models.load_vae(settings(), CPU, torch.bfloat16)
    assert vae.dtype == torch.float32
    shutil.copytree(tiny / "base" / "vae", tmp_path / "other")
    in_folder = models.load_vae(settings(pretrained_vae=str(tmp_path / "other")), CPU, torch.bfloat16)
    in_model = models.load_vae(settings(pretrained_vae=str(tiny / "base")), CPU, torch.bfloat16)
    assert in_folder.dtype == in_model.dtype == torch.bfloat16
    assert torch.equal(in_folder.decoder.conv_in.weight, vae.decoder.conv_in.weight.bfloat16())


@pytest.mark.parametrize(("force_upcast", "dtype"), [(True, torch.float32), (False, torch.float16)])
def test_a_vae_that_overflows_in_fp16_is_in_fp32(
    tiny: Path, settings: Make, tmp_path: Path, force_upcast: bool, dtype: torch.dtype
) -> None:
    shutil.copytree(tiny / "base" / "vae", tmp_path / "other")
    path = tmp_path / "other" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"force_upcast": force_upcast}))
    config = settings(pretrained_vae=str(tmp_path / "other"))
    assert models.load_vae(config, CPU, torch.float16).dtype == dtype


def test_missing_weights_of_a_text_encoder_are_refused(tiny: Path, settings: Make, tmp_path: Path) -> None:
    """transformers would fill them with random numbers."""
    shutil.copytree(tiny / "base", tmp_path / "base")
    file = tmp_path / "base" / "text_encoder_2" / "model.safetensors"
    save_file({name: weight for name, weight in load_file(file).items() if name != "text_projection.weight"}, file)
    config = settings(pretrained_model=str(tmp_path / "base"))
    refused(lambda: prompts.load_text_encoders(config, CPU, torch.float32), "no weights for text_projection.weight")


@pytest.mark.parametrize(
    ("folder", "changes", "part"),
    [
        ("base/vae", {"use_post_quant_conv": False}, "post_quant_conv.bias"),
        ("base/text_encoder", {"num_hidden_layers": 1}, "encoder.layers.1"),
        ("base/unet", {"mid_block_type": None}, "mid_block"),
    ],
)
def test_weights_that_a_config_has_no_place_for_are_refused(
    folder: str, changes: dict[str, Any], part: str, tiny: Path, settings: Make, tmp_path: Path
) -> None:
    shutil.copytree(tiny / "base", tmp_path / "base")
    file = tmp_path / folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    config = settings(pretrained_model=str(tmp_path / "base"))

    def load() -> None:
        models.load_vae(config, CPU, torch.float32)
        prompts.load_text_encoders(config, CPU, torch.float32)
        models.load_unet(config.pretrained_model, None, CPU, torch.float32)

    refused(load, f"has no place for .*{part}")


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"


@pytest.mark.parametrize(
    ("file", "content", "part"),
    [
        ("tokenizer", None, "has no vocabulary in tokenizer:"),
        ("tokenizer_2/*.*", None, "has no vocabulary in tokenizer_2:"),
        ("unet/diffusion_pytorch_model.safetensors", LFS, "is damaged or incomplete .*git lfs pull"),
        ("vae/diffusion_pytorch_model.safetensors", b"", "is damaged or incomplete"),
        (
            "text_encoder_2/model.safetensors",
            save({"a": torch.ones(2, dtype=torch.float8_e4m3fn)}),
            "quantised .*F8_E4M3",
        ),
        ("unet/diffusion_pytorch_model.safetensors", save({"a": torch.ones(2, dtype=torch.int8)}), "quantised .*I8"),
        ("unet/config.json", b'{"layers_per_block": [1, 1, 1]}', "layers_per_block"),
    ],
)
def test_a_damaged_model_is_refused_before_it_is_loaded(
    file: str, content: bytes | None, part: str, tiny: Path, settings: Make, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny / "base", tmp_path / "base"))
    for path in model.glob(file):
        if content is None:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        elif path.suffix == ".json":
            path.write_text(json.dumps(json.loads(path.read_text()) | json.loads(content)))
        else:
            path.write_bytes(content)
    for download in (True, False):
        config = settings(pretrained_model=str(model))
        refused(partial(hub.check_models, config, download=download), part)


@pytest.mark.parametrize("changes", [{"model_max_length": ...}, {"model_max_length": 10**30}, None])
def test_prompts_have_77_tokens_whatever_the_tokenizers_settings_say(
    changes: dict[str, Any] | None, tiny: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny / "base", tmp_path / "base"))
    expected = prompts.tokenize(["a lace"], prompts.load_tokenizers(str(model)))
    file = model / "tokenizer" / "tokenizer_config.json"
    content = json.loads(file.read_text()) | (changes or {})
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))
    if changes is None:
        file.unlink()
    found = prompts.tokenize(["a lace"], prompts.load_tokenizers(str(model)))
    assert all(map(torch.equal, expected, found))


def test_a_damaged_vocabulary_is_one_line(tiny: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny / "base", tmp_path / "base"))
    (model / "tokenizer" / "tokenizer.json").unlink(missing_ok=True)
    (model / "tokenizer" / "vocab.json").write_text('{"a": ')
    (model / "tokenizer" / "merges.txt").touch()
    refused(lambda: prompts.load_tokenizers(str(model)), "tokenizer cannot be loaded .*(download the model again|SDXL)")


@pytest.mark.parametrize("shard", ["10GB", "200KB"])
def test_a_unet_loaded_in_chunks_has_the_same_weights(tiny: Path, tmp_path: Path, shard: str) -> None:
    unet = UNet2DConditionModel.from_pretrained(tiny / "base", subfolder="unet", torch_dtype=torch.float32)
    unet.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard != "10GB")
    loaded, _ = models.load_in_chunks(UNet2DConditionModel, tmp_path, None, torch.bfloat16, torch.device("cpu"))
    assert loaded.config == unet.config | {"_name_or_path": loaded.config["_name_or_path"]}
    expected, found = unet.state_dict(), loaded.state_dict()
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], value.bfloat16()) for name, value in expected.items())


@pytest.mark.parametrize("device", [CPU, pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)], ids=str)
def test_missing_and_unknown_weights_are_refused(tiny: Path, tmp_path: Path, device: torch.device) -> None:
    shutil.copytree(tiny / "base" / "unet", tmp_path / "unet")
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file({name: weight for name, weight in weights.items() if name != "conv_in.bias"}, file)
    refused(lambda: models.load_unet(str(tmp_path), None, device, torch.float32), "no weights for conv_in.bias")
    save_file(weights | {"conv_in.bias": torch.zeros(3)}, file)
    refused(
        lambda: models.load_unet(str(tmp_path), None, device, torch.float32), "unet cannot be loaded .*conv_in.bias"
    )


@pytest.mark.gpu
@pytest.mark.parametrize("shard", ["10GB", "200KB"])
def test_on_a_gpu_a_unet_has_the_same_weights(tiny: Path, tmp_path: Path, shard: str) -> None:
    unet = UNet2DConditionModel.from_pretrained(tiny / "base", subfolder="unet", torch_dtype=torch.float32)
    unet.save_pretrained(tmp_path / "unet", max_shard_size=shard)
    loaded = models.load_unet(str(tmp_path), None, torch.device("cuda"), torch.bfloat16)
    expected, found = unet.state_dict(), loaded.state_dict()
    assert set(found) == set(expected)
    assert all(value.device.type == "cuda" for value in found.values())
    assert all(torch.equal(found[name].cpu(), value.bfloat16()) for name, value in expected.items())
