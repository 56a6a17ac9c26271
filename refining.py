"""How far refining moved each picture, so that a user sees where it washed the style out."""

import io
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageFilter, ImageStat

from data_utils import write_atomically
from image_files import BROKEN

# A picture's edges may weaken by so much; of how far it moved, it may stand out by so many typical deviations.
MOST_WEAKENED, MOST_APART = 0.1, 4.0


def save_before(path: Path, base: Image.Image, refined: Image.Image, latent_change: float) -> None:
    """Keep what a picture was before refining, as a JPEG for the page, with how far that moved it as its comment."""
    content, comment = io.BytesIO(), json.dumps(compare(base, refined, latent_change)).encode()
    base.save(content, format="JPEG", quality=90, comment=comment)
    write_atomically(path, content.getvalue())


def read_changes(path: Path) -> dict[str, float]:
    """What `save_before` noted; nothing where it was not there, as of pictures that nobody refined."""
    try:
        with Image.open(path, formats=("JPEG",)) as picture:
            said = json.loads(picture.info["comment"])
            return {name: float(said[name]) for name in ("latent_change", "edge_change")}
    except (*BROKEN, KeyError, TypeError):
        return {}


def compare(base: Image.Image, refined: Image.Image, latent_change: float) -> dict[str, float]:
    """What is noted of one picture: `latent_change` and `edge_change`, both relative to the base's."""
    before, after = _edges(base), _edges(refined)
    edge_change = after / before - 1 if before else 0.0
    return {"latent_change": round(latent_change, 4), "edge_change": round(edge_change, 4)}


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
