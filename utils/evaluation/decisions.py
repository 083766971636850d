"""Decisions of a search: is the nearest image of the same person, or is nobody there, and how often that is wrong.

A calibration (`utils.evaluation.calibration`) says how often a search for somebody who is not in the gallery gives a
score of at least s: the chance of a false alarm. Measured with n gallery images, it is

    1 - (1 - FPIR(s)) ^ (N / n)

for a gallery of N images, as if their scores were independent. At an accepted rate of false alarms the answer is

    yes       the chance at the score of the nearest image is at most the accepted rate
    unsure    at most ten times that and not above one half, or as small as the calibration's identities can show
    nobody    no image passes

Of a yes, the expected error is that chance; of "nobody" it is the share of the people who are there whom such a
search would miss.
"""

from dataclasses import dataclass

import numpy as np

from utils.datasets.schema import UNKNOWN
from utils.evaluation.lists import findable, is_match

YES, UNSURE, NOBODY = "yes", "unsure", "nobody"
UNSURE_TIMES, MOST_UNSURE = 10, 0.5
DECISIONS = "decisions.csv"
COLUMNS = ("query", "same_person", "gallery", "score", "false_match_rate", "false_alarm_rate", "miss_rate")
SHOWN = 20
MEANINGS = {
    YES: "the same person, within the accepted rate of false alarms",
    UNSURE: "perhaps the same person: look at the image",
    NOBODY: "no image of the gallery is alike enough",
}


@dataclass
class Decision:
    """The answer for one query; `column` is the nearest gallery image, -1 where the protocol keeps none.

    `false_match_rate`: how many pairs of two people are as alike; `false_alarm_rate`: the chance of such a score in a
    search for somebody who is not there. Where a flag `_below` is set, the true value is at most that. `miss_rate` is
    None unless the answer is "nobody".
    """

    answer: str
    column: int
    score: float
    false_match_rate: float
    false_match_below: bool
    false_alarm_rate: float
    false_alarm_below: bool
    miss_rate: float | None

    def describe(self):
        if self.answer == NOBODY:
            return (
                f"nobody: no gallery image passes, the nearest has score {self.score:.3f}; this limit misses "
                f"{100 * self.miss_rate:.0f} % of the people who are in a gallery"
            )
        return (
            f"same person: {self.answer}, score {self.score:.3f}, "
            f"false-match rate {'below ' if self.false_match_below else ''}{self.false_match_rate:.1e}, "
            f"false alarm {'below ' if self.false_alarm_below else ''}{100 * self.false_alarm_rate:.1f} %"
        )


class Calibrated:
    """The curves of a calibration for a gallery of `num_gallery` images."""

    def __init__(self, calibration, num_gallery):
        curve = calibration["curve"]
        self.scores = np.array(curve["score"])
        self.false_matches, self.hits = np.array(curve["false_match_rate"]), np.array(curve["TPIR"])
        self.least_false_match = curve["least_false_match_rate"]
        self.times = num_gallery / max(calibration["open_set"]["gallery_images"], 1.0)
        self.false_alarms = np.array(curve["false_alarm_rate"])
        self.least_false_alarm = self.for_gallery(curve["least_false_alarm_rate"])

    def for_gallery(self, rate):
        return 1 - (1 - min(max(float(rate), 0.0), 1.0)) ** self.times

    def false_match(self, score):
        return at_least(self.least_false_match, np.interp(score, self.scores, self.false_matches))

    def false_alarm(self, score):
        rate = self.for_gallery(np.interp(score, self.scores, self.false_alarms))
        return at_least(self.least_false_alarm, rate)

    def passing(self, accepted):
        """The largest rate of false alarms that is not "nobody"."""
        return max(accepted, min(UNSURE_TIMES * accepted, MOST_UNSURE), self.least_false_alarm)

    def miss_rate(self, accepted):
        """Share of the people who are there whose search does not pass."""
        passing = [self.false_alarm(score)[0] <= self.passing(accepted) for score in self.scores]
        return float(1 - self.hits[passing.index(True)]) if any(passing) else 1.0


def at_least(least, rate):
    """(rate, whether it is only an upper limit): smaller rates cannot be shown."""
    return (float(least), True) if rate < least else (float(rate), False)


def decide(calibration, lists, num_gallery, accepted=0.01):
    """A `Decision` for each query of ranked lists (`ranked_lists`) of cosine distances."""
    calibrated = Calibrated(calibration, num_gallery)
    missed, decisions = calibrated.miss_rate(accepted), []
    for column, distance in zip(lists[0][:, 0].tolist(), lists[1][:, 0].tolist(), strict=True):
        score = 1 - distance / 2 if column >= 0 else -1.0
        chance, is_limit = calibrated.false_alarm(score)
        answer = YES if chance <= accepted else UNSURE if chance <= calibrated.passing(accepted) else NOBODY
        if column < 0:
            answer = NOBODY
        decisions.append(
            Decision(
                answer,
                column,
                score,
                *calibrated.false_match(score),
                chance,
                is_limit,
                missed if answer == NOBODY else None,
            )
        )
    return decisions


def limits(calibration, num_gallery, accepted):
    """A sentence if the calibration has too few identities for a yes at the accepted rate, else None."""
    least = Calibrated(calibration, num_gallery).least_false_alarm
    if least <= accepted:
        return None
    return (
        f"The calibration's {calibration['open_set']['num_identities']} identities can show false alarms down to "
        f"{100 * least:.1f} % in a gallery of {num_gallery:,} images, not {100 * accepted:.1f} %: the best answer is "
        f"{UNSURE!r}; calibrate with more identities, or raise --false_alarm_rate"
    )


def summary(decisions, queries, gallery, protocol="all"):
    """How often each answer was given; where identities are known, how often it was right.

    "Nobody" is right where the gallery has no image of that person that the protocol keeps.
    """
    counts = {answer: sum(one.answer == answer for one in decisions) for answer in (YES, UNSURE, NOBODY)}
    known = [row for row in range(len(decisions)) if int(queries.pids[row]) != UNKNOWN]
    if not known or not bool((gallery.pids != UNKNOWN).any()):
        return counts
    there = findable(queries, gallery, protocol)
    right = dict.fromkeys(counts, 0)
    for row in known:
        one = decisions[row]
        if one.answer == NOBODY:
            right[NOBODY] += not there[row]
        else:
            right[one.answer] += bool(is_match(queries, gallery, row, one.column))
    return counts | {"num_labelled": len(known), "right": right}


def csv_rows(decisions, queries, gallery):
    for name, one in zip(queries.paths, decisions, strict=True):
        nearest = gallery.paths[one.column] if one.column >= 0 else ""
        miss = "" if one.miss_rate is None else f"{one.miss_rate:.4f}"
        rates = f"{one.false_match_rate:.3g}", f"{one.false_alarm_rate:.4f}"
        # A number: `write_csv` would take the text of a negative one for a formula.
        yield name, one.answer, nearest, round(one.score, 6), *rates, miss


def text_lines(decisions, queries, gallery, protocol="all"):
    """A line for each of the first queries."""
    for name, one in list(zip(queries.paths, decisions, strict=True))[:SHOWN]:
        nearest = f"{gallery.paths[one.column]}, " if one.answer != NOBODY else ""
        yield f"{name}: {nearest}{one.describe()}"
    if len(decisions) > SHOWN:
        yield f"{len(decisions) - SHOWN} more queries: {DECISIONS}"
    counts = summary(decisions, queries, gallery, protocol)
    answers = [f"{answer} {counts[answer]}{share_right(counts, answer)}" for answer in MEANINGS]
    yield f"Decisions of {len(decisions)} queries: {', '.join(answers)}"


def share_right(counts, answer):
    return f" ({counts['right'][answer]} right)" if counts.get("right") else ""


def add_decisions(report, counts):
    """The answers of a search, counted, before its lists: `counts` is the `summary`."""
    words = f"Is the nearest image of the same person? The answers by the calibration; {DECISIONS} has them by query."
    report.section("Decisions", words)
    right = counts.get("right")
    columns = ["answer", "meaning", "queries", *(["right"] if right else [])]
    rows = [[one, MEANINGS[one], counts[one], *([right[one]] if right else [])] for one in MEANINGS]
    caption = ""
    if right:
        caption = (
            f"Right: the nearest image shows the person, or the person is not there; of {counts['num_labelled']:,} "
        )
        caption += "queries with a known identity."
    report.table(columns, rows, text_columns=2, caption=caption)
