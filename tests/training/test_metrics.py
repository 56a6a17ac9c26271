"""How many updates with NaN or inf in loss or gradients may be skipped."""

import math

import pytest

from helpers import Make, refused
from lace_lora.errors import LOSS_NOT_FINITE
from lace_lora.training.metrics import Metrics


@pytest.mark.parametrize(
    ("losses", "norms", "ending", "good"),
    [
        ([1.0, 1.0], [1.0, 1.0], True, True),
        ([math.nan, 1.0], [math.nan, 1.0], True, True),
        ([1.0, math.nan], [1.0, math.nan], False, False),
        ([1.0, math.nan], [1.0, math.nan], True, True),
        ([1.0, *[math.nan] * 5, 1.0], [1.0] * 7, False, None),
        ([1.0, *[math.inf] * 4], [1.0] * 5, False, False),
        ([1.0, *[math.inf] * 5], [1.0] * 6, False, None),
        ([1.0] * 25, [1.0, *[math.inf] * 24], True, True),  # as fp16 does while it looks for its scale
        ([1.0] * 26, [1.0, *[math.inf] * 25], False, None),
    ],
)
def test_how_many_updates_may_be_skipped(
    losses: list[float], norms: list[float], ending: bool, good: bool | None, settings: Make
) -> None:
    log = Metrics(settings(), first_step=0, is_main=False)
    log.rows = [{"step": 7, "loss": loss, "grad_norm": norm} for loss, norm in zip(losses, norms, strict=True)]
    if good is None:
        refused(lambda: log.check_finite(ending), "NaN or inf.* step 7: lower learning_rate", LOSS_NOT_FINITE)
    else:
        assert log.check_finite(ending) == good
