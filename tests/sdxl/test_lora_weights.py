"""The LoRA on UNet and text encoders: saved, read and merged without a change, as diffusers' pipelines read it."""

import errno
import json
import re
from copy import deepcopy
from dataclasses import replace
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

from helpers import refused
from lace_lora.config import LORA_FILE, Config
from lace_lora.sdxl import lora_weights, prompts
from lace_lora.sdxl.lora_weights import Networks
from lace_lora.training import results
from lace_lora.training.launch import Job
from sdxl_helpers import PROMPTS, TEXT, add_trained_lora, config_for, copies, load_networks, run_unet

BOTH_FILES = pytest.mark.parametrize("name", [LORA_FILE, "myspecialstyle.safetensors"])


@pytest.fixture(scope="module")
def config(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = config_for(tiny, tmp_path_factory.mktemp("run"))
    Path(config.lora_output_dir).mkdir()
    return config


@pytest.fixture(scope="module")
def plain(config: Config) -> Networks:
    """As they were loaded: tests change copies of them."""
    return load_networks(config)


@pytest.fixture(scope="module")
def trained(config: Config, plain: Networks) -> Networks:
    """All three with a LoRA, alpha unequal to rank."""
    return add_trained_lora(copies(plain, *plain), config)


@pytest.fixture(scope="module")
def saved(config: Config, trained: Networks) -> dict[str, Any]:
    """Both files of that LoRA in the output folder; returns what the networks gave while training."""
    save(config, trained)
    return {"unet": run_unet(trained["unet"]), "text": embeddings(config, trained)}


def save(config: Config, networks: Networks) -> None:
    Path(config.lora_output_dir).mkdir(exist_ok=True)
    job = Job(dict.fromkeys("abc", config.instance_prompt), {}, {}, None, {})
    unet: Any = networks["unet"]
    state = lora_weights.lora_state(networks)
    results.save_results(config, state, config.alpha, 7, job, unet.config.layers_per_block, "epsilon")


@pytest.fixture(scope="module")
def loaded_pipeline(config: Config) -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline.from_pretrained(config.pretrained_model, torch_dtype=torch.float32)


@pytest.fixture
def pipeline(loaded_pipeline: StableDiffusionXLPipeline) -> StableDiffusionXLPipeline:
    """Diffusers' own, to load a LoRA into."""
    networks = {name: deepcopy(loaded_pipeline.components[name]) for name in ("unet", *TEXT)}
    return StableDiffusionXLPipeline(**(loaded_pipeline.components | networks))


def embeddings(config: Config, networks: Networks) -> tuple[torch.Tensor, torch.Tensor]:
    encoders = [networks[name] for name in TEXT]
    return prompts.encode_prompts(PROMPTS, prompts.load_tokenizers(config.pretrained_model), encoders)


def merge(networks: Networks, path: Path, scale: float = 1.0) -> None:
    lora_weights.merge_lora(networks, lora_weights.read_lora(path), scale)


def close(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_a_new_lora_changes_nothing_and_is_fp32(config: Config, plain: Networks) -> None:
    unet: Any = copies(plain, "unet")["unet"]
    before = run_unet(unet)
    weights = lora_weights.add_lora({"unet": unet}, config)
    assert torch.equal(run_unet(unet), before)
    assert all(weight.dtype == torch.float32 for weight in weights.values())
    assert all("lora_" in name for name, parameter in unet.named_parameters() if parameter.requires_grad)


@BOTH_FILES
def test_a_new_lora_begins_with_a_saved_one(config: Config, plain: Networks, saved: Any, name: str) -> None:
    networks = copies(plain, *plain)
    other = replace(config, lora_alpha=7.0)
    lora_weights.add_lora(networks, other)
    lora_weights.begin_from(networks, lora_weights.read_lora(Path(config.lora_output_dir, name)), other.alpha)
    close(run_unet(networks["unet"]), saved["unet"])
    close(embeddings(config, networks), saved["text"])


def test_a_lora_that_does_not_fit_is_refused_as_a_beginning(config: Config, plain: Networks, saved: Any) -> None:
    lora = lora_weights.read_lora(Path(config.lora_output_dir, LORA_FILE))
    cases = [
        (3, list(plain), "it has rank 4 in .*, and rank is 3"),
        (4, ["unet"], "layers that do not train with these settings, such as text_encoder"),
    ]
    for rank, trained, reason in cases:
        networks = copies(plain, *trained)
        lora_weights.add_lora(networks, replace(config, rank=rank))
        refused(lambda networks=networks: lora_weights.begin_from(networks, lora, 4.0), reason)  # type: ignore[misc]


@BOTH_FILES
def test_a_plain_pipeline_reads_both_files_as_they_were_trained(
    config: Config, saved: Any, pipeline: Any, name: str
) -> None:
    before, _, pooled_before, _ = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    if Version(diffusers.__version__) < Version("0.40") and Version(transformers.__version__) >= Version("5.6"):
        pytest.skip("these versions cannot load any text encoder's LoRA in a pipeline")
    pipeline.load_lora_weights(config.lora_output_dir, weight_name=name)
    embeds, _, pooled, _ = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    close(run_unet(pipeline.unet), saved["unet"])
    close((embeds, pooled), saved["text"])
    for one, other in ((embeds, before), (pooled, pooled_before)):
        assert (one - other).abs().max() > 0.05  # the text encoders' part does something
    half = embeds.shape[-1] // 2
    assert (embeds - before)[..., :half].abs().max() > 0.05
    assert (embeds - before)[..., half:].abs().max() > 0.05


def test_saved_lora_acts_in_a_plain_pipeline_as_in_training(
    config: Config, trained: Networks, saved: Any, pipeline: Any, tmp_path: Path
) -> None:
    assert config.alpha != config.rank
    state = lora_weights.lora_state({"unet": trained["unet"]}, config.alpha / config.rank)
    lora_weights.save_lora(tmp_path / LORA_FILE, state, {})
    base_output = run_unet(pipeline.unet)
    pipeline.load_lora_weights(str(tmp_path), weight_name=LORA_FILE)
    torch.testing.assert_close(run_unet(pipeline.unet), saved["unet"], rtol=1e-4, atol=1e-5)
    assert (saved["unet"] - base_output).abs().max() > 0.05  # the LoRA does do something


@BOTH_FILES
def test_a_merged_lora_acts_as_in_training(config: Config, plain: Networks, saved: Any, name: str) -> None:
    networks = copies(plain, *plain)
    lora = lora_weights.read_lora(Path(config.lora_output_dir, name))  # once for both, as in a drawing
    for part in ({name: networks[name] for name in TEXT}, {"unet": networks["unet"]}):
        lora_weights.merge_lora(part, lora, 1.0)
    close(run_unet(networks["unet"]), saved["unet"])
    close(embeddings(config, networks), saved["text"])
    assert not any("lora" in name for network in networks.values() for name, _ in network.named_parameters())


@BOTH_FILES
def test_feed_forward_layers_act_everywhere_as_in_training(
    tiny: Path, plain: Networks, pipeline: Any, tmp_path: Path, name: str
) -> None:
    config = replace(config_for(tiny, tmp_path), lora_targets="attention+feedforward")
    trained, attention_only = add_trained_lora(copies(plain, "unet"), config), copies(plain, "unet")
    save(config, trained)
    path = Path(config.lora_output_dir, name)
    expected = run_unet(trained["unet"])
    pipeline.load_lora_weights(config.lora_output_dir, weight_name=name)
    close(run_unet(pipeline.unet), expected)
    merged = copies(plain, "unet")
    merge(merged, path)
    close(run_unet(merged["unet"]), expected)
    without = {key: weight for key, weight in load_file(path).items() if not re.search(r"[._]ff[._]", key)}
    save_file(without, path)
    merge(attention_only, path)
    missing = run_unet(attention_only["unet"]) - expected
    assert missing.abs().max() > 0.05  # the feed-forward layers' part does something


def test_kohya_s_file_has_every_linear_of_every_transformer_block(tiny: Path, plain: Networks, tmp_path: Path) -> None:
    config = replace(config_for(tiny, tmp_path), lora_targets="attention+feedforward")
    save(config, add_trained_lora(copies(plain, "unet"), config))
    unet: Any = plain["unet"]
    weights = unet.state_dict()
    inside = [key for key, weight in weights.items() if "transformer_blocks" in key and weight.dim() == 2]
    original = [unet_name(key, unet.config.layers_per_block, weights).removesuffix(".weight") for key in inside]
    names = load_file(Path(config.lora_output_dir, "myspecialstyle.safetensors"))
    assert {key.partition(".")[0] for key in names} == {f"lora_unet_{name.replace('.', '_')}" for name in original}


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_merged_lora_equals_the_loaded_one(
    config: Config, plain: Networks, trained: Networks, pipeline: Any, tmp_path: Path, scale: float
) -> None:
    state = lora_weights.lora_state({"unet": trained["unet"]}, config.alpha / config.rank)
    lora_weights.save_lora(tmp_path / LORA_FILE, state, {})
    pipeline.load_lora_weights(str(tmp_path), weight_name=LORA_FILE, adapter_name="lace")
    pipeline.set_adapters("lace", scale)
    merged = copies(plain, "unet")
    merge(merged, tmp_path / LORA_FILE, scale)
    assert not any("lora" in name for name, _ in merged["unet"].named_parameters())
    torch.testing.assert_close(run_unet(merged["unet"]), run_unet(pipeline.unet), rtol=1e-3, atol=1e-4)


def test_scale_zero_is_the_base(config: Config, plain: Networks, saved: Any) -> None:
    merged = copies(plain, "unet")
    merge(merged, Path(config.lora_output_dir, LORA_FILE), 0.0)
    assert torch.equal(run_unet(merged["unet"]), run_unet(plain["unet"]))


def test_half_the_scale_is_half_the_change_of_the_weights(config: Config, plain: Networks, saved: Any) -> None:
    path = Path(config.lora_output_dir, LORA_FILE)
    half, whole = copies(plain, *TEXT), copies(plain, *TEXT)
    merge(half, path, 0.5)
    merge(whole, path, 1.0)
    for name in TEXT:
        weights = [
            next(weight for key, weight in networks[name].named_parameters() if "q_proj.weight" in key)
            for networks in (plain, half, whole)
        ]
        close((weights[1] - weights[0]) * 2, weights[2] - weights[0])
        assert (weights[2] - weights[0]).abs().max() > 0.01


def test_a_lora_without_text_encoders_leaves_them_alone(
    config: Config, plain: Networks, trained: Networks, tmp_path: Path
) -> None:
    lora_weights.save_lora(tmp_path / LORA_FILE, lora_weights.lora_state({"unet": trained["unet"]}), {})
    networks = copies(plain, *TEXT)
    merge(networks, tmp_path / LORA_FILE)
    assert all(map(torch.equal, embeddings(config, plain), embeddings(config, networks)))


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
def test_loras_of_other_programs_are_merged_as_in_those_programs(
    plain: Networks, tmp_path: Path, kind: dict[str, Any]
) -> None:
    merged = copies(plain, "unet")
    theirs: Any = deepcopy(plain["unet"])
    torch.manual_seed(5)
    theirs.add_adapter(LoraConfig(**{"r": 4, "lora_alpha": 4, "init_lora_weights": False} | kind))
    StableDiffusionXLPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(theirs),
        unet_lora_adapter_metadata=theirs.peft_config["default"].to_dict(),
    )
    merge(merged, tmp_path / LORA_FILE)
    close(run_unet(merged["unet"]), run_unet(theirs))
    assert (run_unet(merged["unet"]) - run_unet(plain["unet"])).abs().max() > 0.02


@pytest.mark.parametrize("named", ["as SDXL's own code", "as diffusers"])
def test_every_layer_of_a_kohya_file_has_its_own_alpha_and_rank(plain: Networks, tmp_path: Path, named: str) -> None:
    unet: Any = plain["unet"]
    layers, weights = unet.config.layers_per_block, unet.state_dict()
    state, expected = {}, {}
    torch.manual_seed(6)
    for index, (path, layer) in enumerate(unet.named_modules()):
        if not isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
            continue
        name = unet_name(f"{path}.weight", layers, weights) if "SDXL" in named else f"{path}.weight"
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
    merged = copies(plain, "unet")
    merge(merged, tmp_path / "theirs.safetensors", 0.5)
    found = dict(merged["unet"].named_modules())
    for path, weight in expected.items():
        close(found[path].weight, weight)


def test_a_projection_of_the_text_encoder_is_merged(plain: Networks, tmp_path: Path) -> None:
    networks = copies(plain, *TEXT)
    weight: Any = networks["text_encoder_2"].get_parameter("text_projection.weight")
    before, (rows, columns) = weight.clone(), weight.shape
    state = {
        "lora_te2_text_projection.lora_up.weight": torch.ones(rows, 1),
        "lora_te2_text_projection.lora_down.weight": torch.ones(1, columns),
        "unet.conv_in.lora_A.weight": torch.zeros(1, 1),
        "unet.conv_in.lora_B.weight": torch.zeros(1, 1),
    }
    save_file(state, tmp_path / "theirs.safetensors")
    merge(networks, tmp_path / "theirs.safetensors")
    close(weight, before + 1)


def test_what_diffusers_scripts_write_is_read(config: Config, plain: Networks, saved: Any, tmp_path: Path) -> None:
    """Their names: `lora.down`, and with transformers 5.6 no `text_model` in the first encoder."""
    ours = load_file(Path(config.lora_output_dir, LORA_FILE))
    renamed = {
        key.replace("text_encoder.text_model.", "text_encoder.")
        .replace("lora_A", "lora.down")
        .replace("lora_B", "lora.up"): w
        for key, w in ours.items()
    }
    save_file(renamed, tmp_path / "theirs.safetensors")
    assert lora_weights.read_state(tmp_path / "theirs.safetensors").keys() == ours.keys()
    networks = copies(plain, *TEXT)
    merge(networks, tmp_path / "theirs.safetensors")
    close(embeddings(config, networks), saved["text"])


@pytest.mark.parametrize("kind", ["of another shape", "no network's", "a pickle under a safe name"])
def test_files_that_are_not_loras_are_refused(plain: Networks, trained: Networks, tmp_path: Path, kind: str) -> None:
    path = tmp_path / LORA_FILE
    state = lora_weights.lora_state({"unet": trained["unet"]})
    if kind == "of another shape":
        save_file({name: tensor[:, :-1].contiguous() for name, tensor in state.items()}, path)
    elif kind == "no network's":
        save_file({"text_model.weight": torch.zeros(3)}, path)
    else:
        torch.save(state, path)
    message = refused(lambda: merge(copies(plain, "unet"), path), "not a LoRA for this model")
    assert str(path) in message


def test_text_encoders_of_other_shapes_are_refused(config: Config, plain: Networks, saved: Any, tmp_path: Path) -> None:
    state = load_file(Path(config.lora_output_dir, LORA_FILE))
    cut = {key: value[:, :-1].contiguous() if "text_encoder." in key else value for key, value in state.items()}
    save_file(cut, tmp_path / "cut.safetensors")
    refused(lambda: merge(copies(plain, *TEXT), tmp_path / "cut.safetensors"), "not a LoRA for")


@pytest.mark.parametrize(
    "change",
    ["dora_scale", "another layer", "no down", "no up", "lora_te_x", "two downs", "of a norm", "up of another size"],
)
def test_partly_matching_files_are_refused(
    config: Config, plain: Networks, saved: Any, tmp_path: Path, change: str
) -> None:
    state = load_file(Path(config.lora_output_dir, "myspecialstyle.safetensors"))
    up = next(key for key in state if key.startswith("lora_unet_") and key.endswith(".lora_up.weight"))
    down = up.replace("lora_up", "lora_down")
    if change == "dora_scale":
        state[up.replace("lora_up.weight", "dora_scale")] = torch.ones(len(state[up]), 1)
    elif change == "another layer":
        for key in (up, down):
            state[key.replace("_blocks_", "_blocks_9")] = state[key].clone()
    elif change in ("no down", "no up"):
        del state[down if change == "no down" else up]
    elif change == "lora_te_x":
        state["lora_te_x.lora_up.weight"] = torch.ones(4, 4)
    elif change == "two downs":
        state[down.replace("lora_down", "lora_A")] = state[down].clone()
    elif change == "of a norm":
        state |= {f"unet.conv_norm_out.lora_{end}.weight": torch.ones(1, 1) for end in "AB"}
    else:
        state[up] = state[up][:1].clone()
    save_file(state, tmp_path / "part.safetensors")
    refused(lambda: merge(copies(plain, "unet"), tmp_path / "part.safetensors"), "is not a LoRA for")


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("change", "metadata", "part"),
    [
        ({"lora_down": torch.ones(0, 64), "lora_up": torch.ones(64, 0)}, {}, "which do not make a LoRA"),
        ({"lora_down": torch.ones(4)}, {}, "which do not make a LoRA"),
        ({"lora_down": torch.ones(4, 64), "lora_up": torch.ones(64, 2)}, {}, "which do not make a LoRA"),
        ({"lora_down": torch.full((4, 64), NAN)}, {}, "not finite"),
        ({"lora_down": torch.ones(4, 64, dtype=torch.int32)}, {}, "not finite"),
        ({"alpha": torch.tensor(NAN)}, {}, "alpha nan"),
        ({"alpha": torch.tensor(1e7)}, {}, "alpha 1e"),
        ({"alpha": torch.ones(2)}, {}, "not a LoRA for this model"),
        ({}, {"unet.lora_alpha": INF}, "alpha inf"),
        ({}, {"unet.lora_alpha": "x"}, "not a LoRA for this model"),
        ({}, {"unet.lora_alpha": 10**400}, "not a LoRA for this model"),
        ({}, {"unet.alpha_pattern": {"(": 1.0}}, "not a LoRA for this model"),
        ({}, {"unet.alpha_pattern": [1]}, "not a LoRA for this model"),
        ({}, [], "not a LoRA for this model"),
    ],
)
def test_nonsense_in_a_lora_file_is_a_one_line_error(tmp_path: Path, change: Any, metadata: Any, part: str) -> None:
    layer = {"lora_down": torch.ones(4, 64), "lora_up": torch.ones(64, 4), **change}
    state = {f"unet.conv_in.{name}{'' if name == 'alpha' else '.weight'}": value for name, value in layer.items()}
    path = tmp_path / LORA_FILE
    save_file(state, path, {"lora_adapter_metadata": json.dumps(metadata)} if metadata != {} else None)
    message = refused(lambda: lora_weights.read_lora(path), part)
    assert "\n" not in message


def test_a_lora_that_overflows_is_refused_and_not_merged(plain: Networks, tmp_path: Path) -> None:
    unet: Any = copies(plain, "unet")["unet"].half()
    rows, columns = unet.time_embedding.linear_1.weight.shape
    state = {
        "unet.time_embedding.linear_1.lora_A.weight": torch.full((1, columns), 1e4),
        "unet.time_embedding.linear_1.lora_B.weight": torch.full((rows, 1), 1e4),
    }
    save_file(state, tmp_path / LORA_FILE)
    refused(lambda: merge({"unet": unet}, tmp_path / LORA_FILE), "not finite")
    assert all(weight.isfinite().all() for weight in unet.parameters())


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), OSError(errno.EIO, "no disk", "x")])
@pytest.mark.parametrize("where", ["_add", "_read_file"])
def test_memory_and_disks_are_not_blamed_on_the_lora(
    config: Config, plain: Networks, saved: Any, error: Exception, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(lora_weights, where, fail)
    with pytest.raises(type(error), match=str(error.args[-1])):
        merge(copies(plain, *TEXT), Path(config.lora_output_dir, LORA_FILE))


def test_lora_file_holds_its_metadata_and_only_the_unet(trained: Networks, tmp_path: Path) -> None:
    path = tmp_path / LORA_FILE
    lora_weights.save_lora(path, lora_weights.lora_state({"unet": trained["unet"]}), {"step": "7"})
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        assert file.metadata() == {"format": "pt", "step": "7"}
    assert names
    assert all(name.startswith("unet.") and name.endswith((".lora_A.weight", ".lora_B.weight")) for name in names)
    assert [item.name for item in tmp_path.iterdir()] == [LORA_FILE]


@pytest.mark.parametrize(
    ("module", "name"),
    [
        # Where SDXL's own code has its attention: input blocks 4, 5, 7, 8, the middle block 1, output blocks 0 to 5.
        ("unet.down_blocks.1.attentions.0.proj_in", "lora_unet_input_blocks_4_1_proj_in"),
        ("unet.down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_out.0",
         "lora_unet_input_blocks_8_1_transformer_blocks_9_attn2_to_out_0"),
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
         "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q"),
        ("unet.up_blocks.1.attentions.2.transformer_blocks.1.ff.net.0.proj",
         "lora_unet_output_blocks_5_1_transformer_blocks_1_ff_net_0_proj"),
        ("unet.mid_block.attentions.0.transformer_blocks.9.ff.net.2",
         "lora_unet_middle_block_1_transformer_blocks_9_ff_net_2"),
        ("unet.up_blocks.0.attentions.2.proj", "lora_unet_output_blocks_2_1_proj"),
        ("unet.up_blocks.1.attentions.0.proj", "lora_unet_output_blocks_3_1_proj"),
        ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
         "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"),
        ("text_encoder_2.text_model.encoder.layers.31.self_attn.out_proj",
         "lora_te2_text_model_encoder_layers_31_self_attn_out_proj"),
    ],
)  # fmt: skip
def test_kohya_names(module: str, name: str) -> None:
    assert lora_weights.kohya_name(module, 2) == name
