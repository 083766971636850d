"""CLIP's image encoder as CLIP-ReID uses it: features of two layers, overlapping patches, camera embedding.

The feature is the class token after the last norm, followed by the same after the projection. A camera's vector is
added to the class token alone, see `cameras.py`.
"""

import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from utils.modeling.backbones import ClipBackbone
from utils.modeling.networks.cameras import SeesCameras, camera_offset


class ClipReIDConfig(CLIPVisionConfig):
    """`grid`: rows and columns of patches, one every `stride` pixels; `num_cameras` 0: no camera embedding."""

    model_type = "clip_reid"

    grid: list[int] | tuple[int, ...] = (16, 8)
    stride: int = 16
    num_cameras: int = 0
    # As the authors train on people; a file does not say it.
    camera_weight: float = 1.0


class ClipReID(CLIPVisionModelWithProjection):
    config_class = ClipReIDConfig

    def __init__(self, config):
        super().__init__(config)
        embeddings, width, (rows, columns) = self.vision_model.embeddings, config.hidden_size, config.grid
        embeddings.patch_embedding = nn.Conv2d(3, width, config.patch_size, config.stride, bias=False)
        embeddings.position_embedding = nn.Embedding(1 + rows * columns, width)
        self.camera_embedding = nn.Parameter(torch.zeros(config.num_cameras, width)) if config.num_cameras else None


class ClipReIDBackbone(SeesCameras, ClipBackbone):
    def __init__(self, model, image_size):
        super().__init__(model, image_size)
        self.num_features = model.config.hidden_size + model.config.projection_dim

    @staticmethod
    def stored_grid_of(config):
        return tuple(config.grid)

    def class_token(self):
        token, table = super().class_token(), self.model.camera_embedding
        return token if table is None else token + self.config.camera_weight * camera_offset(table, self.cameras)

    def project(self, tokens):
        tokens = self.tower.post_layernorm(tokens)
        return torch.cat([tokens, self.model.visual_projection(tokens)], dim=-1)
