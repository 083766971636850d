"""A plain ViT for images of one shape: as in timm, DINO and TransReID, with overlapping patches and camera embedding.

A model trained with a camera embedding needs the cameras of its images, see `cameras.py`.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel

from utils.modeling.backbones import Backbone, resize_position_table
from utils.modeling.networks.cameras import SeesCameras, camera_offset
from utils.modeling.networks.resnet import IbnNorm

STEM_WIDTH = 64


class PlainViTConfig(PreTrainedConfig):
    """`stride` below `patch_size`: overlapping patches; `stem`: convolutions before the patches, which halve the
    image. `num_cameras` 0: no camera embedding."""

    model_type = "plain_vit"

    image_size: list[int] | tuple[int, ...] = (256, 128)
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    patch_size: int = 16
    stride: int = 16
    layer_norm_eps: float = 1e-6
    layer_scale: bool = False
    stem: bool = False
    num_cameras: int = 0
    camera_weight: float = 3.0


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, tokens):
        # 3 x [B, heads, T, width / heads]
        q, k, v = self.qkv(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        self.norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.attention = Attention(width, config.num_attention_heads)
        self.norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.fc1, self.fc2 = nn.Linear(width, config.intermediate_size), nn.Linear(config.intermediate_size, width)
        self.scale1 = nn.Parameter(torch.ones(width)) if config.layer_scale else None
        self.scale2 = nn.Parameter(torch.ones(width)) if config.layer_scale else None

    def forward(self, tokens):
        attended = self.attention(self.norm1(tokens))
        tokens = tokens + (attended if self.scale1 is None else attended * self.scale1)
        mixed = self.fc2(F.gelu(self.fc1(self.norm2(tokens))))
        return tokens + (mixed if self.scale2 is None else mixed * self.scale2)


class PlainViT(PreTrainedModel):
    config_class = PlainViTConfig
    base_model_prefix = "vit"
    main_input_name = "pixel_values"

    def __init__(self, config):
        super().__init__(config)
        width = config.hidden_size
        self.stem = stem() if config.stem else None
        halves = 2 if config.stem else 1
        inputs = STEM_WIDTH if config.stem else 3
        self.patches = nn.Conv2d(inputs, width, config.patch_size // halves, config.stride // halves)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        height, columns = grid_of(config)
        self.position_embedding = nn.Parameter(torch.zeros(1 + height * columns, width))
        self.camera_embedding = nn.Parameter(torch.zeros(config.num_cameras, width)) if config.num_cameras else None
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def embed(self, images, cameras=None):
        images = images.to(self.patches.weight.dtype)
        tokens = self.patches(images if self.stem is None else self.stem(images)).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(tokens.shape[0], -1, -1), tokens], dim=1) + self.position_embedding
        if self.camera_embedding is None:
            return tokens
        return tokens + self.config.camera_weight * camera_offset(self.camera_embedding, cameras)


def stem():
    """TransReID-SSL's: three convolutions, of which the first halves the image, two of them with IBN-a norms."""
    layers = []
    for inputs, kernel, norm in ((3, 7, IbnNorm), (STEM_WIDTH, 3, IbnNorm), (STEM_WIDTH, 3, nn.BatchNorm2d)):
        stride = 1 if layers else 2
        layers += [nn.Conv2d(inputs, STEM_WIDTH, kernel, stride, kernel // 2, bias=False), norm(STEM_WIDTH), nn.ReLU()]
    return nn.Sequential(*layers)


def grid_of(config):
    if config.stem:
        patch = config.patch_size // 2
        return tuple((-(-side // 2) - patch) // (config.stride // 2) + 1 for side in config.image_size)
    return tuple((side - config.patch_size) // config.stride + 1 for side in config.image_size)


class PlainViTBackbone(SeesCameras, Backbone):
    """The class token after the last norm."""

    summary = "token"

    def __init__(self, model, image_size):
        super().__init__(model, image_size, model.config.hidden_size)
        if tuple(image_size) != tuple(model.config.image_size):
            raise ValueError(
                f"these weights hold positions for images of {tuple(model.config.image_size)} (height, width), not of "
                f"{tuple(image_size)}; set the resolution to the same, or convert the file with another one"
            )
        self.grid = grid_of(model.config)
        self.gradient_checkpointing = False

    def tokens(self, images, num_layers=None):
        """Class and patch tokens after the first `num_layers` blocks, by default all, before the last norm."""
        if tuple(images.shape[-2:]) != self.image_size:
            raise ValueError(
                f"this model takes images of {self.image_size} (height, width) and got {tuple(images.shape)}"
            )
        hidden = self.model.embed(images, self.cameras)
        for layer in self.model.layers[:num_layers]:
            saving = self.gradient_checkpointing and self.training
            hidden = checkpoint(layer, hidden, use_reentrant=False) if saving else layer(hidden)
        return hidden

    def summary_and_map(self, images):
        tokens = self.model.layernorm(self.tokens(images))
        return tokens[:, 0], tokens[:, 1:].transpose(1, 2).unflatten(2, self.grid)

    def feature_map(self, images):
        return self.summary_and_map(images)[1]

    def enable_gradient_checkpointing(self):
        self.gradient_checkpointing = True

    def set_attention(self, implementation):
        if implementation not in ("sdpa", "eager"):
            raise ValueError(f"attn_implementation {implementation!r} is not known here; this ViT has sdpa only")


def resized_positions(table, old_grid, config, mode="bilinear"):
    return resize_position_table(table, old_grid, grid_of(config), mode)
