import runpy
import sys
from pathlib import Path

import pytest

from lace_lora import fast


def test_all_but_the_kernels_and_patching_can_be_imported_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    needing = {"kernels", "patching"}
    monkeypatch.setitem(sys.modules, "triton", None)  # importing it fails
    for name in needing:
        monkeypatch.setitem(sys.modules, f"lace_lora.fast.{name}", None)
        monkeypatch.delattr(fast, name, raising=False)
    files = list(Path(fast.__path__[0]).glob("*.py"))
    assert needing < {file.stem for file in files}
    for file in files:
        if file.stem not in needing:
            runpy.run_path(str(file))
    with pytest.raises(ImportError):
        runpy.run_path(str(Path(fast.__path__[0]) / "patching.py"))
