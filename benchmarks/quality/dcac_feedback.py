"""What DCAC's feedback gives on unseen domains of the built-in world, and whether its meaning matters: controls.

    python -m benchmarks.quality.dcac_feedback            # runs what is missing; start it twice for two runs at once
    python -m benchmarks.quality.dcac_feedback --table    # the table of the runs that are there

Each run is `train_dcac.py` in a process of its own, with the shipped stand-ins and all defaults but more epochs. A
finished run is a row of the result file and is not run again, so the work can go on at any time and on any copy of the
file. Several such commands may run at once, they take different runs.

sifting    source a, target e, two seeds: all arms at all strengths. The caption arm with the best mean gain of mAP
           on e is chosen; b, c and d are measured too, and not looked at for the choice.
report     targets b, c and d, six other seeds, sources a and a+e, without shortcut and with: the baseline, the
           published way, the chosen arm, and the same with captions permuted among identities.
remedies   of a condition that says little, each with own and with permuted captions, seeds and source of the sifting:
           a condition of other identities' captions alone, prompts and U-Net that cannot learn another code, more
           weight, and timesteps weighted. And the world's own words in place of the captioner's.

"Person over place" says what the features look at: the share of pairs in which two images of a person are more alike
than two images of one place (`shortcut_probe`). Gains are differences to the baseline of the same seed; intervals are
Student's, at 95 %, of these differences. They are over training seeds: people and cameras are the same in all runs.

A run takes 3.5 minutes of processor time (baseline), 7 (one token) or 8 (all tokens): the 46 runs of the sifting 5.7
hours, the 96 of the report 10.6, the 20 of the remedies 2.6. Two commands on two idle cores need half of these 19.
"""

import argparse
import fcntl
import json
import random
import re
import shutil
import statistics
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq
from scipy.stats import t as student

from benchmarks.common import RESULTS, checked, command_line, finished, revision, run_once, run_script, write_result
from benchmarks.quality.shortcut_probe import person_over_place
from utils.files import write_together
from utils.generated.texts.captions import CLASS_PROMPT, QUESTIONS, compose
from utils.modeling import ReIDModel
from utils.reporting.report import text_table
from utils.synthetic.world import attributes

EPOCHS = ["--num_train_epochs", "12", "--lr_milestones", "10"]
# Sources and the identities of each: the same number of images.
SOURCES = {"a": (["a"], 112), "a+e": (["a", "e"], 56)}
SHORTCUTS = (0, 0.9)
STRENGTHS = {"lambda 1": [], "balance 0.1": ["--ldm_balance", "0.1"], "balance 0.03": ["--ldm_balance", "0.03"]}
# Flags of each arm; a word in braces is a file of captions.
ARMS = {
    "baseline": ["--diffusion", "none"],
    "published": [],
    "captions, end": ["--prompt_init", "{own}"],
    "captions, all": ["--prompt_init", "{own}", "--prompt_tokens", "all"],
    "captions, frozen": ["--prompt_init", "{own}", "--prompt_tokens", "all", "--freeze_prompts"],
    "captions, sharp": ["--prompt_init", "{own}", "--prompt_tokens", "all", "--tau", "0.1"],
    "permuted, end": ["--prompt_init", "{permuted}"],
    "permuted, all": ["--prompt_init", "{permuted}", "--prompt_tokens", "all"],
    "permuted, frozen": ["--prompt_init", "{permuted}", "--prompt_tokens", "all", "--freeze_prompts"],
    "permuted, sharp": ["--prompt_init", "{permuted}", "--prompt_tokens", "all", "--tau", "0.1"],
    # Trained, equal prompts would come apart.
    "one caption": ["--prompt_init", "{constant}", "--prompt_tokens", "all", "--freeze_prompts"],
    "true, all": ["--prompt_init", "{true}", "--prompt_tokens", "all"],
    "shuffled": [],
}
SIFTED = [
    "published", "captions, sharp", "captions, all", "permuted, all", "shuffled", "captions, end", "captions, frozen",
    "one caption",
]  # fmt: skip
REMEDIES = {
    "others' captions": ["--ldm_balance", "0.1"],
    "all frozen": ["--unet_mode", "frozen", "--freeze_prompts", "--ldm_balance", "0.1"],
    "more weight": ["--ldm_balance", "0.3"],
    "weighted timesteps": ["--ldm_balance", "0.1"],
}
# Arms and remedies that `feedback_variants` makes, in place of `train_dcac.py`.
VARIANTS = {"shuffled": "shuffled", "weighted timesteps": "timesteps", "others' captions": "others"}
# What `train_dcac.py` would say of another condition or gradient than the variant's.
OTHERWISE = {"shuffled": {"gradient cosine"}, "others": {"entropy of p", "top of p"}}
# So few would make the numbers depend on who they are.
MEASURED = "num_ids=128"
# Two commands are to take a core each.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
SIFTING_SEEDS, REPORT_SEEDS = (0, 1), (10, 11, 12, 13, 14, 15)
TARGETS = {"a": ["b", "c", "d", "e"], "a+e": ["b", "c", "d"]}
COLUMNS = [
    "part", "sources", "shortcut", "arm", "strength", "targets", "mAP %", "gain of mAP", "gain of Rank-1",
    "mAP over permuted", "person over place %", "seeds", "missing",
]  # fmt: skip
# What `train_dcac.py` says about the condition at its measurements: (name, number of it).
SAID = {
    "noise loss, own": lambda said: said["own"],
    "another's more, per mille": lambda said: 1000 * said["another_worse"] / said["own"],
    "spread over noise": lambda said: 1000 * said["another_worse_std"] / said["own"],
    "zero's more, per mille": lambda said: 1000 * (said["zero"] / said["own"] - 1),
    "entropy of p": lambda said: said["entropy"],
    "top of p": lambda said: said["top"],
    "gradient ratio": lambda said: said["gradient_ratio"],
    "gradient cosine": lambda said: said["gradient_cosine"],
    "rank of prompts": lambda said: said["effective_rank"],
}


class Job(NamedTuple):
    """One training."""

    part: str
    sources: str
    shortcut: float
    arm: str
    strength: str
    seed: int

    @property
    def name(self):
        words = re.sub("[,']", "", " ".join(map(str, self)))
        return words.replace(" ", "-").lower()

    @property
    def flags(self):
        return ARMS[self.arm] + (STRENGTHS | REMEDIES)[self.strength]


# What is run


def jobs_of(part, choice=None):
    """All trainings of a part, those that say most first; `choice` is the arm and strength that the sifting chose."""
    if part == "sifting":
        arms = [("baseline", "lambda 1"), *((arm, strength) for strength in STRENGTHS for arm in SIFTED)]
        # Of equal prompts no gradient arrives that could be scaled.
        arms = [arm for arm in arms if arm[0] != "one caption" or arm[1] == "lambda 1"]
        return [Job(part, "a", 0, *arm, seed) for seed in SIFTING_SEEDS for arm in arms]
    if part == "remedies":
        # The sifting has the other one of this pair.
        arms = [("permuted, sharp", "balance 0.1"), ("true, all", "balance 0.1")]
        arms += [(f"{captions}, all", remedy) for remedy in REMEDIES for captions in ("captions", "permuted")]
        return [Job(part, "a", 0, *arm, seed) for seed in SIFTING_SEEDS for arm in arms]
    if choice is None:
        return []
    arm, strength = choice
    arms = [("baseline", "lambda 1"), ("published", "lambda 1"), (arm, strength)]
    arms.append((arm.replace("captions", "permuted"), strength))
    settings = [(sources, shortcut) for sources in SOURCES for shortcut in SHORTCUTS]
    return [Job(part, *setting, *arm, seed) for seed in REPORT_SEEDS for setting in settings for arm in arms]


def choice_of(runs):
    """(arm, strength) with the best mean gain of mAP on domain e among those with captions; None before the end."""
    done = {job_of(run): run for run in runs}
    jobs = jobs_of("sifting")
    if any(job not in done for job in jobs):
        return None
    arms = dict.fromkeys((job.arm, job.strength) for job in jobs if job.arm.startswith("captions"))
    return max(arms, key=lambda arm: statistics.fmean(gains(done, "sifting", "a", 0, *arm, ["e"], "mAP")))


def job_of(run):
    return Job(*(run[field] for field in Job._fields))


def train(job, folder):
    """Run `train_dcac.py`; returns the row of the result file."""
    sources = [copy_of(f"synthetic:domain={domain}", folder, job) for domain in SOURCES[job.sources][0]]
    targets = {domain: copy_of(f"synthetic:domain={domain},{MEASURED}", folder) for domain in TARGETS[job.sources]}
    words = ["--source", *sources, "--target", *targets.values(), "--seed", job.seed, *EPOCHS]
    words += [word.format(**captions_of(job, sources, folder)) if "{" in word else word for word in job.flags]
    words += ["--eval_every", 100, "--validation_ids", 0, "--checkpoints_total_limit", 1]
    if job.arm != "baseline":
        words += ["--cache_dir", folder / "cache"]
    place, variant = folder / "runs" / job.name, VARIANTS.get(job.arm) or VARIANTS.get(job.strength)
    script = f"-m benchmarks.quality.feedback_variants {variant}" if variant else "train_dcac.py"
    run = run_once(script, place, words, "model/model.safetensors", ONE_THREAD)
    finished(run, script)
    metrics = json.loads((place / "metrics.json").read_text(encoding="utf-8"))
    record = json.loads((place / "args.json").read_text(encoding="utf-8"))
    measured = {"before": {}, "after": {}}
    for entry in metrics["history"]:
        domain = next(domain for domain, copy in targets.items() if str(copy) == entry["target"])
        when = "before" if entry["epoch"] == 0 else "after"
        measured[when][domain] = {key: entry[key] for key in ("mAP", "rank1")}
    rest = {"feedback": metrics.get("feedback", []), "commit": record["versions"]["git"]}
    rest |= {"flags": job.flags, "applied": applied(place / "log.jsonl")}
    rest["looks_at"] = person_over_place(ReIDModel.open(place / "model"))
    # A run that was finished before says nothing of its time.
    rest |= {"seconds": run and round(run.seconds), "cpu_seconds": run and round(run.cpu_seconds)}
    return job._asdict() | measured | rest


def applied(path):
    """The mean share of L_ldm's gradient in the last epoch of a run with a balance; None without one."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    shares = [line.get("feedback_ratio") for line in lines if line["epoch"] == lines[-1]["epoch"]]
    return None if None in shares else statistics.fmean(shares)


def drop_weights(job, folder):
    """Remove what a run no longer needs once its row is written."""
    place = folder / "runs" / job.name
    for weights in (*place.glob("checkpoint-*"), place / "model"):
        shutil.rmtree(weights, ignore_errors=True)


def copy_of(spec, folder, job=None):
    """A copy of a set with its images inside, as a training set for `job`: people need not be drawn in every epoch."""
    if job is not None:
        spec += f",num_ids={SOURCES[job.sources][1]}" + (f",shortcut={job.shortcut}" if job.shortcut else "")
    copy = folder / "data" / "-".join(re.findall("=([^,]+)", spec))
    with locked(folder / "data.lock"):
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            checked(run_script("-m", "utils.datasets", spec, "--save_to", copy), f"copying {spec}")
    return copy


def captions_of(job, sources, folder):
    """{kind: file of captions}: the captioner's, these permuted among identities, one for all, and the world's own."""
    place = folder / "captions" / f"{job.sources}-{job.shortcut}"
    with locked(folder / "captions.lock"):
        if not (place / "captions.parquet").exists():
            words = ["--source", *sources, "--captions_only", "--output_dir", place]
            checked(run_script("train_dreambooth_reid.py", *words, logs=place / "logs"), "the captions")
    rows = [
        {key: row[key] for key in ("domain", "pid", "prompt")}
        for row in pq.read_table(place / "captions.parquet").to_pylist()
    ]
    files = {"own": place / "captions.parquet"}
    kinds = {"permuted": permuted(rows, job.seed), "constant": [CLASS_PROMPT] * len(rows)}
    kinds["true"] = [truth(row["domain"].removeprefix("synthetic-"), row["pid"]) for row in rows]
    for kind, prompts in kinds.items():
        files[kind] = place / f"{kind}-{job.seed}.jsonl"
        if not files[kind].exists():
            lines = [json.dumps(row | {"prompt": prompt}) for row, prompt in zip(rows, prompts, strict=True)]
            with write_together(place) as part:
                part(files[kind].name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return files


def permuted(rows, seed):
    """The prompts of the rows in another order within each domain, none in its own place."""
    prompts = [None] * len(rows)
    for domain in sorted({row["domain"] for row in rows}):
        order = [number for number, row in enumerate(rows) if row["domain"] == domain]
        random.Random(f"captions/{seed}").shuffle(order)
        for place, row in enumerate(order):
            prompts[row] = rows[order[place - 1]]["prompt"]
    return prompts


def truth(domain, pid):
    """What the world itself says of a person's clothes."""
    return compose({key: value for key, value in attributes(domain, pid).items() if key in QUESTIONS})


@contextmanager
def locked(path, wait=True):
    """Whether this process alone holds the lock; it ends with the block or the process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


# The table


def gains(done, part, sources, shortcut, arm, strength, targets, key, over=None):
    """The differences to the baseline, one a seed that both have, in points: means over the targets.

    `over`: another arm of the same strength in its place.
    """
    found = []
    for job, run in done.items():
        base = (over, strength) if over else ("baseline", "lambda 1")
        places = [part] if over else [baseline_part(part)]
        # The sifting has one of a pair of the remedies.
        places += ["sifting", "remedies"] if over and part != "report" else []
        bases = [done.get(Job(place, sources, shortcut, *base, job.seed)) for place in places]
        base = next(filter(None, bases), None)
        if base and job[:5] == (part, sources, shortcut, arm, strength):
            apart = [run["after"][target][key] - base["after"][target][key] for target in targets]
            found.append(100 * statistics.fmean(apart))
    return found


def baseline_part(part):
    return "sifting" if part == "remedies" else part


def interval(values):
    """Mean and the half width of its 95 % interval; of one value the value alone."""
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):+.1f}"
    if len(values) == 1:
        return mean
    half = student.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean} ± {half:.1f}"


def rows_of(runs):
    """A row of each arm and targets that have a run; the choice's own target stands apart."""
    done = {job_of(run): run for run in runs}
    jobs = [job for part in ("sifting", "report", "remedies") for job in jobs_of(part, choice_of(runs))]
    rows = []
    for part, sources, shortcut, arm, strength in dict.fromkeys(job[:5] for job in jobs):
        wanted = [job for job in jobs if job[:5] == (part, sources, shortcut, arm, strength)]
        present = [done[job] for job in wanted if job in done]
        if not present:
            continue
        places = [["b"], ["c"], ["d"], ["b", "c", "d"]] if part == "report" else [["e"], ["b", "c", "d"]]
        for targets in places:
            after = [statistics.fmean(run["after"][target]["mAP"] for target in targets) for run in present]
            apart = [
                "-" if arm == "baseline" else interval(gains(done, *wanted[0][:5], targets, key))
                for key in ("mAP", "rank1")
            ]
            own = arm.startswith("captions")
            against = gains(done, *wanted[0][:5], targets, "mAP", arm.replace("captions", "permuted")) if own else []
            row = [part, sources, str(shortcut), arm, "-" if arm == "baseline" else strength, " ".join(targets)]
            row += [f"{100 * statistics.fmean(after):.1f}", *apart, interval(against), looks_at(present)]
            rows.append([*row, len(present), len(wanted) - len(present)])
    return rows


def looks_at(runs):
    """How often the features follow the person and not the place, in percent; see `shortcut_probe`."""
    shares = [run["looks_at"]["person"] for run in runs if run.get("looks_at")]
    return f"{100 * statistics.fmean(shares):.0f}" if shares else "-"


def condition_table(runs):
    """(columns, rows): what the condition of each arm says before and after training, means over seeds."""
    groups = {}
    for run in runs:
        if run["feedback"]:
            groups.setdefault(job_of(run)[:5], []).append(run)
    rows = []
    for (part, sources, shortcut, arm, strength), group in groups.items():
        row, said = [part, sources, str(shortcut), arm, strength], [run["feedback"] for run in group]
        other = OTHERWISE.get(VARIANTS.get(arm) or VARIANTS.get(strength), ())
        for name, number in SAID.items():
            first, last = (statistics.fmean(number(one[when]) for one in said) for when in (0, -1))
            row.append("-" if name in other else f"{first:.3g} -> {last:.3g}")
        shares = [run.get("applied") for run in group]
        row.append("-" if None in shares else f"{statistics.fmean(shares):.3g}")
        rows.append([*row, len(said)])
    return [*COLUMNS[:5], *SAID, "ratio after balance", "seeds"], rows


def finished_jobs(runs):
    """The jobs of the rows. A row of other flags is an error: its arm was another one when it ran."""
    for run in runs:
        if run.get("flags", job_of(run).flags) != job_of(run).flags:
            raise ValueError(f"the row of {job_of(run).name} was trained with {run['flags']}; remove it")
    return {job_of(run) for run in runs}


def check_code(runs, path):
    """ValueError for rows of another revision of the code: gains are differences between rows."""
    others = sorted({str(run["commit"]).removesuffix("-dirty") for run in runs} - {revision()})
    if others:
        raise ValueError(
            f"{path} has runs of revision {', '.join(others)}, the code here is {revision()}: continue with that "
            "revision, or give another --json"
        )


def rows_read(path):
    return json.loads(path.read_text(encoding="utf-8"))["raw"]["runs"] if path.exists() else []


def add_row(args, row, command):
    """Write the result file with one more row; others may write to it too."""
    with locked(args.output_dir / "rows.lock"):
        runs = [run for run in rows_read(args.json) if job_of(run) != job_of(row)] + [row]
        choice = choice_of(runs)
        raw = {"training": EPOCHS, "choice": choice and list(choice), "runs": runs}
        write_result(args.json, command, COLUMNS, rows_of(runs), raw)


def main(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("sifting", "report", "remedies")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts, help="default all")
    parser.add_argument("--table", action="store_true", help="run nothing; print the table and what is missing")
    parser.add_argument("--output_dir", type=Path, default=Path("output/dcac_feedback"), help="data, runs, captions")
    parser.add_argument("--json", type=Path, default=RESULTS / "dcac_feedback.json", help="the rows")
    args = parser.parse_args(input_args)
    args.output_dir = args.output_dir.absolute()
    stopped = {}
    if not args.table:
        check_code(rows_read(args.json), args.json)
    for part in () if args.table else args.parts:
        # The report waits for the choice, and so for what another command has of the sifting.
        waits = [False, True] if part == "sifting" and "report" in args.parts else [False]
        for wait in waits:
            for job in jobs_of(part, choice_of(rows_read(args.json))):
                with locked(args.output_dir / "runs" / f"{job.name}.lock", wait=wait) as mine:
                    if mine and job not in stopped and job not in finished_jobs(rows_read(args.json)):
                        try:
                            row = train(job, args.output_dir)
                        except ValueError as error:
                            stopped[job] = f"{job.name}: {error}"
                            continue
                        add_row(args, row, command_line(__spec__.name, []))
                        drop_weights(job, args.output_dir)
    runs = rows_read(args.json)
    print(text_table(COLUMNS, rows_of(runs)), text_table(*condition_table(runs)), sep="\n\n")
    choice, done = choice_of(runs), {job_of(run) for run in runs}
    for part in parts:
        missing = [job for job in jobs_of(part, choice) if job not in done]
        if part == "report" and choice is None:
            print("report: waits for the end of the sifting")
        else:
            print(f"{part}: {len(missing)} runs are missing")
    if stopped:
        raise ValueError("; ".join(stopped.values()))


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"benchmarks.quality.dcac_feedback: {error}")
