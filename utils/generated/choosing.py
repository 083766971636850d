"""Choosing among scored images: thresholds, calibration, near-duplicates, limits for each identity.

All functions work on a few numbers for each image (about 40 bytes), read from scores.parquet; no model is loaded.
"""

import shlex
from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as pq

FILTERS = {"clip": "clip_score", "cctf": "cctf_score", "reid": "reid_score", "attributes": "attribute_score"}
UNREADABLE = "unreadable"
STRANGER = "nearest source image shows somebody else"
BELOW = "score below the threshold"
DOUBLE = "near-duplicate"
SURPLUS = "more than wanted of its identity"
FEW = "too few left of its identity"
CHANGED = "more in changed than in own clothes"
DISAGREES = "answers disagree with the prompt"
REASONS = ("", UNREADABLE, STRANGER, BELOW, DOUBLE, SURPLUS, FEW, CHANGED, DISAGREES)
# What a Re-ID score loses for each unit by which another identity's source image is nearer.
LEAD_WEIGHT = 2.0


@dataclass
class Scores:
    """Columns of scores.parquet as arrays.

    `people` are the identities (domain, pid); `person` and `source` are the indices of a row's identity and domain.
    `match`: whether the nearest source image shows the same identity (Re-ID CTF). `lead`: by how much the nearest
    source image is nearer than the nearest one of the same identity; 0 for a match. `changed`: whether a garment
    is not the identity's own, or None.
    """

    people: list
    domains: list
    person: np.ndarray
    source: np.ndarray
    sound: np.ndarray
    match: np.ndarray
    lead: np.ndarray
    hashes: np.ndarray
    values: dict
    changed: np.ndarray | None = None

    @property
    def own_clothes(self):
        return np.ones(len(self), bool) if self.changed is None else ~self.changed

    def __len__(self):
        return len(self.person)

    def has(self, name):
        return name in self.values and bool(np.isfinite(self.values[name]).any())


def read_scores(path, match_margin=None, lead_weight=None):
    """`Scores` of a parquet file, read in batches of rows.

    A lead of at most `match_margin` counts as a match. With `lead_weight`, every image counts as one, and its Re-ID
    score is less its lead times this weight.
    """
    people, domains, parts = {}, {}, []
    columns = ["domain", "pid", "error", "reid_match", "reid_lead", "perceptual_hash", *FILTERS.values(), "changed"]
    with pq.ParquetFile(path, pre_buffer=False) as file:
        present = file.schema_arrow.names
        has_changed = "changed" in present
        for batch in file.iter_batches(8192, columns=[name for name in columns if name in present]):
            labels = list(zip(batch["domain"].to_pylist(), batch["pid"].to_pylist(), strict=True))
            part = {
                "person": np.array([people.setdefault(label, len(people)) for label in labels], np.int32),
                "source": np.array([domains.setdefault(domain, len(domains)) for domain, _ in labels], np.int16),
                "sound": batch["error"].is_null().to_numpy(zero_copy_only=False),
                "match": batch["reid_match"].fill_null(False).to_numpy(zero_copy_only=False),
                "lead": batch["reid_lead"].to_numpy(zero_copy_only=False).astype(np.float32),
                "hashes": batch["perceptual_hash"].fill_null(0).to_numpy(zero_copy_only=False),
            }
            if has_changed:
                part["changed"] = batch["changed"].is_valid().to_numpy(zero_copy_only=False)
            for name, column in FILTERS.items():
                if column in present:
                    part[name] = batch[column].cast("float32").to_numpy(zero_copy_only=False).astype(np.float32)
                else:
                    part[name] = np.full(len(labels), np.nan, np.float32)
            parts.append(part)
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    values = {name: arrays.pop(name) for name in FILTERS}
    if match_margin is not None:
        # An image that does not decode has the lead NaN, which no margin admits.
        arrays["match"] |= arrays["lead"] <= match_margin
    if lead_weight is not None:
        values["reid"] = values["reid"] - np.float32(lead_weight) * arrays["lead"]
        arrays["match"] = np.isfinite(values["reid"])
    return Scores(list(people), list(domains), **arrays, values=values)


@dataclass
class Choice:
    """What is kept: a mask, for each row the index of its reason in `REASONS`, a threshold for each source."""

    kept: np.ndarray
    reason: np.ndarray
    thresholds: dict


def eligible(scores, name):
    """Mask of the rows that this filter's threshold decides on: they decode and, for Re-ID CTF, match."""
    mask = scores.sound & np.isfinite(scores.values[name])
    return mask & scores.match if name == "reid" else mask


def thresholds_of(
    scores,
    name,
    *,
    threshold=None,
    keep_fraction=None,
    false_match_rate=None,
    true_match_rate=None,
    calibration=None,
):
    """{domain: lowest score that is kept}. `threshold` and `keep_fraction` are each {domain: number}.

    Images with changed clothes are no evidence of what an identity looks like, so they are not counted.
    """
    values, mask = scores.values[name], eligible(scores, name) & scores.own_clothes
    thresholds = {}
    for number, domain in enumerate(scores.domains):
        of_domain = (scores.source == number) & scores.own_clothes
        if threshold is not None:
            thresholds[domain] = float(threshold[domain])
        elif keep_fraction is not None:
            wanted = round(keep_fraction[domain] * int(of_domain.sum()))
            thresholds[domain] = score_of_rank(values[of_domain & mask], wanted)
        elif false_match_rate is not None:
            thresholds[domain] = calibrated(calibration[domain]["impostor"], false_match_rate)
        elif true_match_rate is not None:
            thresholds[domain] = reached_by(calibration[domain]["across"], true_match_rate)
        else:
            thresholds[domain] = -np.inf
    return thresholds


def score_of_rank(values, wanted):
    """The lowest of the `wanted` best scores; infinity if none is wanted."""
    if wanted < 1 or not len(values):
        return np.inf
    return float(np.sort(values)[-min(wanted, len(values))])


def calibrated(impostors, rate):
    """The lowest threshold that a share of at most `rate` of the impostor scores reaches."""
    descending = np.sort(np.asarray(impostors, dtype=np.float32))[::-1]
    allowed = int(np.floor(rate * len(descending) + 1e-9))
    if allowed >= len(descending):
        return float("-inf")
    return float(np.nextafter(descending[allowed], np.float32(np.inf)))


def reached_by(genuine, rate):
    """The highest threshold that a share of at least `rate` of the genuine scores reaches."""
    ascending = np.sort(np.asarray(genuine, dtype=np.float32))
    return float(ascending[int(np.floor((1 - rate) * len(ascending) + 1e-9))])


def calibration_rows(calibration, rates):
    """Rows (domain, rate, threshold, true-match rate), one for each domain and rate."""
    rows = []
    for domain, pair in calibration.items():
        for rate in rates:
            threshold = calibrated(pair["impostor"], rate)
            genuine = float((pair["genuine"] >= threshold).mean()) if len(pair["genuine"]) else None
            rows.append((domain, rate, threshold, genuine))
    return rows


def choose_images(scores, name, thresholds, *, target_per_id=None, min_per_id=1, duplicates=None, min_agreement=None):
    """A `Choice`. `duplicates` is a function (rows of one identity, best first) -> mask of those to drop.

    `min_agreement` is the least attribute score, whatever the filter; images without one pass.

    Images in an identity's own clothes come before those with a changed garment; these never fill `min_per_id`, and
    fewer of them are kept than of the others.
    """
    values, own = scores.values[name], scores.own_clothes
    reason = np.zeros(len(scores), np.int8)

    def reject(rows, why):
        reason[rows & (reason == 0)] = REASONS.index(why)

    reject(~scores.sound, UNREADABLE)
    if name == "reid":
        reject(~scores.match, STRANGER)
    floor = np.array([thresholds[domain] for domain in scores.domains], np.float64)[scores.source]
    # A missing score is below every threshold.
    reject(~(values.astype(np.float64) >= floor), BELOW)
    if min_agreement is not None:
        reject(scores.values["attributes"] < np.float32(min_agreement), DISAGREES)
    if duplicates is not None or target_per_id or min_per_id > 1 or not own.all():
        left = np.flatnonzero(reason == 0)
        # By identity, own clothes first, best first, first of equals.
        order = left[np.lexsort((left, -values[left], ~own[left], scores.person[left]))]
        starts = np.flatnonzero(np.diff(scores.person[order], prepend=-1))
        for rows in np.split(order, starts[1:]):
            if duplicates is not None and len(rows) > 1:
                double = duplicates(rows)
                reason[rows[double]] = REASONS.index(DOUBLE)
                rows = rows[~double]
            if target_per_id:
                reason[rows[target_per_id:]] = REASONS.index(SURPLUS)
                rows = rows[:target_per_id]
            count = int(own[rows].sum())
            reason[rows[~own[rows]][max(count - 1, 0) :]] = REASONS.index(CHANGED)
            if count < min_per_id:
                reason[rows[own[rows]]] = REASONS.index(FEW)
                reason[rows[~own[rows]]] = REASONS.index(CHANGED)
    return Choice(reason == 0, reason, thresholds)


def repeated(distances, limit):
    """Mask of the items within `limit` of an earlier item that is kept, best item first: (N, N) -> (N,)."""
    double = np.zeros(len(distances), bool)
    for row in range(1, len(distances)):
        double[row] = bool((distances[row, :row][~double[:row]] <= limit).any())
    return double


def hash_distances(hashes):
    """Number of bits in which 64-bit hashes differ, (N,) -> (N, N)."""
    return np.bitwise_count(hashes[:, None] ^ hashes[None, :])


def cosine_distances(features):
    units = features.astype(np.float32)
    units /= np.maximum(np.linalg.norm(units, axis=1, keepdims=True), 1e-12)
    return 1 - units @ units.T


def perceptual_hash(image):
    """64 bits: whether each of 16 x 4 cells is brighter than the one to its right, at a person's aspect ratio."""
    cells = np.asarray(image.convert("L").resize((5, 16), 4), dtype=np.int16)
    return int.from_bytes(np.packbits(cells[:, :-1] > cells[:, 1:]).tobytes(), "big")


def ranking(scores, name):
    """Values that rank images in the order a filter keeps them; -inf for images that cannot be kept.

    For Re-ID CTF, matches come first, by score; the others follow, by the margin they would need.
    """
    values = scores.values[name].astype(np.float64)
    sound = scores.sound & np.isfinite(values)
    if name == "reid" and sound.any():
        values = np.where(scores.match, values, values[sound].min() - 1 - scores.lead)
    return np.where(sound, values, -np.inf)


def equal_share(scores, name, count):
    """Mask of the `count` best images of a filter, to compare filters that keep equally many."""
    values = np.where(eligible(scores, name), scores.values[name], -np.inf)
    best = np.argsort(-values, kind="stable")[:count]
    mask = np.zeros(len(scores), bool)
    mask[best[np.isfinite(values[best])]] = True
    return mask


def area_under_curve(values, good):
    """How often a good row has a higher value than a bad row, ties count half; None if one kind is missing."""
    good = np.asarray(good, bool)
    bad = np.sort(values[~good])
    if not good.any() or not len(bad):
        return None
    above = np.searchsorted(bad, values[good], side="left") + np.searchsorted(bad, values[good], side="right")
    return float(above.mean() / (2 * len(bad)))


def without_score(scores, name):
    """How many images that decode have no score of this filter."""
    return int((scores.sound & ~np.isfinite(scores.values[name])).sum())


def images_per_person(scores, kept):
    return np.bincount(scores.person[kept], minlength=len(scores.people))


def share_below(counts, limits):
    """The share of identities with fewer than X images, for each X."""
    ordered = np.sort(np.asarray(counts))
    return [float(np.searchsorted(ordered, limit, side="left") / max(len(ordered), 1)) for limit in limits]


def numbers_by_domain(numbers, domains, flag):
    """{domain: number} from {domain, or None for all: number}, or None; ValueError unless it names every domain."""
    if numbers is None:
        return None
    if None in numbers:
        return dict.fromkeys(domains, numbers[None])
    unmatched = [
        domain for domain in {**numbers, **dict.fromkeys(domains)} if (domain in numbers) != (domain in domains)
    ]
    if unmatched:
        known = ", ".join(domains)
        if unmatched[0] in domains:
            raise ValueError(f"{flag} has no number for the source {unmatched[0]}; give one for each of {known}")
        raise ValueError(f"{flag}: {unmatched[0]!r} is no source; they are {known}")
    return numbers


def nothing_left(scores, choice, name):
    """The error for an empty choice: why each image is rejected, and a threshold that would keep half."""
    mask, suggestions = eligible(scores, name), []
    for number, domain in enumerate(scores.domains):
        values = scores.values[name][mask & (scores.source == number)]
        if len(values):
            suggestions.append((domain, short_threshold(values, score_of_rank(values, max(1, len(values) // 2)))))
    counts = np.bincount(choice.reason, minlength=len(REASONS))
    why = ", ".join(f"{counts[index]} {word}" for index, word in enumerate(REASONS) if word and counts[index])
    advice = "no image could be kept at any threshold"
    if counts[REASONS.index(FEW)]:
        advice = "Lower --min_per_id"
    elif suggestions:
        listed = (
            suggestions[0][1]
            if len(suggestions) == 1
            else " ".join(shlex.quote(f"{source}={number}") for source, number in suggestions)
        )
        advice = f"--threshold {listed} would keep half of those that pass the other rules"
    return f"nothing is left of {len(scores)} images ({why}). Their scores are kept. {advice}"


def short_threshold(values, least):
    """`least` in the fewest digits, at least four, that keep the same values."""
    values = values.astype(np.float64)
    for digits in range(4, 9):
        number = np.floor(least * 10**digits) / 10**digits
        if (values >= number).sum() == (values >= least).sum():
            return f"{number:.{digits}f}"
    return repr(least)


def duplicate_finder(scores, kind, limit, features):
    """`duplicates` for `choose_images`, or None. `kind`: keep, perceptual or feature; `features`: one row an image."""
    if kind == "keep":
        return None
    if kind == "perceptual":
        bits = 4 if limit is None else limit
        return lambda rows: repeated(hash_distances(scores.hashes[rows]), bits)
    # Rounding can put a feature at a small distance from itself.
    distance = (0.02 if limit is None else limit) + 1e-6
    return lambda rows: repeated(cosine_distances(features[rows]), distance)
