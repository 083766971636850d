"""Pairs of rows within a Jaccard distance: a sparse graph for clustering, in memory linear in the number of rows.

J of `jaccard.py` is 1 for two rows that share no neighbour. The other pairs are few, and only those up to a given
distance are stored; the overlaps are computed for one strip of rows at a time.
"""

from typing import NamedTuple

import torch

from .dispatch import check_count, check_features, choose_backend
from .jaccard import ENTRY_LIMIT, ONE, SparseRows, add_overlaps, check_compat, neighbour_vectors
from .tiles import hits, padded, row_groups, strip_height, unit_rows


class JaccardGraph(NamedTuple):
    """`near`: each row's rows within the distance, itself included, with float32 distances; symmetric.

    `reach` (N, `nearest`): the smallest distances of each row, ascending, its own 0 first.
    """

    near: SparseRows
    reach: torch.Tensor
    backend: str


@torch.no_grad()
def jaccard_graph(
    features, *, k1=20, k2=6, max_distance=1.0, nearest=1, compat=None, backend="auto",
    group=None,
):  # fmt: skip
    """The JaccardGraph of (N, D) features; pairs that share no neighbour are left out at any `max_distance`.

    With a `group` of processes each gives its own rows, any number, and gets the pairs of these rows; columns count
    through the rows of all ranks, in their order.
    """
    if group is not None:
        from .ring.graph import ring_graph

        options = {"k1": k1, "k2": k2, "max_distance": max_distance, "nearest": nearest, "compat": compat}
        return ring_graph(features, **options, backend=backend, group=group)
    check_features(features, features)
    k1, k2 = check_count("k1", k1, 0), check_count("k2", k2, 0)
    num_rows = features.shape[0]
    nearest = check_count("nearest", nearest, 1, num_rows, hint=" (the number of rows)")
    check_compat(compat)
    path = choose_backend(backend, features, "k_reciprocal_rerank", min(max(k1 + 1, k2), num_rows))
    units = unit_rows(("features", features))
    vectors, _ = neighbour_vectors(units, num_rows, k1, k2, compat, path)
    del units
    inverted = vectors.by_column(0, num_rows, num_rows)
    counts, columns, values, reach = [], [], [], []
    for begin, shared, mask in overlap_strips(vectors, inverted, num_rows, path):
        # The values of a row may add up to slightly less than one.
        shared.diagonal(begin).fill_(ONE)
        reach.append(distance_of(shared.topk(nearest, dim=1).values))
        row, column, place = hits(torch.ne(shared, 0, out=mask))
        distance = distance_of(shared.view(-1)[place])
        is_near = distance <= max_distance
        counts.append(torch.bincount(row[is_near], minlength=len(shared)))
        columns.append(column[is_near])
        values.append(distance[is_near])
    counts = torch.cat(counts)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return JaccardGraph(SparseRows(offsets, torch.cat(columns), torch.cat(values)), torch.cat(reach), path)


def overlap_strips(vectors, inverted, num_columns, path="torch"):
    """Yield (first row, overlaps of some rows of `vectors` with `num_columns` others, a mask to write to).

    `inverted` is V' of the others by column. Both are reused by the next step.
    """
    num_rows, device = len(vectors.counts), vectors.columns.device
    height = min(strip_height(num_columns, device), num_rows)
    shared = torch.zeros(height, padded(num_columns), dtype=torch.int32, device=device)
    mask = torch.empty_like(shared, dtype=torch.bool)
    rows, columns, _ = vectors.entries(0, num_rows)
    costs = torch.zeros(num_rows, dtype=torch.int64, device=device)
    costs.index_add_(0, rows, inverted.counts[columns])
    for start in range(0, num_rows, height):
        for begin, end in row_groups(costs[start : start + height].cpu(), ENTRY_LIMIT):
            counted = shared[: end - begin]
            add_overlaps(counted, *vectors.entries(start + begin, start + end), inverted, path)
            yield start + begin, counted, mask[: end - begin]
            counted.zero_()


def distance_of(overlap):
    """J from overlaps in units of 1 / ONE."""
    share = (overlap.double() / ONE).clamp_(max=1)
    return (1 - share / (2 - share)).float()
