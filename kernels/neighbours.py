"""Each row's nearest rows in the same data set, and its farthest: the N x N search of k-reciprocal methods.

X X^T is symmetric. On the CPU only the tiles on and above the diagonal are computed, and each is used twice: to find
neighbours of its rows among its columns, and of its columns among its rows.
"""

from dataclasses import dataclass

import torch

from .dispatch import full_precision
from .tiles import cosine_reference, descending_key, hits, similarity_strips
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
    best = RunningBest(num_rows, k, tile_columns)
    lowest = torch.full((num_rows,), torch.inf)
    buffer = torch.empty(tile_rows * tile_columns)
    mask_buffer = torch.empty(tile_rows * tile_columns, dtype=torch.bool)
    for top in range(0, num_rows, tile_rows):
        bottom = min(top + tile_rows, num_rows)
        block = units[top : top + tile_rows]
        best.settle(top)
        left = top
        while left < num_rows:
            # First the rest of the chunk of columns that contains the diagonal, then whole chunks.
            right = min((left // tile_columns + 1) * tile_columns, num_rows)
            others = units[left : left + (right - left + 63) // 64 * 64]
            shape = block.shape[0], others.shape[0]
            tile = buffer[: shape[0] * shape[1]].view(shape)
            mask = mask_buffer[: tile.numel()].view(shape)
            with full_precision():
                torch.mm(block, others.t(), out=tile)
            used = tile[: bottom - top, : right - left]
            lowest[top:bottom] = torch.minimum(lowest[top:bottom], used.amin(1))
            lowest[left:right] = torch.minimum(lowest[left:right], used.amin(0))
            tile[bottom - top :] = -torch.inf
            tile[:, right - left :] = -torch.inf
            if left == top:
                tile.diagonal().fill_(torch.inf)
            best.add_rows(tile, mask, top, left)
            # `add_rows` has handled the pairs within the diagonal block in both directions.
            inner = bottom - left if left < bottom else 0
            best.add_columns(tile, mask, top, left, inner)
            left = right
    return Neighbours(best.indices(), lowest)


class RunningBest:
    """The k best (similarity, lower index) of every row so far, and entries that still have to be merged."""

    def __init__(self, num_rows, k, chunk):
        self.k, self.chunk = k, chunk
        # Keys in ascending order: the reversed similarity is in the upper half, the index in the lower half.
        self.keys = torch.full((num_rows, k), NOTHING)
        self.floor = torch.full((num_rows,), -torch.inf)
        self.waiting = {}

    def indices(self):
        return self.keys & 0xFFFFFFFF

    def settle(self, row):
        """Merge all waiting entries of the chunk of this row."""
        self._merge_chunk(row // self.chunk)

    def add_rows(self, tile, mask, top, left):
        """Add the tile's columns (numbered from `left`) as neighbours of its rows (numbered from `top`)."""
        num_rows = min(tile.shape[0], self.keys.shape[0] - top)
        floor = tile.new_full((tile.shape[0], 1), torch.inf)
        floor[:num_rows, 0] = self.floor[top : top + num_rows]
        if torch.isneginf(floor).any() and tile.shape[1] >= self.k * GROUP:
            groups = tile.view(tile.shape[0], -1, GROUP).amax(2)
            floor = torch.maximum(floor, just_below(groups.topk(self.k, dim=1).values[:, -1:]))
        rows, columns, places = hits(torch.gt(tile, floor, out=mask))
        self._merge(top, rows, columns + left, tile.view(-1)[places], num_rows)

    def add_columns(self, tile, mask, top, left, skip):
        """Add the tile's rows as neighbours of its columns, except the first `skip` columns."""
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
        self.floor[top : top + num_rows][is_full] = value_of_key(worst[is_full])


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
