"""Models by name: on the Hub, in a folder, or in one file. Only what is needed of a model is downloaded, once.

Nothing here imports torch, so that a wrong name or a lost connection is reported before anything slow starts.
"""

import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
from huggingface_hub import errors

from lace_lora import machine
from lace_lora.config import Config
from lace_lora.errors import DISK_OR_DRIVE, UserError, first_line
from lace_lora.files import is_safetensors
from lace_lora.sdxl import model_kind

WITH_WEIGHTS = ("unet", "vae", "text_encoder", "text_encoder_2")
WITHOUT_WEIGHTS = ("tokenizer", "tokenizer_2", "scheduler")
# A checkpoint in one file has weights only; its config, vocabulary and noise schedule are those of these repositories.
BASE_LAYOUT, REFINER_LAYOUT = "stabilityai/stable-diffusion-xl-base-1.0", "stabilityai/stable-diffusion-xl-refiner-1.0"

CAPTION_MODEL = "Salesforce/blip-image-captioning-large"  # an example, for messages
_CAPTION_FILES = ("*.json", "*.txt", "*.model", "*.jinja")  # of a model of transformers: settings, vocabulary

_FULL_SIZE = 1e9  # bytes of its UNet, at least
# GB of what is used of them in fp16.
_SIZES = {BASE_LAYOUT: 6.9, REFINER_LAYOUT: 4.5}

# What a broken connection raises: huggingface_hub's network library, which differs by version, and Xet.
_CONNECTION_LOST: tuple[type[Exception], ...] = (
    next(kind for kind in errors.HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError"),
    getattr(errors, "XetDownloadError", RuntimeError),
    RuntimeError,
    OSError,
)


class Source(NamedTuple):
    """A model that is used, and what is used of it."""

    name: str  # as in the settings: on the Hub, a folder, or a file
    parts: Sequence[str]  # its subfolders
    variant: str | None
    revision: str | None = None


def fetch_models(config: Config, lora: Path | None = None) -> dict[str, Any]:
    """Check the models in `config`, then download what is missing of them; returns their local paths by setting.

    Everything that is used of the base, and the refiner's UNet and scheduler: its VAE and text encoder are the base's.

    Raises:
        UserError: a model does not exist, needs a login, or is not SDXL (exit 2); its download failed (exit 4).
    """
    places = _find_all(config, download=True)
    _check(config, places, lora, download=True)
    paths = {setting: _with_weights(source, places[setting]) for setting, source in _sources(config).items()}
    if (vae := paths.get("pretrained_vae")) and (vae / "vae" / "config.json").is_file():  # in a whole model
        paths["pretrained_vae"] = vae / "vae"
    return {setting: str(path) for setting, path in paths.items()}


def check_models(config: Config, lora: Path | None = None, download: bool = True) -> list[str]:
    """Check by their small files that the models are SDXL's, and that they and the LoRA fit one another.

    Args:
        download: whether to download small files that are missing; without them a model is not checked.

    Returns:
        The names of models of which something is still to be downloaded.

    Raises:
        UserError: see `fetch_models`.
    """
    return _check(config, _find_all(config, download), lora, download)


def find_caption_model(name: str, weights: bool, download: bool = True) -> Path | None:
    """The folder of a `caption_model`, from the Hub with its small files, or with its weights too.

    None if something of it is missing and is not to be downloaded.

    Raises:
        UserError: it does not exist, needs a login, or has no safetensors (exit 2); its download failed (exit 4).
    """
    is_local, place = Path(name).exists(), Path(name)
    if not is_local:
        _check_name(name)
        found = _download(name, None, [*_CAPTION_FILES, *(_weight_names(None) if weights else [])], download)
        if found is None:
            return None
        place = found
    if not weights or weight_files(place, None):
        return place
    if download or is_local:
        raise UserError(
            f"caption_model: {name} has no safetensors weights: choose another one, such as {CAPTION_MODEL}"
        )
    return None


def _find_all(config: Config, download: bool) -> dict[str, Path]:
    """`_find` for each model that is used, by setting, where it finds one."""
    found = {setting: _find(source, download) for setting, source in _sources(config).items()}
    return {setting: place for setting, place in found.items() if place}


def _check(config: Config, places: dict[str, Path], lora: Path | None, download: bool) -> list[str]:
    """`check_models` for models that are found already."""
    sources, found, missing = _sources(config), dict[str, model_kind.Model](), list[str]()
    for setting, source in sources.items():
        place = places.get(setting)
        if place and place.is_file():
            folder = layout(place, download)
            found[setting] = model_kind.read_file(place, folder)
            missing += [] if folder else [f"the settings and vocabulary of {place}"]
        elif place:
            found[setting] = model_kind.read_folder(place, source.name)
        if not Path(source.name).exists() and (place is None or _lacking(place, source)):
            size = _SIZES.get(source.name) if source.variant == "fp16" else None
            missing.append(f"{source.name} ({size} GB)" if size else source.name)
    try:
        model_kind.check(found, lora, own_vae=not config.pretrained_vae, ensemble=config.refiner_flow == "ensemble")
    except model_kind.MissingPartError as error:
        if download or Path(error.source).exists():
            raise
        missing.append(error.source)  # which is not completely in the cache
    for setting, place in places.items():
        if is_local := Path(sources[setting].name).is_dir():
            _require_weights(place, sources[setting])
        if is_local or (download and place.is_dir()):
            _require_vocabulary(place, sources[setting])
    return list(dict.fromkeys(missing))


def _sources(config: Config) -> dict[str, Source]:
    """The models that are used, by setting."""
    parts = [part for part in WITH_WEIGHTS if part != "vae" or not config.pretrained_vae]
    base = Source(config.pretrained_model, [*parts, *WITHOUT_WEIGHTS], config.variant, config.revision)
    sources = {"pretrained_model": base}
    if config.refine:
        sources["refiner_model"] = Source(config.refiner_model, ["unet", "scheduler"], config.variant)
    if config.pretrained_vae:
        sources["pretrained_vae"] = Source(config.pretrained_vae, ["vae"], config.variant)
    return sources


def _with_weights(source: Source, place: Path) -> Path:
    """The folder or file of a model, which `_find` found, with its weights.

    They are downloaded in the variant if it exists, otherwise the default ones; safetensors only.
    """
    if Path(source.name).exists():
        return place
    small, heavy = _small_files(source), _heavy(place, source)
    place = _download(source.name, source.revision, [*small, *_in(heavy, _weight_names(source.variant))]) or place
    plain = [part for part in heavy if not weight_files(place / part, source.variant)]
    if plain and source.variant:
        place = _download(source.name, source.revision, [*small, *_in(plain, _weight_names(None))]) or place
    _require_weights(place, source)
    return place


def _find(source: Source, download: bool) -> Path | None:
    """The file or folder of a model, from the Hub with its small files; None if it is not to be downloaded."""
    name, path = source.name, Path(source.name)
    if path.exists():
        return path
    _check_name(name)
    return _download(name, source.revision, _small_files(source), download)


def _check_name(name: str) -> None:
    """Raises UserError: it is the path of something that does not exist."""
    if is_safetensors(Path(name)) or name.startswith((".", "/")) or name.count("/") > 1:
        raise UserError(f"no model found at {name}: check the path")


def _small_files(source: Source) -> list[str]:
    vae_alone = ["config.json"] if source.parts == ["vae"] else []
    return [model_kind.INDEX, *_in(source.parts, ["*.json", "*.txt"]), *vae_alone]


def _heavy(folder: Path, source: Source) -> list[str]:
    """The subfolders that have weights."""
    return [vae_subfolder(folder) if part == "vae" else part for part in source.parts if part not in WITHOUT_WEIGHTS]


def _lacking(folder: Path, source: Source) -> list[str]:
    """The subfolders without the weights that they should have."""
    either = (source.variant, None)
    return [part for part in _heavy(folder, source) if not any(weight_files(folder / part, each) for each in either)]


def _require_weights(folder: Path, source: Source) -> None:
    """Raises UserError: weights are missing, damaged or quantised."""
    if lacking := _lacking(folder, source):
        where = lacking[0] or "it"
        raise UserError(
            f"{source.name} has no safetensors weights in {where}: choose an SDXL model in diffusers format"
        )
    for part in _heavy(folder, source):
        for file in weight_files(folder / part, source.variant) or weight_files(folder / part, None):
            model_kind.check_weights(file)


def _require_vocabulary(folder: Path, source: Source) -> None:
    """Raises UserError: a tokenizer has none."""
    for part in ("tokenizer", "tokenizer_2"):
        # transformers would go on with an empty vocabulary.
        names = {file.name for file in (folder / part).glob("*") if file.stat().st_size}
        if part in source.parts and not ("tokenizer.json" in names or {"vocab.json", "merges.txt"} <= names):
            raise UserError(
                f"{source.name} has no vocabulary in {part}: copy it from the model's page, or download again"
            )


def vae_subfolder(folder: Path) -> str:
    """Where the VAE is in a folder: in a subfolder, or, if it is that of a VAE alone, in the folder itself."""
    alone = not (folder / "vae" / "config.json").is_file() and (folder / "config.json").is_file()
    return "" if alone else "vae"


def is_full_size(source: str) -> bool:
    """Whether a base model is SDXL itself or as large, as all on the Hub are; unlike a tiny one for trials.

    Raises:
        UserError: there is none at this path.
    """
    path = Path(source)
    if not path.exists():
        _check_name(source)
        return True
    files = [path] if path.is_file() else (path / "unet").glob("*.safetensors")
    return sum(file.stat().st_size for file in files) > _FULL_SIZE


def require_gpu(config: Config, on_cpu: str) -> None:
    """Stop before SDXL is downloaded for a CPU, unless `device: cpu` asks for one; `on_cpu` says how long it takes.

    Raises:
        UserError: see `machine.require_gpu`.
    """
    if config.device == "auto" and is_full_size(config.pretrained_model):
        machine.require_gpu(on_cpu)


def layout(file: Path, download: bool = True) -> Path | None:
    """The folder with everything but the weights of a checkpoint in one file; None if it is not to be downloaded.

    Raises:
        UserError: it is not safetensors.
    """
    small = _in([*WITH_WEIGHTS, *WITHOUT_WEIGHTS], ["*.json", "*.txt"])
    repository = REFINER_LAYOUT if model_kind.is_refiner(file) else BASE_LAYOUT
    return _download(repository, None, [model_kind.INDEX, *small], download)


def weight_files(folder: Path, variant: str | None) -> list[Path]:
    """The weights in that variant, in one file or in shards; None means plain ones."""
    names = [name for name in _weight_names(variant) if name.endswith(".safetensors")]
    return next((found for name in names if (found := sorted(folder.glob(name)))), [])


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
    return [stem + end for stem in ("diffusion_pytorch_model", "model") for end in ends]


def _in(folders: Iterable[str], names: Sequence[str]) -> list[str]:
    return [f"{folder}/{name}" if folder else name for folder in folders for name in names]


def _download(source: str, revision: str | None, patterns: list[str], download: bool = True) -> Path | None:
    """`snapshot_download` with its failures as one-line errors. Without a connection it uses the cache.

    Without `download` too, and then it returns None for what is not there.
    """
    name = f"{source} (revision {revision})" if revision else source
    try:
        options: dict[str, Any] = {"allow_patterns": patterns, "local_files_only": not download}
        return Path(huggingface_hub.snapshot_download(source, revision=revision, **options))
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
        if not download and isinstance(error, errors.LocalEntryNotFoundError):
            return None
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
