"""Diffusion models: checks of a checkpoint, their families, U-Net, noise schedule and loss, latents, pictures."""
