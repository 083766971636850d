"""Baseline against DCAC on the built-in world, with the shipped stand-ins: several seeds, unseen domains, deviations.

    python -m benchmarks.dcac_synthetic --output_dir output/dcac_synthetic

Each run is `train_dcac.py` in a process of its own; finished ones are not run again.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.retrieval import RESULTS, environment
from utils.reporting import to_json
from utils.training_page import text_table

# Sources, identities of each, targets.
SETTINGS = {
    "single": (["a"], 128, ["b", "c", "d"]),
    "multi": (["a", "c", "d"], 48, ["b", "e"]),
}
TRAINING = ["--num_train_epochs", "5", "--lr_milestones", "4", "--memory_temperature", "0.1", "--erasing", "0"]
METHODS = {"baseline": ["--diffusion", "none"], "DCAC": []}
SPEC = "synthetic:domain={}"


def train(folder, sources, num_ids, targets, seed, more):
    """metrics.json of a run, and its seconds (None if it was there before)."""
    done, seconds = folder / "model" / "model.safetensors", None
    if not done.exists():
        start = time.perf_counter()
        command = [sys.executable, "train_dcac.py", "--source"]
        command += [*(f"{SPEC.format(source)},num_ids={num_ids}" for source in sources), "--target"]
        command += [*map(SPEC.format, targets), "--seed", str(seed), "--output_dir", str(folder), *more]
        command += ["--validation_ids", "0", "--eval_every", "5", *TRAINING, "--resume_from_checkpoint", "latest"]
        subprocess.run(command, check=True, cwd=Path(__file__).parent.parent, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
    return json.loads((folder / "metrics.json").read_text()), seconds


def shown(values):
    percents = [100 * value for value in values]
    deviation = statistics.stdev(percents) if len(percents) > 1 else 0.0
    return f"{statistics.fmean(percents):.1f} ± {deviation:.1f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output_dir", default="output/dcac_synthetic", help="where the runs are kept")
    parser.add_argument("--json", type=Path, default=RESULTS / "dcac_synthetic.json")
    args = parser.parse_args()
    runs, rows = [], []
    for setting in args.settings:
        sources, num_ids, targets = SETTINGS[setting]
        for method, more in METHODS.items():
            found = []
            for seed in args.seeds:
                folder = Path(args.output_dir) / f"{setting}-{method.lower()}-{seed}"
                metrics, seconds = train(folder, sources, num_ids, targets, seed, more)
                history = metrics["history"]
                found.append({one: metrics["targets"][SPEC.format(one)] for one in targets})
                before = {
                    one["target"].removeprefix(SPEC.format("")): {"mAP": one["mAP"], "rank1": one["rank1"]}
                    for one in history
                    if one["epoch"] == 0
                }
                after = {one: {key: found[-1][one][key] for key in ("mAP", "rank1")} for one in targets}
                runs.append(
                    {
                        "setting": setting, "sources": sources, "num_ids": num_ids, "method": method, "seed": seed,
                        "seconds": seconds, "before": before, "after": after,
                    }
                )  # fmt: skip
            for target in targets:
                numbers = [shown([one[target][key] for one in found]) for key in ("mAP", "rank1")]
                rows.append(["+".join(sources) + " -> " + target, method, *numbers])
    columns = ["domains", "method", "mAP %", "Rank-1 %"]
    print(text_table(columns, rows))
    args.json.parent.mkdir(parents=True, exist_ok=True)
    content = {"environment": environment(), "training": TRAINING, "columns": columns, "table": rows, "runs": runs}
    aside = args.json.with_suffix(".part")
    aside.write_text(to_json(content))
    aside.replace(args.json)


if __name__ == "__main__":
    main()
