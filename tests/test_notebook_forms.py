"""The forms of the notebook: what they say becomes settings, or one line about what is wrong."""

import base64
import io
import re
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from helpers import ROOT, jpgs
from lace_lora import machine, notebook
from lace_lora.cell import CellError
from lace_lora.config import Config, load_config
from lace_lora.notebook import NO_GPU, Project, _smaller_page

GPU = machine.Gpu("Tesla T4", 14.7, 14.5, False)
Form = Callable[..., Project]


@pytest.fixture
def fill_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Form:
    """The second cell, with three photos and a T4; keyword arguments change its form."""
    jpgs(tmp_path / "photos")
    monkeypatch.setattr(machine, "find_gpu", lambda: GPU)
    monkeypatch.setattr(machine, "_pytorch_built_for", lambda: None)
    form = {"results": str(tmp_path / "out"), "photos": str(tmp_path / "photos"), "word": "lace", "quality": "good"}
    return lambda **changes: Project(**(form | changes))


def test_a_form_becomes_settings(fill_in: Form, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    project = fill_in(more_settings="rank = 32, random_flip=true, prompt=[a, b], negative_prompt=fog, rain")
    printed = capsys.readouterr().out
    assert "GPU: Tesla T4, 14.7 GiB\n" in printed
    assert "GB free here, about 12 GB needed for the models" in printed
    assert project.config == Config(
        images_dir=str(tmp_path / "photos"), lora_output_dir=str(tmp_path / "out" / "lora"),
        output_dir=str(tmp_path / "out" / "pictures"),
        instance_prompt="a photo of <lace>", max_train_steps=1000, resolution=512, validation_steps=200,
        rank=32, random_flip=True, prompt=("a", "b"), negative_prompt="fog, rain",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("form", "says"),
    [
        ({"word": "my lace"}, "word is 'my lace': use one made-up word"),
        ({"word": "<a><b>"}, "word is '<a><b>': use one"),
        ({"word": ""}, "word is ''"),
        ({"quality": "best"}, "quality is 'best': choose one of quick, good, fine"),
        ({"photos": ""}, "photos is empty: give a folder"),
        ({"photos": "/no/such"}, "there is no folder /no/such: put your photos there"),
        ({"results": " "}, "results is empty"),
        ({"results": f"{ROOT}/main.py/x"}, f"{ROOT}/main.py/x/lora cannot be used as a folder"),
        ({"more_settings": "rnak=32"}, "unknown key 'rnak'; did you mean rank?"),
        ({"more_settings": "rank 32"}, "'rank 32' is not of the form key=value"),
        ({"results": "lace"}, "results is 'lace': give its whole path, which begins with /"),
        ({"photos": "https://drive.google.com/drive/folders/1"}, "photos is a link: give the folder's path"),
        (
            {"results": "/lace-lora-program/out"},
            "results is /lace-lora-program/out, which is replaced",
        ),
        ({"more_settings": "rank=no"}, "rank is 'no', not a whole number"),
        ({"more_settings": "optimizer=prodigy"}, "optimizer prodigy adapts the learning rate"),
    ],
)
def test_what_is_wrong_in_a_form_is_one_line(form: dict[str, str], says: str, fill_in: Form, tmp_path: Path) -> None:
    with pytest.raises(CellError) as caught:
        fill_in(**form)
    [line] = caught.value._render_traceback_()
    assert line.startswith(f"Stopped: {says}")
    assert "\n" not in line
    assert not (tmp_path / "out").exists()


def test_without_a_gpu_one_line_says_how_to_get_one(fill_in: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "find_gpu", lambda: None)
    monkeypatch.setattr(machine, "_has_apple_gpu", lambda: False)
    with pytest.raises(CellError, match="no GPU was found"):
        fill_in()
    monkeypatch.setenv("COLAB_RELEASE_TAG", "x")
    with pytest.raises(CellError, match=re.escape(NO_GPU)):
        fill_in()
    fill_in(more_settings="device=cpu")


def test_settings_that_are_there_win_unless_the_form_is_to_change_them(
    fill_in: Form, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = fill_in(more_settings="rank=8").settings_file
    mine = settings.read_text().replace("rank: 8", "rank: 4  # mine")
    settings.write_text(mine)
    assert fill_in(quality="fine").config.rank == 4
    assert settings.read_text() == mine
    hint = "(tick use_this_form to change them to this form's: quality, more_settings)"
    assert hint in capsys.readouterr().out
    # A LoRA is there: more steps are fine, another resolution is not.
    (tmp_path / "out" / "lora").mkdir()
    with pytest.raises(CellError, match=r"has other settings, resolution \(was 512\): choose another results folder"):
        fill_in(quality="fine", more_settings="rank=4", use_this_form=True)
    assert settings.read_text() == mine
    longer = fill_in(more_settings="rank=4, max_train_steps=2000", use_this_form=True)
    assert longer.config.max_train_steps == 2000


def test_a_form_can_be_corrected_until_a_lora_is_begun(fill_in: Form, tmp_path: Path) -> None:
    fill_in(word="wrong", more_settings="rank: 8, random_flip: true")
    assert fill_in().config.instance_prompt == "a photo of <lace>"
    (tmp_path / "out" / "lora").mkdir()
    assert fill_in(word="other").config.instance_prompt == "a photo of <lace>"


def test_in_colab_folders_are_those_of_drive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLAB_RELEASE_TAG", "1")
    for name in ("lace photos", "MyDrive/lace photos", "My Drive/lace photos", "/content/drive/MyDrive/lace photos"):
        assert notebook._absolute("photos", name) == Path("/content/drive/MyDrive/lace photos")


def test_what_is_not_in_drive_is_said_to_be_lost(
    fill_in: Form, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLAB_RELEASE_TAG", "1")
    project = fill_in()
    assert "is not in your Drive; it is lost when the runtime ends" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "google.colab", ModuleType("google.colab"))
    sys.modules["google.colab"].drive = None  # type: ignore[attr-defined]
    with pytest.raises(CellError, match="is not in your Drive: download it"):
        project.finish()


def test_damaged_settings_are_one_line(fill_in: Form, tmp_path: Path) -> None:
    fill_in().settings_file.write_text("rank: 8\nrnak: 8\n")
    with pytest.raises(CellError, match="settings.yaml:2: unknown key 'rnak'"):
        fill_in()


def test_prompts_of_the_form(
    fill_in: Form, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object) -> None:
        raise CellError

    monkeypatch.setattr(notebook, "run_main", stop)
    project = fill_in(more_settings="seed=1, prompt=of the training's form")
    for prompts, drawn in (
        ("a {word}, white | {'net'}: \U0001f9f5 |", ("a <lace>, white", "{'net'}: \U0001f9f5")),
        ("", None),
    ):
        with pytest.raises(CellError):
            project.draw(prompts, 5, 0.5, 7)
        drawing = load_config(project.drawing_file)
        assert (drawing.prompt, drawing.num_images, drawing.lora_scale, drawing.seed) == (drawn, 5, 0.5, 7)
        assert drawing.lora_output_dir == project.config.lora_output_dir
    assert capsys.readouterr().out.count("does not contain <lace>, so little of your style will show") == 1
    with pytest.raises(CellError, match="^seed is -1; it must be at least 0$"):
        project.draw("", 5, 1.0, -1)
    assert project.config.seed == 1


def test_nothing_to_download_is_one_line(fill_in: Form) -> None:
    with pytest.raises(CellError, match="there is no finished LoRA in .*: run the cell that trains"):
        fill_in().download()


def test_outside_colab_the_zip_is_a_link(fill_in: Form, capsys: pytest.CaptureFixture[str]) -> None:
    project = fill_in()
    inside = {"lora/pytorch_lora_weights.safetensors", "pictures/a.png", "pictures-2/b.png", "pictures-of-a-cat/c.png"}
    for name in (*inside, "lora/checkpoint-1/d.txt", "pictures/.before_refining/e.jpg", "lora/.f.tmp"):
        (project.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (project.folder / name).write_text("x")
    project.download()
    [archive] = project.folder.glob("*.zip")
    assert capsys.readouterr().out.strip().endswith(archive.name)  # what a terminal has in place of a link
    with zipfile.ZipFile(archive) as opened:
        assert set(opened.namelist()) == inside - {"pictures-of-a-cat/c.png"} | {"settings.yaml"}


def test_a_page_with_many_pictures_stays_small() -> None:
    noise = io.BytesIO()
    Image.effect_noise((1024, 1024), 60).convert("RGB").save(noise, "JPEG", quality=88)
    picture = f'<a href="x.png"><img src="data:image/jpeg;base64,{base64.b64encode(noise.getvalue()).decode()}"></a>'
    page = _smaller_page(picture * 48)
    assert len(page) < 12e6 < len(picture * 48)  # of noise, which needs most
    assert page.count('<a href="about:srcdoc#"><img src="data:image/jpeg;base64,') == 48
