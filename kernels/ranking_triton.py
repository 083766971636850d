"""Fused cosine similarity and rank counting: similarities are not written to memory.

Queries and gallery are sorted by identity, so the matches of a block of queries are in a few tiles. One kernel reads
their scores from these tiles, another counts the items before each match in all tiles.
"""

import torch
import triton
import triton.language as tl

from .dispatch import full_precision
from .tiles import expand_ranges, row_groups
from .tiles_triton import paired_inputs, similarity_tile, splits

# Matches of all queries that are looked at together.
PAIR_LIMIT = 1 << 22
# Numbers of rows differ from call to call, and a kernel is not to be compiled for each kind of them.
SIZES = ["num_rows", "num_columns"]


@triton.jit(do_not_specialize=SIZES)
def match_scores_kernel(
    queries, gallery, query_scale, gallery_scale, starts, counts, slots, scores_out, num_rows, num_columns, depth,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of the columns starts[i] .. starts[i] + counts[i] of each row, from slots[i] on."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = rows < num_rows
    start = tl.load(starts + rows, mask=valid, other=0).to(tl.int32)
    count = tl.load(counts + rows, mask=valid, other=0).to(tl.int32)
    # The slots of a block are adjacent: offsets from the first slot fit 32 bits and need half the registers.
    slot = tl.load(slots + rows, mask=valid, other=9223372036854775807)
    base = tl.min(slot, axis=0)
    shift = tl.where(valid, slot - base, 0).to(tl.int32)
    first = tl.min(tl.where(count > 0, start, num_columns), axis=0)
    last = tl.max(tl.where(count > 0, start + count, 0), axis=0)
    # Start at a tile's border, as in the counting kernel.
    for left in range(first // BLOCK_N * BLOCK_N, last, BLOCK_N):
        columns = left + tl.arange(0, BLOCK_N)
        overlap = tl.minimum(start + count, left + BLOCK_N) - tl.maximum(start, left)
        if tl.max(overlap, axis=0) > 0:
            tile = similarity_tile(
                queries, gallery, query_scale, gallery_scale, rows, columns, num_rows, num_columns, depth,
                BLOCK_M, BLOCK_N, BLOCK_K, SCALED, PRECISION,
            )  # fmt: skip
            place = columns[None, :] - start[:, None]
            selected = (place >= 0) & (place < count[:, None])
            tl.store(scores_out + base + (shift[:, None] + place), tile, mask=selected)


@triton.jit(do_not_specialize=SIZES)
def count_kernel(
    queries, gallery, query_scale, gallery_scale, query_pids, gallery_pids, order, begins, ends, scores, indices,
    counts_out, num_rows, num_columns, depth, per_split,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the number of items of other identities before each match to its count."""
    row_block, split = tl.program_id(0), tl.program_id(1)
    rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = rows < num_rows
    begin = tl.load(begins + rows, mask=valid, other=0)
    end = tl.load(ends + rows, mask=valid, other=0)
    query_pid = tl.load(query_pids + rows, mask=valid, other=-1)
    longest = tl.max(end - begin, axis=0)
    first = split * per_split
    for left in range(first, tl.minimum(first + per_split, num_columns), BLOCK_N):
        columns = left + tl.arange(0, BLOCK_N)
        tile = similarity_tile(
            queries, gallery, query_scale, gallery_scale, rows, columns, num_rows, num_columns, depth,
            BLOCK_M, BLOCK_N, BLOCK_K, SCALED, PRECISION,
        )  # fmt: skip
        inside = columns < num_columns
        gallery_pid = tl.load(gallery_pids + columns, mask=inside, other=-1)
        index = tl.load(order + columns, mask=inside, other=0)
        # Matches and dropped items have the query's identity: their order among themselves needs no product.
        is_other = inside[None, :] & (query_pid[:, None] != gallery_pid[None, :])
        tile = tl.where(is_other, tile, float("-inf"))
        # From the worst match to better ones, until no item of the tile is before any row's match.
        step = longest * 0
        searching = longest > 0
        while searching:
            place = end - 1 - step
            has_match = valid & (place >= begin)
            score = tl.load(scores + place, mask=has_match, other=float("inf"))
            match_index = tl.load(indices + place, mask=has_match, other=0)
            ahead = (tile > score[:, None]) | ((tile == score[:, None]) & (index[None, :] < match_index[:, None]))
            number = tl.sum(ahead.to(tl.int32), axis=1)
            tl.atomic_add(counts_out + place, number, mask=has_match & (number > 0))
            step += 1
            searching = (tl.max(number, axis=0) > 0) & (step < longest)


def match_ranks_triton(queries, gallery, labels, precision="ieee"):
    """Query of each kept match and its rank: queries ascending, ranks ascending within a query."""
    with full_precision():
        queries, gallery = paired_inputs(queries, gallery, precision)
    by_pid = labels.query_pids.sort(stable=True).indices
    queries, gallery = queries.take(by_pid), gallery.take(labels.order)
    found = [
        ranks_of(queries.take(slice(begin, end)), gallery, labels, by_pid[begin:end])
        for begin, end in row_groups(labels.counts[by_pid].cpu(), PAIR_LIMIT)
    ]
    rows, ranks = (torch.cat(parts) for parts in zip(*found, strict=True))
    order = rows.argsort(stable=True)
    return rows[order], ranks[order]


def ranks_of(queries, gallery, labels, by_pid):
    """Query and rank of the matches of some queries, whose numbers are `by_pid`; the gallery is sorted by identity."""
    config, device = queries.config, queries.rows.device
    starts, counts = labels.starts[by_pid], labels.counts[by_pid]
    slots = counts.cumsum(0) - counts
    rows, places = expand_ranges(starts, counts)
    if rows.numel() == 0:
        return rows, rows
    num_rows, num_columns = queries.num_rows, gallery.num_rows
    row_blocks, column_blocks = triton.cdiv(num_rows, config["BLOCK_M"]), triton.cdiv(num_columns, config["BLOCK_N"])
    scores = torch.empty(rows.shape[0], dtype=torch.float32, device=device)
    tile_arguments = queries.rows, gallery.rows, queries.scale, gallery.scale
    flags = {"SCALED": queries.scaled, "PRECISION": queries.precision, **config}
    with torch.cuda.device_of(queries.rows):
        match_scores_kernel[(row_blocks,)](
            *tile_arguments, starts, counts, slots, scores, num_rows, num_columns, queries.depth, **flags
        )  # fmt: skip

    # The kept matches of each query, best first, equal scores by gallery index.
    indices = labels.order[places]
    is_kept = labels.keeps(by_pid[rows], indices)
    rows, indices, scores = rows[is_kept], indices[is_kept], scores[is_kept]
    order = indices.argsort(stable=True)
    order = order[scores[order].argsort(descending=True, stable=True)]
    order = order[rows[order].argsort(stable=True)]
    rows, indices, scores = rows[order], indices[order], scores[order]
    kept_counts = torch.bincount(rows, minlength=num_rows)
    ends = kept_counts.cumsum(0)
    begins = ends - kept_counts
    before = torch.zeros(rows.shape[0], dtype=torch.int32, device=device)
    parts = splits(row_blocks, column_blocks)
    per_split = triton.cdiv(column_blocks, parts) * config["BLOCK_N"]
    with torch.cuda.device_of(queries.rows):
        count_kernel[(row_blocks, triton.cdiv(num_columns, per_split))](
            *tile_arguments, labels.query_pids[by_pid], labels.gallery_pids[labels.order], labels.order, begins, ends,
            scores, indices, before, num_rows, num_columns, queries.depth, per_split, **flags,
        )  # fmt: skip
    return by_pid[rows], before.long() + 1 + torch.arange(rows.shape[0], device=device) - begins[rows]
