"""Loose ends, loose pieces and thread width of pictures drawn here, whose threads can be counted."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn.functional import avg_pool2d

from demo import measure, soundness, story

WIDTH = 3
RING, OTHER_RING = (20, 20, 70, 70), (80, 80, 116, 116)
LINE, THROUGH = (20, 64, 100, 64), (0, 64, 128, 64)


def picture(*threads: tuple[int, int, int, int], dark: int = 40, light: int = 230, width: int = WIDTH) -> Tensor:
    """One picture (1, 3, 128, 128): a box that is square is a ring, any other a line."""
    image = Image.new("RGB", (128, 128), (dark,) * 3)
    pen = ImageDraw.Draw(image)
    for x, y, right, bottom in threads:
        if right - x == bottom - y:
            pen.ellipse((x, y, right, bottom), outline=(light,) * 3, width=width)
        else:
            pen.line((x, y, right, bottom), fill=(light,) * 3, width=width)
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None] / 255


@pytest.fixture(scope="module")
def net() -> Tensor:
    """A net that fills the picture."""
    return picture(*((i, 0, i, 128) for i in range(8, 128, 16)), *((0, i, 128, i) for i in range(8, 128, 16)))


@pytest.mark.parametrize(
    ("threads", "ends", "pieces"),
    [
        ([RING], 0, 0),
        ([LINE], 2, 0),
        ([THROUGH], 0, 0),  # it goes on beyond the border
        ([(0, 64, 80, 64)], 1, 0),
        ([RING, OTHER_RING], 0, 1),
        ([RING, (0, 100, 128, 100)], 0, 0),  # the ring is the largest, and the border may hold the line
        ([OTHER_RING, (0, 40, 128, 40)], 0, 1),  # the line is the largest
        ([RING, (96, 0, 96, 40)], 1, 0),
        ([RING, (100, 100, 101, 102)], 0, 0),  # dust
        ([RING, (45, 70, 45, 110)], 1, 0),
        ([RING, (45, 68, 45, 71)], 0, 0),  # a spur shorter than the thread is wide
    ],
)
def test_ends_and_pieces_are_counted(threads: list[tuple[int, int, int, int]], ends: int, pieces: int) -> None:
    found = soundness.soundness(picture(*threads))
    assert (found.loose_ends, found.loose_pieces) == (ends, pieces)


def test_figures_are_means_over_the_pictures() -> None:
    found = soundness.soundness(torch.cat([picture(LINE), picture(RING, OTHER_RING)]))
    assert (found.loose_ends, found.loose_pieces) == (1, 0.5)


def test_the_share_of_the_largest_piece() -> None:
    halves = picture((0, 32, 128, 32), (0, 96, 128, 96))
    assert soundness.soundness(halves).largest_share == pytest.approx(0.5)
    assert soundness.soundness(picture(RING)).largest_share == 1


@pytest.mark.parametrize("width", [3, 5, 9])
def test_the_width_of_a_thread(width: int) -> None:
    # the middle of an odd width lies half a pixel farther from the nearest cloth than from the edge
    assert soundness.soundness(picture(THROUGH, width=width)).thread_width == pytest.approx(width + 1, abs=0.1)


def test_threads_are_found_where_the_lamp_falls_off(net: Tensor) -> None:
    falloff = torch.linspace(1, 0.3, 128)
    assert soundness.mask_agreement(net, net * falloff) > 0.98


def test_bare_cloth_far_from_any_thread_is_not_thread() -> None:
    corner = picture((4, 4, 24, 24)).repeat(1, 1, 2, 2)
    corner[:, :, :, 128:] = corner[:, :, 128:] = 40 / 255
    assert soundness.threads(corner[0].mean(0).numpy())[64:].sum() == 0


def test_cut_threads_raise_ends_and_pieces(net: Tensor) -> None:
    sound, cut = soundness.soundness(net), net.clone()
    assert (sound.loose_ends, sound.loose_pieces) == (0, 0)
    for x in (32, 64, 96):
        cut[:, :, 38:42, x - 2 : x + 22] = 40 / 255  # across a line, right of and left of it no crossing
    assert soundness.soundness(cut).loose_ends >= 3


def test_blur_hides_ends_and_widens_threads(net: Tensor) -> None:
    cut = net.clone()
    cut[:, :, 63:65] = 40 / 255
    blurred = avg_pool2d(cut, 5, 1, 2, count_include_pad=False)
    sharp, soft = soundness.soundness(cut), soundness.soundness(blurred)
    assert soft.loose_ends < sharp.loose_ends
    assert soft.thread_width > sharp.thread_width + 0.5
    assert measure.crispness(blurred) < measure.crispness(cut)


def test_a_picture_without_threads_has_no_figures_that_are_not_numbers() -> None:
    assert soundness.soundness(torch.full((1, 3, 64, 64), 0.5)) == soundness.Soundness(0, 0, 0, 0)


def test_masks_agree_as_far_as_they_overlap() -> None:
    upper, lower = picture((0, 60, 128, 60), width=9), picture((0, 63, 128, 63), width=9)
    assert soundness.mask_agreement(upper, upper) == 1
    assert soundness.mask_agreement(upper, lower) == pytest.approx(6 / 12)
    assert soundness.mask_agreement(torch.cat([upper, upper]), torch.cat([upper, lower])) == pytest.approx(0.75)
    assert soundness.mask_agreement(upper, upper * 0.5) == 1, "each picture has its own threshold"


def test_the_demos_lace_is_sound() -> None:
    found = soundness.soundness(measure.held_out_lace())
    assert found.loose_ends < 10
    assert found.loose_pieces < 0.5
    assert found.largest_share > 0.99


def test_the_story_compares_the_drawings_with_the_lace(capsys: pytest.CaptureFixture[str]) -> None:
    lace, drawn, refined = (soundness.Soundness(ends, ends / 10, 1, 6 + ends / 20) for ends in (5, 34, 38))
    story.print_soundness(lace, drawn, refined)
    assert capsys.readouterr().out.strip().splitlines() == [
        "loose ends per picture: 5 in the lace it learnt from, 34 drawn, 38 refined",
        "loose pieces per picture: 0.5 in the lace it learnt from, 3.4 drawn, 3.8 refined",
        "thread width in pixels: 6.2 in the lace it learnt from, 7.7 drawn, 7.9 refined",
    ]
