"""The folder of pictures: finding them, the annotations that training reads, and the report on them."""

import hashlib
import json
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lace_lora.config import IMAGE_EXTENSIONS
from lace_lora.errors import DISK_OR_DRIVE, UserError, disk_advice
from lace_lora.files import file_sha256, write_atomically
from lace_lora.pictures.image_files import Picture, named_as_pictures, visible_entries

logger = logging.getLogger(__name__)

ANNOTATIONS = "annotations.txt"
_RECORD = ".annotations.sha256"  # hashes of the annotations that this program wrote; others are the user's own


@dataclass(frozen=True)
class Annotations:
    """Where the annotations are or will be, their lines, and whether the file is the user's own."""

    path: Path
    captions: dict[Path, str]
    by_user: bool


def list_images(image_dir: str | Path, extensions: Collection[str] = frozenset({".jpg"})) -> list[Path]:
    """The picture files of a folder, sorted by name; extensions match in either case, hidden files never do.

    Raises:
        UserError: the folder is missing or cannot be read.
    """
    return [path for path in named_as_pictures(image_dir, extensions) if not path.is_dir()]


def plan_annotations(
    image_dir: str | Path, prompt: str, images: Iterable[Path], fallback_dir: str | Path
) -> Annotations:
    """What `create_annotations` would write for `images`, or what the user's own file already says; writes nothing.

    Raises:
        UserError: a path with a tab or line break, a caption file that is not UTF-8, a broken line in a user's file.
    """
    beside = Path(image_dir, ANNOTATIONS)
    path = beside if os.access(image_dir, os.W_OK) else Path(fallback_dir, ANNOTATIONS)
    for candidate in (path, beside):  # a user's file in a read-only folder is used too
        if candidate.exists() and file_sha256(candidate) not in _recorded(candidate):
            return Annotations(candidate, read_annotations(candidate), by_user=True)
    return Annotations(path, {image: _caption(image, prompt) for image in images}, by_user=False)


def create_annotations(
    image_dir: str | Path,
    prompt: str,
    extensions: Collection[str] = frozenset({".jpg"}),
    fallback_dir: str | Path | None = None,
) -> Path:
    r"""Write `annotations.txt`, a line `<image_path>\t<prompt>` for every picture, and return its path.

    A caption file next to a picture (`lace_001.txt`) replaces the prompt. The file is in `image_dir`, or in
    `fallback_dir` if that is read-only; one that this program did not write, or that was edited by hand, is unchanged.

    Raises:
        UserError: see `plan_annotations` and `write_annotations`.
    """
    images = list_images(image_dir, extensions)
    return write_annotations(plan_annotations(image_dir, prompt, images, fallback_dir or image_dir))


def write_annotations(plan: Annotations) -> Path:
    """Write what `plan_annotations` planned, unless the file is the user's own; returns its path.

    Raises:
        UserError: the file cannot be written (exit 4).
    """
    if plan.by_user:
        logger.info("%s was written or edited by hand; using it unchanged", plan.path)
        return plan.path
    content = "".join(f"{image}\t{caption}\n" for image, caption in plan.captions.items()).encode()
    try:
        plan.path.parent.mkdir(parents=True, exist_ok=True)
        # The new hash and the previous one: after a kill between the two writes, either file is recognised.
        hashes = dict.fromkeys([hashlib.sha256(content).hexdigest(), *_recorded(plan.path)[:1]])
        write_atomically(plan.path.with_name(_RECORD), "".join(f"{digest}\n" for digest in hashes).encode())
        write_atomically(plan.path, content)
    except OSError as error:
        advice = disk_advice(error) or "rename what is there, or choose another folder"
        raise UserError(f"cannot write {plan.path} ({error.strerror}): {advice}", DISK_OR_DRIVE) from error
    return plan.path


def read_annotations(path: Path) -> dict[Path, str]:
    """Captions by picture, in the order of the file.

    Raises:
        UserError: the file is not UTF-8, or a line is not `<image_path>\\t<prompt>`.
    """
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error}); save it as UTF-8, or delete it") from error
    captions: dict[Path, str] = {}
    for number, line in enumerate(lines, 1):
        image, tab, caption = line.rstrip("\r").partition("\t")
        if not line.strip():
            continue
        if not tab or not image or not caption.strip():
            raise UserError(
                f"{path}:{number}: expected a picture's path, a tab and its caption; fix the line, or delete the file"
            )
        captions[Path(image)] = caption.strip()
    return captions


def _recorded(annotations: Path) -> list[str]:
    """The hashes of what we wrote there, the newest first."""
    record = annotations.with_name(_RECORD)
    return record.read_text(errors="replace").split() if record.exists() else []


def _caption(image: Path, prompt: str) -> str:
    name = str(image)
    if any(letter in "\t\n\r" or "\udc80" <= letter <= "\udcff" for letter in name):
        raise UserError(
            f"{name!r}: a path in {ANNOTATIONS} cannot have a tab, a line break or invalid UTF-8; rename the file"
        )
    beside = image.with_suffix(".txt")
    if beside.name != ANNOTATIONS and beside.is_file():
        try:
            prompt = " ".join(beside.read_bytes().decode("utf-8-sig").split()) or prompt
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{beside}: this caption cannot be read as UTF-8 text; save it again as UTF-8") from error
    return " ".join(prompt.split())


def report_text(image_dir: str | Path, pictures: Sequence[Picture], annotations: Annotations, prompt: str) -> str:
    """The dataset report, which fits on a screen however many pictures there are."""
    used = [picture for picture in pictures if picture.used]
    lines = [f"Pictures in {image_dir}: {len(used)} used, {len(pictures) - len(used)} skipped"]
    if used:
        small, large = (pick(used, key=lambda p: p.width * p.height) for pick in (min, max))
        lines.append(f"  sizes        {small.width}x{small.height} to {large.width}x{large.height}")
    kinds = defaultdict(list)
    for picture in pictures:
        if picture.reason:
            kind, _, why = picture.reason.partition(": ")
            kinds[kind].append(f"{picture.path.name} ({why})")
    lines += [f"  {kind:<12} {len(names)}: {_few(names)}" for kind, names in kinds.items()]
    same = defaultdict(list)
    for picture in used:
        same[picture.sha256].append(picture.path.name)
    groups = [" = ".join(names[:4]) for names in same.values() if len(names) > 1]
    if groups:
        lines.append(f"  duplicates   {len(groups)} (all are used): {_few(groups)}")
    extensions = {picture.path.suffix.lower() for picture in pictures}
    others = Counter(path.suffix.lower() for path in visible_entries(image_dir) if not path.is_dir())
    counts = {kind: others[kind] for kind in sorted(others) if kind not in {"", ".txt", *extensions}}
    if counts:
        lines.append("  other files  " + ", ".join(f"{count} {kind}" for kind, count in counts.items()))
        if readable := [kind for kind in counts if kind in IMAGE_EXTENSIONS]:
            all_kinds = dict.fromkeys([".jpg", *sorted(extensions), *readable])
            lines.append(f"               to use them, set image_extensions: [{', '.join(all_kinds)}]")
    plain = " ".join(prompt.split())
    own = sum(caption != plain for caption in annotations.captions.values())
    generated = f"{own} from .txt files next to the pictures, the others {plain!r}"
    origin = f"from your own {annotations.path}" if annotations.by_user else generated
    lines.append(f"  captions     {len(annotations.captions)}: {origin}")
    # A file name may have bytes that are not UTF-8, which a terminal cannot print.
    return "\n".join(lines).encode(errors="backslashreplace").decode()


def report_json(pictures: Sequence[Picture]) -> str:
    rows = [{"path": str(p.path), "taken": p.used, "reason": p.reason or None, "width": p.width, "height": p.height}
            for p in pictures]  # fmt: skip
    return json.dumps({"pictures": rows}, indent=2, ensure_ascii=False) + "\n"


def _few(names: Sequence[str]) -> str:
    return "; ".join([*names[:3], f"and {len(names) - 3} more"] if len(names) > 3 else names)
