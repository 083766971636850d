"""BatchNorm inside a backbone over the batch of all processes, so that their number does not change the training."""

import torch
from torch import nn


class GlobalBatchNorm(nn.BatchNorm2d):
    """What `torch.nn.SyncBatchNorm` does on a GPU, on any device: (B, C) or (B, C, H, W)."""

    def _check_input_dim(self, images):
        """Any shape will do."""

    def forward(self, images):
        if not self.training:
            return super().forward(images)
        others = tuple(dim for dim in range(images.ndim) if dim != 1)
        shape = [-1 if dim == 1 else 1 for dim in range(images.ndim)]
        # Not at the head: torch warns on machines without distributed.
        from torch.distributed.nn.functional import all_reduce

        processes, values = torch.distributed.get_world_size(), images.float()
        mean = all_reduce(values.mean(dim=others)) / processes
        centred = values - mean.view(shape)
        variance = all_reduce(centred.square().mean(dim=others)) / processes
        with torch.no_grad():
            # None while activations are computed a second time.
            if self.num_batches_tracked is not None:
                self.num_batches_tracked += 1
            count = processes * values.numel() / values.shape[1]
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        output = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            output = output * self.weight.view(shape) + self.bias.view(shape)
        return output.to(images.dtype)


def share_batch_statistics(model, device):
    """Every BatchNorm1d and 2d of a model over all processes; with one process the model stays as it is."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return model
    if torch.device(device).type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d):
            module.__class__ = GlobalBatchNorm
    return model
