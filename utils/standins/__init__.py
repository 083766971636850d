"""Tiny CLIP, ResNet, Stable Diffusion and question answerer, trained on drawn people; paths are in `utils.flags`."""
