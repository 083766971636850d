"""Overlaps of sparse neighbour vectors with an inverted index: one program for each entry of a query row."""

import torch
import triton
import triton.language as tl

BLOCK = 128


@triton.jit
def overlap_kernel(
    shared, rows, columns, values, offsets, other_rows, other_values, width, BLOCK: tl.constexpr
):  # fmt: skip
    """shared[row, g] += min(V'_row,k, V'_g,k) for all g that have the column k of this entry."""
    entry = tl.program_id(0)
    row = tl.load(rows + entry).to(tl.int64)
    column = tl.load(columns + entry)
    value = tl.load(values + entry)
    first, last = tl.load(offsets + column), tl.load(offsets + column + 1)
    for start in range(first, last, BLOCK):
        places = start + tl.arange(0, BLOCK)
        inside = places < last
        others = tl.load(other_rows + places, mask=inside, other=0)
        smaller = tl.minimum(tl.load(other_values + places, mask=inside, other=0), value)
        # Integers: the sum does not depend on the order of the additions.
        tl.atomic_add(shared + row * width + others, smaller, mask=inside)


def add_overlaps_triton(shared, rows, columns, values, inverted):
    """The same as `add_overlaps` of jaccard.py, in Triton."""
    if rows.numel() == 0:
        return
    with torch.cuda.device_of(shared):
        overlap_kernel[(rows.shape[0],)](
            shared, rows, columns, values, inverted.offsets, inverted.columns, inverted.values, shared.shape[1],
            BLOCK=BLOCK,
        )  # fmt: skip
