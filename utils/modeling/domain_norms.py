"""BatchNorm with separate averages and weights for each domain of a batch."""

import copy

import torch
from torch import nn

TARGET = 1


class DomainNorm(nn.Module):
    """Copies of a BatchNorm, one per domain; in eval mode the target's is used."""

    def __init__(self, norm, num_domains):
        super().__init__()
        self.norms = nn.ModuleList(copy.deepcopy(norm) for _ in range(num_domains))

    @property
    def weight(self):
        return self.norms[TARGET].weight

    def forward(self, features):
        if not self.training:
            return self.norms[TARGET](features)
        parts = features.chunk(len(self.norms))
        if len(parts) != len(self.norms) or len(parts[0]) != len(parts[-1]):
            raise ValueError(f"a batch of {len(features)} has no {len(self.norms)} equal parts, one a domain")
        return torch.cat([norm(part) for norm, part in zip(self.norms, parts, strict=True)])


def split_norms(model, num_domains):
    """In place: every BatchNorm becomes a DomainNorm; `num_domains` is a number or a function of the module's name."""
    for name, owner, attribute, norm in list(places(model, nn.modules.batchnorm._BatchNorm)):
        count = num_domains(name) if callable(num_domains) else num_domains
        setattr(owner, attribute, DomainNorm(norm, count))


def join_norms(model):
    """In place: every DomainNorm becomes the target's BatchNorm."""
    for _, owner, attribute, norm in list(places(model, DomainNorm)):
        setattr(owner, attribute, norm.norms[TARGET])


def places(model, kind):
    """(name, owner, attribute, module) of all modules of a kind that are not inside a DomainNorm."""
    for name, owner in model.named_modules():
        if isinstance(owner, DomainNorm):
            continue
        for attribute, module in owner.named_children():
            if isinstance(module, kind):
                yield f"{name}.{attribute}".lstrip("."), owner, attribute, module
