"""The nearest gallery rows of this rank's queries among the gallery rows of all ranks."""

import torch

from kernels.dispatch import check_count
from kernels.ring.processes import Ring
from kernels.tiles import similarity_strips, unit_rows
from kernels.topk import TopK, strip_topk


def ring_topk(queries, gallery, k, backend, group):
    """`cosine_topk` under a group: TopK of this rank's queries, with indices in the order of the ranks."""
    ring = Ring(group, queries, gallery)
    k = ring.agree(lambda: check_count("k", k, 1, ring.total, hint=" (the number of gallery rows of all ranks)"))
    path = ring.backend_for(backend, queries, "cosine_topk", k)
    best = Best(queries, k, ring.dtype)
    units = ring.units(queries, gallery)
    for offset, shard in ring.shards():
        if not len(queries):
            continue
        depth = min(k, len(shard))
        if path == "triton":
            from kernels.topk_triton import launch_topk

            scores, indices = launch_topk(queries, shard, depth)[:2]
            best.add(slice(None), scores, indices + offset)
            continue
        rows = unit_rows(("gallery", shard.to(ring.dtype)))
        for start, strip in similarity_strips(units, len(queries), rows, len(shard)):
            scores, indices = strip_topk(strip, depth)
            best.add(slice(start, start + strip.shape[0]), scores, indices + offset)
    return TopK(best.scores, best.indices, path)


class Best:
    """The k best entries of each query so far, best first, equal scores by lower index."""

    def __init__(self, queries, k, dtype):
        self.k = k
        self.scores = queries.new_full((len(queries), k), -torch.inf, dtype=dtype)
        self.indices = torch.full((len(queries), k), torch.iinfo(torch.int64).max, device=queries.device)

    def add(self, rows, scores, indices):
        scores = torch.cat([self.scores[rows], scores], dim=1)
        indices, order = torch.cat([self.indices[rows], indices], dim=1).sort(dim=1)
        scores, best = scores.gather(1, order).sort(dim=1, descending=True, stable=True)
        self.scores[rows], self.indices[rows] = scores[:, : self.k], indices.gather(1, best)[:, : self.k]
