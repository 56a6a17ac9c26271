"""The LoRA on UNet and text encoders: saved, loaded and merged without a change; the file for kohya's programs."""

import errno
import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from diffusers import StableDiffusionXLPipeline
from original_names import unet_name
from packaging.version import Version
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_models import CPU, PROMPTS, run_unet, trained_unet

from helpers import Make, refused
from lace_lora.config import LORA_FILE, Config
from lace_lora.sdxl import lora_weights, models, prompts
from lace_lora.training import results
from lace_lora.training.launch import Job

TEXT = ("text_encoder", "text_encoder_2")


def encoders_of(config: Config) -> lora_weights.Networks:
    return dict(zip(TEXT, prompts.load_text_encoders(config, CPU, torch.float32), strict=True))


def trained_encoders(config: Config) -> lora_weights.Networks:
    networks = encoders_of(config)
    generator = torch.Generator().manual_seed(4)
    for weight in lora_weights.add_lora(networks, config).values():
        weight.data = torch.randn(weight.shape, generator=generator) * 0.3
    return networks


def embeddings(config: Config, networks: lora_weights.Networks) -> tuple[torch.Tensor, torch.Tensor]:
    return prompts.encode_prompts(PROMPTS, prompts.load_tokenizers(config.pretrained_model), list(networks.values()))


@pytest.fixture
def saved(settings: Make, tmp_path: Path) -> tuple[Config, dict[str, Any]]:
    """Both files of a LoRA of all three networks, alpha unequal to rank, and what the networks gave while training."""
    unet, config = trained_unet(settings)
    networks = trained_encoders(config)
    expected = {"unet": run_unet(unet), "text": embeddings(config, networks)}
    Path(config.lora_output_dir).mkdir()
    state = lora_weights.lora_state({"unet": unet} | networks)
    captions = dict(zip("abc", [config.instance_prompt, config.instance_prompt, "a rosette, White"], strict=True))
    job = Job(captions, {}, {"pretrained_model": "some/model"}, None, {})
    layers = unet.config.layers_per_block
    results.save_results(config, state, config.alpha, 7, job, layers)
    return config, expected


def close(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["pytorch_lora_weights.safetensors", "myspecialstyle.safetensors"])
def test_a_plain_pipeline_reads_both_files_as_they_were_trained(saved: Any, name: str) -> None:
    config, expected = saved
    plain = StableDiffusionXLPipeline.from_pretrained(config.pretrained_model, torch_dtype=torch.float32)
    before, _, pooled_before, _ = plain.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    if Version(diffusers.__version__) < Version("0.40") and Version(transformers.__version__) >= Version("5.6"):
        pytest.skip("these versions cannot load any text encoder's LoRA in a pipeline")
    plain.load_lora_weights(config.lora_output_dir, weight_name=name)
    embeds, _, pooled, _ = plain.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    close(run_unet(plain.unet), expected["unet"])
    close((embeds, pooled), expected["text"])
    for one, other in ((embeds, before), (pooled, pooled_before)):
        assert (one - other).abs().max() > 0.05  # the text encoders' part does something
    half = embeds.shape[-1] // 2
    assert (embeds - before)[..., :half].abs().max() > 0.05
    assert (embeds - before)[..., half:].abs().max() > 0.05


@pytest.mark.parametrize("name", ["pytorch_lora_weights.safetensors", "myspecialstyle.safetensors"])
def test_merged_it_acts_as_it_was_trained(saved: Any, name: str) -> None:
    config, expected = saved
    unet = models.load_unet(config.pretrained_model, None, CPU, torch.float32)
    networks = encoders_of(config)
    for part in ({"unet": unet}, networks):
        lora_weights.merge_lora(part, Path(config.lora_output_dir, name), 1.0)
    close(run_unet(unet), expected["unet"])
    close(embeddings(config, networks), expected["text"])
    assert not any("lora" in name for network in networks.values() for name, _ in network.named_parameters())


def test_half_the_scale_is_half_the_change_of_the_weights(saved: Any) -> None:
    config, _ = saved
    path = Path(config.lora_output_dir, LORA_FILE)
    plain, half, whole = (encoders_of(config) for _ in range(3))
    lora_weights.merge_lora(half, path, 0.5)
    lora_weights.merge_lora(whole, path, 1.0)
    for name in TEXT:
        weights = [
            next(weight for key, weight in networks[name].named_parameters() if "q_proj.weight" in key)
            for networks in (plain, half, whole)
        ]
        close((weights[1] - weights[0]) * 2, weights[2] - weights[0])
        assert (weights[2] - weights[0]).abs().max() > 0.01


def test_a_lora_without_text_encoders_leaves_them_alone(settings: Make, tmp_path: Path) -> None:
    unet, config = trained_unet(settings)
    path = tmp_path / LORA_FILE
    lora_weights.save_lora(path, lora_weights.lora_state({"unet": unet}), {})
    networks = encoders_of(config)
    before = embeddings(config, networks)
    lora_weights.merge_lora(networks, path, 1.0)
    assert all(map(torch.equal, before, embeddings(config, networks)))


def test_text_encoders_of_other_shapes_are_refused(saved: Any, tmp_path: Path) -> None:
    config, _ = saved
    state = load_file(Path(config.lora_output_dir, LORA_FILE))
    cut = {key: value[:, :-1].contiguous() if "text_encoder." in key else value for key, value in state.items()}
    save_file(cut, tmp_path / "cut.safetensors")
    refused(lambda: lora_weights.merge_lora(encoders_of(config), tmp_path / "cut.safetensors", 1.0), "not a LoRA for")


@pytest.mark.parametrize(
    "kind",
    [
        {"target_modules": ["to_q", "conv1"], "lora_alpha": 8},
        {"target_modules": ["to_q", "to_k"], "use_rslora": True},
        {"target_modules": ["to_q"], "use_dora": True},
        {"target_modules": ["to_q", "conv2", "proj_in"], "use_dora": True, "lora_alpha": 2},
        {"target_modules": ["to_k", "to_v"], "alpha_pattern": {"to_k": 1}, "rank_pattern": {"attn2.to_v": 2}},
    ],
)
def test_what_others_train_is_merged_as_they_meant_it(settings: Make, tmp_path: Path, kind: dict[str, Any]) -> None:
    config = settings()
    theirs, merged = (models.load_unet(config.pretrained_model, None, CPU, torch.float32) for _ in range(2))
    plain = run_unet(theirs)
    torch.manual_seed(5)
    theirs.add_adapter(LoraConfig(**{"r": 4, "lora_alpha": 4, "init_lora_weights": False} | kind))
    StableDiffusionXLPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(theirs),
        unet_lora_adapter_metadata=theirs.peft_config["default"].to_dict(),
    )
    lora_weights.merge_lora({"unet": merged}, tmp_path / LORA_FILE, 1.0)
    close(run_unet(merged), run_unet(theirs))
    assert (run_unet(merged) - plain).abs().max() > 0.02


@pytest.mark.parametrize("named", ["as SDXL's own code", "as diffusers"])
def test_every_layer_of_a_kohya_file_counts_by_its_own_alpha_and_rank(
    settings: Make, tmp_path: Path, named: str
) -> None:
    config = settings()
    plain, merged = (models.load_unet(config.pretrained_model, None, CPU, torch.float32) for _ in range(2))
    layers = plain.config.layers_per_block
    state, expected = {}, {}
    torch.manual_seed(6)
    for index, (path, layer) in enumerate(plain.named_modules()):
        if not isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
            continue
        name = unet_name(f"{path}.weight", layers, plain.state_dict()) if "SDXL" in named else f"{path}.weight"
        name = f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}"
        rank, alpha = 1 + index % 3, [None, 0.5, 4.0][index % 4 % 3]
        up, down = torch.randn(len(layer.weight), rank), torch.randn(rank, *layer.weight.shape[1:])
        state[f"{name}.lora_up.weight"] = up[..., None, None].clone() if layer.weight.dim() == 4 else up
        state[f"{name}.lora_down.weight"] = down
        if alpha is not None:
            state[f"{name}.alpha"] = torch.tensor(alpha)
        change = torch.einsum("or,r...->o...", up, down) * ((alpha or rank) / rank)
        expected[path] = layer.weight + 0.5 * change
    save_file(state, tmp_path / "theirs.safetensors")
    lora_weights.merge_lora({"unet": merged}, tmp_path / "theirs.safetensors", 0.5)
    found = dict(merged.named_modules())
    for path, weight in expected.items():
        close(found[path].weight, weight)


def test_a_projection_of_the_text_encoder_is_merged(settings: Make, tmp_path: Path) -> None:
    networks = encoders_of(settings())
    weight: Any = networks["text_encoder_2"].get_parameter("text_projection.weight")
    before, (rows, columns) = weight.clone(), weight.shape
    state = {
        "lora_te2_text_projection.lora_up.weight": torch.ones(rows, 1),
        "lora_te2_text_projection.lora_down.weight": torch.ones(1, columns),
        "unet.conv_in.lora_A.weight": torch.zeros(1),
    }
    save_file(state, tmp_path / "theirs.safetensors")
    lora_weights.merge_lora(networks, tmp_path / "theirs.safetensors", 1.0)
    close(weight, before + 1)


@pytest.mark.parametrize("change", ["dora_scale", "another layer", "no down", "lora_te_x", "up of another size"])
def test_what_would_be_merged_only_in_part_is_refused(saved: Any, tmp_path: Path, change: str) -> None:
    config, _ = saved
    state = load_file(Path(config.lora_output_dir, "myspecialstyle.safetensors"))
    up = next(key for key in state if key.startswith("lora_unet_") and key.endswith(".lora_up.weight"))
    if change == "dora_scale":
        state[up.replace("lora_up.weight", "dora_scale")] = torch.ones(len(state[up]), 1)
    elif change == "another layer":
        state[up.replace("_blocks_", "_blocks_9")] = state[up].clone()
    elif change == "no down":
        del state[up.replace("lora_up", "lora_down")]
    elif change == "lora_te_x":
        state["lora_te_x.lora_up.weight"] = torch.ones(4, 4)
    else:
        state[up] = state[up][:1].clone()
    save_file(state, tmp_path / "part.safetensors")
    unet = models.load_unet(config.pretrained_model, None, CPU, torch.float32)
    refused(lambda: lora_weights.merge_lora({"unet": unet}, tmp_path / "part.safetensors", 1.0), "is not a LoRA for")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), OSError(errno.EIO, "no disk", "x")])
def test_memory_and_disks_are_not_blamed_on_the_lora(
    saved: Any, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, _ = saved

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(lora_weights, "_add", fail)
    with pytest.raises(type(error), match=str(error.args[-1])):
        lora_weights.merge_lora(encoders_of(config), Path(config.lora_output_dir, LORA_FILE), 1.0)


def test_what_diffusers_scripts_write_is_read(saved: Any, tmp_path: Path) -> None:
    """Their names: `lora.down`, and with transformers 5.6 no `text_model` in the first encoder."""
    config, expected = saved
    ours = load_file(Path(config.lora_output_dir, LORA_FILE))
    renamed = {
        key.replace("text_encoder.text_model.", "text_encoder.")
        .replace("lora_A", "lora.down")
        .replace("lora_B", "lora.up"): w
        for key, w in ours.items()
    }
    save_file(renamed, tmp_path / "theirs.safetensors")
    assert lora_weights.read_lora(tmp_path / "theirs.safetensors").keys() == ours.keys()
    networks = encoders_of(config)
    lora_weights.merge_lora(networks, tmp_path / "theirs.safetensors", 1.0)
    close(embeddings(config, networks), expected["text"])


@pytest.mark.parametrize(
    ("module", "name"),
    [
        # Where SDXL's own code has its attention: input blocks 4, 5, 7, 8, the middle block 1, output blocks 0 to 5.
        ("unet.down_blocks.1.attentions.0.proj_in", "lora_unet_input_blocks_4_1_proj_in"),
        ("unet.down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_out.0",
         "lora_unet_input_blocks_8_1_transformer_blocks_9_attn2_to_out_0"),
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
         "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q"),
        ("unet.up_blocks.0.attentions.2.proj", "lora_unet_output_blocks_2_1_proj"),
        ("unet.up_blocks.1.attentions.0.proj", "lora_unet_output_blocks_3_1_proj"),
        ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
         "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"),
        ("text_encoder_2.text_model.encoder.layers.31.self_attn.out_proj",
         "lora_te2_text_model_encoder_layers_31_self_attn_out_proj"),
    ],
)  # fmt: skip
def test_kohya_names(module: str, name: str) -> None:
    assert lora_weights.kohya_name(module) == name


def test_the_kohya_file_carries_alpha_and_what_programs_show(saved: Any) -> None:
    config, _ = saved
    with safe_open(Path(config.lora_output_dir, "myspecialstyle.safetensors"), framework="pt") as file:
        metadata, names = file.metadata(), set(file.keys())
        alphas = {float(file.get_tensor(name)) for name in names if name.endswith(".alpha")}
    assert alphas == {2.0}
    modules = {name.partition(".")[0] for name in names}
    assert names == {f"{m}.{end}" for m in modules for end in ("lora_down.weight", "lora_up.weight", "alpha")}
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0"
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "2.0")
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert metadata["modelspec.trigger_phrase"] == "<myspecialstyle>"
    assert metadata["modelspec.resolution"] == "64x64"
    assert metadata["ss_sd_model_name"] == "some/model"  # a path would be its last name alone
    tags = {"a photo of <myspecialstyle>": 2, "a rosette": 1, "white": 1}
    assert json.loads(metadata["ss_tag_frequency"]) == {"1_myspecialstyle": tags}
    card = json.loads(Path(config.lora_output_dir, "myspecialstyle.json").read_text())
    assert (card["activation text"], card["sd version"]) == ("<myspecialstyle>", "SDXL")


@pytest.mark.parametrize(
    ("prompt", "folder", "name", "words"),
    [
        ("a photo of <my-lace>", "x/lora", "my-lace", "<my-lace>"),
        ("lace in sks style", "x/antique lace", "antique lace", "lace in sks style"),
        ("<a> and <b>, <a>", "x/lora", "a", "<a>, <b>"),
    ],
)
def test_the_name_of_the_style(prompt: str, folder: str, name: str, words: str) -> None:
    config = Config(instance_prompt=prompt, lora_output_dir=folder)
    assert config.lora_name == name
    assert results.trigger_words(prompt) == words
