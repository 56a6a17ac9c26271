"""Decoding and saving on threads: failures are reported, and the other pictures are still saved."""

import errno
from typing import Any

import pytest
import torch

from helpers import Make, refused
from lace_lora.config import Config
from lace_lora.drawing import saving
from lace_lora.errors import LOSS_NOT_FINITE
from lace_lora.pictures.recipe import Design, Drawn
from lace_lora.sdxl import models


def decoded(vae: Any, latents: torch.Tensor, finish: Any) -> None:
    """`latents` of one batch, through a `PictureSaver`."""
    designs = [Design(index, "lace", index) for index in range(len(latents))]
    with saving.PictureSaver(vae, Config(refine=False), finish) as saver:
        saver.save_batch(designs, latents, None)


@pytest.mark.parametrize("where", ["latents", "VAE"])
def test_a_black_picture_does_not_stop_the_others(settings: Make, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = models.load_vae(settings(), torch.device("cpu"), torch.float32)
    latents, done = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0)), []
    if where == "latents":
        latents[2, 0, 0, 0] = torch.nan
    else:
        plain, numbers = vae.decoder.forward, iter(range(4))
        monkeypatch.setattr(vae.decoder, "forward", lambda *given: plain(*given) / (next(numbers) != 2))

    def finish(drawn: Drawn) -> None:
        done.append(drawn.design.index)

    refused(lambda: decoded(vae, latents, finish), f"NaN or inf in the {where}", LOSS_NOT_FINITE)
    assert set(done) == {0, 1, 3}


def test_an_error_on_a_thread_is_raised(settings: Make) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "no space")

    vae = models.load_vae(settings(), torch.device("cpu"), torch.float32)
    with pytest.raises(OSError, match="no space"):
        decoded(vae, torch.zeros(1, 4, 8, 8), full)
