"""The heads of the methods AGW, SBS, MGN and BDB, and the blocks that they add to a backbone.

A head works in two parts, so that several processes can gather the whole batch in between:

    pooled = head.pool(backbone, images)      # (B, groups, C): each process on its own images
    output = head(pooled)                     # batch statistics, features, logits: on the whole batch

`output.compared` are the features for a triplet loss, `output.logits` the logits of the classifiers (in training), and
`output.features` (B, num_features) the features for retrieval, before normalisation to unit length.
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.resnet.modeling_resnet import ResNetBottleNeckLayer

from utils.modeling.backbones import ResNetBackbone
from utils.modeling.reid_model import BNNeck, HeadOutput

EPSILON = 1e-6
METHODS = ("bot", "agw", "sbs", "mgn", "bdb")


# Parts


class GeM(nn.Module):
    """Generalised mean over the places of a map, with a learned power: (B, C, h, w) -> (B, C) float32.

    `(mean x^p)^(1/p)` is defined for positive maps such as a ResNet's. For a `signed` map, such as an attention
    network's, it is the generalised mean of the positive part minus that of the negative part.
    """

    def __init__(self, signed=False, power=3.0):
        super().__init__()
        self.signed = signed
        self.power = nn.Parameter(torch.tensor([power]))

    def forward(self, feature_map):
        values = feature_map.float()
        return self.mean(values) - self.mean(-values) if self.signed else self.mean(values)

    def mean(self, values):
        power = self.power.float()
        return values.clamp(min=EPSILON).pow(power).mean(dim=(2, 3)).pow(1 / power)


def add_gem(backbone):
    """Pool a backbone's map by a learned GeM instead of its mean."""
    if backbone.summary == "token":
        raise ValueError(
            f"GeM pools maps, and a {backbone.config.model_type} gives its class token: use mean, or a backbone such "
            "as a ResNet"
        )
    backbone.pooling = GeM(signed=not isinstance(backbone, ResNetBackbone))


class NonLocal(nn.Module):
    """Adds to every place of a map a mixture of all places: `x + BN(W (theta(x) phi(x)^T / places) g(x))`.

    BatchNorm starts at zero, so at first the map is unchanged. The inner width is half of the map's, as in the paper
    on non-local networks; the code released with AGW has a width of one.
    """

    def __init__(self, channels, inner=None):
        super().__init__()
        inner = inner or channels // 2
        self.theta, self.phi, self.g = (nn.Conv2d(channels, inner, 1) for _ in range(3))
        self.out = nn.Conv2d(inner, channels, 1)
        self.norm = nn.BatchNorm2d(channels)
        nn.init.zeros_(self.norm.weight)

    def forward(self, feature_map):
        # [B, inner, places]
        theta, phi, g = (part(feature_map).flatten(2) for part in (self.theta, self.phi, self.g))
        likeness = theta.transpose(1, 2) @ phi / phi.shape[2]
        mixed = (likeness @ g.transpose(1, 2)).transpose(1, 2).unflatten(2, feature_map.shape[2:])
        return feature_map + self.norm(self.out(mixed))


def add_non_local(backbone):
    """Add NonLocal after the last two blocks of a ResNet's third-last stage and the last three of its second-last one.

    Attention networks compare all places anyway and are not changed, nor is a ResNet that came with such blocks.
    """
    has_some = any(isinstance(module, NonLocal) for module in backbone.modules())
    if isinstance(backbone, ResNetBackbone) and not has_some:
        stages = backbone.model.encoder.stages
        widths = backbone.config.hidden_sizes
        for place, blocks in ((-3, 2), (-2, 3)):
            if len(stages) >= -place:
                layers = stages[place].layers
                for number in range(max(0, len(layers) - blocks), len(layers)):
                    layers[number] = nn.Sequential(layers[number], NonLocal(widths[place]))


class Reduction(nn.Sequential):
    """Linear, BatchNorm, ReLU; never wider than its input."""

    def __init__(self, channels, width, bias=False):
        self.width = min(width, channels)
        super().__init__(nn.Linear(channels, self.width, bias=bias), nn.BatchNorm1d(self.width), nn.ReLU())
        nn.init.kaiming_normal_(self[0].weight, mode="fan_in")
        nn.init.normal_(self[1].weight, 1.0, 0.02)

    def forward(self, features):
        return super().forward(features.to(self[0].weight.dtype))


def classifier(width, num_ids, bias=False):
    layer = nn.Linear(width, num_ids, bias=bias)
    nn.init.normal_(layer.weight, std=0.001)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def check_rows(method, backbone, rows):
    """ValueError if the backbone's map has too few rows to be divided into parts."""
    was_training = backbone.training
    weight = next(backbone.parameters())
    with torch.no_grad():
        image = torch.zeros(1, 3, *backbone.image_size, device=weight.device, dtype=weight.dtype)
        num_rows = backbone.eval().feature_map(image).shape[2]
    backbone.train(was_training)
    if num_rows < rows:
        raise ValueError(
            f"method {method} needs a map of {rows} rows or more, and images of "
            f"{' x '.join(map(str, backbone.image_size))} give this backbone's {num_rows}: use larger images"
        )


# Heads


class Head(nn.Module):
    """The base of all heads: classifiers for a number of identities that may change."""

    def __init__(self, widths, bias=False):
        super().__init__()
        self.widths, self.bias = widths, bias
        self.classifiers = None

    def reset_classifiers(self, num_ids):
        self.classifiers = None
        if num_ids:
            classifiers = nn.ModuleList(classifier(width, num_ids, self.bias) for width in self.widths)
            self.classifiers = classifiers.to(next(self.parameters()).device)

    def scores(self, features):
        if self.classifiers is None or not self.training:
            return []
        return [layer(part) for layer, part in zip(self.classifiers, features, strict=True)]


class GemHead(Head):
    """AGW and SBS: non-local blocks in a ResNet, GeM pooling, BNNeck and one classifier.

    A class token (CLIP, ViT), a learned pooling, replaces GeM. With `cosine` (SBS) the logits are cosines, as its
    circle loss needs. The triplet loss of AGW compares features before BNNeck, that of SBS those after it.
    """

    def __init__(self, backbone, *, cosine):
        channels = backbone.num_features
        super().__init__([channels])
        add_non_local(backbone)
        self.cosine, self.num_features = cosine, channels
        signed = not isinstance(backbone, ResNetBackbone)
        self.pooling = None if backbone.summary == "token" else GeM(signed)
        self.bnneck = BNNeck(channels)

    def pool(self, backbone, images, rng=None):
        pooled = backbone(images) if self.pooling is None else self.pooling(backbone.feature_map(images))
        return pooled[:, None]

    def forward(self, pooled):
        features = pooled[:, 0]
        bn_features = self.bnneck(features)
        return HeadOutput([bn_features if self.cosine else features], self.scores([bn_features]), bn_features)

    def scores(self, features):
        if self.cosine and self.training and self.classifiers is not None:
            return [F.linear(F.normalize(features[0]), F.normalize(self.classifiers[0].weight.float()))]
        return super().scores(features)


class MgnHead(Head):
    """MGN: a global branch and two with 2 and 3 stripes, max pooling, a reduction to 256 of each of the 8 groups.

    The triplet loss compares the 3 reduced whole-body features. Classifiers use these features before the reduction,
    and the 5 stripes after it. In a ResNet the branches separate after the first block of the second-last stage, and
    only the global branch has the last stage's stride of 2. In an attention network the branches share the one map of
    tokens, and a class token (CLIP, ViT) is the global branch.
    """

    STRIPES = (1, 2, 3)

    def __init__(self, backbone):
        channels = backbone.num_features
        reductions = [Reduction(channels, 256) for _ in range(8)]
        width = reductions[0].width
        super().__init__([channels] * 3 + [width] * 5)
        check_rows("mgn", backbone, max(self.STRIPES))
        self.reductions = nn.ModuleList(reductions)
        self.num_features = 8 * width
        self.branches = None
        if isinstance(backbone, ResNetBackbone):
            if len(backbone.model.encoder.stages) < 2:
                raise ValueError("method mgn parts in the last stage but one, and this ResNet has one stage only")
            self.branches = nn.ModuleList(copy.deepcopy(tail(backbone)) for _ in self.STRIPES[1:])
            restore_stride(backbone)

    def pool(self, backbone, images, rng=None):
        token = None
        if backbone.summary == "token":
            token, feature_map = backbone.summary_and_map(images)
            maps = [feature_map] * len(self.STRIPES)
        else:
            maps = self.maps(backbone, images)
        whole = [feature_map.amax(dim=(2, 3)) for feature_map in maps]
        whole[0] = whole[0] if token is None else token
        parts = [
            part
            for feature_map, stripes in zip(maps[1:], self.STRIPES[1:], strict=True)
            for part in stripe_maxima(feature_map, stripes)
        ]
        return torch.stack(whole + parts, dim=1)

    def maps(self, backbone, images):
        if self.branches is None:
            return [backbone.feature_map(images)] * len(self.STRIPES)
        hidden = backbone.model.embedder(images.to(backbone.model.embedder.embedder.convolution.weight.dtype))
        *stages, parting, _ = backbone.model.encoder.stages
        for stage in (*stages, parting.layers[0]):
            hidden = backbone.run(stage, hidden)
        return [backbone.run(branch, hidden) for branch in (tail(backbone), *self.branches)]

    def forward(self, pooled):
        reduced = [reduce(part) for reduce, part in zip(self.reductions, pooled.unbind(1), strict=True)]
        whole = [part.to(reduced[0].dtype) for part in pooled[:, :3].unbind(1)]
        return HeadOutput(reduced[:3], self.scores(whole + reduced[3:]), torch.cat(reduced, dim=1))


def stripe_maxima(feature_map, count):
    """The maximum of each channel in `count` stripes, which share a row where they do not divide the rows."""
    if not torch.compiler.is_exporting():
        return F.adaptive_max_pool2d(feature_map, (count, 1)).flatten(2).unbind(2)
    # ONNX has no such pooling. In training `amax` would share the gradient of equal maxima.
    rows = feature_map.shape[2]
    places = [(rows * number // count, -(-rows * (number + 1) // count)) for number in range(count)]
    return [feature_map[:, :, start:end].amax(dim=(2, 3)) for start, end in places]


def tail(backbone):
    """A ResNet from the second block of its second-last stage on; the modules themselves, not copies."""
    *_, parting, last = backbone.model.encoder.stages
    return nn.Sequential(*parting.layers[1:], last)


def restore_stride(backbone):
    """Give a ResNet's last stage its stride of 2 again, which a Re-ID backbone removes."""
    first, config = backbone.model.encoder.stages[-1].layers[0], backbone.config
    inside = 1 if config.layer_type == "bottleneck" and not config.downsample_in_bottleneck else 0
    first.layer[inside].convolution.stride = first.shortcut.convolution.stride = (2, 2)


class BdbHead(Head):
    """BDB: a global branch (mean, 512) and one with a rectangle set to 0, the same for all images (maximum, 1024).

    With a class token (CLIP, ViT), the global branch uses it instead of the mean.
    """

    HEIGHT_RATIO, WIDTH_RATIO = 0.33, 1.0

    def __init__(self, backbone):
        channels = backbone.num_features
        whole, part = Reduction(channels, 512, bias=True), Reduction(channels, 1024, bias=True)
        super().__init__([whole.width, part.width], bias=True)
        if channels % 4:
            raise ValueError(f"method bdb needs a backbone whose width is a multiple of 4, got {channels}")
        check_rows("bdb", backbone, 3)
        self.bottleneck = ResNetBottleNeckLayer(channels, channels)
        self.reductions = nn.ModuleList([whole, part])
        self.num_features = whole.width + part.width

    def pool(self, backbone, images, rng=None):
        """`rng`, equal on all processes, draws the rectangle; without it, or in eval mode, nothing is set to 0."""
        whole, feature_map = backbone.summary_and_map(images)
        part = self.bottleneck(feature_map)
        if self.training and rng is not None:
            part = part * self.kept(part.shape[2:], rng).to(part)
        return torch.stack([whole, part.amax(dim=(2, 3))], dim=1)

    def kept(self, size, rng):
        """A mask (h, w): 0 in the rectangle, 1 elsewhere."""
        height, width = size
        tall, wide = max(1, round(self.HEIGHT_RATIO * height)), round(self.WIDTH_RATIO * width)
        top, left = rng.randint(0, height - tall), rng.randint(0, width - wide)
        mask = torch.ones(height, width)
        mask[top : top + tall, left : left + wide] = 0
        return mask

    def forward(self, pooled):
        reduced = [reduce(part) for reduce, part in zip(self.reductions, pooled.unbind(1), strict=True)]
        return HeadOutput(reduced, self.scores(reduced), torch.cat(reduced, dim=1))


def build_head(method, backbone):
    """The head of a method; None for BoT, whose BNNeck and classifier are in the model. May change the backbone."""
    if method == "bot":
        return None
    if method in ("agw", "sbs"):
        return GemHead(backbone, cosine=method == "sbs")
    if method in ("mgn", "bdb"):
        return {"mgn": MgnHead, "bdb": BdbHead}[method](backbone)
    raise ValueError(f"method {method!r} is unknown; known are {', '.join(METHODS)}")
