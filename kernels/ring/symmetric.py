"""Each row's nearest rows in those of all ranks, on the CPU: every product of two rows is computed by one rank only.

In step s of at most P / 2 a rank works on the shard of rank r - s, finds neighbours for its own rows and for that
shard's, and sends the latter to the shard's owner. For even P, two ranks would do the last step for the same rows:
each does half of it.
"""

import torch

from kernels.neighbours import (
    GROUP,
    SYMMETRIC_MIN_ROWS,
    TILE_ROWS,
    BestOfRows,
    Neighbours,
    Tiles,
    add_rectangle,
    add_triangle,
)
from kernels.tiles import padded

# Shards are sent on while results go back.
RESULT_TAG = 16


def is_worth_it(rows, k):
    """Whether `ring_symmetric` applies to these `AllRows`; alike on all ranks."""
    single_on_cpu = rows.device.type == "cpu" and rows.ring.dtype == torch.float32
    # Keys of neighbours have 32 bits for the number of a row.
    return single_on_cpu and SYMMETRIC_MIN_ROWS <= rows.total < 1 << 32 and k * GROUP <= TILE_ROWS


def ring_symmetric(rows, k):
    """`Neighbours` of the own rows among all of X (`AllRows`); indices are numbers in X."""
    ring, tiles = rows.ring, Tiles()
    own = best_of_parts(rows, ring.rank, rows.units, k)
    for place, part in enumerate(own):
        add_triangle(tiles, part)
        for other in own[place + 1 :]:
            add_rectangle(tiles, part, other)
    for step, (rank, tensors) in enumerate(ring.rounds(*rows.parts, steps=ring.size // 2 + 1)):
        if step == 0:
            continue
        others = best_of_parts(rows, rank, [ring.unit("features", part) for part in tensors], k)
        is_shared = 2 * step == ring.size
        for part in own:
            for other in others:
                if not is_shared:
                    add_rectangle(tiles, part, other)
                elif ring.rank < rank:
                    add_rectangle(tiles, part, other, end=half_of(part))
                else:
                    add_rectangle(tiles, part, other, left=half_of(other))
        send_back(ring, own, others, step)
    for part in own:
        part.best.finish()
    indices, lowest = ([getattr(part.neighbours(), name) for part in own] for name in ("indices", "lowest"))
    return Neighbours(torch.cat(indices), torch.cat(lowest))


def best_of_parts(rows, rank, units, k):
    ranges = [rows.range_of(part, rank) for part in range(len(units))]
    # Shards come in the ring's order, not in that of the numbers.
    return [
        BestOfRows(part, end - begin, k, begin, ascending=False)
        for part, (begin, end) in zip(units, ranges, strict=True)
    ]


def half_of(part):
    """The number of rows that the lower of two ranks does, of its own."""
    return min(padded(part.num_rows // 2), part.num_rows)


def send_back(ring, own, others, step):
    """Give the neighbours of a shard to its owner, and take those of the own rows from the rank that had them."""
    for part in others:
        part.best.finish()
    results = [tensor for part in others for tensor in (part.best.keys, part.lowest)]
    arriving = [torch.empty_like(tensor) for part in own for tensor in (part.best.keys, part.lowest)]
    after, before = (ring.rank - step) % ring.size, (ring.rank + step) % ring.size
    ring.finish(ring.exchange(results, after, arriving, before, RESULT_TAG))
    for part, keys, lowest in zip(own, arriving[::2], arriving[1::2], strict=True):
        part.best.join(keys)
        part.lowest = torch.minimum(part.lowest, lowest)
