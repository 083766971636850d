"""Rows of all ranks as one data set, each row's nearest rows in it, and its k-reciprocal vector."""

import torch

from kernels.jaccard import (
    SparseRows,
    expanded_sets,
    fixed_point,
    inverse_largest,
    mean_rows,
    neighbour_weights,
    offsets_of,
    sampled_products,
)
from kernels.neighbours import Neighbours
from kernels.ring import symmetric
from kernels.ring.topk import Best
from kernels.tiles import similarity_strips
from kernels.topk import strip_topk


class AllRows:
    """X: the first part of all ranks (such as the queries), then the second part of all ranks (such as the gallery).

    A rank has its own rows of each part, so the numbers of its rows in X are one or two ranges, in `own`. `units` are
    the unit rows of each part. A part is (name, features).
    """

    def __init__(self, ring, *named_parts):
        self.ring, self.device = ring, ring.device
        self.parts = parts = [features for _, features in named_parts]
        self.counts = [ring.gather(torch.tensor([len(part)])).flatten().tolist() for part in parts]
        numbers = torch.tensor(self.counts)
        # One range a part and rank, in the order of X.
        self.starts = torch.cat([numbers.new_zeros(1), numbers.flatten().cumsum(0)]).to(self.device)
        self.total = int(self.starts[-1])
        self.own = torch.cat([torch.arange(*self.range_of(part, ring.rank)) for part in range(len(parts))])
        self.own = self.own.to(self.device)
        self.units = ring.agree(lambda: [ring.unit(*part) for part in named_parts])

    def range_of(self, part, rank):
        place = part * self.ring.size + rank
        return int(self.starts[place]), int(self.starts[place + 1])

    def owners(self, rows):
        """The rank that has each of these rows of X."""
        return (torch.searchsorted(self.starts, rows, right=True) - 1) % self.ring.size

    def own_blocks(self):
        """(first place among the own rows, number of rows, first number in X, unit rows) of each part with rows."""
        place = 0
        for part, units in enumerate(self.units):
            begin, end = self.range_of(part, self.ring.rank)
            if end > begin:
                yield place, end - begin, begin, units
            place += end - begin

    def shards(self):
        """Yield (first number in X, number of rows, unit rows) of all parts of all ranks, this rank's own first."""
        for rank, tensors in self.ring.rounds(*self.parts):
            for part, rows in enumerate(tensors):
                if len(rows):
                    units = self.units[part] if rank == self.ring.rank else self.ring.unit("features", rows)
                    yield self.range_of(part, rank)[0], len(rows), units

    def gather(self, values):
        """The values of all rows of X from those of the own rows of each rank, in the order of X."""
        sides = values.split([len(part) for part in self.parts])
        gathered = [self.ring.gather_rows(side, counts) for side, counts in zip(sides, self.counts, strict=True)]
        return torch.cat(gathered)

    def fetch(self, sparse, rows):
        """(SparseRows, place in it of each of `rows`) with these rows of X, which may be any rank's.

        `sparse` holds the own rows of this rank. Every rank asks the owners for the distinct rows.
        """
        wanted, places = rows.unique(return_inverse=True)
        owners = self.owners(wanted)
        order = owners.sort(stable=True).indices
        asked = self.ring.swap([wanted[owners == rank] for rank in range(self.ring.size)])
        found = [sparse.take(torch.searchsorted(self.own, numbers)) for numbers in asked]
        counts, columns, values = (
            torch.cat(self.ring.swap([getattr(part, name) for part in found]))
            for name in ("counts", "columns", "values")
        )
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return SparseRows(offsets, columns, values), order.argsort()[places]


def ring_neighbours(rows, k):
    """`Neighbours` of the own rows among all of X; indices are numbers in X."""
    k = min(k, rows.total)
    if symmetric.is_worth_it(rows, k):
        return symmetric.ring_symmetric(rows, k)
    best = Best(rows.ring, k, len(rows.own))
    lowest = torch.full((len(rows.own),), torch.inf, dtype=rows.ring.dtype, device=rows.device)
    for offset, count, shard in rows.shards():
        for place, num_rows, number, units in rows.own_blocks():
            for start, strip in similarity_strips(units, num_rows, shard, count):
                mine = slice(place + start, place + start + strip.shape[0])
                lowest[mine] = torch.minimum(lowest[mine], strip[:, :count].amin(1))
                if number == offset:
                    strip.diagonal(start).fill_(torch.inf)
                scores, indices = strip_topk(strip, min(k, count))
                best.add(mine, scores, indices + offset)
    return Neighbours(best.indices, lowest)


def ring_vectors(rows, k1, k2, compat=None):
    """`jaccard.neighbour_vectors` of the own rows: V' in units of 1 / ONE, the inverse of the largest distances."""
    neighbours = ring_neighbours(rows, max(k1 + 1, k2))
    inverse = inverse_largest(neighbours.lowest)
    small = rows.total <= torch.iinfo(torch.int32).max
    everywhere = rows.gather(neighbours.indices.to(torch.int32 if small else torch.int64))
    by_faiss = compat == "faiss"
    members = expanded_sets(everywhere, max(k1 - 1, 0) if by_faiss else k1, round(k1 / 2), rows.own)
    del everywhere
    scale = torch.ones_like(inverse) if by_faiss else inverse
    weights = neighbour_weights(products_of(rows, members), members, scale, compat == "torchreid")
    if k2 > 1:
        fetched, places = rows.fetch(weights, neighbours.indices[:, :k2])
        return mean_rows(fetched, places, rows.total), inverse
    return SparseRows(weights.offsets, weights.columns, fixed_point(weights.values)), inverse


def products_of(rows, members):
    """The similarities of the entries of `members`: own rows and columns of X."""
    products = torch.zeros(len(members.columns), dtype=rows.ring.dtype, device=rows.device)
    for offset, count, shard in rows.shards():
        for place, num_rows, _, units in rows.own_blocks():
            first = int(members.offsets[place])
            row, column, _ = members.entries(place, place + num_rows)
            inside = ((column >= offset) & (column < offset + count)).nonzero().flatten()
            offsets = torch.searchsorted(row[inside], torch.arange(num_rows + 1, device=rows.device))
            pairs = SparseRows(offsets, column[inside] - offset, row)
            products[first + inside] = sampled_products(units[:num_rows], shard, pairs)
    return products


class Overlaps:
    """Entries of V' of some own rows, in `vectors`; their columns are counted without those that no such row has."""

    def __init__(self, sparse):
        self.columns, places = sparse.columns.unique(return_inverse=True)
        self.vectors = SparseRows(sparse.offsets, places, sparse.values)

    def inverted(self, other):
        """V' of other rows by column, for `jaccard.add_overlaps` with the entries of `vectors`."""
        rows = torch.repeat_interleave(torch.arange(len(other.counts), device=other.columns.device), other.counts)
        places = torch.searchsorted(self.columns, other.columns).clamp(max=len(self.columns) - 1)
        shared = self.columns[places] == other.columns
        places, order = places[shared].sort(stable=True)
        return SparseRows(offsets_of(places, len(self.columns)), rows[shared][order], other.values[shared][order])
