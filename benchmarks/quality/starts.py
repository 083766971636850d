"""Does a better start show? Two starts x settings x seeds through finetune_reid.py: table, deviations, mAP by epoch.

    python -m benchmarks.quality.starts --output_dir output/starts
    python -m benchmarks.quality.starts --starts imagenet=microsoft/resnet-50 diff-person=output/pretrain/backbone \\
        --source market1501 --finetune "--recipe published --data_root ~/reid --num_train_epochs 10"

The first, on drawn people, makes its own starts: a small ResNet pre-trained by pretrain_backbone.py on many people of
four domains, drawn as a generator's set is once it is filtered (an identity in any scene, no camera, marked as
synthetic), and the same network with random weights. Both are fine-tuned alike on part of a fifth domain and measured
on other people of it; half an hour on a core. Every run is a process of its own and its own folder: the same command
continues after a stop, and runs nothing twice.

Random weights learn more at three times that rate, with a warm-up; what is left of the difference there:

    python -m benchmarks.quality.starts --output_dir output/high_rate --settings few-shot:0.1@60 \\
        --json benchmarks/results/starts_high_rate.json --finetune "--resolution 64 32 --padding 3 \\
        --train_batch_size 24 --learning_rate 3e-3 --lr_scheduler cosine --lr_warmup_steps 60"
"""

import argparse
import contextlib
import importlib
import itertools
import json
import multiprocessing
import os
import random
import shlex
import shutil
import statistics
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.common import RESULTS, environment
from utils.datasets.load import load_reid, parse_spec
from utils.datasets.portable import save
from utils.files import to_json, write_together
from utils.generated.drawn_set import World, in_scene, metadata_of
from utils.generated.made_set import METADATA, image_path, save_image
from utils.modeling.names import open_backbone
from utils.reporting.charts import line_chart
from utils.reporting.report import Report, text_table

# SETTING[:FRACTION][@EPOCHS]
SETTINGS = ["few-shot:0.1@40", "few-shot:0.3@40", "supervised@8", "small-scale:0.1@60"]
SOURCE = "synthetic:domain=b,num_ids=64,images_per_id=20"
RESOLUTION = (64, 32)
# A batch holds the six identities of a tenth.
FINETUNE = "--resolution 64 32 --padding 3 --train_batch_size 24 --learning_rate 1e-3 --lr_scheduler cosine"
PRETRAIN = "--backbone resnet-small --num_train_epochs 16 --train_batch_size 32 --randaugment_ops 0 --erasing 0"
# Of the people to pre-train on: not the domain to fine-tune on.
DOMAINS, NUM_IDS, IMAGES_PER_ID = "acde", 256, 8
SCRATCH, PRETRAINED = "scratch", "pretrained"
NUMBERS = {"mAP": "mAP %", "rank1": "Rank-1 %"}


def run(script, folder, arguments, done):
    """A script's run in `folder`, unless its result is there; ValueError where that is of other arguments."""
    command = [*arguments, "--output_dir", str(folder), "--resume_from_checkpoint", "latest"]
    record = folder / "args.json"
    if record.exists():
        before = json.loads(record.read_text())["command"][1:]
        if before != command:
            raise ValueError(f"{folder} holds a run of {shlex.join(before)}; give another --output_dir")
    if not (folder / done).exists():
        print(f"{script} {shlex.join(command)}", flush=True)
        if run_process(script, command):
            sys.exit(f"{script} stopped, it said why above; the same command continues from there")


def run_process(script, command):
    """Exit code of a process of its own, forked from one that has imported torch and all else, once for all."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["finetune_reid", "pretrain_backbone"])
    process = context.Process(target=call, args=(script, command))
    process.start()
    process.join()
    return process.exitcode


def call(script, command):
    module = importlib.import_module(script.removesuffix(".py"))
    sys.argv = [script, *command]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        module.run_script(module.parse_args(command))


def draw_people(folder):
    """A set as `train_dreambooth_reid.py` and `filter_generated.py` leave it, drawn by code."""
    part, rows = folder.with_name(f".{folder.name}.part"), []
    shutil.rmtree(part, ignore_errors=True)
    for domain, number in itertools.product(DOMAINS, range(NUM_IDS)):
        world, pid = World(domain), 2 * number
        for index in range(IMAGES_PER_ID):
            scene = random.Random(f"scene/{domain}/{pid}/{index}").choice(DOMAINS)
            row = metadata_of(world, pid, index, image_path(f"synthetic-{domain}/{pid:04d}", index, "jpg"), "")
            path = part / row["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            mark = {key: row[key] for key in ("prompt", "seed", "model")}
            save_image(in_scene(world, pid, scene, index), path, quality=95, **mark)
            rows.append({name: row[name] for name in METADATA.names})
    pq.write_table(pa.Table.from_pylist(rows, schema=METADATA), part / "metadata.parquet")
    part.rename(folder)


def own_starts(args):
    """{name: folder of a seed} of the network that --pretrain names, as it is drawn and as it comes out."""
    words = shlex.split(args.pretrain)
    if "--source" not in words:
        if not (args.output_dir / "people").exists():
            draw_people(args.output_dir / "people")
        words += ["--source", str(args.output_dir / "people")]
    name = words[words.index("--backbone") + 1]
    run("pretrain_backbone.py", args.output_dir / "pretrain", words, "backbone/model.safetensors")
    for seed in args.seeds:
        folder = args.output_dir / f"{SCRATCH}-{seed}"
        if not (folder / "model.safetensors").exists():
            torch.manual_seed(seed)
            open_backbone(name, RESOLUTION, from_scratch=True).save_pretrained(folder)
    return {
        SCRATCH: lambda seed: str(args.output_dir / f"{SCRATCH}-{seed}"),
        PRETRAINED: lambda seed: str(args.output_dir / "pretrain" / "backbone"),
    }


def kept_source(args):
    """The labelled set: drawn people as a copy on the disk, which is read sooner than they are drawn again."""
    name, options = parse_spec(args.source)
    folder = args.output_dir / "source"
    if name != "synthetic":
        return args.source
    if not folder.exists():
        save(load_reid(name, **options), folder)
    return str(folder)


def finetune(args, source, start, backbone, setting, seed):
    """The history of one run, of about eight measurements."""
    part, _, epochs = setting.partition("@")
    kind, _, fraction = part.partition(":")
    folder = args.output_dir / "runs" / f"{start}-{kind}{fraction and '-' + fraction}-{seed}"
    epochs = int(epochs or args.epochs)
    words = ["--source", source, "--method", args.method, "--backbone", backbone, "--setting", kind]
    words += ["--fraction", fraction] if fraction else []
    words += ["--seed", str(seed), "--fraction_seed", str(seed)]
    words += ["--num_train_epochs", str(epochs), "--eval_every", str(-(-epochs // 8))]
    run("finetune_reid.py", folder, words + shlex.split(args.finetune), "model/model.safetensors")
    return json.loads((folder / "metrics.json").read_text())["history"]


def shown(values, sign=""):
    """Mean and standard deviation, in percent."""
    percents = [100 * value for value in values]
    deviation = f" ± {statistics.stdev(percents):.1f}" if len(percents) > 1 else ""
    return f"{statistics.fmean(percents):{sign}.1f}{deviation}"


def rows_of(runs, settings, starts):
    """One row a setting and number: both starts, and the second's gain, run by run of one seed."""
    rows = []
    for setting in settings:
        for key, name in NUMBERS.items():
            last = {start: [one["history"][-1][key] for one in at(runs, setting, start)] for start in starts}
            gains = [new - old for old, new in zip(*(last[start] for start in starts), strict=True)]
            cells = [*(shown(last[start]) for start in starts), shown(gains, "+")]
            rows.append([setting.partition("@")[0], name, *cells])
    return rows


def at(runs, setting, start):
    return [one for one in runs if (one["setting"], one["start"]) == (setting, start)]


def build_page(args, runs, starts, columns, rows):
    page = Report(
        "Two starts, the same training",
        subtitle=f"{' against '.join(starts)}, fine-tuned with the same labels, batches and seeds.",
        facts=[("Method", args.method), ("Source", args.source), ("Seeds", ", ".join(map(str, args.seeds)))],
    )
    page.section("After training", "Mean and standard deviation over the seeds; the gain is that of one seed's pair.")
    page.table(columns, rows, text_columns=2)
    page.section("By epoch", "The mean of the seeds. Epoch 0 is before any training.")
    charts = []
    for setting in args.settings:
        series = []
        for start in starts:
            histories = [one["history"] for one in at(runs, setting, start)]
            epochs = [one["epoch"] for one in histories[0]]
            series.append((start, epochs, [statistics.fmean(line) for line in zip(*maps(histories), strict=True)]))
        name = setting.partition("@")[0]
        chart = line_chart(series, title=name, x_label="epoch", y_label="mAP", percent=True, dots=True)
        charts.append((chart, f"{name}: mAP of both starts on the same people."))
    page.charts(charts)
    return page


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
    parser.add_argument("--epochs", type=int, default=10, help="of a setting without its own; default 10")
    parser.add_argument("--finetune", default=FINETUNE, help=f"more of finetune_reid.py's; default {FINETUNE!r}")
    parser.add_argument("--output_dir", type=Path, default=Path("output/starts"), help="default output/starts")
    parser.add_argument("--json", type=Path, default=RESULTS / "starts.json", help="default benchmarks/results")
    args = parser.parse_args(input_args)
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
        starts = own_starts(args)
    runs, source = [], kept_source(args)
    for setting in args.settings:
        for seed in args.seeds:
            for start, backbone in starts.items():
                history = finetune(args, source, start, backbone(seed), setting, seed)
                kept = [{key: one[key] for key in ("epoch", *NUMBERS)} for one in history]
                runs.append({"setting": setting, "start": start, "seed": seed, "history": kept})
    columns = ["setting", "number", *starts, "gain"]
    rows = rows_of(runs, args.settings, list(starts))
    print(text_table(columns, rows))
    with write_together(args.output_dir) as part:
        build_page(args, runs, list(starts), columns, rows).write(part("report.html"))
    with write_together(args.json.parent) as part:
        asked = {key: getattr(args, key) for key in ("pretrain", "source", "method", "settings", "finetune")}
        content = {"environment": environment(), **asked, "columns": columns, "table": rows, "runs": runs}
        part(args.json.name).write_text(to_json(content))
    print(f"Page: {args.output_dir / 'report.html'}; numbers: {args.json}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"benchmarks.quality.starts: {error}")
