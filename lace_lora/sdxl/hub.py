"""Models by name: on the Hub, in a folder, or in one file. Only what is needed of a model is downloaded, once.

Nothing here imports torch, so that a wrong name or a lost connection is reported before anything slow starts.
"""

import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import errors
from safetensors import SafetensorError, safe_open

from lace_lora.config import Config
from lace_lora.errors import DISK_OR_DRIVE, UserError, first_line

WITH_WEIGHTS = ("unet", "vae", "text_encoder", "text_encoder_2")
WITHOUT_WEIGHTS = ("tokenizer", "tokenizer_2", "scheduler")
# A checkpoint in one file has weights only; its config, vocabulary and noise schedule are those of these repositories.
BASE_LAYOUT, REFINER_LAYOUT = "stabilityai/stable-diffusion-xl-base-1.0", "stabilityai/stable-diffusion-xl-refiner-1.0"

# What a broken connection raises: huggingface_hub's network library, which differs by version, and Xet.
_CONNECTION_LOST: tuple[type[Exception], ...] = (
    next(kind for kind in errors.HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError"),
    getattr(errors, "XetDownloadError", RuntimeError),
    RuntimeError,
    OSError,
)


def fetch_models(config: Config) -> dict[str, Any]:
    """Download what is missing of the models in `config`; returns their local paths by setting.

    Everything that is used of the base, and the refiner's UNet: its VAE and text encoder are the base's.

    Raises:
        UserError: a model does not exist, needs a login, or is not SDXL (exit 2); its download failed (exit 4).
    """
    parts = [part for part in WITH_WEIGHTS if part != "vae" or not config.pretrained_vae]
    base = fetch(config.pretrained_model, [*parts, *WITHOUT_WEIGHTS], config.variant, config.revision)
    refiner = fetch(config.refiner_model, ["unet"], config.variant) if config.refine else config.refiner_model
    vae = fetch(config.pretrained_vae, [""], config.variant) if config.pretrained_vae else None
    return {"pretrained_model": str(base), "refiner_model": str(refiner), "pretrained_vae": str(vae) if vae else None}


def fetch(source: str, parts: Sequence[str], variant: str | None = None, revision: str | None = None) -> Path:
    """The folder or file of a model; `parts` are the subfolders that are needed, "" for the folder itself.

    Weights are downloaded in the variant if it exists, otherwise the default ones; safetensors only.
    """
    path = Path(source)
    if path.is_file():
        layout(path)
    if path.exists():
        return path
    if path.suffix == ".safetensors" or source.startswith((".", "/")) or source.count("/") > 1:
        raise UserError(f"no model found at {source}: check the path")
    small = ["model_index.json", *_in(parts, ["*.json", "*.txt"])]
    heavy = [part for part in parts if part not in WITHOUT_WEIGHTS]
    folder = _download(source, revision, [*small, *_in(heavy, _weight_names(variant))])
    plain = [part for part in heavy if not weight_files(folder / part, variant)]
    if plain and variant:
        folder = _download(source, revision, [*small, *_in(plain, _weight_names(None))])
    for part in heavy:
        if not (weight_files(folder / part, variant) or weight_files(folder / part, None)):
            where = part or "it"
            raise UserError(f"{source} has no safetensors weights in {where}: choose an SDXL model in diffusers format")
    return folder


def layout(file: Path) -> Path:
    """The folder with everything but the weights of a checkpoint in one file.

    Raises:
        UserError: it is not safetensors, or its noise schedule cannot be known.
    """
    try:
        with safe_open(file, framework="numpy") as content:
            names = list(content.keys())
    except (SafetensorError, OSError) as error:
        reason = f"{file} cannot be read as a safetensors file ({first_line(error)})"
        raise UserError(f"{reason}: use a .safetensors checkpoint of SDXL") from error
    if "v_pred" in names:
        advice = "convert it to a folder in diffusers format, whose scheduler config contains the prediction type"
        raise UserError(f"{file} is a v-prediction model, which is not supported as a single file: {advice}")
    # SDXL's base has two text encoders, its refiner the larger one alone.
    is_refiner = any(name.startswith("conditioner.embedders.0.model.") for name in names)
    small = _in([*WITH_WEIGHTS, *WITHOUT_WEIGHTS], ["*.json", "*.txt"])
    return _download(REFINER_LAYOUT if is_refiner else BASE_LAYOUT, None, ["model_index.json", *small])


def weight_files(folder: Path, variant: str | None) -> list[Path]:
    """The weights in that variant, in one file or in shards; None means plain ones."""
    names = [name for name in _weight_names(variant) if name.endswith(".safetensors")]
    return sorted(path for name in names for path in folder.glob(name))


def read_ahead(source: str, parts: Sequence[str], variant: str | None) -> None:
    """Read weights from a slow disk on a thread, while other work goes on.

    They go into the system's page cache, which shrinks when memory is needed for other things.
    """
    files = [Path(source)] if Path(source).is_file() else []
    for folder in (Path(source, part) for part in parts):
        files += weight_files(folder, variant) or weight_files(folder, None)

    def read() -> None:
        buffer = bytearray(2**24)
        with suppress(OSError):  # loading will report it
            for file in files:
                with open(file, "rb", buffering=0) as content:
                    while content.readinto(buffer):
                        pass

    threading.Thread(target=read, daemon=True).start()


def _weight_names(variant: str | None) -> list[str]:
    """The names that diffusers and transformers give to weights, as patterns."""
    dot = f".{variant}" if variant else ""
    numbers = "-[0-9][0-9][0-9][0-9][0-9]-of-[0-9][0-9][0-9][0-9][0-9]"
    ends = [f"{dot}.safetensors", f"{dot}{numbers}.safetensors", f"{numbers}{dot}.safetensors"]
    ends += [f".safetensors.index{dot}.json"]
    return [stem + end for stem in ("model", "diffusion_pytorch_model") for end in ends]


def _in(folders: Iterable[str], names: Sequence[str]) -> list[str]:
    return [f"{folder}/{name}" if folder else name for folder in folders for name in names]


def _download(source: str, revision: str | None, patterns: list[str]) -> Path:
    """`snapshot_download` with its failures as one-line errors. Without a connection it uses the cache."""
    name = f"{source} (revision {revision})" if revision else source
    try:
        return Path(huggingface_hub.snapshot_download(source, revision=revision, allow_patterns=patterns))
    except errors.GatedRepoError as error:
        how = "accept its terms on its page on the Hub, then log in with `hf auth login`, or set HF_TOKEN"
        raise UserError(f"{name} is a gated model: {how}") from error
    except errors.RepositoryNotFoundError as error:
        how = "check the name; if it is private, log in with `hf auth login`, or set HF_TOKEN"
        raise UserError(f"{name} is neither a model on the Hub nor a local folder: {how}") from error
    except (errors.RevisionNotFoundError, errors.HFValidationError) as error:
        how = f"({first_line(error)}): check the name and the revision"
        raise UserError(f"{name} is neither a model on the Hub nor a local folder {how}") from error
    except _CONNECTION_LOST as error:  # among them HfHubHTTPError and LocalEntryNotFoundError
        refused = {getattr(getattr(each, "response", None), "status_code", 0) for each in (error, error.__cause__)}
        if refused & {401, 403}:
            how = "it may have expired: log in again with `hf auth login`, or set HF_TOKEN"
            raise UserError(f"the Hub rejected your access token for {name}: {how}") from error
        if isinstance(error, errors.LocalEntryNotFoundError):
            how = "connect to the internet (and unset HF_HUB_OFFLINE), then run the same command again"
            what = f"{name} is not completely downloaded, and the Hub cannot be reached"
            raise UserError(f"{what}: {how}", DISK_OR_DRIVE) from error
        how = "check that the disk is not full, then run the same command again to download the rest"
        raise UserError(f"the download of {name} failed ({first_line(error)}): {how}", DISK_OR_DRIVE) from error
