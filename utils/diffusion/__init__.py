"""Stable Diffusion: what a checkpoint is, its U-Net, the noise schedule and loss, latents, prompts to pictures."""
