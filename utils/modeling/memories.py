"""Memories of features: one row per identity, cluster or image; unit length, float32, no gradient."""

import torch
import torch.nn.functional as F
from torch import nn


def class_means(features, labels, num_ids):
    """Unit-length mean of the unit-length features (N, D) of each label 0..num_ids-1: (num_ids, D) float32."""
    sums = torch.zeros(num_ids, features.shape[1], dtype=torch.float32, device=features.device)
    sums.index_add_(0, labels, F.normalize(features.float(), dim=1))
    return F.normalize(sums, dim=1)


class PrototypeMemory(nn.Module):
    """One unit-length prototype per identity, compared with features by cosine and updated with the hardest ones.

    loss = memory(features, labels)       # raw BNNeck features (B, D), labels 0..N-1; gradient to the features only
    memory.update(features, labels)       # after the backward pass

    The loss is the cross-entropy of `u M^T / temperature` with u the unit-length features. For each identity in the
    batch, the update takes the sample least similar to its prototype m: `m <- momentum m + (1 - momentum) u`, unit
    length. With several processes, give the whole batch to each of them: the prototypes then stay equal.
    """

    def __init__(self, prototypes, temperature=0.01, momentum=0.2):
        super().__init__()
        if prototypes.ndim != 2:
            raise ValueError(f"prototypes must be (identities, width), got {tuple(prototypes.shape)}")
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must be between 0 and 1, got {momentum}")
        self.temperature, self.momentum = temperature, momentum
        self.register_buffer("prototypes", F.normalize(prototypes.detach().float(), dim=1))

    def similarities(self, features):
        """Cosine of each feature with each prototype: (B, N) float32."""
        with torch.autocast(features.device.type, enabled=False):
            # A copy: `update` changes the prototypes while a graph may still need the old ones.
            return F.normalize(features.float(), dim=1) @ self.prototypes.clone().t()

    def forward(self, features, labels):
        return F.cross_entropy(self.similarities(features) / self.temperature, labels)

    @torch.no_grad()
    def update(self, features, labels):
        with torch.autocast(features.device.type, enabled=False):
            unit = F.normalize(features.float(), dim=1)
            old = self.prototypes[labels]
            # [B, B]: for each sample, the similarities of all samples of its identity; the first lowest is hardest.
            similarities = (unit * old).sum(1).expand(len(labels), -1)
            similarities = similarities.masked_fill(labels[:, None] != labels[None, :], torch.inf)
            hardest = unit[similarities.argmin(1)]
            # All samples of one identity write the same row.
            self.prototypes[labels] = F.normalize(torch.lerp(hardest, old, self.momentum), dim=1)

    def _apply(self, fn, recurse=True):
        # model.half() and DeepSpeed would round the prototypes.
        def keep_precision(tensor):
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_precision, recurse)

    @torch.no_grad()
    def rebuild(self, features, labels):
        """Replace every prototype by the mean direction of its identity's features."""
        self.prototypes.copy_(class_means(features, labels, len(self.prototypes)))
