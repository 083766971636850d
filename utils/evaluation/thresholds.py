"""Which distance means the same person: exact error rates of all pairs, counted tile by tile.

The matrix of all distances never exists, nor is it sorted: two passes count where the distances fall, first in coarse
bins, then at every float32 value of the few bins that matter.
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
# Distances are sorted without sorting: float32 bits of values >= 0 grow with the value. The upper bits name a bin of
# the first pass, the lower ones a bin of the second.
LOW_BITS = 13
NUM_BINS = (0x40800000 >> LOW_BITS) + 1


@dataclass
class PairStatistics:
    """The distances of all kept pairs: operating `thresholds`, points of the `curve`, and a histogram.

    `thresholds` is {rate as text: {"distance", "true_match_rate", "false_match_rate"}}, the last one as reached;
    `edges` (B + 1,) belong to the counts (B,).
    """

    num_matches: int
    num_non_matches: int
    thresholds: dict
    curve: dict
    edges: list
    match_counts: list
    non_match_counts: list


def pair_statistics(queries, gallery, *, protocol="market", rates=FALSE_MATCH_RATES):
    """Which distance means the same person, exactly, in two passes over the tiles of the distances.

    Two images are called one person if their distance is at most t. The false-match rate of t is the share of the
    kept pairs of two people with distance <= t, the true-match rate that of the kept pairs of one person. For each
    rate the answer is the largest t (as float32) whose false-match rate is not above it. Queries of unknown identity
    are left out.
    """
    queries = queries.take((queries.pids != UNKNOWN).nonzero().flatten())
    matches = torch.zeros(NUM_BINS, dtype=torch.int64, device=queries.features.device)
    non_matches = torch.zeros_like(matches)
    for bits, rows, columns, kept in _tiles(queries, gallery, protocol):
        bins = bits >> LOW_BITS
        of_same = bins[rows, columns]
        non_matches += _count(bins, NUM_BINS) - _count(of_same, NUM_BINS)
        matches += _count(of_same[kept], NUM_BINS)

    num_matches, num_non_matches = int(matches.sum()), int(non_matches.sum())
    below_match, below = matches.cumsum(0), non_matches.cumsum(0)
    # Threshold: just below the first non-match that would be one too many.
    too_many = {rate: int(rate * num_non_matches + 1e-9) + 1 for rate in rates}
    wanted = {
        rate: int(torch.searchsorted(below, count)) for rate, count in too_many.items() if count <= num_non_matches
    }
    fine = _fine_counts(queries, gallery, protocol, sorted(set(wanted.values())))

    thresholds = {}
    for rate, count in too_many.items():
        accepted_matches, accepted_non_matches, distance = num_matches, num_non_matches, 4.0
        if rate in wanted:
            coarse = wanted[rate]
            fine_matches, fine_non_matches = fine[coarse]
            before = int(below[coarse - 1]) if coarse else 0
            place = int(torch.searchsorted(fine_non_matches.cumsum(0), count - before))
            accepted_non_matches = before + int(fine_non_matches[:place].sum())
            accepted_matches = (int(below_match[coarse - 1]) if coarse else 0) + int(fine_matches[:place].sum())
            distance = _as_float((coarse << LOW_BITS) + place - 1)
        thresholds[f"{rate:g}"] = {
            "distance": distance,
            "true_match_rate": accepted_matches / num_matches if num_matches else None,
            "false_match_rate": accepted_non_matches / num_non_matches if num_non_matches else None,
        }
    if not num_non_matches:
        thresholds = {key: {**one, "distance": None} for key, one in thresholds.items()}
    # Few pairs need wide bars to show a shape.
    num_bars = min(80, max(16, round(2 * num_matches**0.5)))
    edges, (match_counts, non_match_counts) = _bars((matches, non_matches), num_bars)
    curve = _curve(below_match, below)
    return PairStatistics(num_matches, num_non_matches, thresholds, curve, edges, match_counts, non_match_counts)


def _unit(features):
    return unit_rows(("features", features.float()))[: len(features)]


def _tiles(queries, gallery, protocol):
    """For each tile: bits of the distances (m, n) int32; rows, columns of its pairs of one identity; which are kept.

    The gallery is sorted by identity, so that a query's own are neighbours. The next tile overwrites the bits.
    """
    gallery = gallery.take(gallery.pids.argsort(stable=True))
    query_features, gallery_features = _unit(queries.features).mul_(-2), _unit(gallery.features)
    starts = torch.searchsorted(gallery.pids, queries.pids)
    stops = torch.searchsorted(gallery.pids, queries.pids, right=True)
    memory = query_features.new_empty(QUERY_TILE * GALLERY_TILE)
    for top in range(0, len(queries), QUERY_TILE):
        strip = query_features[top : top + QUERY_TILE]
        for left in range(0, len(gallery), GALLERY_TILE):
            across = gallery_features[left : left + GALLERY_TILE]
            distances = memory[: len(strip) * len(across)].view(len(strip), len(across))
            with full_precision():
                torch.mm(strip, across.T, out=distances)
            distances.add_(2).clamp_(0, 4)
            first, last = ((ends[top : top + len(strip)] - left).clamp(0, len(across)) for ends in (starts, stops))
            rows, columns = expand_ranges(first, last - first)
            kept = ~dropped(queries, gallery, rows + top, columns + left, protocol)
            yield distances.view(torch.int32), rows, columns, kept


def _count(values, size):
    """How often each of 0..size - 1 occurs; numpy's counting is several times faster than torch's on a CPU."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.bincount(values.numpy().ravel(), minlength=size))
    return torch.bincount(values.flatten(), minlength=size)


def _fine_counts(queries, gallery, protocol, coarse_bins):
    """For each coarse bin the counts of (matches, non-matches) at each of its float32 values."""
    size = 1 << LOW_BITS
    fine = {one: torch.zeros(2, size, dtype=torch.int64, device=queries.features.device) for one in coarse_bins}
    if not fine:
        return fine

    def count(bits, bins, one):
        return _count(bits[bins == one] & (size - 1), size)

    for bits, rows, columns, kept in _tiles(queries, gallery, protocol):
        bins, of_same = bits >> LOW_BITS, bits[rows, columns]
        bins_of_same = of_same >> LOW_BITS
        for one, (matches, non_matches) in fine.items():
            matches += count(of_same[kept], bins_of_same[kept], one)
            non_matches += count(bits, bins, one) - count(of_same, bins_of_same, one)
    return fine


def _as_float(bits):
    """The float32 of these bits, None below zero."""
    return float(torch.tensor(bits, dtype=torch.int32).view(torch.float32)) if bits >= 0 else None


def _bin_values():
    """The lowest distance of each coarse bin."""
    return (torch.arange(NUM_BINS, dtype=torch.int32) << LOW_BITS).view(torch.float32)


def _bars(counts, num_bars):
    """The coarse counts gathered into equal bars between the smallest and the largest distance seen."""
    seen = (counts[0] + counts[1]).cpu().nonzero().flatten()
    if not len(seen):
        return [0.0, 4.0], [[0], [0]]
    values = _bin_values()
    low, high = float(values[seen[0]]), float(values[min(int(seen[-1]) + 1, NUM_BINS - 1)])
    edges = torch.linspace(low, max(high, low + 1e-3), num_bars + 1)
    place = (torch.searchsorted(edges, values, right=True) - 1).clamp(0, num_bars - 1)
    bars = [torch.zeros(num_bars, dtype=torch.int64).index_add_(0, place, one.cpu()).tolist() for one in counts]
    return edges.tolist(), bars


def _curve(below_match, below, num_points=160):
    """Points of (distance, false-match rate, true-match rate) at bin borders, where both counts are exact."""
    num_matches, num_non_matches = int(below_match[-1]), int(below[-1])
    if not num_matches or not num_non_matches:
        return {"distance": [], "false_match_rate": [], "true_match_rate": []}
    counts = torch.logspace(0, torch.tensor(float(num_non_matches)).log10().item(), num_points, dtype=torch.float64)
    # The last bin up to which not more than each wanted count are accepted.
    bins = torch.searchsorted(below.cpu(), counts.round().long().clamp(max=num_non_matches), right=True) - 1
    bins = bins[bins >= 0].unique()
    # Just below the next bin: the largest distance of this one.
    borders = ((bins.int() + 1 << LOW_BITS) - 1).view(torch.float32).clamp(max=4)
    return {
        "distance": borders.tolist(),
        "false_match_rate": (below.cpu()[bins].double() / num_non_matches).tolist(),
        "true_match_rate": (below_match.cpu()[bins].double() / num_matches).tolist(),
    }
