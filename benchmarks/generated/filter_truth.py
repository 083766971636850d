"""The four filters on drawn people whose truth is known: AUC, and the share of each kind of image that each keeps.

Each filter keeps as many images as are right; "as chosen" is what Re-ID CTF keeps at its default threshold, and "and
agreeing" what is left of that with --min_agreement.

    python -m benchmarks.generated.filter_truth

`filter_generated.py` with its defaults and the shipped question answerer, on identities that one or two cameras of the
source have seen, as in CUHK03 and MSMT17, and on the same identities where all four cameras have seen each. Prompts
come from the answerer too, which is asked about the source images. The generated images are right ones in the scenes
of their source images and in new scenes, wrong ones in both, near-misses (as in the source, but for one attribute),
broken images and empty scenes. Settings were chosen on the people of seeds 0 and 1 of domain a (`--tuning`). In the
reported runs the people and the cameras of the source (domain d), the scenery of new scenes and the ways in which
images are broken are others. With --work, finished runs are kept in that folder and not repeated.
"""

import argparse
import json
import statistics
import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.common import RESULTS, checked, command_line, kept, mean_and_deviation, run_script, write_result
from utils.flags import CAPTIONER_DIR
from utils.generated import choosing
from utils.generated.drawn_set import NEAR, SOURCE, World, write_drawn, write_source
from utils.generated.kept_report import LABELS
from utils.generated.texts.agreement import WORN
from utils.generated.texts.captioners import Captioner
from utils.generated.texts.captions import QUESTIONS, compose, merged
from utils.reporting.report import text_table

# Whether few cameras have seen an identity.
CAMERAS = {"one or two": True, "all four": False}
SEEDS, TUNING_SEEDS = [11, 12, 13], [0, 1]
DOMAIN, TUNING_DOMAIN = "d", "a"
MIN_AGREEMENT = 0.6
AUCS = {"auc": "AUC", "near_auc_same_scene": "AUC of near-misses"}
# Images of an identity, so that each kind comes as often as in `World.cycle`.
IMAGES_PER_ID = 12


def prompts_of(source):
    """{pid: prompt} of source images, as train_dreambooth_reid.py makes it: of the camera with the most images."""
    answerer, prompts = Captioner.from_pretrained(CAPTIONER_DIR), {}
    rows = pq.read_table(source / "metadata.parquet").to_pylist()
    for pid in sorted({row["pid"] for row in rows}):
        cameras = [row["camid"] for row in rows if row["pid"] == pid]
        camid = max(sorted(set(cameras)), key=cameras.count)
        images = [open_rgb(source / row["path"]) for row in rows if (row["pid"], row["camid"]) == (pid, camid)]
        answers = {key: answerer.ask(images, QUESTIONS[key]) for key in WORN}
        images_answers = [dict(zip(answers, row, strict=True)) for row in zip(*answers.values(), strict=True)]
        prompts[pid] = compose(merged(images_answers)["attributes"])
    return prompts


def open_rgb(path):
    with Image.open(path) as image:
        return image.convert("RGB")


def scored(place, world, flags):
    """{filter: numbers} of a run: `against_truth` of its summary, and more of the near-misses."""
    source = write_source(place / "source", world)
    generated = place / "drawn"
    if not (generated / "metadata.parquet").is_file():
        write_drawn(generated, world, prompts=prompts_of(source))
    words = ["--generated", generated, "--source", source, "--captioner", CAPTIONER_DIR, *flags]
    words += ["--output_dir", place / "out"]
    checked(run_script("filter_generated.py", *words), "filter_generated.py")
    found = json.loads((place / "out" / "summary.json").read_text())["against_truth"]
    for name, auc in near_misses(place / "out" / "scores.parquet").items():
        found[name] |= auc
    checked(run_script("filter_generated.py", *words, "--min_agreement", MIN_AGREEMENT), "filter_generated.py")
    again = json.loads((place / "out" / "summary.json").read_text())["against_truth"]
    for name, numbers in again.items():
        if "chosen" in numbers:
            found[name]["agreeing"] = numbers["chosen"]
    return found


def near_misses(path):
    """{filter: its AUC of right images, and of those in the scenes of the source, against near-misses}."""
    scores, truths = choosing.read_scores(path), np.array(pq.read_table(path)["truth"].to_pylist())
    near, found = truths == NEAR, {}
    for name in choosing.FILTERS:
        if not scores.has(name):
            continue
        found[name] = {}
        values = choosing.ranking(scores, name)
        for key, right in (
            ("near_auc", np.char.startswith(truths.astype(str), "right")),
            ("near_auc_same_scene", truths == SOURCE),
        ):
            found[name][key] = choosing.area_under_curve(values[right | near], right[right | near])
    return found


def table_of(found):
    """(columns, rows) of {cameras: {seed: {filter: numbers}}}: mean and deviation over the seeds."""
    rows, every = [], [numbers for seeds in found.values() for seed in seeds.values() for numbers in seed.values()]
    aucs = {key: name for key, name in AUCS.items() if all(key in numbers for numbers in every)}
    for cameras, seeds in found.items():
        for name in next(iter(seeds.values())):
            numbers = [seed[name] for seed in seeds.values()]
            kinds = list(numbers[0]["kept"])
            for key, label in (("kept", ""), ("chosen", ", as chosen"), ("agreeing", ", and agreeing")):
                if not all(key in seed for seed in numbers):
                    continue
                shown = [mean_and_deviation([seed[auc] for seed in numbers], 3) for auc in aucs]
                shares = [[100 * seed[key][kind] for seed in numbers] for kind in kinds]
                cells = [f"{mean_and_deviation(share, 0)} %" for share in shares]
                rows.append(
                    [cameras, f"{LABELS[name]}{label}", *(shown if key == "kept" else [""] * len(aucs)), *cells]
                )
    return ["cameras", "filter", *aucs.values(), *kinds], rows


def main(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tuning", action="store_true", help="the people, scenes and breakage that settings are for")
    parser.add_argument("--seeds", type=int, nargs="+", help="of people; default 11 12 13, with --tuning 0 1")
    parser.add_argument("--num_ids", type=int, default=24, help="people; default 24")
    parser.add_argument("--cameras", nargs="+", choices=CAMERAS, default=list(CAMERAS), help="default both")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="of filter_generated.py; must come last")
    parser.add_argument("--work", type=Path, help="folder to keep, to resume from after a stop")
    parser.add_argument("--json", type=Path, default=RESULTS / "filter_truth.json", help="default benchmarks/results")
    args = parser.parse_args(input_args)
    if args.tuning and args.json == RESULTS / "filter_truth.json":
        parser.error("--tuning results are not those that are reported; give another --json")
    found = {cameras: {} for cameras in args.cameras}
    kind = {"domain": TUNING_DOMAIN if args.tuning else DOMAIN, "unseen": not args.tuning, "near_misses": True}
    with tempfile.TemporaryDirectory() as place:
        place = args.work or Path(place)
        for seed in args.seeds or (TUNING_SEEDS if args.tuning else SEEDS):
            for cameras in args.cameras:
                world = World(
                    num_ids=args.num_ids,
                    images_per_id=IMAGES_PER_ID,
                    seed=seed,
                    few_cameras=CAMERAS[cameras],
                    **kind,
                )
                folder = place / f"{cameras.replace(' ', '-')}-{seed}"
                settings = {"world": asdict(world), "flags": args.flags, "min_agreement": MIN_AGREEMENT}
                found[cameras][seed] = kept(
                    folder / "found.json", settings, partial(scored, folder, world, args.flags)
                )
                print(f"people of seed {seed}, each seen by {cameras}", flush=True)
                print(text_table(*table_of({cameras: {seed: found[cameras][seed]}})), flush=True)
    columns, rows = table_of(found)
    print(f"mean and deviation\n{text_table(columns, rows)}")
    raw = {"num_ids": args.num_ids, "flags": args.flags, "min_agreement": MIN_AGREEMENT, "auc": mean_auc(found)}
    write_result(args.json, command_line(__spec__.name, input_args), columns, rows, raw | {"cameras": found})


def mean_auc(found):
    """{cameras: {filter: AUC}}, the mean of the seeds."""
    return {
        cameras: {
            name: statistics.fmean(numbers[name]["auc"] for numbers in seeds.values())
            for name in next(iter(seeds.values()))
        }
        for cameras, seeds in found.items()
    }


if __name__ == "__main__":
    main()
