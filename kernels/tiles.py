"""Helpers of all torch paths: unit rows, strips of similarities, and selection of few entries of a strip.

A strip is a block of query rows against the whole gallery. Every consumer reads all its numbers from one strip, so a
match and an item that ties with it are compared by exactly the same bits.
"""

import torch

from .dispatch import full_precision

# BLAS libraries sum in another order at ragged edges and for single rows. With both row counts padded to a multiple
# of 64, in float64 of 192, every entry is summed in the same order, so that equal rows get equal similarities.
ROW_MULTIPLE, DOUBLE_MULTIPLE = 64, 192
# More rows bring no gain on the CPU: products reach full speed at 384 rows.
STRIP_ROWS = 512
STRIP_BYTES = {"cpu": 160 << 20, "cuda": 256 << 20}
NORMALISE_ROWS = 4096


def padded(count, dtype=torch.float32):
    """The number of rows that a product of this type needs for so many."""
    multiple = multiple_of(dtype)
    return -(-count // multiple) * multiple


def multiple_of(dtype):
    return DOUBLE_MULTIPLE if dtype == torch.float64 else ROW_MULTIPLE


def unit_rows(*named_features, spare=False, first=0):
    """Rows of all (name, features) one after the other, divided by their length and padded with zero rows.

    With `spare` more zero rows follow, so that padded views may start at any row. Zero rows and rows that are not
    finite raise a ValueError with their numbers, counted from `first`.
    """
    total = sum(features.shape[0] for _, features in named_features)
    example = named_features[0][1]
    double = any(features.dtype == torch.float64 for _, features in named_features)
    dtype = torch.float64 if double else torch.float32
    num_rows = padded(total, dtype) + (multiple_of(dtype) if spare else 0)
    units = torch.empty(num_rows, example.shape[1], dtype=dtype, device=example.device)
    units[total:] = 0
    start = 0
    for name, features in named_features:
        largest = torch.empty(features.shape[0], dtype=dtype, device=example.device)
        for begin in range(0, features.shape[0], NORMALISE_ROWS):
            chunk = units[start + begin : start + min(begin + NORMALISE_ROWS, features.shape[0])]
            chunk.copy_(features[begin : begin + NORMALISE_ROWS])
            peak = largest[begin : begin + NORMALISE_ROWS]
            torch.maximum(chunk.amax(1), -chunk.amin(1), out=peak)
            # Divided by the largest entry first: squares of 1e-30 or 1e30 do not fit float32.
            chunk /= peak[:, None]
            chunk /= torch.linalg.vector_norm(chunk, dim=1, keepdim=True)
        raise_on_bad_rows(name, largest, first)
        start += features.shape[0]
    return units


def unit_pair(queries, gallery):
    """Unit rows of queries and gallery, both in float64 if one is."""
    if torch.float64 in (queries.dtype, gallery.dtype):
        queries, gallery = queries.double(), gallery.double()
    return unit_rows(("queries", queries)), unit_rows(("gallery", gallery))


def cosine_reference(queries, gallery):
    """All cosines, dense, as precise as the dtype of the inputs; equal rows have equal cosines."""
    queries = queries / queries.norm(dim=1, keepdim=True)
    gallery = gallery / gallery.norm(dim=1, keepdim=True)
    products, cosines = torch.empty_like(gallery), gallery.new_empty(queries.shape[0], gallery.shape[0])
    for row, cosine in zip(queries, cosines, strict=True):
        torch.sum(torch.mul(row, gallery, out=products), 1, out=cosine)
    return cosines


def raise_on_bad_rows(name, largest, first=0):
    """Raise ValueError for rows whose largest magnitude is zero, NaN or infinite."""
    for problem, bad in (("NaN or infinite", ~torch.isfinite(largest)), ("all zero", largest == 0)):
        rows = (bad.nonzero().flatten() + first).tolist()
        if rows:
            shown = ", ".join(map(str, rows[:10])) + (", ..." if len(rows) > 10 else "")
            raise ValueError(f"{len(rows)} of {largest.shape[0]} rows of {name} are {problem}: rows {shown}")


def strip_height(num_columns, device, dtype=torch.float32):
    """Number of rows of a strip: as many as the byte limit allows, a multiple of 64, in float64 of 192."""
    limit, multiple = STRIP_BYTES.get(device.type, STRIP_BYTES["cpu"]), multiple_of(dtype)
    rows = min(limit // (4 * padded(num_columns)), STRIP_ROWS) // multiple * multiple
    return max(rows, multiple)


def similarity_strips(queries, num_queries, gallery, num_gallery):
    """Yield (first row, strip) with strips of (rows, padded gallery); columns past the gallery hold -inf.

    The strip is reused by the next step and may be written to.
    """
    height = min(strip_height(num_gallery, queries.device, queries.dtype), queries.shape[0])
    buffer = torch.empty(height, gallery.shape[0], dtype=queries.dtype, device=queries.device)
    for start in range(0, num_queries, height):
        block = queries[start : start + height]
        strip = buffer[: block.shape[0]]
        with full_precision():
            torch.mm(block, gallery.t(), out=strip)
        strip[:, num_gallery:] = -torch.inf
        yield start, strip[: min(height, num_queries - start)]


def hits(mask):
    """Rows, columns and flat places of the set entries of a contiguous (rows, columns) mask, row after row."""
    if mask.device.type == "cpu" and mask.shape[1] % 8 == 0:
        # Few bytes are set: eight bytes are tested as one integer, and only integers that are not zero are examined.
        words = mask.view(torch.int64)
        word_rows, word_columns = words.nonzero().unbind(1)
        inner = words[word_rows, word_columns].view(torch.uint8).nonzero().flatten()
        word = inner >> 3
        rows = word_rows[word]
        columns = (word_columns[word] << 3) + (inner & 7)
    else:
        rows, columns = mask.nonzero().unbind(1)
    return rows, columns, rows * mask.shape[1] + columns


def count_set(mask):
    """Number of set entries in each row of a contiguous mask whose row length is a multiple of 64."""
    if mask.device.type != "cpu":
        return mask.sum(1)
    # Eight bytes of zeros and ones add up as one integer; a byte of the sum holds at most 255, so 128 words are safe.
    words = mask.view(torch.int64)
    whole = words.shape[1] // 128 * 128
    sums = words[:, :whole].reshape(mask.shape[0], -1, 128).sum(-1)
    rest = words[:, whole:].sum(-1, keepdim=True)
    return torch.cat([sums, rest], dim=1).view(torch.uint8).sum(1)


def descending_key(values):
    """float32 -> int64 in 0..2**32-1 in reversed order; both zeros get the same key."""
    bits = (values + 0.0).view(torch.int32)
    ascending = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (~ascending).to(torch.int64) + (1 << 31)


def expand_ranges(starts, counts):
    """All elements of ranges (start, count), one after the other: (number of the range, element)."""
    owner = torch.repeat_interleave(torch.arange(counts.shape[0], device=counts.device), counts)
    shift = starts - (counts.cumsum(0) - counts)
    return owner, shift.index_select(0, owner).add_(torch.arange(owner.shape[0], device=counts.device))


def row_groups(costs, limit):
    """Split rows with these costs (a CPU tensor) into consecutive groups (begin, end) of at most `limit` each."""
    ends = costs.cumsum(0)
    begin, spent = 0, 0
    while begin < costs.shape[0]:
        end = int(torch.searchsorted(ends, spent + limit, right=True))
        end = max(end, begin + 1)
        yield begin, end
        begin, spent = end, int(ends[end - 1])
