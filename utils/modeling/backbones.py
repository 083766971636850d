"""Backbones of a Re-ID model, built on `transformers`: the CLIP image encoder, ResNet and Swin; more in `networks`.

All have the same interface: `forward(images)` (B, C), `feature_map(images)` (B, C, h, w), `num_features` (C),
`image_size` (height, width), `config` and `model`, the transformers model itself.
"""

import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    PreTrainedConfig,
    ResNetModel,
    SwinModel,
    logging,
)

from utils.modeling import networks
from utils.modeling.folder import ask_hub
from utils.modeling.networks import full_name
from utils.modeling.norms import recompute

IMAGENET = {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}
HALVES = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}
SUPPORTED = (
    "CLIP, ResNet, Swin, ViT, DINOv2, DINOv3 (ViT) and SigLIP, and OSNet and others of `utils.modeling.networks`"
)


class Backbone(nn.Module):
    """The base class of the backbones. `summary` is what `forward` gives: the "mean" of the map, or a "token"."""

    summary = "mean"
    # How images are normalised and resized, where the source of the weights says so: arguments of ReIDModel.
    preprocessing = None
    # What a reader of another project's weights did or left out.
    notes = ()

    def __init__(self, model, image_size, num_features):
        super().__init__()
        self.model = model
        self.config = model.config
        self.image_size = tuple(image_size)
        self.num_features = num_features
        # A module that pools the map instead of its mean: (B, C, h, w) -> (B, C).
        self.pooling = None

    def forward(self, images):
        return self.summary_and_map(images)[0]

    def summary_and_map(self, images):
        """The results of `forward` and `feature_map`, computed in one pass."""
        feature_map = self.feature_map(images)
        return feature_map.mean(dim=(2, 3)) if self.pooling is None else self.pooling(feature_map), feature_map

    def enable_gradient_checkpointing(self):
        # Newer versions of transformers have another name for this method and warn about the old one.
        older = self.model.gradient_checkpointing_enable
        getattr(self.model, "activation_checkpointing_enable", older)({"use_reentrant": False})

    def set_attention(self, implementation):
        try:
            self.model.set_attn_implementation(implementation)
        except ImportError as error:
            raise ValueError(f"attn_implementation {implementation!r} cannot run on this machine: {error}") from error

    def save_pretrained(self, folder):
        """Write a plain `transformers` folder: no neck, no classifier."""
        self.model.save_pretrained(folder)


class ClipBackbone(Backbone):
    """CLIP's image encoder for images of one fixed shape: class token, final norm, projection.

    The position table is resized once to the patch grid of `image_size`, and then trained. The patch projection is
    frozen. A tower saved without `visual_projection` returns its class token without projection.
    """

    summary = "token"

    def __init__(self, model, image_size):
        config = model.config
        projected = isinstance(model, CLIPVisionModelWithProjection)
        super().__init__(model, image_size, config.projection_dim if projected else config.hidden_size)
        patch, stride = config.patch_size, getattr(config, "stride", config.patch_size)
        self.stored_grid = self.stored_grid_of(config)
        self.grid = tuple((side - patch) // stride + 1 for side in image_size)
        if min(self.grid) < 1:
            raise ValueError(f"image_size {self.image_size} is smaller than one patch of {patch} x {patch} pixels")
        embeddings = self.tower.embeddings
        embeddings.patch_embedding.requires_grad_(False)
        table = resize_position_table(embeddings.position_embedding.weight.detach(), self.stored_grid, self.grid)
        embeddings.position_embedding = nn.Embedding.from_pretrained(table, freeze=False)
        # The position numbers of the square grid are not needed: tokens() adds the whole table.
        embeddings.position_ids = None

    @staticmethod
    def stored_grid_of(config):
        """Rows and columns of the position table in a folder."""
        return (config.image_size // config.patch_size,) * 2

    @property
    def tower(self):
        return getattr(self.model, "vision_model", self.model)

    def class_token(self):
        """(B or 1, 1, width)"""
        return self.tower.embeddings.class_embedding[None, None]

    def tokens(self, images):
        """Class and patch tokens after the last block: (B, 3, H, W) -> (B, 1 + h * w, width)."""
        if images.shape[-2:] != self.image_size:
            raise ValueError(
                f"this model takes images of {self.image_size} (height, width) and got {tuple(images.shape)}; "
                "resize the images, or load the backbone with image_size="
            )
        # CLIPVisionEmbeddings.forward accepts squares only, so its few lines are copied here.
        embeddings = self.tower.embeddings
        patches = embeddings.patch_embedding(images.to(embeddings.patch_embedding.weight.dtype))
        class_token = self.class_token().expand(images.shape[0], -1, -1)
        hidden = torch.cat([class_token, patches.flatten(2).transpose(1, 2)], dim=1)
        hidden = self.tower.pre_layrnorm(hidden + embeddings.position_embedding.weight)
        return self.tower.encoder(inputs_embeds=hidden).last_hidden_state

    def project(self, tokens):
        tokens = self.tower.post_layernorm(tokens)
        projection = getattr(self.model, "visual_projection", None)
        return tokens if projection is None else projection(tokens)

    def feature_map(self, images):
        return self.project(self.tokens(images)[:, 1:]).transpose(1, 2).unflatten(2, self.grid)

    def forward(self, images):
        return self.project(self.tokens(images)[:, 0])

    def summary_and_map(self, images):
        tokens = self.project(self.tokens(images))
        return tokens[:, 0], tokens[:, 1:].transpose(1, 2).unflatten(2, self.grid)

    def save_pretrained(self, folder):
        """Write a `transformers` folder; positions are resized back to the configuration's grid, bilinearly."""
        state = self.model.state_dict()
        name = next(name for name in state if name.endswith("position_embedding.weight"))
        state[name] = resize_position_table(state[name], self.grid, self.stored_grid)
        self.model.save_pretrained(folder, state_dict=state)


class ResNetBackbone(Backbone):
    """ResNet whose last stage does not downsample: 256x128 images give a 16x8 map, pooled by its mean."""

    def __init__(self, model, image_size):
        super().__init__(model, image_size, model.config.hidden_sizes[-1])
        self.gradient_checkpointing = False
        for module in model.encoder.stages[-1].layers[0].modules():
            if isinstance(module, nn.Conv2d):
                module.stride = (1, 1)

    def feature_map(self, images):
        hidden = self.model.embedder(images.to(self.model.embedder.embedder.convolution.weight.dtype))
        for stage in self.model.encoder.stages:
            hidden = self.run(stage, hidden)
        return hidden

    def compile(self, **options):
        for stage in self.model.encoder.stages:
            stage.compile(**options)

    def run(self, module, hidden):
        """Run a part of the network; with gradient checkpointing it is computed again in the backward pass."""
        if self.gradient_checkpointing and self.training:
            return checkpoint(module, hidden, use_reentrant=False, context_fn=lambda: recompute(module))
        return module(hidden)

    def enable_gradient_checkpointing(self):
        # transformers has no gradient checkpointing for ResNet.
        self.gradient_checkpointing = True

    def set_attention(self, implementation):
        """Nothing to do: a convolutional network has no attention."""


class SwinBackbone(Backbone):
    """Swin for images that are not square; the last map (8x4 at 256x128) is pooled by its mean.

    Maps whose sides are not multiples of the window are padded. By default `SwinModel` would shrink the window to the
    narrow side of the map, but its table of relative positions has no rows for that size.
    """

    # No shift where one window covers the map.
    drops_idle_shifts = True

    def __init__(self, model, image_size):
        config = model.config
        super().__init__(model, image_size, model.num_features)
        if config.use_absolute_embeddings:
            raise ValueError("Swin with use_absolute_embeddings=True is not supported; use one without")
        grid = tuple(-(-size // config.patch_size) for size in image_size)
        for stage in model.encoder.layers:
            # No shift if one window covers the map or, as in SwinModel, fits its narrow side exactly.
            covered = max(grid) <= config.window_size or min(grid) == config.window_size
            if covered and self.drops_idle_shifts:
                for block in stage.blocks:
                    block.shift_size = 0
            grid = halved(grid)

    def feature_map(self, images):
        projection = self.model.embeddings.patch_embeddings.projection
        hidden, grid = self.model.embeddings(images.to(projection.weight.dtype))
        hidden = self.model.encoder(hidden, grid, always_partition=True).last_hidden_state
        for _ in self.config.depths[1:]:
            grid = halved(grid)
        return self.model.layernorm(hidden).transpose(1, 2).unflatten(2, grid)


FAMILIES = {"clip_vision_model": ClipBackbone, "resnet": ResNetBackbone, "swin": SwinBackbone}
MODELS = {"clip_vision_model": CLIPVisionModelWithProjection, "resnet": ResNetModel, "swin": SwinModel}
# Whole models of image and text, of which the image tower is used.
WHOLE_MODELS = ("clip", "siglip")


def model_class_of(model_type):
    return MODELS[model_type] if model_type in MODELS else networks.classes(model_type)[1]


def config_from(entries):
    """The configuration that `to_diff_dict` wrote."""
    entries = dict(entries)
    if entries.get("model_type") in networks.OURS:
        return networks.classes(entries.pop("model_type"))[0](**entries)
    return AutoConfig.for_model(**entries)


def backbone_from_config(config, image_size=(256, 128), *, attn_implementation=None):
    """A backbone with random weights. Under `torch.device("meta")` it takes no memory (counts, FLOPs)."""
    image_size = checked_image_size(image_size)
    config = tower_config(config)
    # A projection of width 0 means a tower that was saved without one.
    unprojected = config.model_type == "clip_vision_model" and not config.projection_dim
    model = CLIPVisionModel(config) if unprojected else model_class_of(config.model_type)(config)
    return wrap(model, image_size, attn_implementation)


def load_backbone(name_or_path, image_size=(256, 128), *, attn_implementation=None, revision=None, token=None):
    """The backbone in a `transformers` folder or Hub repository, in float32. Only safetensors are read."""
    image_size = checked_image_size(image_size)
    name_or_path = full_name(name_or_path)
    hub = {"revision": revision or "main", "token": token}
    config = read_config(name_or_path, **hub)
    # Not every version of transformers can load a tower without projection into the class with a projection.
    bare = config.architectures == ["CLIPVisionModel"]
    config = tower_config(config)
    model_class = CLIPVisionModel if bare else model_class_of(config.model_type)
    verbosity = logging.get_verbosity()
    # transformers would print a table of tensors that do not fit; the checks below replace it.
    logging.set_verbosity(logging.CRITICAL)
    try:
        model, report = model_class.from_pretrained(
            name_or_path,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **hub,
        )
    except Exception as error:
        # Absent and truncated files raise error classes of three libraries.
        raise ValueError(
            f"no {config.model_type} weights could be read from {str(name_or_path)!r}: {error}\n"
            "It needs whole safetensors files. Pickled weights (.bin) are never read: where you trust them, convert "
            "them with transformers' save_pretrained."
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    # A layer of ViT that TokenBackbone leaves out.
    missing = sorted(name for name in report["missing_keys"] if not name.startswith("pooler."))
    if missing == ["visual_projection.weight"]:
        model, missing = model.vision_model, []
    wrong = [f"{name} is missing" for name in missing]
    wrong += [f"{name} is {tuple(a)}, not {tuple(b)}" for name, a, b in sorted(report["mismatched_keys"])]
    if wrong:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"the weights in {str(name_or_path)!r} are not those of its config.json, a {config.model_type}: "
            f"{'; '.join(wrong[:3])}{more}"
        )
    backbone = wrap(model, image_size, attn_implementation)
    if config.model_type in networks.KINDS or Path(str(name_or_path)).is_dir():
        backbone.preprocessing = networks.read_preprocessing(name_or_path, config.model_type, **hub)
    return backbone


def wrap(model, image_size, attn_implementation):
    if isinstance(model, CLIPVisionModel):
        model.config.projection_dim = 0
    kind = model.config.model_type
    backbone = (FAMILIES[kind] if kind in FAMILIES else networks.classes(kind)[2])(model, image_size)
    if attn_implementation is not None:
        backbone.set_attention(attn_implementation)
    return backbone


def read_config(name_or_path, **hub):
    """The transformers configuration of a folder or Hub id; ValueError if it is absent or not supported."""
    name = str(full_name(name_or_path))
    if not Path(name).is_dir():
        ask_hub(name, **hub)
    elif not (Path(name) / "config.json").is_file():
        raise ValueError(f"{name!r} has no config.json, so it is not a transformers model folder")
    try:
        entries = PreTrainedConfig.get_config_dict(name, **hub)[0]
        kind = entries.get("model_type")
    except Exception as error:
        raise ValueError(f"the config.json of {name!r} cannot be read: {error}") from error
    if kind == "diffreid":
        raise ValueError(
            f"{name!r} is a whole Re-ID model, not a plain backbone: open it with ReIDModel.from_pretrained"
        )
    if kind not in WHOLE_MODELS and kind not in FAMILIES and kind not in networks.KINDS:
        raise ValueError(f"{name!r} has model_type {kind!r}; supported backbones are {SUPPORTED}")
    try:
        if kind in networks.OURS:
            return config_from(entries)
        return AutoConfig.from_pretrained(name, trust_remote_code=False, **hub)
    except Exception as error:
        raise ValueError(f"the config.json of {name!r} is not valid: {error}") from error


def tower_config(config):
    """A copy of the image tower's configuration; in a whole CLIP's, the outer one gives the projection's width."""
    config = copy.deepcopy(config)
    if config.model_type == "clip":
        config.vision_config.projection_dim = config.projection_dim
        config = config.vision_config
    elif config.model_type == "siglip":
        config = config.vision_config
    if config.model_type not in FAMILIES and config.model_type not in networks.KINDS:
        raise ValueError(f"model_type {config.model_type!r} is not supported; supported backbones are {SUPPORTED}")
    return config


def checked_image_size(image_size):
    try:
        height, width = (int(size) for size in image_size)
    except (TypeError, ValueError) as error:
        raise ValueError(f"image_size must be (height, width) in pixels, got {image_size!r}") from error
    if min(height, width) < 1:
        raise ValueError(f"image_size must be (height, width) in pixels, got {image_size!r}")
    return height, width


def resize_position_table(table, old_grid, new_grid, mode="bilinear"):
    """Resize a position table (first row: class token) from one patch grid to another."""
    if tuple(old_grid) == tuple(new_grid):
        return table.clone()
    grid = table[1:].T.reshape(1, -1, *old_grid).float()
    grid = F.interpolate(grid, size=tuple(new_grid), mode=mode, align_corners=False)
    return torch.cat([table[:1], grid.flatten(2)[0].T.to(table.dtype)])


def halved(grid):
    return tuple((size + 1) // 2 for size in grid)
