"""What the documents say is true: commands, modules, targets, settings, links, files."""

import dataclasses
import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest

import main
from helpers import ROOT, jpgs, main_py, snapshot
from lace_lora.config import Config, describe, load_config

DOCUMENTS = ("README.md", "documentation.md", "CHANGELOG.md", "benchmarks/README.md")


def code_lines(document: str) -> list[str]:
    """Lines of the fenced blocks of a page, or of a notebook's code cells; continued lines are joined."""
    text = (ROOT / document).read_text(encoding="utf-8")
    if document.endswith(".ipynb"):
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
        blocks = ["".join(cell["source"]) for cell in cells]
    else:
        blocks = re.findall(r"^ *```\w*\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    # Inline commands count too, except those with a gap to fill in.
    blocks += [
        inline for inline in re.findall(r"`(!?(?:python main\.py|%run main\.py)[^`]*)`", text) if "…" not in inline
    ]
    return [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def main_py_commands(document: str) -> list[list[str]]:
    found = []
    for line in code_lines(document):
        if command := re.match(r"(?:!|%run )?(?:python )?main\.py\b(.*)", line):
            found.append(shlex.split(command[1], comments=True))
    return found


COMMANDS = [
    pytest.param(arguments, id=f"{document}: {shlex.join(arguments)}")
    for document in ("README.md", "documentation.md", "lace_lora.ipynb")
    for arguments in main_py_commands(document)
]


def test_there_are_commands_to_check() -> None:
    assert len(COMMANDS) > 20


@pytest.mark.parametrize("arguments", COMMANDS)
def test_a_command_parses(arguments: list[str], tmp_path: Path) -> None:
    if not arguments or arguments == ["--help"]:
        return
    options = main.build_parser().parse_intermixed_args(arguments)
    file = ROOT / options.config
    if not file.exists():  # the reader's own settings file
        file = tmp_path / "mine.yaml"
        file.write_text("")
    assert isinstance(load_config(file, options.overrides), Config)


def test_the_commands_that_only_print_run(capsys: pytest.CaptureFixture[str]) -> None:
    for document, arguments in ("README.md", []), ("documentation.md", ["--help"]):
        assert arguments in main_py_commands(document)
    assert main.main([]) == 0
    with pytest.raises(SystemExit, match="^0$"):
        main.main(["--help"])
    assert capsys.readouterr().out.count(describe()) == 2


def test_a_dry_run_as_shown_runs_and_writes_nothing(tmp_path: Path) -> None:
    arguments = ["--mode", "train", "--dry-run"]
    assert arguments in main_py_commands("documentation.md")
    jpgs(tmp_path / "photos")
    folders = f"images_dir: {tmp_path}/photos\nlora_output_dir: {tmp_path}/lora\noutput_dir: {tmp_path}/out\n"
    (tmp_path / "config.yaml").write_text(folders + "min_image_size: 16\ndevice: cpu\n")
    before = snapshot(tmp_path)
    done = main_py(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("document", [*DOCUMENTS, "demo/model/README.md"])
def test_modules_exist(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    started = set(re.findall(r"python -m ([\w.]+)", text)) - {"venv", "pip"}
    imported = set(
        re.findall(r"^(?:from|import) ((?:lace_lora|demo|benchmarks|main|train|inference)\b[\w.]*)", text, re.M)
    )
    for module in started | imported:
        assert importlib.util.find_spec(module), module


def test_what_the_manual_imports_is_there() -> None:
    [line] = [line for line in code_lines("documentation.md") if line.startswith("from lace_lora")]
    exec(line, {})


@pytest.mark.parametrize("document", DOCUMENTS)
def test_targets_of_make_exist(document: str) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    text = (ROOT / document).read_text(encoding="utf-8")
    for target in re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE):
        assert target in targets


def test_the_manual_lists_every_setting_with_default_and_explanation() -> None:
    text = (ROOT / "documentation.md").read_text(encoding="utf-8")
    section = text[text.index("## 6. All settings") : text.index("## 7.")]
    rows = {
        key: (default, explanation)
        for key, default, explanation in re.findall(r"^\| `(\w+)` \| (.*?) \| (.*) \|$", section, re.MULTILINE)
    }
    in_file = dict(re.findall(r"^(\w+): *(.*?)  # ", (ROOT / "config.yaml").read_text(), re.MULTILINE))
    assert list(rows) == list(Config.__dataclass_fields__)
    for key, (default, explanation) in rows.items():
        assert default.strip("`") == in_file[key].strip(), key
        assert explanation == Config.__dataclass_fields__[key].metadata["explanation"]


def test_the_manual_groups_settings_as_they_are_declared() -> None:
    text = (ROOT / "documentation.md").read_text(encoding="utf-8")
    section = text[text.index("## 6. All settings") : text.index("## 7.")]
    first = re.findall(r"^### (.*?)$.*?^\| `(\w+)`", section, re.MULTILINE | re.DOTALL)
    assert {heading.lower(): key for heading, key in first} == {
        item.metadata["group"]: item.name for item in dataclasses.fields(Config) if "group" in item.metadata
    }


@pytest.mark.parametrize("document", DOCUMENTS)
def test_local_links_lead_somewhere(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in anchors
        elif not target.startswith("https://"):
            assert (ROOT / document).parent.joinpath(target).exists(), target


def test_the_directory_structure_names_what_is_there() -> None:
    block = (ROOT / ".notes" / "directory_structure.md").read_text(encoding="utf-8").split("```")[1]
    folders: list[tuple[int, str]] = []  # those that a line stands in, each with its indentation
    named = set()
    for line in block.splitlines():
        if not (entry := re.match(r"( *)(\S+)(.*)", line)):
            continue
        while folders and folders[-1][0] >= len(entry[1]):
            folders.pop()
        path = (folders[-1][1] if folders else "") + entry[2]
        if path.endswith("/"):
            folders.append((len(entry[1]), path))
        if "not in git" not in entry[3]:
            assert (ROOT / path).exists(), path
        named.add(path.rstrip("/"))
    modules = [*ROOT.glob("*.py"), *(ROOT / "lace_lora").rglob("*.py"), *(ROOT / "demo").rglob("*.py")]
    assert {str(path.relative_to(ROOT)) for path in modules if path.name != "__init__.py"} <= named


def test_the_notebook_is_clean() -> None:
    notebook = json.loads((ROOT / "lace_lora.ipynb").read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
