"""Batch normalisation that torch does not have: over all processes, mixed with instance norms, computed again."""

from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import nn


class GlobalBatchNorm(nn.BatchNorm2d):
    """What `torch.nn.SyncBatchNorm` does on a GPU, on any device: (B, C) or (B, C, H, W)."""

    def _check_input_dim(self, images):
        """Accept any shape."""

    def forward(self, images):
        if not self.training:
            return super().forward(images)
        others = tuple(dim for dim in range(images.ndim) if dim != 1)
        shape = [-1 if dim == 1 else 1 for dim in range(images.ndim)]
        # Imported here, because torch warns on machines without distributed.
        from torch.distributed.nn.functional import all_reduce

        processes, values = torch.distributed.get_world_size(), images.float()
        mean = all_reduce(values.mean(dim=others)) / processes
        centred = values - mean.view(shape)
        variance = all_reduce(centred.square().mean(dim=others)) / processes
        with torch.no_grad():
            self.num_batches_tracked += 1
            count = processes * values.numel() / values.shape[1]
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        output = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            output = output * self.weight.view(shape) + self.bias.view(shape)
        return output.to(images.dtype)


def share_batch_statistics(model, device):
    """Make every BatchNorm1d and 2d of a model use all processes' batches; with one process nothing changes."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return model
    if torch.device(device).type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d):
            module.__class__ = GlobalBatchNorm
    return model


def check_passes(model, name, passes):
    """ValueError if a BatchNorm inside the model `name` would see a batch in several passes."""
    if passes > 1 and any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        raise ValueError(
            f"--gradient_accumulation_steps {passes}: the BatchNorm inside {name} cannot see the whole batch in "
            "several passes; use 1, or a backbone without BatchNorm"
        )


class BatchInstanceNorm(nn.Module):
    """Batch and instance norm of a map, each with its own weights, mixed by `rho`: 1, the start, is batch norm only.

    The batch norm keeps its weights, the instance norm starts with scale 1 and shift 0. `rho` is a buffer, so no
    optimiser changes it.
    """

    def __init__(self, norm):
        super().__init__()
        self.batch = norm
        self.instance = nn.InstanceNorm2d(norm.num_features, eps=norm.eps, affine=True)
        self.register_buffer("rho", torch.ones(norm.num_features))
        # In a meta-step the running averages stay as they are.
        self.held = False

    def forward(self, maps):
        norm, rho = self.batch, self.rho.to(maps.dtype).view(-1, 1, 1)
        if self.held:
            by_batch = F.batch_norm(maps, None, None, norm.weight, norm.bias, training=True, eps=norm.eps)
        else:
            by_batch = norm(maps)
        return rho * by_batch + (1 - rho) * self.instance(maps)


def add_batch_instance_norms(backbone):
    """Replace every BatchNorm2d in place; those that were replaced before stay."""
    for owner in list(backbone.modules()):
        if not isinstance(owner, BatchInstanceNorm):
            for name, norm in list(owner.named_children()):
                if isinstance(norm, nn.BatchNorm2d):
                    setattr(owner, name, BatchInstanceNorm(norm).to(norm.weight.device))
    if not has_batch_instance_norms(backbone):
        raise ValueError(f"a {backbone.config.model_type} has no BatchNorm whose place batch-instance norms may take")


def has_batch_instance_norms(backbone):
    return any(isinstance(module, BatchInstanceNorm) for module in backbone.modules())


def recompute(module):
    """Contexts for `checkpoint`: the second forward pass must not update the BatchNorm averages again."""

    @contextmanager
    def averages_at_rest():
        norms = [norm for norm in module.modules() if isinstance(norm, (nn.BatchNorm2d, nn.SyncBatchNorm))]
        before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
        for norm in norms:
            norm.momentum, norm.num_batches_tracked = 0.0, norm.num_batches_tracked.clone()
        try:
            yield
        finally:
            for norm, (momentum, count) in zip(norms, before, strict=True):
                norm.momentum, norm.num_batches_tracked = momentum, count

    return nullcontext(), averages_at_rest()
