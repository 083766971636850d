"""mAP, CMC and mINP of a ranked gallery, exact, without sorting the gallery.

For a query with P kept matches, where r_i is the 1-based rank of the i-th match among the kept gallery items:

    AP = 1/P sum_i i / r_i        CMC(k) = [r_1 <= k]        INP = P / r_P

Only the scores of the matches are sorted. The rank of a match is one more than the number of kept items before it.
"""

from dataclasses import dataclass

import torch

from .counting import PAIR_LIMIT, match_ranks
from .disk.rows import RowsOnDisk
from .dispatch import check_count, check_features, check_ids, choose_backend, requested
from .tiles import expand_ranges, row_groups, similarity_strips, unit_pair

PROTOCOLS = ("market", "all", "cuhk03")
CUHK03_REPEATS = 10
NO_MATCH_PID = -1


@dataclass(frozen=True)
class RankMetrics:
    """Means over the queries that have a kept match, and the values of each query (CPU, float64).

    For queries without one, `ap` and `inp` are NaN and `first_match`, the 1-based rank of the first match, is -1.
    """

    mAP: float
    cmc: torch.Tensor
    mINP: float
    ap: torch.Tensor
    inp: torch.Tensor
    first_match: torch.Tensor
    num_valid: int
    num_skipped: int
    backend: str


@torch.no_grad()
def rank_metrics(
    queries,
    gallery,
    query_pids,
    gallery_pids,
    query_cams,
    gallery_cams,
    *,
    max_rank=50,
    protocol="market",
    backend="auto",
    seed=0,
    group=None,
):
    """RankMetrics of cosine similarities. Ties go to the lower gallery index.

    protocol: `market` drops gallery items with the query's pid and camera; `all` drops nothing (cameras may be None);
    `cuhk03` takes CMC from ten repeats of one random image per gallery identity, drawn from `seed`.
    Gallery pid -1 matches nothing. With a `group` of processes each gives its own rows and their labels, any number;
    the metrics are those of all queries in the gallery of all, the same on every rank. Queries and gallery may be
    `kernels.disk.rows.RowsOnDisk`, larger than memory.
    """
    if group is not None or any(isinstance(features, RowsOnDisk) for features in (queries, gallery)):
        from .ring.ranking import ring_metrics

        labels = query_pids, gallery_pids, query_cams, gallery_cams
        options = {"max_rank": max_rank, "protocol": protocol, "backend": backend, "seed": seed}
        return ring_metrics(queries, gallery, *labels, **options, group=group)
    check_features(queries, gallery)
    labels = Labels(query_pids, gallery_pids, query_cams, gallery_cams, protocol, queries, gallery)
    max_rank = check_count("max_rank", max_rank, 1)
    if protocol == "cuhk03":
        if requested(backend)[0] == "triton":
            raise ValueError("protocol='cuhk03' draws images and needs backend='torch'")
        backend = "torch"
    path = choose_backend(backend, queries, "rank_metrics", gallery=gallery)
    if path == "triton":
        from .ranking_triton import match_ranks_triton

        tally = Tally(labels)
        tally.add(*match_ranks_triton(queries, gallery, labels))
        return tally.metrics(max_rank, path)
    units, gallery_units = unit_pair(queries, gallery)
    strips = similarity_strips(units, queries.shape[0], gallery_units, gallery.shape[0])
    return metrics_of_strips(strips, labels, max_rank, path, seed)


def rank_metrics_reference(scores, query_pids, gallery_pids, query_cams, gallery_cams, protocol="market"):
    """The definition for a dense (Q, G) score matrix, query by query: a list of the match ranks of each query."""
    ranks = []
    for row, pid, cam in zip(scores, query_pids.tolist(), query_cams.tolist(), strict=True):
        same_identity = (gallery_pids == pid) & (gallery_pids != NO_MATCH_PID)
        is_kept = torch.ones_like(same_identity) if protocol == "all" else ~(same_identity & (gallery_cams == cam))
        order = row[is_kept].argsort(descending=True, stable=True)
        ranks.append(same_identity[is_kept][order].nonzero().flatten() + 1)
    return ranks


class Labels:
    """Checked identities and cameras, with the gallery sorted by identity to find the matches of a query."""

    def __init__(self, query_pids, gallery_pids, query_cams, gallery_cams, protocol, queries, gallery):
        if protocol not in PROTOCOLS:
            raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}, got {protocol!r}")
        self.protocol = protocol
        device = queries.device
        num_queries, num_gallery = queries.shape[0], gallery.shape[0]
        self.query_pids = check_ids("query_pids", query_pids, num_queries, device)
        self.gallery_pids = check_ids("gallery_pids", gallery_pids, num_gallery, device)
        self.query_cams = self.gallery_cams = None
        if protocol != "all" and (query_cams is None or gallery_cams is None):
            raise ValueError(f"protocol={protocol!r} needs query_cams and gallery_cams; without cameras use 'all'")
        if query_cams is not None and gallery_cams is not None:
            self.query_cams = check_ids("query_cams", query_cams, num_queries, device)
            self.gallery_cams = check_ids("gallery_cams", gallery_cams, num_gallery, device)

        sorted_pids, self.order = self.gallery_pids.sort(stable=True)
        self.starts = torch.searchsorted(sorted_pids, self.query_pids)
        counts = torch.searchsorted(sorted_pids, self.query_pids, right=True) - self.starts
        self.counts = torch.where(self.query_pids == NO_MATCH_PID, 0, counts)
        self.counts_cpu = self.counts.cpu()

    def pairs(self, begin, end):
        """The same-identity pairs: rows (counted from `begin`), columns (ascending in a row), whether each is kept."""
        rows, places = expand_ranges(self.starts[begin:end], self.counts[begin:end])
        columns = self.order[places]
        return rows, columns, self.keeps(rows + begin, columns)

    def keeps(self, rows, columns):
        """Whether the protocol keeps each same-identity pair (query, gallery item)."""
        if self.protocol == "all":
            return torch.ones_like(rows, dtype=torch.bool)
        return self.query_cams[rows] != self.gallery_cams[columns]

    def no_valid_query(self):
        """The error for data sets in which no query has a kept match."""

        def some(values):
            if values is None:
                return "none"
            distinct = values.unique().tolist()
            return "[" + ", ".join(map(str, distinct[:8])) + (", ...]" if len(distinct) > 8 else "]")

        drop = "" if self.protocol == "all" else " seen by another camera"
        return ValueError(
            f"no query identity appears in the gallery{drop} (protocol={self.protocol!r}). "
            f"Query pids {some(self.query_pids)}, cameras {some(self.query_cams)}; "
            f"gallery pids {some(self.gallery_pids)}, cameras {some(self.gallery_cams)}"
        )


def metrics_of_strips(strips, labels, max_rank, path, seed=0):
    """RankMetrics from an iterator of (first row, score strip), larger scores first."""
    tally = Tally(labels)
    single_shot = SingleShot(labels, max_rank, seed) if labels.protocol == "cuhk03" else None
    mask = None
    for start, strip in strips:
        if mask is None:
            mask = torch.empty(strip.shape, dtype=torch.bool, device=strip.device)
        counts = labels.counts_cpu[start : start + strip.shape[0]]
        for begin, end in row_groups(counts, PAIR_LIMIT):
            rows, columns, is_kept = labels.pairs(start + begin, start + end)
            part = strip[begin:end]
            part[rows[~is_kept], columns[~is_kept]] = -torch.inf
            rows, columns = rows[is_kept], columns[is_kept]
            if single_shot is not None:
                single_shot.add(start + begin, part, rows, columns)
            rows, ranks = match_ranks(part, rows, columns, mask[: end - begin])
            tally.add(rows + start + begin, ranks)
    return tally.metrics(max_rank, path, single_shot)


class Tally:
    """AP, INP and first rank of each query; `add` fills in some queries at a time."""

    def __init__(self, labels):
        self.labels = labels
        num_queries, device = labels.query_pids.shape[0], labels.query_pids.device
        self.ap = torch.zeros(num_queries, dtype=torch.float64, device=device)
        self.inp = torch.zeros(num_queries, dtype=torch.float64, device=device)
        self.first = torch.full((num_queries,), -1, dtype=torch.int64, device=device)

    def add(self, rows, ranks):
        """Add the match ranks of whole queries, ascending within a query."""
        queries, counts = torch.unique_consecutive(rows, return_counts=True)
        ends = counts.cumsum(0)
        position = torch.arange(1, rows.shape[0] + 1, device=rows.device)
        position -= torch.repeat_interleave(ends - counts, counts)
        self.ap.index_add_(0, rows, position / ranks.double())
        self.ap[queries] /= counts
        self.inp[queries] = counts / ranks[ends - 1].double()
        self.first[queries] = ranks[ends - counts]

    def metrics(self, max_rank, path, single_shot=None):
        valid = self.first > 0
        num_valid = int(valid.sum())
        if num_valid == 0:
            raise self.labels.no_valid_query()
        if single_shot is not None:
            cmc = single_shot.cmc(num_valid)
        else:
            cmc = first_rank_curve(self.first[valid], max_rank) / num_valid
        ap, inp = (torch.where(valid, value, torch.nan).cpu() for value in (self.ap, self.inp))
        return RankMetrics(
            mAP=float(ap.nanmean()),
            cmc=cmc.cpu(),
            mINP=float(inp.nanmean()),
            ap=ap,
            inp=inp,
            first_match=self.first.cpu(),
            num_valid=num_valid,
            num_skipped=valid.shape[0] - num_valid,
            backend=path,
        )


def first_rank_curve(first, max_rank):
    """The number of first-match ranks that are at most 1, 2, ... max_rank."""
    return torch.bincount(first.clamp(max=max_rank + 1), minlength=max_rank + 2)[1 : max_rank + 1].cumsum(0).double()


class SingleShot:
    """CMC of the cuhk03 protocol: in each repeat one random image of every gallery identity competes."""

    def __init__(self, labels, max_rank, seed, total=None, first=0):
        """`labels` may be those of a share of `total` queries, from the query `first` on."""
        generator = torch.Generator().manual_seed(seed)
        device = labels.gallery_pids.device
        self.pids, counts = labels.gallery_pids.unique(return_counts=True)
        starts = counts.cumsum(0) - counts
        draws = torch.rand(CUHK03_REPEATS, counts.shape[0], generator=generator, dtype=torch.float64).to(device)
        self.chosen = labels.order[starts + (draws * counts).long()]
        num_queries = labels.query_pids.shape[0]
        own_draws = torch.rand(CUHK03_REPEATS, total or num_queries, generator=generator, dtype=torch.float64)
        self.own_draws = own_draws[:, first : first + num_queries].to(device)
        self.query_pids, self.max_rank = labels.query_pids, max_rank
        self.curve = torch.zeros(max_rank, dtype=torch.float64, device=device)

    def add(self, start, strip, rows, columns):
        """Add the queries from `start` on; (rows, columns) are their matches."""
        counts = torch.bincount(rows, minlength=strip.shape[0])
        valid = counts > 0
        starts = counts.cumsum(0) - counts
        others = self.pids[None] != self.query_pids[start : start + strip.shape[0]][valid][:, None]
        for chosen, draws in zip(self.chosen, self.own_draws[:, start : start + strip.shape[0]], strict=True):
            own_matches = columns[(starts + (draws * counts).long())[valid]]
            scores = strip[:, chosen][valid]
            own_scores = strip[valid].gather(1, own_matches[:, None])
            before = (scores > own_scores) | ((scores == own_scores) & (chosen < own_matches[:, None]))
            self.curve += first_rank_curve(1 + (before & others).sum(1), self.max_rank)

    def cmc(self, num_valid):
        return self.curve / (num_valid * CUHK03_REPEATS)
