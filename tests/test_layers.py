"""How the parts depend on one another: what import-linter, which sees packages only, does not show."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers import ROOT, jpgs

MODULES = sorted((ROOT / "lace_lora").rglob("*.py"))
OUTSIDE = {path.stem for path in ROOT.glob("*.py")} | {"demo", "benchmarks", "tests"}

# Runs main.py's own main with each command line, and tells what is loaded after it.
PROBE = """
import sys
import main
for line in sys.stdin.read().split("\\n"):
    try:
        code = main.main(line.split())
    except SystemExit as end:
        code = end.code
    heavy = sorted({"torch", "diffusers", "transformers", "accelerate", "peft"} & set(sys.modules))
    print(f"[{line}] {code} {heavy}")
"""


def imported_modules(path: Path) -> set[str]:
    """The first part of the name of each module that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module, f"{path}: a relative import"
            found.add(node.module.partition(".")[0])
    return found


def work_on_import(statements: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a module that do more than to import and to define names."""
    for statement in statements:
        match statement:
            case ast.Import() | ast.ImportFrom() | ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                pass
            case ast.Expr(value=ast.Constant()):  # a docstring
                pass
            case ast.If(test=ast.Compare(left=ast.Name("__name__"))):
                pass
            case ast.If(body=body, orelse=other):
                yield from work_on_import([*body, *other])
            case ast.Assign(targets=targets) if all(isinstance(target, ast.Name | ast.Tuple) for target in targets):
                pass
            case ast.AnnAssign(target=ast.Name()):
                pass
            case _:
                yield statement


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_the_package_only_and_does_no_work_when_imported(path: Path) -> None:
    assert {"main", "train", "train_lora", "inference", "data_utils"} < OUTSIDE
    assert not imported_modules(path) & OUTSIDE
    assert not [ast.unparse(statement) for statement in work_on_import(ast.parse(path.read_text()).body)]


def test_work_on_import_is_recognised() -> None:
    for code in ("os.environ['A'] = '1'", "set_verbosity()", "if LINUX:\n    mallopt()", "for a in b:\n    a()"):
        assert list(work_on_import(ast.parse(code).body)), code
    harmless = "'''Title.'''\nimport os\nA, B = 1, 2\nC: int = 3\ndef f(): g()\nif __name__ == '__main__':\n    f()"
    assert not list(work_on_import(ast.parse(harmless).body))


def test_every_init_is_empty() -> None:
    inits = [path for path in MODULES if path.name == "__init__.py"]
    assert {path.parent for path in inits} == {path.parent for path in MODULES}
    assert not [path for path in inits if path.read_bytes()]


def test_help_and_dry_run_do_not_load_torch(tmp_path: Path) -> None:
    jpgs(tmp_path / "photos")
    folders = "images_dir: photos\nlora_output_dir: lora\noutput_dir: out\n"
    (tmp_path / "config.yaml").write_text(f"{folders}min_image_size: 16\ndevice: cpu\n")
    codes = {
        "": 0,
        "--help": 0,
        "--mode train lerning_rate=1": 2,
        "--mode train --dry-run": 0,
        "--mode train --dry-run caption_model=lace/captions": 0,
        "--mode train --dry-run with_prior_preservation=true class_prompt=net": 0,
        "--mode inference --dry-run lora_scale=0": 0,
        "--mode inference --dry-run": 2,
    }
    done = subprocess.run(
        [sys.executable, "-c", PROBE], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, input="\n".join(codes),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    printed = [line for line in done.stdout.splitlines() if line.startswith("[")]
    assert printed == [f"[{line}] {code} []" for line, code in codes.items()], done.stderr
