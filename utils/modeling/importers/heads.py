"""Heads of other projects' models, for their features. Training starts from the backbone and a head of ours."""

import copy

import torch
from torch import nn

from utils.modeling.heads import GeM, Head, tail
from utils.modeling.networks.plain_vit import Block
from utils.modeling.reid_model import HeadOutput


def pooling_of(name):
    """(B, C, h, w) -> (B, C): mean, max, or gem with a learned power."""
    if name == "gem":
        return GeM()
    return {"mean": MeanPooling, "max": MaxPooling}[name]()


class MeanPooling(nn.Module):
    def forward(self, feature_map):
        return feature_map.float().mean(dim=(2, 3))


class MaxPooling(nn.Module):
    def forward(self, feature_map):
        return feature_map.float().amax(dim=(2, 3))


class Neck(nn.Module):
    """Linear, BatchNorm, ReLU, each where asked for: (B, channels) -> (B, width)."""

    def __init__(self, channels, embedding=0, bias=False, norm=True, relu=False):
        super().__init__()
        self.width = embedding or channels
        self.linear = nn.Linear(channels, embedding, bias=bias) if embedding else nn.Identity()
        self.norm = nn.BatchNorm1d(self.width) if norm else nn.Identity()
        self.relu = nn.ReLU() if relu else nn.Identity()

    def forward(self, features):
        weight = next(self.parameters(), features)
        features = features.to(weight.dtype)
        return self.relu(self.norm(self.linear(features)))


class EmbeddingHead(Head):
    """One feature: pooling (`backbone`: the backbone's own), then Linear, BatchNorm and ReLU where asked for."""

    def __init__(self, backbone, pooling="backbone", embedding=0, bias=False, norm=True, relu=False):
        neck = Neck(backbone.num_features, embedding, bias, norm, relu)
        super().__init__([neck.width])
        self.num_features = neck.width
        self.pooling = None if pooling == "backbone" else pooling_of(pooling)
        self.neck = neck

    def pool(self, backbone, images, rng=None):
        pooled = backbone(images) if self.pooling is None else self.pooling(backbone.feature_map(images))
        return pooled[:, None]

    def forward(self, pooled):
        features = self.neck(pooled[:, 0])
        return HeadOutput([features], self.scores([features]), features)


class GranularHead(Head):
    """fast-reid's MGN: three branches from the second block of the second-last stage on, cut into 1, 2 and 3 stripes;
    each of the 8 parts has its own pooling and neck."""

    STRIPES = (1, 2, 3)

    def __init__(self, backbone, embedding=256, pooling="gem"):
        necks = [Neck(backbone.num_features, embedding) for _ in range(8)]
        super().__init__([neck.width for neck in necks])
        self.num_features = sum(self.widths)
        self.branches = nn.ModuleList(copy.deepcopy(tail(backbone)) for _ in self.STRIPES[1:])
        self.poolings = nn.ModuleList(pooling_of(pooling) for _ in necks)
        self.necks = nn.ModuleList(necks)

    def pool(self, backbone, images, rng=None):
        hidden = backbone.model.embedder(images.to(backbone.model.embedder.embedder.convolution.weight.dtype))
        *stages, parting, _ = backbone.model.encoder.stages
        for stage in (*stages, parting.layers[0]):
            hidden = backbone.run(stage, hidden)
        maps = [backbone.run(branch, hidden) for branch in (tail(backbone), *self.branches)]
        parts = [
            part for whole, count in zip(maps[1:], self.STRIPES[1:], strict=True) for part in whole.chunk(count, 2)
        ]
        return torch.stack([pool(part) for pool, part in zip(self.poolings, maps + parts, strict=True)], dim=1)

    def forward(self, pooled):
        features = [neck(part) for neck, part in zip(self.necks, pooled.unbind(1), strict=True)]
        return HeadOutput(features, self.scores(features), torch.cat(features, dim=1))


class JigsawHead(Head):
    """TransReID's jigsaw branch: the patch tokens are shifted, shuffled and cut into groups; each passes, with the
    class token, through a last block of the branch's own. Feature: class token and a quarter of each group's."""

    SHIFT, SHUFFLED_GROUPS, PARTS = 5, 2, 4

    def __init__(self, backbone):
        width = backbone.num_features
        super().__init__([width] * (1 + self.PARTS))
        self.num_features = width * (1 + self.PARTS)
        self.block = Block(backbone.config)
        self.norm = nn.LayerNorm(width, eps=backbone.config.layer_norm_eps)

    def pool(self, backbone, images, rng=None):
        tokens = backbone.tokens(images, num_layers=-1)
        whole = backbone.model.layernorm(backbone.model.layers[-1](tokens))[:, 0]
        first, patches = tokens[:, :1], self.shuffled(tokens[:, 1:])
        length = (tokens.shape[1] - 1) // self.PARTS
        groups = [patches[:, part * length : (part + 1) * length] for part in range(self.PARTS)]
        parts = [self.norm(self.block(torch.cat([first, group], dim=1)))[:, 0] for group in groups]
        return torch.stack([whole, *parts], dim=1)

    def shuffled(self, patches):
        """Rolled by one less than the shift, then dealt out to groups in turn: (B, P, C) -> (B, P or P + 1, C)."""
        rolled = patches.roll(1 - self.SHIFT, dims=1)
        if rolled.shape[1] % self.SHUFFLED_GROUPS:
            # TransReID repeats the token before the last.
            rolled = torch.cat([rolled, rolled[:, -2:-1]], dim=1)
        return rolled.unflatten(1, (self.SHUFFLED_GROUPS, -1)).transpose(1, 2).flatten(1, 2)

    def forward(self, pooled):
        whole, *parts = pooled.unbind(1)
        features = torch.cat([whole, *(part / self.PARTS for part in parts)], dim=1)
        return HeadOutput([whole, *parts], self.scores([whole, *parts]), features)


HEADS = {"embedding": EmbeddingHead, "granular": GranularHead, "jigsaw": JigsawHead}


def build_imported_head(method, backbone, options):
    return HEADS[method](backbone, **options)
