"""Few-shot mAP after pre-training by SOLIDER, by DINO and by identities: one small Swin, on the built-in world.

    python -m benchmarks.quality.pretraining_objectives

Pre-training starts where ImageNet's weights would be: from that Swin, trained by the identities of domains f, g and
h, once for each seed, because how well a training from random weights ends depends on the draw. It goes on with the
same images of domains b, c, d and e by each objective, and is then fine-tuned on a tenth of each identity's images of
domain a and measured on other people of a. SOLIDER's backbone is also fine-tuned with other semantic weights; random
weights, and the start without more pre-training, are beside them. All images are drawn once, at the size of training.
Every run has a process and a folder of its own: after a stop, the same command continues and repeats nothing.
"""

import argparse
import json
import sys
from pathlib import Path

import datasets
import torch

from benchmarks.common import RESULTS, command_line, finished, in_percent, run_once, write_result
from utils.datasets.load import load_reid
from utils.datasets.portable import save
from utils.modeling.names import open_backbone
from utils.reporting.report import text_table

SIZE = (64, 32)
BACKBONE = "swin-mini"
RANDOM, NO_MORE, IDENTITIES, DINO, SOLIDER = "random weights", "the start", "identities", "DINO", "SOLIDER"
WORDS = f"--resolution {SIZE[0]} {SIZE[1]} --log_every 16"
# Of pretrain_backbone.py.
BATCHES = f"{WORDS} --train_batch_size 64 --randaugment_ops 0 --eval_every 24 --num_train_epochs 24"
START = f"{BATCHES} --backbone {BACKBONE} --from_scratch --learning_rate 2e-3 --max_grad_norm 1"
# Each objective sees every image as often. The rates are the best of 2e-4 and 5e-5 by seed 7, and for DINO of 1e-3.
PRETRAIN = f"{BATCHES} --max_grad_norm 3"
CROPS = "--local_crops 4 --hidden_sides 0.7"
OBJECTIVES = {
    IDENTITIES: "--objective classification --learning_rate 1e-3",
    DINO: f"--objective dino --learning_rate 2e-4 {CROPS}",
    SOLIDER: f"--objective solider --learning_rate 5e-5 {CROPS}",
}
WEIGHTS = {f"{SOLIDER}, weight {weight}": weight for weight in ("0.0", "1.0")}
STARTS = [RANDOM, NO_MORE, *OBJECTIVES, *WEIGHTS]
FINETUNE = (
    f"{WORDS} --setting few-shot --fraction 0.1 --padding 3 --train_batch_size 24 --learning_rate 5e-4 "
    "--lr_scheduler cosine --num_train_epochs 40 --eval_every 10"
)
FIRST, SECOND, OTHER = "fgh", "bcde", "a"
# Identities and images of each.
DOMAINS = dict.fromkeys(FIRST, (512, 8)) | dict.fromkeys(SECOND, (64, 8)) | {OTHER: (64, 20)}
COLUMNS = ["start", "mAP % before", "mAP %", "Rank-1 %", "gain of mAP"]


def stored(folder, domain):
    """The folder with the drawn people of a domain, at the size of training."""
    place = folder / "data" / domain
    if not place.exists():
        ids, images = DOMAINS[domain]
        data = load_reid(f"synthetic:domain={domain},num_ids={ids},images_per_id={images}")
        splits = list(data) if domain == OTHER else ["train"]
        small = {split: data[split].map(lambda row: {"image": row["image"].resize(SIZE[::-1])}) for split in splits}
        place.parent.mkdir(parents=True, exist_ok=True)
        save(datasets.DatasetDict(small), place)
    return str(place)


def start_of(folder, start, seed):
    """The folder of a start's backbone, made where it is not there yet."""
    if start == RANDOM:
        place = folder / f"random-{seed}"
        if not (place / "model.safetensors").exists():
            torch.manual_seed(seed)
            open_backbone(BACKBONE, SIZE, from_scratch=True).save_pretrained(place)
        return str(place)
    if start == NO_MORE:
        return pretrained(folder, f"start-{seed}", [*START.split(), "--seed", str(seed)], FIRST)
    objective = SOLIDER if start in WEIGHTS else start
    words = ["--backbone", start_of(folder, NO_MORE, seed), *PRETRAIN.split(), *OBJECTIVES[objective].split()]
    return pretrained(folder, f"pretrain-{objective.lower()}-{seed}", [*words, "--seed", str(seed)], SECOND)


def pretrained(folder, name, words, domains):
    words = [*words, "--source", *(stored(folder, domain) for domain in domains)]
    run("pretrain_backbone.py", folder / name, words, "backbone/model.safetensors")
    return str(folder / name / "backbone")


def run(script, folder, words, done):
    finished(run_once(script, folder, words, done), script)


def finetune(folder, start, seed):
    """The history of one few-shot training."""
    words = ["--source", stored(folder, OTHER), "--backbone", start_of(folder, start, seed), *FINETUNE.split()]
    words += ["--seed", str(seed), "--fraction_seed", str(seed)]
    words += ["--semantic_weight", WEIGHTS[start]] if start in WEIGHTS else []
    place = folder / f"few-shot-{start.lower().replace(', ', '-').replace(' ', '-')}-{seed}"
    run("finetune_reid.py", place, words, "model/model.safetensors")
    history = json.loads((place / "metrics.json").read_text())["history"]
    return [{key: one[key] for key in ("epoch", "mAP", "rank1")} for one in history]


def rows_of(runs, starts):
    """A row of each start; gains are over the start of the same seed, where that was run."""

    def of(start, place, key):
        return [one["history"][place][key] for one in runs if one["start"] == start]

    rows, start_alone = [], of(NO_MORE, -1, "mAP")
    for start in starts:
        trained = of(start, -1, "mAP")
        row = [start, *map(in_percent, (of(start, 0, "mAP"), trained, of(start, -1, "rank1")))]
        compared = start_alone and start not in (RANDOM, NO_MORE)
        gains = [after - before for after, before in zip(trained, start_alone, strict=True)] if compared else []
        rows.append([*row, in_percent(gains, "+") if gains else "-"])
    return rows


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=STARTS, help="default all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default 0 1 2")
    parser.add_argument("--output_dir", type=Path, default=Path("output/objectives"), help="where the runs are kept")
    default = RESULTS / "pretraining_objectives.json"
    parser.add_argument("--json", type=Path, default=default, help="default benchmarks/results")
    return parser.parse_args(input_args)


def main(input_args=None):
    args = parse_args(input_args)
    folder, runs = args.output_dir.absolute(), []
    datasets.disable_progress_bars()
    for seed in args.seeds:
        for start in args.starts:
            runs.append({"start": start, "seed": seed, "history": finetune(folder, start, seed)})
        # Every row has the same seeds.
        rows = rows_of(runs, args.starts)
        settings = {"start": START, "pretrain": PRETRAIN, "objectives": OBJECTIVES, "finetune": FINETUNE}
        write_result(args.json, command_line(__spec__.name, input_args), COLUMNS, rows, settings | {"runs": runs})
    print(text_table(COLUMNS, rows))


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"benchmarks.quality.pretraining_objectives: {error}")
