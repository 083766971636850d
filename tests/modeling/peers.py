"""Builds a model with its original library, and writes its weights, images and features.

Runs in an environment of its own, outside this repository's:

    python -m venv peers && peers/bin/pip install torch torchvision timm open_clip_torch torchreid gdown \
        tensorboard scipy opencv-python-headless
    peers/bin/pip install --no-deps fastreid yacs termcolor tabulate
    DIFFREID_PEERS_PYTHON=$PWD/peers/bin/python pytest -m slow tests/modeling/test_weights_of_others.py
"""

import sys
from pathlib import Path

import torch

torch.set_num_threads(1)


def shaken(model, seed=0):
    """The model with values in which a mistake shows: nothing is left at 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("running_var"):
                tensor.copy_(1 + 0.2 * noise.abs())
            elif tensor.dim() <= 1:
                tensor.add_(0.1 * noise)
            elif "pos_embed" in name or "table" in name or "token" in name or "positional" in name:
                tensor.add_(0.2 * noise)
    return model.eval()


def images_of(height, width):
    """Two images of few large patches, which differ more in their features than noise does."""
    few = torch.randn(2, 3, 8, 4, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.interpolate(few, (height, width), mode="bicubic")


def build(name):
    """(state dict, images, features)."""
    library, kind = name.split(":")
    if library == "timm":
        import timm

        size = (256, 128)
        options = {}
        if "vit" in kind or "swin" in kind:
            size = (224, 224)
            options = {"img_size": 224}
        model = shaken(timm.create_model(kind, pretrained=False, **options))
        if "resnet" in kind:
            for convolution in (model.layer4[0].conv1, model.layer4[0].conv2, model.layer4[0].downsample[0]):
                convolution.stride = (1, 1)
        images = images_of(*size)
        return model.state_dict(), images, model.forward_head(model.forward_features(images), pre_logits=True)
    if library == "open_clip":
        import open_clip

        model = shaken(open_clip.create_model(kind))
        images = images_of(224, 224)
        return model.state_dict(), images, model.encode_image(images)
    if library == "torchreid":
        from torchreid.reid import models

        model = shaken(models.build_model(kind, num_classes=11, pretrained=False))
        images = images_of(256, 128)
        return model.state_dict(), images, model(images)
    if library == "fastreid":
        return fast_reid(kind)
    raise ValueError(name)


def fast_reid(kind):
    from fastreid.config import get_cfg
    from fastreid.modeling.meta_arch import build_model

    config = get_cfg()
    config.MODEL.DEVICE = "cpu"
    config.MODEL.BACKBONE.PRETRAIN = False
    config.MODEL.BACKBONE.NAME = "build_resnet_backbone"
    config.MODEL.BACKBONE.DEPTH = "50x"
    config.MODEL.BACKBONE.WITH_IBN = "ibn" in kind
    config.MODEL.BACKBONE.WITH_NL = "agw" in kind or "sbs" in kind
    config.MODEL.HEADS.NAME = "EmbeddingHead"
    config.MODEL.HEADS.NORM = "BN"
    config.MODEL.HEADS.WITH_BNNECK = True
    config.MODEL.HEADS.NUM_CLASSES = 11
    config.MODEL.HEADS.POOL_LAYER = "GlobalAvgPool"
    size = (256, 128)
    if "agw" in kind:
        config.MODEL.HEADS.POOL_LAYER = "GeneralizedMeanPooling"
    if "sbs" in kind or "mgn" in kind:
        config.MODEL.HEADS.POOL_LAYER = "GeneralizedMeanPoolingP"
        config.MODEL.HEADS.EMBEDDING_DIM = 0 if "sbs" in kind else 256
        size = (384, 128)
    if "mgn" in kind:
        config.MODEL.META_ARCHITECTURE = "MGN"
    model = shaken(build_model(config))
    # Images as fast-reid takes them: RGB in 0..255.
    pixels = (127 + 60 * images_of(*size)).clamp(0, 255).round()
    return model.state_dict(), pixels, model(pixels.clone())


if __name__ == "__main__":
    name, folder = sys.argv[1], Path(sys.argv[2])
    with torch.no_grad():
        state, images, features = build(name)
    torch.save(state, folder / "weights.pth")
    torch.save({"images": images, "features": features}, folder / "want.pth")
