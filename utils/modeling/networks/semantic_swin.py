"""SOLIDER's controlled Swin: a weight in [0, 1] says how much of meaning its features have, and how much of looks.

Between two stages, after the reduction, with s = (weight, 1 - weight),

    x <- x softplus(A s + a) + (B s + b)

With a fixed weight this is part of a plain Swin: the scale goes into the reduction W, the shift into the bias of the
norm before it. W goes from 4 n to 2 n channels, so that some change of the bias gives every shift: W change = shift.
A saved folder is a plain Swin of one weight; `semantic_controller.safetensors` beside it has what others need.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from utils.modeling.backbones import SwinBackbone, halved

FILE = "semantic_controller.safetensors"


class Controller(nn.Module):
    """Scale and shift of each image between two stages."""

    def __init__(self, widths):
        super().__init__()
        self.scales, self.shifts = (nn.ModuleList(nn.Linear(2, width) for width in widths) for _ in range(2))
        for layer in (*self.scales, *self.shifts):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def of(self, stage, weights):
        """(B,) -> scale and shift after a stage, (B, width) each."""
        pairs = torch.stack([weights, 1 - weights], dim=1).to(self.scales[stage].weight.dtype)
        return F.softplus(self.scales[stage](pairs)), self.shifts[stage](pairs)

    def forward(self, stage, tokens, weights):
        scale, shift = self.of(stage, weights)
        return tokens * scale[:, None] + shift[:, None]


class SemanticSwinBackbone(SwinBackbone):
    """A Swin with a controller. Images without weights of their own have `weight`, that of a saved folder."""

    def __init__(self, model, image_size, weight, controller=None):
        super().__init__(model, image_size)
        check_weight(weight)
        self.weight = weight
        self.controller = controller or Controller([layer.out_features for layer in reductions(model)])

    @classmethod
    def on(cls, backbone, folder, weight):
        """On a Swin's weights: with the controller of a folder that has one, else with a new controller."""
        if type(backbone) is not SwinBackbone:
            raise ValueError(f"SOLIDER controls a Swin; this is a {backbone.config.model_type}")
        if not has_controller(folder):
            return cls(backbone.model, backbone.image_size, weight)
        controller, state = read_controller(backbone.model, folder)
        backbone.model.load_state_dict(state, strict=False)
        return cls(backbone.model, backbone.image_size, weight, controller)

    def forward(self, images, weights=None):
        return self.summary_and_map(images, weights)[0]

    def summary_and_map(self, images, weights=None):
        feature_map = self.feature_map(images, weights)
        return feature_map.mean(dim=(2, 3)), feature_map

    def feature_map(self, images, weights=None):
        if weights is None:
            weights = torch.full((images.shape[0],), self.weight, device=images.device)
        projection = self.model.embeddings.patch_embeddings.projection
        hidden, grid = self.model.embeddings(images.to(projection.weight.dtype))
        for number, stage in enumerate(self.model.encoder.layers):
            hidden = stage(hidden, grid, always_partition=True)[0]
            if stage.downsample is not None:
                hidden, grid = self.controller(number, hidden, weights), halved(grid)
        return self.model.layernorm(hidden).transpose(1, 2).unflatten(2, grid)

    def save_pretrained(self, folder):
        """Write a plain Swin of the fixed weight, and the controller with the reductions as they are without it."""
        plain = {name: tensor.detach() for name, tensor in self.model.state_dict().items()}
        self.model.save_pretrained(folder, state_dict=plain | folded(plain, self.controller, self.weight))
        kept = {f"controller.{name}": tensor for name, tensor in self.controller.state_dict().items()}
        kept |= {name: plain[name] for name in controlled(plain)}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in kept.items()}
        save_file(tensors, Path(folder) / FILE, metadata={"weight": repr(self.weight)})


def reductions(model):
    return [stage.downsample.reduction for stage in model.encoder.layers if stage.downsample is not None]


def controlled(state):
    """Names of what a fixed weight changes, stage by stage: reduction, bias of the norm before it."""
    count = sum(name.endswith(".downsample.reduction.weight") for name in state)
    return [
        f"encoder.layers.{stage}.downsample.{name}"
        for stage in range(count)
        for name in ("reduction.weight", "norm.bias")
    ]


@torch.no_grad()
def folded(state, controller, weight):
    """{name: tensor}: the reductions and the biases before them with a fixed weight; computed in float64."""
    check_weight(weight)
    names, result = controlled(state), {}
    for stage, (of_reduction, of_bias) in enumerate(zip(names[::2], names[1::2], strict=True)):
        scale, shift = (
            one[0].double() for one in controller.of(stage, torch.tensor([weight], device=device_of(state)))
        )
        reduction = scale[:, None] * state[of_reduction].double()
        # Of all biases that give this shift, the one nearest to the old one.
        change = torch.linalg.lstsq(reduction.cpu(), shift.cpu()[:, None], driver="gelsd").solution.to(shift.device)
        missed = (reduction @ change - shift[:, None]).abs().max()
        if missed > 1e-6 * shift.abs().max().clamp(min=1.0):
            raise ValueError(
                f"the reduction after stage {stage} has not its full rank: no bias gives the shift, by {missed:.1e}"
            )
        result[of_reduction] = reduction.to(state[of_reduction].dtype)
        result[of_bias] = (state[of_bias].double() + change[:, 0]).to(state[of_bias].dtype)
    return result


def device_of(state):
    return next(iter(state.values())).device


def check_weight(weight):
    if not 0 <= weight <= 1:
        raise ValueError(f"the semantic weight must be within 0 and 1, got {weight}")


def has_controller(folder):
    return (Path(folder) / FILE).is_file()


def read_controller(model, folder):
    """(controller, reductions and biases without it) of a folder for a model; ValueError if they do not fit."""
    path = Path(folder) / FILE
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read {str(path)!r}: {error}; save or copy the backbone again") from error
    state = model.state_dict()
    controller = Controller([layer.out_features for layer in reductions(model)])
    wanted = {f"controller.{name}": tensor for name, tensor in controller.state_dict().items()}
    wanted |= {name: state[name] for name in controlled(state)}
    if {name: tensor.shape for name, tensor in wanted.items()} != {n: tensor.shape for n, tensor in tensors.items()}:
        raise ValueError(f"{str(path)!r} is not the controller of the Swin beside it; save or copy the backbone again")
    controller.load_state_dict({name: tensors[f"controller.{name}"] for name in controller.state_dict()})
    return controller, {name: tensors[name] for name in controlled(state)}


def set_semantic_weight(backbone, folder, weight):
    """In place: a plain Swin that was opened from a folder with a controller has this weight from now on."""
    if type(backbone) is not SwinBackbone:
        raise ValueError(f"a semantic weight is of a Swin; this is a {backbone.config.model_type}")
    controller, state = read_controller(backbone.model, folder)
    backbone.model.load_state_dict(folded(state, controller, weight), strict=False)
