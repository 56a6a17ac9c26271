"""Any content of a settings file, picture or checkpoint gives a result or a one-line error, never a traceback."""

import io
import json
import os
import re
import shutil
import struct
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops, ImageStat

import data_utils
from helpers import ROOT, UPRIGHT, as_file, exif_of, gradient, names, refused, tiff
from lace_lora import files
from lace_lora.config import Config, dump_config, load_config
from lace_lora.errors import UserError
from lace_lora.pictures import checking, image_files
from lace_lora.process import launch_environment
from lace_lora.sdxl import hub, models, sampling
from lace_lora.training import checkpoint
from sdxl_helpers import CPU, run_unet

# `make torture` asks for many more.
EXAMPLES = int(os.environ.get("EXAMPLES", "60"))
often = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
KEYS = list(Config.__dataclass_fields__)
PICTURES = [
    as_file(gradient(), "JPEG").getvalue(),
    as_file(gradient(90, 70), "JPEG", progressive=True).getvalue(),
    as_file(gradient().convert("CMYK"), "JPEG").getvalue(),
    as_file(gradient(), "PNG").getvalue(),
    as_file(gradient(), "TIFF").getvalue(),
    as_file(gradient(), "WEBP").getvalue(),
]


def refusal(path: Path, text: str | bytes, *overrides: str) -> str:
    """The error about a settings file; empty when it is accepted."""
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    try:
        load_config(path, overrides)
    except UserError as error:
        return f"{error}" if error.exit_code == 2 else f"wrong exit code {error.exit_code}"
    return ""


@pytest.mark.parametrize("key", KEYS)
def test_keys_may_be_omitted_but_not_misspelt_or_of_another_type(key: str, tmp_path: Path) -> None:
    plain = yaml.safe_load(dump_config(Config()))
    rest = {name: value for name, value in plain.items() if name != key}
    path = tmp_path / "c.yaml"
    assert refusal(path, yaml.safe_dump(rest)) == ""
    assert load_config(path) == Config()
    line = len(yaml.safe_dump(rest).splitlines()) + 1
    for wrong in (key[:-1], key + "s", key[1:] + key[0], key.upper()):
        error = refusal(path, yaml.safe_dump(rest) + f"{wrong}: 1\n")
        assert error.startswith(f"{path}:{line}: unknown key {wrong!r}")
        near = error.partition("; did you mean ")[2].rstrip("?")
        assert near in KEYS or wrong in (key.upper(), key[1:] + key[0])
    for value in ("{a: 1}", "[[1]]", "!!python/object:os.system x", "!mine x"):
        error = refusal(path, yaml.safe_dump(rest) + f"{key}: {value}\n")
        assert error.count("\n") == 0, error
        assert error.startswith(f"{path}:{line}: "), error


@often
@given(key=st.sampled_from(KEYS), text=st.text(max_size=30))
def test_any_value_on_the_command_line(key: str, text: str, tmp_path: Path) -> None:
    error = refusal(tmp_path / "c.yaml", "", f"{key}={text}")
    assert not error or error.startswith(("command line: ", f"{tmp_path / 'c.yaml'}: ")), error


@often
@given(content=st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_a_settings_file_of_arbitrary_bytes(content: bytes, tmp_path: Path) -> None:
    error = refusal(tmp_path / "c.yaml", content)
    assert not error or all(line.startswith(str(tmp_path / "c.yaml")) for line in error.split("\n") if line), error


@pytest.mark.parametrize(
    "content",
    [
        b"\x89PNG\r\n\x1a\n\0\0\0", b"PK\x03\x04", b"- a\n- b\n", b"just words", b"rank:\t4\n\trank: 4\n", b"a: [",
        b"a: &a [x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b]\nprompt: [*c,*c,*c,*c]\n",
        b"rank: &r 4\n<<: {seed: 1}\n", b"? [a]\n: 1\n", b"!!python/object/apply:os.system [ls]\n", b"\xff\xfer\0a\0",
        b"{" * 3000, b"rank: 4\nrank: 8\n",
    ],
)  # fmt: skip
def test_files_that_are_not_settings(content: bytes, tmp_path: Path) -> None:
    error = refusal(tmp_path / "c.yaml", content)
    assert error
    assert len(error) < 700
    assert error.count("\n") <= content.count(b"\n")


def test_a_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    assert refusal(tmp_path / "c.yaml", b"\xef\xbb\xbfrank: 4\r\n") == ""


@often
@given(
    which=st.sampled_from(PICTURES), place=st.floats(0, 1), junk=st.binary(min_size=1, max_size=40), cut=st.booleans()
)
def test_any_damage_to_a_picture(which: bytes, place: float, junk: bytes, cut: bool, tmp_path: Path) -> None:
    at = int(place * len(which))
    content = which[:at] + junk + (b"" if cut else which[at + len(junk) :])
    (tmp_path / "a.jpg").write_bytes(content)
    found = checking._check(tmp_path / "a.jpg", 8, ("JPEG", "PNG", "TIFF", "WEBP", "BMP"))
    assert found.used == bool(found.sha256 and found.width)
    if found.used:
        assert min(found.width, found.height) >= 8
        picture, size = image_files.open_picture(io.BytesIO(content), formats=("JPEG", "PNG", "TIFF", "WEBP", "BMP"))
        assert picture.mode == "RGB"
        assert size == (found.width, found.height)


@often
@given(content=st.binary(max_size=300))
def test_any_bytes_named_as_a_picture(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(content)
    found = checking._check(tmp_path / "a.jpg", 8, ("JPEG",))
    assert found.reason.startswith("unreadable: ")


@often
@given(
    width=st.integers(8, 90), height=st.integers(8, 90), orientation=st.integers(0, 9),
    mode=st.sampled_from(["RGB", "L", "CMYK"]),
)  # fmt: skip
def test_any_good_jpeg_is_opened_at_its_size(width: int, height: int, orientation: int, mode: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = as_file(gradient(width, height).convert(mode), "JPEG", exif=exif)
    picture, size = image_files.open_picture(content)
    assert picture.size == size == ((height, width) if orientation in (5, 6, 7, 8) else (width, height))


@often
@given(name=st.text(min_size=1, max_size=20), caption=st.text(max_size=40))
def test_any_name_and_caption_survives_a_round_trip(
    name: str, caption: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    assume("/" not in name and "\0" not in name and name not in (".", "..") and caption.strip())
    folder = tmp_path_factory.mktemp("photos")
    path = folder / f"{name}.jpg"
    try:
        path.write_bytes(b"x")
    except (OSError, UnicodeEncodeError):
        assume(False)
    if any(letter == "\ufeff" or (is_control(letter) and letter not in "\v\f\x1c\x1d\x1e\x85") for letter in name):
        refused(lambda: data_utils.plan_annotations(folder, caption, [path], folder), "rename the file")
        assert names(folder) == {path.name}
        return
    plan = data_utils.plan_annotations(folder, caption, [path], folder)
    assert not any(map(is_control, plan.captions[path]))
    if not any(is_control(letter) or letter == "\ufeff" for letter in caption):
        assert plan.captions == {path: " ".join(caption.split())}
    if plan.captions[path]:
        assert data_utils.read_annotations(data_utils.write_annotations(plan)) == plan.captions


def is_control(letter: str) -> bool:
    return unicodedata.category(letter) == "Cc"


PLAIN_TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\ufeff"), max_size=60)


@often
@given(
    lines=st.lists(PLAIN_TEXT, max_size=4), end=st.sampled_from(["\n", "\r\n", "\r"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"]),
)  # fmt: skip
def test_any_text_is_read_back(lines: list[str], end: str, encoding: str, tmp_path: Path) -> None:
    mark = "\ufeff" if encoding in ("utf-16-le", "utf-16-be") else ""
    (tmp_path / "a.txt").write_bytes((mark + end.join(lines)).encode(encoding))
    assert files.read_text(tmp_path / "a.txt") == "\n".join(lines)


@often
@given(
    content=st.binary(max_size=80) | PLAIN_TEXT.map(lambda text: text.encode("utf-16"))
    | st.text(max_size=80).map(lambda text: text.encode("utf-8", "surrogatepass"))
)  # fmt: skip
def test_any_bytes_are_a_caption_or_a_refusal(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"x")
    (tmp_path / "a.txt").write_bytes(content)

    def plan() -> data_utils.Annotations:
        return data_utils.plan_annotations(tmp_path, "lace", [tmp_path / "a.jpg"], tmp_path)

    try:
        caption = plan().captions[tmp_path / "a.jpg"]
    except UserError:
        caption = refused(plan, "a.txt: captions cannot be read")
    assert caption
    assert not any(map(is_control, caption))


FIELDS = st.tuples(st.integers(0, 65535), st.integers(0, 16), st.integers(0, 12), st.binary(min_size=4, max_size=4))


@often
@pytest.mark.filterwarnings("ignore")
@given(
    kind=st.sampled_from(["JPEG", "PNG", "WEBP", "TIFF"]), orientation=st.integers(1, 8), order=st.sampled_from("<>"),
    before=st.lists(FIELDS, max_size=3), after=st.lists(FIELDS, max_size=3), rest=st.binary(max_size=60),
)  # fmt: skip
def test_any_exif_beside_an_orientation(
    kind: str, orientation: int, order: str, before: list[Any], after: list[Any], rest: bytes, tmp_path: Path
) -> None:
    """A picture is turned as it says, or refused; never used as it lies."""
    others = [field for field in [*before, *after] if field[0] != 274]
    own = (274, 3, 1, struct.pack(order + "H", orientation).ljust(4, b"\0"))
    fields = [*others[: len(before)], own, *others[len(before) :]]
    if kind == "TIFF":  # most fields are the picture's, and these are not
        free = [269, 270, 271, 272, 305, 306, 315, 700, 33723, 34377, 34665, 34853, 40965]
        extra = {free[tag % len(free)]: ("B", list(value)) for tag, _, _, value in others}
        rgb = {258: ("H", [8, 8, 8]), 262: ("H", [2]), 277: ("H", [3]), 274: ("H", [orientation])}
        content = tiff(gradient().tobytes(), 64, 48, order, {**extra, **rgb})
    else:
        exif = exif_of(fields, order, rest)
        content = as_file(gradient(), kind, exif=b"Exif\0\0" + exif, quality=98).getvalue()
    (tmp_path / "a").write_bytes(content)
    found = checking._check(tmp_path / "a", 8, ("JPEG", "PNG", "TIFF", "WEBP"))
    if found.used:
        picture, size = image_files.open_picture(io.BytesIO(content), formats=("JPEG", "PNG", "TIFF", "WEBP"))
        upright = gradient()
        for turn in UPRIGHT[orientation]:
            upright = upright.transpose(turn)
        assert picture.size == size == (found.width, found.height) == upright.size
        assert max(ImageStat.Stat(ImageChops.difference(picture, upright)).mean) < 3
    else:
        assert kind == "TIFF"


@often
@given(
    file=st.sampled_from(["weights.bin", "state.json", "manifest.json"]), place=st.floats(0, 1),
    new=st.binary(max_size=9), longer=st.booleans(),
)  # fmt: skip
def test_any_damage_to_a_checkpoint_is_found(
    file: str, place: float, new: bytes, longer: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    contents: dict[str, Any] = {"weights.bin": bytes(range(256)), "state.json": b'{"step": 4}'}

    def write(folder: Path) -> None:
        for name, content in contents.items():
            (folder / name).write_bytes(content)

    folder = checkpoint.publish(tmp_path_factory.mktemp("lora"), 4, write, keep=2)
    path = folder / file
    before = path.read_bytes()
    at = int(place * len(before))
    path.write_bytes(before[:at] + new + before[at + (0 if longer else len(new)) :])
    if path.read_bytes() == before:
        assert checkpoint.verify(folder) == ""
    elif file != "manifest.json":
        assert file in checkpoint.verify(folder)
    elif checkpoint.verify(folder) == "":  # white space, or another step: what it tells about the files is still true
        assert {name: (folder / name).read_bytes() for name in contents} == contents


SCHEDULER, UNET = "scheduler/scheduler_config.json", "unet/config.json"
ANOTHER = [
    "FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler", "DDIMScheduler", "v_prediction", "sample", "trailing",
    "flow_prediction", "linspace", "linear", "squaredcos_cap_v2", "sigmoid", "laplace", "continuous", "log_linear",
    "sigma_min", "scale_shift", "gelu", 0, 1, 2, 9, 32, 999, 1000, 0.012, 1e-9, 1.0,
]  # fmt: skip
JSON = st.recursive(
    st.sampled_from([*ANOTHER, None, True, False]) | st.integers() | st.floats() | st.text(max_size=5),
    lambda one: st.lists(one, max_size=4) | st.dictionaries(st.text(max_size=3), one, max_size=2),
    max_leaves=5,
)
MORE = {
    SCHEDULER: ["use_flow_sigmas", "use_lu_lambdas", "thresholding", "solver_order", "solver_type", "clip_sample"],
    UNET: ["quantization_config"],
}
KEYS_OF = {file: [*json.loads((ROOT / "demo/model/base" / file).read_text()), *more] for file, more in MORE.items()}


@contextmanager
def with_config(model: Path, file: str, changes: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A copy of the demo's base whose config has some changes; ... removes a value."""
    original = (ROOT / "demo/model/base" / file).read_text()
    content = {key: value for key, value in (json.loads(original) | changes).items() if value is not ...}
    (model / file).write_text(json.dumps(content))
    try:
        yield content
    finally:
        (model / file).write_text(original)


def unless_refused(make: Callable[[], Any]) -> Any:
    """What it makes; None if it is refused in one line."""
    try:
        return make()
    except UserError as error:
        line = f"{error.exit_code}: {error}"
    assert re.fullmatch("2: .+", line)
    return None


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(ROOT / "demo/model/base", tmp_path_factory.mktemp("model") / "base"))


@often
@given(
    changes=st.dictionaries(st.sampled_from(KEYS_OF[SCHEDULER]), JSON | st.just(...), min_size=1, max_size=2),
    name=st.sampled_from(get_args(Config.__annotations__["scheduler"])),
)
def test_any_scheduler_config_is_refused_or_used_as_it_is(changes: dict[str, Any], name: str, model: Path) -> None:
    config = Config(pretrained_model=str(model), refine=False)

    def make() -> Any:
        hub.fetch_models(config)
        return sampling.make_scheduler(name, models.load_noise_scheduler(config).config)

    with with_config(model, SCHEDULER, changes) as content:
        scheduler = unless_refused(make)
    if scheduler:
        for key in ("prediction_type", "beta_schedule", "beta_start", "beta_end", "trained_betas", "timestep_spacing"):
            assert key not in content or scheduler.config[key] == content[key]
        scheduler.set_timesteps(3)
        for timestep in scheduler.timesteps:
            scheduler.scale_model_input(torch.ones(1, 4, 2, 2), timestep)
            scheduler.step(torch.ones(1, 4, 2, 2), timestep, torch.ones(1, 4, 2, 2))


@settings(often, max_examples=EXAMPLES // 2)
@given(changes=st.dictionaries(st.sampled_from(KEYS_OF[UNET]), JSON | st.just(...), min_size=1, max_size=2))
def test_any_unet_config_is_refused_or_used_as_it_is(changes: dict[str, Any], model: Path) -> None:
    config = Config(pretrained_model=str(model), refine=False)

    def make() -> Any:
        hub.fetch_models(config)
        return models.load_unet(str(model), None, CPU, torch.float32)

    with with_config(model, UNET, changes) as content:
        unet = unless_refused(make)
    if unet:
        assert {key: unet.config[key] for key in content if key[0] != "_"} == {
            key: value for key, value in content.items() if key[0] != "_"
        }
        run_unet(unet)


# What other launches leave in the environment, and what is the user's own.
LEFT_OVER = [
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK",
    "ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_ERROR_FILE",
    "PET_NNODES", "ACCELERATE_USE_CPU", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_MIXED_PRECISION", "FSDP_VERSION",
    "MEGATRON_LM_TP_DEGREE", "PARALLELISM_CONFIG_TP_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK",
    "MV2_COMM_WORLD_RANK", "MPI_LOCALRANKID", "FORK_LAUNCHED", "LACE_LORA_LAUNCHER",
]  # fmt: skip
OWN = [
    "PATH", "HOME", "CUDA_VISIBLE_DEVICES", "HF_TOKEN", "HF_HOME", "OMP_NUM_THREADS", "TORCH_DISTRIBUTED_DEBUG",
    "NCCL_DEBUG", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "PYTORCH_CUDA_ALLOC_CONF", "XDG_CACHE_HOME", "FRANK",
]  # fmt: skip


@often
@given(environ=st.dictionaries(st.sampled_from(LEFT_OVER + OWN), st.sampled_from(["", "0", "-1", "x", "true", "99"])))
def test_any_environment_gives_a_clean_launch(environ: dict[str, str]) -> None:
    built = launch_environment(environ)
    assert not built.keys() & set(LEFT_OVER)
    assert {name: value for name, value in environ.items() if name in OWN}.items() <= built.items()
    assert built.keys() - set(OWN) == {"PYTHONPATH", "PYTHONSAFEPATH"}


@often
@given(
    key=st.sampled_from(["images_dir", "instance_prompt", "prompt", "image_extensions"]),
    before=st.text(max_size=5), byte=st.integers(0xDC80, 0xDCFF),
)  # fmt: skip
def test_any_argument_that_is_not_utf8_is_refused(key: str, before: str, byte: int, tmp_path: Path) -> None:
    assert "not UTF-8 text" in refusal(tmp_path / "c.yaml", "", f"{key}={before.lstrip(' [')}{chr(byte)}")
