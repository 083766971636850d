"""k-reciprocal re-ranking of the queries of all ranks in the gallery of all ranks."""

import torch

from kernels.dispatch import check_count, check_in_memory
from kernels.jaccard import SparseRows
from kernels.reranking import ReRanking, check_options
from kernels.ring.neighbours import AllRows, Overlaps, ring_vectors
from kernels.ring.processes import Ring
from kernels.ring.ranking import counted_metrics, own_labels, refuse_triton
from kernels.ring.topk import Best
from kernels.tiles import padded
from kernels.topk import TopK, strip_topk


def ring_rerank(queries, gallery, *, k1, k2, lambda_value, compat, backend, group):
    """`k_reciprocal_rerank` under a group: the RingReRanking of this rank's queries."""
    ring = Ring(group, queries, gallery)
    ring.agree(lambda: check_in_memory(queries, gallery))
    k1, k2, lambda_value = ring.agree(lambda: check_options(k1, k2, lambda_value, compat))
    ring.agree(lambda: refuse_triton(backend))
    return RingReRanking(ring, queries, gallery, k1, k2, lambda_value, compat)


class RingReRanking(ReRanking):
    """Final distances of this rank's queries to the gallery of all ranks, whose shards come in turn.

    `topk` and `dense` are of this rank's queries; `metrics` takes this rank's labels and gives those of all queries.
    Every rank must call the same methods in the same order.
    """

    def __init__(self, ring, queries, gallery, k1, k2, lambda_value, compat):
        self.ring, self.backend = ring, "torch"
        self.num_queries, self.num_gallery = len(queries), ring.total
        self.lambda_value, self.fourth_power = lambda_value, compat == "torchreid"
        self._rows = AllRows(ring, ("queries", queries), ("gallery", gallery))
        self._queries = self._rows.units[0]
        vectors, inverse = ring_vectors(self._rows, k1, k2, compat)
        self._inverse = inverse[: self.num_queries, None]
        own = torch.arange(len(self._rows.own), device=ring.device)
        self._overlaps = Overlaps(vectors.take(own[: self.num_queries]))
        self._vectors, self._gallery_vectors = self._overlaps.vectors, vectors.take(own[self.num_queries :])

    def metrics(self, query_pids, gallery_pids, query_cams, gallery_cams, max_rank=50, protocol="market", seed=0):
        """RankMetrics of all queries, equal on every rank, from the labels of this rank's rows."""
        ring = self.ring
        max_rank = ring.agree(lambda: check_count("max_rank", max_rank, 1))
        given = query_pids, gallery_pids, query_cams, gallery_cams
        labels = ring.agree(lambda: own_labels(ring, *given))
        return counted_metrics(ring, labels, self._shards, protocol, max_rank, seed)

    def topk(self, k):
        """The k gallery items of smallest final distance to each own query: a TopK with the negated distances."""
        hint = " (the number of gallery rows of all ranks)"
        k = self.ring.agree(lambda: check_count("k", k, 1, self.num_gallery, hint=hint))
        best = Best(self.ring, k)
        for shard in self._shards():
            for start, strip in shard.strips():
                scores, indices = strip_topk(strip, min(k, shard.count))
                best.add(slice(start, start + strip.shape[0]), scores, indices + shard.offset)
        return TopK(best.scores, best.indices, self.backend)

    def dense(self):
        """All final distances of the own queries, float32 on the CPU: for small sets."""
        dense = torch.empty(self.num_queries, self.num_gallery, dtype=torch.float32)
        for shard in self._shards():
            for start, strip in shard.strips():
                columns = slice(shard.offset, shard.offset + shard.count)
                dense[start : start + strip.shape[0], columns] = -strip[:, : shard.count]
        return dense

    def _shards(self):
        """Yield a RerankedShard for the gallery of every rank that has any."""
        vectors = self._gallery_vectors
        for rank, (rows, counts, columns, values) in self.ring.rounds(
            self.ring.gallery, vectors.counts, vectors.columns, vectors.values
        ):
            if not len(rows):
                continue
            units = self._rows.units[1] if rank == self.ring.rank else self.ring.unit("gallery", rows)
            offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
            yield RerankedShard(self, self.ring.offsets[rank], units, SparseRows(offsets, columns, values))


class RerankedShard:
    """Gallery rows of one rank: `strips` and `values` give negated final distances of the own queries to them."""

    def __init__(self, reranking, offset, units, vectors):
        self.reranking, self.offset, self.count = reranking, offset, len(vectors.counts)
        self.units, self.vectors = units, vectors

    def strips(self):
        if not self.reranking.num_queries:
            return iter(())
        return self.reranking._strips(self.units, self.count, self.reranking._overlaps.inverted(self.vectors))

    def values(self, begin, end, columns):
        """Yield (first query, values of some queries of begin:end and these rows of the shard)."""
        units = self.units.new_zeros(padded(len(columns), self.units.dtype), self.units.shape[1])
        units[: len(columns)] = self.units[columns]
        inverted = self.reranking._overlaps.inverted(self.vectors.take(columns))
        return self.reranking._strips(units, len(columns), inverted, begin, end)
