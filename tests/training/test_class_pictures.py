"""Prior preservation's class pictures: which are used, which are drawn, and their part of a run's fingerprint."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import data_utils
from helpers import Make, contents, gradient, jpg, snapshot
from lace_lora.training import class_pictures
from training_helpers import as_json, encode_here, job_of


def test_missing_class_pictures_are_drawn_by_the_base_and_reused(settings: Make, photos: Path, tmp_path: Path) -> None:
    config = settings(with_prior_preservation=True, num_class_images=3, class_prompt="a net")
    captions = {str(path): "lace" for path in data_utils.list_images(photos)}
    to_draw = class_pictures.to_draw(config, [])
    (tmp_path / "lora").mkdir()
    first, _, _ = encode_here(config, job_of(captions, class_to_draw=as_json(to_draw)))
    drawn = sorted((tmp_path / "lora" / "class_images").iterdir())
    assert len(drawn) == 3
    assert len({path.read_bytes() for path in drawn}) == 3
    assert class_pictures.existing(config) == contents(drawn)
    before = snapshot(tmp_path / "lora" / "class_images")
    again, _, _ = encode_here(config, job_of(captions, class_pictures=as_json(class_pictures.existing(config))))
    assert snapshot(tmp_path / "lora" / "class_images") == before
    assert all(map(torch.equal, first.latents.mean, again.latents.mean))
    # With another prompt they are of no use, and with a larger number only the rest is drawn.
    assert class_pictures.existing(replace(config, class_prompt="a stripe")) == {}
    more = class_pictures.to_draw(replace(config, num_class_images=5), drawn)
    assert list(more.values()) == [3, 4]


def test_class_pictures_are_identified_by_content_or_by_the_settings_that_drew_them(
    settings: Make, tmp_path: Path
) -> None:
    folder = tmp_path / "nets"
    folder.mkdir()
    config = settings(class_data_dir=str(folder), num_class_images=3, class_prompt="a net")

    def fingerprint_of(**changes: Any) -> dict[str, Any]:
        changed = replace(config, **changes)
        return class_pictures.fingerprint(changed, class_pictures.existing(changed))

    jpg(folder / "mine.jpg", gradient())
    before = fingerprint_of()
    for path in class_pictures.to_draw(config, class_pictures.existing(config)):
        gradient().save(path)
    assert fingerprint_of() == before  # drawn or to be drawn
    (folder / "mine.jpg").rename(folder / "renamed.jpg")
    assert fingerprint_of() == before
    assert fingerprint_of(seed=7) == before | {"seed": 7}
    assert fingerprint_of(num_class_images=4) == before | {"num_class_images": 4}
    assert fingerprint_of(seed=7, num_class_images=1) == fingerprint_of(num_class_images=1)  # none is drawn
    jpg(folder / "renamed.jpg", gradient(turn=1))
    assert fingerprint_of() != before
