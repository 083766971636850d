"""mAP, CMC and mINP of the queries of all ranks in the gallery of all ranks.

The rank of a match is one more than the entries before it, counted shard by shard. Its score must be known before the
first shard is counted: it is computed first, from the query rows and the matches' rows alone, and compared with what
the shard gives, bit by bit. Should a product of another shape be summed in another order, the counting is repeated.
"""

import torch

from kernels.counting import ranks_of_values
from kernels.dispatch import check_count, check_ids, requested
from kernels.ranking import Labels, SingleShot, Tally, first_rank_curve
from kernels.ring.processes import Ring
from kernels.tiles import padded, strip_height

# Of counting, at most.
PASSES = 3


def ring_metrics(
    queries, gallery, query_pids, gallery_pids, query_cams, gallery_cams, *, max_rank, protocol, backend, seed, group
):
    """`rank_metrics` under a group: the same RankMetrics of all queries on every rank."""
    ring = Ring(group, queries, gallery)
    max_rank = ring.agree(lambda: check_count("max_rank", max_rank, 1))
    given = query_pids, gallery_pids, query_cams, gallery_cams
    labels = ring.agree(lambda: own_labels(ring, *given))
    ring.agree(lambda: refuse_triton(backend))
    units = ring.units()

    def shards():
        for offset, rows in ring.shards():
            yield CosineShard(units, offset, ring.unit("gallery", rows), len(rows))

    return counted_metrics(ring, labels, shards, protocol, max_rank, seed)


def refuse_triton(backend):
    """Triton's kernels rank within one gallery; their scores are not those of the products here."""
    backend, source = requested(backend)
    if backend == "triton":
        raise ValueError(f"{source} cannot run under a group or on disk: ranks are counted by products of torch")


def counted_metrics(ring, labels, shards, protocol, max_rank, seed):
    """RankMetrics of the queries of all ranks; `shards()` goes through the shards of all, once for each call."""
    labels = labels_of_all(ring, labels, protocol)
    pairs = Pairs(labels, len(ring.queries), ring.device, ring.dtype)
    drawn = DrawnMatches(ring, pairs, labels, max_rank, seed) if protocol == "cuhk03" else None
    for shard in shards():
        pairs.score(shard)
    # On a card a matrix product of another shape may round a match's score in another way: counted again. Where even
    # the same product rounds differently, the last pass counts.
    for _ in range(PASSES):
        pairs.begin()
        if drawn:
            drawn.begin()
        for shard in shards():
            for start, strip in shard.strips():
                pairs.count(shard, start, strip)
                if drawn:
                    drawn.count(shard, start, strip)
        if not ring.any(pairs.moved):
            break
    tally = Tally(labels)
    tally.add(*pairs.ranked())
    for name in ("ap", "inp", "first"):
        setattr(tally, name, ring.gather_rows(getattr(tally, name), ring.query_counts))
    # The error where no query has a match shows those of all ranks.
    for name in ("query_pids", "query_cams"):
        if getattr(labels, name) is not None:
            setattr(labels, name, ring.gather_rows(getattr(labels, name), ring.query_counts))
    return tally.metrics(max_rank, "torch", drawn)


def own_labels(ring, query_pids, gallery_pids, query_cams, gallery_cams):
    """This rank's checked identities and cameras, in the order of `Labels`; cameras may be None."""
    sides = (ring.queries, query_pids, query_cams, "query"), (ring.gallery, gallery_pids, gallery_cams, "gallery")
    return [
        None if ids is None else check_ids(f"{side}_{name}", ids, len(features), ring.device)
        for name, place in (("pids", 1), ("cams", 2))
        for features, ids, side in ((given[0], given[place], given[3]) for given in sides)
    ]


def labels_of_all(ring, labels, protocol):
    query_pids, gallery_pids, query_cams, gallery_cams = labels
    gallery_pids = ring.gather_rows(gallery_pids, ring.counts)
    has_cameras = query_cams is not None and gallery_cams is not None
    if ring.any(has_cameras) and ring.any(not has_cameras):
        raise ValueError("some processes have cameras and others have none; give all ranks the cameras of their rows")
    if has_cameras:
        gallery_cams = ring.gather_rows(gallery_cams, ring.counts)
    gallery_cams = gallery_cams if has_cameras else None
    # Only the numbers of rows and the device of the features count.
    sides = (torch.empty(count, 0, device=ring.device) for count in (len(ring.queries), ring.total))
    return Labels(query_pids, gallery_pids, query_cams, gallery_cams, protocol, *sides)


class CosineShard:
    """Gallery rows of one rank: `strips` and `values` give their similarities to this rank's queries."""

    def __init__(self, units, offset, rows, count):
        self.units, self.offset, self.rows, self.count = units, offset, rows, count

    def strips(self):
        return self.units.strips(self.rows, self.count)

    def values(self, begin, end, columns):
        """Yield (first query, values of some queries of begin:end and these rows of the shard)."""
        some = self.rows.new_zeros(padded(len(columns), self.rows.dtype), self.rows.shape[1])
        some[: len(columns)] = self.rows[columns]
        return self.units.strips(some, len(columns), begin, end)


class Pairs:
    """The same-identity pairs of this rank's queries; of those that are kept, score and entries before them so far."""

    def __init__(self, labels, num_queries, device, dtype):
        self.num_queries = num_queries
        rows, columns, is_kept = labels.pairs(0, num_queries)
        self.dropped = rows[~is_kept], columns[~is_kept]
        self.rows, self.columns = rows[is_kept], columns[is_kept]
        self.values = torch.zeros(len(self.rows), dtype=dtype, device=device)
        self.before, self.moved = torch.zeros_like(self.rows), False

    def of(self, start, stop):
        """The slice of the pairs of the queries start:stop."""
        ends = torch.tensor([start, stop], device=self.rows.device)
        return slice(*torch.searchsorted(self.rows, ends).tolist())

    def score(self, shard):
        """The scores of the matches in a shard, from their rows alone."""
        height = strip_height(shard.count, self.rows.device, self.values.dtype)
        for start in range(0, self.num_queries, height):
            stop = min(start + height, self.num_queries)
            some = self.of(start, stop)
            inside = (self.columns[some] >= shard.offset) & (self.columns[some] < shard.offset + shard.count)
            places = inside.nonzero().flatten() + some.start
            if not len(places):
                continue
            wanted, position = (self.columns[places] - shard.offset).unique(return_inverse=True)
            for first, strip in shard.values(start, stop, wanted):
                mine = (self.rows[places] >= first) & (self.rows[places] < first + strip.shape[0])
                self.values[places[mine]] = strip[self.rows[places[mine]] - first, position[mine]]

    def begin(self):
        self.before.zero_()
        self.moved, self.mask = False, None

    def count(self, shard, start, strip):
        """Add the entries of a strip of a shard that come before each match; dropped entries become -inf."""
        if self.mask is None or self.mask.shape[0] < strip.shape[0] or self.mask.shape[1] != strip.shape[1]:
            self.mask = torch.empty_like(strip, dtype=torch.bool)
        some = self.of(start, start + strip.shape[0])
        if some.start == some.stop:
            return
        rows, columns = self.rows[some] - start, self.columns[some] - shard.offset
        inside = (columns >= 0) & (columns < shard.count)
        given, values = strip[rows[inside], columns[inside]], self.values[some]
        if not torch.equal(given, values[inside]):
            values[inside], self.moved = given, True
        rows_dropped, columns_dropped = self.dropped[0] - start, self.dropped[1] - shard.offset
        out = (rows_dropped >= 0) & (rows_dropped < strip.shape[0])
        out &= (columns_dropped >= 0) & (columns_dropped < shard.count)
        strip[rows_dropped[out], columns_dropped[out]] = -torch.inf
        self.before[some] += ranks_of_values(strip, rows, columns, values, self.mask[: strip.shape[0]]) - 1

    def ranked(self):
        """Rows and ranks of the matches, ascending within a query."""
        ranks = 1 + self.before
        order = ranks.sort(stable=True).indices
        order = order[self.rows[order].sort(stable=True).indices]
        return self.rows[order], ranks[order]


class DrawnMatches:
    """CMC of the cuhk03 protocol: the drawn images of all gallery identities before each query's drawn match."""

    def __init__(self, ring, pairs, labels, max_rank, seed):
        first = sum(ring.query_counts[: ring.rank])
        self.ring, self.pairs, self.max_rank = ring, pairs, max_rank
        draws = SingleShot(labels, max_rank, seed, total=sum(ring.query_counts), first=first)
        self.chosen, self.pids, self.query_pids = draws.chosen, draws.pids, draws.query_pids
        counts = torch.bincount(pairs.rows, minlength=pairs.num_queries)
        self.valid = counts > 0
        starts = counts.cumsum(0) - counts
        # (repeats, valid queries): the place of the drawn match among the pairs.
        self.matches = (starts + (draws.own_draws * counts).long())[:, self.valid]
        self.queries = self.valid.nonzero().flatten()

    def begin(self):
        self.before = torch.zeros_like(self.matches)

    def count(self, shard, start, strip):
        first, last = torch.searchsorted(
            self.queries, torch.tensor([start, start + strip.shape[0]], device=strip.device)
        ).tolist()
        rows = self.queries[first:last]
        scores = strip[rows - start]
        for chosen, matches, before in zip(self.chosen, self.matches, self.before, strict=True):
            inside = (chosen >= shard.offset) & (chosen < shard.offset + shard.count)
            columns, own = chosen[inside], matches[first:last]
            values, places = self.pairs.values[own][:, None], self.pairs.columns[own][:, None]
            entries = scores[:, columns - shard.offset]
            is_before = (entries > values) | ((entries == values) & (columns < places))
            others = self.pids[inside][None] != self.query_pids[rows][:, None]
            before[first:last] += (is_before & others).sum(1)

    def cmc(self, num_valid):
        curve = sum(first_rank_curve(1 + before, self.max_rank) for before in self.before)
        return self.ring.gather(curve).sum(0) / (num_valid * len(self.before))
