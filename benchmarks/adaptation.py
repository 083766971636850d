"""Training without labels on the built-in world, beside direct transfer and labels: several seeds and starts.

    python -m benchmarks.adaptation
    python -m benchmarks.adaptation --starts pretrained=output/pretrain/backbone --seeds 0 1 2

Domain b is the target: its labels are used by `labels of b` alone. Each run is a script in a process of its own with
its own defaults; finished ones are not run again.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.dcac_synthetic import shown
from benchmarks.retrieval import RESULTS, environment
from utils import tiny
from utils.reporting import to_json
from utils.training_page import text_table

SOURCE, TARGET = "synthetic:domain=a,num_ids=64", "synthetic:domain=b,num_ids=32,images_per_id=16"
ADAPTATION = ["adapt_reid.py", "--setting", "adaptation", "--source", SOURCE, "--target", TARGET]
RUNS = {
    "direct transfer a -> b": ["finetune_reid.py", "--source", SOURCE, "--target", TARGET],
    "cluster-contrast on b": ["adapt_reid.py", "--target", TARGET],
    "spcl on b": ["adapt_reid.py", "--target", TARGET, "--method", "spcl"],
    "spcl a -> b": [*ADAPTATION, "--method", "spcl"],
    "idm a -> b": [*ADAPTATION, "--method", "idm"],
    "labels of b": ["finetune_reid.py", "--source", TARGET, "--target", TARGET],
}


def train(folder, command, seed, start):
    """metrics.json and clusters.json (or none) of a run, and its seconds (None if it was there before)."""
    seconds = None
    if not (folder / "model" / "model.safetensors").exists():
        began = time.perf_counter()
        words = [*command, "--backbone", start, "--seed", str(seed), "--eval_every", "1", "--output_dir", str(folder)]
        subprocess.run(
            [sys.executable, *words, "--resume_from_checkpoint", "latest"],
            check=True,
            cwd=Path(__file__).parent.parent,
            stdout=subprocess.DEVNULL,
        )
        seconds = time.perf_counter() - began
    clusters = folder / "clusters.json"
    metrics = json.loads((folder / "metrics.json").read_text())
    return metrics, json.loads(clusters.read_text()) if clusters.exists() else [], seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--starts", nargs="+", default=[], metavar="NAME=FOLDER", help="backbones beside the stand-in CLIP"
    )
    parser.add_argument("--output_dir", type=Path, default="output/adaptation", help="where the runs are kept")
    parser.add_argument("--json", type=Path, default=RESULTS / "adaptation.json")
    args = parser.parse_args()
    starts = {"stand-in CLIP": tiny.CLIP_DIR} | dict(one.split("=", 1) for one in args.starts)
    runs, rows = [], []
    for start, backbone in starts.items():
        for name in args.runs:
            found, first = [], []
            for seed in args.seeds:
                folder = args.output_dir / f"{start}-{name}-{seed}".replace(" ", "-").replace(">", "")
                metrics, clusters, seconds = train(folder, RUNS[name], seed, str(backbone))
                found.append(metrics["targets"][TARGET])
                first.append(next(one for one in metrics["history"] if one["epoch"] == 0))
                curve = [{key: one[key] for key in ("epoch", "mAP", "rank1")} for one in metrics["history"]]
                runs.append(
                    {"start": start, "run": name, "seed": seed, "seconds": seconds, "history": curve}
                    | {"clusters": clusters}
                )
            numbers = [shown([one[key] for one in found]) for key in ("mAP", "rank1")]
            agreed = [one["clusters"][-1]["ari"] for one in runs[-len(args.seeds) :] if one["clusters"]]
            rows.append(
                [start, name, shown([one["mAP"] for one in first]), *numbers, shown(agreed) if agreed else "-"]
            )
            columns = ["start", "training", "mAP % before", "mAP %", "Rank-1 %", "ARI x 100"]
            content = {"environment": environment(), "columns": columns, "table": rows, "runs": runs}
            aside = args.json.with_suffix(".part")
            args.json.parent.mkdir(parents=True, exist_ok=True)
            aside.write_text(to_json(content))
            aside.replace(args.json)
    print(text_table(columns, rows))


if __name__ == "__main__":
    main()
