"""Flow matching: noise on a straight line between image and noise, and the speed along it as the target."""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn


class FlowSchedule(nn.Module):
    """The counterpart of `NoiseSchedule`. With s = timestep / num_steps:

    x_s = (1 - s) x + s noise; the target is noise - x. Timesteps are drawn as the family was trained: `density` is
    `logit_normal`, more of the middle (Stable Diffusion 3), or `uniform` (Flux), then shifted as the checkpoint says.
    """

    prediction_type = "flow"

    def __init__(self, config, density):
        super().__init__()
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
        self.num_steps, self.density = scheduler.config.num_train_timesteps, density
        # From the most noise to the least.
        self.register_buffer("strengths", scheduler.sigmas[: self.num_steps].float(), persistent=False)

    def draw(self, count, generator):
        """Timesteps of a training step, on the CPU."""
        if self.density == "logit_normal":
            place = torch.randn(count, generator=generator).sigmoid()
        else:
            place = torch.rand(count, generator=generator)
        rows = (place * self.num_steps).long().clamp(max=self.num_steps - 1)
        return self.strengths.cpu()[rows] * self.num_steps

    def parts(self, latents, timesteps):
        """1 - s and s of each image, float32, shaped to be multiplied with the latents."""
        strength = (timesteps.float() / self.num_steps).view(-1, *[1] * (latents.ndim - 1))
        return 1 - strength, strength

    def add_noise(self, latents, noise, timesteps):
        signal, strength = self.parts(latents, timesteps)
        return signal * latents + strength * noise

    def target(self, latents, noise, timesteps):
        return noise - latents

    def denoised(self, noised, prediction, timesteps):
        """The latents without noise, according to the prediction."""
        return noised - self.parts(noised, timesteps)[1] * prediction
