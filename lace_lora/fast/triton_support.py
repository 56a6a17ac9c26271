"""Whether Triton kernels can run, checked without importing it: CPU builds of PyTorch, and Macs, do not have it."""

import importlib.util
import logging
import subprocess

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from lace_lora.errors import first_line

logger = logging.getLogger("train_lora")


def use_kernels_if_possible(model: UNet2DConditionModel | AutoencoderKL) -> None:
    """Make a frozen model run on the Triton kernels: on NVIDIA GPUs since Ampere, if there is a C compiler."""
    device = model.device
    is_ampere = device.type == "cuda" and torch.version.cuda and torch.cuda.get_device_capability(device) >= (8, 0)
    if not is_ampere or importlib.util.find_spec("triton") is None:
        return
    try:
        from lace_lora.fast import kernels, patching

        # Compiled and run, to see whether Triton finds a C compiler and Python.h, and can write its cache.
        kernels.Geglu.apply(torch.zeros(1, 2048, device=device, dtype=model.dtype))
    except (ImportError, OSError, RuntimeError, subprocess.CalledProcessError) as error:
        advice = "it needs a C compiler, Python.h and a cache folder that it can write to"
        logger.warning("Triton cannot compile its kernels (%s): steps will be slower; %s", first_line(error), advice)
        return
    patching.use_kernels(model)
