"""What a folder of photos has besides good pictures: copies, odd ones, files that are not used, and what to set."""

import os
import re
import statistics
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from lace_lora.config import IMAGE_EXTENSIONS
from lace_lora.pictures.checking import Picture
from lace_lora.pictures.image_files import visible_entries

MANY_FOLDERS = 1000  # as many subfolders are looked into for pictures that are not used
_SCREENSHOT = re.compile(r"screen.?shot|bildschirmfoto|capture d.[ée]cran|ekran|captura", re.IGNORECASE)


def without_duplicates(
    pictures: Sequence[Picture], image_dir: str | Path, captions: Mapping[Path, object] | None = None
) -> list[Picture]:
    """The same pictures, but of equal files only one is not skipped.

    One that is in `captions`, which may be files, stays, and of several the one with the shortest name: `a.jpg` rather
    than its copy `a (1).jpg`. Of another with another caption the reason says that it is not used.
    """
    captions = captions or {}
    first: dict[str, Path] = {}
    for picture in sorted(pictures, key=lambda one: (one.path not in captions, len(one.path.name))):
        if picture.used:
            first.setdefault(picture.sha256, picture.path)
    kept = set(first.values())

    def skipped(picture: Picture, same: Path) -> Picture:
        unused = captions.get(picture.path, captions.get(same)) != captions.get(same)
        lost = ", but its own caption is not used" if unused else ""
        return replace(picture, reason=f"duplicate: equal to {shown(same, image_dir)}{lost}")

    return [
        skipped(picture, first[picture.sha256]) if picture.used and picture.path not in kept else picture
        for picture in pictures
    ]


def odd_ones(pictures: Sequence[Picture], image_dir: str | Path) -> list[str]:
    """Pictures unlike the others, each with the reason; none unless two thirds of all name their camera."""
    if not pictures or 3 * sum(picture.camera for picture in pictures) < 2 * len(pictures):
        return []
    shape = statistics.median(max(p.width, p.height) / min(p.width, p.height) for p in pictures)
    size = statistics.median(p.width * p.height for p in pictures)
    found = []
    for picture in pictures:
        long, short = max(picture.width, picture.height), min(picture.width, picture.height)
        reasons = {
            "a screenshot by its name": _SCREENSHOT.search(picture.path.name),
            "no camera named, as in a screenshot or a picture from a messenger": not picture.camera,
            "another shape": not 1 / 1.6 < long / short / shape < 1.6,
            "much smaller": 16 * long * short < size,
        }
        if why := [reason for reason, holds in reasons.items() if holds]:
            found.append(f"{shown(picture.path, image_dir)} ({why[0]}, {picture.width}x{picture.height})")
    return found


def count_files(
    image_dir: str | Path, recursive: bool, without: Collection[Path] = ()
) -> tuple[Counter[str], Counter[str]]:
    """How many files there are by extension, and how many more in subfolders that are not looked at."""
    here = Counter(path.suffix.lower() for path in visible_entries(image_dir, recursive, without) if not path.is_dir())
    below: Counter[str] = Counter()
    for folder, folders, names in islice([] if recursive else os.walk(image_dir), MANY_FOLDERS):
        folders[:] = [name for name in folders if name[0] != "." and Path(folder, name).resolve() not in without]
        if folder != str(image_dir):
            below.update(Path(name).suffix.lower() for name in names if name[0] != ".")
    return here, below


def nothing_usable(
    image_dir: str | Path, extensions: Collection[str], recursive: bool, without: Collection[Path] = ()
) -> str:
    """What a folder without a usable picture has, and what to set."""
    here, below = count_files(image_dir, recursive, without)
    wanted = {extension.lower() for extension in extensions}
    known = [counts(dict(here.most_common(5))) or "no files"]
    known += [f"{counts(dict(below.most_common(5)))} in subfolders"] if below else []
    advice = ["see the list above"] if wanted & here.keys() else []
    advice += [more] if (more := more_extensions(extensions, here)) else []
    if wanted & below.keys():
        advice.append("set recursive: true")
    elif more := more_extensions(extensions, below):
        advice.append(f"set recursive: true, and {more}")
    return f"{image_dir} has {', and '.join(known)}: {', or '.join([*advice, 'set images_dir to another folder'])}"


def more_extensions(extensions: Collection[str], counts: Collection[str]) -> str:
    """What to set to use files of other extensions, if any of them can be used."""
    more = [kind for kind in IMAGE_EXTENSIONS if kind in counts and kind not in map(str.lower, extensions)]
    return f"set image_extensions: [{', '.join([*extensions, *more])}]" if more else ""


def counts(kinds: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {kind or 'without extension'}" for kind, count in kinds.items())


def shown(path: Path, image_dir: str | Path) -> str:
    """A path as a message has it: from the folder of pictures on, or the name alone where it is elsewhere."""
    return str(path.relative_to(image_dir)) if path.is_relative_to(image_dir) else path.name
