"""The settings: what is declared, what config.yaml contains, and the message for each mistake of a user's."""

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import data_utils
from helpers import ROOT, refused
from lace_lora.config import Config, describe, dump_config, load_config
from lace_lora.errors import UserError

FIELDS = {item.name: item for item in dataclasses.fields(Config)}
REQUIRED = {
    "drive_mount_path": "/content/drive",
    "images_dir": "/content/drive/MyDrive/babanne-images",
    "lora_output_dir": "/content/drive/MyDrive/lora_output",
    "instance_prompt": "a photo of <myspecialstyle>",
    "class_prompt": "a photo of a painting",
    "pretrained_model": "stabilityai/stable-diffusion-xl-base-1.0",
    "refiner_model": "stabilityai/stable-diffusion-xl-refiner-1.0",
    "resolution": 512,
    "train_batch_size": 2,
    "learning_rate": 1e-4,
    "max_train_steps": 1000,
}


def load(tmp_path: Path, text: str, *overrides: str) -> Config:
    path = tmp_path / "my.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides)


def refusal(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        load(tmp_path, text, *overrides)
    assert caught.value.exit_code == 2
    return str(caught.value).replace(f"{tmp_path}/", "").split("\n")


@pytest.mark.parametrize(("key", "default"), REQUIRED.items())
def test_the_keys_of_the_requirements_keep_name_and_default(key: str, default: Any) -> None:
    assert FIELDS[key].default == default


def test_config_yaml_holds_every_default() -> None:
    assert load_config(ROOT / "config.yaml") == Config()
    text = (ROOT / "config.yaml").read_text()
    assert list(yaml.safe_load(text)) == list(FIELDS)
    assert "\nlearning_rate: 1e-4 " in text  # as the requirements write it


def test_config_yaml_explains_every_key_as_it_is_declared() -> None:
    comments = dict(re.findall(r"^(\w+):.*?  # (.*)$", (ROOT / "config.yaml").read_text(), re.MULTILINE))
    assert comments == {name: item.metadata["explanation"] for name, item in FIELDS.items()}


def test_config_yaml_has_the_declared_groups() -> None:
    group = ""
    found: dict[str, list[str]] = {}
    for line in (ROOT / "config.yaml").read_text().splitlines():
        if heading := re.match(r"# --- ([\w ]+): ", line):
            group = heading[1]
        elif key := re.match(r"(\w+):", line):
            found.setdefault(group, []).append(key[1])
    assert {keys[0]: name for name, keys in found.items()} == {
        name: item.metadata["group"] for name, item in FIELDS.items() if "group" in item.metadata
    }
    assert list(found) == ["set these", "models", "training", "drawing", "refining", "saving", "single run"]
    assert set(REQUIRED) <= set(found["set these"])


def test_describe_names_every_key_default_and_explanation() -> None:
    text = describe()
    for name, item in FIELDS.items():
        assert re.search(rf"^  {name}=", text, re.MULTILINE), name
        assert item.metadata["explanation"] in text


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 1  # type: ignore[misc]


@pytest.mark.parametrize("text", ["1e-4", "0.0001", "'1e-4'", "1.0E-4", "1e-04"])
def test_learning_rate_however_it_is_written(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, f"learning_rate: {text}").learning_rate == 1e-4
    assert load(tmp_path, "", f"learning_rate={text.strip(chr(39))}").learning_rate == 1e-4


@pytest.mark.parametrize(
    ("word", "value"),
    [("yes", True), ("Yes", True), ("on", True), ("true", True), ("no", False), ("OFF", False), ("False", False)],
)
def test_words_for_yes_and_no(tmp_path: Path, word: str, value: bool) -> None:
    for key in ("refine", "save_base"):
        assert getattr(load(tmp_path, f"{key}: {word}"), key) is value
        assert getattr(load(tmp_path, "", f"{key}={word}"), key) is value


@pytest.mark.parametrize("word", ["no", "fp16", "bf16", "auto"])
def test_mixed_precision_no_is_a_word(tmp_path: Path, word: str) -> None:
    assert load(tmp_path, f"mixed_precision: {word}").mixed_precision == word
    assert load(tmp_path, "", f"mixed_precision={word}").mixed_precision == word


def test_text_settings_keep_words_that_yaml_would_turn_into_something_else(tmp_path: Path) -> None:
    assert load(tmp_path, "negative_prompt: no\nvalidation_prompt: 1930\n") == Config(
        negative_prompt="no", validation_prompt="1930"
    )


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("prompt=lace: white, 3 rows", "prompt", ("lace: white, 3 rows",)),
        ("prompt=[one, 'two, three']", "prompt", ("one", "two, three")),
        ("prompt=a = b", "prompt", ("a = b",)),
        ("prompt=#1 lace", "prompt", ("#1 lace",)),
        ("prompt={lace}", "prompt", ("{lace}",)),
        ("instance_prompt=[sks] lace", "instance_prompt", "[sks] lace"),
        ("negative_prompt=", "negative_prompt", None),
        ("resume_from_checkpoint=", "resume_from_checkpoint", None),
        ("image_extensions=[.jpg, .PNG]", "image_extensions", (".jpg", ".PNG")),
        ("image_extensions=.png", "image_extensions", (".png",)),
        ("snr_gamma=5", "snr_gamma", 5.0),
        ("seed=1_000", "seed", 1000),
        ("images_dir=C: häkel 🧵", "images_dir", "C: häkel 🧵"),
    ],
)
def test_overrides(tmp_path: Path, override: str, key: str, value: Any) -> None:
    assert getattr(load(tmp_path, "", override), key) == value


def test_an_override_beats_the_file_and_the_last_beats_the_first(tmp_path: Path) -> None:
    assert load(tmp_path, "seed: 1").seed == 1
    assert load(tmp_path, "seed: 1", "seed=2", "seed=3").seed == 3


def test_lists_in_the_file(tmp_path: Path) -> None:
    assert load(tmp_path, "prompt:\n- one\n- 'two: three'\n").prompt == ("one", "two: three")
    assert load(tmp_path, "prompt: just one").prompt == ("just one",)


@pytest.mark.parametrize("text", ["", "# nothing\n", "\ufeffseed: 42\n", "seed: 42\r\nrank: 16\r\n"])
def test_files_that_change_nothing(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, text) == Config()


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("learning_rat: 1", ["unknown key 'learning_rat'", "did you mean learning_rate?"]),
        ("max_train_step: 9", ["did you mean max_train_steps?"]),
        ("Resolution: 9", ["did you mean resolution?"]),
        ("resolution: big", ["resolution", "'big'", "a whole number"]),
        ("resolution: 512.0", ["resolution", "'512.0'", "a whole number"]),
        ("resolution: 100", ["resolution", "100", "multiple of 8"]),
        ("resolution: [512]", ["resolution", "a whole number"]),
        ("resolution:", ["resolution", "needs a value"]),
        ("resolution: true", ["resolution", "'true'", "a whole number"]),
        ("train_batch_size: 0", ["train_batch_size", "at least 1"]),
        ("learning_rate: 0", ["learning_rate", "above 0"]),
        ("learning_rate: .nan", ["learning_rate", "a number"]),
        ("learning_rate: .inf", ["learning_rate", "a number"]),
        ("lora_dropout: 1.5", ["lora_dropout", "at most 0.99"]),
        ("refine: maybe", ["refine", "'maybe'", "true or false"]),
        ("refine: 1", ["refine", "'1'", "true or false"]),
        ("refine: !!bool maybe", ["refine", "'maybe'", "true or false"]),
        ("num_inference_steps: 500", ["num_inference_steps", "at most 499"]),
        ("mixed_precision: fp8", ["mixed_precision", "'fp8'", "fp16, bf16"]),
        ("scheduler: DPM", ["scheduler", "DPMSolverMultistepScheduler"]),
        ("instance_prompt: {a: b}", ["instance_prompt", "text"]),
        ("image_extensions: [jpg]", ["image_extensions", "[jpg]", ".jpeg"]),
        ("image_extensions: []", ["image_extensions", ".jpeg"]),
        ("preview: sheet.jpg", ["preview", "'sheet.jpg'", "must end in .png"]),
        ("seed: 99999999999999999999999", ["seed", "at most"]),
    ],
)
def test_a_mistake_is_one_line_with_its_place(tmp_path: Path, line: str, parts: list[str]) -> None:
    [message] = refusal(tmp_path, f"# mine\n\n{line}\n")
    assert message.startswith("my.yaml:3: ")
    for part in parts:
        assert part in message


def test_all_mistakes_are_reported_at_once(tmp_path: Path) -> None:
    messages = refusal(tmp_path, "ranks: 4\nseed: x\nrank: 8\nwidth: 7\n", "hight=512", "height=1")
    places = [message.split(": ")[0] for message in messages]
    assert places == ["my.yaml:1", "my.yaml:2", "my.yaml:4", *2 * ["command line"]]
    assert "rank?" in messages[0]
    assert "height?" in messages[3]


@pytest.mark.parametrize(
    ("text", "overrides", "part"),
    [
        ("seed: 1\nseed: 2\n", [], "my.yaml:2: seed is set twice"),
        ("- a\n- b\n", [], "expected lines of `key: value`"),
        ("just words", [], "expected lines of `key: value`"),
        ("seed: 1\nprompt: 'open\n", [], "not valid YAML"),
        ("seed: 1\n\trank: 2\n", [], "my.yaml:2: not valid YAML"),
        ("", ["seed"], "key=value"),
        ("", ["prompt=[a, b"], "not a list"),
        ("prompt: a\nprompts_file: b\n", [], "both set"),
        ("instance_prompt: ' '\n", [], "instance_prompt is empty"),
        ("prompt: []\n", [], "empty prompt"),
        ("prompt: [lace, '']\n", [], "empty prompt"),
        ("num_inference_steps: 4\n", [], "less than one step"),
    ],
)
def test_other_mistakes(tmp_path: Path, text: str, overrides: list[str], part: str) -> None:
    [message] = refusal(tmp_path, text, *overrides)
    assert part in message


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_config(tmp_path / "missing.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        load_config(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("negative_prompt: häkel".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        load_config(tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    "config",
    [
        Config(),
        Config(prompt=("a: b", "no", "# c", "émoji 🧵", "two\nlines", "null"), negative_prompt="~", lora_alpha=2.5),
        Config(learning_rate=3e-7, seed=2**63 - 1, refine=False, mixed_precision="no", prompts_file="1e3"),
        Config(images_dir=" a\tb\u0080", image_extensions=(".JPG", ".png"), resume_from_checkpoint=None),
    ],
)
def test_dumped_settings_read_back_equal(tmp_path: Path, config: Config) -> None:
    assert load(tmp_path, dump_config(config)) == config


def test_the_kinds_of_pictures_that_phones_and_the_web_save_are_used() -> None:
    assert Config().image_extensions == (".jpg", ".jpeg", ".png", ".webp", ".heic")
    assert not FIELDS["image_extensions"].metadata["affects"]  # a run resumes with another list
    assert inspect.signature(data_utils.list_images).parameters["extensions"].default == {".jpg"}  # R9


def test_alpha_is_the_rank_unless_set() -> None:
    assert Config(rank=12).alpha == 12
    assert Config(rank=12, lora_alpha=3).alpha == 3


def test_a_path_may_begin_with_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    config = load(tmp_path, "images_dir: ~/photos\n", "lora_output_dir=~/lora")
    assert (config.images_dir, config.lora_output_dir) == ("/home/ada/photos", "/home/ada/lora")


def test_without_a_home_folder_a_path_that_begins_with_it_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as it is for a user without an entry, and no HOME
    message = refused(lambda: load(tmp_path, "images_dir: ~/photos\n"), "images_dir is '~/photos'")
    assert "your home folder is not known: write the full path, or set HOME" in message
