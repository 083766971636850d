"""What part tokens give on unseen domains of the built-in world, and what DCAC's feedback adds to them.

    python -m benchmarks.quality.muva            # runs what is missing; start it twice for two runs at once
    python -m benchmarks.quality.muva --table    # the table of the runs that are there

Each run is `train_dcac.py` in a process of its own, from domain a, with the shipped stand-ins and all defaults but
more epochs. A finished run is a row of the result file and is not run again. Gains are differences to the arm
`baseline` of the same seed, those of other arms of MUVA also to `muva`; intervals are Student's, at 95 %, of these
differences.

The controls say what is due to what: `plain images` is the baseline without crop and erasing, with a bilinear memory
pass, as MUVA trains; `rows` gives all images the same rows of patches as parts; `memory predicted` builds prototypes
under predicted masks; `no texts` leaves the loss of the texts out. Dice is that of predicted and true masks on b, c
and d.
"""

import argparse
import json
import shutil
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

from benchmarks.common import RESULTS, command_line, finished, run_once, write_result
from benchmarks.quality.dcac_feedback import EPOCHS, interval, locked, mixed
from utils.reporting.report import text_table

SOURCE, TARGETS = "synthetic:domain=a,num_ids=112", {domain: f"synthetic:domain={domain}" for domain in "bcd"}
PLAIN = ["--padding", 0, "--erasing", 0.0, "--memory_resample", "bilinear"]
NONE, MUVA = ["--diffusion", "none"], ["--encoder", "muva"]
ARMS = {
    "baseline": NONE,
    "plain images": [*NONE, *PLAIN],
    "rows": [*MUVA, *NONE, "--part_masks", "rows"],
    "muva": [*MUVA, *NONE],
    "muva, crop and erasing": [*MUVA, *NONE, "--padding", 5, "--erasing", 0.5],
    "muva, memory predicted": [*MUVA, *NONE, "--memory_masks", "predicted"],
    "muva, no texts": [*MUVA, *NONE, "--text_weight", 0],
    "dcac": [],
    "muva + class-wise": [*MUVA, "--condition", "class"],
    "muva + A": MUVA,
    "muva + B": [*MUVA, "--probabilities", "text"],
    "muva + C": [*MUVA, "--probabilities", "parts"],
    "muva + A, no texts": [*MUVA, "--text_weight", 0],
    "muva + A, scratch": [*MUVA, "--unet_mode", "scratch"],
}
SEEDS = (10, 11, 12, 13, 14, 15)
COLUMNS = ["arm", "mAP %", "Rank-1 %", "gain of mAP", "gain of Rank-1", "mAP over muva", "Dice", "seeds", "missing"]


class Job(NamedTuple):
    """One training."""

    arm: str
    seed: int

    @property
    def name(self):
        return f"{self.arm}-{self.seed}".replace(",", "").replace(" ", "-").lower()


def jobs():
    """All trainings: every arm of a seed before the next seed."""
    return [Job(arm, seed) for seed in SEEDS for arm in ARMS]


def train(job, folder):
    """Run `train_dcac.py`; returns the row of the result file."""
    words = ["--source", SOURCE, "--target", *TARGETS.values(), "--seed", job.seed, *EPOCHS, *ARMS[job.arm]]
    words += [
        "--eval_every",
        100,
        "--validation_ids",
        0,
        "--checkpoints_total_limit",
        1,
        "--cache_dir",
        folder / "cache",
    ]
    place = folder / "runs" / job.name
    run = run_once("train_dcac.py", place, words, "model/model.safetensors")
    finished(run, "train_dcac.py")
    metrics = json.loads((place / "metrics.json").read_text(encoding="utf-8"))
    record = json.loads((place / "args.json").read_text(encoding="utf-8"))
    after = {domain: metrics["targets"][spec] for domain, spec in TARGETS.items()}
    after = {domain: {key: values[key] for key in ("mAP", "rank1")} for domain, values in after.items()}
    masks = metrics.get("masks", [{}])[-1]
    dice = [value for name, value in masks.items() if name.removeprefix("dice ") in TARGETS.values()]
    for weights in (*place.glob("checkpoint-*"), place / "model"):
        shutil.rmtree(weights)
    rest = {"dice": statistics.fmean(dice) if dice else None, "feedback": metrics.get("feedback", [])}
    # A run that was finished before says nothing of its time.
    rest |= {"cpu_seconds": run and round(run.cpu_seconds), "commit": record["versions"]["git"]}
    return job._asdict() | {"after": after} | rest


def mean_of(run, key):
    return 100 * statistics.fmean(values[key] for values in run["after"].values())


def gains(done, arm, base, key):
    """Differences between two arms in points, one a seed that both have."""
    pairs = [(done.get(Job(arm, seed)), done.get(Job(base, seed))) for seed in SEEDS]
    return [mean_of(run, key) - mean_of(other, key) for run, other in pairs if run and other]


def rows_of(runs):
    done = {Job(run["arm"], run["seed"]): run for run in runs}
    rows = []
    for arm in ARMS:
        present = [done[Job(arm, seed)] for seed in SEEDS if Job(arm, seed) in done]
        if not present:
            continue
        means = [f"{statistics.fmean(mean_of(run, key) for run in present):.1f}" for key in ("mAP", "rank1")]
        apart = ["-" if arm == "baseline" else interval(gains(done, arm, "baseline", key)) for key in ("mAP", "rank1")]
        above = interval(gains(done, arm, "muva", "mAP")) if arm.startswith("muva") and arm != "muva" else "-"
        dice = [run["dice"] for run in present if run["dice"] is not None]
        rows.append([arm, *means, *apart, above, f"{statistics.fmean(dice):.3f}" if dice else "-"])
        rows[-1] += [len(present), len(SEEDS) - len(present)]
    return rows


def rows_read(path):
    return json.loads(path.read_text(encoding="utf-8"))["raw"]["runs"] if path.exists() else []


def add_row(args, row, command):
    """Write the result file with one more row; others may write to it too."""
    with locked(args.output_dir / "rows.lock"):
        runs = [run for run in rows_read(args.json) if (run["arm"], run["seed"]) != (row["arm"], row["seed"])] + [row]
        write_result(args.json, command, COLUMNS, rows_of(runs), {"training": EPOCHS, "runs": runs})


def main(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="run nothing; print the table and what is missing")
    parser.add_argument("--output_dir", type=Path, default=Path("output/muva"), help="runs and latents")
    parser.add_argument("--json", type=Path, default=RESULTS / "muva.json", help="the rows")
    args = parser.parse_args(input_args)
    args.output_dir = args.output_dir.absolute()
    for job in () if args.table else jobs():
        with locked(args.output_dir / "runs" / f"{job.name}.lock", wait=False) as mine:
            if mine and job not in {Job(run["arm"], run["seed"]) for run in rows_read(args.json)}:
                add_row(args, train(job, args.output_dir), command_line(__spec__.name, []))
    runs = rows_read(args.json)
    print(text_table(COLUMNS, rows_of(runs)), *mixed(runs), sep="\n\n")
    print(f"{len(jobs()) - len(runs)} of {len(jobs())} runs are missing")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"benchmarks.quality.muva: {error}")
