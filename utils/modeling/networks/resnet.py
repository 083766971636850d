"""ResNets of other projects: IBN-a norms, non-local blocks, another last stride or another first pooling."""

import torch
from torch import nn
from transformers import ResNetConfig, ResNetModel

from utils.modeling.backbones import ResNetBackbone
from utils.modeling.heads import NonLocal


class ResNetVariantConfig(ResNetConfig):
    """`ibn`: IBN-a norms; `non_local`: for each stage, the inner widths of the blocks after its last layers;
    `ceil_pooling`: the first pooling starts at the first pixel and is padded at the end only."""

    model_type = "resnet_variant"

    last_stride: int = 1
    ibn: bool = False
    ceil_pooling: bool = False
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
