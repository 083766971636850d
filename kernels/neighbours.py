"""Each row's nearest rows of its own set, and its farthest: the N x N search of k-reciprocal methods."""

from dataclasses import dataclass

import torch

from .tiles import similarity_strips
from .topk import strip_topk


@dataclass(frozen=True)
class Neighbours:
    """The first k of each row's order, itself first, ties by lower index; and the smallest similarity of each row."""

    indices: torch.Tensor
    lowest: torch.Tensor


def self_neighbours(units, num_rows, k):
    """Neighbours of the first `num_rows` unit rows among themselves: int64 (N, k) and (N,)."""
    k = min(k, num_rows)
    indices = torch.empty(num_rows, k, dtype=torch.int64, device=units.device)
    lowest = torch.empty(num_rows, dtype=units.dtype, device=units.device)
    for start, strip in similarity_strips(units, num_rows, units, num_rows):
        stop = start + strip.shape[0]
        lowest[start:stop] = strip[:, :num_rows].amin(1)
        strip.diagonal(start).fill_(torch.inf)
        indices[start:stop] = strip_topk(strip, k)[1]
    return Neighbours(indices, lowest)


def self_neighbours_reference(units, k):
    """The definition, dense."""
    similarities = units @ units.t()
    lowest = similarities.amin(1)
    similarities.fill_diagonal_(torch.inf)
    return Neighbours(similarities.sort(dim=1, descending=True, stable=True).indices[:, :k], lowest)
