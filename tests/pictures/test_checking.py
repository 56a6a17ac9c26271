"""Checking pictures in processes of their own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import ExifTags, Image, PngImagePlugin

import data_utils
from helpers import ROOT, as_file, gradient, jpg, jpgs, snapshot, truncated_jpg
from lace_lora.config import Config
from lace_lora.pictures import checking, gallery, image_files, recipe
from lace_lora.training import metrics


def test_a_broken_link_is_reported(tmp_path: Path) -> None:
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere")
    [found] = checking.check_pictures(data_utils.list_images(tmp_path), 16)
    assert found.reason == "unreadable: a broken link"


def test_checking_says_what_is_wrong_with_each(tmp_path: Path) -> None:
    jpg(tmp_path / "good.jpg", gradient(64, 48), orientation=6)
    jpg(tmp_path / "small.jpg", gradient(100, 31))
    truncated_jpg(tmp_path / "cut.jpg")
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("not a picture")
    gradient().save(tmp_path / "other.jpg", format="PPM")
    gradient().save(tmp_path / "really a png.jpg", format="PNG")
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "bomb.jpg").write_bytes(bomb())
    paths = image_files.named_as_pictures(tmp_path, [".jpg"])
    before = snapshot(tmp_path)
    found = checking.check_pictures(paths, 32)
    assert snapshot(tmp_path) == before
    assert [picture.path for picture in found] == paths
    reasons = {picture.path.name: picture.reason for picture in found}
    assert reasons.pop("cut.jpg").startswith("unreadable: ")
    assert reasons.pop("bomb.jpg") == "unreadable: 60000x60000 are over 250 megapixels: scale it down"
    assert reasons == {
        "good.jpg": "",
        "really a png.jpg": "unreadable: a PNG file under another name: add .png to image_extensions",
        "folder.jpg": "unreadable: a folder",
        "pipe.jpg": "unreadable: not a file",
        "small.jpg": "too small: 100x31, min_image_size is 32",
        "empty.jpg": "unreadable: an empty file, as of an unfinished upload: copy or download it again",
        "text.jpg": "unreadable: not a valid JPEG file",
        "other.jpg": "unreadable: not a valid JPEG file",
    }
    good = found[paths.index(tmp_path / "good.jpg")]
    assert (good.width, good.height, good.used) == (48, 64, True)


def bomb() -> bytes:
    """A JPEG of a few bytes that says it is 60,000 pixels wide and high."""
    content = bytearray(as_file(gradient(), "JPEG").getvalue())
    frame = content.index(b"\xff\xc0")
    content[frame + 5 : frame + 9] = (60_000).to_bytes(2, "big") * 2
    return bytes(content)


def test_other_formats_are_used_when_asked_for(tmp_path: Path) -> None:
    gradient().save(tmp_path / "really a png.jpg", format="PNG")
    formats = image_files.formats_of([".JPG", ".jpeg", ".png"])
    assert formats == ("JPEG", "PNG")
    [found] = checking.check_pictures(data_utils.list_images(tmp_path), 32, formats)
    assert found.used


# What Python runs at its start where PYTHONPATH has it: decoding some files now crashes, as a buggy decoder does.
CRASH = """
import os, signal
from PIL import ImageFile
real = ImageFile.ImageFile.load
def load(self):
    if self.size == (13, 17):
        os.kill(os.getpid(), signal.SIGSEGV)
    return real(self)
ImageFile.ImageFile.load = load
"""


def test_only_the_picture_that_crashes_its_worker_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = jpgs(tmp_path / "photos", 20)
    for crashing in (0, 3, 4, 15, 19):
        jpg(paths[crashing], gradient(13, 17))
    (tmp_path / "sitecustomize.py").write_text(CRASH)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = checking.check_pictures(paths, 32)
    assert [picture.path for picture in found] == paths
    crashed = [paths.index(picture.path) for picture in found if "it crashes the decoder" in picture.reason]
    assert crashed == [0, 3, 4, 15, 19]
    assert sum(picture.used for picture in found) == 15


def test_any_number_and_any_names_of_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "PIL").mkdir()  # nothing is imported from the current folder
    (tmp_path / "PIL" / "__init__.py").write_text("raise SystemExit(1)")
    content = jpg(tmp_path / "a.jpg").read_bytes()
    names = [f"{number}.jpg" for number in range(300)]
    names += ["ü 🧵.jpg", "a\nb.jpg", 'quote".jpg', "broken \udc80.jpg", " .jpg"]
    for name in names:
        Path(name).write_bytes(content)
    for paths in ([], [Path(name) for name in names], [Path("a.jpg"), Path("a.jpg"), Path("gone.jpg")]):
        found = checking.check_pictures(paths, 32)
        assert [picture.path for picture in found] == paths
        assert [picture.used for picture in found] == [path.name != "gone.jpg" for path in paths]


# The caller's own main module is never run again, whatever it does without a guard.
SCRIPT = """
import sys
import time
from pathlib import Path
sys.path.insert(0, {root!r})
print("started", flush=True)
from lace_lora.pictures import checking
for _ in range(2):
    print(sum(picture.used for picture in checking.check_pictures(sorted(Path({folder!r}).glob("*.jpg")), 32)))
{more}
"""


@pytest.mark.parametrize("how", ["script", "stdin", "-c", "deleted"])
def test_a_caller_without_a_main_guard(how: str, tmp_path: Path) -> None:
    jpgs(tmp_path / "photos", 9)
    more = "import __main__; __main__.__file__ = '/gone/main.py'; __main__.__spec__ = None" if how == "deleted" else ""
    code = SCRIPT.format(root=str(ROOT), folder=str(tmp_path / "photos"), more="")
    if how == "deleted":  # as %run leaves it in a notebook
        code = more + code
    (tmp_path / "script.py").write_text(code)
    command = {"stdin": ["-"], "-c": ["-c", code]}.get(how, [str(tmp_path / "script.py")])
    done = subprocess.run(
        [sys.executable, *command], input=code, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.stderr) == ("started\n9\n9\n", "")


def test_a_process_that_cannot_start_is_a_bug_and_not_a_bad_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text("raise SystemExit('no Python here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="a bug in this program"):
        checking.check_pictures(jpgs(tmp_path), 32)


def test_a_file_without_permission_is_skipped(tmp_path: Path) -> None:
    [path] = jpgs(tmp_path, 1)
    path.chmod(0)
    tmp_path.chmod(0o755)
    reader, writer = os.pipe()
    child = os.fork()  # root may read everything: a child gives that up
    if not child:
        os.seteuid(65534)
        os.write(writer, checking._check(path, 32, ("JPEG",)).reason.encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 200).decode() == "unreadable: Permission denied"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_process_is_left_when_the_main_one_ends(number: int, tmp_path: Path) -> None:
    jpgs(tmp_path / "photos", 16)
    waiting = f"import time\n        while not os.path.exists({str(tmp_path / 'go')!r}): time.sleep(0.01)"
    (tmp_path / "sitecustomize.py").write_text(CRASH.replace("os.kill(os.getpid(), signal.SIGSEGV)", waiting))
    for path in (tmp_path / "photos").glob("*.jpg"):
        jpg(path, gradient(13, 17))
    code = SCRIPT.format(root=str(ROOT), folder=str(tmp_path / "photos"), more="")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    process = psutil.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.DEVNULL)
    while not (family := process.children(recursive=True)):
        time.sleep(0.01)
    process.send_signal(number)
    process.wait(10)
    (tmp_path / "go").touch()  # what was decoding goes on, and finds its input closed
    _, left = psutil.wait_procs(family, timeout=10)
    for member in left:
        member.kill()
    assert not left


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (bytes(5000), "nothing but zeros, as of an unfinished upload: copy or download it again"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "a HEIC file under another name: add .heic to image_extensions"),
        (b"\0\0\0\x1cftypavif", "an AVIF picture: save it as JPEG"),
        (b"\0\0\0\x20ftypisom", "a video"),
        (b"GIF89a", "a GIF: save it as PNG"),
        (b"RIFF\x24\0\0\0WEBPVP8 ", "a WEBP file under another name: add .webp to image_extensions"),
        (b"II*\0", "a TIFF file under another name: add .tif to image_extensions"),
        (b"%PDF-1.7", "a PDF: export its pages as JPEG"),
        (b"\n <!DOCTYPE html>", "a web page: download the picture itself"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer: run `git lfs pull`"),
        (b"\xff\xd8\xff\xe0rubbish", "damaged or incomplete (Truncated File Read): copy or download it again"),
    ],
)
def test_what_a_file_really_is(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(content)
    assert checking._check(tmp_path / "a.jpg", 32, ("JPEG",)).reason == f"unreadable: {reason}"


def test_a_jpeg_whose_rest_was_never_written(tmp_path: Path) -> None:
    path = jpg(tmp_path / "a.jpg", gradient(600, 400))
    content = path.read_bytes()
    path.write_bytes(content + bytes(4000))  # as some cameras fill up their files
    assert checking._check(path, 32, ("JPEG",)).used
    path.write_bytes(content[: len(content) // 2] + bytes(len(content)))
    assert "copy or download it again" in checking._check(path, 32, ("JPEG",)).reason


def noise(kind: str, **options: Any) -> bytes:
    picture = Image.merge("RGB", [Image.effect_noise((600, 400), spread) for spread in (60, 90, 120)])
    return as_file(picture, kind, **options).getvalue()


@pytest.mark.parametrize(
    ("kind", "options"),
    [("JPEG", {}), ("JPEG", {"optimize": True}), ("JPEG", {"progressive": True}), ("JPEG", {"quality": 98}),
     ("WEBP", {}), ("WEBP", {"lossless": True})],
)  # fmt: skip
def test_a_picture_of_which_a_part_was_never_written(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    content = noise(kind, **options)
    half = len(content) // 2
    (tmp_path / "a").write_bytes(content[:half] + bytes(2000) + content[half + 2000 :])
    assert "copy or download it again" in checking._check(tmp_path / "a", 32, (kind,)).reason


@pytest.mark.parametrize("progressive", [False, True])
def test_what_a_phone_appends_to_a_photo_does_not_matter(progressive: bool, tmp_path: Path) -> None:
    content = noise("JPEG", progressive=progressive)
    (tmp_path / "a.jpg").write_bytes(content + b"\0\0\0\x18ftypmp42" + bytes(9000) + b"SEFHeSEFT" + bytes(3000))
    assert checking._check(tmp_path / "a.jpg", 32, ("JPEG",)).used


@pytest.mark.parametrize(
    ("kind", "options"),
    [("JPEG", {}), ("JPEG", {"optimize": True}), ("JPEG", {"progressive": True}), ("JPEG", {"quality": 98}),
     ("WEBP", {}), ("WEBP", {"lossless": True}), ("WEBP", {"quality": 10})],
)  # fmt: skip
@pytest.mark.parametrize("ground", ["white", "black", "grey"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_plain_ground_is_not_taken_for_a_missing_part(
    mode: str, ground: str, kind: str, options: dict[str, Any], tmp_path: Path
) -> None:
    picture = Image.new(mode, (4000, 3000), ground)
    picture.paste(gradient(600, 400), (1700, 1300))
    (tmp_path / "a").write_bytes(as_file(picture, kind, **options).getvalue())
    assert checking._check(tmp_path / "a", 32, (kind,)).used


def test_a_large_plain_ground_of_a_webp(tmp_path: Path) -> None:
    picture = Image.new("RGB", (8000, 6000), "white")
    picture.paste(gradient(600, 400), (1700, 1300))
    content = as_file(picture, "WEBP").getvalue()
    assert bytes(1024) in content
    (tmp_path / "a").write_bytes(content)
    assert checking._check(tmp_path / "a", 32, ("WEBP",)).used


def test_large_pictures_and_long_texts_are_used(tmp_path: Path) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("XML:com.adobe.xmp", "x" * 5_000_000, zip=True)
    text.add_itxt("history", "y" * 5_000_000, zip=True)
    gradient().save(tmp_path / "a.png", pnginfo=text, icc_profile=bytes(3_000_000))
    Image.new("1", (16_384, 12_288)).save(tmp_path / "b.png")  # 201 megapixels
    Image.new("1", (16_384, 16_384)).save(tmp_path / "c.png")
    found = checking.check_pictures(sorted(tmp_path.iterdir()), 32, ("PNG",))
    reasons = [picture.reason for picture in found]
    assert reasons == ["", "", "unreadable: 16384x16384 are over 250 megapixels: scale it down"]


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_a_picture_drawn_by_this_program_is_recognised(suffix: str, tmp_path: Path) -> None:
    settings = vars(Config()) | {"lora_sha256": None}
    drawn = recipe.Recipe(recipe.Design(0, "lace", 7), True, [recipe.Design(0, "lace", 7)], settings)
    recipe.save_picture(tmp_path / f"a{suffix}", gradient(), drawn)
    (tmp_path / "b.png").write_bytes(gallery.contact_sheet([gradient()]))
    (tmp_path / "c.png").write_bytes(metrics._plot([{"step": 1, "loss": 0.5}], has_samples=True, validation={}))
    jpg(tmp_path / "d.jpg")
    gradient().save(tmp_path / "e.jpg", comment=b'{"prompt": "of another program"}')
    found = checking.check_pictures(sorted(tmp_path.iterdir()), 32, ("PNG", "JPEG"))
    assert [picture.drawn for picture in found] == [True, True, True, False, False]


@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
def test_texts_that_are_named_as_something_else(mode: str, tmp_path: Path) -> None:
    """Pillow has a PNG's texts in the same dictionary as what it found out about the picture."""
    for name in ("exif", "xmp", "transparency", "icc_profile", "Raw profile type exif", "comment", "gamma", "bbox"):
        text = PngImagePlugin.PngInfo()
        text.add_text(name, "tiff:Orientation>6 [1")
        gradient().convert(mode).save(tmp_path / "a.png", pnginfo=text)
        found = checking._check(tmp_path / "a.png", 32, ("PNG",))
        assert found.reason.startswith("unreadable: damaged") if name in ("transparency", "bbox") else found.used, name


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("camera", [True, False])
def test_the_camera_of_a_file(camera: bool, kind: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation], exif[ExifTags.Base.Software] = 1, "a program"
    if camera:
        exif[ExifTags.Base.Model] = "iPhone 13"
    (tmp_path / "a").write_bytes(as_file(gradient(), kind, exif=exif).getvalue())
    assert checking.check_pictures([tmp_path / "a"], 32, (kind,))[0].camera == camera
