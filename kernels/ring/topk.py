"""The nearest gallery rows of this rank's queries among the gallery rows of all ranks, in memory or on disk."""

import torch

from kernels.dispatch import check_count
from kernels.ring.processes import Ring
from kernels.topk import TopK, strip_topk


def ring_topk(queries, gallery, k, backend, group=None):
    """`cosine_topk` under a group or of rows on disk; indices count in the order of the ranks."""
    ring = Ring(group, queries, gallery)
    hint = f" (the number of gallery rows{' of all ranks' * (group is not None)})"
    k = ring.agree(lambda: check_count("k", k, 1, ring.total, hint=hint))
    path = ring.backend_for(backend, ring.queries, "cosine_topk", k)
    best = Best(ring, k)
    units = ring.units()
    for offset, rows in ring.shards():
        depth = min(k, len(rows))
        if path == "triton":
            from kernels.topk_triton import launch_topk

            for start in range(0, len(queries), units.block):
                some = slice(start, min(start + units.block, len(queries)))
                scores, indices = launch_topk(ring.queries[some], rows, depth)[:2]
                best.add(some, scores, indices + offset)
            continue
        for start, strip in units.strips(ring.unit("gallery", rows), len(rows)):
            scores, indices = strip_topk(strip, depth)
            best.add(slice(start, start + strip.shape[0]), scores, indices + offset)
    return TopK(best.scores, best.indices, path)


class Best:
    """The k best entries of each query so far, best first, equal scores by lower index."""

    def __init__(self, ring, k, num_rows=None):
        num_rows = len(ring.queries) if num_rows is None else num_rows
        self.k = k
        self.scores = torch.full((num_rows, k), -torch.inf, dtype=ring.dtype, device=ring.device)
        self.indices = torch.full((num_rows, k), torch.iinfo(torch.int64).max, device=ring.device)

    def add(self, rows, scores, indices):
        scores = torch.cat([self.scores[rows], scores], dim=1)
        indices, order = torch.cat([self.indices[rows], indices], dim=1).sort(dim=1)
        scores, best = scores.gather(1, order).sort(dim=1, descending=True, stable=True)
        self.scores[rows], self.indices[rows] = scores[:, : self.k], indices.gather(1, best)[:, : self.k]
