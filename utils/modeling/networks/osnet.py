"""OSNet: each block sees the map at four scales and mixes them with one gate; pooled by the mean."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from utils.modeling.backbones import Backbone

SCALES = 4
GATE_REDUCTION = 16


class OSNetConfig(PreTrainedConfig):
    """`channels`: the width of the stem and of each stage.

    `instance_norm`: in the stem, and at the end of each block of stage 1 (OSNet-IBN). With `inner_norms`: in the stem
    alone, and inside those blocks of each stage of which it says True (OSNet-AIN).
    """

    model_type = "osnet"

    channels: list[int] | tuple[int, ...] = (64, 256, 384, 512)
    depths: list[int] | tuple[int, ...] = (2, 2, 2)
    instance_norm: bool = False
    inner_norms: list[list[bool]] | None = None


class ConvNorm(nn.Module):
    """Convolution, norm and, with `activation`, ReLU."""

    def __init__(self, inputs, outputs, size=1, stride=1, *, activation=True, instance_norm=False):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)
        self.norm = nn.InstanceNorm2d(outputs, affine=True) if instance_norm else nn.BatchNorm2d(outputs)
        self.activation = activation

    def forward(self, maps):
        maps = self.norm(self.conv(maps))
        return F.relu(maps) if self.activation else maps


class LightConv(nn.Module):
    """1 x 1 across channels, then 3 x 3 within each channel."""

    def __init__(self, channels):
        super().__init__()
        self.across = nn.Conv2d(channels, channels, 1, bias=False)
        self.within = nn.Conv2d(channels, channels, 3, padding=1, bias=False, groups=channels)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, maps):
        return F.relu(self.norm(self.within(self.across(maps))))


class Gate(nn.Module):
    """Weights each channel by a function of the map's mean."""

    def __init__(self, channels):
        super().__init__()
        self.down = nn.Conv2d(channels, channels // GATE_REDUCTION, 1)
        self.up = nn.Conv2d(channels // GATE_REDUCTION, channels, 1)

    def forward(self, maps):
        return maps * torch.sigmoid(self.up(F.relu(self.down(maps.mean(dim=(2, 3), keepdim=True)))))


class OmniScaleBlock(nn.Module):
    def __init__(self, inputs, outputs, *, norm_inside=False, norm_after=False):
        super().__init__()
        inner = outputs // 4
        self.reduce = ConvNorm(inputs, inner)
        self.streams = nn.ModuleList(
            nn.Sequential(*(LightConv(inner) for _ in range(scale))) for scale in range(1, SCALES + 1)
        )
        self.gate = Gate(inner)
        self.expand = ConvNorm(inner, outputs, activation=False, instance_norm=norm_inside)
        self.shortcut = ConvNorm(inputs, outputs, activation=False) if inputs != outputs else nn.Identity()
        self.norm = nn.InstanceNorm2d(outputs, affine=True) if norm_after else nn.Identity()

    def forward(self, maps):
        reduced = self.reduce(maps)
        mixed = sum(self.gate(stream(reduced)) for stream in self.streams)
        return F.relu(self.norm(self.expand(mixed) + self.shortcut(maps)))


class OSNet(PreTrainedModel):
    config_class = OSNetConfig
    base_model_prefix = "osnet"
    main_input_name = "pixel_values"

    def __init__(self, config):
        super().__init__(config)
        stem, *widths = config.channels
        self.stem = ConvNorm(3, stem, 7, 2, instance_norm=config.instance_norm)
        self.pooler = nn.MaxPool2d(3, stride=2, padding=1)
        self.stages = nn.ModuleList()
        for number, (width, depth) in enumerate(zip(widths, config.depths, strict=True)):
            inside = config.inner_norms[number] if config.inner_norms else [False] * depth
            after = config.instance_norm and not config.inner_norms and number == 0
            inputs = [config.channels[number]] + [width] * (depth - 1)
            blocks = [
                OmniScaleBlock(channels, width, norm_inside=norm, norm_after=after)
                for channels, norm in zip(inputs, inside, strict=True)
            ]
            if number < len(widths) - 1:
                blocks += [ConvNorm(width, width), nn.AvgPool2d(2, stride=2)]
            self.stages.append(nn.Sequential(*blocks))
        self.last = ConvNorm(widths[-1], widths[-1])
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, pixel_values):
        maps = self.pooler(self.stem(pixel_values))
        for stage in self.stages:
            maps = stage(maps)
        return self.last(maps)


class OSNetBackbone(Backbone):
    def __init__(self, model, image_size):
        super().__init__(model, image_size, model.config.channels[-1])

    def feature_map(self, images):
        return self.model(images.to(self.model.stem.conv.weight.dtype))

    def enable_gradient_checkpointing(self):
        raise ValueError("OSNet is small and has no gradient checkpointing; leave out --gradient_checkpointing")

    def set_attention(self, implementation):
        """Nothing to do: a convolutional network has no attention."""
