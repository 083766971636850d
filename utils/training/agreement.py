"""How far two kinds of features agree on which images are near each other."""

import torch

from kernels.neighbours import self_neighbours
from kernels.tiles import unit_rows

CHUNK = 8192


@torch.no_grad()
def neighbour_agreement(features, others, k):
    """|A n B| / |A u B| of each row, float32: A and B are its k nearest other rows by `features` and by `others`."""
    num_rows = len(features)
    k = min(k, num_rows - 1)
    # A row is its own nearest.
    first, second = (
        self_neighbours(unit_rows(("features", side)), num_rows, k + 1).indices[:, 1:] for side in (features, others)
    )
    shared = [
        (one[:, :, None] == other[:, None, :]).sum((1, 2))
        for one, other in zip(first.split(CHUNK), second.split(CHUNK), strict=True)
    ]
    shared = torch.cat(shared).float()
    return shared / (2 * k - shared)
