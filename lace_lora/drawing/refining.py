"""How far refining moved each picture, so that a user sees where it washed the style out."""

import io
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageFilter, ImageStat

from lace_lora.files import write_atomically

# A picture's edges may weaken by so much; of how far it moved, it may stand out by so many typical deviations.
MOST_WEAKENED, MOST_APART = 0.1, 4.0


def save_before(path: Path, base: Image.Image | None, refined: Image.Image, latent_change: float) -> None:
    """Keep how far refining moved a picture, as `path`.json, and what it was before, if known, as `path`.jpg."""
    write_atomically(path.with_suffix(".json"), json.dumps(compare(base, refined, latent_change)).encode())
    if base:
        content = io.BytesIO()
        base.save(content, format="JPEG", quality=90)
        write_atomically(path.with_suffix(".jpg"), content.getvalue())


def read_changes(path: Path) -> dict[str, float]:
    """What `save_before` noted; nothing where it was not there, as of pictures that nobody refined."""
    try:
        said = json.loads(path.with_suffix(".json").read_bytes())
        return {name: float(said[name]) for name in ("latent_change", "edge_change") if name in said}
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


def compare(base: Image.Image | None, refined: Image.Image, latent_change: float) -> dict[str, float]:
    """What is noted of one picture: `latent_change` and, if there is a base's, `edge_change`, both relative to it."""
    changes = {"latent_change": round(latent_change, 4)}
    if base:
        before, after = _edges(base), _edges(refined)
        changes["edge_change"] = round(after / before - 1 if before else 0.0, 4)
    return changes


def _edges(picture: Image.Image) -> float:
    """The mean strength of edges, 0..255, leaving out the border, where the filter gives back the picture."""
    width, height = picture.size
    edges = picture.convert("L").filter(ImageFilter.FIND_EDGES).crop((1, 1, width - 1, height - 1))
    return ImageStat.Stat(edges).mean[0]


def warnings(measured: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence for each picture that refining changed much, empty for the others."""
    moves = [changes["latent_change"] for changes in measured if "latent_change" in changes]
    middle = statistics.median(moves) if moves else 0.0
    # 1.4826: of a normal distribution, the standard deviation by the median one.
    spread = 1.4826 * statistics.median(abs(move - middle) for move in moves) if moves else 0.0
    return [_warning(changes, middle, spread) for changes in measured]


def _warning(changes: dict[str, Any], middle: float, spread: float) -> str:
    advice = "if you miss the style here, lower refiner_strength"
    if changes.get("edge_change", 0.0) < -MOST_WEAKENED:
        return f"refining softened it by {-changes['edge_change']:.0%}: {advice}"
    if changes.get("latent_change", 0.0) > middle + max(MOST_APART * spread, 0.1 * middle):
        return f"refining changed it more than the others: {advice}"
    return ""
