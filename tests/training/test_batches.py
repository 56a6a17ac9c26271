"""What a step sees: batches as a function of the step."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from lace_lora.sdxl import prompts
from lace_lora.training import batches
from lace_lora.training.latents import Latents


def fake_encodings(pictures: int, versions: int = 1) -> batches.Encoded:
    """Encodings whose latents tell which picture and version they are."""
    marks = torch.arange(pictures * versions, dtype=torch.float32).view(pictures, versions, 1, 1, 1)
    latents = Latents(
        mean=list(marks.expand(pictures, versions, 4, 2, 2)),
        std=list(torch.zeros(pictures, versions, 4, 2, 2)),
        time_ids=torch.tensor([[picture, 0.0, 0, 0, 16, 16] for picture in range(pictures)]),
    )
    return batches.Encoded(
        latents=latents,
        caption=torch.zeros(pictures, dtype=torch.long),
        prompt_embeds=torch.tensor([0.0, 9.0])[:, None, None].expand(2, 77, 8),
        pooled_prompt_embeds=torch.tensor([0.0, 9.0])[:, None].expand(2, 4),
        instances=pictures,
    )


def shown(data: batches.Encoded, seed: int, step: int, size: int) -> list[int]:
    batch = batches.step_batch(data, seed, step, size, timesteps=1000)
    assert torch.equal(batch.latents[:, 0, 0, 0], batch.time_ids[:, 0])
    return [int(value) for value in batch.time_ids[:, 0]]


def test_every_picture_once_an_epoch_in_a_new_order() -> None:
    row = [picture for step in range(7) for picture in shown(fake_encodings(7), seed=3, step=step, size=3)]
    epochs = [row[start : start + 7] for start in (0, 7, 14)]
    assert all(Counter(epoch) == Counter(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("steps", [1, 2, 3, 9])
def test_what_a_training_sees_is_known_before_it(steps: int) -> None:
    data = fake_encodings(7)
    drawn = {picture for step in range(steps) for picture in shown(data, seed=3, step=step, size=3)}
    assert [number for number, is_drawn in enumerate(batches.seen(7, 3, 3 * steps)) if is_drawn] == sorted(drawn)


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    data = fake_encodings(5)
    first = batches.step_batch(data, 1, 8, 4, 1000)
    torch.manual_seed(99)
    again = batches.step_batch(data, 1, 8, 4, 1000)
    other_step, other_seed = batches.step_batch(data, 1, 9, 4, 1000), batches.step_batch(data, 2, 8, 4, 1000)
    for name, value in vars(first).items():
        assert torch.equal(value, getattr(again, name))
    assert not torch.equal(first.noise, other_step.noise)
    assert not torch.equal(first.noise, other_seed.noise)
    assert not torch.equal(first.noise[0], first.noise[1])


def test_shards_and_micro_batches_add_up_to_the_batch() -> None:
    batch = batches.step_batch(fake_encodings(5), 1, 0, 12, 1000)
    parts = [part for rank in (0, 1) for part in batch.shard(rank, 2).split(2)]
    for name, value in vars(batch).items():
        together = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(together, value / 3 if name == "weights" else value)  # three parts of a mean


def test_both_mirrored_versions_are_sampled() -> None:
    data = fake_encodings(4, versions=2)
    drawn = {float(x) for step in range(20) for x in batches.step_batch(data, 0, step, 4, 1000).latents[:, 0, 0, 0]}
    assert drawn == set(map(float, range(8)))


def test_latents_are_resampled_from_the_posterior() -> None:
    data = fake_encodings(2)
    spread = replace(data, latents=replace(data.latents, std=list(torch.full((2, 1, 4, 2, 2), 0.5))))
    samples = torch.stack([batches.step_batch(spread, 0, step, 2, 1000).latents for step in range(400)])
    means = torch.stack([batches.step_batch(data, 0, step, 2, 1000).latents for step in range(400)])
    assert (samples - means).std().item() == pytest.approx(0.5, rel=0.05)


def test_timesteps_cover_the_whole_schedule() -> None:
    drawn = torch.cat([batches.step_batch(fake_encodings(4), 0, step, 4, 1000).timesteps for step in range(500)])
    assert drawn.min() < 10
    assert drawn.max() > 989
    assert abs(drawn.float().mean() - 499.5) < 30


def test_equal_captions_are_encoded_once() -> None:
    asked: list[str] = []

    def encode(texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        asked.extend(texts)
        return torch.full((1, 77, 2), float(len(asked))), torch.full((1, 3), float(len(asked)))

    unique, index = batches.unique_captions(["a", "b", "a"])
    embedded = prompts.embed(unique, None, encode, zeros=True)
    embeds, pooled = embedded.prompt_embeds, embedded.pooled_prompt_embeds
    assert asked == ["a", "b"]
    assert index.tolist() == [0, 1, 0]
    assert embeds[index][:, 0, 0].tolist() == pooled[index][:, 0].tolist() == [1.0, 2.0, 1.0]


def with_class(instances: int, of_class: int) -> batches.Encoded:
    return replace(fake_encodings(instances + of_class), instances=instances)


def test_a_class_picture_follows_every_picture_of_the_user() -> None:
    data = with_class(3, 2)
    seen = [shown(data, seed=1, step=step, size=2) for step in range(3)]
    instances, others = ([row for rows in seen for row in rows[start::2]] for start in (0, 1))
    assert sorted(instances) == [0, 0, 1, 1, 2, 2]
    assert sorted(others) == [3, 3, 3, 4, 4, 4]
    plain = replace(fake_encodings(3), instances=3)
    assert instances == [row for step in range(3) for row in shown(plain, seed=1, step=step, size=2)]


def test_weights_make_the_mean_the_sum_of_two_means() -> None:
    batch = batches.step_batch(with_class(3, 2), 1, 0, 2, 1000, prior_weight=0.25)
    errors = torch.tensor([1.0, 100.0, 3.0, 300.0])
    assert (errors * batch.weights).mean() == pytest.approx((1 + 3) / 2 + 0.25 * (100 + 300) / 2)
    assert torch.equal(batches.step_batch(fake_encodings(3), 1, 0, 2, 1000).weights, torch.ones(2))


def test_noise_offset_shifts_whole_channels_and_nothing_else() -> None:
    data = fake_encodings(4)
    plain, shifted = (batches.step_batch(data, 1, 0, 4, 1000, noise_offset=offset) for offset in (0.0, 0.5))
    shift = shifted.noise - plain.noise
    torch.testing.assert_close(shift, shift[:, :, :1, :1].expand_as(shift))
    assert shift[:, :, 0, 0].unique().numel() == 16  # another for every picture and channel
    assert shift.abs().max() > 0.3
    assert torch.equal(plain.latents, shifted.latents)
    assert torch.equal(plain.timesteps, shifted.timesteps)
    many = torch.cat([
        batches.step_batch(data, 1, step, 4, 1000, noise_offset=0.5).noise.mean((2, 3)) for step in range(400)
    ])  # fmt: skip
    assert many.var() == pytest.approx(0.25 + 0.25, rel=0.1)  # of four values' mean, and of the shift


def in_shapes(widths: list[int]) -> batches.Encoded:
    """A picture of each width."""
    data = fake_encodings(len(widths))
    mean, std = ([part[..., :1].expand(1, 4, 2, width) for part, width in zip(parts, widths, strict=True)]
                 for parts in (data.latents.mean, data.latents.std))  # fmt: skip
    time_ids = data.latents.time_ids.clone()
    time_ids[:, 5] = 8 * torch.tensor(widths)
    return replace(data, latents=replace(data.latents, mean=mean, std=std, time_ids=time_ids))


def test_a_batch_has_one_shape_and_all_pictures_are_seen_equally_often() -> None:
    widths = [2, 3, 2, 5, 3, 2, 2]
    data = in_shapes(widths)
    seen = [shown(data, seed=1, step=step, size=4) for step in range(3 * 7)]
    assert all(len({widths[picture] for picture in pictures}) == 1 for pictures in seen)
    cycles = seen[:7], seen[7:14], seen[14:]
    for cycle in cycles:
        assert Counter(picture for pictures in cycle for picture in pictures) == dict.fromkeys(range(7), 4)
    assert len({tuple(widths[pictures[0]] for pictures in cycle) for cycle in cycles}) > 1
    assert seen[13] == shown(data, seed=1, step=13, size=4)


def test_epochs_within_a_bucket_continue_across_steps() -> None:
    data = in_shapes([2, 3, 2, 3, 3])
    seen = [shown(data, seed=5, step=step, size=2) for step in range(5)]
    wide = [picture for pictures in seen for picture in pictures if picture in (1, 3, 4)]
    assert sorted(wide[:3]) == sorted(wide[3:]) == [1, 3, 4]


def test_caption_dropout_gives_its_share_of_the_users_pictures_the_empty_prompt() -> None:
    data, steps = with_class(6, 5), range(500)
    dropped = [batches.step_batch(data, 1, step, 4, 1000, caption_dropout=0.2) for step in steps]
    plain = [batches.step_batch(data, 1, step, 4, 1000) for step in steps]
    captions = torch.stack([batch.caption for batch in dropped])  # a class picture follows each of the user's
    assert (captions[:, ::2] == batches.EMPTY_PROMPT).float().mean() == pytest.approx(0.2, abs=0.03)
    assert len(captions[:, ::2].unique(dim=0)) > 5  # pictures of one step are decided separately
    assert torch.equal(captions[:, 1::2], torch.stack([batch.caption[1::2] for batch in plain]))
    for one, other in zip(dropped, plain, strict=True):
        empty = one.caption == batches.EMPTY_PROMPT
        assert torch.equal(one.prompt_embeds[:, 0, 0], 9.0 * empty)
        assert torch.equal(one.pooled_prompt_embeds[:, 0], 9.0 * empty)
        for name in ("latents", "noise", "timesteps", "time_ids", "weights"):
            assert torch.equal(getattr(one, name), getattr(other, name))


def test_caption_dropout_depends_on_seed_and_step_alone() -> None:
    first, again, other = (
        torch.stack(
            [batches.step_batch(fake_encodings(5), seed, n, 4, 1000, caption_dropout=0.5).caption for n in order]
        )
        for seed, order in ((1, range(9)), (1, reversed(range(9))), (2, range(9)))
    )
    assert torch.equal(first, again.flip(0))
    assert not torch.equal(first, other)
