"""Which GPU there is, and what is refused without one."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from lace_lora.errors import UserError
from lace_lora.machine import Gpu, find_gpu, require_gpu

T4 = "Tesla T4, 15360, 15000, 7.5, 580.65.06, [N/A]\n"


@pytest.fixture(autouse=True)
def nothing_is_remembered() -> Iterator[None]:
    find_gpu.cache_clear()
    yield
    find_gpu.cache_clear()


def nvidia_smi(folder: Path, prints: str, monkeypatch: pytest.MonkeyPatch, code: int = 0) -> None:
    """A driver's program that prints this, and its arguments into a file."""
    program = folder / "nvidia-smi"
    program.write_text(f'#!/bin/sh\necho "$@" >> {folder}/arguments\ncat <<END\n{prints}END\nexit {code}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize(
    ("prints", "code", "expected"),
    [
        (T4, 0, Gpu("Tesla T4", 15.0, 15000 / 1024, has_bf16=False, driver=580)),
        ("NVIDIA L4, 23034, 22000, 8.9, 550.54, [N/A]\n" + T4, 0,
         Gpu("NVIDIA L4", 23034 / 1024, 22000 / 1024, has_bf16=True, driver=550)),
        ("NVIDIA H100 80GB HBM3, 81559, 81079, 9.0, 580.65.06, Disabled\n", 0,
         Gpu("NVIDIA H100 80GB HBM3", 81559 / 1024, 81079 / 1024, has_bf16=True, driver=580)),
        ("NVIDIA H100 80GB HBM3, 81559, 81079, 9.0, 580.65.06, Enabled\n", 0, None),
        ("NVIDIA-SMI has failed because it couldn't communicate with the driver\n", 9, None),
        ("No devices were found\n", 0, None),
        ("Tesla T4, [N/A], [N/A], 7.5, 580.65.06, [N/A]\n", 0, None),
        ("", 0, None),
    ],
)  # fmt: skip
def test_what_the_driver_says(
    prints: str, code: int, expected: Gpu | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi(tmp_path, prints, monkeypatch, code)
    assert find_gpu() == expected


def test_without_the_drivers_program_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert find_gpu() is None


@pytest.mark.parametrize(
    ("visible", "asked"), [("", ""), ("-1", ""), ("1", "1"), ("1,0", "1"), (" GPU-1a, GPU-2b", "GPU-1a"), (",1", "")]
)
def test_the_first_gpu_that_is_not_hidden_is_asked_for_once(
    visible: str, asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi(tmp_path, T4, monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert (find_gpu() is not None) == bool(asked)
    assert find_gpu() == find_gpu()
    if asked:
        [arguments] = (tmp_path / "arguments").read_text().splitlines()
        assert arguments.endswith(f"--id={asked}")


def test_an_older_gpu_computes_in_fp16() -> None:
    assert Gpu("Tesla T4", 15, 15, has_bf16=False).dtype("auto") == "fp16"
    assert Gpu("NVIDIA L4", 22, 22, has_bf16=True).dtype("auto") == "bf16"
    assert Gpu("NVIDIA L4", 22, 22, has_bf16=True).dtype("no") == "no"


def pytorch(folder: Path, cuda: str, monkeypatch: pytest.MonkeyPatch, has_gpu: bool = False) -> None:
    """A PyTorch that was built for this version of CUDA; none is a build for CPUs."""
    (folder / "torch-2.13.0.dist-info").mkdir()
    (folder / "torch-2.13.0.dist-info" / "METADATA").write_text("Name: torch\nVersion: 2.13.0\n")
    (folder / "torch").mkdir()
    (folder / "torch" / "version.py").write_text(f"cuda: Optional[str] = {cuda or None!r}\nhip: Optional[str] = None\n")
    (folder / "torch" / "__init__.py").write_text("from torch import cuda")
    (folder / "torch" / "cuda.py").write_text(f"is_available = lambda: {has_gpu}")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder))


@pytest.mark.parametrize(
    ("prints", "cuda", "message"),
    [
        ("", "", "no GPU was found, and it takes days: use Colab .* device: cpu"),
        (T4, "", "build for CPUs, which cannot use the Tesla T4, and it takes days: install .* CUDA"),
        (T4, "13.0", ""),
        (T4.replace("580", "550"), "12.8", ""),
        (T4.replace("580", "550"), "13.0", "the Tesla T4 has driver 550, too old for .* CUDA 13, .* to 580 or later"),
        (T4, "99.0", ""),
    ],
)
def test_what_needs_a_gpu_is_refused_without_one(
    prints: str, cuda: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi(tmp_path, prints, monkeypatch)
    pytorch(tmp_path, cuda, monkeypatch)
    if message:
        with pytest.raises(UserError, match=message):
            require_gpu("it takes days")
    else:
        require_gpu("it takes days")


@pytest.mark.parametrize("prints", ["NVIDIA GB10, [N/A], [N/A], 12.1, 580.65.06, [N/A]\n", T4.replace("580", "550")])
def test_a_gpu_that_pytorch_can_use_is_enough(prints: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that only PyTorch knows, or one with NVIDIA's libraries for a driver older than its CUDA."""
    nvidia_smi(tmp_path, prints, monkeypatch)
    pytorch(tmp_path, "13.0", monkeypatch, has_gpu=True)
    require_gpu("it takes days")


def test_a_gpu_that_nobody_can_use_is_not_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(tmp_path, "NVIDIA GB10, [N/A], [N/A], 12.1, 580.65.06, [N/A]\n", monkeypatch)
    pytorch(tmp_path, "13.0", monkeypatch)
    with pytest.raises(UserError, match="no GPU was found"):
        require_gpu("it takes days")
