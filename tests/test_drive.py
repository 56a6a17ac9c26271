"""Google Drive: mounted, mountable, not mountable, not in Colab. Colab's own module is replaced by a fake."""

import importlib.machinery
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from lace_lora import drive
from lace_lora.config import Config
from lace_lora.errors import UserError

ON_DRIVE = Config()
LOCAL = Config(images_dir="photos", lora_output_dir="/tmp/lora", output_dir="out")
MOUNTS = "proc /proc proc rw 0 0\ndrive /content/drive fuse.drive rw,nosuid 0 0\ndrive /mnt/my\\040drive fuse rw 0 0\n"


@pytest.fixture
def mounted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """In Colab under `!python`, nothing mounted; returns the paths that google.colab's mount was asked for."""
    asked: list[str] = []
    colab = ModuleType("google.colab")
    colab.__spec__ = importlib.machinery.ModuleSpec("google.colab", None)
    colab.drive = SimpleNamespace(mount=asked.append)  # type: ignore[attr-defined]
    google = ModuleType("google")
    google.__path__ = []
    google.colab = colab  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "google", google)
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab")
    monkeypatch.setitem(sys.modules, "IPython", None)
    return asked


@pytest.fixture
def in_kernel(monkeypatch: pytest.MonkeyPatch, mounted: list[str]) -> None:
    """In Colab, and in a cell."""
    ipython = ModuleType("IPython")
    ipython.get_ipython = lambda: SimpleNamespace(kernel=object())  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ipython)


def outside_colab(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLAB_RELEASE_TAG", raising=False)


@pytest.mark.parametrize(
    ("path", "there"),
    [
        ("/content/drive", True),
        ("/content/drive/", True),
        ("/mnt/my drive", True),
        ("/content", False),
        ("/content/drive/MyDrive", False),
        ("/content/driver", False),
    ],
)
def test_the_mount_table_is_read(path: str, there: bool, tmp_path: Path) -> None:
    (tmp_path / "mounts").write_text(MOUNTS)
    assert drive.is_mounted(path, tmp_path / "mounts") is there


def test_without_a_mount_table_nothing_is_mounted(tmp_path: Path) -> None:
    assert not drive.is_mounted("/content/drive", tmp_path / "missing")


def test_outside_colab_folders_on_drive_are_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    outside_colab(monkeypatch)
    assert not drive.in_colab()
    drive.ensure_mounted(ON_DRIVE)
    names = "images_dir, lora_output_dir, output_dir are on Google Drive"
    assert caplog.messages == [f"warning: {names}, but this is not Colab: set them to folders of this computer"]
    caplog.clear()
    drive.ensure_mounted(Config(**(vars(LOCAL) | {"output_dir": "/content/drive/MyDrive/out"})))
    assert "output_dir is on Google Drive, but this is not Colab: set it to" in caplog.text
    caplog.clear()
    drive.ensure_mounted(LOCAL)
    drive.ensure_mounted(Config(drive_mount_path="/proc", images_dir="/proc/photos"))  # mounted by other means
    assert not caplog.messages


def test_colab_is_recognised_by_its_module_alone(monkeypatch: pytest.MonkeyPatch, mounted: list[str]) -> None:
    outside_colab(monkeypatch)
    assert drive.in_colab()


@pytest.mark.usefixtures("in_kernel")
def test_in_the_kernel_drive_is_mounted(mounted: list[str]) -> None:
    drive.ensure_mounted(ON_DRIVE)
    assert mounted == ["/content/drive"]


@pytest.mark.usefixtures("in_kernel")
def test_without_a_path_on_drive_nothing_is_mounted(mounted: list[str]) -> None:
    drive.ensure_mounted(LOCAL)
    assert mounted == []


@pytest.mark.usefixtures("in_kernel")
@pytest.mark.parametrize("key", ["images_dir", "lora_output_dir", "output_dir", "lora_path", "prompts_file"])
def test_one_path_on_drive_is_enough(key: str, mounted: list[str]) -> None:
    drive.ensure_mounted(Config(**(vars(LOCAL) | {key: "/content/drive/MyDrive/here"})))
    assert mounted == ["/content/drive"]


@pytest.mark.usefixtures("in_kernel")
def test_a_mounted_drive_is_left_alone(mounted: list[str]) -> None:
    drive.ensure_mounted(Config(drive_mount_path="/proc", images_dir="/proc/photos"))
    assert mounted == []


def test_under_a_shell_the_two_lines_are_printed(mounted: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        drive.ensure_mounted(ON_DRIVE)
    assert caught.value.exit_code == 2
    assert mounted == []
    pasted = str(caught.value).splitlines()[-2:]
    exec("\n".join(pasted), {})
    assert mounted == ["/content/drive"]


@pytest.mark.usefixtures("in_kernel")
@pytest.mark.parametrize("error", [ValueError("mount failed"), RuntimeError("credentials"), OSError(5, "I/O error")])
def test_a_mount_that_fails_ends_with_4(error: Exception) -> None:
    sys.modules["google.colab"].drive = SimpleNamespace(mount=_raising(error))  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="could not be mounted at /content/drive") as caught:
        drive.ensure_mounted(ON_DRIVE)
    assert caught.value.exit_code == 4


def _raising(error: Exception) -> Callable[[str], None]:
    def mount(_path: str) -> None:
        raise error

    return mount
