"""The tile of similarities that all Triton kernels share. Imported only where Triton runs.

Kernels that compute the same tile use this function with the same block sizes, so its entries have the same bits: the
score of a match in one kernel equals its score in the other.
"""

import torch
import triton
import triton.language as tl

from .dispatch import interpreting
from .tiles import raise_on_bad_rows, unit_rows

# Rows, columns and depth of a tile, warps, stages: at most 96 KiB of shared memory, so that Ada and Ampere cards with
# 100 KiB run them too. float32 products without tensor cores need the registers of smaller tiles.
FLOAT_CONFIG = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "num_warps": 8, "num_stages": 3}
HALF_CONFIG = {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 2}
PRECISIONS = ("ieee", "tf32x3")
# The number of programs that keeps a card busy; with too few rows, the gallery is split.
WANTED_PROGRAMS = 1024


@triton.jit
def similarity_tile(
    queries, gallery, query_scale, gallery_scale, rows, columns, num_rows, num_columns, depth,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """<q_i, g_j>, [BLOCK_M, BLOCK_N] in float32, times both scales where the rows are not of unit length."""
    steps = tl.arange(0, BLOCK_K)
    row_start = rows.to(tl.int64) * depth
    column_start = columns.to(tl.int64) * depth
    tile = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, depth, BLOCK_K):
        inside = start + steps < depth
        left = tl.load(
            queries + row_start[:, None] + (start + steps)[None, :],
            mask=(rows < num_rows)[:, None] & inside[None, :], other=0.0,
        )  # fmt: skip
        right = tl.load(
            gallery + column_start[None, :] + (start + steps)[:, None],
            mask=(columns < num_columns)[None, :] & inside[:, None], other=0.0,
        )  # fmt: skip
        tile = tl.dot(left, right, tile, input_precision=PRECISION)
    if SCALED:
        left_scale = tl.load(query_scale + rows, mask=rows < num_rows, other=0.0)
        right_scale = tl.load(gallery_scale + columns, mask=columns < num_columns, other=0.0)
        tile = tile * (left_scale[:, None] * right_scale[None, :])
    # Minus zero becomes zero, so that bits have the same order as numbers.
    return tile + 0.0


class TileInputs:
    """Rows as the kernels read them: float32 unit rows, or unchanged half rows with the inverse of their lengths."""

    def __init__(self, name, features, precision="ieee"):
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
        self.num_rows, self.depth = features.shape
        self.scaled = features.dtype != torch.float32
        self.precision = precision
        if self.scaled:
            self.rows = features.contiguous()
            raise_on_bad_rows(name, self.rows.abs().amax(1).float())
            self.scale = torch.linalg.vector_norm(self.rows, dim=1, dtype=torch.float32).reciprocal()
            if self.rows.dtype == torch.bfloat16 and not bool(((self.scale > 1e-9) & (self.scale < 1e9)).all()):
                # bfloat16 has the range of float32: squares of its extreme values overflow or become 0, and so may the
                # product of two scales.
                self.scaled = False
            elif self.rows.dtype == torch.bfloat16 and interpreting(triton):
                # numpy, which the interpreter uses, has no bfloat16 product.
                self.rows = self.rows.float()
        if not self.scaled:
            self.rows = unit_rows((name, features))
            self.scale = self.rows

    @property
    def config(self):
        return dict(HALF_CONFIG if self.rows.dtype != torch.float32 else FLOAT_CONFIG)

    def take(self, order):
        """Some of the rows, or all in another order."""
        taken = object.__new__(TileInputs)
        taken.__dict__.update(self.__dict__)
        taken.rows = self.rows[order]
        taken.num_rows = len(taken.rows)
        taken.scale = self.scale[order] if self.scaled else taken.rows
        return taken


def paired_inputs(queries, gallery, precision):
    """TileInputs of both, either both scaled or neither, in one dtype."""
    if gallery is queries:
        inputs = TileInputs("features", queries, precision)
        return inputs, inputs
    if queries.dtype != gallery.dtype:
        queries, gallery = queries.float(), gallery.float()
    pair = TileInputs("queries", queries, precision), TileInputs("gallery", gallery, precision)
    if pair[0].scaled != pair[1].scaled:
        pair = TileInputs("queries", queries.float(), precision), TileInputs("gallery", gallery.float(), precision)
    return pair


def splits(num_row_blocks, num_column_blocks):
    """The number of parts into which the columns are split."""
    return max(1, min(num_column_blocks, WANTED_PROGRAMS // num_row_blocks))
