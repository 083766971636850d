"""How images are prepared for the architectures of this folder."""

from transformers import ImageProcessingMixin

from utils.modeling.backbones import HALVES, IMAGENET
from utils.modeling.networks import KINDS

# What our folders say of themselves, so that their values are taken for those that the weights were trained with.
MADE_BY, MAKER = "made_by", "diffreid"


def read_preprocessing(name, model_type, **hub):
    """How images are normalised and resized for these weights: by their folder, else as usual for their family.

    None where that is nobody's but ours to say, and the folder is not by pretrain_backbone.py.
    """
    halves = ("vit", "siglip_vision_model", "plain_vit", "solider_swin", "clip_reid")
    usual = HALVES if model_type in halves else IMAGENET
    try:
        entries = ImageProcessingMixin.get_image_processor_dict(name, **hub)[0]
        mean, std = (tuple(map(float, entries[key])) for key in ("image_mean", "image_std"))
        if model_type not in KINDS and entries.get(MADE_BY) != MAKER:
            return None
        resample = {0: "nearest", 2: "bilinear", 3: "bicubic"}.get(entries.get("resample"), "bicubic")
    # A folder without an image processor, or with a broken one.
    except (OSError, KeyError, TypeError, ValueError):
        return dict(usual) if model_type in KINDS else None
    return {"image_mean": mean, "image_std": std, "resample": resample}
