"""The noise schedule and the noise loss."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from utils.diffusion.checkpoint import noise_schedule, read_config


class NoiseSchedule(nn.Module):
    """The amount of noise in each diffusion step, and the target of the U-Net's prediction.

    Made from a diffusers scheduler or its configuration. With a the cumulative product of 1 - beta up to step t:
    x_t = sqrt(a) x + sqrt(1 - a) noise; the target is the noise ("epsilon") or v = sqrt(a) noise - sqrt(1 - a) x
    ("v_prediction"). Computes in float32.
    """

    def __init__(self, scheduler, name="the configuration given"):
        super().__init__()
        config = dict(getattr(scheduler, "config", scheduler))
        self.prediction_type, alphas_cumprod = noise_schedule(config, name)
        self.num_steps = len(alphas_cumprod)
        self.register_buffer("alphas_cumprod", alphas_cumprod.float(), persistent=False)

    @classmethod
    def from_pretrained(cls, name_or_path, *, revision=None, token=None):
        return cls(read_config(str(name_or_path), "scheduler", revision, token), str(name_or_path))

    def _apply(self, fn, recurse=True):
        # model.half() and DeepSpeed would round the schedule, whose values near the last step are small.
        exact = self.alphas_cumprod
        super()._apply(fn, recurse)
        self.alphas_cumprod = exact.to(self.alphas_cumprod.device)
        return self

    def parts(self, latents, timesteps):
        """sqrt(a) and sqrt(1 - a) of each image, float32, shaped to be multiplied with the latents."""
        cumulated = self.alphas_cumprod[timesteps].view(-1, *[1] * (latents.ndim - 1))
        return cumulated.sqrt(), (1 - cumulated).sqrt()

    def add_noise(self, latents, noise, timesteps):
        signal, strength = self.parts(latents, timesteps)
        return signal * latents + strength * noise

    def target(self, latents, noise, timesteps):
        if self.prediction_type == "epsilon":
            return noise
        signal, strength = self.parts(latents, timesteps)
        return signal * noise - strength * latents

    def denoised(self, noised, prediction, timesteps):
        """The latents without noise, according to the prediction."""
        signal, strength = self.parts(noised, timesteps)
        if self.prediction_type == "epsilon":
            return (noised - strength * prediction) / signal
        return signal * noised - strength * prediction


def noise_loss(unet, schedule, latents, noise, timesteps, condition):
    """Mean squared error of the U-Net's prediction in float32; condition (B, T, W) has a gradient in every mode."""
    noised = schedule.add_noise(latents.float(), noise.float(), timesteps)
    # The first parameter belongs to the convolution that takes the latents.
    dtype = next(unet.parameters()).dtype
    prediction = unet(noised.to(dtype), timesteps, encoder_hidden_states=condition.to(dtype)).sample
    return F.mse_loss(prediction.float(), schedule.target(latents.float(), noise.float(), timesteps))


@torch.no_grad()
def denoise(unet, schedule, latents, noise, condition, *, start=0.6, num_steps=10):
    """Add noise to latents up to the share `start` of the schedule, then denoise with `condition`, by DDIM."""
    times = torch.linspace(start * (schedule.num_steps - 1), 0, num_steps + 1).long().tolist()
    times = [torch.full((len(latents),), time, device=latents.device) for time in times]
    dtype = next(unet.parameters()).dtype
    noised = schedule.add_noise(latents, noise, times[0])
    for now, then in pairwise(times):
        prediction = unet(noised.to(dtype), now, encoder_hidden_states=condition.to(dtype)).sample.float()
        clean = schedule.denoised(noised, prediction, now)
        signal, strength = schedule.parts(noised, now)
        noised = schedule.add_noise(clean, (noised - signal * clean) / strength, then)
    return clean


@torch.no_grad()
def decode(vae, latents, size):
    """Decode latents to PIL pictures of `size` (height, width)."""
    shift = vae.config.get("shift_factor") or 0.0
    decoded = vae.decode((latents / vae.config.scaling_factor + shift).to(vae.device, vae.dtype)).sample
    pixels = ((decoded.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture).resize(size[::-1], Image.Resampling.BICUBIC) for picture in pixels]
