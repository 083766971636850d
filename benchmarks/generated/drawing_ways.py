"""What cheaper drawing costs in quality, on drawn people with the stand-ins: seconds of an identity and measures.

    python -m benchmarks.generated.drawing_ways
    python -m benchmarks.generated.drawing_ways --sheet sheet.png      # also some images of each way

`train_dreambooth_reid.py` makes images of the same people in several ways: with a reference set of its own for each
identity and with shared ones, with guidance on half of the steps, with a few-step LoRA (of `few_step_lora.py`), and
with as few steps without it. Measures are the script's own: CLIP of images and prompts, of generated and source
images, between generated images; Re-ID features of generated and source images, by a model that was trained on other
people of the domain; AUC of own against other identities' source images by these. Each way of each seed, which are
other people, is a run of its own; finished ones are not repeated.
"""

import argparse
import csv
import json
import shutil
import statistics
import sys
from pathlib import Path

import torch
from PIL import Image

from benchmarks.common import (
    RESULTS,
    checked,
    command_line,
    finished,
    kept,
    mean_and_deviation,
    run_once,
    run_script,
    write_result,
)
from benchmarks.generated.few_step_lora import distilled
from utils.files import write_together
from utils.generated.measures import identity_auc
from utils.reporting.report import sheet, text_table

PEOPLE = "synthetic:domain=a,num_ids=6,seed={seed}"
# Other people of the same cameras.
JUDGE = "synthetic:domain=a,num_ids=96,seed=100"
COMMON = "--max_train_steps 80 --num_images 8 --num_inference_steps 20 --num_reference_images 16"
OWN, FEW_STEP = "own reference sets", "few-step LoRA, 4 steps, no guidance"
WAYS = {
    OWN: "--reference_prompts own",
    "shared reference sets": "",
    "guidance on half of the steps": "--guidance_share 0.5",
    FEW_STEP: "--fast_lora {few_step}",
    "4 steps, no guidance": "--num_inference_steps 4 --guidance_scale 1",
}
MEASURES = {
    "text_similarity": "like its prompt", "image_similarity": "like the source", "diversity": "diversity",
    "identity_similarity": "same person", "auc": "AUC",
}  # fmt: skip
COLUMNS = ["way", "reference sets", "CPU s an identity", "of own sets", *MEASURES.values(), "seeds"]
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def judge(folder):
    """The Re-ID model that measures whether an image shows its identity."""
    place = folder / "judge"
    words = ["--source", JUDGE, "--num_train_epochs", 20, "--seed", 0]
    finished(run_once("finetune_reid.py", place, words, "model/model.safetensors", ONE_THREAD), "finetune_reid.py")
    return place / "model"


def made(folder, way, seed, few_step):
    """Numbers of one run."""
    place = folder / f"{way}-{seed}".replace(",", "").replace(" ", "-")
    words = ["--source", PEOPLE.format(seed=seed), *COMMON.split(), *WAYS[way].format(few_step=few_step).split()]
    words += ["--reid_model", judge(folder), "--seed", seed]

    def measure():
        # The seconds are those of a whole run.
        shutil.rmtree(place, ignore_errors=True)
        run = run_script(
            "train_dreambooth_reid.py", *words, "--output_dir", place, logs=place / "logs", environment=ONE_THREAD
        )
        checked(run, "train_dreambooth_reid.py")
        print(f"{way}, seed {seed}: {run.seconds:.0f} s", flush=True)
        return numbers_of(place) | {"cpu_seconds": run.cpu_seconds}

    return kept(folder / f"{place.name}.json", list(map(str, words)), measure)


def numbers_of(place):
    """{measure: mean over identities}, the number of reference sets and of identities."""
    with open(place / "measures.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    found = {name: statistics.fmean(float(row[name]) for row in rows) for name in MEASURES if name != "auc"}
    records = [
        json.loads(path.read_text(encoding="utf-8")) for path in sorted(place.glob("identities/*/*/images.json"))
    ]
    sides = [torch.tensor([record["features"][side] for record in records]) for side in ("source", "generated")]
    return found | {
        "auc": identity_auc(*sides), "identities": len(records),
        "reference_sets": len({record["reference"] for record in records}),
    }  # fmt: skip


def rows_of(runs):
    rows = []
    for way in WAYS:
        numbers = [run for run in runs if run["way"] == way]
        if not numbers:
            continue
        # The first identity of a run loads the models too.
        each = {run["seed"]: run["cpu_seconds"] / run["identities"] for run in numbers}
        before = {run["seed"]: run["cpu_seconds"] / run["identities"] for run in runs if run["way"] == OWN}
        shares = [each[seed] / before[seed] for seed in each if seed in before]
        sets = [f"{run['reference_sets']} of {run['identities']}" for run in numbers]
        row = [way, ", ".join(dict.fromkeys(sets)), mean_and_deviation(list(each.values()))]
        row.append(mean_and_deviation(shares, 2) if shares else "-")
        row += [mean_and_deviation([run[name] for run in numbers], 3) for name in MEASURES]
        rows.append([*row, len(numbers)])
    return rows


def pictures(folder, seed, count=3, images=3):
    """A row of images for each way: some of a few identities."""
    rows = []
    for way in WAYS:
        place = folder / f"{way}-{seed}".replace(",", "").replace(" ", "-")
        people = sorted(path for path in place.glob("images/*/*") if path.is_dir())[:count]
        files = [file for person in people for file in sorted(person.iterdir())[:images]]
        rows.append([Image.open(file).convert("RGB") for file in files])
    return sheet(rows)


def main(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12], help="of people; default 10 11 12")
    parser.add_argument("--steps", type=int, default=1200, help="of the few-step LoRA's distillation; default 1200")
    parser.add_argument("--output_dir", type=Path, default=Path("output/drawing_ways"), help="models and images")
    parser.add_argument("--sheet", type=Path, help="draw some images of the first seed into this PNG")
    parser.add_argument("--json", type=Path, default=RESULTS / "drawing_ways.json", help="result file")
    args = parser.parse_args(input_args)
    folder, runs = args.output_dir.absolute(), []
    few_step = distilled(folder / f"few_step-{args.steps}", args.steps)
    for seed in args.seeds:
        for way in WAYS:
            runs.append({"way": way, "seed": seed} | made(folder, way, seed, few_step))
        raw = {"people": PEOPLE, "common": COMMON, "ways": WAYS, "distillation_steps": args.steps, "runs": runs}
        write_result(args.json, command_line(__spec__.name, input_args), COLUMNS, rows_of(runs), raw)
    print(text_table(COLUMNS, rows_of(runs)))
    if args.sheet:
        with write_together(args.sheet.parent) as part:
            pictures(folder, args.seeds[0]).save(part(args.sheet.name), "PNG")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"benchmarks.generated.drawing_ways: {error}")
