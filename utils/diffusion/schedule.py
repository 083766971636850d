"""The noise schedule of a diffusion model, and the noise loss."""

import torch
import torch.nn.functional as F
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

    def draw(self, count, generator):
        """Timesteps of a training step, on the CPU."""
        return torch.randint(self.num_steps, (count,), generator=generator)

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


def noise_loss(unet, schedule, latents, noise, timesteps, condition, reduction="mean"):
    """Squared error of the U-Net's prediction in float32; condition (B, T, W) has a gradient in every mode."""
    noised = schedule.add_noise(latents.float(), noise.float(), timesteps)
    # The first parameter belongs to the convolution that takes the latents.
    dtype = next(unet.parameters()).dtype
    prediction = unet(noised.to(dtype), timesteps, encoder_hidden_states=condition.to(dtype)).sample
    target = schedule.target(latents.float(), noise.float(), timesteps)
    return F.mse_loss(prediction.float(), target, reduction=reduction)
