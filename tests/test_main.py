"""The command line: help, exit codes, one-line errors."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import main
from helpers import ROOT, jpgs, main_py, snapshot
from lace_lora.config import Config


def test_without_arguments_it_prints_help_and_exits_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main([]) == 0
    alone = capsys.readouterr().out
    assert "--mode" in alone
    with pytest.raises(SystemExit) as end:
        main.main(["--help"])
    assert end.value.code == 0
    assert capsys.readouterr().out == alone


def test_help_lists_every_key_with_its_explanation(capsys: pytest.CaptureFixture[str]) -> None:
    main.main([])
    text = capsys.readouterr().out
    for item in dataclasses.fields(Config):
        assert re.search(rf"^ *{item.name}=", text, re.MULTILINE), item.name
        assert item.metadata["explanation"] in text
    for code in ("0 done", "2 ", "3 out of memory", "4 disk or Drive", "5 loss", "130 or 143", "1 a bug"):
        assert code in text


@pytest.mark.parametrize("arguments", [["--mode", "draw"], ["seed=1"], ["--mode", "train", "--sed", "1"]])
def test_a_wrong_command_line_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main.main(arguments)
    assert end.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_mistakes_in_settings_end_with_2_and_write_nothing(tmp_path: Path) -> None:
    jpgs(tmp_path / "photos")
    (tmp_path / "my.yaml").write_text("images_dir: photos\nlora_output_dir: lora\noutput_dir: out\nrnk: 4\n")
    before = snapshot(tmp_path)
    done = main_py("--mode", "train", "--config", "my.yaml", "seed=x", "rank=0", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "error: my.yaml:4: unknown key 'rnk'; did you mean rank?",
        "command line: seed is 'x', not a whole number",
        "command line: rank is 0; it must be at least 1",
    ]
    assert snapshot(tmp_path) == before


def test_overrides_may_be_anywhere_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text("")
    for line in ("rank=0 --mode train", "--mode train rank=0", "--mode train rank=0 --dry-run seed=1"):
        assert main.main(line.split()) == 2
        assert capsys.readouterr().err == "error: command line: rank is 0; it must be at least 1\n"


def test_config_yaml_of_the_current_directory_is_read(tmp_path: Path) -> None:
    assert "config.yaml: no such file" in main_py("--mode", "train", cwd=tmp_path).stderr
    (tmp_path / "config.yaml").write_text("images_dir: nowhere\n")
    done = main_py("--mode", "train", cwd=tmp_path)
    assert done.returncode == 2
    assert "\nerror: nowhere: no such folder" in done.stderr


def test_imported_objects_are_frozen_for_the_garbage_collector() -> None:
    code = (
        "import gc\nfrom lace_lora.drawing.plan import importing_torch\n"
        "with importing_torch():\n    import torch; print(gc.isenabled())\n"
        "print(gc.get_freeze_count() > 50_000, gc.isenabled())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True", "True"]


def test_a_prompt_and_a_photo_in_any_language(tmp_path: Path) -> None:
    [photo] = jpgs(tmp_path / "große Häkelei 🧵", 1)
    photo.rename(photo.with_name("spitze ü 🌸.jpg"))
    (tmp_path / "config.yaml").write_text("lora_output_dir: lora\nmin_image_size: 16\nmin_images: 1\ndevice: cpu\n")
    done = main_py("--mode", "train", "--dry-run", f"images_dir={photo.parent}", "instance_prompt=ein Foto, weiß 🪡",
                   cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "1 used" in done.stdout
    assert "ein Foto, weiß 🪡" in done.stdout


def test_a_missing_package_is_a_one_line_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text("images_dir: photos\n")
    monkeypatch.setitem(sys.modules, "train", None)  # importing it fails as a package that is not installed does
    assert main.main(["--mode", "train", "--config", str(tmp_path / "config.yaml")]) == 2
    assert "train is not installed: run `make install && source .venv/bin/activate`" in capsys.readouterr().err


def test_without_any_package_it_is_a_one_line_error_too() -> None:
    command = [sys.executable, "-S", str(ROOT / "main.py"), "--help"]  # no site-packages, as outside of .venv
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert re.fullmatch(r"error: \w+ is not installed: .*`pip install -r requirements.txt`\n", done.stderr)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-P"], "Python does not search main.py's own folder: unset PYTHONSAFEPATH, and do not use -P or -I"),
        (["-OO"], "transformers does not work without docstrings: unset PYTHONOPTIMIZE, and do not use -OO"),
    ],
)
def test_options_of_python_that_do_not_fit_are_a_one_line_error(options: list[str], message: str) -> None:
    command = [sys.executable, *options, str(ROOT / "main.py"), "--mode", "train", "--config", "demo/config.yaml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, f"error: {message}\n")


def test_windows_is_told_to_use_wsl(tmp_path: Path) -> None:
    missing = "raise ModuleNotFoundError(\"No module named 'fcntl'\", name='fcntl')"
    (tmp_path / "fcntl.py").write_text(missing)
    command = [sys.executable, str(ROOT / "main.py"), "--mode", "train", "--config", str(ROOT / "config.yaml")]
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "error: this program needs Linux or macOS: on Windows, run it in WSL"


def test_a_current_folder_that_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert main.main(["--mode", "train"]) == 2
    assert capsys.readouterr().err == "error: the current folder has been deleted: change to another one with `cd`\n"


def test_no_folder_for_temporary_files(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr("tempfile._candidate_tempdir_list", lambda: ["/nowhere/at all"])
    assert main.main(["--mode", "train"]) == 4
    assert "set the environment variable TMPDIR to a folder that you can write to" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["--config", "the current folder", "TMPDIR", "images_dir"])
def test_a_path_that_is_not_utf8_is_refused_first(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    odd, settings = tmp_path / "\udcff", tmp_path / "c.yaml"
    odd.mkdir()
    settings.write_text("")
    if where == "the current folder":
        monkeypatch.chdir(odd)
    if where == "TMPDIR":
        monkeypatch.setattr("tempfile.tempdir", str(odd))
    overrides = [f"images_dir={odd}"] if where == "images_dir" else []
    assert main.main(["--mode", "train", "--config", str(odd if where == "--config" else settings), *overrides]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(
        rf"error: (command line: )?{where}\W.*\\udcff.* is not UTF-8 text: change or rename it\n", error
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_while_drawing_is_a_one_line_message(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text("")
    monkeypatch.setattr("inference.run", lambda *_: os.kill(os.getpid(), number))
    before = signal.getsignal(signal.SIGTERM)
    # A shell starts its background jobs with SIGINT ignored; a program in the foreground has the default handler.
    shells = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main.main(["--mode", "inference", "--config", str(tmp_path / "config.yaml")]) == 128 + number
    finally:
        signal.signal(signal.SIGINT, shells)
    assert "run the same command again to continue" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before
