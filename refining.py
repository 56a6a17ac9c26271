"""How far refining moved each picture, so that a user sees where it washed the style out."""

import statistics
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageFilter, ImageStat

# A picture's edges may weaken by so much; of how far it moved, it may stand out by so many typical deviations.
MOST_WEAKENED, MOST_APART = 0.1, 4.0


def compare(base: Image.Image, refined: Image.Image, latent_change: float | None) -> dict[str, float]:
    """What the manifest notes of one picture: `latent_change` and `edge_change`, both relative to the base's."""
    before, after = _edges(base), _edges(refined)
    changes = {"edge_change": round(after / before - 1, 4) if before else 0.0}
    return changes if latent_change is None else {"latent_change": round(latent_change, 4)} | changes


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
