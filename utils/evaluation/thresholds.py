"""Distance thresholds for the same identity: exact error rates of all pairs, counted tile by tile.

The full distance matrix is neither stored nor sorted. Two passes count the distances: the first in coarse bins, the
second at every float32 value of the few bins that contain a threshold.
"""

from dataclasses import dataclass

import numpy as np
import torch

from kernels.dispatch import full_precision
from kernels.tiles import expand_ranges, unit_rows
from utils.datasets.schema import UNKNOWN
from utils.evaluation.lists import dropped

FALSE_MATCH_RATES = (1e-2, 1e-3, 1e-4)
QUERY_TILE, GALLERY_TILE = 256, 2048
# The float32 bits of values >= 0 grow with the value, so they serve as bins: the upper bits are the bin of the first
# pass, the lower bits that of the second.
LOW_BITS = 13
NUM_BINS = (0x40800000 >> LOW_BITS) + 1


@dataclass
class PairStatistics:
    """Statistics of the distances of all kept pairs: `thresholds`, points of the `curve`, and a histogram.

    `thresholds` is {rate as text: {"distance", "true_match_rate", "false_match_rate"}}, with the rates it reaches.
    `edges` (B + 1,) are the edges of the counts (B,).
    """

    num_matches: int
    num_non_matches: int
    thresholds: dict
    curve: dict
    edges: list
    match_counts: list
    non_match_counts: list


def pair_statistics(queries, gallery, *, protocol="market", rates=FALSE_MATCH_RATES):
    """Exact thresholds, curve and histogram, in two passes over the tiles of the distances.

    Two images match if their distance is at most t. The false-match rate of t is the share of the kept pairs of two
    identities with distance <= t, the true-match rate that of the kept pairs of one identity. The threshold of a rate
    is the largest t (float32) whose false-match rate is not above it. Queries of unknown identity are skipped.
    """
    queries = queries.take((queries.pids != UNKNOWN).nonzero().flatten())
    matches = torch.zeros(NUM_BINS, dtype=torch.int64, device=queries.features.device)
    non_matches = torch.zeros_like(matches)
    for bits, rows, columns, kept in _bits(queries, gallery, protocol):
        bins = bits >> LOW_BITS
        of_same = bins[rows, columns]
        non_matches += count(bins, NUM_BINS) - count(of_same, NUM_BINS)
        matches += count(of_same[kept], NUM_BINS)

    num_matches, num_non_matches = int(matches.sum()), int(non_matches.sum())
    below_match, below = matches.cumsum(0), non_matches.cumsum(0)
    # The threshold lies just below the first non-match that would exceed the rate.
    too_many = {rate: int(rate * num_non_matches + 1e-9) + 1 for rate in rates}
    wanted = {
        rate: int(torch.searchsorted(below, limit)) for rate, limit in too_many.items() if limit <= num_non_matches
    }
    fine = _fine_counts(queries, gallery, protocol, sorted(set(wanted.values())))

    thresholds = {}
    for rate, limit in too_many.items():
        accepted_matches, accepted_non_matches, distance = num_matches, num_non_matches, 4.0
        if rate in wanted:
            coarse = wanted[rate]
            fine_matches, fine_non_matches = fine[coarse]
            before = int(below[coarse - 1]) if coarse else 0
            index = int(torch.searchsorted(fine_non_matches.cumsum(0), limit - before))
            accepted_non_matches = before + int(fine_non_matches[:index].sum())
            accepted_matches = (int(below_match[coarse - 1]) if coarse else 0) + int(fine_matches[:index].sum())
            distance = _as_float((coarse << LOW_BITS) + index - 1)
        thresholds[f"{rate:g}"] = {
            "distance": distance,
            "true_match_rate": accepted_matches / num_matches if num_matches else None,
            "false_match_rate": accepted_non_matches / num_non_matches if num_non_matches else None,
        }
    if not num_non_matches:
        thresholds = {key: {**threshold, "distance": None} for key, threshold in thresholds.items()}
    # With few pairs, wide bars show the shape better.
    num_bars = min(80, max(16, round(2 * num_matches**0.5)))
    edges, (match_counts, non_match_counts) = _bars((matches, non_matches), num_bars)
    curve = _curve(below_match, below)
    return PairStatistics(num_matches, num_non_matches, thresholds, curve, edges, match_counts, non_match_counts)


def _unit(features):
    return unit_rows(("features", features.float()))[: len(features)]


def _bits(queries, gallery, protocol):
    """Yield for each tile (bits of the distances, rows and columns of same-identity pairs, kept mask)."""
    gallery = gallery.take(gallery.pids.argsort(stable=True))
    for _, _, distances, rows, columns, kept in distance_tiles(queries, gallery, protocol):
        yield distances.view(torch.int32), rows, columns, kept


def distance_tiles(queries, gallery, protocol):
    """Yield for each tile (first row, first column, distances (m, n), rows and columns of same-identity pairs, kept).

    `kept` says which of these pairs the protocol keeps; rows and columns count within the tile. The gallery must be
    sorted by identity, so that the matches of a query are contiguous. The next tile overwrites the distances.
    """
    query_features, gallery_features = _unit(queries.features).mul_(-2), _unit(gallery.features)
    starts = torch.searchsorted(gallery.pids, queries.pids)
    stops = torch.searchsorted(gallery.pids, queries.pids, right=True)
    memory = query_features.new_empty(QUERY_TILE * GALLERY_TILE)
    for top in range(0, len(queries), QUERY_TILE):
        strip = query_features[top : top + QUERY_TILE]
        for left in range(0, len(gallery), GALLERY_TILE):
            block = gallery_features[left : left + GALLERY_TILE]
            distances = memory[: len(strip) * len(block)].view(len(strip), len(block))
            with full_precision():
                torch.mm(strip, block.T, out=distances)
            distances.add_(2).clamp_(0, 4)
            first, last = ((ends[top : top + len(strip)] - left).clamp(0, len(block)) for ends in (starts, stops))
            rows, columns = expand_ranges(first, last - first)
            kept = ~dropped(queries, gallery, rows + top, columns + left, protocol)
            yield top, left, distances, rows, columns, kept


def count(values, size):
    """The count of each of 0..size - 1; on a CPU numpy counts several times faster than torch."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.bincount(values.numpy().ravel(), minlength=size))
    return torch.bincount(values.flatten(), minlength=size)


def _fine_counts(queries, gallery, protocol, coarse_bins):
    """{coarse bin: counts of (matches, non-matches) at each of its float32 values}."""
    size = 1 << LOW_BITS
    fine = {coarse: torch.zeros(2, size, dtype=torch.int64, device=queries.features.device) for coarse in coarse_bins}
    if not fine:
        return fine

    def count_in(bits, bins, coarse):
        return count(bits[bins == coarse] & (size - 1), size)

    for bits, rows, columns, kept in _bits(queries, gallery, protocol):
        bins, of_same = bits >> LOW_BITS, bits[rows, columns]
        bins_of_same = of_same >> LOW_BITS
        for coarse, (matches, non_matches) in fine.items():
            matches += count_in(of_same[kept], bins_of_same[kept], coarse)
            non_matches += count_in(bits, bins, coarse) - count_in(of_same, bins_of_same, coarse)
    return fine


def _as_float(bits):
    """The float32 value of these bits, or None for negative bits."""
    return float(torch.tensor(bits, dtype=torch.int32).view(torch.float32)) if bits >= 0 else None


def _bin_values():
    """The lowest distance of each coarse bin."""
    return (torch.arange(NUM_BINS, dtype=torch.int32) << LOW_BITS).view(torch.float32)


def _bars(counts, num_bars):
    """(edges, bars): the coarse counts in bars of equal width, from the smallest to the largest distance."""
    filled = (counts[0] + counts[1]).cpu().nonzero().flatten()
    if not len(filled):
        return [0.0, 4.0], [[0], [0]]
    values = _bin_values()
    low, high = float(values[filled[0]]), float(values[min(int(filled[-1]) + 1, NUM_BINS - 1)])
    edges = torch.linspace(low, max(high, low + 1e-3), num_bars + 1)
    bar_of = (torch.searchsorted(edges, values, right=True) - 1).clamp(0, num_bars - 1)
    bars = [torch.zeros(num_bars, dtype=torch.int64).index_add_(0, bar_of, part.cpu()).tolist() for part in counts]
    return edges.tolist(), bars


def _curve(below_match, below, num_points=160):
    """Points of (distance, false-match rate, true-match rate) at bin borders, where both counts are exact."""
    num_matches, num_non_matches = int(below_match[-1]), int(below[-1])
    if not num_matches or not num_non_matches:
        return {"distance": [], "false_match_rate": [], "true_match_rate": []}
    counts = torch.logspace(0, torch.tensor(float(num_non_matches)).log10().item(), num_points, dtype=torch.float64)
    # For each count, the last bin up to which at most that many non-matches are accepted.
    bins = torch.searchsorted(below.cpu(), counts.round().long().clamp(max=num_non_matches), right=True) - 1
    bins = bins[bins >= 0].unique()
    # The largest distance of a bin lies just below the next bin.
    borders = ((bins.int() + 1 << LOW_BITS) - 1).view(torch.float32).clamp(max=4)
    return {
        "distance": borders.tolist(),
        "false_match_rate": (below.cpu()[bins].double() / num_non_matches).tolist(),
        "true_match_rate": (below_match.cpu()[bins].double() / num_matches).tolist(),
    }
