"""Stable Diffusion: checks of a checkpoint, its U-Net, the noise schedule and loss, latents, prompts to pictures."""
