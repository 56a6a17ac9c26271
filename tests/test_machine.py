"""Which GPU there is, and what is refused without one."""

from pathlib import Path

import pytest

from lace_lora import machine
from lace_lora.machine import Gpu, find_gpu, require_gpu

T4 = "Tesla T4, 15360, 15000, 7.5\n"


def nvidia_smi(folder: Path, prints: str, monkeypatch: pytest.MonkeyPatch, code: int = 0) -> None:
    """A driver's program that prints this, and its arguments into a file."""
    program = folder / "nvidia-smi"
    program.write_text(f'#!/bin/sh\necho "$@" > {folder}/arguments\ncat <<END\n{prints}END\nexit {code}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize(
    ("prints", "code", "expected"),
    [
        (T4, 0, Gpu("Tesla T4", 15.0, 15000 / 1024, has_bf16=False)),
        ("NVIDIA L4, 23034, 22000, 8.9\n" + T4, 0, Gpu("NVIDIA L4", 23034 / 1024, 22000 / 1024, has_bf16=True)),
        ("NVIDIA-SMI has failed because it couldn't communicate with the driver\n", 9, None),
        ("No devices were found\n", 0, None),
        ("Tesla T4, [N/A], [N/A], 7.5\n", 0, None),
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


@pytest.mark.parametrize(("visible", "asked"), [("", False), ("-1", False), ("1", True)])
def test_gpus_that_are_hidden_are_not_used(
    visible: str, asked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi(tmp_path, T4, monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert (find_gpu() is not None) == asked
    if asked:
        assert "--id=1" in (tmp_path / "arguments").read_text()


def test_an_older_gpu_computes_in_fp16() -> None:
    assert Gpu("Tesla T4", 15, 15, has_bf16=False).dtype("auto") == "fp16"
    assert Gpu("NVIDIA L4", 22, 22, has_bf16=True).dtype("auto") == "bf16"
    assert Gpu("NVIDIA L4", 22, 22, has_bf16=True).dtype("no") == "no"


@pytest.mark.parametrize(
    ("prints", "torch", "message"),
    [
        ("", "2.13.0+cpu", "no GPU was found, and it takes days: use Colab .* device: cpu"),
        (T4, "2.13.0+cpu", "build for CPUs, which cannot use the Tesla T4, and it takes days: install .* CUDA"),
        (T4, "2.13.0+cu130", ""),
        (T4, "2.13.0", ""),
    ],
)
def test_what_needs_a_gpu_is_refused_without_one(
    prints: str, torch: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi(tmp_path, prints, monkeypatch)
    monkeypatch.setattr(machine, "version", lambda _: torch)
    if message:
        with pytest.raises(machine.UserError, match=message):
            require_gpu("it takes days")
    else:
        require_gpu("it takes days")


@pytest.mark.parametrize("has_gpu", [True, False])
def test_a_gpu_that_only_pytorch_knows_is_enough(
    has_gpu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi(tmp_path, "NVIDIA GB10, [N/A], [N/A], 12.1\n", monkeypatch)
    monkeypatch.setattr(machine, "version", lambda _: "2.13.0+cu130")
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("from torch import cuda")
    (tmp_path / "torch" / "cuda.py").write_text(f"is_available = lambda: {has_gpu}")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    if has_gpu:
        require_gpu("it takes days")
    else:
        with pytest.raises(machine.UserError, match="no GPU was found"):
            require_gpu("it takes days")
