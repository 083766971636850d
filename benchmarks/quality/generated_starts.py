"""Few-shot training from a backbone that was pre-trained on generated images, beside the images they were made from.

    python -m benchmarks.quality.generated_starts

For each seed, images of the same drawn people are generated and filtered, without changes of clothing and with; a
backbone is pre-trained on the kept ones, and on the source images themselves (the control: the same people, nothing
generated). Each is fine-tuned on a tenth of other people's images from other cameras, beside random weights. The seed
changes the generated images, the pre-training and which images are labelled. Every run has a process and a folder of
its own: after a stop, the same command continues and repeats nothing.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch

from benchmarks.common import (
    RESULTS,
    checked,
    command_line,
    finished,
    in_percent,
    kept,
    run_once,
    run_script,
    write_result,
)
from utils.datasets.load import load_reid, parse_spec
from utils.datasets.portable import save
from utils.modeling.names import open_backbone
from utils.reporting.report import text_table

# So many that their own images help on seed 7: 24 do not.
PEOPLE = "synthetic:domain=a,num_ids=64,images_per_id=12"
LABELLED = "synthetic:domain=b,num_ids=64,images_per_id=20"
SIZE = (64, 32)
BACKBONE = "resnet-small"
WORDS = f"--resolution {SIZE[0]} {SIZE[1]}"
GENERATE = "--max_train_steps 60 --num_images 12 --num_reference_images 8"
# The smaller set is seen more often: all see about as many images.
PRETRAIN = f"{WORDS} --backbone {BACKBONE} --from_scratch --train_batch_size 24 --max_train_steps 400"
FINETUNE = f"{WORDS} --method agw --setting few-shot --fraction 0.1 --padding 3 --train_batch_size 24"
FINETUNE += " --learning_rate 1e-3 --lr_scheduler cosine --num_train_epochs 40 --eval_every 40"
RANDOM, SOURCE = "random weights", "source images"
CLOTHING = {"generated, own clothes": 0.0, "generated, a fifth in other clothes": 0.2}
STARTS = [RANDOM, SOURCE, *CLOTHING]
COLUMNS = ["start", "images", "mAP %", "Rank-1 %", "gain of mAP", "seeds"]


def stored(spec, folder, name):
    """A copy of a drawn set on disk, which is faster to read than to draw."""
    source, options = parse_spec(spec)
    place = folder / "-".join([name, *map(str, options.values())])
    if not place.exists():
        save(load_reid(source, **options), place)
    return place


def run(script, place, words):
    """Run one of the scripts that resume by themselves, unless it ended with these words before."""

    def measure():
        ended = checked(run_script(script, *words, "--output_dir", place, logs=place / "logs"), script)
        print(f"{script} {place.parent.name} {ended.seconds:.0f} s", flush=True)
        return {"seconds": ended.seconds}

    kept(place.with_name(f"{place.name}.json"), [script, *map(str, words)], measure)


def backbone_of(folder, start, seed):
    """(backbone, number of images it has seen) of a start."""
    place = folder / f"{start}-{seed}".replace(",", "").replace(" ", "-")
    if start == RANDOM:
        if not (place / "model.safetensors").exists():
            torch.manual_seed(seed)
            open_backbone(BACKBONE, SIZE, from_scratch=True).save_pretrained(place)
        return place, 0
    source = stored(PEOPLE, folder, "people")
    if start in CLOTHING:
        words = [*GENERATE.split(), "--clothing_change", CLOTHING[start], "--source", source, "--seed", seed]
        run("train_dreambooth_reid.py", place / "made", words)
        words = ["--generated", place / "made", "--source", source, "--seed", seed]
        run("filter_generated.py", place / "filtered", words)
        source = place / "filtered" / "dataset"
    words = [*PRETRAIN.split(), "--source", source, "--seed", seed]
    finished(run_once("pretrain_backbone.py", place, words, "backbone/model.safetensors"), "pretrain_backbone.py")
    for weights in place.glob("checkpoint-*"):
        shutil.rmtree(weights)
    return place / "backbone", len(load_reid(str(source))["train"])


def finetuned(folder, start, seed):
    """mAP and Rank-1 after fine-tuning, and the number of images that the start has seen."""
    backbone, images = backbone_of(folder, start, seed)
    place = folder / "runs" / f"{start}-{seed}".replace(",", "").replace(" ", "-")
    words = [*FINETUNE.split(), "--source", stored(LABELLED, folder, "labelled"), "--backbone", backbone]
    words += ["--seed", seed, "--fraction_seed", seed]
    finished(run_once("finetune_reid.py", place, words, "model/model.safetensors"), "finetune_reid.py")
    last = json.loads((place / "metrics.json").read_text())["history"][-1]
    return {"start": start, "seed": seed, "images": images, "mAP": last["mAP"], "rank1": last["rank1"]}


def rows_of(runs):
    def of(start, key):
        return [one[key] for one in runs if one["start"] == start]

    rows = []
    for start in STARTS:
        gains = [after - before for after, before in zip(of(start, "mAP"), of(RANDOM, "mAP"), strict=True)]
        images = sorted({f"{count:,}" for count in of(start, "images")})
        cells = [in_percent(of(start, key)) for key in ("mAP", "rank1")]
        rows.append([start, " ".join(images), *cells, in_percent(gains, "+") if start != RANDOM else "-", len(gains)])
    return rows


def main(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default 0 1 2")
    parser.add_argument("--output_dir", type=Path, default=Path("output/generated_starts"), help="data and runs")
    parser.add_argument("--json", type=Path, default=RESULTS / "generated_starts.json", help="result file")
    args = parser.parse_args(input_args)
    folder, runs = args.output_dir.absolute(), []
    for seed in args.seeds:
        runs += [finetuned(folder, start, seed) for start in STARTS]
        raw = {"people": PEOPLE, "labelled": LABELLED, "generate": GENERATE, "pretrain": PRETRAIN}
        raw |= {"finetune": FINETUNE, "runs": runs}
        write_result(args.json, command_line(__spec__.name, input_args), COLUMNS, rows_of(runs), raw)
    print(text_table(COLUMNS, rows_of(runs)))


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"benchmarks.quality.generated_starts: {error}")
