"""IDM's third domain between source and target: maps of both, mixed with ratios that are learned for each pair."""

import torch
from torch import nn

from utils.modeling.backbones import ClipBackbone, ResNetBackbone


class Mixer(nn.Module):
    """After a stage of the backbone, mixes each source map with the target map at its place, as a third domain.

    The two shares come from the means and maxima of both maps; `ratios` (B, 2) are those of the last batch. Both
    bridges favour a pure domain: in short trainings all ratios may go to one side before their spread counts, which
    `loss_diversity`, minus the sum of their two deviations, then shows as 0.
    """

    def __init__(self, backbone, stage):
        super().__init__()
        self.stage, self.ratios = stage, None
        width = self.trace(backbone)[0]
        self.each = nn.Linear(2 * width, width)
        self.both = nn.Sequential(nn.Linear(width, width // 2), nn.Linear(width // 2, 2))

    def place(self, backbone):
        """The module whose output is mixed: what comes before the blocks, or a stage of them."""
        model = backbone.model
        if isinstance(backbone, ClipBackbone):
            stages = [backbone.tower.pre_layrnorm, *backbone.tower.encoder.layers]
        elif isinstance(backbone, ResNetBackbone):
            stages = [model.embedder, *model.encoder.stages]
        else:
            stages = [model.embeddings, *model.encoder.layers]
        if self.stage >= len(stages):
            raise ValueError(f"--mix_stage {self.stage} is past the last stage of the backbone, {len(stages) - 1}")
        return stages[self.stage]

    @torch.no_grad()
    def trace(self, backbone):
        """The width of the maps, and the names of the norms before them, in one pass of an empty image."""
        seen, width = [], []
        hooks = [
            module.register_forward_hook(lambda *call, name=name: None if width else seen.append(name))
            for name, module in backbone.named_modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
        ]
        hooks.append(self.place(backbone).register_forward_hook(lambda *call: width.append(width_of(call[2]))))
        was_training = backbone.training
        backbone.eval()(torch.zeros(1, 3, *backbone.image_size))
        backbone.train(was_training)
        for hook in hooks:
            hook.remove()
        return width[0], [f"backbone.{name}" for name in seen]

    def norms_before(self, backbone):
        return self.trace(backbone)[1]

    def attach(self, backbone):
        self.place(backbone).register_forward_hook(
            lambda module, inputs, output: self(output) if backbone.training else output
        )

    def forward(self, output):
        """A tensor, or a tuple whose first entry it is: [source, target] -> [source, target, mixed]."""
        if isinstance(output, tuple):
            return (self(output[0]), *output[1:])
        source, target = output.chunk(2)
        self.ratios = self.both(self.each(summary(source)) + self.each(summary(target))).softmax(1)
        shares = self.ratios.to(output.dtype).view(-1, 2, *[1] * (output.ndim - 1))
        return torch.cat([output, shares[:, 0] * source + shares[:, 1] * target])


def width_of(output):
    output = output[0] if isinstance(output, tuple) else output
    return output.shape[1 if output.ndim == 4 else 2]


def summary(maps):
    """Means and maxima over the places of maps (B, C, h, w) or tokens (B, T, C), without gradient: (B, 2 C)."""
    places = (2, 3) if maps.ndim == 4 else (1,)
    maps = maps.detach()
    return torch.cat([maps.mean(places), maps.amax(places)], dim=1)
