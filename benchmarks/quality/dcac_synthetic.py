"""DCAC beside its baseline on unseen domains of the built-in world: mean and deviation over several seeds.

    python -m benchmarks.quality.dcac_synthetic --output_dir output/dcac_synthetic

The models are the shipped stand-ins. Each run is `train_dcac.py` in a process of its own; finished runs are not
repeated.
"""

import argparse
import json
import sys
from pathlib import Path

from benchmarks.common import RESULTS, command_line, finished, in_percent, run_once, write_result
from utils.reporting.report import text_table

# Sources, identities of each, targets.
SETTINGS = {
    "single": (["a"], 128, ["b", "c", "d"]),
    "multi": (["a", "c", "d"], 48, ["b", "e"]),
}
TRAINING = ["--num_train_epochs", "5", "--lr_milestones", "4", "--memory_temperature", "0.1", "--erasing", "0"]
METHODS = {"baseline": ["--diffusion", "none"], "DCAC": []}
COLUMNS = ["domains", "number", *METHODS, "gain"]
SPEC = "synthetic:domain={}"


def train(folder, sources, num_ids, targets, seed, more):
    """metrics.json of a run, and the seconds between its first file and its last."""
    words = ["--source", *(f"{SPEC.format(source)},num_ids={num_ids}" for source in sources)]
    words += ["--target", *map(SPEC.format, targets), "--seed", seed, *more]
    words += ["--validation_ids", 0, "--eval_every", 5, *TRAINING]
    finished(run_once("train_dcac.py", folder, words, "model/model.safetensors"), "train_dcac.py")
    done = folder / "model" / "model.safetensors"
    seconds = done.stat().st_mtime - (folder / "args.json").stat().st_mtime
    return json.loads((folder / "metrics.json").read_text()), round(seconds)


def rows_of(runs):
    """A row of each target and number: every method, and the gain of the last over the first with the same seed."""
    rows = []
    for setting in dict.fromkeys(run["setting"] for run in runs):
        its = [run for run in runs if run["setting"] == setting]
        for target in its[0]["after"]:
            for key, words in (("mAP", "mAP %"), ("rank1", "Rank-1 %")):
                of = {name: [run["after"][target][key] for run in its if run["method"] == name] for name in METHODS}
                first, *_, last = of.values()
                gains = [new - old for old, new in zip(first, last, strict=True)]
                where = "+".join(its[0]["sources"]) + " -> " + target
                rows.append([where, words, *map(in_percent, of.values()), in_percent(gains, "+")])
    return rows


def main(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output_dir", default="output/dcac_synthetic", help="where the runs are kept")
    parser.add_argument("--json", type=Path, default=RESULTS / "dcac_synthetic.json")
    args = parser.parse_args(input_args)
    runs = []
    for setting in args.settings:
        sources, num_ids, targets = SETTINGS[setting]
        for method, more in METHODS.items():
            for seed in args.seeds:
                folder = Path(args.output_dir) / f"{setting}-{method.lower()}-{seed}"
                metrics, seconds = train(folder, sources, num_ids, targets, seed, more)
                before = {
                    one["target"].removeprefix(SPEC.format("")): {"mAP": one["mAP"], "rank1": one["rank1"]}
                    for one in metrics["history"]
                    if one["epoch"] == 0
                }
                found = {one: metrics["targets"][SPEC.format(one)] for one in targets}
                after = {one: {key: found[one][key] for key in ("mAP", "rank1")} for one in targets}
                runs.append(
                    {
                        "setting": setting, "sources": sources, "num_ids": num_ids, "method": method, "seed": seed,
                        "seconds": seconds, "before": before, "after": after,
                    }
                )  # fmt: skip
    rows = rows_of(runs)
    print(text_table(COLUMNS, rows))
    raw = {"training": TRAINING, "runs": runs}
    write_result(args.json, command_line(__spec__.name, input_args), COLUMNS, rows, raw)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"benchmarks.quality.dcac_synthetic: {error}")
