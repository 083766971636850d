"""Ranks of chosen entries within their rows of a score strip, computed by counting instead of sorting."""

import torch

from .tiles import count_set, descending_key, hits, row_groups

# Entries processed at once, so that many matches or ties need more time but not more memory.
PAIR_LIMIT = 1 << 21
HIT_LIMIT = 1 << 22
# The number of worst matches of each query whose rank is counted over whole rows.
COUNTED_MATCHES = 1


def match_ranks(strip, rows, columns, mask):
    """Ranks of the entries (rows, columns) in their rows of the strip; returned row by row, best first.

    Rows ascend, columns ascend within a row. An entry's rank is 1 + larger entries + equal ones of lower column.
    `mask` is scratch space of the strip's shape.
    """
    if rows.numel() == 0:
        return rows, rows
    if strip.dtype != torch.float32:
        return ranks_by_sorting(strip, rows, columns)
    keys = (rows << 32) + descending_key(strip[rows, columns])
    keys, order = keys.sort(stable=True)
    columns = columns[order]
    return rows, ranks_of_sorted(strip, rows, keys, columns, strip[rows, columns], mask, itself=1)


def ranks_of_values(strip, rows, columns, values, mask):
    """The ranks that entries with these values would have in their rows; they need not be in the strip.

    Rows ascend. An entry of equal value comes before if its column is lower; columns may lie outside of the strip.
    """
    if rows.numel() == 0:
        return rows
    columns = columns.clamp(0, strip.shape[1])
    if strip.dtype != torch.float32:
        return ranks_by_comparing(strip, rows, columns, values)
    # Ascending columns within equal values, as ranks_among_hits expects.
    order = columns.sort(stable=True).indices
    order = order[((rows[order] << 32) + descending_key(values[order])).sort(stable=True).indices]
    keys = (rows[order] << 32) + descending_key(values[order])
    ranks = torch.empty_like(rows)
    ranks[order] = ranks_of_sorted(strip, rows, keys, columns[order], values[order], mask, itself=0)
    return ranks


def ranks_of_sorted(strip, rows, keys, columns, values, mask, itself):
    """Ranks of entries sorted by (row, descending value); `itself` is 1 if the entries are in the strip, else 0."""
    num_rows = strip.shape[0]
    ranks = torch.empty_like(rows)
    counts = torch.bincount(rows, minlength=num_rows)
    ends = counts.cumsum(0)

    # A large part of the gallery is before the worst matches of a query; here it is only counted.
    for _ in range(COUNTED_MATCHES):
        some = (counts > 0).nonzero().flatten()
        last = ends[some] - 1
        ranks[last] = counted_ranks(strip, some, columns[last], values[last], mask, itself)
        counts, ends = counts - (counts > 0).long(), ends - (counts > 0).long()

    # Few entries are before the other matches; one pass over the strip finds them.
    remaining = torch.arange(rows.shape[0], device=rows.device) < ends[rows]
    keys, columns = keys[remaining], columns[remaining]
    starts = counts.cumsum(0) - counts
    floor = torch.full_like(strip[:, 0], torch.inf)
    some = counts > 0
    floor[some] = values[ends[some] - 1]
    torch.ge(strip, floor[:, None], out=mask)
    ranks_of_groups = []
    for begin, end in row_groups(count_set(mask).cpu(), HIT_LIMIT):
        first = int(starts[begin])
        last = int(starts[end]) if end < num_rows else keys.shape[0]
        if first < last:
            part = strip[begin:end]
            own_keys = keys[first:last] - (begin << 32)
            ranks_of_groups.append(ranks_among_hits(part, own_keys, columns[first:last], mask[begin:end]))
    if ranks_of_groups:
        ranks[remaining] = torch.cat(ranks_of_groups)
    return ranks


def counted_ranks(strip, rows, columns, values, mask, itself):
    """Ranks of one entry in each of these rows, by counting over whole rows."""
    thresholds = torch.full_like(strip[:, :1], torch.inf)
    thresholds[rows, 0] = values
    larger = count_set(torch.gt(strip, thresholds, out=mask))[rows]
    equal = count_set(torch.ge(strip, thresholds, out=mask))[rows] - larger
    ranks = 1 + larger
    tied = (equal > itself).nonzero().flatten()
    position = torch.arange(strip.shape[1], device=strip.device)
    for some in tied.split(max(1, PAIR_LIMIT // strip.shape[1])):
        equals_value = strip[rows[some]] == values[some][:, None]
        ranks[some] += (equals_value & (position < columns[some][:, None])).sum(1)
    return ranks


def ranks_among_hits(strip, keys, columns, mask):
    """Ranks of matches, counted among the hits in `mask`: all entries of a row no smaller than its last match.

    `keys` are the sorted (row, descending score) keys of the matches.
    """
    num_rows, num_columns = strip.shape
    hit_rows, hit_columns, places = hits(mask)
    hit_keys = (hit_rows << 32) + descending_key(strip.view(-1)[places])

    # A hit is before all matches from place `after` on; `after` counts the matches at or before it in the order.
    after = torch.searchsorted(keys, hit_keys, right=True)
    larger = torch.bincount(after, minlength=keys.shape[0] + 1)[:-1].cumsum(0)
    hits_of_row = torch.bincount(hit_rows, minlength=num_rows)
    larger -= (hits_of_row.cumsum(0) - hits_of_row)[keys >> 32]

    # Few hits equal a match (at least the match itself). Sorted by column, those of lower column come before it.
    equal = ((after > 0) & (keys[(after - 1).clamp_(min=0)] == hit_keys)).nonzero().flatten()
    ties = ((after[equal] - 1) * num_columns + hit_columns[equal]).sort().values
    own_level = (torch.searchsorted(keys, keys, right=True) - 1) * num_columns
    before = torch.searchsorted(ties, own_level + columns) - torch.searchsorted(ties, own_level)
    return 1 + larger + before


def ranks_by_comparing(strip, rows, columns, values):
    """`ranks_of_values` by comparing whole rows."""
    ranks = torch.empty_like(rows)
    position = torch.arange(strip.shape[1], device=strip.device)
    for some in torch.arange(len(rows), device=rows.device).split(max(1, PAIR_LIMIT // strip.shape[1])):
        entries, value = strip[rows[some]], values[some][:, None]
        before = (entries > value) | ((entries == value) & (position < columns[some][:, None]))
        ranks[some] = 1 + before.sum(1)
    return ranks


def ranks_by_sorting(strip, rows, columns):
    """The same ranks by sorting whole rows: for float64, whose values do not fit into a key together with the row."""
    order = strip.sort(dim=1, descending=True, stable=True).indices
    rank = torch.empty_like(order)
    rank.scatter_(1, order, torch.arange(1, strip.shape[1] + 1, device=strip.device).expand_as(order))
    ranks = rank[rows, columns]
    order = (rows * (strip.shape[1] + 1) + ranks).argsort()
    return rows, ranks[order]
