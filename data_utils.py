"""The folder of pictures: finding them, the annotations that training reads, and the report on them."""

import hashlib
import json
import logging
import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lace_lora.errors import DISK_OR_DRIVE, UserError, disk_advice, first_line
from lace_lora.files import CONTROL, counted, few, file_sha256, one_line, read_text, write_atomically
from lace_lora.pictures import photo_folder
from lace_lora.pictures.checking import Picture
from lace_lora.pictures.image_files import named_as_pictures, visible_entries

logger = logging.getLogger(__name__)

ANNOTATIONS = "annotations.txt"
_RECORD = ".annotations.sha256"  # hashes of the annotations that this program wrote; others are the user's own


@dataclass(frozen=True)
class Annotations:
    """Where the annotations are or will be, their lines, whether the file is the user's own, and the pictures whose
    captions come from the caption model."""

    path: Path
    captions: dict[Path, str]
    by_user: bool
    by_model: frozenset[Path] = frozenset()


def list_images(image_dir: str | Path, extensions: Collection[str] = frozenset({".jpg"})) -> list[Path]:
    """The picture files of a folder, sorted by name; extensions match in either case, hidden files never do.

    Raises:
        UserError: the folder is missing or cannot be read.
    """
    return [path for path in named_as_pictures(image_dir, extensions) if not path.is_dir()]


def plan_annotations(
    image_dir: str | Path,
    prompt: str,
    images: Iterable[Path],
    fallback_dir: str | Path,
    written: Mapping[Path, Path] | None = None,
) -> Annotations:
    """What `create_annotations` would write for `images`, or what the user's own file already says; writes nothing.

    A file is ours if we recorded its hash, or if it says exactly what we would write now, as a copy of ours beside
    copied pictures does. `written` has caption files that a model wrote, for pictures that have none beside them.

    Raises:
        UserError: a path with a tab or line break, caption files that are not text, a broken line in a user's file,
            a file that is none.
    """
    image_dir, images, written = Path(image_dir), list(images), written or {}
    beside = image_dir / ANNOTATIONS
    path = beside if os.access(image_dir, os.W_OK) else Path(fallback_dir, ANNOTATIONS)
    generated: dict[Path, str] | None = None
    for candidate in (path, beside):  # a user's file in a read-only folder is used too
        if os.path.lexists(candidate) and not candidate.is_file():
            raise UserError(f"{candidate} is {_no_file(candidate)}: remove or rename it")
        if candidate.exists() and file_sha256(candidate) not in _recorded(candidate):
            rows = _read_lines(candidate)
            lines = [line for line, _ in rows]
            meant = _meant(lines, image_dir, candidate)
            captions = {picture: caption for picture, (_, caption) in zip(meant, rows, strict=True)}
            ours = []
            if captions.keys() == set(images):  # otherwise not ours, and no caption file has to be read
                generated = _generated_or_none(image_dir, prompt, images, written)
                ours = [generated, *([_generated_or_none(image_dir, prompt, images, {})] if written else [])]
            if not captions or captions not in ours:
                _warn_about_lines(candidate, lines, meant, image_dir)
                own = {picture: _unquoted(caption) for picture, caption in captions.items()}
                return Annotations(candidate, own, by_user=True)
    captions = generated or _generated(image_dir, prompt, images, written)
    return Annotations(path, captions, by_user=False, by_model=frozenset(written))


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
        UserError: the file is not text, or a line is not `<image_path>\\t<prompt>`.
    """
    return dict(_read_lines(path))


def _read_lines(path: Path) -> list[tuple[Path, str]]:
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error}); save it as UTF-8, or delete it") from error
    lines = []
    for number, line in enumerate(text.split("\n"), 1):
        image, tab, caption = line.partition("\t")
        if not line.strip():
            continue
        if not tab or not image or not caption.strip():
            raise UserError(
                f"{path}:{number}: expected a picture's path, a tab and its caption; fix the line, or delete the file"
            )
        lines.append((Path(image), " ".join(caption.strip().splitlines())))
    return lines


def _unquoted(caption: str) -> str:
    """A caption without the quotes that Excel puts around a cell with commas or quotes."""
    inner = caption[1:-1]
    if caption != f'"{inner}"' or '"' in inner.replace('""', "") or not ("," in inner or '""' in inner):
        return caption
    return inner.replace('""', '"').strip() or caption


def _no_file(path: Path) -> str:
    return "a folder" if path.is_dir() else "not a file" if path.exists() else "a broken link"


def _meant(lines: Sequence[Path], image_dir: Path, file: Path) -> list[Path]:
    """The picture that each line means, as `list_images` names it: the one of that name in `image_dir`, if it has one.

    Relative paths start at the current folder, as those of `list_images` do, or at the file's own folder.
    """
    folder, resolved, is_folder = image_dir.resolve(), cache(Path.resolve), cache(Path.is_dir)

    @cache
    def near(place: Path) -> dict[str, list[Path]]:
        found = defaultdict(list)
        for path in visible_entries(place):
            found[_composed(path.name)].append(path)
        return found

    def in_folder(name: str, place: Path = image_dir) -> Path:
        """A picture in the folder, also if its name has its accents in the other form of Unicode."""
        here = place / name
        same = [] if name.isascii() or os.path.exists(here) else near(place).get(_composed(name), [])
        return same[0] if len(same) == 1 else here

    @cache
    def copied(parent: Path) -> Path:
        """The folder inside that stands for a line's folder, where everything was copied from somewhere else."""
        parts = () if ".." in parent.parts else parent.parts[parent.is_absolute() :]
        inside = (image_dir.joinpath(*parts[depth:]) for depth in range(len(parts)))
        return next((place for place in inside if place.is_dir()), image_dir)

    def picture(line: Path) -> Path:
        candidates = (line, file.parent / line)
        for candidate in candidates:
            parent = resolved(candidate.parent)
            if parent == folder:
                return in_folder(line.name)
            if folder in parent.parents and is_folder(parent):  # in a folder inside
                inside = in_folder(line.name, image_dir / parent.relative_to(folder))
                if os.path.exists(inside):
                    return inside
        here = (in_folder(line.name, copied(line.parent)), in_folder(line.name))
        return next((path for path in (*here, *candidates) if os.path.exists(path)), line)

    return [picture(line) for line in lines]


def _composed(name: str) -> str:
    """A name in one form of Unicode: macOS writes accents as letters of their own."""
    return unicodedata.normalize("NFC", name)


def _warn_about_lines(file: Path, lines: Sequence[Path], meant: Sequence[Path], image_dir: Path) -> None:
    """What a user may not expect of a file of their own."""
    folder, resolved = image_dir.resolve(), cache(Path.resolve)
    moved = [
        line.name
        for line, picture in zip(lines, meant, strict=True)
        if picture.is_relative_to(image_dir)
        and all(resolved(each.parent) != resolved(picture.parent) for each in (line, file.parent / line))
    ]
    if moved:
        logger.warning("%s names another folder; pictures of the same name in %s are used: %s",
                       file, image_dir, few(moved))  # fmt: skip
    folders = {picture.parent: resolved(picture.parent) for picture in meant}
    outside = {parent for parent, place in folders.items() if folder not in (place, *place.parents)}
    elsewhere = [str(path) for path in dict.fromkeys(meant) if path.parent in outside and os.path.exists(path)]
    if elsewhere:
        logger.warning("%s names %s outside %s, trained on too: %s",
                       file, counted(len(elsewhere), "picture"), image_dir, few(elsewhere))  # fmt: skip
    if repeated := [picture.name for picture, count in Counter(meant).items() if count > 1]:
        logger.warning("%s has more than one line for a picture, of which the last counts: %s", file, few(repeated))


def _recorded(annotations: Path) -> list[str]:
    """The hashes of what we wrote there, the newest first."""
    record = annotations.with_name(_RECORD)
    return record.read_text(errors="replace").split() if record.exists() else []


def _generated(
    image_dir: str | Path, prompt: str, images: Sequence[Path], written: Mapping[Path, Path]
) -> dict[Path, str]:
    """The caption of each picture: its caption file's, the model's in `written`, or the prompt."""
    files = {**written, **caption_files(image_dir, images)[0]}
    captions: dict[Path, str] = {}
    unreadable: dict[Path, str] = {}
    for image in images:
        name = str(image)
        if CONTROL.search(name) or any(letter in "\t\n\r\ufeff" or "\udc80" <= letter <= "\udcff" for letter in name):
            what = "a tab, a line break, a control character or invalid UTF-8"
            raise UserError(f"{name!r}: a path in {ANNOTATIONS} cannot have {what}; rename the file")
        try:
            captions[image] = (one_line(read_text(files[image])) if image in files else "") or one_line(prompt)
        except (OSError, ValueError) as error:
            unreadable[files[image]] = first_line(error)
    if unreadable:
        first, *others = unreadable
        paths = ", ".join([str(first), *(path.name for path in others)])
        raise UserError(
            f"{paths}: captions cannot be read as UTF-8 text ({unreadable[first]}); save them again as UTF-8"
        )
    return captions


def _generated_or_none(
    image_dir: str | Path, prompt: str, images: Sequence[Path], written: Mapping[Path, Path]
) -> dict[Path, str] | None:
    try:
        return _generated(image_dir, prompt, images, written)
    except UserError:  # beside a file of the user's own, caption files do not matter
        return None


def caption_files(image_dir: str | Path, images: Sequence[Path]) -> tuple[dict[Path, Path], list[str]]:
    """The caption file of each picture that has one, beside it, and the .txt files that are not used, with reasons."""
    folders: dict[Path, list[Path]] = {Path(image_dir): []}
    for image in images:
        folders.setdefault(image.parent, []).append(image)
    found: dict[Path, Path] = {}
    unused: list[str] = []
    for folder, beside in folders.items():
        used, left = _caption_files_in(folder, beside)
        found |= used
        unused += [photo_folder.shown(folder / name, image_dir) for name in left]
    return found, unused


def _caption_files_in(folder: Path, images: Sequence[Path]) -> tuple[dict[Path, Path], list[str]]:
    """The same for the pictures of one folder.

    `IMG_1.txt` belongs to `IMG_1.jpg`, then `IMG_1.jpg.txt`, then either in other capitals, or in the other form of
    Unicode, if nothing else fits.
    """
    texts: dict[str, Path] = {}
    unused = []
    for path in visible_entries(folder):
        if path.suffix.lower() != ".txt" or path.name == ANNOTATIONS:
            continue
        if path.name.lower() == ANNOTATIONS:
            unused.append(f"{path.name} (only {ANNOTATIONS} in small letters is read)")
        elif path.is_file():
            texts[path.name] = path
        else:
            unused.append(f"{path.name} ({_no_file(path)})")
    exact: dict[Path, list[str]] = {}
    fitting = defaultdict(list)  # pictures, by a composed name in small letters
    for image in images:
        names = (f"{image.stem}.txt", f"{image.name}.txt")
        exact[image] = [name for name in names if name in texts]
        for name in names:
            fitting[_composed(name).lower()].append(image)
    taken = {name for names in exact.values() for name in names}
    near = defaultdict(list)
    for name in texts.keys() - taken:
        if len(pictures := fitting[_composed(name).lower()]) == 1:
            near[pictures[0]].append(name)
    used = {image: names[0] for image, names in exact.items() if names}
    used |= {image: names[0] for image, names in near.items() if len(names) == 1 and image not in used}
    for name in texts.keys() - set(used.values()):
        pictures = fitting[_composed(name).lower()]
        instead = next((used[image] for image in pictures if image in used), None)
        why = f"{instead} is used" if instead else "ambiguous" if pictures else "no picture of that name"
        unused.append(f"{name} ({why})")
    return {image: texts[name] for image, name in used.items()}, sorted(unused)


def report_text(
    image_dir: str | Path,
    pictures: Sequence[Picture],
    annotations: Annotations,
    prompt: str,
    extensions: Collection[str] = (".jpg",),
    recursive: bool = False,
    without: Collection[Path] = (),
) -> str:
    """The dataset report, which fits on a screen however many pictures there are.

    `extensions`, `recursive` and `without` are those that the pictures were found with, see `named_as_pictures`.
    """
    used = [picture for picture in pictures if picture.used]
    lines = [f"Pictures in {image_dir}: {len(used)} used, {len(pictures) - len(used)} skipped"]
    if used:
        wide, high = ([getattr(picture, side) for picture in used] for side in ("width", "height"))
        lines.append(f"  sizes        {min(wide)} to {max(wide)} pixels wide, {min(high)} to {max(high)} high")
    kinds = defaultdict(list)
    for picture in pictures:
        if picture.reason:
            kind, _, why = picture.reason.partition(": ")
            kinds[kind].append(f"{photo_folder.shown(picture.path, image_dir)} ({why})")
    lines += [f"  {kind:<12} {len(names)}: {few(names)}" for kind, names in kinds.items()]
    if odd := photo_folder.odd_ones(used, image_dir):
        lines.append(f"  odd ones     {len(odd)}, used too; remove those that do not belong here: {few(odd)}")
    wanted = {extension.lower() for extension in extensions}
    here, below = photo_folder.count_files(image_dir, recursive, without)
    others = {kind: here[kind] for kind in sorted(here) if kind not in {"", ".txt", *wanted}}
    if others:
        lines.append(f"  other files  {photo_folder.counts(others)}")
        if advice := photo_folder.more_extensions(extensions, others):
            lines.append(f"               to use them, {advice}")
    if in_subfolders := {kind: below[kind] for kind in sorted(below) if kind in wanted}:
        lines.append(
            f"  subfolders   {photo_folder.counts(in_subfolders)} in them; to use these too, set recursive: true"
        )
    if several := [f"{picture.path.name} ({picture.pages})" for picture in used if picture.pages > 1]:
        lines.append(
            f"  pages        {len(several)} with several, of which the first or the main one is used: {few(several)}"
        )
    if not annotations.by_user:
        _, unused = caption_files(image_dir, [picture.path for picture in pictures])
        lines += [f"  unused .txt  {len(unused)}: {few(unused)}"] if unused else []
    plain = one_line(prompt)
    own = {path for path, caption in annotations.captions.items() if caption != plain}
    by_model = own & annotations.by_model
    generated = f"{len(own - by_model)} from .txt files next to the pictures, "
    generated += (f"{len(by_model)} by the caption model, " if by_model else "") + f"the others {plain!r}"
    origin = f"from your own {annotations.path}" if annotations.by_user else generated
    lines.append(f"  captions     {len(annotations.captions)}: {origin}")
    # A file name may have bytes that are not UTF-8, which a terminal cannot print.
    return "\n".join(lines).encode(errors="backslashreplace").decode()


def report_json(pictures: Sequence[Picture]) -> str:
    rows = [{"path": str(p.path), "taken": p.used, "reason": p.reason or None, "width": p.width, "height": p.height}
            for p in pictures]  # fmt: skip
    return json.dumps({"pictures": rows}, indent=2, ensure_ascii=False) + "\n"
