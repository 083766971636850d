"""How far two kinds of features agree on which images are near each other."""

import torch

from kernels.neighbours import self_neighbours
from kernels.tiles import unit_rows

CHUNK = 8192


@torch.no_grad()
def neighbour_agreement(features, others, k):
    """|A n B| / |A u B| of each row with each of `others`, float32 (N, others).

    A are its k nearest other rows by `features`, B those by one of `others`, a list.
    """
    k = min(k, len(features) - 1)
    known = nearest_others(features, k)
    shared = [
        torch.cat([count_shared(*both) for both in zip(known.split(CHUNK), near.split(CHUNK), strict=True)])
        for near in (nearest_others(side, k) for side in others)
    ]
    shared = torch.stack(shared, dim=1).float()
    return shared / (2 * k - shared)


def nearest_others(features, k):
    # A row is its own nearest.
    return self_neighbours(unit_rows(("features", features)), len(features), k + 1).indices[:, 1:]


def count_shared(near, others):
    return (near[:, :, None] == others[:, None, :]).sum((1, 2))
