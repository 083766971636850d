"""SOLIDER's Swin: the semantic weight scales and shifts the map between two stages; windows are always shifted."""

from torch import nn
from transformers import SwinConfig, SwinModel

from utils.modeling.backbones import SwinBackbone


class SoliderSwinConfig(SwinConfig):
    model_type = "solider_swin"


class SoliderSwin(SwinModel):
    """Swin whose reductions have a bias: with a fixed semantic weight, scale and shift are part of the reduction."""

    config_class = SoliderSwinConfig

    def __init__(self, config):
        super().__init__(config)
        for stage in self.encoder.layers[:-1]:
            old = stage.downsample.reduction
            stage.downsample.reduction = nn.Linear(old.in_features, old.out_features)


class SoliderSwinBackbone(SwinBackbone):
    drops_idle_shifts = False
