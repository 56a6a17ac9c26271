"""The notebook, cell by cell in IPython, from nothing but itself, a zip of the project and photos in a Drive.

Of Colab only the module `google.colab` is replaced, and /content is a temporary folder.
"""

import base64
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from helpers import ROOT, contents, main_py
from lace_lora.config import load_config

NOTEBOOK = json.loads((ROOT / "lace_lora.ipynb").read_text(encoding="utf-8"))
CELLS = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
GET, FORM, LOOK, TRAIN, CURVES, DRAW, DOWNLOAD, FINISH = range(len(CELLS))
COLAB = """
from pathlib import Path
def note(what):
    with open(Path(__file__).with_name("asked"), "a") as file:
        file.write(f"{what}\\n")
"""
COLAB_MODULES = {
    "drive": "mount = lambda path: note(f'mount {path}')\nflush_and_unmount = lambda: note('flush')",
    "files": "download = lambda path: note(f'download {path}')",
}
# What makes the demo's model train and draw within seconds, as a user would write it into the form.
SMALL = (
    "pretrained_model=demo/model/base, refiner_model=demo/model/refiner, resolution=64, width=64, height=64, "
    "min_image_size=32, max_train_steps=40, train_batch_size=1, checkpointing_steps=4, validation_steps=20, "
    "num_validation_images=2, num_inference_steps=5, rank=4"
)


Results = list[dict[str, Any]]  # of each cell whether it went well, what it printed and what it displayed


@dataclass
class Colab:
    """A runtime with a Drive: `home` is its /content. Another one with the same Drive is what a lost runtime leaves."""

    home: Path
    served: list[list[str]] = field(default_factory=list)  # command lines of TensorBoard

    @property
    def shown(self) -> Path:
        return self.home.parent / "shown.json"

    @property
    def drive(self) -> Path:
        return self.home / "drive" / "MyDrive"

    @property
    def results(self) -> Path:
        return self.drive / "lace-lora-results"

    def asked(self) -> list[str]:
        """What the cells wanted of Colab."""
        return (self.home.parent / "google" / "colab" / "asked").read_text().splitlines()

    def start(self, cells: Sequence[int], **form: Any) -> "Running":
        self.shown.unlink(missing_ok=True)
        sources = [fill(CELLS[cell].replace("/content", str(self.home)), form) for cell in cells]
        missing = [name for name in form if not any(f"{name} = {form[name]!r}" in source for source in sources)]
        assert not missing, f"no form has {missing}"
        path = os.pathsep.join([str(self.home.parent), str(Path(sys.executable).parent), os.environ["PATH"]])
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "notebook_shell.py"), str(self.shown)], cwd=self.home,
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True,
            env=os.environ | {"PYTHONPATH": str(self.home.parent), "PATH": path, "IPYTHONDIR": str(self.home.parent)},
        )  # fmt: skip
        assert process.stdin
        process.stdin.write(json.dumps(sources))
        process.stdin.close()
        return Running(process, self)

    def run(self, cells: Sequence[int], **form: Any) -> Results:
        return self.start(cells, **form).results()


@dataclass
class Running:
    process: "subprocess.Popen[str]"
    colab: Colab

    def tensorboards(self) -> list[psutil.Process]:
        """Its servers, which stay until the runtime ends."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, ProcessLookupError):
                if os.getpgid(process.pid) == self.process.pid and "tensorboard" in str(process.cmdline()):
                    found.append(process)
        return found

    def results(self) -> Results:
        """What each cell showed; nothing that it started is left."""
        try:
            assert self.process.wait(timeout=120) == 0
        finally:
            for server in self.tensorboards():
                self.colab.served.append(server.cmdline())
                server.kill()
        results: Results = json.loads(self.colab.shown.read_text())
        for result in results:
            assert "Traceback" not in result["printed"], result["printed"]
        return results


def fill(source: str, form: dict[str, Any]) -> str:
    """A cell with other values in its form, written as Colab writes them."""
    for name, value in form.items():
        if found := re.search(rf"^{name} = .*?  # @param (.*)$", source, re.MULTILINE):
            if found[1].startswith("["):
                assert value in json.loads(found[1])
            source = source.replace(found[0], f"{name} = {value!r}  # @param {found[1]}")
    return source


def new_runtime(folder: Path, drive: Path | None = None) -> Colab:
    colab = Colab(folder / "content")
    shutil.rmtree(folder, ignore_errors=True)  # the runtime before it is lost, its Drive is not
    (folder / "google" / "colab").mkdir(parents=True)
    (folder / "google" / "colab" / "__init__.py").write_text(COLAB)
    for name, code in COLAB_MODULES.items():
        (folder / "google" / "colab" / f"{name}.py").write_text(f"from google.colab import note\n{code}\n")
    colab.drive.parent.mkdir(parents=True)
    if drive:
        colab.drive.symlink_to(drive)
    else:
        colab.drive.mkdir()
    return colab


def project_zip(target: Path, folder: str = "Some-Fork-main") -> Path:
    """The project as GitHub packs it: everything in one folder."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    inside = [ROOT / name for name in listed.stdout.splitlines()] or list(ROOT.rglob("*"))
    with zipfile.ZipFile(target, "w") as archive:
        for path in inside:
            if path.is_file() and not {".venv", ".venv-colab", ".git"} & set(path.relative_to(ROOT).parts):
                archive.write(path, f"{folder}/{path.relative_to(ROOT)}")
    return target


def pictures_in(result: dict[str, Any]) -> list[Image.Image]:
    """What a cell shows as pictures, each as it was shown last."""
    encoded = [each["data"]["image/jpeg"] for each in result["displays"] if "image/jpeg" in each["data"]]
    return [Image.open(io.BytesIO(base64.b64decode(content))) for content in encoded]


# the whole notebook


def test_the_cells_from_nothing_but_the_notebook_and_a_zip(tmp_path: Path) -> None:
    """Three runtimes, one after another, with one Drive: the first is interrupted in its training, then lost."""
    drive, machine_folder = make_drive(tmp_path / "MyDrive"), tmp_path / "machine"
    colab = new_runtime(machine_folder, drive)
    running = colab.start([GET, FORM, LOOK, TRAIN], word="<mylace>", more_settings=SMALL)
    started = time.monotonic()
    while not (colab.results / "lora" / "checkpoint-4").exists() and running.process.poll() is None:
        assert time.monotonic() - started < 90
        time.sleep(0.05)
    os.killpg(running.process.pid, signal.SIGINT)  # ■, as Jupyter passes it on
    results = running.results()
    the_program_is_unpacked_and_the_form_becomes_settings(colab, results)
    photos_are_shown_with_every_problem(results)
    an_interrupt_saves_and_leaves_nothing_running(colab, results)
    # All cells in a new runtime, whose first form is as empty as in a notebook that is opened again.
    colab = new_runtime(machine_folder, drive)
    results = colab.run(range(len(CELLS)), number=3)
    a_new_runtime_goes_on_with_the_settings_beside_the_lora(results)
    training_is_shown_as_it_goes_in_little_room(colab, results)
    tensorboard_opens_on_the_logs(colab, results)
    the_gallery_is_inside_the_notebook(colab, results)
    lora_and_pictures_are_downloaded_and_drive_is_flushed(colab)
    the_same_cells_again_draw_only_what_is_missing(new_runtime(machine_folder, drive))
    the_command_line_takes_what_the_forms_wrote(colab)


def make_drive(drive: Path) -> Path:
    """A Drive with the notebook, a zip of the project, ten photos and a file that is none."""
    (drive / "Colab Notebooks").mkdir(parents=True)
    shutil.copy(ROOT / "lace_lora.ipynb", drive / "Colab Notebooks")
    project_zip(drive / "Some-Fork-main.zip")
    (drive / "babanne-images").mkdir()
    for number in range(10):
        shutil.copy(ROOT / "demo" / "lace" / f"lace_{number:03d}.jpg", drive / "babanne-images")
    (drive / "babanne-images" / "broken.jpg").write_bytes(b"no picture")
    return drive


def the_program_is_unpacked_and_the_form_becomes_settings(colab: Colab, results: Results) -> None:
    got, form = results[:2]
    assert "Some-Fork-main.zip" in got["printed"]
    assert "There is no GPU here" in got["printed"]
    assert "GPU: none\n" in form["printed"]
    assert re.search(r"Disk: \d+ GB free for results, about 0.3 GB needed", form["printed"])
    settings = colab.results / "settings.yaml"
    assert settings.read_text() in form["printed"]
    config = load_config(settings)
    assert (config.instance_prompt, config.rank, config.resolution) == ("a photo of <mylace>", 4, 64)
    assert ".png" in config.image_extensions


def photos_are_shown_with_every_problem(results: Results) -> None:
    assert "broken.jpg" in results[LOOK]["printed"]
    assert "10 used, 1 skipped" in results[LOOK]["printed"]
    assert len(pictures_in(results[LOOK])) == 1


def an_interrupt_saves_and_leaves_nothing_running(colab: Colab, results: Results) -> None:
    train = results[TRAIN]
    assert not train["ok"]
    assert "stopped at step" in train["printed"]
    assert train["printed"].rstrip().endswith("Stopped: run this cell again to go on")
    running = psutil.process_iter(["cmdline"])
    assert not [process for process in running if str(colab.home) in str(process.info["cmdline"])]
    assert not (colab.results / "lora" / "pytorch_lora_weights.safetensors").exists()


def a_new_runtime_goes_on_with_the_settings_beside_the_lora(results: Results) -> None:
    assert [result["ok"] for result in results] == [True] * len(CELLS), results[-1]["printed"]
    kept = "used as they are (tick use_this_form to change them to this form's: "
    assert kept in results[FORM]["printed"]
    assert "resuming from" in results[TRAIN]["printed"]
    assert "trained 40 steps" in results[TRAIN]["printed"]


def training_is_shown_as_it_goes_in_little_room(colab: Colab, results: Results) -> None:
    displays = results[TRAIN]["displays"]
    progress = [each for each in displays if "mean loss" in each["data"].get("text/plain", "")]
    assert progress
    assert [each["update"] for each in displays].count(False) == 3  # progress, samples, loss
    assert " left, samples" not in results[TRAIN]["printed"]
    assert any(" left, samples" in each["data"]["text/plain"] for each in progress)
    strip, loss = (Image.open(colab.results / "lora" / name) for name in ("samples.png", "loss.png"))
    sizes = [picture.size for picture in pictures_in(results[TRAIN])]
    assert strip.size in sizes
    assert min(1100, loss.width) in [width for width, _ in sizes]


def tensorboard_opens_on_the_logs(colab: Colab, results: Results) -> None:
    assert list((colab.results / "lora" / "logs").rglob("events.out.tfevents*"))
    assert results[CURVES]["displays"]
    assert f"{colab.results}/lora/logs" in colab.served[0]


def the_gallery_is_inside_the_notebook(colab: Colab, results: Results) -> None:
    [page] = [each["data"]["text/html"] for each in results[DRAW]["displays"] if "text/html" in each["data"]]
    assert page.count("data:image/jpeg;base64,") == 6  # before and after refining
    assert "refined_output_000.png&quot;&gt;&lt;img" not in page  # a link to a file leads nowhere
    assert "a photo of &amp;lt;mylace&amp;gt;, a wide border" in page
    drawing = load_config(colab.results / "drawing.yaml")
    assert drawing.prompt == ("a photo of <mylace>", "a photo of <mylace>, a wide border with leaves")
    assert len(list((colab.results / "pictures").glob("refined_output_*.png"))) == 3


def lora_and_pictures_are_downloaded_and_drive_is_flushed(colab: Colab) -> None:
    mount, download, flush = colab.asked()
    assert (mount, flush) == (f"mount {colab.home}/drive", "flush")
    archive = Path(download.removeprefix("download "))
    with zipfile.ZipFile(archive) as opened:
        names = set(opened.namelist())
    archive.unlink()
    lora = {"pytorch_lora_weights.safetensors", "mylace.safetensors", "samples.png", "loss.png", "metrics.csv"}
    expected = {f"lora/{name}" for name in lora} | {"pictures/refined_output_002.png", "pictures/gallery.html"}
    assert expected | {"settings.yaml"} <= names
    assert not [name for name in names if "checkpoint" in name or "/." in name]


def the_same_cells_again_draw_only_what_is_missing(colab: Colab) -> None:
    lost = colab.results / "pictures" / "refined_output_001.png"
    before = contents(lost.parent.glob("*.png"))
    lost.unlink()
    times = {path: path.stat().st_mtime_ns for path in lost.parent.glob("refined*.png")}
    results = colab.run([GET, FORM, TRAIN, DRAW], number=3)
    assert results[-1]["ok"], results[-1]["printed"]
    assert "Finished already" in results[2]["printed"]
    assert contents(before) == before
    assert {path: path.stat().st_mtime_ns for path in times} == times


def the_command_line_takes_what_the_forms_wrote(colab: Colab) -> None:
    for mode, name in (("train", "settings.yaml"), ("inference", "drawing.yaml")):
        done = main_py("--mode", mode, "--config", str(colab.results / name), cwd=ROOT)
        assert (done.returncode, "Finished already" in done.stdout) == (0, True), done.stderr


# the first cell


def stopped(colab: Colab, **form: Any) -> str:
    """What the first cell says when it cannot go on: one line."""
    [result] = colab.run([GET], **form)
    assert not result["ok"]
    *before, last = result["printed"].strip().splitlines()
    assert last.startswith("Stopped: ")
    assert len(before) == 0
    return last


def test_without_a_program_one_line_says_what_to_do(tmp_path: Path) -> None:
    assert "put its zip file into your Drive" in stopped(new_runtime(tmp_path))


def test_a_zip_that_is_damaged_is_named(tmp_path: Path) -> None:
    colab = new_runtime(tmp_path)
    other = colab.drive / "other.zip"
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("lace_lora/main.py", "")
    broken = project_zip(colab.drive / "lace-lora.zip")
    broken.write_bytes(broken.read_bytes()[:1000])
    assert f"{broken} is damaged" in stopped(colab)


@pytest.mark.parametrize("address", ["/no/such/repository", "https://user:secret@localhost:1/x.git", "--upload-pack=x"])
def test_a_wrong_address_is_one_line(address: str, tmp_path: Path) -> None:
    said = stopped(new_runtime(tmp_path), repository_address=address)
    assert "check the address in the form" in said
    assert "secret" not in said


@pytest.mark.parametrize("where", ["beside", "content", "drive", "zip", "address"])
def test_the_program_is_found(where: str, tmp_path: Path) -> None:
    colab = new_runtime(tmp_path)
    place = {"beside": colab.home, "content": colab.home / "x", "drive": colab.drive / "x y"}.get(where, tmp_path / "r")
    shutil.copytree(ROOT / "lace_lora", place / "lace_lora", ignore=shutil.ignore_patterns("__pycache__"))
    (place / "main.py").write_text("")
    (place / "requirements.txt").write_text("pip\n")
    if where == "address":
        git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c"]
        for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "x"]):
            subprocess.run([*git, *command], cwd=place, check=True)
    if where == "zip":
        (colab.drive / "Colab Notebooks").mkdir()
        shutil.make_archive(str(colab.drive / "Colab Notebooks" / "any name"), "zip", place)
    program = place if where in ("beside", "content") else colab.home / "lace-lora-program"
    for result in colab.run([GET, GET], repository_address=str(place) if where == "address" else ""):
        assert result["ok"], result["printed"]
        assert f"The program is in {program}" in result["printed"]


def test_a_drive_that_is_not_allowed_is_one_line(tmp_path: Path) -> None:
    colab = new_runtime(tmp_path)
    (tmp_path / "google" / "colab" / "drive.py").write_text("def mount(path):\n    raise ValueError('no access')\n")
    assert "Google Drive cannot be connected (no access): run this cell again, and allow the access" in stopped(colab)


def test_packages_that_cannot_be_installed_end_the_cell(tmp_path: Path) -> None:
    colab = new_runtime(tmp_path)
    (colab.home / "lace_lora").mkdir()
    for name in ("notebook", "machine", "errors"):
        shutil.copy(ROOT / "lace_lora" / f"{name}.py", colab.home / "lace_lora")
    (colab.home / "main.py").write_text("")
    (colab.home / "requirements.txt").write_text("./no-such-package\n")
    [result] = colab.run([GET])
    assert not result["ok"]
    assert result["printed"].rstrip().endswith("could not be installed, for the reason above: run this cell again")


def test_a_cell_before_the_first_says_so(tmp_path: Path) -> None:
    for cell in range(FORM, len(CELLS)):
        [result] = new_runtime(tmp_path / str(cell)).run([cell])
        assert not result["ok"]
        cells = "cell 1" if cell == FORM else "cells 1 and 2"
        assert result["printed"] == f"Stopped: run {cells} first\n"
