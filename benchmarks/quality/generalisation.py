"""mAP on domains that were not trained on, by each method of finetune_reid.py for it, on the built-in world.

    python -m benchmarks.quality.generalisation

Domains a, b and c are trained on, d and e measured, over several seeds. Beside them, what the labels of domain a and
of domain b itself give on b, as bounds for `benchmarks.quality.methods`. Training starts from a small ResNet with
random weights, and from the same network pre-trained by pretrain_backbone.py on 128 people of domain h. All images are
drawn once, at the size of training. Every run has a process and a folder of its own: after a stop, the same command
continues and repeats nothing.
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
from utils.datasets.load import load_reid
from utils.datasets.portable import save
from utils.files import write_together
from utils.modeling.names import open_backbone
from utils.reporting.charts import line_chart
from utils.reporting.report import Report, text_table

SIZE = (64, 32)
BACKBONE = "resnet-small"
SCRATCH, PRETRAINED = "random weights", "pre-trained"
# Identities and images of each; h is only for pre-training.
DOMAINS = {"a": (64, 8), "b": (32, 16), "c": (64, 8), "d": (32, 8), "e": (32, 8), "h": (128, 8)}
WORDS = f"--resolution {SIZE[0]} {SIZE[1]} --padding 3 --eval_every 1 --log_every 16"
RATE = f"{WORDS} --learning_rate 1e-3"
LABELS = f"{RATE} --num_train_epochs 6 --lr_milestones 5"
GENERAL = f"{RATE} --num_train_epochs 3 --lr_milestones 3 --setting generalisation --source a b c --target d e"
RUNS = {
    "labels of a": f"{LABELS} --source a --target b",
    "labels of b": f"{LABELS} --source b --target b",
    "labels of a, b, c": GENERAL,
    "labels of a, b, c, MetaBIN": f"{GENERAL} --method metabin",
    "labels of a, b, c, META": f"{GENERAL} --method meta",
}
COLUMNS = ["start", "training", "measured on", "mAP % before", "mAP %", "Rank-1 %"]


def stored(folder, domain):
    """The folder with the drawn people of a domain, at the size of training."""
    place = folder / "data" / domain
    if not place.exists():
        ids, images = DOMAINS[domain]
        data = load_reid(f"synthetic:domain={domain},num_ids={ids},images_per_id={images}")
        splits = ["train"] if domain == "h" else list(data)
        small = {split: data[split].map(lambda row: {"image": row["image"].resize(SIZE[::-1])}) for split in splits}
        place.parent.mkdir(parents=True, exist_ok=True)
        save(datasets.DatasetDict(small), place)
    return str(place)


def start_of(folder, start, seed):
    """The folder of a backbone: random weights of the seed, or the pre-trained one for all seeds."""
    if start == PRETRAINED:
        words = ["--source", stored(folder, "h"), "--backbone", BACKBONE, "--from_scratch"]
        words += ["--resolution", *map(str, SIZE), "--num_train_epochs", "16", "--eval_every", "16"]
        run("pretrain_backbone.py", folder / "pretrain", words, "backbone/model.safetensors")
        return str(folder / "pretrain" / "backbone")
    place = folder / f"random-{seed}"
    if not (place / "model.safetensors").exists():
        torch.manual_seed(seed)
        open_backbone(BACKBONE, SIZE, from_scratch=True).save_pretrained(place)
    return str(place)


def run(script, folder, words, done):
    finished(run_once(script, folder, words, done), script)


def found_in(folder, start, name, seed):
    """The record of a run: each target's numbers by epoch."""
    history = json.loads((folder / "metrics.json").read_text())["history"]
    seconds = (folder / "args.json").stat().st_mtime
    targets = {}
    for one in history:
        numbers = {key: one[key] for key in ("epoch", "mAP", "rank1")}
        targets.setdefault(Path(one["target"]).name, []).append(numbers)
    return {
        "start": start,
        "training": name,
        "seed": seed,
        "seconds": round((folder / "metrics.json").stat().st_mtime - seconds),
        "targets": targets,
    }


def rows_of(runs):
    """A row for each start, training and target."""
    rows = []
    for start, name in dict.fromkeys((one["start"], one["training"]) for one in runs):
        its = [one for one in runs if (one["start"], one["training"]) == (start, name)]
        for target in its[0]["targets"]:
            curves = [one["targets"][target] for one in its]
            numbers = [in_percent([curve[-1][key] for curve in curves]) for key in ("mAP", "rank1")]
            rows.append([start, name, target, in_percent([curve[0]["mAP"] for curve in curves]), *numbers])
    return rows


def build_report(runs, rows, seeds):
    report = Report(
        "Domains that were not trained on",
        subtitle="Drawn people and a small ResNet: shows that everything learns, not what it gives on real cameras.",
        facts=[("Seeds", ", ".join(map(str, seeds))), ("Images", " x ".join(map(str, SIZE)))],
    )
    report.section("After training", "Mean and standard deviation over the seeds.")
    report.table(COLUMNS, rows, text_columns=3)
    report.section("By epoch", "The mean of the seeds. Epoch 0 is before any training.")
    charts = []
    for start in dict.fromkeys(one["start"] for one in runs):
        for target in ("b", "d", "e"):
            curves = {
                name: [
                    one["targets"][target]
                    for one in runs
                    if (one["start"], one["training"]) == (start, name) and target in one["targets"]
                ]
                for name in RUNS
            }
            series = [(name, *mean_of(found)) for name, found in curves.items() if found]
            if series:
                words = f"mAP on {target}, {start}"
                chart = line_chart(series, title=words, x_label="epoch", y_label="mAP", percent=True, dots=True)
                charts.append((chart, f"{words}; more is better."))
    report.charts(charts)
    return report


def mean_of(curves):
    """Epochs, and the mean mAP of several runs at each."""
    means = [statistics.fmean(one["mAP"] for one in entries) for entries in zip(*curves, strict=True)]
    return [one["epoch"] for one in curves[0]], means


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS), help="default all")
    parser.add_argument("--starts", nargs="+", choices=[SCRATCH, PRETRAINED], default=[PRETRAINED, SCRATCH])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default 0 1 2")
    parser.add_argument("--output_dir", type=Path, default=Path("output/generalisation"), help="of the runs")
    parser.add_argument("--json", type=Path, default=RESULTS / "generalisation.json", help="result file")
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
                words = [stored(folder, word) if word in DOMAINS else word for word in RUNS[name].split()]
                place = folder / "-".join(f"{start} {name} {seed}".replace(",", "").split())
                words += ["--backbone", backbone, "--seed", str(seed)]
                run("finetune_reid.py", place, words, "model/model.safetensors")
                runs.append(found_in(place, start, name, seed))
        # Every row has the same seeds.
        rows = rows_of(runs)
        with write_together(folder) as part:
            build_report(runs, rows, args.seeds).write(part("report.html"))
        write_result(args.json, command_line(__spec__.name, input_args), COLUMNS, rows, {"runs": runs})
    print(text_table(COLUMNS, rows))


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"benchmarks.quality.generalisation: {error}")
