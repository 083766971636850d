"""Which family a checkpoint is of."""

from utils.diffusion.checkpoint import open_checkpoint, read_config
from utils.diffusion.families import flux, sd3, sdxl, stable_diffusion


def family_of(name, revision=None):
    """The file of the family of a diffusers folder or Hub id, by its configuration; what is unknown counts as SD."""
    name = str(name)
    files, folder = open_checkpoint(name, revision, None)
    place = folder or name
    if "unet/config.json" in files:
        is_sdxl = read_config(place, "unet", revision).get("addition_embed_type") == "text_time"
        return sdxl if is_sdxl else stable_diffusion
    if "transformer/config.json" in files:
        network = read_config(place, "transformer", revision).get("_class_name")
        return {"SD3Transformer2DModel": sd3, "FluxTransformer2DModel": flux}.get(network, stable_diffusion)
    return stable_diffusion
