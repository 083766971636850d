"""What a reader of a layout gives, and what the readers share."""

import math
from typing import NamedTuple

import torch

from utils.modeling.backbones import HALVES, IMAGENET

IMAGENET_BILINEAR = {**IMAGENET, "resample": "bilinear"}
IMAGENET_BICUBIC = {**IMAGENET, "resample": "bicubic"}
HALVES_BILINEAR = {**HALVES, "resample": "bilinear"}


class Imported(NamedTuple):
    """A model in our terms: its parts, the tensors under the names of our modules, and notes for people.

    `network` is the state of the backbone's `model`, `head` that of the Re-ID model without its backbone.
    """

    config: object
    image_size: tuple
    preprocessing: dict
    network: dict
    method: str = "bot"
    head_options: dict | None = None
    head: dict | None = None
    notes: tuple = ()


class Tensors(dict):
    """The tensors of a file, from which a reader takes what it knows; what is left at the end is refused."""

    def __init__(self, tensors, path, layout):
        super().__init__(tensors)
        self.path, self.layout = path, layout

    def refuse(self, reason):
        raise ValueError(f"{str(self.path)!r} looks like {self.layout}, but {reason}")

    def take(self, name):
        if name not in self:
            self.refuse(f"{name} is missing: a part of the file is lost, or it is of another version")
        return self.pop(name)

    def shape_of(self, name):
        """The shape of a tensor, which stays."""
        if name not in self:
            self.take(name)
        return tuple(self[name].shape)

    def take_norm(self, prefix, new):
        """A batch norm; files of old torch versions lack the count of batches."""
        names = ("weight", "bias", "running_mean", "running_var")
        taken = {f"{new}{name}": self.take(f"{prefix}{name}") for name in names}
        return taken | {f"{new}num_batches_tracked": self.pop(f"{prefix}num_batches_tracked", torch.tensor(0))}

    def drop(self, *prefixes):
        """Leave out the tensors whose names start so; returns how many there were."""
        names = [name for name in self if name.startswith(prefixes)]
        for name in names:
            del self[name]
        return len(names)

    def drop_classifier(self, *names):
        """Leave out classifiers; a note of the number of identities or classes."""
        counts = [len(self[name]) for name in names if name in self]
        for name in names:
            self.drop(name, name.replace(".weight", ".bias"))
        return [f"its classifier of {counts[0]} identities or classes is left out"] if counts else []

    def refuse_parts(self, parts):
        """ValueError, with its name, if the file has a part that is not known here: {piece of a name: what it is}."""
        for piece, what in parts.items():
            if any(piece in name for name in self):
                self.refuse(f"it has {what}, which is not supported")

    def done(self):
        if self:
            names = ", ".join(sorted(self)[:5])
            self.refuse(f"{len(self)} tensors are not part of one, such as {names}")


def grid_size(positions, patch, stride, image_size, sizes):
    """(grid, image size) of a table of `positions` patches: `image_size`, or the first of `sizes` that fits."""

    def grid_of(size):
        return tuple((side - patch) // stride + 1 for side in size)

    for size in [image_size] if image_size else sizes:
        if math.prod(grid_of(size)) == positions:
            return grid_of(size), tuple(size)
    return None, None
