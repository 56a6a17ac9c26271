"""Annotations and captions, which data_utils.py writes and training reads."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

import data_utils
from helpers import jpgs, refused, snapshot

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
