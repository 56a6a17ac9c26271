"""Planning a training: what is checked, written and launched. The launch itself is faked."""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.numpy import save_file

import data_utils
import helpers
import train
from helpers import ROOT, Make, gradient, jpg, jpgs, names, snapshot, truncated_jpg
from lace_lora import process
from lace_lora.config import Config, load_config
from lace_lora.errors import UserError
from lace_lora.pictures import gallery, recipe
from lace_lora.pictures.checking import Picture
from lace_lora.training import checkpoint, launch, resuming, selection

LORA = "pytorch_lora_weights.safetensors"


class FakeLaunch:
    """Fake of process.run: reads the job and writes checkpoints and a LoRA as a training would."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []
        self.jobs: list[dict[str, Any]] = []
        self.accelerate: list[Any] = []
        self.stop_at = 10_000

    def __call__(self, command: list[str], folder: Path) -> str:
        self.commands.append(command)
        self.accelerate.append(yaml.safe_load(Path(command[command.index("--config_file") + 1]).read_text()))
        job = json.loads(Path(command[command.index("--job") + 1]).read_text())
        self.jobs.append(job)
        config = load_config(command[command.index("--config") + 1])
        output_dir, last = Path(config.lora_output_dir), min(config.max_train_steps, self.stop_at)
        first = int(job["resume"].rpartition("-")[2]) if job["resume"] else 0
        for step in range(config.checkpointing_steps, last + 1, config.checkpointing_steps):
            if step > first:
                state = json.dumps({"step": step, "learns": job["fingerprint"], "origin": job["origin"]})
                checkpoint.publish(output_dir, step, lambda to, state=state: put(to / "state.json", state), keep=9)  # type: ignore[misc]
        if last < config.max_train_steps:
            raise UserError(f"stopped at step {last}", 130)
        metadata = {"step": str(last), "learns": json.dumps(job["fingerprint"])}
        metadata |= {"origin": job["origin"]} if job["origin"] else {}
        save_file({"w": np.zeros(3, np.float32)}, output_dir / LORA, metadata)
        return f"trained {last} steps"


def put(path: Path, text: str) -> None:
    path.write_text(text)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> FakeLaunch:
    fake = FakeLaunch()
    monkeypatch.setattr(process, "run", fake)
    return fake


@pytest.fixture
def make(tmp_path: Path) -> Make:
    jpgs(tmp_path / "photos", 3)

    def settings(**changes: Any) -> Config:
        values: dict[str, Any] = {"images_dir": str(tmp_path / "photos"), "lora_output_dir": str(tmp_path / "lora")}
        values |= {"min_images": 1, "skip_bad_images": True}
        values |= {
            "pretrained_model": str(ROOT / "demo/model/base"),
            "min_image_size": 32,
            "max_train_steps": 8,
        }
        return Config(**(values | {"checkpointing_steps": 4} | changes))

    return settings


def refused(config: Config, part: str, code: int = 2, dry_run: bool = False) -> None:
    helpers.refused(lambda: train.run(config, dry_run), part, code)


def test_the_job_for_the_training_process(tmp_path: Path, launched: FakeLaunch, make: Make) -> None:
    (tmp_path / "photos" / "lace_1.txt").write_text("a rosette")
    truncated_jpg(tmp_path / "photos" / "cut.jpg")
    jpg(tmp_path / "photos" / "tiny.jpg", gradient(20, 20))
    config = make(learning_rate=3e-5, prompt=("edge", "no"), lora_alpha=2.0)
    train.run(config)
    [job] = launched.jobs
    paths = [str(tmp_path / "photos" / f"lace_{index}.jpg") for index in range(3)]
    assert job["captions"] == dict(
        zip(paths, [config.instance_prompt, "a rosette", config.instance_prompt], strict=True)
    )
    assert job["original_size"] == 48
    assert job["resume"] is None
    assert load_config(tmp_path / "lora" / "config.yaml") == config
    annotations = (tmp_path / "photos" / "annotations.txt").read_text()
    assert annotations == "".join(f"{path}\t{caption}\n" for path, caption in job["captions"].items())
    [settings] = launched.accelerate
    assert (settings["distributed_type"], settings["num_processes"]) == ("NO", 1)


def test_the_users_files_are_not_touched(tmp_path: Path, launched: FakeLaunch, make: Make) -> None:
    photos = tmp_path / "photos"
    (photos / "lace_0.txt").write_text("mine")
    (photos / "notes.docx").write_bytes(b"x")
    truncated_jpg(photos / "cut.jpg")
    before = snapshot(photos)
    train.run(make())
    after = snapshot(photos)
    del before[str(photos)]
    assert {name: after[name] for name in before} == before
    assert names(photos) - {Path(name).name for name in before} == {"annotations.txt", ".annotations.sha256"}


def test_the_command_is_one_that_accelerate_accepts(launched: FakeLaunch, make: Make, tmp_path: Path) -> None:
    theirs = pytest.importorskip("accelerate.commands.launch")
    train.run(make(lora_output_dir=str(tmp_path / "mit Leerzeichen ü")))
    [command] = launched.commands
    assert command[1:3] == ["-m", "lace_lora.process"]
    parsed = theirs.launch_command_parser().parse_args(command[3:])
    assert Path(parsed.training_script) == ROOT / "train_lora.py"
    assert parsed.training_script_args[:2] == ["--config", str(tmp_path / "mit Leerzeichen ü" / "config.yaml")]
    assert Path(parsed.config_file).name == "accelerate.yaml"
    assert parsed.num_cpu_threads_per_process >= 1
    keys = set(launched.accelerate[0])
    config_args = pytest.importorskip("accelerate.commands.config.config_args")
    assert keys <= set(config_args.ClusterConfig.__dataclass_fields__)


def test_the_users_accelerate_config_is_used(tmp_path: Path, launched: FakeLaunch, make: Make) -> None:
    put(tmp_path / "mine.yaml", "distributed_type: MULTI_GPU\nnum_processes: 2\n")
    config = make(accelerate_config=str(tmp_path / "mine.yaml"))
    train.run(config)
    assert launched.accelerate == [{"distributed_type": "MULTI_GPU", "num_processes": 2}]
    command = launch.build_command(config, Path("ours.yaml"), Path("job.json"))
    assert command[command.index("--config_file") + 1] == str(tmp_path / "mine.yaml")


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("distributed_type: DEEPSPEED\n", "DeepSpeed or FSDP"),
        ("distributed_type: fsdp\n", "DeepSpeed or FSDP"),
        ("deepspeed_config: {zero_stage: 2}\n", "DeepSpeed or FSDP"),
        ("mpirun_config: {mpirun_hostfile: hosts}\n", "uses MPI"),
        ("just words", "not an accelerate config file"),
        ("a: [", "not an accelerate config file"),
        ("num_processes: two\n", "not an accelerate config file"),
        ("num_processes: [2]\n", "not an accelerate config file"),
        (None, "not an accelerate config file"),
    ],
)
def test_accelerate_files_that_are_refused(
    text: str | None, part: str, dry_run: bool, tmp_path: Path, launched: FakeLaunch, make: Make
) -> None:
    if text is not None:
        put(tmp_path / "mine.yaml", text)
    config, before = make(accelerate_config=str(tmp_path / "mine.yaml")), snapshot(tmp_path)
    refused(config, part, dry_run=dry_run)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("state", ["new", "stopped", "finished", "by hand"])
def test_a_dry_run_writes_nothing(
    state: str, tmp_path: Path, launched: FakeLaunch, make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    if state == "stopped":
        launched.stop_at = 5
        refused(make(), "stopped", 130)
    elif state == "finished":
        train.run(make())
    elif state == "by hand":
        put(tmp_path / "photos" / "annotations.txt", f"{tmp_path}/photos/lace_1.jpg\tmine\n")
    before = snapshot(tmp_path)
    capsys.readouterr()
    train.run(make(), dry_run=True)
    assert snapshot(tmp_path) == before
    assert len(launched.commands) == (state in ("stopped", "finished"))
    printed = capsys.readouterr().out
    assert "3 used, 0 skipped" in printed
    if state == "finished":
        assert "Finished already" in printed
        return
    assert (f"resume from {tmp_path}/lora/checkpoint-4" in printed) == (state == "stopped")
    assert f"Would {'read' if state == 'by hand' else 'write'} {tmp_path}/photos/annotations.txt" in printed
    assert re.search(rf"^disk: [\d.]+ GB free for {tmp_path}/lora$", printed, re.MULTILINE)


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_model_of_another_kind_is_refused(dry_run: bool, launched: FakeLaunch, make: Make, tmp_path: Path) -> None:
    refused(make(pretrained_model=str(ROOT / "demo/model/refiner")), "is a refiner model", dry_run=dry_run)
    assert not (tmp_path / "lora").exists()
    assert not launched.commands


def test_a_dry_run_says_what_is_to_be_downloaded(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    train.run(make(pretrained_model="lace/base", device="cpu"), dry_run=True)
    printed = capsys.readouterr().out
    assert re.search(r"^download: lace/base, to .+ with [\d.]+ GB free$", printed, re.MULTILINE)
    assert "licence: for results of lace/base, its own" in printed


def test_a_dry_run_writes_the_report_it_was_asked_for(tmp_path: Path, make: Make) -> None:
    truncated_jpg(tmp_path / "photos" / "häkel 🧵.jpg")
    jpg(tmp_path / "photos" / "tiny.jpg", gradient(20, 20))
    truncated_jpg(tmp_path / "photos" / "broken \udc80.jpg")
    before = snapshot(tmp_path)
    train.run(make(report=str(tmp_path / "report.json")), dry_run=True)
    after = snapshot(tmp_path)
    assert set(after) - set(before) == {str(tmp_path / "report.json")}
    rows = {Path(row["path"]).name: row for row in json.loads((tmp_path / "report.json").read_text())["pictures"]}
    taken = {name: row["taken"] for name, row in rows.items()}
    bad = {"häkel 🧵.jpg": False, "broken \udc80.jpg": False, "tiny.jpg": False}
    assert taken == {f"lace_{index}.jpg": True for index in range(3)} | bad
    assert rows["lace_0.jpg"]["reason"] is None
    assert rows["tiny.jpg"]["reason"] == "too small: 20x20, min_image_size is 32"


def test_a_report_that_cannot_be_written(tmp_path: Path, make: Make) -> None:
    refused(make(report=str(tmp_path / "missing" / "report.json")), "report: cannot write .*report.json", 4, True)


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_preview_is_written(
    dry_run: bool, tmp_path: Path, launched: FakeLaunch, make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    truncated_jpg(tmp_path / "photos" / "cut.jpg")
    config = make(preview=str(tmp_path / "photos" / "preview.png"), image_extensions=(".jpg", ".png"))
    for _ in range(2):  # the second time it lies among the photos
        train.run(config, dry_run)
    assert f"Wrote {config.preview}: 3 pictures, cropped as for training" in capsys.readouterr().out
    assert not launched.jobs or len(launched.jobs[0]["captions"]) == 3
    with Image.open(str(config.preview)) as sheet:
        assert sheet.width == gallery.GAP + 3 * (gallery.NAMED + gallery.GAP)


def test_a_preview_that_cannot_be_written(tmp_path: Path, make: Make) -> None:
    refused(make(preview=str(tmp_path / "missing" / "a.png")), "preview: cannot write .*a.png .*: set it", 4, True)
    gradient().save(tmp_path / "photos" / "mine.png")
    before = snapshot(tmp_path)
    part = "preview: .*mine.png exists and is no preview: set it to another file"
    refused(make(preview=str(tmp_path / "photos" / "mine.png")), part, 4, True)
    assert snapshot(tmp_path) == before


def test_a_picture_that_is_deleted_before_the_preview(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = data_utils.report_text

    def delete_one(*arguments: Any) -> str:
        (tmp_path / "photos" / "lace_1.jpg").unlink()
        return report(*arguments)

    monkeypatch.setattr(data_utils, "report_text", delete_one)
    part = "preview: a picture can no longer be read .*lace_1.jpg.*: run the same command again"
    refused(make(preview=str(tmp_path / "a.png")), part, dry_run=True)
    assert not (tmp_path / "a.png").exists()


def test_without_a_good_picture_nothing_is_written(tmp_path: Path, launched: FakeLaunch, make: Make) -> None:
    config = make(min_image_size=500)
    before = snapshot(tmp_path)
    refused(config, "no pictures to train on")
    advice = "set image_extensions: \\[.png, .jpg\\], or set images_dir to another folder"
    refused(make(image_extensions=(".png",)), f"no pictures to train on: .*/photos has 3 .jpg: {advice}")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(("bad", "refuses"), [(1, False), (2, True)])
def test_more_than_a_tenth_of_bad_pictures_is_refused(
    bad: int, refuses: bool, tmp_path: Path, launched: FakeLaunch, make: Make
) -> None:
    jpgs(tmp_path / "photos", 10)
    for index in range(bad):
        truncated_jpg(tmp_path / "photos" / f"cut_{index}.jpg")
    if refuses:
        refused(make(skip_bad_images=False), "2 of 12 pictures cannot be used.*skip_bad_images: true")
        assert not launched.jobs
        train.run(make(skip_bad_images=True))
    else:
        train.run(make(skip_bad_images=False))
    assert len(launched.jobs[0]["captions"]) == 10


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_thumbnail_and_copies_do_not_count_as_broken(
    dry_run: bool, tmp_path: Path, launched: FakeLaunch, make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = jpgs(tmp_path / "photos", 5)
    jpg(tmp_path / "photos" / "thumbnail.jpg", gradient(20, 20))
    for number in range(3):
        (tmp_path / "photos" / f"lace_0 copy {number}.jpg").write_bytes(paths[0].read_bytes())
    train.run(make(skip_bad_images=False), dry_run)
    printed = capsys.readouterr().out
    assert "5 used, 4 skipped" in printed
    assert "too small    1: thumbnail.jpg (20x20, min_image_size is 32)" in printed
    assert "duplicate    3: lace_0 copy 0.jpg (equal to lace_0.jpg); lace_0 copy 1.jpg (equal to lace_0.jpg)" in printed
    if not dry_run:
        assert len(launched.jobs[0]["captions"]) == 5
        assert len((tmp_path / "photos" / "annotations.txt").read_text().splitlines()) == 5


def test_pictures_of_phones_are_used_by_default(tmp_path: Path, launched: FakeLaunch, make: Make) -> None:
    folder = tmp_path / "photos"
    (folder / "a.HEIC").write_bytes((ROOT / "tests/pictures/heic/turned.heic").read_bytes())
    for number, name in enumerate(("b.jpeg", "c.png", "d.webp", "e.bmp")):
        gradient(turn=10 + number).save(folder / name)
    train.run(make())
    used = [Path(path).name for path in launched.jobs[0]["captions"]]
    assert used == ["a.HEIC", "b.jpeg", "c.png", "d.webp", "lace_0.jpg", "lace_1.jpg", "lace_2.jpg"]


def test_more_extensions_and_subfolders_without_pictures_do_not_stop_a_resume(
    tmp_path: Path, launched: FakeLaunch, make: Make
) -> None:
    launched.stop_at = 5
    refused(make(image_extensions=(".jpg",)), "stopped", 130)
    refused(make(recursive=True), "stopped", 130)
    assert launched.jobs[1]["resume"] == str(tmp_path / "lora" / "checkpoint-4")


def test_subfolders(tmp_path: Path, launched: FakeLaunch, make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    photos = tmp_path / "photos"
    (photos / "sub").mkdir()
    inside = jpg(photos / "sub" / "lace.jpg", gradient(turn=9))
    put(photos / "sub" / "lace.txt", "a rosette")
    (photos / "lora" / "class_images").mkdir(parents=True)
    jpg(photos / "lora" / "class_images" / "class.jpg", gradient(turn=10))
    train.run(make(lora_output_dir=str(photos / "lora")), dry_run=True)
    assert "subfolders   1 .jpg in them; to use these too, set recursive: true" in capsys.readouterr().out
    train.run(make(lora_output_dir=str(photos / "lora"), recursive=True))
    captions = launched.jobs[0]["captions"]
    assert (len(captions), captions[str(inside)]) == (4, "a rosette")


def test_a_folder_with_pictures_in_subfolders_only(tmp_path: Path, make: Make) -> None:
    advice = "has no files, and 3 .jpg in subfolders: set recursive: true, or set images_dir to another folder"
    refused(make(images_dir=str(tmp_path)), f"no pictures to train on: {tmp_path} {advice}")


def test_of_equal_pictures_the_one_with_a_caption_is_used(tmp_path: Path, launched: FakeLaunch, make: Make) -> None:
    photos = tmp_path / "photos"
    (photos / "lace_0 (1).jpg").write_bytes((photos / "lace_0.jpg").read_bytes())
    put(photos / "lace_0.txt", "a rosette")
    train.run(make())
    assert launched.jobs[0]["captions"][str(photos / "lace_0.jpg")] == "a rosette"


def test_of_equal_pictures_the_one_in_the_users_annotations_is_used(
    tmp_path: Path, launched: FakeLaunch, make: Make
) -> None:
    photos = tmp_path / "photos"
    (photos / "lace_3.jpg").write_bytes((photos / "lace_0.jpg").read_bytes())
    put(photos / "annotations.txt", "lace_3.jpg\tmine\nlace_1.jpg\tmine too\n")
    train.run(make())
    assert launched.jobs[0]["captions"] == {str(photos / "lace_3.jpg"): "mine", str(photos / "lace_1.jpg"): "mine too"}


def test_too_few_pictures_are_refused(tmp_path: Path, launched: FakeLaunch, make: Make) -> None:
    truncated_jpg(tmp_path / "photos" / "lace_0.jpg")
    refused(make(min_images=3), "only 2 pictures to train on, but min_images is 3")
    train.run(make(min_images=2))


def test_the_users_annotations_choose_the_pictures(
    tmp_path: Path, launched: FakeLaunch, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    jpg(tmp_path / "elsewhere.jpg", gradient(turn=7))
    lines = [f"{tmp_path}/elsewhere.jpg\tone", f"{tmp_path}/photos/lace_2.jpg\ttwo", f"{tmp_path}/gone.jpg\tthree"]
    put(tmp_path / "photos" / "annotations.txt", "\n".join(lines))
    train.run(make())
    [job] = launched.jobs
    assert job["captions"] == {f"{tmp_path}/photos/lace_2.jpg": "two", f"{tmp_path}/elsewhere.jpg": "one"}
    assert "skipped 2 pictures that your own" in caplog.text


@pytest.mark.parametrize("images_dir", ["photos", "./photos/../photos", "link"])
def test_an_unresolved_folder_makes_no_picture_a_duplicate(
    images_dir: str, tmp_path: Path, launched: FakeLaunch, make: Make, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "link").symlink_to("photos")
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "photos" / "annotations.txt", f"{tmp_path}/photos/lace_1.jpg\tmine\nlace_2.jpg\tmine too\n")
    train.run(make(images_dir=images_dir, lora_output_dir="lora"))
    assert len(launched.jobs[0]["captions"]) == 2
    assert "3 used, 0 skipped" in capsys.readouterr().out


def test_lines_without_a_picture_are_listed_with_advice(
    tmp_path: Path, launched: FakeLaunch, make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path / "photos" / "annotations.txt", "lace_0.jpg\tone\ngone.jpg\ttwo\n/nowhere/x.jpg\tthree\n")
    advice = "correct .*/photos/annotations.txt, or delete it to have it written again"
    refused(make(skip_bad_images=False), f"2 of 5 pictures cannot be used.*{advice}")
    assert "not found    2: gone.jpg (a line of annotations.txt); x.jpg (a line" in capsys.readouterr().out
    put(tmp_path / "photos" / "annotations.txt", "/nowhere/x.jpg\tthree\n")
    refused(make(), f"no pictures to train on: .*{advice}")


def test_drawings_among_the_photos_are_left_out(
    tmp_path: Path, launched: FakeLaunch, make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    design = recipe.Design(0, "lace", 7)
    drawn = recipe.Recipe(design, True, [design], vars(Config()) | {"lora_sha256": None})
    for index in range(9):
        recipe.save_picture(tmp_path / "photos" / f"refined_output_{index}.jpg", gradient(), drawn)
    put(tmp_path / "photos" / "refined_output_0.txt", "no caption of a photo")
    train.run(make(skip_bad_images=False, lora_output_dir=str(tmp_path / "photos")))
    assert [Path(path).name for path in launched.jobs[0]["captions"]] == [f"lace_{index}.jpg" for index in range(3)]
    assert "refined" not in (tmp_path / "photos" / "annotations.txt").read_text()
    printed = capsys.readouterr().out
    assert "3 used, 9 skipped" in printed
    assert "not a photo  9: refined_output_0.jpg (drawn by this program); " in printed


def test_finished_already(tmp_path: Path, launched: FakeLaunch, make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    train.run(make())
    before = snapshot(tmp_path)
    train.run(make())
    train.run(make(max_train_steps=6))
    for folder, _ in checkpoint.checkpoints(tmp_path / "lora"):
        put(folder / "state.json", "damaged")
    before |= {name: seen for name, seen in snapshot(tmp_path).items() if "checkpoint-" in name}
    train.run(make())
    assert snapshot(tmp_path) == before
    assert capsys.readouterr().out.count("Finished already") == 3
    assert len(launched.jobs) == 1


def test_more_steps_resume_and_the_finished_lora_stays_until_then(
    tmp_path: Path, launched: FakeLaunch, make: Make
) -> None:
    train.run(make())
    first = (tmp_path / "lora" / LORA).read_bytes()
    launched.stop_at = 10
    refused(make(max_train_steps=12), "stopped at step 10", 130)
    assert launched.jobs[1]["resume"] == str(tmp_path / "lora" / "checkpoint-8")
    assert (tmp_path / "lora" / LORA).read_bytes() == first


def test_an_interrupted_run_resumes_from_the_newest_complete_checkpoint(
    tmp_path: Path, launched: FakeLaunch, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    launched.stop_at = 7
    refused(make(checkpointing_steps=3), "stopped at step 7", 130)
    put(tmp_path / "lora" / "checkpoint-6" / "state.json", "damaged")
    train.run(make(learning_rate=1e-5, max_train_steps=7))
    assert launched.jobs[1]["resume"] == str(tmp_path / "lora" / "checkpoint-3")
    assert "skipped an unusable checkpoint (checkpoint-6: state.json" in caplog.text


def test_leftovers_of_killed_writes_are_removed_before_the_training(
    tmp_path: Path, launched: FakeLaunch, make: Make
) -> None:
    launched.stop_at = 2  # before it publishes anything
    (tmp_path / "lora" / ".checkpoint-4.77.tmp").mkdir(parents=True)
    put(tmp_path / "lora" / ".metrics.csv.77.tmp", "half")
    refused(make(), "stopped", 130)
    assert names(tmp_path / "lora") == {"config.yaml", "pictures.json"}


@pytest.mark.parametrize(
    "in_words", ["{lora}/checkpoint-4", "checkpoint-4", "checkpoint-4/", "{photos}/../lora/checkpoint-4"]
)
def test_a_named_checkpoint_is_where_the_run_begins_once(
    in_words: str, tmp_path: Path, launched: FakeLaunch, make: Make
) -> None:
    train.run(make())
    before = (tmp_path / "lora" / LORA).read_bytes()
    name = in_words.format(lora=tmp_path / "lora", photos=tmp_path / "photos")
    config = make(resume_from_checkpoint=name, learning_rate=1e-5, checkpointing_steps=2)
    launched.stop_at = 7
    refused(config, "stopped", 130)
    refused(config, "stopped", 130)  # checkpoint-8 has more steps, but is of the run before
    launched.stop_at = 12
    train.run(config)
    train.run(config)
    resumed = [Path(job["resume"]).resolve().name for job in launched.jobs[1:]]
    assert resumed == ["checkpoint-4", "checkpoint-6", "checkpoint-6"]
    assert (tmp_path / "lora" / LORA).read_bytes() != before
    train.run(make(max_train_steps=12))  # latest
    assert launched.jobs[-1]["resume"] == str(tmp_path / "lora" / "checkpoint-8")
    assert launched.jobs[-1]["origin"] == launched.jobs[1]["origin"]


def test_a_named_checkpoint_of_another_folder(tmp_path: Path, launched: FakeLaunch, make: Make) -> None:
    launched.stop_at = 7
    refused(make(), "stopped", 130)
    source = tmp_path / "lora" / "checkpoint-4"
    config = make(resume_from_checkpoint=str(source), lora_output_dir=str(tmp_path / "new"), checkpointing_steps=3)
    refused(config, "stopped", 130)
    refused(config, "stopped", 130)
    assert [job["resume"] for job in launched.jobs[1:]] == [str(source), str(tmp_path / "new" / "checkpoint-6")]


def test_a_named_checkpoint_that_cannot_be_used(tmp_path: Path, launched: FakeLaunch, make: Make) -> None:
    train.run(make())
    put(tmp_path / "lora" / "checkpoint-4" / "state.json", "damaged")
    refused(make(resume_from_checkpoint="checkpoint-4"), "lora/checkpoint-4 cannot be used \\(state.json")
    refused(
        make(resume_from_checkpoint="nowhere"),
        "nowhere cannot be used \\(no such folder\\): name a folder like checkpoint-500",
    )


@pytest.mark.parametrize("dry_run", [True, False])
def test_fewer_steps_than_the_newest_checkpoint_has_are_refused(
    dry_run: bool, tmp_path: Path, launched: FakeLaunch, make: Make
) -> None:
    launched.stop_at = 9
    refused(make(max_train_steps=12), "stopped", 130)
    before = snapshot(tmp_path)
    refused(
        make(max_train_steps=6), "max_train_steps is 6, fewer than .*checkpoint-8 has: raise it to 8", dry_run=dry_run
    )
    assert snapshot(tmp_path) == before
    train.run(make(max_train_steps=6, resume_from_checkpoint="checkpoint-4"))
    assert launched.jobs[-1]["resume"] == str(tmp_path / "lora" / "checkpoint-4")


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rank": 8}, "rank \\(was 16, is 8\\)"),
        ({"seed": 1, "resolution": 256}, "resolution \\(was 512, is 256\\), seed \\(was 42, is 1\\)"),
        ({"lora_alpha": 4.0}, "lora_alpha"),
        ({"lora_targets": "attention+feedforward"}, "lora_targets \\(was attention, is attention\\+feedforward\\)"),
        ({"pretrained_model": "other/model"}, "pretrained_model"),
        ({"instance_prompt": "other"}, "captions"),
        ({"min_image_size": 40}, "pictures"),
        ({"class_prompt": "a net"}, "class_prompt"),
        ({"num_class_images": 7}, "num_class_images \\(was 100, is 7\\)"),
        ({"width": 512}, "width"),
    ],
)
def test_a_changed_fingerprint_is_refused(
    changes: dict[str, Any], named: str, finished: bool, tmp_path: Path, launched: FakeLaunch, make: Make
) -> None:
    jpg(tmp_path / "photos" / "small.jpg", gradient(39, 39))
    launched.stop_at = 10_000 if finished else 7
    settings = partial(make, with_prior_preservation=True)
    if finished:
        train.run(settings())
    else:
        refused(settings(), "stopped", 130)
    before = snapshot(tmp_path)
    for steps in (8, 20):  # all of them done, and not
        changed = settings(max_train_steps=steps, **changes)
        refused(changed, f"changed: .*{named}.*lora_output_dir to a new folder")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"crops_per_image": 2}, "crops_per_image \\(was 4, is 2\\)"),
        ({"crops_per_image": 1}, "crops_per_image \\(was 4, is 1\\)"),
        ({"crop_caption": ""}, "crop_caption \\(was , close-up, is \\)"),
    ],
)
def test_close_ups_cannot_change_within_a_run(
    changes: dict[str, Any], named: str, tmp_path: Path, launched: FakeLaunch, make: Make
) -> None:
    jpg(tmp_path / "photos" / "large.jpg", gradient(1400, 1100))
    launched.stop_at = 7
    refused(make(), "stopped", 130)
    refused(make(**changes), f"changed: {named}.*lora_output_dir to a new folder")
    launched.stop_at = 10_000
    train.run(make(width=512, height=768))  # what is drawn later does not matter


def test_a_run_from_before_there_were_close_ups_goes_on_without(
    tmp_path: Path, launched: FakeLaunch, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    jpg(tmp_path / "photos" / "large.jpg", gradient(1400, 1100))
    launched.stop_at, fingerprint = 7, resuming.run_fingerprint

    def as_it_was(*arguments: Any) -> dict[str, Any]:
        return {name: value for name, value in fingerprint(*arguments).items() if name != "crops_per_image"}

    with monkeypatch.context() as before:
        before.setattr(resuming, "run_fingerprint", as_it_was)
        refused(make(crops_per_image=1), "stopped", 130)
    refused(make(), "changed: crops_per_image \\(was 1, is 4\\)\\. ")
    launched.stop_at = 10_000
    train.run(make(crops_per_image=1))
    assert [job["resume"] is not None for job in launched.jobs] == [False, True]


@pytest.mark.parametrize(
    ("count", "changes", "held_out"),
    [
        (39, {}, 0), (40, {}, 4), (100, {}, 5), (250, {}, 12), (1000, {}, 24), (250, {"validation_fraction": 0.01}, 4),
        (250, {"validation_fraction": 0.0}, 0), (250, {"validation_steps": 0}, 12), (250, {"train_script": "it.py"}, 0),
    ],
)  # fmt: skip
def test_some_of_many_pictures_are_held_out(count: int, changes: dict[str, Any], held_out: int, tmp_path: Path) -> None:
    pictures = [Picture(tmp_path / f"{index}.jpg", sha256=f"{index}") for index in range(count)]
    training, found = selection.split(Config(**changes), pictures)
    assert len(found) == held_out
    assert sorted([*training, *found], key=lambda picture: int(picture.sha256)) == pictures
    _, again = selection.split(Config(seed=7, **changes), pictures[::-1])
    assert again == found
    _, with_more = selection.split(Config(**changes), [*pictures, Picture(tmp_path / "more.jpg", sha256="999999")])
    assert set(found) <= set(with_more)


def test_held_out_pictures_are_no_part_of_the_training(
    tmp_path: Path, launched: FakeLaunch, make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(41):
        jpg(tmp_path / "photos" / f"lace_{number}.jpg", gradient(64 + number, 48))
    launched.stop_at = 7
    refused(make(), "stopped", 130)
    [job] = launched.jobs
    assert len(job["held_out"]) == 4
    assert len(job["captions"]) == 37
    assert not job["held_out"].keys() & job["captions"].keys()
    assert job["contents"].keys() == job["held_out"].keys() | job["captions"].keys()
    printed = capsys.readouterr().out
    assert "held out     4: not trained on, to measure the loss on (validation_fraction)" in printed
    assert "each of 2 of the 37 pictures" in printed
    for fraction in (0.5, 0.0):
        refused(make(validation_fraction=fraction), "which pictures are held out \\(validation_fraction\\)")
    launched.stop_at = 10_000
    train.run(make(validation_steps=0, validation_fraction=0.06))  # the same pictures are held out


def test_close_ups_are_counted(
    tmp_path: Path, launched: FakeLaunch, make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    jpg(tmp_path / "photos" / "large.jpg", gradient(1400, 1100))
    train.run(make(max_train_steps=70))
    printed = capsys.readouterr().out
    assert "views        7: all of each picture, and 3 close-ups" in printed
    assert "each of 2 of the 7 views of 4 pictures; every view is seen 20 times in all (20.0 epochs)" in printed
    assert {Path(path).name: views for path, views in launched.jobs[0]["views"].items()} == {
        "lace_0.jpg": 1, "lace_1.jpg": 1, "lace_2.jpg": 1, "large.jpg": 4,
    }  # fmt: skip


def test_pictures_that_are_new_or_gone_are_named(tmp_path: Path, launched: FakeLaunch, make: Make) -> None:
    train.run(make())
    gradient(96, 72).save(tmp_path / "photos" / "lace_9.png")
    refused(make(), "changed: pictures \\(1 new: lace_9.png\\), captions")
    (tmp_path / "photos" / "lace_1.jpg").rename(tmp_path / "lace_1.jpg")
    refused(make(), "changed: pictures \\(1 new: lace_9.png, and 1 gone: lace_1.jpg\\), captions.*set init_lora: ")
    (tmp_path / "lora" / resuming.PICTURES_FILE).write_text("[]")
    refused(make(), "changed: pictures, captions")


def test_a_lora_to_begin_with(tmp_path: Path, launched: FakeLaunch, make: Make) -> None:
    lora = {f"unet.down_blocks.1.attn1.to_q.lora_{part}.weight": np.zeros(shape, np.float32)
            for part, shape in (("A", (16, 96)), ("B", (96, 16)))}  # fmt: skip
    (tmp_path / "first").mkdir()
    save_file(lora, tmp_path / "first" / LORA)
    launched.stop_at = 7
    begun = partial(make, init_lora=str(tmp_path / "first"))  # a folder, or its file
    refused(begun(), "stopped", 130)
    assert launched.jobs[0]["models"]["init_lora"] == str(tmp_path / "first" / LORA)
    refused(begun(rank=8), f"init_lora: .*{LORA} has rank 16, and rank is 8: set rank: 16")
    refused(make(init_lora=str(tmp_path / "gone")), "init_lora: no LoRA found at .*gone: .*leave it empty")
    refused(make(init_lora=str(tmp_path / "photos" / "lace_1.jpg")), "lace_1.jpg is not a .safetensors file")
    refused(make(init_lora=str(tmp_path / "first"), pretrained_model=str(ROOT / "demo/model/base"), seed=7), "seed")
    save_file({name: value + 1 for name, value in lora.items()}, tmp_path / "other.safetensors")
    refused(make(init_lora=str(tmp_path / "other.safetensors")), "changed: init_lora\\. ")
    launched.stop_at = 10_000
    train.run(make())  # the checkpoint has all of it


ATTENTION = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
KOHYA = "lora_unet_input_blocks_4_1_transformer_blocks_0"


@pytest.mark.parametrize(
    ("layers", "changes", "reason"),
    [
        ({"double_blocks.lora_A.weight": 16}, {}, "is not a LoRA for this model"),
        ({f"{ATTENTION}.lora_A.weight": 16, f"{KOHYA}_ff_net_0_proj.lora_down.weight": 16}, {},
         "adapts feed-forward layers too: set lora_targets: attention\\+feedforward"),
        ({f"{ATTENTION}.lora_A.weight": 16, "lora_te1_encoder_layers_0_self_attn_q_proj.lora_down.weight": 16},
         {}, "adapts text encoders too: set train_text_encoder: true"),
        ({f"{ATTENTION}.lora_A.weight": 16, "lora_unet_input_blocks_4_1_proj_in.lora_down.weight": 16}, {},
         "adapts layers that do not train here, such as lora_unet_input_blocks_4_1_proj_in"),
        ({f"{ATTENTION}.lora_A.weight": 16, f"{KOHYA}_attn2_to_k.lora_down.weight": 4}, {}, "layers of several ranks"),
        ({f"{ATTENTION}.lora_A.weight": 16, f"{KOHYA}_ff_net_2.lora_down.weight": 16},
         {"lora_targets": "attention+feedforward"}, ""),
        ({f"{ATTENTION}.lora_A.weight": 16, "text_encoder.encoder.layers.0.self_attn.q_proj.lora_A.weight": 16},
         {"train_text_encoder": True}, ""),
    ],
)  # fmt: skip
def test_a_lora_to_begin_with_fits_the_training(
    layers: dict[str, int], changes: dict[str, Any], reason: str, tmp_path: Path, launched: FakeLaunch, make: Make
) -> None:
    path = tmp_path / "first.safetensors"
    save_file({name: np.zeros((rank, 96), np.float32) for name, rank in layers.items()}, path)
    config = make(init_lora=str(path), **changes)
    if reason:
        refused(config, reason)
    else:
        train.run(config)
    assert len(launched.jobs) == (not reason)


def test_a_run_older_than_lora_targets_has_trained_the_attention(
    tmp_path: Path, launched: FakeLaunch, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = resuming.run_fingerprint
    monkeypatch.setattr(
        resuming, "run_fingerprint", lambda *of: {k: v for k, v in now(*of).items() if k != "lora_targets"}
    )
    train.run(make())
    monkeypatch.setattr(resuming, "run_fingerprint", now)
    refused(make(max_train_steps=12, lora_targets="attention+feedforward"), "changed: lora_targets \\(was attention")
    train.run(make(max_train_steps=12))
    assert launched.jobs[-1]["resume"] == str(tmp_path / "lora" / "checkpoint-8")


def test_moved_pictures_have_the_same_fingerprint(tmp_path: Path, launched: FakeLaunch, make: Make) -> None:
    train.run(make())
    (tmp_path / "photos").rename(tmp_path / "moved")
    (tmp_path / "moved" / "annotations.txt").unlink()
    (tmp_path / "moved" / "lace_0.jpg").rename(tmp_path / "moved" / "renamed.jpg")
    train.run(make(images_dir=str(tmp_path / "moved"), max_train_steps=12, lora_alpha=16.0))
    assert launched.jobs[1]["resume"] == str(tmp_path / "lora" / "checkpoint-8")


def test_files_of_other_programs_are_never_overwritten(tmp_path: Path, launched: FakeLaunch, make: Make) -> None:
    train.run(make())
    refused(make(resume_from_checkpoint=None, max_train_steps=9), "contains an earlier run")
    for content in (b"", b"not safetensors"):
        (tmp_path / "lora" / LORA).write_bytes(content)
        refused(make(), "is not a LoRA of this program")
    save_file({"w": np.zeros(3, np.float32)}, tmp_path / "lora" / LORA)
    refused(make(), "is not a LoRA of this program")
    assert len(launched.jobs) == 1


def test_no_complete_checkpoint_and_no_lora(tmp_path: Path, launched: FakeLaunch, make: Make) -> None:
    launched.stop_at = 7
    refused(make(), "stopped", 130)
    put(tmp_path / "lora" / "checkpoint-4" / "state.json", "damaged")
    refused(make(), "no complete checkpoint in .* \\(checkpoint-4: state.json")


def test_a_finished_lora_without_checkpoints_is_not_trained_over(
    tmp_path: Path, launched: FakeLaunch, make: Make
) -> None:
    train.run(make(checkpointing_steps=100))
    before = snapshot(tmp_path)
    refused(make(max_train_steps=12), "no checkpoint is left to resume from")
    assert snapshot(tmp_path) == before


def test_an_output_folder_that_cannot_be_created(tmp_path: Path, launched: FakeLaunch, make: Make) -> None:
    put(tmp_path / "file", "x")
    refused(make(lora_output_dir=str(tmp_path / "file" / "lora")), "cannot write", 4)


def test_annotations_changed_to_a_list_of_other_pictures_is_a_change(
    tmp_path: Path, launched: FakeLaunch, make: Make
) -> None:
    train.run(make())
    path = tmp_path / "photos" / data_utils.ANNOTATIONS
    put(path, path.read_text().replace("a photo of", "one photo of"))
    refused(make(max_train_steps=12), "changed: captions")


def test_odd_settings_are_warned_about(
    tmp_path: Path, launched: FakeLaunch, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "photos" / "lace_1.txt").write_text("a doily")
    train.run(make(learning_rate=1.0))
    assert "warning: 1 of 3 captions without <myspecialstyle>, such as 'a doily'" in caplog.text
    assert "warning: learning_rate is 1, far too high" in caplog.text


@pytest.mark.parametrize("dry_run", [True, False])
def test_sdxl_itself_is_not_trained_without_a_gpu(
    dry_run: bool, tmp_path: Path, launched: FakeLaunch, make: Make, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("lace_lora.sdxl.hub.fetch_models", lambda *_: pytest.fail("something is downloaded"))
    refused(make(pretrained_model="lace/base"), "training SDXL on a CPU takes days: use Colab", dry_run=dry_run)
    assert "GPU: none that NVIDIA's driver reports" in capsys.readouterr().out
    assert not (tmp_path / "lora").exists()
