"""Each row's nearest rows in the same data set, and its farthest: the N x N search of k-reciprocal methods.

X X^T is symmetric. On the CPU only the tiles on and above the diagonal are computed, and each is used twice: to find
neighbours of its rows among its columns, and of its columns among its rows.
"""

from dataclasses import dataclass

import torch

from .dispatch import full_precision
from .tiles import cosine_reference, descending_key, hits, padded, similarity_strips
from .topk import strip_topk

# Rows and columns of a tile: 4 MiB, so that the steps after the product read it from the cache.
TILE_ROWS, TILE_COLUMNS = 512, 2048
SYMMETRIC_MIN_ROWS = 4096
# A first bound on the k-th best entry is the k-th largest of the maxima of groups of this many entries.
GROUP = 8
NOTHING = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class Neighbours:
    """The first k of each row's order, itself first, ties by lower index; and the smallest similarity of each row."""

    indices: torch.Tensor
    lowest: torch.Tensor


def self_neighbours(units, num_rows, k, path="torch"):
    """Neighbours of the first `num_rows` unit rows among themselves: int64 (N, k) and (N,)."""
    k = min(k, num_rows)
    if path == "triton":
        from .topk_triton import launch_topk

        rows = units[:num_rows]
        _, indices, lowest = launch_topk(rows, rows, k, itself=True)
        return Neighbours(indices, lowest)
    worth_it = num_rows >= SYMMETRIC_MIN_ROWS and k * GROUP <= TILE_ROWS
    if units.device.type == "cpu" and units.dtype == torch.float32 and worth_it:
        return symmetric_neighbours(units, num_rows, k)
    return strip_neighbours(units, num_rows, k)


def self_neighbours_reference(features, k):
    """The definition, dense."""
    similarities = cosine_reference(features, features)
    lowest = similarities.amin(1)
    similarities.fill_diagonal_(torch.inf)
    return Neighbours(similarities.sort(dim=1, descending=True, stable=True).indices[:, :k], lowest)


def strip_neighbours(units, num_rows, k):
    """Neighbours from all tiles, one strip of rows at a time."""
    indices = torch.empty(num_rows, k, dtype=torch.int64, device=units.device)
    lowest = torch.empty(num_rows, dtype=units.dtype, device=units.device)
    for start, strip in similarity_strips(units, num_rows, units, num_rows):
        stop = start + strip.shape[0]
        lowest[start:stop] = strip[:, :num_rows].amin(1)
        strip.diagonal(start).fill_(torch.inf)
        indices[start:stop] = strip_topk(strip, k)[1]
    return Neighbours(indices, lowest)


def symmetric_neighbours(units, num_rows, k, tile_rows=TILE_ROWS, tile_columns=TILE_COLUMNS):
    """Neighbours from the tiles on and above the diagonal only; `tile_columns` is a multiple of `tile_rows`."""
    rows = BestOfRows(units, num_rows, k, 0, tile_columns)
    add_triangle(Tiles(tile_rows, tile_columns), rows)
    return rows.neighbours()


def add_triangle(tiles, rows):
    """Use the tiles on and above the diagonal of `BestOfRows` with themselves."""
    num_rows = rows.num_rows
    for top in range(0, num_rows, tiles.num_rows):
        bottom = min(top + tiles.num_rows, num_rows)
        block = rows.units[top : top + padded(bottom - top)]
        rows.best.settle(top)
        left = top
        while left < num_rows:
            # First the rest of the chunk of columns that contains the diagonal, then whole chunks.
            right = min((left // tiles.num_columns + 1) * tiles.num_columns, num_rows)
            tile, mask = tiles.product(block, rows.units[left : left + padded(right - left)])
            # Within the diagonal block, the pairs are handled in both directions as rows.
            inner = bottom - left if left < bottom else 0
            rows.add_both(rows, tile, mask, (top, bottom), (left, right), inner)
            left = right


def add_rectangle(tiles, rows, others, begin=0, end=None, left=0):
    """Use the tiles of the rows begin:end of a `BestOfRows` and the rows of another one from `left` on."""
    end = rows.num_rows if end is None else end
    for top in range(begin, end, tiles.num_rows):
        bottom = min(top + tiles.num_rows, end)
        block = rows.units[top : top + padded(bottom - top)]
        start = left
        while start < others.num_rows:
            stop = min((start // tiles.num_columns + 1) * tiles.num_columns, others.num_rows)
            tile, mask = tiles.product(block, others.units[start : start + padded(stop - start)])
            rows.add_both(others, tile, mask, (top, bottom), (start, stop))
            start = stop


class Tiles:
    """Buffers for the tiles of a product, which are reused."""

    def __init__(self, num_rows=TILE_ROWS, num_columns=TILE_COLUMNS):
        self.num_rows, self.num_columns = num_rows, num_columns
        self.buffer = torch.empty(num_rows * num_columns)
        self.mask = torch.empty(num_rows * num_columns, dtype=torch.bool)

    def product(self, block, others):
        shape = block.shape[0], others.shape[0]
        tile, mask = (memory[: shape[0] * shape[1]].view(shape) for memory in (self.buffer, self.mask))
        with full_precision():
            torch.mm(block, others.t(), out=tile)
        return tile, mask


class BestOfRows:
    """The nearest rows so far, and the lowest similarity, of rows whose numbers in the data set start at `first`."""

    def __init__(self, units, num_rows, k, first, chunk=TILE_COLUMNS, ascending=True):
        self.units, self.num_rows, self.first = units, num_rows, first
        self.best, self.lowest = RunningBest(num_rows, k, chunk, ascending), torch.full((num_rows,), torch.inf)

    def neighbours(self):
        return Neighbours(self.best.indices(), self.lowest)

    def add_both(self, others, tile, mask, rows, columns, skip=0):
        """Use a tile of these rows (begin, end) and columns of `others` (begin, end) as neighbours of both.

        The first `skip` columns are the rows themselves, in a block on the diagonal.
        """
        (top, bottom), (left, right) = rows, columns
        used = tile[: bottom - top, : right - left]
        self.lowest[top:bottom] = torch.minimum(self.lowest[top:bottom], used.amin(1))
        others.lowest[left:right] = torch.minimum(others.lowest[left:right], used.amin(0))
        tile[bottom - top :] = -torch.inf
        tile[:, right - left :] = -torch.inf
        if skip:
            tile.diagonal().fill_(torch.inf)
        self.best.add_rows(tile, mask, top, others.first + left)
        others.best.add_columns(tile, mask, self.first + top, left, skip)


class RunningBest:
    """The k best (similarity, lower index) of every row so far, and entries that still have to be merged."""

    def __init__(self, num_rows, k, chunk, ascending=True):
        """`ascending`: of two entries that are equal to a row's worst one, the lower index is always added first."""
        self.k, self.chunk, self.ascending = k, chunk, ascending
        # Keys in ascending order: the reversed similarity is in the upper half, the index in the lower half.
        self.keys = torch.full((num_rows, k), NOTHING)
        self.floor = torch.full((num_rows,), -torch.inf)
        self.waiting = {}

    def indices(self):
        return self.keys & 0xFFFFFFFF

    def finish(self):
        """Merge all waiting entries."""
        for number in list(self.waiting):
            self._merge_chunk(number)

    def join(self, keys):
        """Merge the keys of other neighbours of the same rows."""
        self.keys = torch.cat([self.keys, keys], dim=1).sort(dim=1).values[:, : self.k].contiguous()

    def settle(self, row):
        """Merge all waiting entries of the chunk of this row."""
        self._merge_chunk(row // self.chunk)

    def add_rows(self, tile, mask, top, left):
        """Add the tile's columns, which have numbers from `left` on, as neighbours of its rows from `top` on."""
        num_rows = min(tile.shape[0], self.keys.shape[0] - top)
        floor = tile.new_full((tile.shape[0], 1), torch.inf)
        floor[:num_rows, 0] = self.floor[top : top + num_rows]
        if torch.isneginf(floor).any() and tile.shape[1] >= self.k * GROUP:
            groups = tile.view(tile.shape[0], -1, GROUP).amax(2)
            floor = torch.maximum(floor, just_below(groups.topk(self.k, dim=1).values[:, -1:]))
        rows, columns, places = hits(torch.gt(tile, floor, out=mask))
        self._merge(top, rows, columns + left, tile.view(-1)[places], num_rows)

    def add_columns(self, tile, mask, top, left, skip):
        """Add the tile's rows, which have numbers from `top` on, as neighbours of its columns from `left` on.

        The first `skip` columns are left out.
        """
        num_columns = min(tile.shape[1], self.keys.shape[0] - left)
        if skip >= num_columns:
            return
        floor = tile.new_full((tile.shape[1],), torch.inf)
        floor[skip:num_columns] = self.floor[left + skip : left + num_columns]
        if torch.isneginf(floor).any() and tile.shape[0] >= self.k * GROUP:
            groups = tile.view(-1, GROUP, tile.shape[1]).amax(1)
            floor = torch.maximum(floor, just_below(groups.t().contiguous().topk(self.k, dim=1).values[:, -1]))
        rows, columns, places = hits(torch.gt(tile, floor, out=mask))
        number = left // self.chunk
        waiting = self.waiting.setdefault(number, [])
        waiting.append((columns + (left - number * self.chunk), rows + top, tile.view(-1)[places]))
        if sum(part[0].shape[0] for part in waiting) > self.k * self.chunk:
            self._merge_chunk(number)

    def _merge_chunk(self, number):
        waiting = self.waiting.pop(number, None)
        if waiting:
            rows, columns, values = (torch.cat(parts) for parts in zip(*waiting, strict=True))
            rows, order = rows.sort(stable=True)
            top = number * self.chunk
            self._merge(top, rows, columns[order], values[order], min(self.chunk, self.keys.shape[0] - top))

    def _merge(self, top, rows, columns, values, num_rows):
        """Merge entries that are sorted by row; rows are numbered from `top`."""
        if rows.shape[0] == 0:
            return
        # Keys are signed: the descending key moves down by half its range.
        keys = ((descending_key(values) - (1 << 31)) << 32) + columns
        counts = torch.bincount(rows, minlength=num_rows)
        places = places_in_rows(rows, counts)
        if int(counts.max()) > 8 * self.k:
            # Rows with many equal entries: only the k best of each are merged.
            keys, order = keys.sort()
            rows, order = rows[order].sort(stable=True)
            keys = keys[order]
            keep = places < self.k
            rows, keys, places = rows[keep], keys[keep], places[keep]
            counts.clamp_(max=self.k)
        # Rows with many entries are merged in several rounds, so that the other rows are not padded to their length.
        width = 2 * self.k
        for begin in range(0, int(counts.max()), width):
            touched = (counts > begin).nonzero().flatten()
            number = torch.empty(num_rows, dtype=torch.int64)
            number[touched] = torch.arange(touched.shape[0])
            some = (places >= begin) & (places < begin + width)
            spread = min(width, int(counts.max()) - begin)
            offered = torch.full((touched.shape[0], self.k + spread), NOTHING)
            offered[:, : self.k] = self.keys[top + touched]
            offered[number[rows[some]], self.k + places[some] - begin] = keys[some]
            merged = offered.sort(dim=1).values[:, : self.k]
            self.keys[top + touched] = merged
        worst = self.keys[top : top + num_rows, -1]
        is_full = worst != NOTHING
        floor = value_of_key(worst[is_full])
        self.floor[top : top + num_rows][is_full] = floor if self.ascending else just_below(floor)


def places_in_rows(rows, counts):
    """The place of each entry within its row, for entries in the order of their rows."""
    return torch.arange(rows.shape[0]) - (counts.cumsum(0) - counts)[rows]


def just_below(values):
    return torch.nextafter(values, torch.full_like(values, -torch.inf))


def value_of_key(keys):
    """The similarity in the upper half of a key."""
    ascending = ~(keys >> 32).to(torch.int32)
    bits = ascending ^ ((ascending >> 31) & 0x7FFFFFFF)
    return bits.view(torch.float32)
