"""Pictures of what a U-Net makes of noised images under one condition or another."""

from itertools import pairwise

import torch
from PIL import Image


@torch.no_grad()
def denoise(unet, schedule, latents, noise, condition, *, start=0.6, num_steps=10):
    """Latents noised up to the share `start` of the schedule and brought back under `condition`, by DDIM."""
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
    """PIL pictures of `size` (height, width)."""
    shift = vae.config.get("shift_factor") or 0.0
    decoded = vae.decode((latents / vae.config.scaling_factor + shift).to(vae.device, vae.dtype)).sample
    pixels = ((decoded.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(one).resize(size[::-1], Image.Resampling.BICUBIC) for one in pixels]


def sheet(rows, margin=4):
    """One picture of rows of equally large pictures."""
    width, height = rows[0][0].size
    whole = Image.new(
        "RGB", (len(rows[0]) * (width + margin) - margin, len(rows) * (height + margin) - margin), "white"
    )
    for down, row in enumerate(rows):
        for right, picture in enumerate(row):
            whole.paste(picture, (right * (width + margin), down * (height + margin)))
    return whole
