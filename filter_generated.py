# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "accelerate>=1.12.0",
#     "bitsandbytes>=0.50.0",
#     "datasets>=4.5.0",
#     "diffusers>=0.38.0",
#     "huggingface_hub>=1.20.0",
#     "jinja2>=3.1.4",
#     "matplotlib>=3.9.0",
#     "numpy>=2.1.0",
#     "peft>=0.19.0",
#     "Pillow>=11.0.0",
#     "safetensors>=0.7.0",
#     "scikit-learn>=1.5.2",
#     "scipy>=1.14.1",
#     "torch>=2.11.0",
#     "torchvision>=0.26.0",
#     "tqdm>=4.67.0",
#     "transformers>=5.17.0",
#     "triton>=3.6.0",
# ]
# ///
"""Which generated images may stay: three filters score every image, one of them chooses, and a data set comes out.

    accelerate launch --config_file accelerate_config.yaml filter_generated.py
    accelerate launch filter_generated.py --recipe diff-person --source market1501 --data_root ~/reid --generated out

The first is a demo on drawn people with the shipped stand-in models; the second filters what
`train_dreambooth_reid.py` left in `out`, with real models. For an image x that is to show the identity y:

    CLIP        P("a photo of a person" | x) against other sentences, zero-shot
    CCTF        P(y | x) by an image classifier trained on the source images
    Re-ID CTF   mean of the 3 highest cosines of f(x) with the source images of y, f a Re-ID model of that source;
                and the nearest of all source images must show y, or be nearer by --match_margin at most

All scores go to scores.parquet. The same command with another --filter, --threshold, --keep_fraction,
--false_match_rate, --match_margin, --target_per_id or --near_duplicates chooses again from there, in seconds and
without a model.
"""

import argparse
import json
import os
import random
import shlex
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file

from kernels import cosine_topk
from utils.datasets.schema import ENDINGS
from utils.files import portable, run_record, to_json, write_together
from utils.flags import CLIP_DIR, check_ranges, describe_origin, parse_with_recipes
from utils.generated import choosing
from utils.generated.images import METADATA, SCORED, open_generated
from utils.generated.kept_report import against_truth, truth_table
from utils.generated.kept_set import pieces_of, summary_of, write_scores, write_set
from utils.generated.score_models import check_models, left_out, settings_of
from utils.generated.scoring import (
    CALIBRATION,
    FEATURES,
    SCORES,
    SETTINGS,
    Preparation,
    batch_of,
    batches_ahead,
    is_scored,
    score_pieces,
    view_of,
)
from utils.generated.sources import check_calibration, check_identities, check_sources, open_sources
from utils.launch import end_with
from utils.reporting.report import text_table

DEMO_SOURCE, DEMO_GENERATED = "synthetic:domain=a,num_ids=32,images_per_id=12", "output/generated"
SENTENCE = "a photo of a person"
OTHER_SENTENCES = ("a photo of a dog", "a photo of a car", "an empty street", "a picture of nothing")
RECIPES = {
    "diff-person": {
        "clip_model": "openai/clip-vit-large-patch14",
        "backbone": "microsoft/resnet-50",
        "resolution": [256, 128],
        "train_batch_size": 64,
        "num_train_epochs": 60,
        "classifier_epochs": 60,
        "learning_rate": 3.5e-4,
        "dataloader_num_workers": 8,
        "eval_batch_size": 128,
    }
}
BEST = 3
MAX_CALIBRATION_QUERIES = 2000


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    yes = {"action": "store_true"}
    parser.add_argument("--recipe", choices=RECIPES, help="real models and their training; any flag given wins")

    group = parser.add_argument_group("data")
    group.add_argument(
        "--generated",
        help="folder with metadata.parquet, as train_dreambooth_reid.py writes it, or any data set spec; default: "
        f"{DEMO_GENERATED} where there is one, else a set drawn for the demo",
    )
    group.add_argument(
        "--source",
        nargs="+",
        metavar="SPEC",
        help="labelled sets the images were made from; default: those that the generated folder names",
    )
    group.add_argument("--data_root", help="folder in which the benchmarks lie")
    group.add_argument("--skip_unreadable", **yes, help="leave out source images that do not decode; default: stop")

    group = parser.add_argument_group("models")
    group.add_argument(
        "--clip_model_name_or_path",
        "--clip_model",
        dest="clip_model",
        default=CLIP_DIR,
        help="folder or Hub id, or none; default: the stand-in CLIP",
    )
    group.add_argument("--clip_sentence", default=SENTENCE, help=f"what CLIP should see; default: {SENTENCE}")
    group.add_argument(
        "--clip_others",
        nargs="+",
        default=list(OTHER_SENTENCES),
        help=f"what else it could see; default: {', '.join(OTHER_SENTENCES)}",
    )
    group.add_argument(
        "--reid_model",
        nargs="+",
        metavar="MODEL",
        help="one for all sources, or one for each in the order of their domains' names; default: trained",
    )
    group.add_argument(
        "--classifier_model",
        nargs="+",
        metavar="MODEL",
        help="Re-ID model folders whose classifier knows the source's identities in order of their numbers, one for "
        "each source; none leaves CCTF out; default: trained",
    )
    group.add_argument(
        "--clip_resolution",
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="what CLIP sees, the whole image in any shape; default: its own square, 128 64 for the stand-in",
    )
    group.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], help="default accelerate's setting")

    group = parser.add_argument_group("training of the models that are not given")
    group.add_argument("--backbone", default=CLIP_DIR, help="to start from; default: the stand-in CLIP")
    group.add_argument(
        "--resolution",
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        default=[128, 64],
        help="input in pixels; default 128 64",
    )
    group.add_argument(
        "--reid_method",
        choices=["bot", "agw", "mgn", "bdb"],
        default="mgn",
        help="head of the Re-ID models; parts as mgn has them see whether a body is whole; default mgn",
    )
    group.add_argument("--num_train_epochs", type=int, default=40, help="of the Re-ID models; default 40")
    group.add_argument("--classifier_epochs", type=int, default=8, help="of CCTF's classifiers; default 8")
    group.add_argument("--train_batch_size", type=int, default=32, help="images a step; default 32")
    group.add_argument("--images_per_id", type=int, default=4, help="of each identity in a step; default 4")
    group.add_argument("--learning_rate", type=float, default=1e-3, help="default 1e-3, for the stand-ins")
    group.add_argument(
        "--holdout_fraction",
        type=float,
        default=0.2,
        help="share of each identity's source images that the Re-ID models never see: the threshold is calibrated on "
        "them; default 0.2",
    )

    group = parser.add_argument_group("choice")
    group.add_argument("--filter", choices=choosing.FILTERS, default="reid", help="which one chooses; default reid")
    group.add_argument(
        "--threshold", nargs="+", metavar="VALUE", help="least score that is kept: 0.6, or DOMAIN=0.6 for each source"
    )
    group.add_argument(
        "--keep_fraction",
        nargs="+",
        metavar="VALUE",
        help="the best share of each source, and what is as good as the last of it: 0.7, or DOMAIN=0.7 ...",
    )
    group.add_argument(
        "--false_match_rate",
        type=float,
        help="threshold that at most this share, 0 to 1, of source images of other people reaches; default 0.01 for "
        "--filter reid where nothing else is asked for",
    )
    group.add_argument(
        "--match_margin",
        type=float,
        help="by how much somebody else's source image may be nearer, in cosine, than the nearest of the identity's "
        "own: more keeps more right people in new scenes, then wrong ones; default 0",
    )
    group.add_argument("--target_per_id", type=int, help="the best so many of each identity, of what is left")
    group.add_argument("--min_per_id", type=int, default=1, help="identities with fewer are left out; default 1")
    group.add_argument(
        "--near_duplicates",
        choices=["keep", "perceptual", "feature"],
        default="keep",
        help="remove those of an identity that look like a better one: by a 64-bit hash, or by cosine distance of "
        "Re-ID features; default keep",
    )
    group.add_argument("--duplicate_distance", type=float, help="bits or cosine distance; default 4 bits or 0.02")

    group = parser.add_argument_group("output")
    group.add_argument("--output_dir", default="output/filtered", help="default output/filtered")
    group.add_argument(
        "--format",
        choices=["parquet", "folder"],
        default="parquet",
        help="of dataset/: images inside, or as files; default parquet",
    )
    group.add_argument(
        "--resize", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="of the images kept; default: as they are"
    )
    group.add_argument(
        "--title", default="Filtered generated people", help="of the data card; default: Filtered generated people"
    )
    group.add_argument("--license", default="other", help="of the data card; default other: the sources' terms hold")
    group.add_argument("--push_to_hub", **yes, help="upload dataset/, to a private repository where it is new")
    group.add_argument("--hub_dataset_id", help="repository; default: the name of --output_dir")

    group = parser.add_argument_group("running")
    group.add_argument("--eval_batch_size", type=int, default=64, help="images a process; default 64")
    group.add_argument(
        "--dataloader_num_workers", type=int, default=2, help="threads that read, or processes that train; default 2"
    )
    group.add_argument("--seed", type=int, default=0, help="of training and of what is held out; default 0")
    return parser


def parse_args(input_args=None):
    parser = build_parser()
    args, args.origin = parse_with_recipes(parser, RECIPES, input_args)
    args.demo = args.generated is None and args.source is None
    check_ranges(
        parser,
        args,
        one_or_more=[
            "num_train_epochs", "classifier_epochs", "train_batch_size", "images_per_id", "target_per_id",
            "min_per_id", "eval_batch_size",
        ],
        positive=["learning_rate"],
        not_negative=["dataloader_num_workers", "seed", "duplicate_distance", "match_margin"],
        fractions=["false_match_rate", "holdout_fraction"],
    )  # fmt: skip
    if args.generated is None and args.source is not None:
        parser.error("--source is given without --generated; give the folder of the generated images")
    if args.train_batch_size % args.images_per_id:
        parser.error(f"--train_batch_size {args.train_batch_size} is no multiple of --images_per_id")
    if min(args.resolution + (args.resize or [8]) + (args.clip_resolution or [8])) < 8:
        parser.error("--resolution, --clip_resolution and --resize must be at least 8 pixels")
    if args.holdout_fraction >= 1:
        parser.error("--holdout_fraction must be below 1: something must be left to train on")
    ways = [name for name in ("threshold", "keep_fraction", "false_match_rate") if getattr(args, name) is not None]
    if len(ways) > 1:
        parser.error(f"--{ways[0]} and --{ways[1]} both set the threshold; give one")
    if args.false_match_rate is not None and args.filter != "reid":
        parser.error(f"--false_match_rate is calibrated for --filter reid, not {args.filter}; give --threshold")
    if args.match_margin is not None and args.filter != "reid":
        parser.error(f"--match_margin is part of --filter reid, not {args.filter}")
    if args.target_per_id is not None and args.target_per_id < args.min_per_id:
        parser.error(
            f"--target_per_id {args.target_per_id} is below --min_per_id {args.min_per_id}: nobody would stay"
        )
    if args.duplicate_distance is not None and args.near_duplicates == "keep":
        parser.error("--duplicate_distance goes with --near_duplicates perceptual or feature")
    if not ways and args.target_per_id is None:
        if args.filter != "reid":
            parser.error(f"--filter {args.filter} needs --threshold, --keep_fraction or --target_per_id")
        args.false_match_rate = 0.01
    for name in ("threshold", "keep_fraction"):
        try:
            setattr(args, name, choosing.numbers_of(getattr(args, name)))
        except ValueError as error:
            parser.error(f"--{name} {error}")
    if args.keep_fraction and not all(0 < value <= 1 for value in args.keep_fraction.values()):
        parser.error("--keep_fraction must be above 0 and at most 1")
    excluded = [name for name in ("clip", "cctf") if left_out(args, name)]
    if args.filter in excluded:
        parser.error(f"--filter {args.filter} cannot choose without its model")
    return args


# The method


def clip_scores(features, sentences, scale):
    """Probability of the first of the sentences (S, D), by CLIP's own temperature; all of unit length: (B,)."""
    return (scale * features @ sentences.T).softmax(1)[:, 0]


def cctf_scores(logits, labels):
    """Probability of each image's identity: (B,)."""
    return logits.float().softmax(1).gather(1, labels[:, None])[:, 0]


def reid_scores(features, labels, gallery, gallery_labels):
    """Mean of the best cosines with the identity's source images; the nearest image of all; whether it is its own;
    and by how much it is nearer than the nearest of its own."""
    found = cosine_topk(features, gallery, 1)
    nearest = found.indices[:, 0]
    match = gallery_labels[nearest] == labels
    scores, lead = torch.empty(2, len(features), device=features.device)
    for label in labels.unique():
        rows, own = labels == label, gallery[gallery_labels == label]
        best = cosine_topk(features[rows], own, min(BEST, len(own))).scores
        scores[rows], lead[rows] = best.mean(1), found.scores[rows, 0] - best[:, 0]
    # Both searches may round differently.
    return scores, nearest, match, lead.clamp(min=0).masked_fill(match, 0)


def calibration_scores(features, labels, held_out):
    """Scores of held-out source images against the others: of their own identity, and of every other one."""
    gallery, gallery_labels = features[~held_out], labels[~held_out]
    queries, query_labels = features[held_out], labels[held_out]
    genuine, impostor = [], []
    for label in gallery_labels.unique():
        own = gallery[gallery_labels == label]
        scores = cosine_topk(queries, own, min(BEST, len(own))).scores.mean(1)
        genuine.append(scores[query_labels == label])
        impostor.append(scores[query_labels != label])
    return torch.cat(genuine).cpu(), torch.cat(impostor).cpu()


@dataclass
class Run:
    """What the functions below share."""

    args: argparse.Namespace
    sources: dict
    generated: object
    settings: dict
    accelerator: object = None

    @property
    def folder(self):
        return Path(self.args.output_dir)


# Scoring


def score(run):
    """scores.parquet, features.npy and the calibration, from wherever an earlier run was stopped."""
    # Choosing again waits for none of what this imports.
    from utils.generated.scorers import load_clip, load_models

    args, accelerator = run.args, run.accelerator
    if not args.skip_unreadable:
        check_sources(run.sources)
    check_models(args, run.sources)
    if accelerator.is_main_process:
        with write_together(run.folder) as aside:
            aside(SETTINGS).write_text(to_json(run.settings), encoding="utf-8")
    accelerator.wait_for_everyone()
    # First: what is wrong with it would else be known after the training of the others.
    clip = load_clip(args, accelerator.device)
    models = load_models(args, run.sources, run.folder / "models", accelerator)
    if accelerator.is_main_process:
        calibration = {}
        for domain, its in models.items():
            calibration |= calibrate(run.sources[domain], its.gallery, its.labels, args.seed)
        with write_together(run.folder) as aside:
            save_file(calibration, aside(CALIBRATION))

    def work(table, readers):
        return score_piece(run, models, clip, table, readers)

    score_pieces(run.folder, run.generated, work, accelerator=accelerator)


def score_piece(run, models, clip, table, readers):
    """Columns of `SCORED` for the rows of a table, and the Re-ID features (rows, D) in float16."""
    args, device = run.args, run.accelerator.device
    columns = {name: [None] * len(table) for name in SCORED.names}
    features = np.zeros((len(table), max(its.reid.num_features for its in models.values())), np.float16)
    domains, pids = table["domain"].to_pylist(), table["pid"].to_pylist()
    for domain in sorted(set(domains)):
        its = models[domain]
        views = {"reid": view_of(its.reid)} | ({"clip": clip.view} if clip else {})
        views |= {"cctf": view_of(its.classifier)} if its.classifier else {}
        mine = [row for row, one in enumerate(domains) if one == domain]
        sizes = {"batch_size": args.eval_batch_size, "num_threads": args.dataloader_num_workers}
        for batch in batches_ahead(Preparation(readers, views), mine, **sizes):
            for row, pixels, found in batch:
                columns["perceptual_hash" if pixels else "error"][row] = found
            rows = [row for row, pixels, _ in batch if pixels]
            if not rows:
                continue
            images = batch_of([pixels for _, pixels, _ in batch if pixels], views, args.eval_batch_size, device)
            labels = torch.tensor([its.label_of[pids[row]] for row in rows], device=device)
            found, vectors = score_batch(run, its, clip, images, labels)
            numbers = [found[name] for name in ("clip_score", "cctf_score") if name in found]
            bad = ~np.isfinite(np.column_stack([vectors, *numbers])).all(1)
            if bad.any():
                path = table["path"][rows[int(bad.argmax())]].as_py()
                raise ValueError(
                    f"features or scores of {path} are not finite; give other models, or no --mixed_precision"
                )
            features[rows, : vectors.shape[1]] = vectors
            for name, values in found.items():
                for row, value in zip(rows, values, strict=True):
                    columns[name][row] = value
    return columns, features


@torch.inference_mode()
def score_batch(run, its, clip, images, labels):
    """{column: values} and features of the first images of a batch, as many as there are labels."""
    count, columns = len(labels), {}
    with run.accelerator.autocast():
        features = its.reid(images["reid"])[:count].float()
        if clip:
            found = clip_scores(clip.features(images["clip"])[:count], clip.sentences, clip.scale)
            columns["clip_score"] = found.tolist()
        if its.classifier:
            _, logits = its.classifier.neck(its.classifier.backbone(images["cctf"]))
            columns["cctf_score"] = cctf_scores(logits[:count], labels).tolist()
    scores, nearest, match, lead = reid_scores(features, labels, its.gallery, its.labels)
    columns |= {"reid_score": scores.tolist(), "reid_match": match.tolist(), "reid_lead": lead.tolist()}
    columns["nearest"] = [its.paths[row] for row in nearest.tolist()]
    return columns, features.cpu().numpy()


def calibrate(source, features, labels, seed):
    """Scores of at most some thousand held-out images; where none are held out there is nothing to calibrate on."""
    rows = source.held_out.nonzero().flatten().tolist()
    asked = torch.zeros(len(labels), dtype=torch.bool)
    asked[sorted(random.Random(f"calibration/{seed}").sample(rows, min(len(rows), MAX_CALIBRATION_QUERIES)))] = True
    # What is held out and not asked about stays out of the gallery too.
    among = (asked | ~source.held_out).to(features.device)
    genuine, impostor = torch.zeros(0), torch.zeros(0)
    if rows:
        genuine, impostor = calibration_scores(features[among], labels[among], asked.to(features.device)[among])
    return {f"{source.domain}/genuine": genuine.contiguous(), f"{source.domain}/impostor": impostor.contiguous()}


# The choice


def wanted_thresholds(args, sources):
    """The flags' numbers for each source, as `choosing.thresholds_of` takes them."""
    wanted = {
        name: choosing.numbers_by_domain(getattr(args, name), list(sources), f"--{name}")
        for name in ("threshold", "keep_fraction")
    }
    return wanted | {"false_match_rate": args.false_match_rate}


def choose(run):
    """What is kept; written into scores.parquet, even where nothing is."""
    args, folder = run.args, run.folder
    scores = choosing.read_scores(folder / SCORES, args.match_margin)
    stored = {name: tensor.numpy() for name, tensor in load_file(folder / CALIBRATION).items()}
    calibration = {
        domain: {kind: stored[f"{domain}/{kind}"] for kind in ("genuine", "impostor")} for domain in run.sources
    }
    thresholds = choosing.thresholds_of(
        scores, args.filter, **wanted_thresholds(args, run.sources), calibration=calibration
    )
    features = np.load(folder / FEATURES, mmap_mode="r")
    duplicates = choosing.duplicate_finder(scores, args.near_duplicates, args.duplicate_distance, features)
    limits = {"target_per_id": args.target_per_id, "min_per_id": args.min_per_id}
    choice = choosing.choose(scores, args.filter, thresholds, **limits, duplicates=duplicates)
    with write_together(folder) as aside, pq.ParquetFile(folder / SCORES, pre_buffer=False) as file:
        write_scores(aside(SCORES), pieces_of(file), choice)
    if not choice.kept.any():
        raise ValueError(choosing.nothing_left(scores, choice, args.filter))
    return scores, choice, calibration


# The run


def main(args):
    # Into a file or a pipe, lines would wait for the buffer to fill.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True)
    # The processes meet only to score, or before one draws the demo's images.
    main_process = int(os.environ.get("RANK", 0)) == 0
    say = print if main_process else lambda *_: None
    fill_in(args, say)
    run = open_run(args)
    if is_scored(run.folder, run.settings):
        say(f"All {len(run.generated):,} images are scored: choosing from {run.folder / SCORES}")
    else:
        run.accelerator = start_accelerator(args)
        score(run)
    if main_process:
        finish(run)
    if run.accelerator:
        run.accelerator.end_training()
    return 0


def start_accelerator(args):
    # As in `score`.
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    from utils.launch import use_all_cores

    accelerator = Accelerator(
        # Without it, accelerate takes several processes of torchrun on a machine without a GPU for single ones.
        cpu=not torch.accelerator.is_available(),
        mixed_precision=args.mixed_precision,
        # One process may train for a day while the others wait for it.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=365))],
    )
    if accelerator.device.type == "cpu":
        use_all_cores(accelerator.num_processes)
    return accelerator


def fill_in(args, say):
    """What the demo filters, and the sources that a generated folder names."""
    # accelerate's own rule, which must be known before it is there: it decides the scores.
    args.mixed_precision = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if args.demo:
        args.generated = DEMO_GENERATED
        words = f"the images in {DEMO_GENERATED}"
        if not (Path(DEMO_GENERATED) / METADATA).is_file():
            args.source, args.generated = [DEMO_SOURCE], str(Path(args.output_dir) / "drawn")
            words = "320 drawn images, of which it is known what is wrong with them"
            if not (Path(args.generated) / METADATA).is_file():
                draw_demo(args)
        say(
            f"Demo: {words}, the shipped stand-in models, about two minutes on two cores. For your own: --generated "
            "DIR --source SPEC --data_root DIR, and --recipe diff-person for real models"
        )
    elif CLIP_DIR in (args.clip_model, args.backbone):
        say("Stand-in models, good for tests only, are used; --recipe diff-person has real ones")
    if args.source is None:
        try:
            folder = Path(args.generated).parent if Path(args.generated).is_file() else Path(args.generated)
            args.source = json.loads((folder / "args.json").read_text(encoding="utf-8"))["arguments"]["source"]
        except (OSError, ValueError, KeyError, TypeError):
            args.source = None
        if not (isinstance(args.source, list) and args.source and all(isinstance(one, str) for one in args.source)):
            raise ValueError(f"{args.generated} does not say what it was made from; give --source")
        say(f"Sources, as {args.generated} names them: {' '.join(args.source)}")
    for line in describe_origin(args, args.origin):
        say(line)


def draw_demo(args):
    # As in `score`.
    from utils.generated.drawn_set import write_drawn

    accelerator = start_accelerator(args)
    if accelerator.is_main_process:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        write_drawn(args.generated)
    accelerator.wait_for_everyone()


def open_run(args):
    """Data and settings: all that can be wrong shows here, before a model is loaded."""
    if (Path(args.output_dir) / METADATA).is_file():
        raise ValueError(f"{args.output_dir} holds generated images; give another --output_dir")
    if (Path(args.output_dir) / "dataset").exists() and not (Path(args.output_dir) / SETTINGS).is_file():
        raise ValueError(
            f"{Path(args.output_dir) / 'dataset'} is not of this script, which would replace it; give another "
            "--output_dir"
        )
    try:
        sources = open_sources(
            args.source,
            args.data_root,
            holdout_fraction=args.holdout_fraction,
            seed=args.seed,
            skip_unreadable=args.skip_unreadable,
        )
    except ValueError as error:
        if args.origin["source"] == "flag" or args.demo:
            raise
        raise ValueError(
            f"{error}; {args.generated} knows its sources by their last names only: give --source"
        ) from None
    wanted_thresholds(args, sources)
    generated = open_generated(args.generated, args.data_root, list(sources))
    check_identities(generated, sources)
    if args.false_match_rate is not None:
        check_calibration(generated, sources)
    if args.push_to_hub:
        try:
            HfApi().whoami()
        except Exception as error:
            raise ValueError(f"--push_to_hub needs a login that works: {error}; run `hf auth login`") from None
    return Run(args, sources, generated, settings_of(args, generated, sources))


def finish(run):
    """The choice, the set, the page."""
    args, folder = run.args, run.folder
    scores, choice, calibration = choose(run)
    summary = summary_of(args, run.generated, run.sources, scores, choice, calibration)
    summary["against_truth"] = against_truth(folder / SCORES, scores)
    words = ["accelerate", "launch", "filter_generated.py", *(str(portable(word)) for word in sys.argv[1:])]
    write_set(folder / "dataset", run.generated, folder / SCORES, summary, args, shlex.join(words))
    page = build_page(run, folder / SCORES, scores, choice, calibration, summary)
    with write_together(folder) as aside:
        aside("args.json").write_text(to_json(run_record(args)), encoding="utf-8")
        aside("summary.json").write_text(to_json(summary), encoding="utf-8")
        page.write(aside("report.html"))
    if summary["against_truth"]:
        print(text_table(*truth_table(summary["against_truth"])))
    print(
        f"{summary['kept']:,} of {summary['images']:,} images of {summary['identities']:,} identities are kept: "
        f"{folder / 'dataset'}; open {folder / 'report.html'}"
    )
    if args.push_to_hub:
        api, name = HfApi(), args.hub_dataset_id or folder.resolve().name
        name = api.create_repo(name, repo_type="dataset", private=True, exist_ok=True).repo_id
        # What an earlier choice left there would be read with this one.
        old = ["*.parquet", *(f"*{ending}" for ending in ENDINGS)]
        options = {"repo_type": "dataset", "folder_path": folder / "dataset", "delete_patterns": old}
        print(f"Uploaded: {api.upload_folder(repo_id=name, **options)}")


def run_script(args):
    lean = f"lower --eval_batch_size {args.eval_batch_size} or --train_batch_size"
    end_with(main, args, "filter_generated.py", lean=lean)


if __name__ == "__main__":
    run_script(parse_args())
