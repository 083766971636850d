"""Losses on identity features. They compute in float32, also under autocast."""

import torch
import torch.nn.functional as F
from torch import nn


def class_means(features, labels, num_ids):
    """Unit-length mean of the unit-length features (N, D) of each label 0..num_ids-1: (num_ids, D) float32."""
    sums = torch.zeros(num_ids, features.shape[1], dtype=torch.float32, device=features.device)
    sums.index_add_(0, labels, F.normalize(features.float(), dim=1))
    return F.normalize(sums, dim=1)


class PrototypeMemory(nn.Module):
    """One unit-length prototype an identity, compared with features by cosine and moved by the batch's hardest ones.

    loss = memory(features, labels)       # raw BNNeck features (B, D), labels 0..N-1; gradient to the features only
    memory.update(features, labels)       # after the backward pass

    The loss is the cross-entropy of `u M^T / temperature` with u the unit-length features. The update takes, of each
    identity in the batch, the sample least like its prototype m: `m <- momentum m + (1 - momentum) u`, unit length.
    With several processes, give every one of them the whole batch: the prototypes then stay equal.
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
            # The update writes into the prototypes, also while a graph still needs the old ones.
            return F.normalize(features.float(), dim=1) @ self.prototypes.clone().t()

    def forward(self, features, labels):
        return F.cross_entropy(self.similarities(features) / self.temperature, labels)

    @torch.no_grad()
    def update(self, features, labels):
        with torch.autocast(features.device.type, enabled=False):
            unit = F.normalize(features.float(), dim=1)
            old = self.prototypes[labels]
            # [B, B]: for each sample, the similarities of those of its identity, and the first lowest of them.
            own = (unit * old).sum(1).expand(len(labels), -1)
            own = own.masked_fill(labels[:, None] != labels[None, :], torch.inf)
            hardest = unit[own.argmin(1)]
            # Samples of one identity all write the same row.
            self.prototypes[labels] = F.normalize(torch.lerp(hardest, old, self.momentum), dim=1)

    def _apply(self, fn, recurse=True):
        # model.half() and DeepSpeed would round the prototypes.
        def keep_precision(tensor):
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_precision, recurse)

    @torch.no_grad()
    def rebuild(self, features, labels):
        """Every prototype anew: the mean direction of its identity's features."""
        self.prototypes.copy_(class_means(features, labels, len(self.prototypes)))


def distances(features):
    """Euclidean distance of each feature to each other: (N, N) float32."""
    with torch.autocast(features.device.type, enabled=False):
        # Not by the product of features: near zero its rounding would be all there is.
        return torch.cdist(features.float(), features.float(), compute_mode="donot_use_mm_for_euclid_dist")


def hard_triplet(features, labels, margin=None):
    """Batch-hard triplet loss: of each feature the farthest of its identity against the nearest of the others.

    mean max(0, farthest - nearest + margin), or without a margin its soft form, mean log(1 + exp(farthest - nearest)).
    """
    distance = distances(features)
    same = labels[:, None] == labels[None, :]
    farthest = distance.masked_fill(~same, -torch.inf).amax(1)
    nearest = distance.masked_fill(same, torch.inf).amin(1)
    if margin is None:
        return F.softplus(farthest - nearest).mean()
    return F.relu(farthest - nearest + margin).mean()


def weighted_triplet(features, labels):
    """AGW's weighted regularised triplet loss: mean log(1 + exp(sum w+ d+ - sum w- d-)), no margin.

    w+ is the softmax of a feature's distances d+ to the others of its identity, w- that of -d- to other identities:
    hard pairs weigh more. A feature without such pairs has a sum of 0.
    """
    distance = distances(features)
    same = labels[:, None] == labels[None, :]
    others = ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    return F.softplus(weighted(distance, distance, same & others) - weighted(distance, -distance, ~same)).mean()


def weighted(distance, hardness, pairs):
    # Finite, so that a row without pairs gives 0 instead of NaN.
    weights = hardness.masked_fill(~pairs, -1e9).softmax(1) * pairs
    return (weights * distance).sum(1)


def circle_logits(cosines, labels, scale=64.0, margin=0.35):
    """Circle loss with identities as classes: the cross-entropy of these logits, from cosines (B, num_ids).

    Own identity: scale max(0, 1 + margin - s) (s - 1 + margin); others: scale max(0, s + margin) (s - margin). The
    factors that are cut at 0 carry no gradient: the farther a cosine is from where it should be, the harder it pulls.
    """
    cosines = cosines.float()
    fixed = cosines.detach()
    own = (1 + margin - fixed).clamp(min=0) * (cosines - 1 + margin)
    other = (fixed + margin).clamp(min=0) * (cosines - margin)
    mine = F.one_hot(labels, cosines.shape[1]).bool()
    return scale * torch.where(mine, own, other)


class CentreLoss(nn.Module):
    """Mean squared distance of features to the centre of their identity; the centres follow the features.

    loss = centres(features, labels)      # gradient to the features only
    centres.update(features, labels)      # after the backward pass

    The update is the authors': a step of plain gradient descent of rate 0.5 on the centres, whatever the loss weighs
    elsewhere, so `c <- c + sum (f - c) / B` over the identity's features in a batch of B.
    """

    def __init__(self, num_ids, width):
        super().__init__()
        self.register_buffer("centres", torch.randn(num_ids, width))

    def forward(self, features, labels):
        with torch.autocast(features.device.type, enabled=False):
            # The update writes into the centres, also while a graph still needs the old ones.
            return (features.float() - self.centres[labels]).square().sum(1).mean()

    @torch.no_grad()
    def update(self, features, labels):
        gaps = features.float() - self.centres[labels]
        self.centres.index_add_(0, labels, gaps / len(labels))
