"""k-reciprocal re-ranking (Zhong et al., CVPR 2017), exact, in memory linear in the number of rows.

    d_ij = 2 - 2 cos(x_i, x_j)        o_ij = d_ij / max_k d_ik        final = (1 - lambda) J + lambda o_qg

with J of `jaccard.py` over X, the queries and then the gallery. J is 1 except for the few gallery items that share a
neighbour with the query: a strip of final distances is a scaled strip of similarities, corrected at these items.
"""

import numbers

import torch

from .dispatch import check_count, check_features, choose_backend
from .jaccard import ENTRY_LIMIT, ONE, add_overlaps, check_compat, neighbour_vectors
from .ranking import Labels, metrics_of_strips
from .tiles import cosine_reference, hits, padded, row_groups, similarity_strips, strip_height, unit_rows
from .topk import TopK, strip_topk


@torch.no_grad()
def k_reciprocal_rerank(queries, gallery, *, k1=20, k2=6, lambda_value=0.3, compat=None, backend="auto", group=None):
    """Re-rank (Q, D) queries against (G, D) gallery: a ReRanking.

    compat="torchreid" squares the distances a second time, as torchreid and fast-reid do. With a `group` of processes
    each gives its own rows, any number; gallery indices count through the gallery of all ranks, in their order.
    """
    if group is not None:
        from .ring.reranking import ring_rerank

        options = {"k1": k1, "k2": k2, "lambda_value": lambda_value, "compat": compat}
        return ring_rerank(queries, gallery, **options, backend=backend, group=group)
    check_features(queries, gallery)
    k1, k2, lambda_value = check_options(k1, k2, lambda_value, compat)
    num_neighbours = min(max(k1 + 1, k2), queries.shape[0] + gallery.shape[0])
    path = choose_backend(backend, queries, "k_reciprocal_rerank", num_neighbours, gallery=gallery)
    return ReRanking(queries, gallery, k1, k2, lambda_value, compat, path)


def check_options(k1, k2, lambda_value, compat):
    """(k1, k2, lambda) as numbers; ValueError for one that is out of its range."""
    k1, k2 = check_count("k1", k1, 0), check_count("k2", k2, 0)
    if isinstance(lambda_value, bool) or not isinstance(lambda_value, numbers.Real) or not 0 <= lambda_value <= 1:
        raise ValueError(f"lambda_value must be a number between 0 and 1, got {lambda_value!r}")
    check_compat(compat, (None, "torchreid"))
    return k1, k2, float(lambda_value)


class ReRanking:
    """Final distances of queries and gallery, computed strip by strip; `.backend` is the path that ran."""

    def __init__(self, queries, gallery, k1, k2, lambda_value, compat, path):
        self.num_queries, self.num_gallery = queries.shape[0], gallery.shape[0]
        self.lambda_value, self.fourth_power, self.backend = lambda_value, compat == "torchreid", path
        num_rows = self.num_queries + self.num_gallery
        units = unit_rows(("queries", queries), ("gallery", gallery), spare=True)
        dtype = units.dtype
        self._queries = units[: padded(self.num_queries, dtype)]
        self._gallery = units[self.num_queries : self.num_queries + padded(self.num_gallery, dtype)]
        self._vectors, inverse = neighbour_vectors(units[: padded(num_rows, dtype)], num_rows, k1, k2, compat, path)
        self._inverse = inverse[: self.num_queries, None]
        self._inverted = self._vectors.by_column(self.num_queries, num_rows, num_rows)

    def metrics(self, query_pids, gallery_pids, query_cams, gallery_cams, max_rank=50, protocol="market", seed=0):
        """RankMetrics of the final distances; protocols as in `rank_metrics`."""
        labels = Labels(
            query_pids,
            gallery_pids,
            query_cams,
            gallery_cams,
            protocol,
            self._queries[: self.num_queries],
            self._gallery[: self.num_gallery],
        )
        max_rank = check_count("max_rank", max_rank, 1)
        return metrics_of_strips(self._score_strips(), labels, max_rank, self.backend, seed)

    def topk(self, k):
        """The k gallery items of smallest final distance: a TopK whose scores are the negated distances."""
        k = check_count("k", k, 1, self.num_gallery, hint=" (the number of gallery rows)")
        scores, indices = zip(*(strip_topk(strip, k) for _, strip in self._score_strips()), strict=True)
        return TopK(torch.cat(scores), torch.cat(indices), self.backend)

    def dense(self):
        """All final distances, float32 (Q, G) on the CPU: for small sets."""
        dense = torch.empty(self.num_queries, self.num_gallery, dtype=torch.float32)
        for start, strip in self._score_strips():
            dense[start : start + strip.shape[0]] = -strip[:, : self.num_gallery]
        return dense

    def _score_strips(self):
        """Yield (first row, strip of negated final distances); columns past the gallery hold -inf."""
        return self._strips(self._gallery, self.num_gallery, self._inverted)

    def _strips(self, gallery, num_gallery, inverted, begin=0, end=None):
        """The strips of the queries begin:end against gallery rows, of which `inverted` has V' by column."""
        shared = None
        end = self.num_queries if end is None else end
        for start, strip in self._similarities(gallery, num_gallery, begin, end):
            self._negated_distance(strip, self._inverse[start : start + strip.shape[0]])
            if self.lambda_value < 1:
                if shared is None:
                    shared = torch.zeros(strip.shape, dtype=torch.int32, device=strip.device)
                    mask = torch.empty(strip.shape, dtype=torch.bool, device=strip.device)
                self._add_overlaps(strip, start, inverted, shared, mask)
            strip[:, num_gallery:] = -torch.inf
            yield start, strip

    def _similarities(self, gallery, num_gallery, begin, end):
        if self.lambda_value > 0:
            queries = self._queries[begin : begin + padded(end - begin, self._queries.dtype)]
            for start, strip in similarity_strips(queries, end - begin, gallery, num_gallery):
                yield begin + start, strip
            return
        # With lambda 0 the original distances do not count: no product is needed.
        height = strip_height(num_gallery, self._queries.device)
        for start in range(begin, end, height):
            yield start, self._queries.new_zeros(min(height, end - start), padded(num_gallery))

    def _negated_distance(self, strip, inverse):
        """In place: similarities -> -((1 - lambda) + lambda o), the final distance with J = 1."""
        if self.fourth_power:
            strip.mul_(-2 * inverse).add_(2 * inverse).clamp_(min=0).square_()
            strip.mul_(-self.lambda_value).sub_(1 - self.lambda_value)
        else:
            scale = 2 * self.lambda_value * inverse
            strip.mul_(scale).sub_(scale + (1 - self.lambda_value))

    def _add_overlaps(self, strip, start, inverted, shared, mask):
        """In place: add (1 - lambda) t / (2 - t) where rows and gallery share a neighbour; `shared` is reset to 0."""
        stop = start + strip.shape[0]
        rows, columns, _ = self._vectors.entries(start, stop)
        costs = torch.zeros(strip.shape[0], dtype=torch.int64, device=strip.device)
        costs.index_add_(0, rows, inverted.counts[columns])
        for begin, end in row_groups(costs.cpu(), ENTRY_LIMIT):
            counted, places = shared[: end - begin], strip[begin:end].view(-1)
            entries = self._vectors.entries(start + begin, start + end)
            add_overlaps(counted, *entries, inverted, self.backend)
            _, _, touched = hits(torch.ne(counted, 0, out=mask[: end - begin]))
            overlap = counted.view(-1)[touched].to(strip.dtype) / ONE
            places[touched] += (1 - self.lambda_value) * (overlap / (2 - overlap))
            counted.zero_()


def k_reciprocal_rerank_reference(queries, gallery, k1=20, k2=6, lambda_value=0.3, compat=None):
    """The definition, dense, row by row: (Q, G) final distances, as precise as the dtype of its inputs."""
    features = torch.cat([queries, gallery])
    num_rows = features.shape[0]
    distance = 2 - 2 * cosine_reference(features, features)
    largest = distance.amax(1, keepdim=True)
    flat = largest <= 32 * torch.finfo(distance.dtype).eps
    original = torch.where(flat, 0.0, distance / torch.where(flat, 1.0, largest))
    if compat == "torchreid":
        original = original.clamp(min=0).square()
    order = distance.fill_diagonal_(-torch.inf).argsort(dim=1, stable=True)

    def reciprocal(i, k):
        return [j for j in order[i, : k + 1].tolist() if i in order[j, : k + 1].tolist()]

    half = round(k1 / 2)
    near, inner = ([set(reciprocal(i, k)) for i in range(num_rows)] for k in (k1, half))
    vectors = torch.zeros_like(original)
    for i in range(num_rows):
        accepted = (inner[c] for c in near[i] if 3 * len(inner[c] & near[i]) > 2 * len(inner[c]))
        members = sorted(near[i].union(*accepted))
        weights = torch.exp(-original[i, members])
        vectors[i, members] = weights / weights.sum()
    if k2 > 1:
        vectors = torch.stack([vectors[order[i, :k2]].mean(0) for i in range(num_rows)])
    query_vectors, gallery_vectors = vectors[: queries.shape[0]], vectors[queries.shape[0] :]
    overlap = torch.stack([torch.minimum(row, gallery_vectors).sum(1) for row in query_vectors])
    jaccard = 1 - overlap / (2 - overlap)
    return (1 - lambda_value) * jaccard + lambda_value * original[: queries.shape[0], queries.shape[0] :]
