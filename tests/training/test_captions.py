"""Captions by `caption_model`: written once, corrected by the user, trained with. The models are tiny and random."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

import train
from helpers import Make, RunHere, gradient, jpg, jpgs, names, refused, snapshot, truncated_jpg
from lace_lora import process
from lace_lora.config import Config, dump_config, load_config
from lace_lora.pictures import crops
from lace_lora.training import checkpoint, resuming, write_captions

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [*SPECIAL, "a", "white", "black", "doily", "net", "edge", "on", "with", "of"]
TINY = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
VISION = TINY | {"num_hidden_layers": 1, "image_size": 32, "patch_size": 8, "initializer_range": 1.0}
SIDE = {"height": 32, "width": 32}
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{{ '[MASK]' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endfor %}"
)


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("blip")
    tokens = {"bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    text = {"vocab_size": len(WORDS), "num_hidden_layers": 1, "encoder_hidden_size": 32, "max_position_embeddings": 80}
    torch.manual_seed(33)  # large weights, so that what it says depends on the picture
    config = BlipConfig(
        text_config=TINY | text | tokens | {"initializer_range": 1.0}, vision_config=VISION, initializer_range=1.0
    )
    BlipForConditionalGeneration(config).save_pretrained(folder)
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(WORDS)})
    BlipProcessor(BlipImageProcessor(size=SIDE), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that chats: it is asked, and repeats the question before its answer."""
    folder = tmp_path_factory.mktemp("llava")
    words = Tokenizer(WordLevel({word: number for number, word in enumerate([*WORDS, *ASKED])}, "[UNK]"))
    words.pre_tokenizer = Whitespace()
    words.add_special_tokens(SPECIAL)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", image_token="[MASK]")
    vision = CLIPVisionConfig(**TINY, num_hidden_layers=1, image_size=32, patch_size=16)
    text = LlamaConfig(**TINY, num_hidden_layers=1, vocab_size=len(words.get_vocab()), eos_token_id=3, pad_token_id=0)
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=4, vision_feature_layer=-1)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    pictures = CLIPImageProcessor(size=SIDE, crop_size=SIDE)
    LlavaProcessor(
        pictures, tokenizer, patch_size=16, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)  # fmt: skip
    return folder


ASKED = [*dict.fromkeys(write_captions.REQUEST.rstrip(".").split()), "."]


class FakeRun:
    """Fake of process.run: writes captions in this process, and takes the job of a training."""

    def __init__(self) -> None:
        self.written: list[list[str]] = []
        self.trained: list[dict[str, str]] = []

    def __call__(self, command: list[str], folder: Path) -> str:
        job = json.loads(Path(command[command.index("--job") + 1]).read_text())
        if "lace_lora.training.write_captions" in command:
            config = load_config(command[command.index("--config") + 1])
            self.written.append([Path(path).name for path in job["to_caption"]])
            return write_captions.write(config, job["to_caption"])
        self.trained.append({Path(path).name: caption for path, caption in job["captions"].items()})
        return "trained"


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> FakeRun:
    fake = FakeRun()
    monkeypatch.setattr(process, "run", fake)
    return fake


@pytest.fixture
def make(settings: Make, blip: Path, tmp_path: Path) -> Make:
    """Settings with three photos of their own and the tiny BLIP."""
    jpgs(tmp_path / "photos")

    def changed(**changes: Any) -> Config:
        return settings(**{"images_dir": str(tmp_path / "photos"), "caption_model": str(blip), **changes})

    return changed


def by_blip(config: Config, picture: Path) -> str:
    """What BLIP's own classes say about the part of a picture that training sees."""
    folder = str(config.caption_model)
    processor, model = BlipProcessor.from_pretrained(folder), BlipForConditionalGeneration.from_pretrained(folder)
    [(part, _)] = crops.open_views(picture, crops.Cropping([(config.resolution, config.resolution)]), ["JPEG"])
    tokens = model.generate(**processor(images=part, return_tensors="pt"), max_new_tokens=60, do_sample=False)
    return str(processor.decode(tokens[0], skip_special_tokens=True))


def test_captions_are_written_corrected_and_trained_with(
    make: Make, launched: FakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos, folder, config = tmp_path / "photos", tmp_path / "lora" / "captions", make()
    (photos / "lace_1.txt").write_text("my own rosette")
    before = snapshot(photos)
    train.run(config)
    assert snapshot(photos) == before  # no annotations either
    assert names(tmp_path / "lora") == {"captions"}
    assert names(folder) == {"lace_0.jpg.txt", "lace_2.jpg.txt"}
    said = f"wrote 2 captions to {folder}: read and correct them, then run the same command again"
    assert said in capsys.readouterr().out.splitlines()[-1]
    descriptions = {name: by_blip(config, photos / name) for name in ("lace_0.jpg", "lace_2.jpg")}
    assert len({"", *descriptions.values()}) == 3
    for name, description in descriptions.items():
        assert (folder / f"{name}.txt").read_text() == f"{config.instance_prompt}, {description}\n"

    (folder / "lace_0.jpg.txt").write_text("<myspecialstyle>,\n a doily \n")
    jpg(photos / "new.jpg", gradient(turn=7))
    kept = {name: (folder / name).stat().st_mtime_ns for name in names(folder)}
    train.run(config)
    assert launched.written == [["lace_0.jpg", "lace_2.jpg"], ["new.jpg"]]
    assert not launched.trained
    assert {name: (folder / name).stat().st_mtime_ns for name in kept} == kept

    capsys.readouterr()
    train.run(config)
    assert len(launched.written) == 2
    assert launched.trained == [{
        "lace_0.jpg": "<myspecialstyle>, a doily",
        "lace_1.jpg": "my own rosette",
        "lace_2.jpg": f"{config.instance_prompt}, {by_blip(config, photos / 'lace_2.jpg')}",
        "new.jpg": f"{config.instance_prompt}, {by_blip(config, photos / 'new.jpg')}",
    }]  # fmt: skip
    counts = "captions     4: 1 from .txt files next to the pictures, 3 by the caption model, the others"
    assert counts in capsys.readouterr().out
    assert "my own rosette" in (photos / "annotations.txt").read_text()


def test_one_process_writes_them_however_many_train(
    make: Make, run_here: RunHere, two_processes: str, tmp_path: Path
) -> None:
    (tmp_path / "my.yaml").write_text(dump_config(make(accelerate_config=two_processes)))
    code, _ = run_here("--mode", "train", "--config", str(tmp_path / "my.yaml"))
    assert code == 0
    assert names(tmp_path / "lora" / "captions") == {f"lace_{number}.jpg.txt" for number in range(3)}


def test_pictures_of_one_name_have_captions_of_their_own(make: Make, launched: FakeRun, tmp_path: Path) -> None:
    photos, folder = tmp_path / "photos", tmp_path / "lora" / "captions"
    (photos / "sub").mkdir()
    jpg(photos / "sub" / "lace_0.jpg", gradient(turn=8))
    gradient(turn=9).save(photos / "lace_0.png")
    train.run(make(recursive=True))
    expected = {"lace_0.jpg.txt", "lace_0.png.txt", "lace_1.jpg.txt", "lace_2.jpg.txt", "sub/lace_0.jpg.txt"}
    assert {str(path.relative_to(folder)) for path in folder.rglob("*.txt")} == expected
    train.run(make(recursive=True))
    assert len(launched.trained) == 1


def test_who_lists_captions_in_annotations_gets_none(make: Make, launched: FakeRun, tmp_path: Path) -> None:
    (tmp_path / "photos" / "annotations.txt").write_text("".join(f"lace_{n}.jpg\tmine\n" for n in range(3)))
    train.run(make())
    assert launched.trained == [{f"lace_{number}.jpg": "mine" for number in range(3)}]
    assert not launched.written


def test_copied_annotations_of_an_earlier_run_do_not_replace_them(
    make: Make, launched: FakeRun, tmp_path: Path
) -> None:
    train.run(make(caption_model=None))
    (tmp_path / "photos" / ".annotations.sha256").unlink()  # which is hidden, and left behind by a copy
    for _ in range(2):
        train.run(make(lora_output_dir=str(tmp_path / "second")))
    assert launched.trained[1]["lace_0.jpg"].startswith("a photo of <myspecialstyle>, ")


def test_an_earlier_run_without_captions_is_refused_before_any_is_written(
    make: Make, launched: FakeRun, tmp_path: Path
) -> None:
    config = make(caption_model=None)
    pictures, annotations, _ = train.check_dataset(config)
    state = {"step": 2, "learns": resuming.run_fingerprint(config, pictures, annotations.captions), "origin": None}

    def write_state(folder: Path) -> None:
        (folder / "state.json").write_text(json.dumps(state))

    (tmp_path / "lora").mkdir()
    checkpoint.publish(tmp_path / "lora", 2, write_state, keep=2)
    refused(lambda: train.run(make()), "changed: captions. Change them back, or set lora_output_dir to a new folder")
    assert not launched.written


def test_a_dry_run_says_what_would_be_written(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = snapshot(tmp_path)
    train.run(make(caption_model="lace/captions"), dry_run=True)
    assert snapshot(tmp_path) == before
    printed = capsys.readouterr().out
    assert f"Would write 3 captions to {tmp_path}/lora/captions, and stop for you to correct them" in printed
    assert "download: lace/captions, to " in printed


def test_diffusers_script_has_no_use_for_captions(make: Make, tmp_path: Path) -> None:
    _, _, to_caption = train.check_dataset(make(train_script="theirs.py"))
    assert not to_caption


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def damaged(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"x" * 100)


def with_code(folder: Path) -> None:
    (folder / "mine.py").write_text("raise SystemExit('this code was run')")
    change(folder, {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}})


def change(folder: Path, changes: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("spoil", "part"),
    [
        (without_weights, "has no safetensors weights: choose another one, such as"),
        (damaged, "cannot be used .*: choose an image-to-text model of transformers, such as"),
        (with_code, "cannot be used .*custom code.*: choose an image-to-text model"),
        (lambda folder: change(folder, {"model_type": "clip"}), "a model of type clip writes no captions"),
        (lambda folder: change(folder, {"model_type": "none"}), "cannot be used .*: choose an image-to-text model"),
        (lambda folder: change(folder, {"vision_config": VISION | {"num_hidden_layers": 2}}), "has no weights for vis"),
        (lambda folder: (folder / "processor_config.json").unlink(), "cannot be used"),
        (shutil.rmtree, "no model found at .*: check the path"),
    ],
)
def test_a_model_that_cannot_write_captions(
    make: Make, launched: FakeRun, blip: Path, tmp_path: Path, spoil: Callable[[Path], object], part: str
) -> None:
    folder = shutil.copytree(blip, tmp_path / "spoiled")
    spoil(folder)
    assert "\n" not in refused(lambda: train.run(make(caption_model=str(folder))), part)
    assert not (tmp_path / "lora").exists()


def test_a_stop_and_a_damaged_picture_leave_whole_captions_only(
    make: Make, launched: FakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, describe = tmp_path / "lora" / "captions", write_captions._describe

    def stop_at_the_second(*arguments: Any) -> str:
        if any(folder.iterdir()):
            raise KeyboardInterrupt
        return describe(*arguments)

    monkeypatch.setattr(write_captions, "_describe", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        train.run(make())
    assert names(folder) == {"lace_0.jpg.txt"}
    (folder / ".lace_1.jpg.txt.123.tmp").write_text("a photo of")  # as a killed run leaves it

    def damage_the_last(*arguments: Any) -> str:
        truncated_jpg(tmp_path / "photos" / "lace_2.jpg")
        return describe(*arguments)

    monkeypatch.setattr(write_captions, "_describe", damage_the_last)
    refused(lambda: train.run(make()), "lace_2.jpg can no longer be read .*: run the same command again")
    assert names(folder) == {"lace_0.jpg.txt", "lace_1.jpg.txt"}
    assert launched.written == [["lace_0.jpg", "lace_1.jpg", "lace_2.jpg"], ["lace_1.jpg", "lace_2.jpg"]]
    assert all(path.read_text().endswith("\n") for path in folder.iterdir())


def test_a_corrected_caption_that_is_not_text_is_named(make: Make, launched: FakeRun, tmp_path: Path) -> None:
    train.run(make())
    (tmp_path / "lora" / "captions" / "lace_1.jpg.txt").write_bytes(b"\xff\xfe\x00")
    refused(lambda: train.run(make()), r"lace_1.jpg.txt: captions cannot be read as UTF-8 text")


def test_a_model_that_chats_is_asked(make: Make, launched: FakeRun, llava: Path, tmp_path: Path) -> None:
    train.run(make(caption_model=str(llava)))
    caption = (tmp_path / "lora" / "captions" / "lace_0.jpg.txt").read_text()
    assert caption.startswith("a photo of <myspecialstyle>, ")
    assert set(caption.removeprefix("a photo of <myspecialstyle>,").split()) <= {*WORDS, *ASKED}
    assert write_captions.REQUEST.partition(".")[0] not in caption
