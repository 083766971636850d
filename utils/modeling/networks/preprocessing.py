"""How images are prepared for the architectures of this folder."""

from transformers import ImageProcessingMixin

from utils.modeling.backbones import HALVES, IMAGENET


def read_preprocessing(name, model_type, **hub):
    """How images are normalised and resized for these weights: by their folder, else as usual for their family."""
    halves = ("vit", "siglip_vision_model", "plain_vit", "solider_swin", "clip_reid")
    usual = HALVES if model_type in halves else IMAGENET
    try:
        entries = ImageProcessingMixin.get_image_processor_dict(name, **hub)[0]
        mean, std = (tuple(map(float, entries[key])) for key in ("image_mean", "image_std"))
        resample = {0: "nearest", 2: "bilinear", 3: "bicubic"}.get(entries.get("resample"), "bicubic")
    # A folder without an image processor, or with a broken one.
    except (OSError, KeyError, TypeError, ValueError):
        return dict(usual)
    return {"image_mean": mean, "image_std": std, "resample": resample}
