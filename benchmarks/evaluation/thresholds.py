"""Thresholds fixed on one domain of the built-in world and used on another, with a quarter of the people not there.

    python -m benchmarks.evaluation.thresholds

The shipped stand-in CLIP, without training. In each set every fourth identity is taken out of the gallery, so that a
search for it should end with nobody. `utils.evaluation.calibration` fixes thresholds on people of domain a; they are
then used on other people of domain a, where they should hold, and on domain b, whose cameras and clothes differ. The
last column has thresholds that were fixed on the same people of domain b: what there is to win by calibrating there.

    false-match rate   pairs of two identities that match       right matches   pairs of one identity that match
    false alarms       searches for somebody who is not there   found           searches for somebody who is there
                       in which an image matches                                whose best image is right and matches
"""

import argparse
from pathlib import Path

import datasets
import torch
from accelerate import Accelerator

from benchmarks.common import RESULTS, command_line, mean_and_deviation, write_result
from utils.batches.transforms import test_transform
from utils.datasets.load import load_reid
from utils.evaluation.calibration import FALSE_ALARM_RATES, FALSE_MATCH_RATES, calibrate
from utils.evaluation.features import extract
from utils.evaluation.metrics import Side
from utils.evaluation.thresholds import pair_statistics
from utils.flags import CLIP_DIR
from utils.modeling.reid_model import ReIDModel
from utils.reporting.report import text_table

RESOLUTION = (128, 64)
ABSENT = 4
# Seeds of other people of the domain where the thresholds were fixed.
OTHER_PEOPLE = 1000
PLACES = ["a, where fixed", "a, other people", "b", "b, fixed on b"]
COLUMNS = ["threshold for", "rate", "number in %", *PLACES]
NUMBERS = {
    "pairs": {"false_match_rate": "false-match rate", "right_match_rate": "right matches"},
    "searches": {"false_alarm_rate": "false alarms", "TPIR": "found"},
}


def people(model, accelerator, domain, seed, args):
    """Query and gallery of a domain, every fourth identity only among the queries."""
    data = load_reid("synthetic", domain=domain, num_ids=args.num_ids, images_per_id=args.images_per_id, seed=seed)
    absent = set(sorted(set(data["query"]["pid"]))[::ABSENT])
    there = [row for row, pid in enumerate(data["gallery"]["pid"]) if pid not in absent]
    parts = data["query"], data["gallery"].select(there)
    transform = test_transform(model.image_size, model.image_mean, model.image_std, model.resample)
    images = datasets.concatenate_datasets(list(parts))
    features = extract(model, images, transform, accelerator=accelerator, desc=f"domain {domain}, seed {seed}")
    pids, camids = (torch.tensor(images[name][:]) for name in ("pid", "camid"))
    sides, count = [], len(parts[0])
    for rows in (slice(count), slice(count, None)):
        sides.append(Side(features[rows], pids[rows], camids[rows], images["path"][rows]))
    return sides


def calibrated(sides, seed):
    pairs = pair_statistics(*sides, rates=FALSE_MATCH_RATES)
    made = calibrate(*sides, pairs, replicates=200, seed=seed, by_camera=False)
    return {"pairs": made["rates"], "searches": made["open_set"]["rates"]}


def measured(queries, gallery, thresholds):
    """The numbers of NUMBERS at each threshold, {kind: {rate: threshold}}, from all scores."""
    scores = queries.features @ gallery.features.T
    same = queries.pids[:, None] == gallery.pids
    kept = same & (queries.camids[:, None] != gallery.camids)
    others = scores.masked_fill(same, -torch.inf).amax(1)
    right = scores.masked_fill(~kept, -torch.inf).amax(1)
    is_there, is_absent = kept.any(1), ~same.any(1)
    strangers, matches = scores[~same], scores[kept]

    def share(mask):
        return float(mask.double().mean())

    found = {"pairs": {}, "searches": {}}
    for rate, threshold in thresholds["pairs"].items():
        rates = share(strangers >= threshold), share(matches >= threshold)
        found["pairs"][rate] = dict(zip(NUMBERS["pairs"], rates, strict=True))
    for rate, threshold in thresholds["searches"].items():
        hit = (right >= threshold) & (right > others)
        rates = share(others[is_absent] >= threshold), share(hit[is_there])
        found["searches"][rate] = dict(zip(NUMBERS["searches"], rates, strict=True))
    return found


def run(model, accelerator, seed, args):
    """The thresholds of both domains and the numbers in each of PLACES, of one seed."""
    fixed_on, other, there = (
        people(model, accelerator, domain, number, args)
        for domain, number in (("a", seed), ("a", OTHER_PEOPLE + seed), ("b", seed))
    )
    thresholds = []
    for sides in (fixed_on, there):
        entries = calibrated(sides, seed)
        thresholds.append(
            {
                kind: {rate: entry["threshold"] for rate, entry in rates.items() if entry["threshold"] is not None}
                for kind, rates in entries.items()
            }
        )
    sets = zip(PLACES, (fixed_on, other, there, there), [thresholds[0]] * 3 + [thresholds[1]], strict=True)
    return {
        "seed": seed,
        "thresholds": {"a": thresholds[0], "b": thresholds[1]},
        "numbers": {place: measured(*sides, limits) for place, sides, limits in sets},
    }


def rows_of(runs):
    names = {"pairs": "two images", "searches": "a search"}
    rates = {"pairs": FALSE_MATCH_RATES, "searches": FALSE_ALARM_RATES}
    rows = []
    for kind, numbers in NUMBERS.items():
        for rate in (f"{one:g}" for one in rates[kind]):
            if not all(rate in one["numbers"][place][kind] for one in runs for place in PLACES):
                continue
            for key, number in numbers.items():
                values = [[one["numbers"][place][kind][rate][key] for one in runs] for place in PLACES]
                cells = [mean_and_deviation(part, digits=2, scale=100) for part in values]
                rows.append([names[kind], rate, number, *cells])
    return rows


def main(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the people that are drawn")
    parser.add_argument("--num_ids", type=int, default=504, help="identities of a set")
    parser.add_argument("--images_per_id", type=int, default=5, help="images of each identity")
    parser.add_argument("--json", type=Path, default=RESULTS / "thresholds.json", help="result file")
    args = parser.parse_args(input_args)
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    model = ReIDModel.from_backbone(str(CLIP_DIR), image_size=RESOLUTION).eval()
    runs = [run(model, accelerator, seed, args) for seed in args.seeds]
    rows = rows_of(runs)
    print(text_table(COLUMNS, rows))
    settings = {"num_ids": args.num_ids, "images_per_id": args.images_per_id, "absent": f"1 in {ABSENT}"}
    raw = {"settings": settings, "runs": runs}
    write_result(args.json, command_line("benchmarks.evaluation.thresholds"), COLUMNS, rows, raw)


if __name__ == "__main__":
    main()
