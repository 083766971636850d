"""How often the 95 % intervals of thresholds hold the truth when other identities are drawn, beside resampled pairs.

    python -m benchmarks.evaluation.coverage

Features come from a model whose truth is known: identities differ in how much they look like everybody (the features
of some lie near a common direction) and in how much their images differ from each other. Each draw takes new
identities, makes `utils.evaluation.calibration` of them, and looks whether its intervals hold the true numbers, which
are those of very many identities. The naive intervals resample pairs as if they were independent; they are made for
the smallest number of identities only.

The last column says where `evaluate.py` calls a number "not measurable" because the identities are too few. Here such
intervals are made nevertheless, to see from how many identities on they are right.
"""

import argparse
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F

from benchmarks.common import RESULTS, command_line, write_result
from utils.evaluation.calibration.identity_counts import Grid
from utils.evaluation.calibration.rates import (
    FALSE_ALARM_RATES,
    FALSE_MATCH_RATES,
    IDENTITIES_WITHIN,
    PAIRS_WITHIN,
    calibrate,
)
from utils.evaluation.calibration.resampling import at_places, crossings, interval
from utils.evaluation.metrics import Side
from utils.evaluation.thresholds import pair_statistics
from utils.reporting.report import text_table

WIDTH, QUERIES, GALLERY = 12, 2, 3
# Share of the draws that must have an interval.
FEWEST_DRAWN = 0.5
# Name: (how much identities lie near a common direction, how much their spread differs).
WORLDS = {"strong": (1.5, 0.8), "weak": (0.5, 0.3)}
TRUTH_IDS, TRUTH_ROUNDS, SEARCHED_IDS = 500, 60, 320_000
COLUMNS = [
    "identity effects", "identities", "number", "at rate", "identities resampled", "pairs resampled",
    "evaluate.py says",
]  # fmt: skip


def draw(num_ids, world, generator):
    """Queries and gallery of new identities."""
    common, differing = WORLDS[world]
    means = torch.randn(num_ids, WIDTH, generator=generator) / WIDTH**0.5
    means[:, 0] += common * torch.rand(num_ids, generator=generator)
    means = F.normalize(means, dim=1)
    spread = 0.35 * (differing * torch.randn(num_ids, 1, 1, generator=generator)).exp()
    sides = []
    for camera, count in enumerate((QUERIES, GALLERY)):
        noise = torch.randn(num_ids, count, WIDTH, generator=generator) / WIDTH**0.5
        features = F.normalize(means[:, None] + spread * noise, dim=2).flatten(0, 1)
        pids = torch.arange(num_ids).repeat_interleave(count)
        sides.append(Side(features, pids, torch.full_like(pids, camera), [""] * len(pids)))
    return sides


def split_scores(queries, gallery):
    """(scores of pairs of two identities, of one identity), and for each query its best score of either kind."""
    scores = queries.features @ gallery.features.T
    same = queries.pids[:, None] == gallery.pids
    best = [scores.masked_fill(mask, -torch.inf).amax(1) for mask in (same, ~same)]
    return scores[~same], scores[same], *best


def truth(num_ids, world, seed=10**6):
    """{(kind, rate): (threshold, rate of right results)}, from many identities; searches depend on `num_ids`."""
    generator, found = torch.Generator().manual_seed(seed), {}
    others, matches = [], []
    for _ in range(TRUTH_ROUNDS):
        strangers, own, _, _ = split_scores(*draw(TRUTH_IDS, world, generator))
        others.append(strangers[:: TRUTH_IDS // 100])
        matches.append(own)
    others, matches = torch.cat(others).sort(descending=True).values, torch.cat(matches)
    for rate in FALSE_MATCH_RATES:
        threshold = others[int(rate * len(others))]
        found["pairs", rate] = float(threshold), float((matches >= threshold).double().mean())
    searches = [split_scores(*draw(num_ids, world, generator))[2:] for _ in range(SEARCHED_IDS // num_ids)]
    best, right = (torch.cat(part) for part in zip(*searches, strict=True))
    order = best.sort(descending=True).values
    for rate in FALSE_ALARM_RATES:
        threshold = order[int(rate * len(order))]
        hit = (right >= threshold) & (right > best)
        found["searches", rate] = float(threshold), float(hit.double().mean())
    return found


def naive(queries, gallery, replicates, generator):
    """{rate: intervals of threshold and right matches} with each pair drawn by itself."""
    grid, drawn, found = Grid(-1.0, 1000), [], {}
    for scores in split_scores(queries, gallery)[:2]:
        counts = torch.bincount(grid.columns(scores.clone()), minlength=grid.num_steps + 2).double()
        drawn.append(torch.poisson(counts.expand(replicates, -1), generator=generator))
    false, right = (grid.reaching(part) / part.sum(1, keepdim=True) for part in drawn)
    for rate in FALSE_MATCH_RATES:
        thresholds, places = crossings(false, grid.edges, rate)
        found[rate] = [interval(part, 10**6).tolist() for part in (thresholds, at_places(right, places))]
    return found


def is_measurable(kind, rate, num_ids):
    """Whether `evaluate.py` gives a number of all these identities, which are both queries and gallery."""
    if kind == "pairs":
        return num_ids * (num_ids - 1) / 2 * rate >= PAIRS_WITHIN
    return num_ids * rate >= IDENTITIES_WITHIN


@mock.patch.multiple("utils.evaluation.calibration.rates", PAIRS_WITHIN=1, IDENTITIES_WITHIN=1)
def covered(num_ids, world, draws, *, replicates=300, seed=0, with_pairs=True):
    """{"KIND RATE NUMBER METHOD": [draws with an interval, those that hold the truth, truth below, truth above]}."""
    true, found = truth(num_ids, world), {}
    generator = torch.Generator().manual_seed(seed)

    def add(kind, rate, method, intervals):
        for number, ends, value in zip(("threshold", "right"), intervals, true[kind, rate], strict=True):
            counts = found.setdefault(f"{kind} {rate:g} {number} {method}", [0, 0, 0, 0])
            counts[0] += 1
            counts[1 if ends[0] <= value <= ends[1] else 2 if value < ends[0] else 3] += 1

    for number in range(draws):
        sides = draw(num_ids, world, generator)
        pairs = pair_statistics(*sides, rates=FALSE_MATCH_RATES)
        made = calibrate(*sides, pairs, replicates=replicates, seed=number, by_camera=False)
        pairwise = naive(*sides, replicates, generator) if with_pairs else {}
        for rate in FALSE_MATCH_RATES:
            entry = made["rates"][f"{rate:g}"]
            if entry["threshold"] is not None:
                ends = entry["threshold_interval"], entry["right_match_rate_interval"]
                add("pairs", rate, "identities", ends)
                if rate in pairwise:
                    add("pairs", rate, "pairs", pairwise[rate])
        for rate in FALSE_ALARM_RATES:
            entry = made["open_set"]["rates"][f"{rate:g}"]
            if entry["threshold"] is not None:
                add("searches", rate, "identities", (entry["threshold_interval"], entry["TPIR_interval"]))
    return found


def rows_of(worlds):
    names = {
        "pairs threshold": "threshold at FMR",
        "pairs right": "TAR at FMR",
        "searches threshold": "threshold at FPIR",
        "searches right": "TPIR at FPIR",
    }
    rows = []
    for part in worlds:
        for key, counts in part["covered"].items():
            kind, rate, number, method = key.split()
            # Intervals of very few draws say nothing.
            if method == "pairs" or counts[0] < FEWEST_DRAWN * part["draws"]:
                continue
            beside = part["covered"].get(f"{kind} {rate} {number} pairs")
            cells = ["-" if one is None else f"{100 * one[1] / one[0]:.1f} %" for one in (counts, beside)]
            cells.append("" if is_measurable(kind, float(rate), part["num_ids"]) else "not measurable")
            rows.append([part["world"], part["num_ids"], names[f"{kind} {number}"], rate, *cells])
    return rows


def main(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_ids", type=int, nargs="+", default=[80, 500, 800], help="identities of a draw")
    parser.add_argument("--draws", type=int, default=1000, help="how often identities are drawn")
    parser.add_argument("--json", type=Path, default=RESULTS / "coverage.json", help="result file")
    args = parser.parse_args(input_args)
    torch.set_num_threads(1)
    worlds = []
    for world in WORLDS:
        for num_ids in args.num_ids:
            found = covered(num_ids, world, args.draws, with_pairs=num_ids == min(args.num_ids))
            worlds.append({"world": world, "num_ids": num_ids, "draws": args.draws, "covered": found})
            print(f"{world}, {num_ids} identities", flush=True)
    rows = rows_of(worlds)
    print(text_table(COLUMNS, rows))
    write_result(args.json, command_line("benchmarks.evaluation.coverage"), COLUMNS, rows, {"worlds": worlds})


if __name__ == "__main__":
    main()
