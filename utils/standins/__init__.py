"""Tiny CLIP, Stable Diffusion and question answerer, trained on drawn people; their paths are in `utils.flags`."""
