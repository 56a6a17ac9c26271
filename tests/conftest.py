"""What several test files need: the tiny SDXL with random weights, a few pictures, and settings for both."""

import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import main
from helpers import Make, RunHere
from lace_lora.config import Config

# All of this before anything imports torch, and for the processes that tests start. One thread each: two processes of
# pytest share two cores, and what is compared bit by bit is computed by as many threads wherever it runs.
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", OMP_NUM_THREADS="1")
# What is compared bit by bit is compared on the CPU; `make test-gpu` asks for the rest.
if not os.environ.get("TEST_GPU"):
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a GPU: make test-gpu")


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests read nothing that a user's runs have cached, and leave nothing there."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base` and `refiner`: SDXL's own classes and layout, tiny shapes, random weights."""
    from demo.making import build_model

    folder = tmp_path_factory.mktemp("model")
    build_model.build(folder, build_model.TINY, seed=0)
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five small pictures, landscape and portrait, each in its own colours."""
    folder = tmp_path_factory.mktemp("photos")
    for index in range(5):
        picture = Image.radial_gradient("L").resize((96, 72) if index % 2 else (72, 100))
        colours = Image.merge(
            "RGB", (picture, picture.rotate(90 * index), picture.point(lambda v, i=index: v * i // 5))
        )
        colours.save(folder / f"lace_{index}.jpg", quality=95)
    return folder


@pytest.fixture
def settings(tiny: Path, photos: Path, tmp_path: Path) -> Make:
    """Makes a `Config` for the tiny model that trains and draws in seconds; keyword arguments change it."""

    def make(**changes: Any) -> Config:
        values: dict[str, Any] = {
            "images_dir": str(photos),
            "lora_output_dir": str(tmp_path / "lora"),
            "output_dir": str(tmp_path / "pictures"),
            "pretrained_model": str(tiny / "base"),
            "refiner_model": str(tiny / "refiner"),
            "min_image_size": 32,
            "resolution": 64,
            "width": 64,
            "height": 64,
            "max_train_steps": 4,
            "checkpointing_steps": 2,
            "validation_steps": 0,
            "learning_rate": 1e-2,
            "rank": 4,
            "lora_alpha": 2.0,
            "num_images": 2,
            "num_inference_steps": 5,
            "report_to": "none",
        }
        return Config(**(values | changes))

    return make


@pytest.fixture
def two_processes(tmp_path: Path) -> str:
    """An accelerate file for two processes, which share the CPU in place of a GPU each."""
    path = tmp_path / "two_processes.yaml"
    path.write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nnum_machines: 1\n"
                    "num_processes: 2\nmachine_rank: 0\nmixed_precision: 'no'\nuse_cpu: true\n")  # fmt: skip
    return str(path)


@pytest.fixture
def run_here(capsys: pytest.CaptureFixture[str]) -> RunHere:
    """Runs main.py's `main` in this process; returns the exit code and all that was printed, but not logged."""

    def run(*arguments: str) -> tuple[int, str]:
        capsys.readouterr()
        try:
            code = main.main(arguments)
        except SystemExit as end:  # argparse's
            code = int(end.code or 0)
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run
