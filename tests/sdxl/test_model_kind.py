"""Models of another kind are refused by their configs or headers, before anything is loaded; SDXL's own are not."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from original_names import original_checkpoint, original_refiner
from safetensors.torch import save, save_file

from helpers import Make, refused
from lace_lora.config import LORA_FILE
from lace_lora.sdxl import hub

Change = Callable[..., str]
FILES = {"scheduler": "scheduler/scheduler_config.json", "index": "model_index.json"}


def copy_configs(source: str, target: str) -> None:
    """Of weights these checks read the header alone."""
    Path(target).write_bytes(save({}) if source.endswith(".safetensors") else Path(source).read_bytes())


@pytest.fixture
def changed(tiny: Path, tmp_path: Path) -> Change:
    """Copies the configs of `base` or `refiner` and changes some: ... removes a value, None a whole file."""

    def change(which: str = "base", **parts: dict[str, Any] | None) -> str:
        folder = tmp_path / f"changed {which}"
        shutil.copytree(tiny / which, folder, copy_function=copy_configs)
        for part, values in parts.items():
            file = folder / FILES.get(part, f"{part}/config.json")
            if values is None:
                file.unlink()
            else:
                content = json.loads(file.read_text()) | values
                file.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))
        return str(folder)

    return change


ANOTHER_BASE: list[tuple[dict[str, Any], str]] = [
    ({"unet": {"attention_head_dim": -1}}, "a UNet with attention_head_dim -1"),
    ({"unet": {"num_attention_heads": [2, -4, 4]}}, "a UNet with num_attention_heads"),
    ({"index": {"_class_name": "StableDiffusion3Pipeline"}}, "is a model for StableDiffusion3Pipeline"),
    ({"index": {"_class_name": ["a\nb", "c"]}}, "is a model for"),
    ({"scheduler": {"_class_name": "EDMDPMSolverMultistepScheduler"}}, "the scheduler EDMDPM"),
    ({"scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler"}}, "the scheduler FlowMatch"),
    ({"scheduler": {"prediction_type": "sample"}}, "prediction_type 'sample'"),
    ({"scheduler": {"beta_schedule": ...}}, r"no noise schedule \(beta_schedule\)"),
    ({"scheduler": {"beta_end": ...}}, r"no noise schedule \(beta_end\)"),
    ({"scheduler": {"timestep_type": "continuous"}}, "timestep_type 'continuous'"),
    ({"scheduler": {"use_flow_sigmas": True}}, "use_flow_sigmas True"),
    ({"scheduler": {"rescale_betas_zero_snr": True}}, "rescale_betas_zero_snr without v_prediction"),
    ({"scheduler": {"trained_betas": [0.1] * 7}}, "7 trained_betas"),
    ({"scheduler": {"use_karras_sigmas": True, "use_beta_sigmas": True}}, "both use_karras_sigmas and use_beta_sigmas"),
    ({"scheduler": None}, "has no scheduler/scheduler_config.json"),
    ({"unet": {"_class_name": "HunyuanDiT2DModel"}}, "HunyuanDiT2DModel"),
    ({"unet": {"in_channels": 9}}, r"in_channels 9, which is for inpainting"),
    ({"unet": {"out_channels": 8}}, "out_channels 8"),
    ({"unet": {"time_cond_proj_dim": 256}}, r"latent consistency model \(LCM\)"),
    ({"unet": {"encoder_hid_dim": 4096, "encoder_hid_dim_type": "text_proj"}}, "as in Kolors"),
    ({"unet": {"addition_embed_type": ...}}, "SD 1.5 or 2"),
    ({"unet": {"act_fn": "gelu"}}, "act_fn 'gelu'"),
    ({"unet": {"projection_class_embeddings_input_dim": 2816}}, r"2816, not 128 \+ 6 \* 32"),
    ({"unet": {"quantization_config": {}}}, "quantised"),
    ({"unet": None}, "has no unet/config.json"),
    ({"text_encoder": {"hidden_size": 64}}, "text encoders 64 and 128 wide, and a UNet for 256"),
    ({"text_encoder": {"model_type": "chatglm"}}, "text_encoder of another kind"),
    ({"text_encoder_2": {"architectures": ["CLIPTextModel"]}}, "text_encoder_2 of another kind"),
    ({"text_encoder_2": None}, "has no text_encoder_2/config.json"),
    ({"vae": {"latent_channels": 16}}, "16 latent channels"),
    ({"vae": {"latents_mean": [1.0] * 4}}, "latents_mean"),
    ({"vae": {"_class_name": "AutoencoderTiny"}}, "AutoencoderTiny"),
    ({"vae": None}, "has no VAE"),
]


@pytest.mark.parametrize(("changes", "part"), ANOTHER_BASE)
def test_another_kind_of_base_is_refused(settings: Make, changed: Change, changes: Any, part: str) -> None:
    config = settings(pretrained_model=changed(**changes), refine=False)
    assert "\n" not in refused(lambda: hub.fetch_models(config), part)


@pytest.mark.parametrize(
    "scheduler",
    [
        {"timestep_spacing": "trailing", "_class_name": "EulerAncestralDiscreteScheduler"},  # SDXL Turbo, Lightning
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
        {"prediction_type": ..., "_class_name": "LCMScheduler", "use_karras_sigmas": True},
        {"trained_betas": [0.01] * 1000, "beta_start": ...},
    ],
)
def test_sdxls_own_kinds_are_used(settings: Make, changed: Change, scheduler: dict[str, Any]) -> None:
    folder = changed(scheduler=scheduler)
    assert hub.fetch_models(settings(pretrained_model=folder))["pretrained_model"] == folder


def test_a_damaged_config_is_a_one_line_error(settings: Make, changed: Change) -> None:
    folder = changed()
    for text in ("{", "[]", "[" * 100_000, '"\udcff"'):
        Path(folder, "vae", "config.json").write_text(text, errors="surrogateescape")
        refused(lambda: hub.fetch_models(settings(pretrained_model=folder)), "not a valid config file")


def test_a_folder_without_weights_is_refused(settings: Make, changed: Change) -> None:
    folder = changed()
    weights = Path(folder, "text_encoder", "model.safetensors")
    weights.rename(weights.with_suffix(".bin"))
    config = settings(pretrained_model=folder)
    for download in (True, False):
        part = "no safetensors weights in text_encoder: "
        refused(lambda download=download: hub.check_models(config, download=download), part)  # type: ignore[misc]


def test_base_and_refiner_in_each_others_place(settings: Make, tiny: Path) -> None:
    base, refiner = str(tiny / "base"), str(tiny / "refiner")
    refused(lambda: hub.fetch_models(settings(refiner_model=base)), "is a base model: set refiner_model to")
    refused(lambda: hub.fetch_models(settings(pretrained_model=refiner)), "is a refiner model: set it as refiner_model")


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"scheduler": {"_class_name": "EDMEulerScheduler"}}, "the scheduler EDM"),
        ({"scheduler": None}, "has no scheduler"),
        ({"unet": {"in_channels": 8}}, "in_channels 8"),
        ({"unet": {"cross_attention_dim": 1280}}, "a text encoder 1280 wide, but that of .*base is 128 wide"),
        ({"unet": {"addition_time_embed_dim": 256}}, "does not fit the second text encoder"),
    ],
)
def test_another_kind_of_refiner_is_refused(
    settings: Make, changed: Change, changes: dict[str, Any], part: str
) -> None:
    config = settings(refiner_model=changed("refiner", **changes))
    refused(lambda: hub.fetch_models(config), part)


@pytest.mark.parametrize(
    ("scheduler", "is_equal"),
    [
        ({"prediction_type": "v_prediction"}, False),
        ({"beta_end": 0.02}, False),
        ({"trained_betas": [0.01] * 1000}, False),
        ({"timestep_spacing": "trailing", "steps_offset": 0, "use_karras_sigmas": True}, True),  # only for sampling
        ({"rescale_betas_zero_snr": ..., "use_karras_sigmas": ..., "prediction_type": ...}, True),  # the defaults
        ({"_class_name": "DDIMScheduler"}, True),
    ],
)
def test_the_ensemble_needs_one_noise_schedule(
    settings: Make, changed: Change, scheduler: dict[str, Any], is_equal: bool
) -> None:
    refiner = changed("refiner", scheduler=scheduler)
    hub.fetch_models(settings(refiner_model=refiner))
    ensemble = settings(refiner_model=refiner, refiner_flow="ensemble")
    if is_equal:
        hub.fetch_models(ensemble)
    else:
        refused(lambda: hub.fetch_models(ensemble), "another noise schedule .*set refiner_flow: img2img")


def test_a_vae_for_other_latents_is_refused(settings: Make, changed: Change, tiny: Path) -> None:
    for change, part in (
        ({"scaling_factor": 0.18215}, "scaling_factor 0.18215, not 0.13025"),
        ({"scaling_factor": ...}, "scaling_factor 0.18215, not 0.13025"),
        ({"shift_factor": 0.1}, "shift_factor"),
    ):
        folder = changed(vae=change)
        for place in (folder, f"{folder}/vae"):
            refused(lambda place=place: hub.fetch_models(settings(pretrained_vae=place)), part)  # type: ignore[misc]
        shutil.rmtree(folder)
    whole = hub.fetch_models(settings(pretrained_vae=str(tiny / "base")))
    assert whole["pretrained_vae"] == str(tiny / "base" / "vae")


@pytest.fixture(scope="module")
def checkpoints(tiny: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {
        "base": original_checkpoint(tiny / "base"), "refiner": original_refiner(tiny / "refiner", tiny / "base")
    }  # fmt: skip


@pytest.fixture
def layouts(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of SDXL's repositories."""
    monkeypatch.setattr(hub, "_download", lambda name, *_: tiny / ("refiner" if "refiner" in name else "base"))


ONE = torch.ones(1)
UNET, ENCODERS, VAE = r"^model\.", r"^conditioner\.", r"^first_stage_model\."


@pytest.mark.parametrize(
    ("added", "dropped", "part"),
    [
        ({"model.diffusion_model.input_blocks.0.0.weight": torch.ones(64, 9, 3, 3)}, None, "in_channels 9"),
        ({"v_pred": ONE}, None, "is a v-prediction model"),
        ({"ztsnr": ONE}, None, "is a v-prediction model"),
        ({"edm_mean": ONE}, None, "Playground"),
        ({"edm_vpred.sigma_max": ONE}, None, "CosXL"),
        ({"lora_unet_mid.lora_up.weight": ONE}, None, "is a LoRA"),
        ({"cond_stage_model.x": ONE}, ENCODERS, "is Stable Diffusion 1.5 or 2"),
        ({"model.diffusion_model.joint_blocks.0.x": ONE}, UNET, "is Stable Diffusion 3"),
        ({"double_blocks.0.x": ONE}, UNET, "is Flux"),
        ({"x": ONE.to(torch.float8_e4m3fn)}, None, "has quantised weights"),
        ({"x.absmax": ONE.to(torch.uint8)}, None, "has quantised weights"),
        ({}, r"label_emb", "SD 1.5 or 2"),
        ({}, rf"{UNET}|{ENCODERS}", "has no weights of the unet"),  # a VAE alone
        ({}, rf"{VAE}|{ENCODERS}", "has no weights of the text_encoder"),
        ({}, r"^conditioner\.embedders\.1", "has no weights of the text_encoder_2"),
        ({}, VAE, "has no VAE"),
    ],
)
@pytest.mark.usefixtures("layouts")
def test_another_kind_of_single_file_is_refused(
    settings: Make, checkpoints: Any, tmp_path: Path, added: Any, dropped: str | None, part: str
) -> None:
    kept = {name: value for name, value in checkpoints["base"].items() if not dropped or not re.search(dropped, name)}
    save_file(kept | added, tmp_path / "model.safetensors")
    config = settings(pretrained_model=str(tmp_path / "model.safetensors"), refine=False)
    refused(lambda: hub.fetch_models(config), part)


@pytest.mark.usefixtures("layouts")
def test_single_files_of_sdxl_are_used(settings: Make, checkpoints: Any, tmp_path: Path) -> None:
    base, refiner, vae = (
        str(tmp_path / name) for name in ("base.safetensors", "refiner.SAFETENSORS", "VAE.safetensors")
    )
    save_file(checkpoints["base"], base, {"modelspec.prediction_type": "Epsilon"})
    save_file(checkpoints["refiner"], refiner)
    part = "first_stage_model."
    save_file({name.removeprefix(part): w for name, w in checkpoints["base"].items() if name.startswith(part)}, vae)
    sources = {"pretrained_model": base, "refiner_model": refiner, "pretrained_vae": vae}
    assert hub.fetch_models(settings(**sources, refiner_flow="ensemble")) == sources
    refused(lambda: hub.fetch_models(settings(pretrained_model=refiner)), "is a refiner model")
    refused(lambda: hub.fetch_models(settings(refiner_model=base)), "is a base model")
    for metadata in ({"modelspec.prediction_type": "v"}, {"ss_v_parameterization": "True"}):
        save_file(checkpoints["base"], base, metadata)
        refused(lambda: hub.fetch_models(settings(pretrained_model=base)), "is a v-prediction model")
    pickled = tmp_path / "model.ckpt"
    pickled.write_bytes(b"PK not a zip either")
    refused(lambda: hub.fetch_models(settings(pretrained_model=str(pickled))), "convert it first")


LORA = {f"unet.mid_block.attn2.to_k.lora_{matrix}.weight": torch.ones(*shape) for matrix, shape in (
    ("A", (4, 256)), ("B", (128, 4)),
)}  # fmt: skip


@pytest.mark.parametrize(
    ("added", "metadata", "part"),
    [
        ({}, {"modelspec.architecture": "flux-1-dev/lora"}, "it is for flux-1-dev/lora"),
        ({}, {"ss_base_model_version": "sd_v1"}, "it is for sd_v1"),
        ({"unet.mid_block.attn2.to_k.lora_A.weight": torch.ones(4, 768)}, {}, "for text encoders 768 wide, not 256"),
        ({"lora_unet_double_blocks_0_x.lora_up.weight": ONE}, {}, "for Flux"),
        ({"unet.x.hada_w1_a": ONE}, {}, "or not of a LoRA, such as unet.x.hada_w1_a"),
        ({"unet.x.lora_A.weight": torch.ones(0, 4)}, {}, "unet.x.lora_A.weight is empty"),
        (None, {}, "no weights for the UNet"),
    ],
)
def test_a_lora_for_another_model_is_refused_by_its_header(
    settings: Make, tmp_path: Path, added: Any, metadata: dict[str, str], part: str
) -> None:
    path = tmp_path / LORA_FILE
    save_file(LORA, path, {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"})
    hub.check_models(settings(), path)
    save_file({"text_encoder.x.lora_A.weight": ONE} if added is None else LORA | added, path, metadata)
    refused(lambda: hub.check_models(settings(), path), part)
    path.write_text("a pickle, say")
    refused(lambda: hub.check_models(settings(), path), "is damaged or incomplete")
