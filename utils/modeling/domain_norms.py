"""BatchNorm of parts of a batch: with averages and weights for each domain, or with statistics of each group."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

SOURCE, TARGET = 0, 1


class DomainNorm(nn.Module):
    """Copies of a BatchNorm, one per domain; in eval mode the target's is used.

    While `alone` is the number of a domain, all images in training are of that domain.
    """

    def __init__(self, norm, num_domains):
        super().__init__()
        self.norms = nn.ModuleList(copy.deepcopy(norm) for _ in range(num_domains))
        self.alone = None

    @property
    def weight(self):
        return self.norms[TARGET].weight

    def forward(self, features):
        if not self.training:
            return self.norms[TARGET](features)
        if self.alone is not None:
            return self.norms[self.alone](features)
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


def train_alone(model, domain):
    """In training, all images are of one domain; with None a batch has all domains again."""
    for module in model.modules():
        if isinstance(module, DomainNorm):
            module.alone = domain


@torch.no_grad()
def copy_source_norms(model):
    """The target's norms become equal to the source's."""
    for module in model.modules():
        if isinstance(module, DomainNorm):
            module.norms[TARGET].load_state_dict(module.norms[SOURCE].state_dict())


def places(model, kind):
    """(name, owner, attribute, module) of all modules of a kind that are not inside a DomainNorm."""
    for name, owner in model.named_modules():
        if isinstance(owner, DomainNorm):
            continue
        for attribute, module in owner.named_children():
            if isinstance(module, kind):
                yield f"{name}.{attribute}".lstrip("."), owner, attribute, module


class GroupedStatistics:
    """Mixed into a BatchNorm class: in training, each group of `group_size` images is normalised by itself.

    The running averages move by the mean of the groups' statistics, over all processes.
    """

    def forward(self, images):
        if not self.training:
            return super().forward(images)
        if len(images) % self.group_size:
            raise ValueError(f"{len(images)} images cannot be normalised in groups of {self.group_size}")
        images = images.to(self.weight.dtype) if images.ndim == 2 else images
        outputs, averages = [], []
        for group in images.split(self.group_size):
            mean, variance = self.running_mean.clone(), self.running_var.clone()
            outputs.append(F.batch_norm(group, mean, variance, self.weight, self.bias, True, self.momentum, self.eps))
            averages.append(torch.stack([mean, variance]))
        # 0 while activations are computed a second time.
        if self.momentum:
            self.num_batches_tracked += 1
            moved = torch.stack(averages).mean(0)
            if torch.distributed.is_initialized():
                torch.distributed.all_reduce(moved)
                moved /= torch.distributed.get_world_size()
            self.running_mean.copy_(moved[0])
            self.running_var.copy_(moved[1])
        return torch.cat(outputs)


def group_batch_statistics(model, size):
    """Make every BatchNorm normalise groups of `size` images, as several GPUs with so many images each do."""
    for module in list(model.modules()):
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.group_size = size
            module.__class__ = type(f"Grouped{type(module).__name__}", (GroupedStatistics, type(module)), {})
