"""The folder that pictures are drawn into: which one it is, the files in it, and its manifest.json."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lace_lora.config import Config
from lace_lora.drawing import refining
from lace_lora.drawing.plan import Plan
from lace_lora.files import json_digest, numbered, write_atomically
from lace_lora.pictures.gallery import CONTACT_SHEET, MANIFEST, PAGE
from lace_lora.pictures.recipe import Design

# Inside the output folder: the latents of each phase, until all is done, and how the pictures were before refining.
UNFINISHED, BEFORE = ".unfinished", ".before_refining"


def choose_folder(wanted: Path, recipe: dict[str, Any]) -> Path:
    """The folder for this recipe: `wanted`, or `wanted-2`, `wanted-3` … where that holds other pictures."""
    return next(folder for folder in numbered(wanted.parent, wanted.name) if is_free_for(folder, recipe))


def is_free_for(folder: Path, recipe: dict[str, Any]) -> bool:
    """Whether the folder holds no pictures, or those of this recipe. A manifest alone is of a run that was refused."""
    ours = ("refined_output_*", "base_output_*", PAGE, CONTACT_SHEET, f"{UNFINISHED}/*/*.safetensors")
    return _is_of(folder, recipe) or not any(any(folder.glob(pattern)) for pattern in ours)


def _is_of(folder: Path, recipe: dict[str, Any]) -> bool:
    try:
        recorded = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["recipe"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(recorded == json.loads(json.dumps(recipe)))


@dataclass(frozen=True)
class PictureFiles:
    """Where one design is saved; None for a picture that is not wanted."""

    refined: Path | None
    base: Path | None
    before: Path  # for refining.save_before, which adds a suffix

    @property
    def shown(self) -> Path:
        """The picture that contact sheet and page show."""
        path = self.refined or self.base
        assert path is not None
        return path

    @property
    def by_kind(self) -> dict[str, Path]:
        return {kind: path for kind, path in (("refined", self.refined), ("base", self.base)) if path}

    @property
    def all_exist(self) -> bool:
        return all(path.exists() for path in self.by_kind.values())


def files_of(design: Design, folder: Path, config: Config) -> PictureFiles:
    refined, base = (folder / design.file_name(config.image_format, refined) for refined in (True, False))
    return PictureFiles(
        refined if config.refine else None,
        base if config.save_base or not config.refine else None,
        folder / BEFORE / f"{design.index:03d}",
    )


def missing_designs(plan: Plan, folder: Path) -> list[Design]:
    return [design for design in plan.designs if not files_of(design, folder, plan.config).all_exist]


class Manifest:
    """manifest.json: the recipe, the batch size, and for each picture its files and how refining changed it."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.folder, self.plan = folder, plan
        self.path = folder / MANIFEST
        self.batch_size: int | None = plan.config.inference_batch_size or self._recorded_batch_size()

    def _recorded_batch_size(self) -> int | None:
        if not _is_of(self.folder, self.plan.recipe):
            return None
        size = json.loads(self.path.read_text(encoding="utf-8")).get("batch_size")
        return size if isinstance(size, int) and size > 0 else None

    def files(self, design: Design) -> PictureFiles:
        return files_of(design, self.folder, self.plan.config)

    def missing_batches(self, size: int) -> list[Sequence[Design]]:
        """The batches with a missing picture; `size` counts where neither settings nor an earlier run have chosen one.

        Who shares a batch is recorded before anything is drawn, so that a resumed run draws the very same pictures.
        """
        self.batch_size = size = self.batch_size or size
        self.write()
        designs = self.plan.designs
        batches = [designs[start : start + size] for start in range(0, len(designs), size)]
        return [batch for batch in batches if not all(self.files(design).all_exist for design in batch)]

    def latents_folder(self) -> Path:
        """For the latents of this recipe in these batches, and of no others."""
        return self.folder / UNFINISHED / json_digest([self.plan.recipe, self.batch_size])

    def write(self) -> list[dict[str, float]]:
        """Returns how refining changed each picture, as far as that is known now."""
        rows, measured = [], []
        for design in self.plan.designs:
            files = self.files(design)
            names = {kind: path.name for kind, path in files.by_kind.items()}
            row = {"prompt": design.prompt, "seed": design.seed, "files": names}
            changes = refining.read_changes(files.before)
            rows.append(row | {"refining": changes} if changes else row)
            measured.append(changes)
        content = {"recipe": self.plan.recipe, "batch_size": self.batch_size, "pictures": rows}
        write_atomically(self.path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
        return measured
