"""What a score says, measured on labelled data: thresholds, right matches, open-set numbers.

A score is the cosine of two features, larger for more alike ones. Images match at a threshold t if their score is at
least t. The protocol decides which pairs count, as in the metrics.

    false-match rate FMR(t)       share of the pairs of two identities that match
    right-match rate TAR(t)       share of the pairs of one identity that match
    threshold of a rate           the smallest t with FMR(t) at most the rate

Each query is searched for twice. In the gallery as it is, the search is a mated one if the gallery holds the identity.
In the gallery without its identity there is nobody to be found.

    TPIR(t)                       share of the mated searches whose best image is of the right identity and matches
    FPIR(t)                       share of the searches for nobody in which any image matches: false alarms
    TPIR at FPIR f                TPIR(t) at the smallest t with FPIR(t) at most f

FPIR grows with the gallery; `gallery_images` is how many images a search went through, on average.

Every number has a 95 % interval for other identities of the same kind, photographed by the same cameras
(`resampling`); the interval of a TAR or TPIR includes that of the threshold. Two identities that look alike make many
false matches at once, so what a false-match rate needs is pairs of identities: 30 of them within the rate. A rate of
false alarms needs 5 identities within it. For fewer the number is "not measurable".
"""

import math

import torch

from utils.evaluation.calibration.identity_counts import IdentityCounts
from utils.evaluation.calibration.resampling import LEVEL, REPLICATES, Resampling, at_places, crossings, interval
from utils.evaluation.calibration.stored import VERSION

FALSE_MATCH_RATES = (1e-1, 1e-2, 1e-3, 1e-4)
FALSE_ALARM_RATES = (1e-1, 1e-2)
PAIRS_WITHIN, IDENTITIES_WITHIN, FEWEST_MATCHED = 30, 5, 10
# The grid of scores starts where so many pairs of two identities still match.
LOWEST_RATE = 0.75
CAMERA_REPLICATES = 300
MOST_CAMERAS = 40
# Every n-th edge of the grid is a point of the stored curves.
CURVE_STEP = 4


def calibrate(queries, gallery, pairs, *, protocol="market", replicates=REPLICATES, seed=0, by_camera=True):
    """The content of `calibration.json`, apart from the model; `pairs` is their `thresholds.PairStatistics`."""
    counts = IdentityCounts(queries, gallery, lowest_score(pairs), protocol)
    resampling = Resampling(counts.num_ids, replicates=replicates, seed=seed)
    few = Resampling(counts.num_ids, replicates=min(replicates, CAMERA_REPLICATES), seed=seed)
    overall = {
        rate: 1 - limit["distance"] / 2 for rate, limit in pairs.thresholds.items() if limit["distance"] is not None
    }
    cameras = []
    # A table of many cameras would be read by nobody, and takes as many passes as it has pairs.
    by_camera = by_camera and max(len(side.camids.unique()) for side in (queries, gallery)) <= MOST_CAMERAS
    for query_camera, gallery_camera, part in counts.camera_pairs() if by_camera else counts.all_pairs():
        rates = PairRates(part, counts.grid, few)
        cameras.append(
            {"query_camera": query_camera, "gallery_camera": gallery_camera, **rates.sizes()}
            | {"rates": {f"{rate:g}": rates.at(rate, overall=overall.get(f"{rate:g}")) for rate in FALSE_MATCH_RATES}}
        )
    rates = PairRates(counts.total, counts.grid, resampling)
    searches = SearchRates(counts, resampling)
    return {
        "version": VERSION,
        "protocol": protocol,
        "num_queries": len(counts.queries),
        "num_gallery": len(gallery),
        **rates.sizes(),
        "level": LEVEL,
        "replicates": replicates,
        "seed": seed,
        "rates": {f"{rate:g}": rates.at(rate, pairs.thresholds.get(f"{rate:g}")) for rate in FALSE_MATCH_RATES},
        "open_set": searches.sizes() | {"rates": {f"{rate:g}": searches.at(rate) for rate in FALSE_ALARM_RATES}},
        "curve": {"score": counts.grid.edges[::CURVE_STEP]} | rates.curve() | searches.curve(),
        "camera_pairs": cameras,
    }


def lowest_score(pairs):
    """The score at which LOWEST_RATE of the pairs of two identities match."""
    curve = pairs.curve
    reached = [
        distance
        for distance, rate in zip(curve["distance"], curve["false_match_rate"], strict=True)
        if rate >= LOWEST_RATE
    ]
    # At least one step below 1, also where all features are equal.
    return min(1 - (min(reached) if reached else 4.0) / 2, 1 - 1e-4)


class PairRates:
    """False and right matches of counted pairs, with their replicates."""

    def __init__(self, counts, grid, resampling):
        self.counts, self.grid = counts, grid
        strangers, matches = grid.reaching(counts.strangers), grid.reaching(counts.matches)
        stranger_totals, match_totals = counts.strangers.sum(1), counts.matches.sum(1)
        # Strangers are counted for both of their identities.
        false, self.num_strangers = strangers.sum(0) / 2, float(stranger_totals.sum()) / 2
        right, self.num_matches = matches.sum(0), float(match_totals.sum())
        self.num_matched = int((match_totals > 0).sum())
        shared = counts.num_shared_ids
        self.id_pairs = counts.num_query_ids * counts.num_gallery_ids - shared - shared * (shared - 1) // 2
        self.num_ids = min(counts.num_query_ids, counts.num_gallery_ids)
        self.false = false / max(self.num_strangers, 1)
        self.right = right / max(self.num_matches, 1)
        self.can_tell = self.num_matched >= FEWEST_MATCHED
        if self.id_pairs * FALSE_MATCH_RATES[0] >= PAIRS_WITHIN and self.num_ids > 1:
            self.false_drawn = resampling.share(
                false, strangers, false.new_tensor(self.num_strangers), stranger_totals
            )
            size = self.num_matches / max(self.num_matched, 1)
            self.right_drawn = resampling.share(right, matches, match_totals.sum(), match_totals, prior=0, size=size)

    def sizes(self):
        return {
            "num_query_identities": self.counts.num_query_ids,
            "num_gallery_identities": self.counts.num_gallery_ids,
            "num_matched_identities": self.num_matched,
            "num_match_pairs": int(self.num_matches),
            "num_non_match_pairs": int(self.num_strangers),
        }

    def at(self, rate, exact=None, overall=None):
        """Threshold and rates at a false-match rate. Without `exact`, an entry of `pair_statistics`, they are those
        of the grid; `overall` is the threshold of all cameras, whose rates here are added.
        """
        result = self.threshold_at(rate, exact)
        if overall is not None and self.num_strangers:
            place = max(0.0, (overall - self.grid.low) / (1 - self.grid.low) * self.grid.num_steps)
            place = torch.tensor([place], dtype=torch.float64)
            result["at_overall_threshold"] = {
                "false_match_rate": float(at_places(self.false[None], place)),
                "right_match_rate": float(at_places(self.right[None], place)) if self.num_matches else None,
            }
        return result

    def threshold_at(self, rate, exact):
        if self.id_pairs * rate < PAIRS_WITHIN or self.num_ids < 2:
            return not_measurable(
                f"{self.num_ids} identities: {math.ceil(PAIRS_WITHIN / rate):,} pairs of two identities are needed, "
                f"as of {needed_identities(rate)} identities, there are {self.id_pairs:,}"
            )
        if self.false[-1] > rate or self.false[0] <= rate:
            return not_measurable(f"{self.num_ids} identities: their scores are too equal")
        index = int((self.false > rate).sum())
        threshold, reached, right = (float(values[index]) for values in (self.grid.edges, self.false, self.right))
        if exact is not None and exact["distance"] is not None:
            threshold, reached = 1 - exact["distance"] / 2, exact["false_match_rate"]
            right = exact["true_match_rate"]
        drawn, places = crossings(self.false_drawn, self.grid.edges, rate)
        result = {
            "threshold": threshold,
            "threshold_interval": interval(drawn, self.num_ids, threshold),
            "false_match_rate": reached,
        }
        if not self.can_tell:
            return result | {
                "right_match_rate": None,
                "right_match_rate_interval": None,
                "reason": f"right matches not measurable with {self.num_matched} identities, {FEWEST_MATCHED} are "
                "needed",
            }
        drawn = at_places(self.right_drawn, places)
        return result | {
            "right_match_rate": right,
            "right_match_rate_interval": interval(drawn, self.num_matched, right),
        }

    def curve(self):
        """Rates at some edges, and the smallest false-match rate that these identities can show."""
        points = slice(None, None, CURVE_STEP)
        least = min(1.0, PAIRS_WITHIN / self.id_pairs) if self.id_pairs else 1.0
        return {
            "least_false_match_rate": least,
            "false_match_rate": self.false[points],
            "right_match_rate": self.right[points],
        }


class SearchRates:
    """False alarms and right results of searches, with their replicates."""

    def __init__(self, counts, resampling):
        found, grid, self.num_ids_drawn = counts.searches, counts.grid, counts.num_ids
        self.grid = grid
        ids, best, stranger, second, right = (
            values.cpu() for values in (found.ids, found.best, found.stranger, found.second, found.right)
        )
        mated = right > -torch.inf
        self.best, self.right = best, torch.where(right > best, right, -torch.inf)[mated]
        self.num_searches, self.num_mated = len(best), int(mated.sum())
        self.num_ids, self.num_mated_ids = len(ids.unique()), len(ids[mated].unique())
        self.gallery_images = float(found.num_others.double().mean())

        known = stranger >= 0
        # Without the identity of the best stranger, the next one counts.
        alarms = self.reached(ids, best)
        by_one = self.reached(stranger[known], best[known]) - self.reached(stranger[known], second[known])
        is_right = mated & (right > best)
        hits = self.reached(ids[is_right], right[is_right])
        # Searches that fail because of one other identity only.
        blocked = mated & ~is_right & (second < right)
        by_one_hit = -self.reached(stranger[blocked], right[blocked])
        sizes, mated_sizes = (torch.bincount(part, minlength=counts.num_ids).double() for part in (ids, ids[mated]))
        self.alarms = alarms.sum(0) / max(self.num_searches, 1)
        self.hits = hits.sum(0) / max(self.num_mated, 1)
        if self.num_ids > 1 and self.num_mated_ids > 1:
            self.alarms_drawn = self.drawn(resampling, alarms, by_one, sizes, prior=0)
            self.hits_drawn = self.drawn(resampling, hits, by_one_hit, mated_sizes, prior=1)

    def drawn(self, resampling, counts, by_one, sizes, prior):
        """Replicates of a share of searches: `counts` of the identities searched for, and what the outcome owes to
        one identity of the gallery, `by_one`.
        """
        total, influences = sizes.sum(), counts + by_one
        size = float(total) / int((sizes > 0).sum())
        drawn = resampling.share(counts.sum(0), influences, total, sizes, prior=prior, size=size)
        # Such a search counts for both of its identities, and its own chance would be counted twice.
        share = counts.sum(0) / total
        variance = (influences - share * sizes[:, None]).square().sum(0)
        once = (1 - by_one.sum(0).abs() / variance.clamp(min=1e-12)).clamp(0.25, 1).sqrt()
        return share + once * (drawn - share)

    def reached(self, ids, scores):
        """(identities, edges): how many of the scores of each identity reach each edge."""
        width = self.grid.num_steps + 2
        table = torch.zeros(self.num_ids_drawn * width, dtype=torch.float64)
        places = ids * width + self.grid.columns(scores)
        return self.grid.reaching(
            table.index_add_(0, places, torch.ones(len(ids), dtype=torch.float64)).view(-1, width)
        )

    def sizes(self):
        return {
            "num_identities": self.num_ids,
            "num_searches": self.num_searches,
            "num_mated_searches": self.num_mated,
            "gallery_images": self.gallery_images,
        }

    def at(self, rate):
        needed = math.ceil(IDENTITIES_WITHIN / rate)
        if self.num_ids < needed or self.num_mated_ids < FEWEST_MATCHED:
            shown = min(self.num_ids, self.num_mated_ids)
            return not_measurable(f"{shown} identities: {needed} are needed")
        if self.alarms[-1] > rate or self.alarms[0] <= rate:
            return not_measurable(f"{self.num_ids} identities: their scores are too equal")
        allowed = int(rate * self.num_searches + 1e-9)
        limit = self.best.sort(descending=True).values[allowed]
        threshold = torch.nextafter(limit, torch.tensor(2.0))
        rate_of_hits = float((self.right >= threshold).double().mean())
        drawn, places = crossings(self.alarms_drawn, self.grid.edges, rate)
        return {
            "threshold": float(threshold),
            "threshold_interval": interval(drawn, self.num_ids, float(threshold)),
            "false_alarm_rate": float((self.best >= threshold).double().mean()),
            "TPIR": rate_of_hits,
            "TPIR_interval": interval(at_places(self.hits_drawn, places), self.num_mated_ids, rate_of_hits),
        }

    def curve(self):
        points = slice(None, None, CURVE_STEP)
        return {
            "least_false_alarm_rate": min(1.0, IDENTITIES_WITHIN / max(self.num_ids, 1)),
            "false_alarm_rate": self.alarms[points],
            "TPIR": self.hits[points],
        }


def not_measurable(reason):
    return {"threshold": None, "reason": f"not measurable with {reason}"}


def needed_identities(rate):
    """How many identities have enough pairs for a false-match rate."""
    return math.ceil((1 + math.sqrt(1 + 8 * PAIRS_WITHIN / rate)) / 2)


def calibration_lines(calibration):
    """A line for the smallest measurable false-match rate, and one for that of false alarms."""
    words = {
        "rates": ("Two images", "false-match rate", "right_match_rate", "of the right pairs match"),
        "open_set": ("A search", "false alarms", "TPIR", "of the people who are there are found"),
    }
    lines = []
    for part, (what, error, name, right) in words.items():
        rates = calibration[part] if part == "rates" else calibration[part]["rates"]
        measured = [(rate, entry) for rate, entry in rates.items() if entry["threshold"] is not None]
        if not measured:
            lines.append(f"{what}: {next(iter(rates.values()))['reason']}")
            continue
        rate, entry = min(measured, key=lambda item: float(item[0]))
        low, high = map(float, entry["threshold_interval"])
        line = f"{what}: {error} {rate} at score {entry['threshold']:.3f} ({low:.3f} to {high:.3f})"
        if entry[name] is not None:
            low, high = map(float, entry[f"{name}_interval"])
            line += f", {100 * entry[name]:.1f} % ({100 * low:.1f} % to {100 * high:.1f} %) {right}"
        lines.append(line)
    return lines
