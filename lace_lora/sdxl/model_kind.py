"""What a model is, by its configs or a file's header: SDXL's latent diffusion, or something that would be used wrongly.

Without torch, and before any weights are downloaded or loaded. Where a config has no value, diffusers' default counts.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from safetensors import SafetensorError, safe_open

from lace_lora.config import Config
from lace_lora.errors import UserError, first_line
from lace_lora.files import is_safetensors

ADVICE = "choose an SDXL model that predicts noise or velocity (epsilon or v_prediction)"
NOT_SAFETENSORS = "is not a .safetensors file: convert it first, because other formats can run code"
_NOT_QUANTISED = "use the same model in fp16, bf16 or fp32"
SCHEDULER, INDEX = "scheduler/scheduler_config.json", "model_index.json"
_SCHEDULERS = {
    "DDIMParallelScheduler", "DDIMScheduler", "DDPMParallelScheduler", "DDPMScheduler", "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler", "DPMSolverSDEScheduler", "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LCMScheduler", "LMSDiscreteScheduler",
    "PNDMScheduler", "SASolverScheduler", "TCDScheduler", "UniPCMultistepScheduler",
}  # fmt: skip
_SIGMAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
_BETAS = ("beta_schedule", "beta_start", "beta_end")
# What a model was trained on; the other options only choose how it is sampled.
_TRAINED = ("prediction_type", "num_train_timesteps", "rescale_betas_zero_snr", *_BETAS, "trained_betas")
# What a scheduler's config may say, first diffusers' default.
_SAMPLING: dict[str, Sequence[Any]] = {
    "prediction_type": ("epsilon", "v_prediction"),
    "num_train_timesteps": (1000,),
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "rescale_betas_zero_snr": (False, True),
    "timestep_spacing": ("linspace", "leading", "trailing"),
    "steps_offset": (0, 1),
    "interpolation_type": ("linear", "log_linear"),
    **dict.fromkeys(_SIGMAS, (False, True)),
    "timestep_type": ("discrete",),
    "use_flow_sigmas": (False,),
    "use_dynamic_shifting": (False,),
    "thresholding": (False,),
    "final_sigmas_type": ("zero", "sigma_min"),
    "solver_order": (1, 2, 3),
}
# What all UNets of SDXL's family have in their configs, whatever their sizes. The fast UNet takes it for granted too.
_UNET: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel", "in_channels": 4, "out_channels": 4, "conv_in_kernel": 3,
    "conv_out_kernel": 3, "center_input_sample": False, "flip_sin_to_cos": True, "freq_shift": 0, "act_fn": "silu",
    "norm_num_groups": 32, "norm_eps": 1e-5, "downsample_padding": 1, "mid_block_scale_factor": 1,
    "resnet_time_scale_shift": "default", "resnet_skip_time_act": False, "resnet_out_scale_factor": 1.0,
    "addition_embed_type": "text_time", "time_embedding_type": "positional", "time_embedding_act_fn": None,
    "timestep_post_act": None, "time_cond_proj_dim": None, "class_embed_type": None, "num_class_embeds": None,
    "class_embeddings_concat": False, "encoder_hid_dim": None, "encoder_hid_dim_type": None,
    "attention_type": "default", "dual_cross_attention": False, "only_cross_attention": False,
    "mid_block_only_cross_attention": None, "cross_attention_norm": None,
}  # fmt: skip
# What a UNet is that has something else there.
_OTHER_UNETS = {
    "in_channels": "which is for inpainting (9), instruct-pix2pix (8) or the like, not for text alone",
    "time_cond_proj_dim": "which is that of a latent consistency model (LCM)",
    "encoder_hid_dim": "which is for another text encoder, as in Kolors",
    "addition_embed_type": "which is that of SD 1.5 or 2, or of another model",
}
SCALING_FACTOR = 0.13025  # of SDXL's VAE
_TIME_IDS = {"base": 6, "refiner": 5}
_OTHER_ROLE = {  # what to do where the model is the other one
    "base": "set it as refiner_model, and an SDXL base model as pretrained_model",
    "refiner": "set refiner_model to SDXL's refiner, or refine: false",
}
_ENCODERS = {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"}

# Names in a single file that other kinds of files have, and what those are.
_OTHER_FILES = {
    r"lora_|\.lora\.|hada_w|lokr_w": "a LoRA, which belongs in lora_path",
    r"control_model\.|controlnet_": "a ControlNet",
    r"joint_blocks\.": "Stable Diffusion 3",
    r"double_blocks\.|single_blocks\.": "Flux or another model of its kind",
    r"adaln_single\.|cap_embedder\.|mlp_t5\.|clip_txt_mapper\.|^text_encoders\.": "another model than SDXL",
    r"^cond_stage_model\.": "Stable Diffusion 1.5 or 2",
    r"^edm_mean$|^edm_std$": "an EDM model, such as Playground v2.5",
    r"^edm_vpred\.": "an EDM model, such as CosXL",
}
_LORA_DOWN = re.compile(r"lora[._](A|down|linear_layer\.down)\b")  # in the name of a LoRA's first matrix
# What the metadata of a LoRA for another model call that.
_OTHER_BASE = re.compile(r"stable-diffusion-v\d|sd_?v?[123]|flux|chroma|lumina|hunyuan|wan|qwen|pixart|auraflow", re.I)
_DTYPES = {"F16", "BF16", "F32", "F64", "I32", "I64"}  # the last two for positions
# By config key: the weight that tells it, and which of its dimensions.
_SHAPES = {
    "unet": {
        "in_channels": (r"model\.diffusion_model\.input_blocks\.0\.0\.weight", 1),
        "out_channels": (r"model\.diffusion_model\.out\.2\.weight", 0),
        "cross_attention_dim": (r"model\.diffusion_model\..*\.attn2\.to_k\.weight", 1),
        "projection_class_embeddings_input_dim": (r"model\.diffusion_model\.label_emb\.0\.0\.weight", 1),
    },
    "vae": {"latent_channels": (r"(first_stage_model\.)?decoder\.conv_in\.weight", 1)},
    "text_encoder": {
        "hidden_size": (r"conditioner\.embedders\.0\.transformer\..*\.token_embedding\.weight", 1),
    },
    "text_encoder_2": {
        "hidden_size": (r"conditioner\.embedders\.[01]\.model\.token_embedding\.weight", 1),
        "projection_dim": (r"conditioner\.embedders\.[01]\.model\.text_projection", 1),
    },
}


class Model(NamedTuple):
    """A model's configs by part: `unet`, `vae`, `scheduler` …, and "" for its pipeline's."""

    source: str  # for messages
    configs: dict[str, dict[str, Any]]


def read_folder(folder: Path, source: str) -> Model:
    """The configs in a folder in diffusers format; in that of a VAE alone, its own.

    Raises:
        UserError: one is not valid JSON.
    """
    paths = {part: folder / part / "config.json" for part in ("unet", "vae", *_ENCODERS)}
    paths |= {"": folder / INDEX, "scheduler": folder / SCHEDULER}
    if not paths["vae"].is_file():
        paths["vae"] = folder / "config.json"
    return Model(source, {part: _read_json(path) for part, path in paths.items() if path.is_file()})


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        if isinstance(content, dict):
            return content
        reason = "it is not an object"
    except (OSError, ValueError, RecursionError) as error:
        reason = first_line(error)
    raise UserError(f"{path} is not a valid config file ({reason}): download the model again")


def read_header(file: Path) -> tuple[dict[str, tuple[list[int], str]], dict[str, str]]:
    """A safetensors file's tensors, by name their shape and dtype, and its metadata.

    Raises:
        UserError: it is not a safetensors file.
    """
    try:
        with safe_open(file, framework="numpy") as content:
            slices = {name: content.get_slice(name) for name in list(content.keys())}
            tensors = {name: (part.get_shape(), part.get_dtype()) for name, part in slices.items()}
            return tensors, content.metadata() or {}
    except (SafetensorError, OSError) as error:
        if not is_safetensors(file):
            raise UserError(f"{file} {NOT_SAFETENSORS}") from error
        reason = f"{file} is damaged or incomplete ({first_line(error)})"
        raise UserError(f"{reason}: download it again, or with `git lfs pull`") from error


def check_weights(file: Path) -> None:
    """Raises UserError: a file of weights is damaged, or quantised, which would be read as plain numbers."""
    _check_dtypes(Model(str(file), {}), read_header(file)[0])


def is_refiner(file: Path) -> bool:
    """Whether a single file is SDXL's refiner, whose text encoder is the larger one alone."""
    return any(name.startswith("conditioner.embedders.0.model.") for name in read_header(file)[0])


def read_file(file: Path, layout: Path | None) -> Model:
    """The configs of a checkpoint in one file: what its header tells, and the rest from `layout`, if that is there.

    Raises:
        UserError: it is not SDXL, has quantised weights, or predicts velocity.
    """
    tensors, metadata = read_header(file)
    _check_names(Model(str(file), {}), tensors, metadata)
    # What a file does not say is SDXL's.
    configs: dict[str, dict[str, Any]] = {"unet": {"addition_time_embed_dim": 256}}
    configs |= read_folder(layout, str(file)).configs if layout else {}
    for part, shapes in _SHAPES.items():
        found: dict[str, Any] = {}
        for key, (pattern, dimension) in shapes.items():
            shape = next((shape for name, (shape, _) in tensors.items() if re.fullmatch(pattern, name)), [])
            if len(shape) > dimension:
                found[key] = shape[dimension]
        if not found:  # the part is not in the file
            configs.pop(part, None)
        elif part == "unet":
            has_label = "projection_class_embeddings_input_dim" in found
            configs[part] |= found | {"addition_embed_type": "text_time" if has_label else None}
        else:
            configs[part] = found | ({"scaling_factor": SCALING_FACTOR} if part == "vae" else {})
    return Model(str(file), configs)


def _check_names(model: Model, tensors: dict[str, tuple[list[int], str]], metadata: dict[str, str]) -> None:
    """Refuse the files that say of themselves that they are something else."""
    for pattern, kind in _OTHER_FILES.items():
        if any(re.search(pattern, name) for name in tensors):
            _refuse(model, f"is {kind}")
    _check_dtypes(model, tensors)
    predicts = metadata.get("modelspec.prediction_type", "epsilon").lower()
    in_kohyas_words = metadata.get("ss_v_parameterization", "").lower() == "true"
    if {"v_pred", "ztsnr"} & tensors.keys() or predicts.startswith("v") or in_kohyas_words:
        advice = "convert it to a folder in diffusers format, whose scheduler config contains the prediction type"
        _refuse(model, "is a v-prediction model, which is not supported as a single file", advice)
    if not predicts.startswith("eps"):
        _refuse(model, f"predicts {predicts}, according to its metadata")


def _check_dtypes(model: Model, tensors: dict[str, tuple[list[int], str]]) -> None:
    if odd := next((dtype for _, dtype in tensors.values() if dtype not in _DTYPES), None):
        _refuse(model, f"has quantised weights ({odd})", _NOT_QUANTISED)


class MissingPartError(UserError):
    """A model lacks the config of a part."""

    def __init__(self, source: str, message: str) -> None:
        super().__init__(f"{source} {message}")
        self.source = source


def check(models: dict[str, Model], lora: Path | None, own_vae: bool, ensemble: bool) -> None:
    """Refuse models, by setting, that are not SDXL's or do not fit one another, and a LoRA that does not fit them.

    Args:
        own_vae: whether the base's is used.
        ensemble: whether base and refiner share one run through the noise levels.

    Raises:
        UserError: one line that says what a model is, and what to use.
    """
    base, refiner, vae = (models.get(setting) for setting in ("pretrained_model", "refiner_model", "pretrained_vae"))
    if base:
        check_base(base)
        if own_vae:
            check_vae(base, base)
    if vae:
        check_vae(vae, base)
    if refiner:
        check_refiner(refiner, base, ensemble)
    if lora:
        check_lora(lora, base)


def check_base(base: Model) -> None:
    """Refuse a base model that is not SDXL's, but for its VAE."""
    _check_pipeline(base)
    if base.configs.get("", {}).get("requires_aesthetics_score"):
        _refuse(base, "is a refiner model", _OTHER_ROLE["base"])
    _check_unet(base)
    if "text_encoder_2" in base.configs:  # first, to tell a refiner
        _check_time_ids(base, base, "base")
    for name in _ENCODERS:
        _check_text_encoder(base, name)
    widths = [_whole(base, name, "hidden_size") for name in _ENCODERS]
    if sum(widths) != (width := _whole(base, "unet", "cross_attention_dim")):
        both = " and ".join(map(str, widths))
        _refuse(base, f"mixes parts of different models: text encoders {both} wide, and a UNet for {width}")
    _check_scheduler(base)
    if "layers_per_block" in base.configs["unet"]:
        _whole(base, "unet", "layers_per_block")  # kohya's names of layers are counted with it


def check_refiner(refiner: Model, base: Model | None, ensemble: bool) -> None:
    """Refuse a refiner that is not SDXL's, or does not fit the base, if that is known: it uses its text encoder."""
    _check_pipeline(refiner)
    _check_unet(refiner)
    encoders = base or refiner
    if "text_encoder_2" in encoders.configs:
        _check_time_ids(refiner, encoders, "refiner")
        read, given = _whole(refiner, "unet", "cross_attention_dim"), _whole(encoders, "text_encoder_2", "hidden_size")
        if read != given:
            what = f"has a UNet for a text encoder {read} wide, but that of {encoders.source} is {given} wide"
            _refuse(refiner, what, "use a refiner made for this base model, or set refine: false")
    _check_scheduler(refiner)
    if ensemble and base and {"scheduler"} <= base.configs.keys() & refiner.configs.keys():
        default = {key: allowed[0] for key, allowed in _SAMPLING.items()}
        own, other = (default | model.configs["scheduler"] for model in (refiner, base))
        for key in _TRAINED:
            if own.get(key) != other.get(key):
                what = f"has another noise schedule than {base.source} ({key}: {own.get(key)}, not {other.get(key)})"
                _refuse(refiner, what, "the ensemble flow needs equal ones, so set refiner_flow: img2img")


def check_vae(model: Model, base: Model | None) -> None:
    """Refuse a VAE that is not SDXL's, or not for the latents of the base, if that is known."""
    advice = "use SDXL's VAE, or one made for SDXL such as madebyollin/sdxl-vae-fp16-fix"
    if "vae" not in model.configs:
        raise MissingPartError(model.source, "has no VAE: set pretrained_vae to one for SDXL, or choose another model")
    vae = _part(model, "vae")
    if (kind := vae.get("_class_name", "AutoencoderKL")) != "AutoencoderKL":
        _refuse(model, f"has a VAE of another kind ({kind})", advice)
    if (channels := vae.get("latent_channels", 4)) != 4:
        _refuse(model, f"has a VAE with {channels} latent channels, and SDXL's has 4", advice)
    for key in ("latents_mean", "latents_std", "shift_factor"):
        if vae.get(key):
            _refuse(model, f"has a VAE with {key}, as Playground v2.5 and others have, which SDXL's has not", advice)
    scale = vae.get("scaling_factor", 0.18215)
    if not _is_number(scale) or scale <= 0:
        _refuse(model, f"has a VAE with scaling_factor {scale!r}", advice)
    wanted = base.configs.get("vae", {}).get("scaling_factor", SCALING_FACTOR) if base else scale
    if scale != wanted:
        _refuse(model, f"has a VAE for other latents: scaling_factor {scale}, not {wanted}", advice)


def check_lora(path: Path, base: Model | None) -> None:
    """Refuse a file that is not a LoRA for SDXL, or, if the base is known, not for that, by its header."""
    tensors, metadata = read_header(path)

    def refuse(reason: str) -> NoReturn:
        raise UserError(f"{path} is not a LoRA for this model ({reason}): choose another LoRA or model")

    for key in ("modelspec.architecture", "ss_base_model_version"):
        if _OTHER_BASE.match(metadata.get(key, "")):
            refuse(f"it is for {metadata[key]}, according to its metadata")
    if not any(name.startswith(("unet.", "lora_unet_")) for name in tensors):
        refuse("it has no weights for the UNet")
    widths = {base.configs["unet"]["cross_attention_dim"]} if base else set()
    for name, (shape, _) in tensors.items():
        if re.search(r"(double|single|joint)_blocks", name):
            refuse("it is for Flux or another model than SDXL")
        if not re.search(r"\.alpha$|lora[._](A|B|up|down|linear_layer|magnitude_vector)\b", name):
            refuse(f"it contains weights of another model, or not of a LoRA, such as {name}")
        if 0 in shape:
            refuse(f"{name} is empty")
        is_down = re.search(r"attn2[._](processor\.)?to_[kv]", name) and _LORA_DOWN.search(name)
        if widths and is_down and shape[-1:] and shape[-1] not in widths:
            refuse(f"{name} is for text encoders {shape[-1]} wide, not {widths.pop()}")


def check_init_lora(path: Path, config: Config) -> None:
    """Refuse a LoRA, by its header, that a training with these settings cannot begin with."""
    check_lora(path, None)
    tensors, _ = read_header(path)
    ranks = {shape[0] for name, (shape, _) in tensors.items() if shape and _LORA_DOWN.search(name)}
    if len(ranks) > 1:
        raise UserError(f"init_lora: {path} has layers of several ranks: choose another LoRA")
    if ranks != {config.rank}:
        raise UserError(f"init_lora: {path} has rank {max(ranks)}, and rank is {config.rank}: set rank: {max(ranks)}")
    in_text_encoders = [name for name in tensors if name.startswith(("text_encoder", "lora_te"))]
    if in_text_encoders and not config.train_text_encoder:
        raise UserError(f"init_lora: {path} adapts text encoders too: set train_text_encoder: true")
    others = [name for name in tensors.keys() - {*in_text_encoders} if not re.search(r"attn[12][._]", name)]
    if unknown := [name for name in others if not re.search(r"[._]ff[._]net[._]", name)]:
        what = f"adapts layers that do not train here, such as {min(unknown)}"
        raise UserError(f"init_lora: {path} {what}: choose another LoRA")
    if others and config.lora_targets == "attention":
        raise UserError(f"init_lora: {path} adapts feed-forward layers too: set lora_targets: attention+feedforward")


def _refuse(model: Model, what: str, advice: str = ADVICE) -> NoReturn:
    raise UserError(f"{model.source} {' '.join(what.split())[:300]}: {advice}")  # `what` may quote the file


def _part(model: Model, name: str) -> dict[str, Any]:
    if name not in model.configs:
        file = SCHEDULER if name == "scheduler" else f"{name}/config.json"
        what = f"has no weights of the {name}" if Path(model.source).is_file() else f"has no {file}"
        advice = "choose a whole SDXL model: a folder in diffusers format or a .safetensors checkpoint"
        raise MissingPartError(model.source, f"{what}: {advice}")
    if "quantization_config" in model.configs[name]:
        _refuse(model, f"has quantised weights of the {name}", _NOT_QUANTISED)
    return model.configs[name]


def _check_pipeline(model: Model) -> None:
    name = model.configs.get("", {}).get("_class_name", "StableDiffusionXLPipeline")
    if "StableDiffusionXL" not in str(name):
        _refuse(model, f"is a model for {name}, not SDXL")


def _check_unet(model: Model) -> None:
    unet = _part(model, "unet")
    for key, wanted in _UNET.items():
        value = unet.get(key, None if key == "addition_embed_type" else wanted)
        if not (_is_number(value) and value == wanted or _is_one_of(value, [wanted])):
            kind = _OTHER_UNETS.get(key, f"and SDXL's has {wanted!r}")
            _refuse(model, f"has a UNet with {key} {value!r}, {kind}")
    for key in ("attention_head_dim", "num_attention_heads"):  # of each level, or one for all; both are the heads
        given: Any = unet.get(key)
        if any(_is_number(heads) and heads <= 0 for heads in (given if isinstance(given, list) else [given])):
            _refuse(model, f"has a UNet with {key} {given!r}")


def _check_time_ids(model: Model, encoders: Model, role: str) -> None:
    """Beside the pooled embedding, the base's UNet reads six time ids and the refiner's five."""
    key = "projection_class_embeddings_input_dim"
    width, each = _whole(model, "unet", key), _whole(model, "unet", "addition_time_embed_dim")
    pooled = _whole(encoders, "text_encoder_2", "projection_dim")
    kind = next((kind for kind, count in _TIME_IDS.items() if width == pooled + count * each), None)
    if kind is None:
        parts = f"{key} {width}, not {pooled} + {_TIME_IDS[role]} * {each}"
        _refuse(model, f"has a UNet that does not fit the second text encoder ({parts})")
    if kind != role:
        _refuse(model, f"is a {kind} model", _OTHER_ROLE[role])


def _check_text_encoder(model: Model, name: str) -> None:
    config = _part(model, name)
    kind, classes = config.get("model_type", "clip_text_model"), config.get("architectures") or _ENCODERS[name]
    if kind != "clip_text_model" or name == "text_encoder_2" and _ENCODERS[name] not in str(classes):
        _refuse(model, f"has a {name} of another kind ({kind}, {classes}), and SDXL's is {_ENCODERS[name]}")


def _check_scheduler(model: Model) -> None:
    if "scheduler" not in model.configs and Path(model.source).is_file():
        return  # that of its layout, which is not downloaded yet
    config = _part(model, "scheduler")
    if (name := str(config.get("_class_name"))) not in _SCHEDULERS:
        _refuse(model, f"has the scheduler {name}, whose noise is not SDXL's")
    trained = config.get("trained_betas")
    if trained is None and (missing := [key for key in _BETAS if key not in config]):
        _refuse(model, f"has no noise schedule ({missing[0]}) in {SCHEDULER}")
    for key, allowed in _SAMPLING.items():
        if key in config and not _is_one_of(config[key], allowed):
            _refuse(model, f"has {key} {config[key]!r} in {SCHEDULER}")
    betas = [config["beta_start"], config["beta_end"]] if trained is None else trained
    if not isinstance(betas, list) or not all(_is_number(beta) and 0 < beta < 1 for beta in betas):
        _refuse(model, f"has betas that are not between 0 and 1 in {SCHEDULER}")
    if trained is not None and len(trained) != 1000:
        _refuse(model, f"has {len(trained)} trained_betas in {SCHEDULER}, not 1000")
    if config.get("rescale_betas_zero_snr") and config.get("prediction_type") != "v_prediction":
        _refuse(model, f"has rescale_betas_zero_snr without v_prediction in {SCHEDULER}")
    if len(chosen := [key for key in _SIGMAS if config.get(key)]) > 1:
        _refuse(model, f"has both {chosen[0]} and {chosen[1]} in {SCHEDULER}")


def _whole(model: Model, part: str, key: str) -> int:
    value = _part(model, part).get(key)
    if type(value) is not int or value <= 0:
        _refuse(model, f"has {key} {value!r} in the config of {part}, which is not SDXL's")
    return value


def _is_one_of(value: Any, allowed: Sequence[Any]) -> bool:
    return any(type(value) is type(one) and value == one for one in allowed)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < float("inf")
