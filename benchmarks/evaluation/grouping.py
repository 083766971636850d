"""Identities across cameras on the built-in world: the distance of neighbours is chosen on domain a, then measured.

    python -m benchmarks.evaluation.grouping

The shipped stand-in CLIP, without training. Items are images, or tracklets: the mean feature of an identity's images
from one camera. Of the distances `--eps` the one is chosen with which pairwise F1 and B-cubed F1 are best on people of
domain a, as a mean over the seeds, images and tracklets. With it, other people of domain a, and domains b and c, are
grouped; neither their seeds nor their numbers take part in the choice.

The last columns ask which number tells impure groups, those that hold more than one identity, from pure ones: the
chance that of two such groups the impure one has the lower cohesion, or more items, or the larger doubt
(`utils.evaluation.groups.grouping.doubts`, which orders the report).
"""

import argparse
import statistics
from pathlib import Path

import datasets
import torch
import torch.nn.functional as F
from accelerate import Accelerator

from benchmarks.common import RESULTS, command_line, mean_and_deviation, write_result
from utils.batches.transforms import test_transform
from utils.datasets.load import load_reid
from utils.evaluation.features import extract
from utils.evaluation.groups.grouping import doubts, group, scores, settings_for
from utils.flags import CLIP_DIR
from utils.modeling.reid_model import ReIDModel
from utils.reporting.report import text_table

RESOLUTION = (128, 64)
EPS = [0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7]
KINDS = ("images", "tracklets")
CHOSEN_ON = "a, where chosen"
# Seeds of the people that are measured, apart from those of the choice.
OTHER_PEOPLE = 1000
PLACES = {
    CHOSEN_ON: ("a", 0),
    "a, other people": ("a", OTHER_PEOPLE),
    "b": ("b", OTHER_PEOPLE),
    "c": ("c", OTHER_PEOPLE),
}
SIGNS = {"cohesion": -1, "size": 1, "doubt": 1}
COLUMNS = [
    "items", "domain", "eps", "pairwise F1", "B-cubed F1", "ARI", "impure groups",
    *(f"AUC of {sign}" for sign in SIGNS),
]  # fmt: skip


def items_of(model, accelerator, domain, seed, args):
    """{kind: (features, identities)} of the people of a domain."""
    data = load_reid("synthetic", domain=domain, seed=seed, num_ids=args.num_ids, images_per_id=args.images_per_id)
    images = datasets.concatenate_datasets([data["query"], data["gallery"]])
    transform = test_transform(model.image_size, model.image_mean, model.image_std, model.resample)
    features = extract(model, images, transform, accelerator=accelerator, desc=f"domain {domain}, seed {seed}")
    pids, camids = (torch.tensor(images[name][:]) for name in ("pid", "camid"))
    owners, places = torch.stack([pids, camids], 1).unique(dim=0, return_inverse=True)
    sums = torch.zeros(len(owners), features.shape[1]).index_add_(0, places, F.normalize(features, dim=1))
    return {"images": (features, pids), "tracklets": (F.normalize(sums, dim=1), owners[:, 0])}


def measured(features, pids, eps):
    """The scores of a grouping, and of each number how well it tells impure groups."""
    found = group(features, settings_for(len(features), eps=eps))
    truth = scores(found.identities, pids)
    sizes, cohesions, impure = [], [], []
    for number in range(1, found.num_groups + 1):
        rows = found.identities == number
        sizes.append(int(rows.sum()))
        cohesions.append(float(found.cohesion[rows][0]))
        impure.append(len(pids[rows].unique()) > 1)
    numbers = {"cohesion": cohesions, "size": sizes, "doubt": doubts(found).tolist()}
    return {
        "pairwise": truth["pairwise"]["f1"],
        "bcubed": truth["bcubed"]["f1"],
        "ari": truth["ari"],
        "impure": statistics.fmean(impure) if impure else None,
        "auc": {name: auc([SIGNS[name] * value for value in values], impure) for name, values in numbers.items()},
    }


def auc(values, is_impure):
    """The chance that an impure group has the larger value, ties count half; None without groups of both kinds."""
    impure, pure = (
        [value for value, of in zip(values, is_impure, strict=True) if of == kind] for kind in (True, False)
    )
    if not impure or not pure:
        return None
    wins = sum((value > other) + 0.5 * (value == other) for value in impure for other in pure)
    return wins / len(impure) / len(pure)


def chosen(runs):
    """The distance with the best mean of both F1 on the people of CHOSEN_ON, the smallest of equal ones."""

    def mean(eps):
        found = [run["numbers"][kind][f"{eps:g}"] for run in runs if run["place"] == CHOSEN_ON for kind in KINDS]
        return statistics.fmean([(one["pairwise"] + one["bcubed"]) / 2 for one in found])

    return max(EPS, key=mean)


def rows_of(runs):
    eps, rows = chosen(runs), []
    for kind in KINDS:
        for place in PLACES:
            found = [run["numbers"][kind][f"{eps:g}"] for run in runs if run["place"] == place]
            columns = [[one[name] for one in found] for name in ("pairwise", "bcubed", "ari", "impure")]
            cells = [mean_and_deviation(values, scale=100) for values in columns]
            for name in SIGNS:
                known = [one["auc"][name] for one in found if one["auc"][name] is not None]
                cells.append(mean_and_deviation(known, digits=2) if known else "-")
            rows.append([kind, place, f"{eps:g}", *cells])
    return rows


def main(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the people that are drawn")
    parser.add_argument("--num_ids", type=int, default=96, help="identities of a set")
    parser.add_argument("--images_per_id", type=int, default=8, help="images of each identity")
    parser.add_argument("--json", type=Path, default=RESULTS / "grouping.json", help="result file")
    args = parser.parse_args(input_args)
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    model = ReIDModel.from_backbone(CLIP_DIR, image_size=RESOLUTION).eval()
    runs = []
    for place, (domain, shift) in PLACES.items():
        for seed in args.seeds:
            items = items_of(model, accelerator, domain, seed + shift, args)
            numbers = {kind: {f"{eps:g}": measured(*items[kind], eps) for eps in EPS} for kind in KINDS}
            runs.append({"place": place, "seed": seed + shift, "numbers": numbers})
    rows = rows_of(runs)
    print(text_table(COLUMNS, rows))
    settings = {"num_ids": args.num_ids, "images_per_id": args.images_per_id}
    raw = {"settings": settings, "eps": chosen(runs), "runs": runs}
    write_result(args.json, command_line("benchmarks.evaluation.grouping"), COLUMNS, rows, raw)


if __name__ == "__main__":
    main()
