"""The folder that pictures are drawn into: which one it is, the pictures and files in it, and its manifest.json."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lace_lora.config import Config
from lace_lora.drawing import refining
from lace_lora.drawing.plan import as_trained, find_lora, picture_settings, read_prompts
from lace_lora.files import numbered, write_atomically
from lace_lora.pictures.gallery import CONTACT_SHEET, MANIFEST, PAGE
from lace_lora.pictures.recipe import Design

logger = logging.getLogger(__name__)

# Inside the output folder: the latents of each phase, until the run is finished, and the pictures before refining.
UNFINISHED, BEFORE = ".unfinished", ".before_refining"


def is_there(file: Path) -> bool:
    """Whether a file exists and is not empty, as one of an unfinished copy may be."""
    return file.exists() and file.stat().st_size > 0


class OutputFolder:
    """The folder of the pictures that the settings ask for.

    It is `output_dir`, or `output_dir-2`, `output_dir-3` … where that contains other pictures.

    Raises:
        UserError: the prompts or the LoRA cannot be used.
    """

    def __init__(self, config: Config) -> None:
        self.lora = find_lora(config)
        self.config = config = as_trained(config)
        self.prompts = prompts = read_prompts(config)
        number = config.num_images
        if (unused := len(prompts) - number) > 0:
            text = "no picture for %d of %d prompts, because num_images is %d: raise it to draw all of them"
            logger.warning(text, unused, len(prompts), number)
        self.designs = [Design(index, prompts[index % len(prompts)], config.seed + index) for index in range(number)]
        self.settings = picture_settings(config, self.lora)
        self.recipe = self.settings | {"prompts": prompts}  # what identifies the pictures of a folder
        wanted = Path(config.output_dir)
        if wanted.name in ("", ".."):  # `.` or `..`, of which there is no second
            wanted = wanted.resolve()
        self.path = next(path for path in numbered(wanted.parent, wanted.name) if not self.has_other_pictures(path))

    def has_other_pictures(self, path: Path) -> bool:
        """Whether a folder contains pictures of another recipe. A manifest alone was left by a run that was refused."""
        patterns = ("refined_output_*", "base_output_*", PAGE, CONTACT_SHEET, f"{UNFINISHED}/*/*.safetensors")
        return not self._recorded(path) and any(any(path.glob(pattern)) for pattern in patterns)

    def _recorded(self, path: Path) -> dict[str, Any]:
        """A folder's manifest; empty unless it is one of this recipe."""
        try:
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            return manifest if manifest["recipe"] == json.loads(json.dumps(self.recipe)) else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def files(self, design: Design) -> dict[str, Path]:
        """The files of a design by kind, first the one that contact sheet and page show."""
        wanted = {"refined": self.config.refine, "base": self.config.save_base or not self.config.refine}
        end = f"output_{design.index:03d}.{self.config.image_format}"
        return {kind: self.path / f"{kind}_{end}" for kind, is_wanted in wanted.items() if is_wanted}

    def before(self, design: Design) -> Path:
        """For `refining.save_before`, which adds a suffix."""
        return self.path / BEFORE / f"{design.index:03d}"

    def missing(self) -> list[Design]:
        """The designs with a missing file."""
        return [design for design in self.designs if not all(map(is_there, self.files(design).values()))]

    def batch_size(self) -> int | None:
        """The batch size from the settings or an earlier run; None if neither has one."""
        size = self.config.inference_batch_size or self._recorded(self.path).get("batch_size")
        return size if isinstance(size, int) and size > 0 else None

    def missing_batches(self, at_once: int) -> list[Sequence[Design]]:
        """The batches with a missing picture; `at_once` is the default batch size.

        The batch size is recorded before anything is drawn, so that a resumed run draws identical pictures.
        """
        size = self.batch_size() or at_once
        self.write_manifest(size)
        missing = set(self.missing())
        batches = [self.designs[start : start + size] for start in range(0, len(self.designs), size)]
        return [batch for batch in batches if missing & set(batch)]

    def update_manifest(self) -> None:
        """After a failure: list the pictures that were finished, if anything was drawn."""
        if self._recorded(self.path):
            self.write_manifest(self.batch_size())

    def write_manifest(self, batch_size: int | None) -> list[dict[str, float]]:
        """Write recipe, batch size, and the finished pictures; returns how refining changed each, as far as known."""
        measured = [refining.read_changes(self.before(design)) for design in self.designs]
        rows = []
        for design, changes in zip(self.designs, measured, strict=True):
            if names := {kind: path.name for kind, path in self.files(design).items() if is_there(path)}:
                row = {"prompt": design.prompt, "seed": design.seed, "files": names}
                rows.append(row | {"refining": changes} if changes else row)
        content = {"recipe": self.recipe, "batch_size": batch_size, "pictures": rows}
        write_atomically(self.path / MANIFEST, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
        return measured
