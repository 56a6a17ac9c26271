"""SDXL's training loss."""

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor

from lace_lora.training.batches import Batch


def training_loss(
    unet: UNet2DConditionModel, batch: Batch, noise_scheduler: DDPMScheduler, snr_gamma: float | None
) -> Tensor:
    """SDXL's denoising loss of a batch: mean squared error in fp32, weighted by picture, averaged to a scalar."""
    noisy = noise_scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
    prediction = unet(
        noisy.to(unet.dtype),
        batch.timesteps,
        batch.prompt_embeds.to(unet.dtype),
        added_cond_kwargs={"text_embeds": batch.pooled_prompt_embeds.to(unet.dtype), "time_ids": batch.time_ids},
        return_dict=False,
    )[0]
    target = batch.noise
    if noise_scheduler.config.prediction_type == "v_prediction":
        target = noise_scheduler.get_velocity(batch.latents, batch.noise, batch.timesteps)
    error = (prediction.float() - target.float()).pow(2).mean(dim=(1, 2, 3))
    return (error * batch.weights * loss_weights(batch.timesteps, noise_scheduler, snr_gamma)).mean()


def loss_weights(timesteps: Tensor, noise_scheduler: DDPMScheduler, snr_gamma: float | None) -> Tensor:
    """Min-SNR weights (n,): min(SNR, gamma) over SNR, or over SNR + 1 for v-prediction; ones without gamma.

    Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting Strategy", section 3.4.
    """
    if snr_gamma is None:
        return torch.ones(timesteps.shape, device=timesteps.device)
    alphas_cumprod = noise_scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
    snr = alphas_cumprod / (1 - alphas_cumprod)
    velocity = noise_scheduler.config.prediction_type == "v_prediction"
    return snr.clamp(max=snr_gamma) / (snr + 1 if velocity else snr)
