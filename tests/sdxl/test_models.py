"""Loading parts, prompts to embeddings, and the LoRA file, each against diffusers' own pipelines."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from helpers import Make, refused
from lace_lora.config import LORA_FILE, Config
from lace_lora.errors import UserError
from lace_lora.sdxl import lora_weights, models, prompts

CPU = torch.device("cpu")
PROMPTS = ["a photo of <myspecialstyle>", "white lace, scalloped edge"]


@pytest.fixture(scope="module")
def base(tiny: Path) -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline.from_pretrained(tiny / "base", torch_dtype=torch.float32)


def run_unet(unet: UNet2DConditionModel) -> torch.Tensor:
    """The UNet's output for one fixed input."""
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "text_embeds": torch.randn(2, 128, generator=generator),
        "time_ids": torch.tensor([[64.0, 80.0, 0.0, 8.0, 64.0, 64.0]] * 2),
    }
    latents, embeds = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 77, 256, generator=generator)
    with torch.no_grad():
        return unet(latents, torch.tensor([100, 900]), embeds, added_cond_kwargs=inputs).sample


def trained_unet(settings: Make) -> tuple[UNet2DConditionModel, Config]:
    """A UNet whose LoRA does something, with alpha unequal to rank."""
    config = settings()
    unet = models.load_unet(config.pretrained_model, None, CPU, torch.float32)
    generator = torch.Generator().manual_seed(2)
    for weight in lora_weights.add_lora({"unet": unet}, config).values():
        weight.data = torch.randn(weight.shape, generator=generator) * 0.3
    return unet, config


def test_prompt_embeddings_equal_the_pipelines(base: StableDiffusionXLPipeline, settings: Make) -> None:
    config = settings()
    tokenizers = prompts.load_tokenizers(config.pretrained_model)
    encoders = prompts.load_text_encoders(config, CPU, torch.float32)
    embeds, pooled = prompts.encode_prompts(PROMPTS, tokenizers, encoders)
    expected, _, expected_pooled, _ = base.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    assert torch.equal(embeds, expected)
    assert torch.equal(pooled, expected_pooled)


def test_refiner_embeddings_equal_the_pipelines(tiny: Path, base: StableDiffusionXLPipeline, settings: Make) -> None:
    config = settings()
    refiner = StableDiffusionXLImg2ImgPipeline.from_pretrained(
        tiny / "refiner", vae=base.vae, text_encoder_2=base.text_encoder_2, tokenizer_2=base.tokenizer_2
    )
    tokenizers = prompts.load_tokenizers(config.pretrained_model)
    encoders = prompts.load_text_encoders(config, CPU, torch.float32)
    embeds, pooled = prompts.encode_prompts(PROMPTS, tokenizers[1:], encoders[1:])
    expected, _, expected_pooled, _ = refiner.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    assert torch.equal(embeds, expected)
    assert torch.equal(pooled, expected_pooled)


def test_too_long_prompts_are_noticed(tiny: Path) -> None:
    tokenizer = prompts.load_tokenizers(str(tiny / "base"))[0]
    assert not prompts.too_long("white lace", tokenizer)
    assert prompts.too_long("white lace " * 40, tokenizer)


def test_a_new_lora_changes_nothing_and_is_fp32(settings: Make) -> None:
    config = settings()
    unet = models.load_unet(config.pretrained_model, None, CPU, torch.float32)
    before = run_unet(unet)
    weights = lora_weights.add_lora({"unet": unet}, config)
    assert torch.equal(run_unet(unet), before)
    assert all(weight.dtype == torch.float32 for weight in weights.values())
    assert all("lora_" in name for name, parameter in unet.named_parameters() if parameter.requires_grad)


def test_saved_lora_acts_in_a_plain_pipeline_as_in_training(settings: Make, tmp_path: Path) -> None:
    unet, config = trained_unet(settings)
    assert config.alpha != config.rank
    expected = run_unet(unet)
    lora_weights.save_lora(
        tmp_path / LORA_FILE, lora_weights.lora_state({"unet": unet}, config.alpha / config.rank), {}
    )
    plain = StableDiffusionXLPipeline.from_pretrained(config.pretrained_model, torch_dtype=torch.float32)
    base_output = run_unet(plain.unet)
    plain.load_lora_weights(str(tmp_path), weight_name=LORA_FILE)
    torch.testing.assert_close(run_unet(plain.unet), expected, rtol=1e-4, atol=1e-5)
    assert (expected - base_output).abs().max() > 0.05  # the LoRA does do something


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_merged_lora_equals_the_loaded_one(settings: Make, tmp_path: Path, scale: float) -> None:
    unet, config = trained_unet(settings)
    path = tmp_path / LORA_FILE
    lora_weights.save_lora(path, lora_weights.lora_state({"unet": unet}, config.alpha / config.rank), {})
    plain = StableDiffusionXLPipeline.from_pretrained(config.pretrained_model, torch_dtype=torch.float32)
    plain.load_lora_weights(str(tmp_path), weight_name=LORA_FILE, adapter_name="lace")
    plain.set_adapters("lace", scale)
    merged = models.load_unet(config.pretrained_model, None, CPU, torch.float32)
    lora_weights.merge_lora({"unet": merged}, path, scale)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    torch.testing.assert_close(run_unet(merged), run_unet(plain.unet), rtol=1e-3, atol=1e-4)


def test_scale_zero_is_the_base(settings: Make, tmp_path: Path) -> None:
    unet, config = trained_unet(settings)
    path = tmp_path / LORA_FILE
    lora_weights.save_lora(path, lora_weights.lora_state({"unet": unet}, config.alpha / config.rank), {})
    base_unet = models.load_unet(config.pretrained_model, None, CPU, torch.float32)
    before = run_unet(base_unet)
    lora_weights.merge_lora({"unet": base_unet}, path, 0.0)
    assert torch.equal(run_unet(base_unet), before)


def test_what_is_no_lora_is_refused(settings: Make, tmp_path: Path) -> None:
    unet, config = trained_unet(settings)
    path = tmp_path / LORA_FILE
    state = lora_weights.lora_state({"unet": unet}, 1.0)
    wrong_shape = {name: tensor[:, :-1].contiguous() for name, tensor in state.items()}
    foreign = {"text_model.weight": torch.zeros(3)}
    for content in (wrong_shape, foreign):
        save_file(content, path)
        with pytest.raises(UserError, match="not a LoRA for this model"):
            lora_weights.merge_lora(
                {"unet": models.load_unet(config.pretrained_model, None, CPU, torch.float32)}, path, 1.0
            )
    torch.save(state, path)  # a pickle under a safe name
    with pytest.raises(UserError, match="not a LoRA for this model"):
        lora_weights.merge_lora(
            {"unet": models.load_unet(config.pretrained_model, None, CPU, torch.float32)}, path, 1.0
        )


def test_the_variant_is_preferred_where_it_is_there(tiny: Path, tmp_path: Path) -> None:
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
def test_a_missing_model_is_one_sentence(settings: Make, tmp_path: Path, source: str) -> None:
    (tmp_path / "empty" / "unet").mkdir(parents=True)
    place = str(tmp_path / source) if source == "empty" else source
    with pytest.raises(UserError, match="cannot be loaded") as caught:
        models.load_unet(place, "fp16", CPU, torch.float32)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16)])
def test_number_format_goes_by_capability(
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


def test_lora_file_holds_its_metadata_and_only_the_unet(settings: Make, tmp_path: Path) -> None:
    unet, _ = trained_unet(settings)
    path = tmp_path / LORA_FILE
    lora_weights.save_lora(path, lora_weights.lora_state({"unet": unet}, 1.0), {"step": "7"})
    names = load_file(path)
    assert names
    assert all(name.startswith("unet.") and name.endswith((".lora_A.weight", ".lora_B.weight")) for name in names)
    assert [item.name for item in tmp_path.iterdir()] == [LORA_FILE]


def test_xformers_that_cannot_be_used_is_one_sentence(tiny: Path) -> None:
    said = refused(
        lambda: models.load_unet(str(tiny / "base"), None, CPU, torch.float32, "xformers"),
        "attention is xformers, which cannot be used here.*pip install xformers",
    )
    assert "\n" not in said
    for attention in ("auto", "sdpa"):
        models.load_unet(str(tiny / "base"), None, CPU, torch.float32, attention)


def test_the_vae_is_in_fp32_and_another_one_in_the_models_format(tiny: Path, settings: Make, tmp_path: Path) -> None:
    vae = models.load_vae(settings(), CPU, torch.bfloat16)
    assert vae.dtype == torch.float32
    shutil.copytree(tiny / "base" / "vae", tmp_path / "other")
    in_folder = models.load_vae(settings(pretrained_vae=str(tmp_path / "other")), CPU, torch.bfloat16)
    in_model = models.load_vae(settings(pretrained_vae=str(tiny / "base")), CPU, torch.bfloat16)
    assert in_folder.dtype == in_model.dtype == torch.bfloat16
    assert torch.equal(in_folder.decoder.conv_in.weight, vae.decoder.conv_in.weight.bfloat16())


@pytest.mark.parametrize("shard", ["10GB", "200KB"])
def test_piece_by_piece_a_unet_is_the_same(tiny: Path, tmp_path: Path, shard: str) -> None:
    unet = UNet2DConditionModel.from_pretrained(tiny / "base", subfolder="unet", torch_dtype=torch.float32)
    unet.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard != "10GB")
    loaded = models.load_piecemeal(UNet2DConditionModel, tmp_path, None, torch.bfloat16, torch.device("cpu"))
    assert loaded.config == unet.config | {"_name_or_path": loaded.config["_name_or_path"]}
    expected, found = unet.state_dict(), loaded.state_dict()
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], value.bfloat16()) for name, value in expected.items())


def test_piece_by_piece_missing_and_foreign_weights_are_noticed(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny / "base" / "unet", tmp_path / "unet")
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    place = (UNet2DConditionModel, tmp_path / "unet", None, torch.float32, torch.device("cpu"))
    save_file({name: weight for name, weight in weights.items() if name != "conv_in.bias"}, file)
    with pytest.raises(ValueError, match=r"no weights for conv_in.bias"):
        models.load_piecemeal(*place)
    save_file(weights | {"conv_in.bias": torch.zeros(3)}, file)
    with pytest.raises(RuntimeError, match=r"size mismatch for conv_in.bias"):
        models.load_piecemeal(*place)
