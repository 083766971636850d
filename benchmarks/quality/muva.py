"""What part tokens give on unseen domains of the built-in world, and what DCAC's feedback adds to them.

    python -m benchmarks.quality.muva            # runs what is missing; start it twice for two runs at once
    python -m benchmarks.quality.muva --table    # the table of the runs that are there

Each run is `train_dcac.py` in a process of its own, from domain a, with the shipped stand-ins and all defaults but
more epochs. A finished run is a row of the result file and is not run again.

sifting    target e, two seeds: temperatures of the texts and of the conditions. The best mean mAP chooses.
report     targets b, c and d, six other seeds: all arms, with the chosen temperatures. `dcac` keeps its own.

Gains are differences to the arm `baseline` of the same seed, and to the arm that differs in the one thing asked about:
MUVA to `plain images`, feedback to `muva`. Intervals are Student's, at 95 %, of these differences over training seeds,
of each arm by itself: of so many arms one may be outside by chance.

The masks are the true boxes of the drawn people. The controls say what is due to what: `plain images` is the baseline
without crop and erasing, with a bilinear memory pass, as MUVA trains; `rows` gives all images the same rows of patches
as parts; `memory predicted` builds prototypes under predicted masks; `no texts` leaves the loss of the texts out;
`balance` scales the feedback up to a tenth of the other losses' gradient at the features. Class-wise conditions have
no arm: nothing of them reaches the encoder, so they are `muva` to the last bit. Dice is that of predicted and true
masks on b, c and d; entropy and top are those of the condition's probabilities at the end, and the gradient ratio is
how large the feedback's is at the features beside the other losses', before any balance.

A run takes 4 to 8 minutes of processor time: the 84 of the report about 8 hours, the 24 of the sifting 3.
"""

import argparse
import json
import shutil
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

from benchmarks.common import RESULTS, command_line, finished, run_once, write_result
from benchmarks.quality.dcac_feedback import EPOCHS, MEASURED, ONE_THREAD, check_code, interval, locked
from utils.reporting.report import text_table

SOURCE = "synthetic:domain=a,num_ids=112"
TARGETS = {domain: f"synthetic:domain={domain},{MEASURED}" for domain in "bcde"}
PLAIN = ["--padding", 0, "--erasing", 0.0, "--memory_resample", "bilinear"]
NONE, MUVA = ["--diffusion", "none"], ["--encoder", "muva"]
# Words in braces are chosen by the sifting.
TEXTS, TAU, TEXT_TAU = ["--text_temperature", "{texts}"], ["--tau", "{tau}"], ["--text_tau", "{text_tau}"]
PART_TAU = ["--tau", "{part_tau}"]
WITH_TEXTS = [*MUVA, *TEXTS]
ARMS = {
    "baseline": NONE,
    "plain images": [*NONE, *PLAIN],
    "rows": [*WITH_TEXTS, *NONE, "--part_masks", "rows"],
    "muva": [*WITH_TEXTS, *NONE],
    "muva, crop and erasing": [*WITH_TEXTS, *NONE, "--padding", 5, "--erasing", 0.5],
    "muva, memory predicted": [*WITH_TEXTS, *NONE, "--memory_masks", "predicted"],
    "muva, no texts": [*MUVA, *NONE, "--text_weight", 0],
    "dcac": [],
    "muva + A": [*WITH_TEXTS, *TAU],
    "muva + B": [*WITH_TEXTS, "--probabilities", "text", *TEXT_TAU],
    "muva + C": [*WITH_TEXTS, "--probabilities", "parts", *PART_TAU],
    "muva + A, balance": [*WITH_TEXTS, *TAU, "--ldm_balance", "0.1"],
    "muva + A, no texts": [*MUVA, "--text_weight", 0, *TAU],
    "muva + A, scratch": [*WITH_TEXTS, "--unet_mode", "scratch", *TAU],
}
# What an arm differs from in one thing; the others of MUVA from `muva`.
BASES = {"dcac": "baseline", "muva": "plain images", "rows": "muva", "muva + A, no texts": "muva, no texts"}
BASES |= {"muva + A, scratch": "muva + A", "muva + A, balance": "muva + A"}
# Of the sifting: the word, and the arm that it is tried in. Those before are chosen already. Logits of 2048 numbers
# are larger than DCAC's: below its 0.6 every image is sure of its identity, and no gradient comes back.
SIFTED = {
    "texts": ("muva", (150, 50, 15)),
    "tau": ("muva + A", (0.6, 1, 2)),
    "text_tau": ("muva + B", (1, 0.3, 0.1)),
    # The logits of a part add up, over the parts, to those of the whole.
    "part_tau": ("muva + C", (0.15, 0.3, 0.6)),
}
SIFTING_SEEDS, SEEDS = (0, 1), (10, 11, 12, 13, 14, 15)
# Of the condition at the end: (name, number of it).
SAID = {
    "entropy of p": lambda said: f"{said['entropy']:.2f}",
    "top of p": lambda said: f"{said['top']:.2f}",
    "gradient ratio": lambda said: f"{said['gradient_ratio']:.1e}",
}
COLUMNS = [
    "arm", "mAP %", "Rank-1 %", "gain of mAP", "gain of Rank-1", "over", "mAP over it", "Rank-1 over it", "Dice %",
    "Dice over it", *SAID, "seeds", "missing",
]  # fmt: skip


class Job(NamedTuple):
    """One training; `chosen` is what stands for the words in braces."""

    part: str
    arm: str
    seed: int
    chosen: tuple = ()

    @property
    def flags(self):
        chosen = dict(self.chosen)
        return [str(word).format(**chosen) for word in ARMS[self.arm]]

    @property
    def name(self):
        values = "-".join(f"{name}-{value}" for name, value in self.chosen)
        return f"{self.part}-{self.arm}-{values}-{self.seed}".replace(",", "").replace(" ", "-").lower()


def used(arm, chosen):
    """Those of the chosen values that an arm has a place for."""
    return tuple((name, value) for name, value in chosen.items() if f"{{{name}}}" in ARMS[arm])


def sifting(runs):
    """(the trainings of the sifting as far as earlier choices allow, {word: value chosen})."""
    chosen, wanted = {}, []
    for word, (arm, values) in SIFTED.items():
        tried = {value: [Job("sifting", arm, seed, used(arm, chosen | {word: value})) for seed in SIFTING_SEEDS]
                 for value in values}  # fmt: skip
        wanted += [job for seed in range(len(SIFTING_SEEDS)) for jobs in tried.values() for job in (jobs[seed],)]
        if any(job not in runs for jobs in tried.values() for job in jobs):
            return wanted, None
        means = {
            value: statistics.fmean(runs[job]["after"]["e"]["mAP"] for job in jobs) for value, jobs in tried.items()
        }
        chosen[word] = max(means, key=means.get)
    return wanted, chosen


def report(chosen):
    """All trainings: every arm of a seed before the next seed."""
    return [Job("report", arm, seed, used(arm, chosen)) for seed in SEEDS for arm in ARMS]


def train(job, folder):
    """Run `train_dcac.py`; returns the row of the result file."""
    targets = {domain: TARGETS[domain] for domain in ("e" if job.part == "sifting" else "bcd")}
    words = ["--source", SOURCE, "--target", *targets.values(), "--seed", job.seed, *EPOCHS, *job.flags]
    words += ["--eval_every", 100, "--validation_ids", 0, "--checkpoints_total_limit", 1]
    words += ["--cache_dir", folder / "cache"]
    place = folder / "runs" / job.name
    run = run_once("train_dcac.py", place, words, "model/model.safetensors", ONE_THREAD)
    finished(run, "train_dcac.py")
    metrics = json.loads((place / "metrics.json").read_text(encoding="utf-8"))
    record = json.loads((place / "args.json").read_text(encoding="utf-8"))
    after = {domain: metrics["targets"][spec] for domain, spec in targets.items()}
    after = {domain: {key: values[key] for key in ("mAP", "rank1")} for domain, values in after.items()}
    masks = metrics.get("masks", [{}])[-1]
    dice = [value for name, value in masks.items() if name.removeprefix("dice ") in targets.values()]
    rest = {"dice": statistics.fmean(dice) if dice else None, "feedback": metrics.get("feedback", [])}
    # Of a run that went on after a stop, those of its last part.
    rest |= {"cpu_seconds": run and round(run.cpu_seconds), "commit": record["versions"]["git"], "flags": job.flags}
    return job._asdict() | {"after": after} | rest


def drop_weights(job, folder):
    """Remove what a run no longer needs once its row is written."""
    place = folder / "runs" / job.name
    for weights in (*place.glob("checkpoint-*"), place / "model"):
        shutil.rmtree(weights, ignore_errors=True)


def mean_of(run, key):
    return 100 * statistics.fmean(values[key] for values in run["after"].values())


def gains(done, arm, base, number):
    """Differences between two arms, one a seed that both have; `number` of a run."""
    pairs = [(done.get((arm, seed)), done.get((base, seed))) for seed in SEEDS]
    values = [(number(run), number(other)) for run, other in pairs if run and other]
    return [own - others for own, others in values if None not in (own, others)]


def rows_of(runs):
    """A row of each arm; runs with temperatures that are not the chosen ones do not count."""
    wanted = set(report(sifting(runs)[1] or {}))
    done = {(job.arm, job.seed): run for job, run in runs.items() if job in wanted}
    numbers = {key: lambda run, key=key: mean_of(run, key) for key in ("mAP", "rank1")}
    rows = []
    for arm in ARMS:
        present = [done[arm, seed] for seed in SEEDS if (arm, seed) in done]
        if not present:
            continue
        row = [arm, *(f"{statistics.fmean(map(number, present)):.1f}" for number in numbers.values())]
        row += ["-" if arm == "baseline" else interval(gains(done, arm, "baseline", one)) for one in numbers.values()]
        base = BASES.get(arm, "muva" if arm.startswith("muva") else None)
        row += [base or "-", *(interval(gains(done, arm, base, one)) if base else "-" for one in numbers.values())]
        dice = [100 * run["dice"] for run in present if run["dice"] is not None]
        over = [100 * one for one in gains(done, arm, base, lambda run: run["dice"])] if base else []
        row += [f"{statistics.fmean(dice):.1f}" if dice else "-", interval(over)]
        said = [run["feedback"][-1] for run in present if run["feedback"] and "entropy" in run["feedback"][-1]]
        means = {key: statistics.fmean(one[key] for one in said) for key in (said[0] if said else ())}
        row += [number(means) if said else "-" for number in SAID.values()]
        rows.append([*row, len(present), len(SEEDS) - len(present)])
    return rows


def sifted_rows(runs):
    """A row of each temperature that was tried."""
    found = {}
    for job, run in runs.items():
        if job.part == "sifting":
            found.setdefault((job.arm, *job.chosen), []).append(100 * run["after"]["e"]["mAP"])
    rows = []
    for (arm, *chosen), values in found.items():
        words = ", ".join(f"{name} {value}" for name, value in chosen)
        rows.append([arm, words, f"{statistics.fmean(values):.1f}", len(values)])
    return ["arm", "values", "mAP % on e", "seeds"], rows


def rows_read(path):
    """{job: row}; a row of other flags is an error: its arm was another one when it ran."""
    runs = {}
    for run in json.loads(path.read_text(encoding="utf-8"))["raw"]["runs"] if path.exists() else []:
        job = Job(run["part"], run["arm"], run["seed"], tuple(map(tuple, run["chosen"])))
        if run["flags"] != job.flags:
            raise ValueError(f"{path}: the row of {job.name} was trained with {run['flags']}; remove it")
        runs[job] = run
    return runs


def add_row(args, job, row, command):
    """Write the result file with one more row; others may write to it too."""
    with locked(args.output_dir / "rows.lock"):
        runs = rows_read(args.json) | {job: row}
        raw = {"training": EPOCHS, "chosen": sifting(runs)[1], "runs": list(runs.values())}
        write_result(args.json, command, COLUMNS, rows_of(runs), raw)


def run_missing(args, jobs, *, wait):
    """Run those that are free; returns those that stopped."""
    stopped = []
    for job in jobs:
        with locked(args.output_dir / "runs" / f"{job.name}.lock", wait=wait) as mine:
            if mine and job not in rows_read(args.json):
                try:
                    row = train(job, args.output_dir)
                except ValueError as error:
                    stopped.append(f"{job.name}: {error}")
                    continue
                add_row(args, job, row, command_line(__spec__.name, []))
                drop_weights(job, args.output_dir)
    return stopped


def main(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="run nothing; print the table and what is missing")
    parser.add_argument("--output_dir", type=Path, default=Path("output/muva"), help="runs and latents")
    parser.add_argument("--json", type=Path, default=RESULTS / "muva.json", help="the rows")
    args = parser.parse_args(input_args)
    args.output_dir = args.output_dir.absolute()
    stopped = []
    if not args.table:
        check_code(rows_read(args.json).values(), args.json)
        # Each choice waits for what another command has of the trainings before it.
        while (found := sifting(rows_read(args.json)))[1] is None and not stopped:
            for wait in (False, True):
                stopped += run_missing(args, found[0], wait=wait)
        if found[1]:
            stopped += run_missing(args, report(found[1]), wait=False)
    runs = rows_read(args.json)
    wanted, chosen = sifting(runs)
    print(text_table(*sifted_rows(runs)), text_table(COLUMNS, rows_of(runs)), sep="\n\n")
    print(f"chosen: {chosen or 'waits for the end of the sifting'}")
    if chosen:
        wanted = [*wanted, *report(chosen)]
    print(f"{sum(job not in runs for job in wanted)} of {len(wanted)} runs are missing")
    if stopped:
        raise ValueError("; ".join(dict.fromkeys(stopped)))


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"benchmarks.quality.muva: {error}")
