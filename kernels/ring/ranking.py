"""mAP, CMC and mINP of the queries of all ranks in the gallery of all ranks.

The rank of a match is one more than the entries before it, counted shard by shard. Its score must be known before the
first shard is counted: it is computed first, from the query rows and the match's row alone, and compared with what the
shard gives, bit by bit. Should a product of another shape be summed in another order, the counting is repeated.
"""

import torch

from kernels.counting import ranks_of_values
from kernels.dispatch import check_count, check_ids, full_precision
from kernels.ranking import Labels, Tally
from kernels.ring.processes import Ring
from kernels.tiles import padded, similarity_strips, strip_height, unit_rows


def ring_metrics(
    queries, gallery, query_pids, gallery_pids, query_cams, gallery_cams, *, max_rank, protocol, backend, group
):
    """`rank_metrics` under a group: the same RankMetrics of all queries on every rank."""
    ring = Ring(group, queries, gallery)
    max_rank = ring.agree(lambda: check_count("max_rank", max_rank, 1))
    labels = ring.agree(
        lambda: own_labels(ring, queries, gallery, query_pids, gallery_pids, query_cams, gallery_cams, protocol)
    )
    # Triton's kernel ranks within one gallery; its scores are not those of the products here.
    ring.agree(lambda: check_path(backend))
    labels = labels_of_all(ring, queries, labels, protocol)
    units = ring.units(queries, gallery)
    pairs = Pairs(labels, units, len(queries))
    for offset, shard in ring.shards():
        pairs.score(offset, unit_rows(("gallery", shard.to(ring.dtype))), len(shard))
    while True:
        pairs.begin()
        for offset, shard in ring.shards():
            pairs.count(offset, unit_rows(("gallery", shard.to(ring.dtype))), len(shard))
        if not ring.any(pairs.moved):
            break
    tally = Tally(labels)
    tally.add(*pairs.ranked())
    for name in ("ap", "inp", "first"):
        setattr(tally, name, ring.gather_rows(getattr(tally, name), ring.query_counts))
    return tally.metrics(max_rank, "torch")


def check_path(backend):
    if backend == "triton":
        raise ValueError("backend='triton' cannot run under a group: ranks are counted by products of torch")


def own_labels(ring, queries, gallery, query_pids, gallery_pids, query_cams, gallery_cams, protocol):
    """This rank's checked identities and cameras, in the order of `Labels`; cameras may be None."""
    if protocol == "cuhk03":
        raise ValueError("protocol='cuhk03' draws images of the whole gallery and needs one process: leave out group")
    device = queries.device
    sides = (queries, query_pids, query_cams, "query"), (gallery, gallery_pids, gallery_cams, "gallery")
    return [
        None if ids is None else check_ids(f"{side}_{name}", ids, len(features), device)
        for name, place in (("pids", 1), ("cams", 2))
        for features, ids, side in ((given[0], given[place], given[3]) for given in sides)
    ]


def labels_of_all(ring, queries, labels, protocol):
    query_pids, gallery_pids, query_cams, gallery_cams = labels
    gallery_pids = ring.gather_rows(gallery_pids, ring.counts)
    has_cameras = query_cams is not None and gallery_cams is not None
    if ring.any(has_cameras) and ring.any(not has_cameras):
        raise ValueError("some processes have cameras and others have none; give all ranks the cameras of their rows")
    if has_cameras:
        gallery_cams = ring.gather_rows(gallery_cams, ring.counts)
    gallery_cams = gallery_cams if has_cameras else None
    # Only the numbers of rows and the device of the features count.
    gallery = queries.new_empty(ring.total, 0)
    return Labels(query_pids, gallery_pids, query_cams, gallery_cams, protocol, queries, gallery)


class Pairs:
    """The same-identity pairs of this rank's queries; of those that are kept, score and entries before them so far."""

    def __init__(self, labels, units, num_queries):
        self.labels, self.units, self.num_queries = labels, units, num_queries
        rows, columns, is_kept = labels.pairs(0, num_queries)
        self.dropped = rows[~is_kept], columns[~is_kept]
        self.rows, self.columns = rows[is_kept], columns[is_kept]
        self.values = units.new_zeros(len(self.rows))
        self.before, self.moved = torch.zeros_like(self.rows), False

    def blocks(self, num_columns):
        """(start, stop, pairs of these queries, slice) of blocks of queries, as `similarity_strips` has them."""
        height = min(strip_height(num_columns, self.units.device), self.units.shape[0]) if self.num_queries else 1
        for start in range(0, self.num_queries, height):
            stop = min(start + height, self.num_queries)
            first, last = torch.searchsorted(self.rows, torch.tensor([start, stop], device=self.rows.device)).tolist()
            yield start, stop, slice(first, last), slice(start, start + height)

    def score(self, offset, shard, num_columns):
        """The scores of the matches in a shard, from products with their rows alone."""
        for start, _, mine, block in self.blocks(num_columns):
            inside = (self.columns[mine] >= offset) & (self.columns[mine] < offset + num_columns)
            places = inside.nonzero().flatten() + mine.start
            wanted, position = (self.columns[places] - offset).unique(return_inverse=True)
            if not len(wanted):
                continue
            some = shard.new_zeros(padded(len(wanted)), shard.shape[1])
            some[: len(wanted)] = shard[wanted]
            with full_precision():
                products = self.units[block] @ some.t()
            self.values[places] = products[self.rows[places] - start, position]

    def begin(self):
        self.before.zero_()
        self.moved = False

    def count(self, offset, shard, num_columns):
        """Add the entries of a shard that come before each match."""
        if not self.num_queries:
            return
        mask = None
        dropped_rows, dropped_columns = self.dropped
        for start, strip in similarity_strips(self.units, self.num_queries, shard, num_columns):
            mask = torch.empty_like(strip, dtype=torch.bool) if mask is None else mask
            stop = start + strip.shape[0]
            first, last = torch.searchsorted(self.rows, torch.tensor([start, stop], device=strip.device)).tolist()
            if first == last:
                continue
            rows, columns = self.rows[first:last] - start, self.columns[first:last] - offset
            inside = (columns >= 0) & (columns < num_columns)
            given = strip[rows[inside], columns[inside]]
            values = self.values[first:last]
            if not torch.equal(given, values[inside]):
                values[inside], self.moved = given, True
            some = (dropped_rows >= start) & (dropped_rows < stop)
            some &= (dropped_columns >= offset) & (dropped_columns < offset + num_columns)
            strip[dropped_rows[some] - start, dropped_columns[some] - offset] = -torch.inf
            ranks = ranks_of_values(strip, rows, columns, values, mask[: strip.shape[0]])
            self.before[first:last] += ranks - 1

    def ranked(self):
        """Rows and ranks of the matches, ascending within a query."""
        ranks = 1 + self.before
        order = ranks.sort(stable=True).indices
        order = order[self.rows[order].sort(stable=True).indices]
        return self.rows[order], ranks[order]
