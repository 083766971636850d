"""Architectures beside CLIP, ResNet and Swin: each a configuration, a `transformers` model, and its backbone.

`classes(model_type)` loads the file of one architecture. `SHORT_NAMES`: published backbones, for every script.
"""

import importlib
from pathlib import Path

from utils import opened_when_used

__getattr__ = opened_when_used(__name__, {"preprocessing": "read_preprocessing"})

# model_type: (file, configuration, model, backbone)
KINDS = {
    "resnet_variant": ("resnet", "ResNetVariantConfig", "ResNetVariant", "ResNetVariantBackbone"),
    "osnet": ("osnet", "OSNetConfig", "OSNet", "OSNetBackbone"),
    "solider_swin": ("solider", "SoliderSwinConfig", "SoliderSwin", "SoliderSwinBackbone"),
    "plain_vit": ("plain_vit", "PlainViTConfig", "PlainViT", "PlainViTBackbone"),
    "clip_reid": ("clip_reid", "ClipReIDConfig", "ClipReID", "ClipReIDBackbone"),
    "part_token_clip": ("part_tokens", "PartTokenConfig", "PartTokenCLIP", "PartTokenBackbone"),
    "vit": ("tokens", "ViTConfig", "ViTModel", "TokenBackbone"),
    "dinov2": ("tokens", "Dinov2Config", "Dinov2Model", "TokenBackbone"),
    "dinov2_with_registers": ("tokens", "Dinov2WithRegistersConfig", "Dinov2WithRegistersModel", "TokenBackbone"),
    "dinov3_vit": ("tokens", "DINOv3ViTConfig", "DINOv3ViTModel", "TokenBackbone"),
    "siglip_vision_model": ("tokens", "SiglipVisionConfig", "SiglipVisionModel", "TokenBackbone"),
}
# Those that `transformers` does not have; the rest it opens by itself.
OURS = ("resnet_variant", "osnet", "solider_swin", "plain_vit", "clip_reid", "part_token_clip")

SHORT_NAMES = {
    "resnet50": "microsoft/resnet-50",
    "swin-t": "microsoft/swin-tiny-patch4-window7-224",
    "swin-s": "microsoft/swin-small-patch4-window7-224",
    "swin-b": "microsoft/swin-base-patch4-window7-224",
    "clip-b16": "openai/clip-vit-base-patch16",
    "clip-b32": "openai/clip-vit-base-patch32",
    "clip-l14": "openai/clip-vit-large-patch14",
    "vit-b16": "google/vit-base-patch16-224-in21k",
    "dinov2-s": "facebook/dinov2-small",
    "dinov2-b": "facebook/dinov2-base",
    "dinov2-l": "facebook/dinov2-large",
    "dinov3-s": "facebook/dinov3-vits16-pretrain-lvd1689m",
    "dinov3-b": "facebook/dinov3-vitb16-pretrain-lvd1689m",
    "dinov3-l": "facebook/dinov3-vitl16-pretrain-lvd1689m",
    "siglip-b16": "google/siglip-base-patch16-224",
}


def classes(model_type):
    """(configuration, model, backbone) classes of an architecture."""
    file, *names = KINDS[model_type]
    module = importlib.import_module(f"{__name__}.{file}")
    return tuple(getattr(module, name) for name in names)


def full_name(name):
    """The Hub id of a short name; anything else, and a file or folder of that name, stays as it is."""
    return SHORT_NAMES[str(name)] if str(name) in SHORT_NAMES and not Path(name).exists() else name
