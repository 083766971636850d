"""Fused cosine similarity, running top-k and row minimum: similarities are not written to memory."""

import torch
import triton
import triton.language as tl

from .dispatch import full_precision
from .tiles_triton import paired_inputs, similarity_tile, splits


# As the ranking's kernels: not compiled for each kind of a number of rows.
@triton.jit(do_not_specialize=["num_rows", "num_columns"])
def topk_kernel(
    queries, gallery, query_scale, gallery_scale, keys_out, lowest_out, num_rows, num_columns, depth, per_split,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, K: tl.constexpr, ITSELF: tl.constexpr,
    SCALED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The K best keys of each row, in no order, among `per_split` columns; and the smallest similarity."""
    row_block, split = tl.program_id(0), tl.program_id(1)
    rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    nothing = -9223372036854775807
    # Distinct placeholders, so that exactly one entry is replaced at a time.  [BLOCK_M, K]
    best = nothing + tl.zeros((BLOCK_M, K), dtype=tl.int64) + tl.arange(0, K)[None, :]
    worst = tl.min(best, axis=1)
    lowest = tl.full((BLOCK_M,), float("inf"), dtype=tl.float32)
    first = split * per_split
    for left in range(first, tl.minimum(first + per_split, num_columns), BLOCK_N):
        columns = left + tl.arange(0, BLOCK_N)
        tile = similarity_tile(
            queries, gallery, query_scale, gallery_scale, rows, columns, num_rows, num_columns, depth,
            BLOCK_M, BLOCK_N, BLOCK_K, SCALED, PRECISION,
        )  # fmt: skip
        inside = (columns < num_columns)[None, :]
        lowest = tl.minimum(lowest, tl.min(tl.where(inside, tile, float("inf")), axis=1))
        if ITSELF:
            tile = tl.where(rows[:, None] == columns[None, :], float("inf"), tile)
        bits = tile.to(tl.int32, bitcast=True)
        ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        # Larger keys are better: similarity in the upper half, reversed column in the lower.  [BLOCK_M, BLOCK_N]
        keys = (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - columns).to(tl.int64)[None, :]
        keys = tl.where(inside & (rows < num_rows)[:, None], keys, nothing)
        largest = tl.max(keys, axis=1)
        # Most tiles have no entry better than a row's worst; in the others the best entries are taken one by one.
        while tl.max((largest > worst).to(tl.int32), axis=0) > 0:
            improved = largest > worst
            replaced = (best == worst[:, None]) & improved[:, None]
            best = tl.where(replaced, largest[:, None], best)
            keys = tl.where(keys == largest[:, None], nothing, keys)
            worst = tl.min(best, axis=1)
            largest = tl.max(keys, axis=1)
    places = split.to(tl.int64) * num_rows + rows
    tl.store(
        keys_out + places[:, None] * K + tl.arange(0, K)[None, :], best, mask=(rows < num_rows)[:, None]
    )  # fmt: skip
    tl.store(lowest_out + places, lowest, mask=rows < num_rows)


def launch_topk(queries, gallery, k, itself=False, precision="ieee"):
    """Scores (Q, k), indices (Q, k) and the smallest similarity of each row (Q,)."""
    with full_precision():
        queries, gallery = paired_inputs(queries, gallery, precision)
    return launch_topk_on(queries, gallery, k, itself)


def launch_topk_on(queries, gallery, k, itself):
    config = queries.config
    num_rows, num_columns = queries.num_rows, gallery.num_rows
    width = max(16, triton.next_power_of_2(k))
    row_blocks, column_blocks = triton.cdiv(num_rows, config["BLOCK_M"]), triton.cdiv(num_columns, config["BLOCK_N"])
    parts = splits(row_blocks, column_blocks)
    per_split = triton.cdiv(column_blocks, parts) * config["BLOCK_N"]
    parts = triton.cdiv(num_columns, per_split)
    keys = torch.empty(parts, num_rows, width, dtype=torch.int64, device=queries.rows.device)
    lowest = torch.empty(parts, num_rows, dtype=torch.float32, device=queries.rows.device)
    with torch.cuda.device_of(queries.rows):
        topk_kernel[(row_blocks, parts)](
            queries.rows, gallery.rows, queries.scale, gallery.scale, keys, lowest,
            num_rows, num_columns, queries.depth, per_split,
            K=width, ITSELF=itself, SCALED=queries.scaled, PRECISION=queries.precision, **config,
        )  # fmt: skip
    keys = keys.transpose(0, 1).reshape(num_rows, -1).sort(dim=1, descending=True).values[:, :k]
    ordered = (keys >> 32).to(torch.int32)
    scores = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)
    return scores, 0x7FFFFFFF - (keys & 0xFFFFFFFF), lowest.amin(0)
