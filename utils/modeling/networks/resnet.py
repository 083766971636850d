"""ResNets of other projects: IBN-a norms, non-local blocks, another last stride, another beginning."""

import re

import torch
from torch import nn
from transformers import ResNetConfig, ResNetModel

from utils.modeling.backbones import ResNetBackbone
from utils.modeling.heads import NonLocal
from utils.modeling.norms import has_batch_instance_norms


class ResNetVariantConfig(ResNetConfig):
    """`ibn`: IBN-a norms; `non_local`: for each stage, the inner widths of the blocks after its last layers;
    `ceil_pooling`: the first pooling starts at the first pixel and is padded at the end only; `stem_relu`: whether
    there is a ReLU before that pooling."""

    model_type = "resnet_variant"

    last_stride: int = 1
    ibn: bool = False
    ceil_pooling: bool = False
    stem_relu: bool = True
    non_local: list | None = None


class IbnNorm(nn.Module):
    """IBN-a: instance norm on the first half of the channels, batch norm on the rest."""

    def __init__(self, channels):
        super().__init__()
        self.half = channels // 2
        self.instance = nn.InstanceNorm2d(self.half, affine=True)
        self.batch = nn.BatchNorm2d(channels - self.half)

    def forward(self, maps):
        first, rest = maps[:, : self.half], maps[:, self.half :]
        return torch.cat([self.instance(first), self.batch(rest)], dim=1)


class ResNetVariant(ResNetModel):
    config_class = ResNetVariantConfig

    def __init__(self, config):
        super().__init__(config)
        if config.ceil_pooling:
            self.embedder.pooler = nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True)
        if not config.stem_relu:
            self.embedder.embedder.activation = nn.Identity()
        stages = self.encoder.stages
        if config.ibn:
            for stage in stages[:-1]:
                for block in stage.layers:
                    block.layer[0].normalization = IbnNorm(block.layer[0].convolution.out_channels)
        for stage, width, inner in zip(stages, config.hidden_sizes, config.non_local or [], strict=False):
            first = len(stage.layers) - len(inner)
            for number, inner_width in enumerate(inner, start=first):
                stage.layers[number] = nn.Sequential(stage.layers[number], NonLocal(width, inner_width))


class ResNetVariantBackbone(ResNetBackbone):
    """A ResNetBackbone that keeps the last stride of its configuration."""

    def __init__(self, model, image_size):
        super().__init__(model, image_size)
        if model.config.last_stride != 1:
            first, config = model.encoder.stages[-1].layers[0], model.config
            inside = 1 if config.layer_type == "bottleneck" and not config.downsample_in_bottleneck else 0
            for convolution in (first.layer[inside].convolution, first.shortcut.convolution):
                convolution.stride = (config.last_stride, config.last_stride)


def as_sbs(backbone):
    """The ResNet of SBS with a ResNet's weights: non-local blocks of width one, no ReLU after the first norm.

    The blocks stand after the last two layers of the last stage but two and the last three of the last but one. They
    change nothing at first.
    """
    config = backbone.config
    if not isinstance(backbone, ResNetBackbone):
        raise ValueError(
            f"--network sbs changes a ResNet, and the backbone is a {config.model_type}: give a ResNet, or "
            "--network plain"
        )
    if getattr(config, "non_local", None):
        return backbone
    if has_batch_instance_norms(backbone):
        raise ValueError("--network sbs adds blocks to a plain ResNet; this one has MetaBIN's norms, choose another")
    counts = [0, 0, *(0 for _ in config.depths)]
    counts[-3], counts[-2] = 2, 3
    counts = [min(*pair) for pair in zip(counts[2:], config.depths, strict=True)]
    entries = {key: value for key, value in config.to_dict().items() if key not in ("model_type", "architectures")}
    blocks = [[1] * count for count in counts]
    model = ResNetVariant(ResNetVariantConfig(**entries | {"non_local": blocks, "stem_relu": False}))
    changed = ResNetVariantBackbone(model, backbone.image_size)
    weights = {name_in_sbs(name, config.depths, counts): value for name, value in backbone.model.state_dict().items()}
    added = {name: value for name, value in model.state_dict().items() if name not in weights}
    model.load_state_dict(weights | added)
    changed.pooling, changed.preprocessing = backbone.pooling, backbone.preprocessing
    return changed.train(backbone.training)


def name_in_sbs(name, depths, counts):
    """A layer with a block after it is the first part of a pair."""
    match = re.match(r"encoder\.stages\.(\d+)\.layers\.(\d+)\.(.*)", name)
    if match is None:
        return name
    stage, layer = int(match[1]), int(match[2])
    inside = "0." if layer >= depths[stage] - counts[stage] else ""
    return f"encoder.stages.{stage}.layers.{layer}.{inside}{match[3]}"
