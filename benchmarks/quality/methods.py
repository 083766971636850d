"""Every method of adapt_reid.py beside the others on the built-in world, over several seeds, from two starts.

    python -m benchmarks.quality.methods

Domain b is learned without labels, or with the labels of domain a. Training starts from a small ResNet with random
weights, and from the same network pre-trained on domain h. No label of b is read. All numbers are of the last epoch;
the settings were chosen on other seeds. Rows named by an addition show what it gives. "mAP over it" is the mean
difference to the row that "over" names, of the same seed, with its 95 % interval by Student. Every run has a process
and a folder of its own: after a stop, the same command continues and repeats nothing.
"""

import argparse
import json
import os
import statistics
import sys
from pathlib import Path

import datasets
import torch

from benchmarks.common import RESULTS, command_line, finished, in_percent, run_once, write_result
from benchmarks.quality.dcac_feedback import interval
from benchmarks.quality.generalisation import DOMAINS, PRETRAINED, SCRATCH, SIZE, start_of, stored
from utils.files import to_json, write_together
from utils.reporting.report import text_table

EPOCHS = 10
WORDS = f"--resolution {SIZE[0]} {SIZE[1]} --padding 3 --eval_every {EPOCHS} --log_every 16 --learning_rate 5e-4"
WORDS += f" --num_train_epochs {EPOCHS} --lr_milestones 8 --cluster_k1 15 --target b"
ADAPT = "--setting adaptation --source a"
# Their classifiers start at random after the epochs on the source, and need more steps than the 16 of an epoch.
STAGES = "--source_epochs 4 --source_steps 64 --steps_per_epoch 48"
# Its first epoch has to part the identities before labels move; the later ones are shorter.
ROUNDS = "--steps_per_epoch 64 --num_train_epochs 2 --lr_milestones 2"
RUNS = {
    "cluster contrast": "",
    "+ learned GeM": "--pooling gem",
    "+ norms of 16 images": "--norm_group 16",
    "+ the authors' distance": "--jaccard faiss",
    "HHCL": "--method hhcl --jaccard faiss",
    "HHCL as in its paper": "--method hhcl --jaccard faiss --memory_update instances",
    "SpCL": "--method spcl",
    "SpCL + capped loss": "--method spcl --probability_floor 1e-6",
    "PPLR": "--method pplr --jaccard faiss",
    "PPLR without cameras": "--method pplr --jaccard faiss --camera_weight 0",
    "ICE": "--method ice --jaccard faiss",
    "SpCL, a's labels": f"{ADAPT} --method spcl",
    "IDM, a's labels": f"{ADAPT} --method idm",
    "IDM + XBM, a's labels": f"{ADAPT} --method idm --earlier_weight 1",
    "CaCL, a's labels": f"{ADAPT} --method cacl --jaccard faiss",
    "UNRN, a's labels": f"{ADAPT} --method unrn --jaccard faiss {STAGES} --cluster_every 3",
    "GLT, a's labels": f"{ADAPT} --method glt {STAGES} --group_counts 24 32 40",
    "HCD, a's labels": f"{ADAPT} --method hcd --jaccard faiss {ROUNDS}",
}
# What a method is held against, of the same seed and distance.
AUTHORS, SPCL = "+ the authors' distance", "SpCL, a's labels"
BASES = dict.fromkeys(("+ learned GeM", "+ norms of 16 images", AUTHORS, "SpCL"), "cluster contrast")
BASES |= dict.fromkeys(("HHCL", "HHCL as in its paper", "PPLR", "ICE"), AUTHORS)
BASES |= {"SpCL + capped loss": "SpCL", "PPLR without cameras": "PPLR"}
BASES |= {name: SPCL for name in RUNS if name.endswith(SPCL[4:]) and name != SPCL}
COLUMNS = [
    "start", "method", "mAP % before", "mAP %", "Rank-1 %", "over", "mAP over it", "ARI x 100", "CPU s an epoch",
    "peak GiB", "epochs",
]  # fmt: skip
USAGE = "usage.json"
COLLAPSED = "collapsed.txt"


def run(folder, words):
    """Train unless the result is there; where the clusters collapse, the error is the result. Keeps what it used."""
    done = COLLAPSED if (folder / COLLAPSED).exists() else "model/model.safetensors"
    ended = run_once("adapt_reid.py", folder, words, done)
    if ended is None:
        return
    # A run that was stopped and continued has used both parts.
    before = json.loads((folder / USAGE).read_text()) if (folder / USAGE).exists() else {"cpu": 0.0, "gib": 0.0}
    with write_together(folder) as part:
        used = {"cpu": before["cpu"] + ended.cpu_seconds, "gib": max(before["gib"], ended.peak_gib)}
        part(USAGE).write_text(to_json(used))
    if ended.code and "the clusters collapsed" in ended.last_line:
        (folder / COLLAPSED).write_text(ended.last_line)
    else:
        finished(ended, "adapt_reid.py")


def found_in(folder, start, name, seed):
    history = json.loads((folder / "metrics.json").read_text())["history"]
    clusters = folder / "clusters.json"
    clusters = json.loads(clusters.read_text()) if clusters.exists() else []
    collapsed = folder / COLLAPSED
    return {
        "start": start,
        "method": name,
        "seed": seed,
        "history": [{key: one[key] for key in ("epoch", "mAP", "rank1")} for one in history],
        "clusters": clusters,
        "epochs": max([one["epoch"] for one in clusters], default=0),
        "collapsed": collapsed.read_text() if collapsed.exists() else None,
        **json.loads((folder / USAGE).read_text()),
    }


def gains(runs, bases):
    """Differences of mAP in points to the run of the same seed."""
    mAP = {one["seed"]: one["history"][-1]["mAP"] for one in bases}
    return [100 * (one["history"][-1]["mAP"] - mAP[one["seed"]]) for one in runs if one["seed"] in mAP]


def rows_of(runs):
    rows = []
    for start, name in dict.fromkeys((one["start"], one["method"]) for one in runs):
        its = [one for one in runs if (one["start"], one["method"]) == (start, name)]
        lost = sum(one["collapsed"] is not None for one in its)
        ends, last = ([one[key][-1] for one in its if one[key]] for key in ("history", "clusters"))
        base = BASES.get(name)
        rows.append(
            [
                start,
                f"{name} ({lost} of {len(its)} collapsed)" if lost else name,
                in_percent([one["history"][0]["mAP"] for one in its]),
                *(in_percent([end[key] for end in ends]) for key in ("mAP", "rank1")),
                base or "-",
                interval(gains(its, [one for one in runs if (one["start"], one["method"]) == (start, base)])),
                in_percent([one["ari"] for one in last]) if last else "-",
                f"{statistics.fmean(one['cpu'] / max(one['epochs'], 1) for one in its):.1f}",
                f"{max(one['gib'] for one in its):.2f}",
                ", ".join(map(str, sorted({one["epochs"] for one in its}))),
            ]
        )
    return rows


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS), help="default all")
    parser.add_argument("--starts", nargs="+", choices=[SCRATCH, PRETRAINED], default=[PRETRAINED, SCRATCH])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default 0 1 2")
    parser.add_argument("--output_dir", type=Path, default=Path("output/methods"), help="where the runs are kept")
    parser.add_argument("--json", type=Path, default=RESULTS / "methods.json", help="default benchmarks/results")
    return parser.parse_args(input_args)


def main(input_args=None):
    args = parse_args(input_args)
    folder, runs = args.output_dir.absolute(), []
    datasets.disable_progress_bars()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count())))
    for seed in args.seeds:
        for start in args.starts:
            backbone = start_of(folder, start, seed)
            for name in args.runs:
                words = [stored(folder, word) if word in DOMAINS else word for word in f"{WORDS} {RUNS[name]}".split()]
                letters = "".join(letter if letter.isalnum() else " " for letter in f"{start} {name} {seed}")
                place = folder / "-".join(letters.split())
                run(place, [*words, "--backbone", backbone, "--seed", str(seed)])
                runs.append(found_in(place, start, name, seed))
        # Every row has the same seeds.
        rows = rows_of(runs)
        write_result(args.json, command_line(__spec__.name, input_args), COLUMNS, rows, {"runs": runs})
    print(text_table(COLUMNS, rows))


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"benchmarks.quality.methods: {error}")
