"""Annotations and captions, which data_utils.py writes and training reads."""

import os
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import data_utils
from helpers import jpg, jpgs, refused, snapshot

PROMPT = "a photo of <lace>"


def test_a_line_for_every_picture(tmp_path: Path) -> None:
    images = jpgs(tmp_path, 3)
    assert data_utils.create_annotations(tmp_path, PROMPT) == tmp_path / "annotations.txt"
    content = (tmp_path / "annotations.txt").read_bytes()
    assert content == "".join(f"{image}\t{PROMPT}\n" for image in images).encode()
    assert data_utils.read_annotations(tmp_path / "annotations.txt") == dict.fromkeys(images, PROMPT)


def test_paths_in_any_language_and_with_spaces(tmp_path: Path) -> None:
    folder = tmp_path / "große Häkelei 🧵"
    [image] = jpgs(folder, 1)
    image = image.rename(folder / " weiße  spitze 🌸 .jpg")
    path = data_utils.create_annotations(folder, "Foto von weißer Spitze 🪡")
    assert path.read_bytes() == f"{image}\tFoto von weißer Spitze 🪡\n".encode()
    assert data_utils.read_annotations(path) == {image: "Foto von weißer Spitze 🪡"}


def test_caption_files_take_the_place_of_the_prompt(tmp_path: Path) -> None:
    images = jpgs(tmp_path, 5)
    images[0].with_suffix(".txt").write_bytes("\ufeff  eine\tRosette,\r\n\r\n weiß \n".encode())
    images[1].with_suffix(".txt").write_text(" \n")
    images[2].with_suffix(".txt").mkdir()
    images[3] = images[3].rename(tmp_path / "annotations.jpg")
    (tmp_path / "unrelated.txt").write_text("something else")
    path = data_utils.create_annotations(tmp_path, f" {PROMPT}\n ")
    captions = data_utils.read_annotations(path)
    assert captions == dict.fromkeys(images, PROMPT) | {images[0]: "eine Rosette, weiß"}
    # A second time the annotations themselves lie beside annotations.jpg, and are no caption of it.
    assert data_utils.read_annotations(data_utils.create_annotations(tmp_path, PROMPT)) == captions


def test_nothing_else_in_the_folder_changes(tmp_path: Path) -> None:
    jpgs(tmp_path)[0].with_suffix(".txt").write_text("mine")
    before = snapshot(tmp_path)
    data_utils.create_annotations(tmp_path, PROMPT)
    after = snapshot(tmp_path)
    assert {name: after[name] for name in before if name != str(tmp_path)} == {
        name: seen for name, seen in before.items() if name != str(tmp_path)
    }
    assert {Path(name).name for name in set(after) - set(before)} == {"annotations.txt", ".annotations.sha256"}


def test_generated_annotations_are_rewritten(tmp_path: Path) -> None:
    jpgs(tmp_path, 2)
    path = data_utils.create_annotations(tmp_path, "one")
    jpgs(tmp_path, 3)
    (tmp_path / "lace_0.jpg").unlink()
    data_utils.create_annotations(tmp_path, "two")
    assert path.read_text() == f"{tmp_path}/lace_1.jpg\ttwo\n{tmp_path}/lace_2.jpg\ttwo\n"


@pytest.mark.parametrize(
    "edit", [lambda text: text.replace("one", "a rosette"), lambda text: text + "\n", lambda _: ""]
)
def test_annotations_edited_by_hand_are_not_overwritten(
    edit: Callable[[str], str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    jpgs(tmp_path, 2)
    path = data_utils.create_annotations(tmp_path, "one")
    path.write_text(edit(path.read_text()))
    before = snapshot(tmp_path)
    with caplog.at_level("INFO"):
        assert data_utils.create_annotations(tmp_path, "two") == path
    assert snapshot(tmp_path) == before
    assert str(path) in caplog.text


def test_an_existing_annotations_file_of_the_user_is_used_unchanged(tmp_path: Path) -> None:
    images = jpgs(tmp_path, 2)
    (tmp_path / "annotations.txt").write_text(f"{images[1]}\tmine, with\r\n")
    before = snapshot(tmp_path)
    data_utils.create_annotations(tmp_path, PROMPT)
    plan = data_utils.plan_annotations(tmp_path, PROMPT, images, tmp_path)
    assert snapshot(tmp_path) == before
    assert plan == data_utils.Annotations(tmp_path / "annotations.txt", {images[1]: "mine, with"}, by_user=True)


def test_planning_writes_nothing_and_returns_what_would_be_written(tmp_path: Path) -> None:
    images = jpgs(tmp_path, 2)
    images[1].with_suffix(".txt").write_text("edge")
    before = snapshot(tmp_path)
    plan = data_utils.plan_annotations(tmp_path, PROMPT, images, tmp_path / "lora")
    assert snapshot(tmp_path) == before
    assert plan == data_utils.Annotations(
        tmp_path / "annotations.txt", {images[0]: PROMPT, images[1]: "edge"}, by_user=False
    )
    assert data_utils.read_annotations(data_utils.create_annotations(tmp_path, PROMPT)) == plan.captions


def test_a_kill_between_the_two_writes_does_not_make_the_file_the_users(tmp_path: Path) -> None:
    jpgs(tmp_path, 1)
    path = data_utils.create_annotations(tmp_path, "one")
    old = path.read_bytes()
    data_utils.create_annotations(tmp_path, "two")
    path.write_bytes(old)  # as if the second write had not happened, and the record had
    assert "three" in data_utils.create_annotations(tmp_path, "three").read_text()


@pytest.mark.parametrize("name", ["a\tb.jpg", "a\nb.jpg", "a\rb.jpg", "a\udcffb.jpg", "🧵\udc80.jpg"])
def test_a_path_with_a_tab_or_line_break_is_refused(name: str, tmp_path: Path) -> None:
    jpgs(tmp_path, 1)[0].rename(tmp_path / name)
    message = refused(lambda: data_utils.create_annotations(tmp_path, PROMPT), "rename the file")
    assert "\n" not in message
    message.encode()  # can be printed
    assert not (tmp_path / "annotations.txt").exists()


def test_a_caption_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    jpgs(tmp_path, 1)[0].with_suffix(".txt").write_bytes("weiß".encode("latin-1"))
    refused(lambda: data_utils.create_annotations(tmp_path, PROMPT), "lace_0.txt: .* UTF-8")


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"a.jpg\tlace\nb.jpg lace\n", "annotations.txt:2: expected"),
        (b"\tlace\n", "annotations.txt:1: expected"),
        (b"a.jpg\t \n", "annotations.txt:1: expected"),
        ("a.jpg\tweiß".encode("latin-1"), "UTF-8"),
    ],
)
def test_an_invalid_annotations_file_is_refused(content: bytes, part: str, tmp_path: Path) -> None:
    (tmp_path / "annotations.txt").write_bytes(content)
    refused(lambda: data_utils.create_annotations(tmp_path, PROMPT), part)


def test_a_users_file_may_have_blank_lines_crlf_and_a_bom(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffa b.jpg\tone\r\n\r\n ü.jpg\t two\tthree \r\n".encode())
    assert data_utils.read_annotations(tmp_path / "a.txt") == {Path("a b.jpg"): "one", Path(" ü.jpg"): "two\tthree"}


@pytest.mark.parametrize(
    "content",
    ["\ufeffweiß\r\n🧵".encode("utf-16-le"), "\ufeffweiß\r🧵".encode("utf-16-be"), "\ufeffweiß\n\ufeff🧵".encode()],
)
def test_a_caption_in_unicode_of_any_kind(content: bytes, tmp_path: Path) -> None:
    [image] = jpgs(tmp_path, 1)
    image.with_suffix(".txt").write_bytes(content)
    assert data_utils.plan_annotations(tmp_path, PROMPT, [image], tmp_path).captions == {image: "weiß 🧵"}


def test_all_captions_that_are_not_text_are_named_at_once(tmp_path: Path) -> None:
    for image, content in zip(
        jpgs(tmp_path, 4), [b"a\0b\0", b"\x89PNG\r\n\x1a\n\0", b"fine", b"\xff\xfea"], strict=True
    ):
        image.with_suffix(".txt").write_bytes(content)
    message = refused(
        lambda: data_utils.create_annotations(tmp_path, PROMPT), "lace_0.txt, lace_1.txt, lace_3.txt: .*UTF-8"
    )
    assert "\n" not in message
    assert not (tmp_path / "annotations.txt").exists()


def test_lines_of_annotations_may_end_as_on_an_old_mac(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("a.jpg\tone\rb.jpg\ttwo\vthree\r".encode("utf-16"))
    assert data_utils.read_annotations(tmp_path / "a.txt") == {Path("a.jpg"): "one", Path("b.jpg"): "two three"}


@pytest.mark.parametrize(
    ("pictures", "texts", "used", "unused"),
    [
        (["a.jpg"], ["a.txt"], {"a.jpg": "a.txt"}, []),
        (["a.jpg"], ["a.jpg.txt"], {"a.jpg": "a.jpg.txt"}, []),
        (["IMG_1.jpg"], ["img_1.TXT"], {"IMG_1.jpg": "img_1.TXT"}, []),
        (["IMG_1.JPG"], ["IMG_1.jpg.txt"], {"IMG_1.JPG": "IMG_1.jpg.txt"}, []),
        (["a.jpg"], ["a.txt", "a.jpg.txt"], {"a.jpg": "a.txt"}, ["a.jpg.txt (a.txt is used)"]),
        (["a.jpg"], ["a.txt", "A.TXT"], {"a.jpg": "a.txt"}, ["A.TXT (a.txt is used)"]),
        (["a.jpg"], ["A.txt", "A.TXT"], {}, ["A.TXT (ambiguous)", "A.txt (ambiguous)"]),
        (["a.jpg", "A.jpg"], ["a.txt"], {"a.jpg": "a.txt"}, []),
        (["ab.jpg", "aB.jpg"], ["AB.txt"], {}, ["AB.txt (ambiguous)"]),
        (["a.jpg", "a.png"], ["a.txt"], {"a.jpg": "a.txt", "a.png": "a.txt"}, []),
        (["a.jpg"], ["b.txt"], {}, ["b.txt (no picture of that name)"]),
        (["annotations.jpg"], ["annotations.txt", "Annotations.TXT"], {},
         ["Annotations.TXT (only annotations.txt in small letters is read)"]),
        (["\u00fc.jpg"], ["u\u0308.txt"], {"\u00fc.jpg": "u\u0308.txt"}, []),
        (["u\u0308.jpg"], ["\u00dc.jpg.txt"], {"u\u0308.jpg": "\u00dc.jpg.txt"}, []),
        (["\u00fc.jpg", "u\u0308.jpg"], ["\u00fc.txt"], {"\u00fc.jpg": "\u00fc.txt"}, []),
    ],
)  # fmt: skip
def test_which_caption_belongs_to_which_picture(
    pictures: list[str], texts: list[str], used: dict[str, str], unused: list[str], tmp_path: Path
) -> None:
    for name in texts:
        (tmp_path / name).write_text("x")
    found, others = data_utils.caption_files(tmp_path, [tmp_path / name for name in pictures])
    assert found == {tmp_path / picture: tmp_path / text for picture, text in used.items()}
    assert others == unused


def test_captions_that_are_no_files_are_listed(tmp_path: Path) -> None:
    images = jpgs(tmp_path, 3)
    images[0].with_suffix(".txt").mkdir()
    images[1].with_suffix(".txt").symlink_to("gone")
    os.mkfifo(images[2].with_suffix(".txt"))
    assert data_utils.caption_files(tmp_path, images) == (
        {}, ["lace_0.txt (a folder)", "lace_1.txt (a broken link)", "lace_2.txt (not a file)"]
    )  # fmt: skip


@pytest.mark.parametrize("what", ["a folder", "a broken link", "not a file"])
def test_annotations_that_are_no_file_are_refused(what: str, tmp_path: Path) -> None:
    jpgs(tmp_path, 1)
    path = tmp_path / "annotations.txt"
    make: dict[str, Callable[[], object]] = {
        "a folder": path.mkdir, "a broken link": lambda: path.symlink_to("gone"), "not a file": lambda: os.mkfifo(path)
    }  # fmt: skip
    make[what]()
    refused(lambda: data_utils.create_annotations(tmp_path, PROMPT), f"annotations.txt is {what}: remove or rename it")
    assert os.path.lexists(path)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ('"a, b"', "a, b"),
        ('"the ""queen"" collar"', 'the "queen" collar'),
        ('"""queen"" collar"', '"queen" collar'),
        ('"lace"', '"lace"'),
        ('"a", "b"', '"a", "b"'),
        ('"a, b', '"a, b'),
        ('the "queen", white', 'the "queen", white'),
        ('"', '"'),
        ('""', '""'),
        ('""""', '"'),
    ],
)
def test_quotes_of_a_spreadsheet_are_taken_off(written: str, meant: str, tmp_path: Path) -> None:
    [image] = jpgs(tmp_path, 1)
    path = tmp_path / "annotations.txt"
    path.write_text(f"{image}\t{written}\n")
    assert data_utils.plan_annotations(tmp_path, PROMPT, [image], tmp_path).captions == {image: meant}
    assert data_utils.read_annotations(path) == {image: written}


@pytest.mark.parametrize(("there", "line"), [("\u00fc.jpg", "u\u0308.jpg"), ("u\u0308.jpg", "\u00fc.jpg")])
@pytest.mark.parametrize("folder", ["", "/gone/"])
def test_a_line_in_the_other_form_of_unicode(there: str, line: str, folder: str, tmp_path: Path) -> None:
    [image] = jpgs(tmp_path, 1)
    image = image.rename(tmp_path / there)
    (tmp_path / "annotations.txt").write_text(f"{folder}{line}\tmine\n")
    assert data_utils.plan_annotations(tmp_path, PROMPT, [image], tmp_path).captions == {image: "mine"}


def test_many_lines_are_read_with_few_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [tmp_path / f"{number}.jpg" for number in range(50)]
    for image in images:
        image.touch()
        image.with_suffix(".txt").write_text("unused")
    (tmp_path / "annotations.txt").write_text("".join(f"{image}\tmine\n" for image in images[1:]))
    calls: list[object] = []

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def count(*given: Any, **more: Any) -> Any:
            calls.append(given)
            return call(*given, **more)

        return count

    monkeypatch.setattr(os, "lstat", counted(os.lstat))
    monkeypatch.setattr(data_utils, "read_text", counted(data_utils.read_text))
    assert data_utils.plan_annotations(tmp_path, PROMPT, images, tmp_path).by_user
    assert len(calls) < 50


@pytest.mark.parametrize("with_record", [True, False])
@pytest.mark.parametrize("old_is_gone", [True, False])
def test_a_copied_folder_is_trained_on_itself(with_record: bool, old_is_gone: bool, tmp_path: Path) -> None:
    jpgs(tmp_path / "old", 2)[0].with_suffix(".txt").write_text("a rosette")
    data_utils.create_annotations(tmp_path / "old", PROMPT)
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    if not with_record:
        (tmp_path / "new" / ".annotations.sha256").unlink()
    if old_is_gone:
        shutil.rmtree(tmp_path / "old")
    path = data_utils.create_annotations(tmp_path / "new", PROMPT)
    assert path.read_text() == f"{tmp_path}/new/lace_0.jpg\ta rosette\n{tmp_path}/new/lace_1.jpg\t{PROMPT}\n"


@pytest.mark.parametrize("edit", [lambda text: text.splitlines()[1] + "\n", lambda text: text.replace("photo", "scan")])
def test_a_users_choice_of_pictures_is_kept_and_copied_pictures_are_used(
    edit: Callable[[str], str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    jpgs(tmp_path / "old", 2)
    text = edit(data_utils.create_annotations(tmp_path / "old", PROMPT).read_text())
    images = jpgs(tmp_path / "new", 2)
    (tmp_path / "new" / "annotations.txt").write_text(text)
    plan = data_utils.plan_annotations(tmp_path / "new", PROMPT, images, tmp_path)
    assert plan.by_user
    assert {path.parent for path in plan.captions} == {tmp_path / "new"}
    assert caplog.text.count("names another folder") == 1
    assert data_utils.create_annotations(tmp_path / "new", PROMPT).read_text() == text


@pytest.mark.parametrize("images_dir", ["photos", "./photos/../photos", "link", "/photos", "/link"])
@pytest.mark.parametrize("line", ["lace_0.jpg", "photos/lace_0.jpg", "link/lace_0.jpg", "/photos/lace_0.jpg",
                                  "/photos/../photos/lace_0.jpg", "/link/lace_0.jpg", "/gone/lace_0.jpg"])  # fmt: skip
def test_a_line_means_the_picture_in_the_folder_however_either_is_written(
    line: str, images_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jpgs(tmp_path / "photos", 1)
    (tmp_path / "link").symlink_to("photos")
    monkeypatch.chdir(tmp_path)
    folder, line = (str(tmp_path) + text if text[0] == "/" else text for text in (images_dir, line))
    images = data_utils.list_images(folder)
    (tmp_path / "photos" / "annotations.txt").write_text(f"{line}\tmine\n")
    plan = data_utils.plan_annotations(folder, PROMPT, images, tmp_path)
    assert plan.captions == {images[0]: "mine"}


def test_our_own_relative_paths_are_found_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jpgs(tmp_path / "photos", 2)
    monkeypatch.chdir(tmp_path)
    data_utils.create_annotations("photos", "one")
    (tmp_path / "photos" / ".annotations.sha256").unlink()
    monkeypatch.chdir("photos")
    plan = data_utils.plan_annotations(tmp_path / "photos", "two", [], tmp_path)
    assert plan.captions == dict.fromkeys(data_utils.list_images(tmp_path / "photos"), "one")


def test_captions_lie_beside_pictures_in_subfolders(tmp_path: Path) -> None:
    images = [jpgs(tmp_path, 1)[0], *jpgs(tmp_path / "sub", 2)]
    (tmp_path / "lace_0.txt").write_text("of the folder itself")
    (tmp_path / "lace_1.txt").write_text("of none: that picture is in the subfolder")
    (tmp_path / "sub" / "lace_0.txt").write_text("of the subfolder")
    (tmp_path / "sub" / "other.txt").write_text("of none")
    plan = data_utils.plan_annotations(tmp_path, "lace", images, tmp_path)
    assert list(plan.captions.items()) == list(
        zip(images, ["of the folder itself", "of the subfolder", "lace"], strict=True)
    )
    data_utils.write_annotations(plan)
    assert (tmp_path / "annotations.txt").read_text().splitlines()[1] == f"{tmp_path}/sub/lace_0.jpg\tof the subfolder"
    assert data_utils.caption_files(tmp_path, images)[1] == [
        "lace_1.txt (no picture of that name)", "sub/other.txt (no picture of that name)",
    ]  # fmt: skip


@pytest.mark.parametrize("line", ["sub/häkel.jpg", "/old/place/sub/häkel.jpg", "{photos}/sub/../sub/häkel.jpg"])
def test_a_line_of_a_picture_in_a_subfolder(line: str, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    picture = jpg(tmp_path / "sub" / unicodedata.normalize("NFD", "häkel.jpg"))
    jpg(tmp_path / "häkel.jpg")
    (tmp_path / "annotations.txt").write_text(line.format(photos=tmp_path) + "\tmine\n", encoding="utf-8")
    assert data_utils.plan_annotations(tmp_path, "lace", [picture], tmp_path).captions == {picture: "mine"}


def test_pictures_elsewhere_and_in_folders_inside_stay_where_they_are(tmp_path: Path) -> None:
    inside, outside = jpgs(tmp_path / "photos" / "more", 1)[0], jpgs(tmp_path / "other", 2)[1]
    here = jpgs(tmp_path / "photos", 1)[0]
    (tmp_path / "photos" / "annotations.txt").write_text(f"more/lace_0.jpg\tone\n{outside}\ttwo\n{here}\tthree\n")
    plan = data_utils.plan_annotations(tmp_path / "photos", PROMPT, [], tmp_path)
    assert plan.captions == {inside: "one", outside: "two", here: "three"}


def test_pictures_outside_the_folder_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    old, new = jpgs(tmp_path / "old", 3), jpgs(tmp_path / "new", 1)
    jpgs(tmp_path / "new" / "more", 1)
    monkeypatch.chdir(tmp_path)
    lines = ["old/lace_0.jpg", "old/lace_1.jpg", str(old[2]), "more/lace_0.jpg", "old/gone.jpg"]
    (tmp_path / "new" / "annotations.txt").write_text("".join(f"{line}\tmine\n" for line in lines))
    captions = data_utils.plan_annotations("new", PROMPT, new, tmp_path).captions
    assert set(map(str, captions)) == {"new/lace_0.jpg", "new/more/lace_0.jpg", *lines[1:3], "old/gone.jpg"}
    told = f"names 2 pictures outside new, trained on too: old/lace_1.jpg; {old[2]}\n"
    assert told in caplog.text
    assert "names another folder; pictures of the same name in new are used: lace_0.jpg\n" in caplog.text


def test_two_lines_for_one_picture_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    [image] = jpgs(tmp_path, 1)
    (tmp_path / "annotations.txt").write_text(f"{image}\tone\nlace_0.jpg\ttwo\n")
    assert data_utils.plan_annotations(tmp_path, PROMPT, [image], tmp_path).captions == {image: "two"}
    assert "has more than one line for a picture, of which the last counts: lace_0.jpg" in caplog.text


def as_unprivileged_user(folder: Path, work: Callable[[], object]) -> int:
    """Run `work` inside `folder` as a user who may not write there; 0 when it went well."""
    folder.chmod(0o755)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.chdir(folder)
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture
def read_only(tmp_path: Path) -> Path:
    """A folder with `photos`, which nobody may write to, and `lora`, to which everyone may."""
    jpgs(tmp_path / "photos", 2)
    (tmp_path / "photos").chmod(0o555)
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora").chmod(0o777)
    return tmp_path


def test_annotations_of_a_read_only_folder_go_to_the_output_folder(read_only: Path) -> None:
    def work() -> None:
        path = data_utils.create_annotations("photos", PROMPT, fallback_dir="lora")
        assert path == Path("lora/annotations.txt")
        data_utils.create_annotations("photos", "again", fallback_dir="lora")

    assert as_unprivileged_user(read_only, work) == 0
    assert (read_only / "lora" / "annotations.txt").read_text() == (
        "photos/lace_0.jpg\tagain\nphotos/lace_1.jpg\tagain\n"
    )
    assert not (read_only / "photos" / "annotations.txt").exists()


def test_a_users_annotations_in_a_read_only_folder_are_used(read_only: Path) -> None:
    (read_only / "photos").chmod(0o755)
    (read_only / "photos" / "annotations.txt").write_text("photos/lace_1.jpg\tmine\n")
    (read_only / "photos").chmod(0o555)

    def work() -> None:
        plan = data_utils.plan_annotations("photos", PROMPT, [], "lora")
        assert plan == data_utils.Annotations(Path("photos/annotations.txt"), {Path("photos/lace_1.jpg"): "mine"}, True)
        assert data_utils.create_annotations("photos", PROMPT, fallback_dir="lora") == plan.path

    assert as_unprivileged_user(read_only, work) == 0
    assert list((read_only / "lora").iterdir()) == []


def test_a_read_only_folder_without_a_fallback_is_a_disk_error(read_only: Path) -> None:
    def work() -> None:
        refused(lambda: data_utils.create_annotations("photos", PROMPT), "cannot write", code=4)

    assert as_unprivileged_user(read_only, work) == 0
