"""Losses on identity features, computed in float32 also under autocast."""

import torch
import torch.nn.functional as F
from torch import nn


def distances(features, others=None):
    """Euclidean distance of each feature to each of `others`, by default to each other: (N, M) float32."""
    with torch.autocast(features.device.type, enabled=False):
        features = features.float()
        others = features if others is None else others.float()
        # Not by a matrix product: for small distances its rounding errors would be larger than the distance.
        return torch.cdist(features, others, compute_mode="donot_use_mm_for_euclid_dist")


def hard_triplet(features, labels, margin=None, others=None, other_labels=None):
    """Batch-hard triplet loss: for each feature, the farthest of its identity against the nearest of the others.

    mean max(0, farthest - nearest + margin); without a margin the soft form, mean log(1 + exp(farthest - nearest)).
    `others`: features to compare with instead of the batch; those with a negative label are left out.
    """
    other_labels = labels if others is None else other_labels
    same_identity = labels[:, None] == other_labels[None, :]
    distance = distances(features) if others is None else distances(features.detach(), others)
    own = distance.masked_fill(~same_identity, -torch.inf)
    strangers = distance.masked_fill(same_identity | (other_labels < 0), torch.inf)
    if others is None:
        farthest, nearest = own.amax(1), strangers.amin(1)
    else:
        # A gradient of all distances would take batch x others x width numbers on a GPU; two of a row have one.
        places = torch.stack([own.argmax(1), strangers.argmin(1)], dim=1)
        both = distances(features[:, None], others[places])[:, 0]
        farthest, nearest = (
            pair.where(side.isfinite().any(1), extreme)
            for pair, side, extreme in zip(both.unbind(1), (own, strangers), (-torch.inf, torch.inf), strict=True)
        )
    if margin is None:
        return F.softplus(farthest - nearest).mean()
    return F.relu(farthest - nearest + margin).mean()


def weighted_triplet(features, labels):
    """AGW's weighted regularised triplet loss: mean log(1 + exp(sum w+ d+ - sum w- d-)), no margin.

    w+ is the softmax of a feature's distances d+ to others of its identity, w- the softmax of -d- to other identities:
    hard pairs have larger weights. A feature without such pairs has a sum of 0.
    """
    distance = distances(features)
    same_identity = labels[:, None] == labels[None, :]
    others = ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    return F.softplus(
        weighted(distance, distance, same_identity & others) - weighted(distance, -distance, ~same_identity)
    ).mean()


def weighted(distance, hardness, pairs):
    # A finite value instead of -inf, so that a row without pairs gives 0 instead of NaN.
    weights = hardness.masked_fill(~pairs, -1e9).softmax(1) * pairs
    return (weights * distance).sum(1)


def circle_logits(cosines, labels, scale=64.0, margin=0.35):
    """Circle loss with identities as classes: the cross-entropy of these logits, from cosines (B, num_ids).

    Own identity: scale max(0, 1 + margin - s) (s - 1 + margin); others: scale max(0, s + margin) (s - margin). The
    factors with max(0, ...) have no gradient: they only weigh each cosine by its distance from its optimum.
    """
    cosines = cosines.float()
    fixed = cosines.detach()
    positive = (1 + margin - fixed).clamp(min=0) * (cosines - 1 + margin)
    negative = (fixed + margin).clamp(min=0) * (cosines - margin)
    is_own = F.one_hot(labels, cosines.shape[1]).bool()
    return scale * torch.where(is_own, positive, negative)


class CentreLoss(nn.Module):
    """Mean squared distance of features to the centre of their identity; the centres follow the features.

    loss = centres(features, labels)      # gradient to the features only
    centres.update(features, labels)      # after the backward pass

    The update is that of the authors: a step of plain gradient descent with rate 0.5 on the centres, whatever the
    weight of the loss, so `c <- c + sum (f - c) / B` over the identity's features in a batch of B.
    """

    def __init__(self, num_ids, width):
        super().__init__()
        self.register_buffer("centres", torch.randn(num_ids, width))

    def forward(self, features, labels):
        with torch.autocast(features.device.type, enabled=False):
            # Indexing copies: `update` changes the centres while a graph may still need the old ones.
            return (features.float() - self.centres[labels]).square().sum(1).mean()

    @torch.no_grad()
    def update(self, features, labels):
        gaps = features.float() - self.centres[labels]
        self.centres.index_add_(0, labels, gaps / len(labels))
