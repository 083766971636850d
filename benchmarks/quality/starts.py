"""Fine-tuning from two starts, pre-trained and random weights: mAP and Rank-1 by share of labels, over several seeds.

    python -m benchmarks.quality.starts --output_dir output/starts
    python -m benchmarks.quality.starts --starts imagenet=microsoft/resnet-50 diff-person=output/pretrain/backbone \\
        --source market1501 --finetune "--recipe published --data_root ~/reid --num_train_epochs 10"

The first command runs on drawn people and makes its own starts: a small ResNet that pretrain_backbone.py pre-trains on
many people of four domains, drawn like a filtered set of generated images (an identity in any scene, no camera, marked
as synthetic), and the same network with random weights. Both are fine-tuned alike on part of a fifth domain and
measured on other people of it; half an hour on one core. Every run has a process and a folder of its own: after a
stop, the same command continues and repeats nothing. `--eval_every 1` measures after every epoch, which shows which
start learns faster.

    python -m benchmarks.quality.starts --scales 0.125 0.25 0.5 1 --settings few-shot:0.1@40 --output_dir output/scales

compares starts that were pre-trained on a part of the people instead, for as many epochs: on shares of each identity's
images, and on shares of the identities. The report has a curve of each.

Random weights learn more at three times that rate, with a warm-up. The difference there:

    python -m benchmarks.quality.starts --output_dir output/high_rate --settings few-shot:0.1@60 \\
        --json benchmarks/results/starts_high_rate.json --finetune "--resolution 64 32 --padding 3 \\
        --train_batch_size 24 --learning_rate 3e-3 --lr_scheduler cosine --lr_warmup_steps 60"
"""

import argparse
import itertools
import json
import random
import re
import shlex
import shutil
import statistics
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.common import RESULTS, command_line, finished, in_percent, run_once, write_result
from utils import ranges
from utils.datasets.load import load_reid, parse_spec
from utils.datasets.portable import save
from utils.files import write_together
from utils.generated.drawn_set import World, in_scene, metadata_of
from utils.generated.made_set import METADATA, image_path, save_image
from utils.modeling.names import open_backbone
from utils.reporting.charts import line_chart
from utils.reporting.report import Report, text_table

# SETTING[:FRACTION][@EPOCHS]
SETTINGS = ["few-shot:0.1@40", "few-shot:0.3@40", "supervised@8", "small-scale:0.1@60"]
SOURCE = "synthetic:domain=b,num_ids=64,images_per_id=20"
RESOLUTION = (64, 32)
# A batch holds the six identities of 10 % of them.
FINETUNE = "--resolution 64 32 --padding 3 --train_batch_size 24 --learning_rate 1e-3 --lr_scheduler cosine"
PRETRAIN = "--backbone resnet-small --num_train_epochs 16 --train_batch_size 32 --randaugment_ops 0 --erasing 0"
# The people to pre-train on; not the domain to fine-tune on.
DOMAINS, NUM_IDS, IMAGES_PER_ID = "acde", 256, 8
SCRATCH, PRETRAINED = "scratch", "pretrained"
NUMBERS = {"mAP": "mAP %", "rank1": "Rank-1 %"}
# What a scale study takes a share of, and the flag of pretrain_backbone.py.
PARTS = {"images": "--image_fraction", "identities": "--identity_fraction"}


def draw_people(folder):
    """Draw a set of the kind that `train_dreambooth_reid.py` and `filter_generated.py` write."""
    aside, rows = folder.with_name(f".{folder.name}.part"), []
    shutil.rmtree(aside, ignore_errors=True)
    for domain, number in itertools.product(DOMAINS, range(NUM_IDS)):
        world, pid = World(domain), 2 * number
        for index in range(IMAGES_PER_ID):
            scene = random.Random(f"scene/{domain}/{pid}/{index}").choice(DOMAINS)
            row = metadata_of(world, pid, index, image_path(f"synthetic-{domain}/{pid:04d}", index, "jpg"), "")
            path = aside / row["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            mark = {key: row[key] for key in ("prompt", "seed", "model")}
            save_image(in_scene(world, pid, scene, index), path, quality=95, **mark)
            rows.append({name: row.get(name) for name in METADATA.names})
    pq.write_table(pa.Table.from_pylist(rows, schema=METADATA), aside / "metadata.parquet")
    aside.rename(folder)


def pretrained(args, name, *more):
    """The backbone that pretrain_backbone.py leaves in a folder of this name, with --pretrain and more flags."""
    words = [*pretrain_words(args), *more]
    script = "pretrain_backbone.py"
    finished(run_once(script, args.output_dir / name, words, "backbone/model.safetensors"), script)
    return str(args.output_dir / name / "backbone")


def pretrain_words(args):
    words = shlex.split(args.pretrain)
    if "--source" not in words:
        if not (args.output_dir / "people").exists():
            draw_people(args.output_dir / "people")
        words += ["--source", str(args.output_dir / "people")]
    return words


def own_starts(args):
    """{name: folder by seed} of the network that --pretrain names, with random weights and pre-trained."""
    words = pretrain_words(args)
    name = words[words.index("--backbone") + 1]
    backbone = pretrained(args, "pretrain")
    for seed in args.seeds:
        folder = args.output_dir / f"{SCRATCH}-{seed}"
        if not (folder / "model.safetensors").exists():
            torch.manual_seed(seed)
            open_backbone(name, RESOLUTION, from_scratch=True).save_pretrained(folder)
    return {
        SCRATCH: lambda seed: str(args.output_dir / f"{SCRATCH}-{seed}"),
        PRETRAINED: lambda seed: backbone,
    }


def scaled_starts(args):
    """{name: folder by seed} of networks that were pre-trained on a share of the images or of the identities."""
    names = {}
    for share in args.scales:
        for part, flag in PARTS.items():
            # All of the images are all of the identities.
            name = scaled(part, share)
            folder, more = ("pretrain", []) if share == 1 else (f"pretrain-{name}", [flag, f"{share:g}"])
            names.setdefault(name, pretrained(args, folder, *more))
    return {name: lambda seed, backbone=backbone: backbone for name, backbone in names.items()}


def scaled(part, share):
    return "all" if share == 1 else f"{part}-{share:g}"


def kept_source(args):
    """The labelled set; drawn people as a copy on disk, which is faster to read than to draw."""
    name, options = parse_spec(args.source)
    folder = args.output_dir / "source" / "-".join(re.findall("=([^,]+)", args.source))
    if name != "synthetic":
        return args.source
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        save(load_reid(name, **options), folder)
    return str(folder)


def finetune(args, source, start, backbone, setting, seed):
    """The history of one run, by default with about eight measurements."""
    part, _, epochs = setting.partition("@")
    kind, _, fraction = part.partition(":")
    folder = args.output_dir / "runs" / f"{start}-{kind}{fraction and '-' + fraction}-{seed}"
    epochs = int(epochs or args.epochs)
    words = ["--source", source, "--method", args.method, "--backbone", backbone, "--setting", kind]
    words += ["--fraction", fraction] if fraction else []
    words += ["--seed", str(seed), "--fraction_seed", str(seed)]
    words += ["--num_train_epochs", str(epochs), "--eval_every", str(args.eval_every or -(-epochs // 8))]
    words += shlex.split(args.finetune)
    finished(run_once("finetune_reid.py", folder, words, "model/model.safetensors"), "finetune_reid.py")
    return json.loads((folder / "metrics.json").read_text())["history"]


def rows_of(runs, settings, starts):
    """A row for each setting and number: both starts, and the gain of the second with the same seed."""
    rows = []
    for setting in settings:
        for key, name in NUMBERS.items():
            last = {start: [one["history"][-1][key] for one in at(runs, setting, start)] for start in starts}
            gains = [new - old for old, new in zip(*(last[start] for start in starts), strict=True)]
            cells = [*(in_percent(last[start]) for start in starts), in_percent(gains, "+")]
            rows.append([setting.partition("@")[0], name, *cells])
    return rows


def scale_rows(runs, settings, scales):
    """A row for each setting, number and share: after pre-training on a share of the images, and of the identities."""
    rows = []
    for setting in settings:
        for key, name in NUMBERS.items():
            for share in scales:
                found = [at(runs, setting, scaled(part, share)) for part in PARTS]
                cells = [in_percent([one["history"][-1][key] for one in part]) for part in found]
                rows.append([setting.partition("@")[0], name, f"{100 * share:g} %", *cells])
    return rows


SCALE_COLUMNS = ["setting", "number", "share", *(f"of the {part}" for part in PARTS)]


def scale_charts(runs, settings, scales):
    """The mean mAP of the seeds by share, a curve for images and one for identities."""
    charts = []
    for setting in settings:
        series = []
        for part in PARTS:
            last = [[one["history"][-1]["mAP"] for one in at(runs, setting, scaled(part, share))] for share in scales]
            series.append(
                (f"share of the {part}", [100 * share for share in scales], list(map(statistics.fmean, last)))
            )
        name = setting.partition("@")[0]
        chart = line_chart(series, title=name, x_label="share, %", y_label="mAP", percent=True, dots=True)
        charts.append((chart, f"{name}: mAP by the share of the set that was pre-trained on."))
    return charts


def at(runs, setting, start):
    return [one for one in runs if (one["setting"], one["start"]) == (setting, start)]


def build_report(args, runs, starts, columns, rows):
    report = Report(
        "Scales of pre-training" if args.scales else "Two starts, the same training",
        subtitle=f"{' against '.join(starts)}, fine-tuned with the same labels, batches and seeds.",
        facts=[("Method", args.method), ("Source", args.source), ("Seeds", ", ".join(map(str, args.seeds)))],
    )
    gain = "" if args.scales else "; the gain is that of one seed's pair"
    report.section("After training", f"Mean and standard deviation over the seeds{gain}.")
    report.table(columns, rows, text_columns=2)
    if args.scales:
        report.section(
            "By share", "The mean of the seeds. With a share of the images, each identity keeps that share."
        )
        report.charts(scale_charts(runs, args.settings, args.scales))
    report.section("By epoch", "The mean of the seeds. Epoch 0 is before any training.")
    charts = []
    for setting in args.settings:
        series = []
        for start in starts:
            histories = [one["history"] for one in at(runs, setting, start)]
            epochs = [one["epoch"] for one in histories[0]]
            series.append((start, epochs, [statistics.fmean(line) for line in zip(*maps(histories), strict=True)]))
        name = setting.partition("@")[0]
        chart = line_chart(series, title=name, x_label="epoch", y_label="mAP", percent=True, dots=True)
        charts.append((chart, f"{name}: mAP of all starts on the same people."))
    report.charts(charts)
    return report


def maps(histories):
    return [[one["mAP"] for one in history] for history in histories]


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", nargs=2, metavar="NAME=BACKBONE", help="two folders or Hub ids; default: its own")
    parser.add_argument("--pretrain", default=PRETRAIN, help=f"of pretrain_backbone.py; default {PRETRAIN!r}")
    parser.add_argument("--source", default=SOURCE, help=f"labelled set, also measured on; default {SOURCE}")
    parser.add_argument("--method", default="agw", help="of finetune_reid.py; default agw")
    parser.add_argument(
        "--settings",
        nargs="+",
        default=SETTINGS,
        help=f"SETTING[:FRACTION][@EPOCHS]; default {' '.join(SETTINGS)}",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default 0 1 2")
    parser.add_argument(
        "--scales", type=ranges.share, nargs="+", help="shares of the people to pre-train on, in place of two starts"
    )
    parser.add_argument(
        "--eval_every", type=ranges.at_least(1), help="epochs between measurements; default: about eight"
    )
    parser.add_argument("--epochs", type=int, default=10, help="of a setting without its own; default 10")
    parser.add_argument("--finetune", default=FINETUNE, help=f"more of finetune_reid.py's; default {FINETUNE!r}")
    parser.add_argument("--output_dir", type=Path, default=Path("output/starts"), help="default output/starts")
    parser.add_argument("--json", type=Path, help="default starts.json or scales.json in benchmarks/results")
    args = parser.parse_args(input_args)
    if args.scales and args.starts:
        parser.error("--scales pre-trains its own starts; leave out --starts, or give --pretrain another --source")
    args.scales = sorted(set(args.scales or ()))
    args.json = args.json or RESULTS / ("scales.json" if args.scales else "starts.json")
    args.output_dir = args.output_dir.absolute()
    named = [one.partition("=") for one in args.starts or ()]
    if any(not (name and backbone) for name, _, backbone in named) or len({name for name, *_ in named}) != len(named):
        parser.error(f"--starts takes two NAME=BACKBONE with different names, got {' '.join(args.starts)}")
    args.named = {name: backbone for name, _, backbone in named}
    return args


def main(input_args=None):
    args = parse_args(input_args)
    if args.named:
        starts = {name: lambda seed, backbone=backbone: backbone for name, backbone in args.named.items()}
    else:
        starts = scaled_starts(args) if args.scales else own_starts(args)
    runs, source = [], kept_source(args)
    for setting in args.settings:
        for seed in args.seeds:
            for start, backbone in starts.items():
                history = finetune(args, source, start, backbone(seed), setting, seed)
                kept = [{key: one[key] for key in ("epoch", *NUMBERS)} for one in history]
                runs.append({"setting": setting, "start": start, "seed": seed, "history": kept})
    if args.scales:
        columns, rows = SCALE_COLUMNS, scale_rows(runs, args.settings, args.scales)
    else:
        columns, rows = ["setting", "number", *starts, "gain"], rows_of(runs, args.settings, list(starts))
    print(text_table(columns, rows))
    with write_together(args.output_dir) as part:
        build_report(args, runs, list(starts), columns, rows).write(part("report.html"))
    raw = {key: getattr(args, key) for key in ("pretrain", "source", "method", "settings", "finetune")}
    raw |= {"scales": args.scales} if args.scales else {}
    write_result(args.json, command_line(__spec__.name, input_args), columns, rows, raw | {"runs": runs})
    print(f"Report: {args.output_dir / 'report.html'}; result: {args.json}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"benchmarks.quality.starts: {error}")
