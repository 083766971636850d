"""Backbones by short name, folder or Hub id: with published weights, or from their configuration only."""

from typing import NamedTuple

from transformers import AutoConfig, CLIPVisionConfig, PreTrainedConfig, ResNetConfig, SwinConfig

from utils.modeling.backbones import ClipBackbone, backbone_from_config, load_backbone, read_config
from utils.modeling.folder import IMPORTED_HEADS, model_kind, read_model_folder
from utils.modeling.networks import SHORT_NAMES
from utils.modeling.networks.semantic_swin import has_controller
from utils.modeling.reid_model import ReIDModel


class Named(NamedTuple):
    """The Hub id of published weights, or None, and the configuration for a model without them."""

    hub_id: str | None
    config_class: type
    options: dict


def swin(name, width, depths, heads):
    options = {"image_size": 224, "embed_dim": width, "depths": depths, "num_heads": heads}
    return Named(SHORT_NAMES[name], SwinConfig, options)


NAMED = {
    # A ResNet for drawn people on a CPU.
    "resnet-small": Named(
        None,
        ResNetConfig,
        {"embedding_size": 24, "hidden_sizes": [24, 48, 96, 192], "depths": [1, 1, 1, 1], "layer_type": "basic"},
    ),
    # A Swin for them, whose last map is as wide as a ResNet's.
    "swin-mini": Named(
        None,
        SwinConfig,
        {
            "image_size": 64,
            "patch_size": 2,
            "embed_dim": 32,
            "depths": [1, 1, 2],
            "num_heads": [1, 2, 4],
            "window_size": 4,
        },
    ),
    "resnet50": Named(SHORT_NAMES["resnet50"], ResNetConfig, {}),
    "swin-t": swin("swin-t", 96, [2, 2, 6, 2], [3, 6, 12, 24]),
    "swin-s": swin("swin-s", 96, [2, 2, 18, 2], [3, 6, 12, 24]),
    "swin-b": swin("swin-b", 128, [2, 2, 18, 2], [4, 8, 16, 32]),
    "clip-b16": Named(SHORT_NAMES["clip-b16"], CLIPVisionConfig, {"patch_size": 16, "projection_dim": 512}),
}
HUB = {"revision": "main", "token": None}


def named_config(name):
    """A new configuration of a short name."""
    return NAMED[name].config_class(**NAMED[name].options)


def configuration(name):
    """The backbone's configuration for a short name, or for a folder or Hub id of a backbone or a Re-ID model."""
    if name in NAMED:
        return named_config(name)
    if model_kind(name) == "reid":
        return AutoConfig.for_model(**read_model_folder(name)[0]["backbone"])
    return read_config(name, **HUB)


def check_backbone(name, from_scratch):
    """ValueError if `open_backbone` cannot open `name`, from names and configurations only."""
    if name in NAMED:
        if not from_scratch and NAMED[name].hub_id is None:
            raise ValueError(f"--backbone {name} has no published weights; add --from_scratch")
        return
    short_names = ", ".join(dict.fromkeys([*NAMED, *SHORT_NAMES]))
    try:
        kind = model_kind(name)
    except ValueError as error:
        raise ValueError(f"--backbone {name}: {error}; the short names are {short_names}") from None
    if kind == "file" and from_scratch:
        raise ValueError(
            f"--backbone {name} is a file of weights, and --from_scratch takes a configuration only; leave it out, or "
            f"give one of {short_names}"
        )
    if kind == "backbone":
        read_config(name, **HUB)
    elif kind == "reid" and not from_scratch and (reason := not_plain(PreTrainedConfig.get_config_dict(name)[0])):
        raise ValueError(
            f"--backbone {name}: its {reason}, which a plain backbone folder cannot hold; start from a backbone or "
            "from a model of bot or bdb"
        )


def check_swin(name):
    """ValueError if `name` is no plain Swin, by its configuration; a file of weights shows that when it is opened."""
    kind = "swin" if name not in NAMED and model_kind(name) == "file" else configuration(name).model_type
    if kind != "swin":
        raise ValueError(f"--backbone {name} is a {kind}, and SOLIDER controls a Swin: give swin-t or another Swin")


def check_start(name, method, semantic_weight=None):
    """The family of the backbone in `name`, by its configuration; ValueError if it cannot start `method`.

    `method` is that of a Re-ID model's head. `semantic_weight`: of a backbone with SOLIDER's controller beside it.
    """
    # A file of weights shows its family only when it is opened; what has no BatchNorm is refused then.
    family, kind = "resnet", model_kind(name)
    if kind == "reid":
        config = PreTrainedConfig.get_config_dict(name)[0]
        start = config.get("method", "bot")
        if start == "meta":
            raise ValueError(f"--backbone {name} has experts of its sources, which no other training can use")
        if start not in ("bot", method, *IMPORTED_HEADS):
            raise ValueError(f"--backbone {name} is a model of method {start}; it can start --method {start} only")
        family = config["backbone"]["model_type"]
        if family == "part_token_clip" and method in ("mgn", "bdb"):
            raise ValueError(
                f"--backbone {name} has part tokens, whose features are wider than the map {method} parts"
            )
    elif kind == "backbone":
        config = read_config(name, revision=None, token=None)
        family = config.model_type
        if method == "mgn" and family == "resnet" and len(config.hidden_sizes) < 2:
            raise ValueError(f"--backbone {name} has one stage; mgn parts in the last stage but one")
    if semantic_weight is not None and not has_controller(name):
        raise ValueError(
            f"--semantic_weight {semantic_weight}: --backbone {name} has no controller beside it, as a folder of "
            "pretrain_backbone.py --objective solider has; leave it out"
        )
    return family


def not_plain(config):
    """The part of a Re-ID model's backbone that `transformers` does not know, in words; None for a plain backbone."""
    if config.get("norms"):
        return "norms are mixtures of batch and instance norm"
    if config.get("pooling"):
        return "pooling is a learned GeM"
    if config["backbone"]["model_type"].startswith("resnet") and config.get("method", "bot") in ("agw", "sbs"):
        return f"ResNet has the non-local blocks of {config['method']}"
    if config.get("method") == "meta":
        return "ResNet has the norms of several domains"
    if config["backbone"]["model_type"].startswith("resnet") and config.get("method") == "mgn":
        return "ResNet has the stride of mgn's global branch"
    return None


def open_backbone(name, image_size, from_scratch=False):
    """The backbone of a short name, a folder or a Hub id; for a saved Re-ID model, the model's backbone.

    `from_scratch` uses the configuration only, and draws the weights with torch's generator.
    """
    check_backbone(name, from_scratch)
    if from_scratch:
        backbone = backbone_from_config(configuration(name), image_size)
        if isinstance(backbone, ClipBackbone):
            # Published patch weights stay frozen; random ones have to be trained.
            backbone.tower.embeddings.patch_embedding.requires_grad_(True)
        return backbone
    if name in NAMED:
        return load_backbone(NAMED[name].hub_id, image_size)
    kind = model_kind(name)
    if kind in ("reid", "file"):
        given = tuple(image_size) if kind == "file" else None
        model = ReIDModel.open(name, given).float()
        backbone, backbone.notes = model.backbone, model.notes
        backbone.preprocessing = {name: getattr(model, name) for name in ("image_mean", "image_std", "resample")}
        if tuple(backbone.image_size) != tuple(image_size):
            raise ValueError(
                f"{name} takes images of {' x '.join(map(str, backbone.image_size))}, not of "
                f"{' x '.join(map(str, image_size))}; set --resolution to the same"
            )
        return backbone
    return load_backbone(name, image_size)
