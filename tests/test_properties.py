"""Any content of a settings file, picture or checkpoint gives a result or a one-line error, never a traceback."""

import io
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image

import data_utils
from helpers import as_file, gradient, names, refused
from lace_lora.config import Config, dump_config, load_config
from lace_lora.errors import UserError
from lace_lora.pictures import image_files
from lace_lora.process import launch_environment
from lace_lora.training import checkpoint

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
    found = image_files._check(tmp_path / "a.jpg", 8, ("JPEG", "PNG", "TIFF", "WEBP", "BMP"))
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
    found = image_files._check(tmp_path / "a.jpg", 8, ("JPEG",))
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
    if any(letter in name for letter in "\t\n\r"):
        refused(lambda: data_utils.plan_annotations(folder, caption, [path], folder), "rename the file")
        assert names(folder) == {path.name}
        return
    written = data_utils.write_annotations(data_utils.plan_annotations(folder, caption, [path], folder))
    assert data_utils.read_annotations(written) == {path: " ".join(caption.split())}


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
