"""Would what is drawn hold together as lace? Counted in pictures of light threads on darker cloth.

What is lighter than a local threshold is thread. Loose ends and loose pieces grow where threads are broken. Blur hides
both, because it closes gaps; the thread width then grows.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.filters import threshold_otsu
from skimage.morphology import skeletonize
from torch import Tensor

Mask = NDArray[np.bool_]  # [height, width]
LIGHT = 0.3  # of the way from the cloth's lightness to the threads': shaded threads are thread too
DUST = 8  # pixels: what is smaller is no thread
MARGIN = 16  # pixels beyond the border, so that threads that leave the picture do not end in it
NEIGHBOURS = np.ones((3, 3))


@dataclass(frozen=True)
class Soundness:
    """Means over a set of pictures."""

    loose_ends: float  # ends of threads
    loose_pieces: float  # pieces that touch neither the largest one nor the border
    largest_share: float  # share of all thread in the largest piece, from 0 to 1
    thread_width: float  # pixels; where threads are woven to cloth, the cloth's

    def __str__(self) -> str:
        return (
            f"loose ends per picture {self.loose_ends:.1f}, loose pieces {self.loose_pieces:.1f}, "
            f"{self.largest_share:.1%} of the thread in one piece, threads {self.thread_width:.1f} pixels wide"
        )


def soundness(pictures: Tensor) -> Soundness:
    """How well the threads in pictures (n, 3, h, w) from 0 to 1 hold together."""
    found = [inspect(threads(lightness)) for lightness in pictures.mean(1).numpy()]
    return Soundness(*np.mean(found, axis=0).tolist())


def mask_agreement(before: Tensor, after: Tensor) -> float:
    """Intersection over union of the threads in two sets of pictures (n, 3, h, w) from 0 to 1, mean over pictures."""
    pairs = zip(before.mean(1).numpy(), after.mean(1).numpy(), strict=True)
    masks = [(threads(one), threads(other)) for one, other in pairs]
    return float(np.mean([(one & other).sum() / max((one | other).sum(), 1) for one, other in masks]))


def threads(lightness: NDArray[Any]) -> Mask:
    """Where there is thread: lighter than `LIGHT` of the way from cloth to thread around it, because lamps fall off."""
    rough = lightness > threshold_otsu(lightness)
    if not rough.any():
        return rough

    def around(there: Mask) -> NDArray[Any]:
        """Mean lightness of what is `there` around each pixel; where that is next to nothing, in the picture."""
        mean = lightness[there].mean()
        sums, weights = (
            ndimage.gaussian_filter(image, min(there.shape) / 8) for image in ((lightness - mean) * there, there * 1.0)
        )
        return mean + sums / (weights + 0.01)

    cloth, thread = around(~rough), around(rough)
    mask: Mask = lightness > cloth + LIGHT * (thread - cloth)
    pieces, sizes = label(mask)
    return mask & (sizes > DUST)[pieces]


def inspect(mask: Mask) -> tuple[int, int, float, float]:
    """Loose ends, loose pieces, share of the largest piece, and mean width of the threads."""
    pieces, sizes = label(mask)
    at_border = np.ones_like(mask)
    at_border[1:-1, 1:-1] = False
    loose = ~np.isin(np.arange(len(sizes)), pieces[at_border]) & (sizes > 0)
    loose[sizes.argmax()] = False

    mask = np.pad(mask, MARGIN, mode="edge")
    depth = ndimage.distance_transform_edt(mask)
    skeleton = prune(skeletonize(mask), depth)
    inside = (slice(MARGIN + 1, -MARGIN - 1),) * 2
    ends = (skeleton & (neighbours(skeleton) == 1))[inside].sum()
    width = 2 * depth[skeleton].sum() / max(skeleton.sum(), 1)
    return int(ends), int(loose.sum()), float(sizes.max() / max(sizes.sum(), 1)), float(width)


def prune(skeleton: Mask, depth: NDArray[Any]) -> Mask:
    """The skeleton without spurs, branches to an end that are shorter than the thread is wide where they leave it."""
    count = neighbours(skeleton)
    forks = skeleton & (count > 2)
    branches, sizes = label(skeleton & ~forks)
    width = 2 * ndimage.maximum_filter(depth * forks, 3)
    widths = np.zeros(len(sizes))
    np.maximum.at(widths, branches.ravel(), width.ravel())
    ended = np.isin(np.arange(len(sizes)), branches[skeleton & (count < 2)])
    return skeletonize(skeleton & ~(ended & (sizes < widths))[branches])


def label(mask: Mask) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Each pixel's piece, corners touching, and the pieces' sizes; piece 0 is what is in none, of size 0."""
    pieces, _ = ndimage.label(mask, NEIGHBOURS)
    sizes = np.bincount(pieces.ravel())
    sizes[0] = 0
    return pieces, sizes


def neighbours(skeleton: Mask) -> NDArray[np.int64]:
    return skeleton * (ndimage.convolve(skeleton.astype(int), NEIGHBOURS.astype(int), mode="constant") - 1)
