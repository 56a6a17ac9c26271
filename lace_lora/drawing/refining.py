"""How much refining changed each picture, so that users see where it washed the style out."""

import io
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageFilter, ImageStat

from lace_lora.files import write_atomically

# A picture is flagged if its edges lost more than this share, or if its latents changed more than the others' did, by
# this many stds.
MAX_EDGE_LOSS, MAX_STDS = 0.1, 4.0


def save_before(path: Path, base: Image.Image | None, refined: Image.Image, latent_change: float) -> None:
    """Write how much refining changed a picture to `path`.json, and the picture before it, if there is one, to .jpg."""
    write_atomically(path.with_suffix(".json"), json.dumps(compare(base, refined, latent_change)).encode())
    if base:
        content = io.BytesIO()
        base.save(content, format="JPEG", quality=90)
        write_atomically(path.with_suffix(".jpg"), content.getvalue())


def compare(base: Image.Image | None, refined: Image.Image, latent_change: float) -> dict[str, float]:
    """`latent_change` as given and, where there is a base, `edge_change`: both as shares of the picture before."""
    changes = {"latent_change": round(latent_change, 4)}
    if base:
        before, after = _edge_strength(base), _edge_strength(refined)
        changes["edge_change"] = round(after / before - 1 if before else 0.0, 4)
    return changes


def _edge_strength(picture: Image.Image) -> float:
    """The mean of the edges, 0..255, without the border, which the filter leaves as it is."""
    width, height = picture.size
    edges = picture.convert("L").filter(ImageFilter.FIND_EDGES).crop((1, 1, width - 1, height - 1))
    return ImageStat.Stat(edges).mean[0]


def read_changes(path: Path) -> dict[str, float]:
    """What `save_before` wrote; empty where there is no such file, as for pictures that are not refined."""
    try:
        content = json.loads(path.with_suffix(".json").read_bytes())
        return {name: float(content[name]) for name in ("latent_change", "edge_change") if name in content}
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


def warnings(measured: Sequence[dict[str, Any]]) -> list[str]:
    """For each picture, a one-line warning if refining changed it too much, else an empty string."""
    changes = [one["latent_change"] for one in measured if "latent_change" in one]
    median = statistics.median(changes) if changes else 0.0
    # A std that outliers do not change: 1.4826 times the median absolute deviation, for a normal distribution.
    std = 1.4826 * statistics.median(abs(change - median) for change in changes) if changes else 0.0
    return [_warning(one, median, std) for one in measured]


def _warning(changes: dict[str, Any], median: float, std: float) -> str:
    advice = "if the style was lost, lower refiner_strength, or raise refiner_start in the ensemble flow"
    if changes.get("edge_change", 0.0) < -MAX_EDGE_LOSS:
        return f"refining softened its edges by {-changes['edge_change']:.0%}: {advice}"
    if changes.get("latent_change", 0.0) > median + max(MAX_STDS * std, 0.1 * median):
        return f"refining changed it more than the others: {advice}"
    return ""
