# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "accelerate>=1.12.0", "bitsandbytes>=0.50.0", "datasets>=4.5.0", "diffusers>=0.38.0", "huggingface_hub>=1.20.0",
#     "jinja2>=3.1.4", "numpy>=2.1.0", "peft>=0.19.0", "Pillow>=11.0.0", "safetensors>=0.7.0",
#     "scikit-learn>=1.5.2", "scipy>=1.14.1", "torch>=2.11.0", "torchvision>=0.26.0", "tqdm>=4.67.0",
#     "transformers>=5.17.0", "triton>=3.6.0; sys_platform == 'linux'",
# ]
# ///
"""Filter generated images: filters score each image, one of them chooses, and the kept ones form a data set.

    accelerate launch --config_file accelerate_config.yaml filter_generated.py
    accelerate launch filter_generated.py --recipe diff-person --source market1501 --data_root ~/reid --generated out

The first is a demo on drawn people with the shipped stand-in models; the second filters what
`train_dreambooth_reid.py` left in `out`, with real models. For an image x that is to show the identity y:

    CLIP        P("a photo of a person" | x) against other sentences, zero-shot
    CCTF        P(y | x) by an image classifier trained on the source images
    Re-ID CTF   mean of the 3 highest cosines of f(x) with the source images of y, f a Re-ID model of that source;
                and the nearest of all source images must show y, or be nearer by --match_margin at most
    attributes  with --captioner, share of equal words in its answers about x (clothes, hair, bag, hat) and in the
                prompt of x, the mean over attributes; a garment changed on purpose does not count

By default the threshold is that which 95 % of held-out source images reach against their identity's images of other
cameras, less twice the lead of a nearer stranger in place of the last rule: a new scene is like another camera.

All scores go to scores.parquet. The same command with another --filter, --threshold, --keep_fraction,
--true_match_rate, --false_match_rate, --match_margin, --min_agreement, --target_per_id or --near_duplicates chooses
again from these scores, in seconds and without a model. Images with a changed garment (column `changed`) set no
threshold, fill no --min_per_id, and fewer of them are kept than in the identity's own clothes.
"""

import math

from utils import flags, ranges
from utils.flags import CLIP_DIR
from utils.ranges import above_zero, at_least, fraction, not_negative

DEMO_SOURCE, DEMO_GENERATED = "synthetic:domain=a,num_ids=32,images_per_id=12", "output/generated"
DEMO = (
    "Demo: {images}, the shipped stand-in models, about two minutes on two cores. For your own: --generated DIR "
    "--source SPEC --data_root DIR, and --recipe diff-person for real models"
)
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
# The names of utils.generated.choosing.FILTERS.
FILTERS = ("clip", "cctf", "reid", "attributes")
# The flags of the choice among scored images.
CHOICE = (
    "threshold", "keep_fraction", "true_match_rate", "false_match_rate", "match_margin", "target_per_id",
    "min_per_id", "near_duplicates", "duplicate_distance", "min_agreement",
)  # fmt: skip
# The flags of the models that are trained.
TRAINED_BY = (
    "backbone", "reid_method", "resolution", "train_batch_size", "images_per_id", "num_train_epochs",
    "classifier_epochs", "learning_rate", "seed",
)  # fmt: skip
# Thresholds that are calibrated on held-out source images.
RATES = ("true_match_rate", "false_match_rate")


def build_parser():
    parser = flags.Parser(__doc__, recipes=RECIPES)
    flags.add_recipe(parser, "real models and their training")
    group = flags.add_data(
        parser, source="labelled sets that images were made from; default: those that --generated names", workers=2
    )
    group.add(
        "--generated",
        help="folder with metadata.parquet, as train_dreambooth_reid.py writes it, or any data set spec; default: "
        f"{DEMO_GENERATED} where there is one, else a set drawn for the demo",
    )

    group = parser.group("models")
    group.add(
        "--clip_model_name_or_path",
        "--clip_model",
        dest="clip_model",
        default=CLIP_DIR,
        help="CLIP, folder or Hub id; `none` leaves the CLIP filter out",
    )
    group.add("--clip_sentence", default=SENTENCE, help="what CLIP should see")
    group.add(
        "--clip_others",
        nargs="+",
        default=list(OTHER_SENTENCES),
        help=f"what else it could see; default: {', '.join(OTHER_SENTENCES)}",
    )
    group.add(
        "--reid_model",
        nargs="+",
        metavar="MODEL",
        help="one for all sources, or one for each in the order of --source; default: trained",
    )
    group.add(
        "--classifier_model",
        nargs="+",
        metavar="MODEL",
        help="Re-ID model folders whose classifier knows the source's identities in order of their numbers, one for "
        "each source in the order of --source; `none` leaves CCTF out; default: trained",
    )
    group.add(
        "--captioner_model_name_or_path", "--captioner", dest="captioner", default="none",
        help="question answerer such as Salesforce/blip-vqa-base, folder or Hub id, that adds the attribute score; "
        "default none",
    )  # fmt: skip
    group.size(
        "--clip_resolution", help="what CLIP sees, in any shape; default: its own square, 128 64 for the stand-in"
    )
    group.add("--mixed_precision", choices=flags.PRECISIONS, help="precision; default: accelerate's setting")

    given = (lambda args: args.reid_model and args.classifier_model, "--reid_model and --classifier_model are given")
    group = parser.group("training of the models that are not given", idle=given)
    group.add("--backbone", default=CLIP_DIR, help="model to start from")
    group.size("--resolution", [128, 64], help="input in pixels")
    group.add(
        "--reid_method",
        choices=["bot", "agw", "mgn", "bdb"],
        default="mgn",
        help="head of the Re-ID models; parts as mgn has them see whether a body is whole",
    )
    group.add("--num_train_epochs", type=at_least(1), default=40, help="passes over the images, of the Re-ID models")
    group.add("--classifier_epochs", type=at_least(1), default=8, help="passes over the images, of CCTF's classifiers")
    group.add("--train_batch_size", type=at_least(1), default=32, help="images of each step")
    group.add("--images_per_id", type=at_least(1), default=4, help="images of each identity in a batch")
    group.add("--learning_rate", type=above_zero, default=1e-3, help="suits the stand-ins")

    group = parser.group("choice")
    group.add("--filter", choices=FILTERS, default="reid", help="the filter that chooses")
    group.add("--threshold", nargs="+", help="least score that is kept: 0.6, or DOMAIN=0.6 for each source")
    group.add("--keep_fraction", nargs="+", help="the best share of each source, and ties: 0.7, or DOMAIN=0.7 ...")
    group.add(
        "--false_match_rate", type=fraction, help="threshold that at most this share of images of strangers reaches"
    )
    group.add(
        "--true_match_rate",
        type=ranges.share,
        help="threshold that this share of held-out source images reaches across cameras, each less twice the lead of "
        "a nearer stranger unless --match_margin is given; default 0.95 for --filter reid where nothing else is asked "
        "for",
    )
    group.add(
        "--match_margin",
        type=not_negative,
        help="by how much another identity's source image may be nearer, in cosine, than the nearest of the image's "
        "own: more keeps more right images in new scenes, then wrong ones; default 0",
    )
    group.add(
        "--min_agreement",
        type=fraction,
        help="least attribute score, whatever the filter; images of which no answer says anything pass. On drawn "
        "people 0.6 removes more than half of the broken images that are left and a tenth of the right ones",
    )
    group.add("--target_per_id", type=at_least(1), help="how many of each identity are kept, the best; default: all")
    group.add("--min_per_id", type=at_least(1), default=1, help="identities with fewer images are left out")
    group.add(
        "--near_duplicates",
        choices=["keep", "perceptual", "feature"],
        default="keep",
        help="remove what looks like a better image of the identity, by a 64-bit hash or cosine distance of features",
    )
    group.add("--duplicate_distance", type=not_negative, help="bits or cosine distance; default 4 bits or 0.02")
    group.add(
        "--holdout_fraction",
        type=ranges.below_one,
        default=0.2,
        help="share of each identity's source images that the Re-ID models never see, for the threshold",
    )

    group = parser.group("output")
    group.add("--output_dir", default="output/filtered", help="folder of the results")
    group.add(
        "--format", choices=["parquet", "folder"], default="parquet", help="of dataset/: images inside, or as files"
    )
    group.size("--resize", help="of the images kept; default: as they are")
    group.add("--title", default="Filtered generated people", help="of the data card")
    group.add("--license", default="other", help="of the data card; default other: the sources' terms hold")
    flags.add_upload(group, "dataset/, to a private repository where it is new", "--hub_dataset_id")
    group.add("--eval_batch_size", type=at_least(1), default=64, help="images of each process")
    group.add("--seed", type=ranges.seed, default=0, help="of training and of what is held out")
    return parser


def parse_args(input_args=None):
    parser = build_parser()
    args = parser.parse(input_args)
    args.demo = args.generated is None and args.source is None
    check_args(parser, args)
    args.notes = parser.notes(args)
    return args


def numbers_by_name(words):
    """{name, or None for all: number} of `0.6` or `market1501=0.6 msmt17=0.5`; None of None."""
    numbers = {}
    for word in words or ():
        name, equals, text = word.rpartition("=")
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or bool(name) != bool(equals) or (name or None) in numbers:
            raise ValueError(f"{word!r} is not as expected: a number, or DOMAIN=NUMBER for each source")
        numbers[name or None] = value
    if None in numbers and len(numbers) > 1:
        raise ValueError("has a number for all sources and others for single ones; give one kind")
    return None if words is None else numbers


def check_args(parser, args):
    """Reject wrong combinations of arguments; fill in the defaults of the choice."""
    if args.generated is None and args.source is not None:
        parser.error("--source is given without --generated; give the folder of the generated images")
    if args.train_batch_size % args.images_per_id:
        parser.error(f"--train_batch_size {args.train_batch_size} is no multiple of --images_per_id")
    limits = [name for name in ("threshold", "keep_fraction", *RATES) if getattr(args, name) is not None]
    if len(limits) > 1:
        parser.error(f"--{limits[0]} and --{limits[1]} both set the threshold; give one")
    for name in RATES:
        if getattr(args, name) is not None and args.filter != "reid":
            parser.error(f"--{name} is calibrated for --filter reid, not {args.filter}; give --threshold")
    if args.match_margin is not None and args.filter != "reid":
        parser.error(f"--match_margin is part of --filter reid, not {args.filter}")
    if args.target_per_id is not None and args.target_per_id < args.min_per_id:
        parser.error(
            f"--target_per_id {args.target_per_id} is below --min_per_id {args.min_per_id}: no identity would be kept"
        )
    if args.duplicate_distance is not None and args.near_duplicates == "keep":
        parser.error("--duplicate_distance goes with --near_duplicates perceptual or feature")
    if not limits and args.target_per_id is None:
        if args.filter != "reid":
            parser.error(f"--filter {args.filter} needs --threshold, --keep_fraction or --target_per_id")
        args.true_match_rate = 0.95
    for name in ("threshold", "keep_fraction"):
        try:
            setattr(args, name, numbers_by_name(getattr(args, name)))
        except ValueError as error:
            parser.error(f"--{name} {error}")
    if args.keep_fraction and not all(0 < value <= 1 for value in args.keep_fraction.values()):
        parser.error("--keep_fraction must be above 0 and at most 1")
    if args.min_agreement is not None and args.captioner == "none":
        parser.error("--min_agreement compares answers with prompts; give the --captioner that answers")
    skipped = {"clip": args.clip_model == "none", "cctf": (args.classifier_model or [""])[0] == "none"}
    skipped["attributes"] = args.captioner == "none"
    if skipped.get(args.filter):
        flag = {"clip": "clip_model", "cctf": "classifier_model", "attributes": "captioner"}[args.filter]
        parser.error(f"--filter {args.filter} cannot choose without its model, --{flag} is none")


if __name__ == "__main__":
    # Parse before torch and datasets are imported, so that --help and a mistyped flag answer at once.
    args = parse_args()

import os
import shlex
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file

# transformers, diffusers and accelerate are imported where they are needed, so that choosing again starts at once.
from kernels import cosine_topk
from utils import launch
from utils.files import portable, run_record, to_json, write_together
from utils.generated import choosing
from utils.generated.calibration import BEST, calibrate, cameras_missing
from utils.generated.images import METADATA, SCORED, check_generated, open_generated, sources_named_by
from utils.generated.kept_report import against_truth, kept_report, truth_table
from utils.generated.kept_set import pieces_of, summary_of, upload_set, write_scores, write_set
from utils.generated.score_models import Training, Wanted, check_models, given, settings_of
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
from utils.generated.texts.agreement import check_prompts, has_prompts
from utils.reporting.report import text_table

# The method


def clip_scores(features, sentences, scale):
    """The probability of the first of the sentences (S, D) by CLIP's temperature: (B,). All rows are unit-length."""
    # Logits of 25 are too large for half precision before a softmax.
    with torch.autocast(features.device.type, enabled=False):
        return (scale * features.float() @ sentences.float().T).softmax(1)[:, 0]


def cctf_scores(logits, labels):
    """The probability of each image's identity: (B,)."""
    return logits.float().softmax(1).gather(1, labels[:, None])[:, 0]


def reid_scores(features, labels, gallery, gallery_labels):
    """(scores, nearest, match, lead): the mean of the best cosines with the identity's source images; the nearest
    source image; whether it shows the identity; by how much it is nearer than the nearest image of the identity."""
    top = cosine_topk(features, gallery, 1)
    nearest = top.indices[:, 0]
    match = gallery_labels[nearest] == labels
    scores, lead = torch.empty(2, len(features), device=features.device)
    for label in labels.unique():
        rows, own_gallery = labels == label, gallery[gallery_labels == label]
        best = cosine_topk(features[rows], own_gallery, min(BEST, len(own_gallery))).scores
        scores[rows], lead[rows] = best.mean(1), top.scores[rows, 0] - best[:, 0]
    # The two searches may round differently, so the lead of a match is set to 0.
    return scores, nearest, match, lead.clamp(min=0).masked_fill(match, 0)


# Scoring


def score(args, accelerator, sources, generated, wanted, settings):
    """Write scores.parquet, features.npy and the calibration; resumes an earlier run."""
    from utils.generated.attribute_scores import add_attribute_scores, load_answerer
    from utils.generated.scorers import load_clip, load_models

    folder = Path(args.output_dir)
    if not args.skip_unreadable:
        check_sources(sources)
    check_models(wanted, sources)
    if accelerator.is_main_process:
        with write_together(folder) as part:
            part(SETTINGS).write_text(to_json(settings), encoding="utf-8")
    accelerator.wait_for_everyone()
    # CLIP is loaded first, so that its errors show before the other models are trained.
    clip = load_clip(wanted, accelerator.device)
    answerer = load_answerer(wanted, accelerator.device, args.eval_batch_size)
    models = load_models(wanted, sources, folder / "models", accelerator, batch_size=args.eval_batch_size)
    if accelerator.is_main_process:
        calibration = {}
        for domain, scorers in models.items():
            calibration |= calibrate(sources[domain], scorers.gallery, scorers.labels, args.seed)
        with write_together(folder) as part:
            save_file(calibration, part(CALIBRATION))

    def work(table, readers):
        columns, features = score_piece(args, accelerator, models, clip, table, readers)
        return add_attribute_scores(columns, answerer, table, readers), features

    score_pieces(folder, generated, work, accelerator=accelerator)


def score_piece(args, accelerator, models, clip, table, readers):
    """The columns of `SCORED` for the rows of a table, and their Re-ID features (rows, D) in float16."""
    columns = {name: [None] * len(table) for name in SCORED.names}
    width = max(scorers.reid.num_features for scorers in models.values())
    features = np.zeros((len(table), width), np.float16)
    domains, pids = table["domain"].to_pylist(), table["pid"].to_pylist()
    for domain in sorted(set(domains)):
        scorers = models[domain]
        views = {"reid": view_of(scorers.reid)} | ({"clip": clip.view} if clip else {})
        views |= {"cctf": view_of(scorers.classifier)} if scorers.classifier else {}
        domain_rows = [row for row, name in enumerate(domains) if name == domain]
        sizes = {"batch_size": args.eval_batch_size, "num_threads": args.dataloader_num_workers}
        for batch in batches_ahead(Preparation(readers, views), domain_rows, **sizes):
            for row, pixels, hash_or_reason in batch:
                columns["perceptual_hash" if pixels else "error"][row] = hash_or_reason
            rows = [row for row, pixels, _ in batch if pixels]
            if not rows:
                continue
            pixels = [pixels for _, pixels, _ in batch if pixels]
            images = batch_of(pixels, views, args.eval_batch_size, accelerator.device)
            labels = torch.tensor([scorers.label_of[pids[row]] for row in rows], device=accelerator.device)
            with accelerator.autocast():
                scored, vectors = score_batch(scorers, clip, images, labels)
            numbers = [scored[name] for name in ("clip_score", "cctf_score") if name in scored]
            bad = ~np.isfinite(np.column_stack([vectors, *numbers])).all(1)
            if bad.any():
                path = table["path"][rows[int(bad.argmax())]].as_py()
                raise ValueError(
                    f"features or scores of {path} are not finite; give other models, or no --mixed_precision"
                )
            features[rows, : vectors.shape[1]] = vectors
            for name, values in scored.items():
                for row, value in zip(rows, values, strict=True):
                    columns[name][row] = value
    return columns, features


@torch.inference_mode()
def score_batch(scorers, clip, images, labels):
    """{column: values} and the features of a batch; images beyond the labels are padding and are dropped."""
    count, columns = len(labels), {}
    features = scorers.reid(images["reid"])[:count].float()
    if clip:
        columns["clip_score"] = clip_scores(clip.features(images["clip"])[:count], clip.sentences, clip.scale).tolist()
    if scorers.classifier:
        _, logits = scorers.classifier.neck(scorers.classifier.backbone(images["cctf"]))
        columns["cctf_score"] = cctf_scores(logits[:count], labels).tolist()
    scores, nearest, match, lead = reid_scores(features, labels, scorers.gallery, scorers.labels)
    columns |= {"reid_score": scores.tolist(), "reid_match": match.tolist(), "reid_lead": lead.tolist()}
    columns["nearest"] = [scorers.paths[row] for row in nearest.tolist()]
    return columns, features.cpu().numpy()


# The choice


def thresholds_by_domain(args, sources):
    """The flags that set the threshold, by source, as arguments of `choosing.thresholds_of`."""
    arguments = {
        name: choosing.numbers_by_domain(getattr(args, name), list(sources), f"--{name}")
        for name in ("threshold", "keep_fraction")
    }
    return arguments | {name: getattr(args, name) for name in RATES}


def write_choice(args, sources):
    """Choose images; write the choice to scores.parquet, even if empty. Returns (scores, choice, calibration)."""
    folder = Path(args.output_dir)
    weight = choosing.LEAD_WEIGHT if args.true_match_rate is not None and args.match_margin is None else None
    scores = choosing.read_scores(folder / SCORES, args.match_margin, weight)
    stored = {name: tensor.numpy() for name, tensor in load_file(folder / CALIBRATION).items()}
    calibration = {
        domain: {kind: stored[f"{domain}/{kind}"] for kind in ("genuine", "impostor", "across")} for domain in sources
    }
    for domain, pair in calibration.items():
        if args.match_margin is None:
            pair["across"] = pair["across"] - choosing.LEAD_WEIGHT * stored[f"{domain}/across_lead"]
    thresholds = choosing.thresholds_of(
        scores, args.filter, **thresholds_by_domain(args, sources), calibration=calibration
    )
    features = np.load(folder / FEATURES, mmap_mode="r")
    duplicates = choosing.duplicate_finder(scores, args.near_duplicates, args.duplicate_distance, features)
    limits = {name: getattr(args, name) for name in ("target_per_id", "min_per_id", "min_agreement")}
    choice = choosing.choose_images(scores, args.filter, thresholds, **limits, duplicates=duplicates)
    with write_together(folder) as part, pq.ParquetFile(folder / SCORES, pre_buffer=False) as file:
        write_scores(part(SCORES), pieces_of(file), choice)
    if not choice.kept.any():
        raise ValueError(choosing.nothing_left(scores, choice, args.filter))
    return scores, choice, calibration


# The run


def main(args):
    # In a file or a pipe, lines would wait until the buffer is full.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True)
    # The precision determines the scores: accelerate's default is read here, before accelerate is imported.
    args.mixed_precision = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    args.mixed_precision = launch.precision_here(args.mixed_precision)
    # The processes join only to score, or when one draws the images of the demo.
    is_main_process = int(os.environ.get("RANK", 0)) == 0
    print_once = print if is_main_process else lambda *_: None
    accelerator, demo = open_demo(args) if args.demo else (None, None)
    if is_main_process:
        launch.introduce(args, None, demo=demo, stand_ins=stand_ins_of(args))
    if args.source is None:
        args.source = sources_named_by(args.generated)
        print_once(f"Sources, as {args.generated} names them: {' '.join(args.source)}")
    sources, generated = open_sets(args)
    wanted = wanted_models(args, sources)
    settings = settings_of(wanted, generated.digest, sources, args.holdout_fraction, args.mixed_precision, args.seed)
    scores_path = Path(args.output_dir) / SCORES
    if is_scored(scores_path.parent, settings):
        print_once(f"All {len(generated):,} images are scored: choosing from {scores_path}")
    else:
        accelerator = accelerator or launch.start_accelerator(args.mixed_precision, patient=True)
        score(args, accelerator, sources, generated, wanted, settings)
    if is_main_process:
        finish(args, sources, generated)
    if accelerator:
        accelerator.end_training()
    return 0


def stand_ins_of(args):
    if CLIP_DIR in (args.clip_model, args.backbone):
        return "Stand-in models, good for tests only, are used; --recipe diff-person has real ones"
    return None


def open_demo(args):
    """Open the images of the demo: (accelerator or None, its introduction)."""
    args.generated = DEMO_GENERATED
    if (Path(DEMO_GENERATED) / METADATA).is_file():
        return None, DEMO.format(images=f"the images in {DEMO_GENERATED}")
    from utils.generated.drawn_set import write_drawn

    args.source, args.generated = [DEMO_SOURCE], str(Path(args.output_dir) / "drawn")
    accelerator = None
    if not (Path(args.generated) / METADATA).is_file():
        accelerator = launch.start_accelerator(args.mixed_precision, patient=True)
        if accelerator.is_main_process:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            write_drawn(args.generated)
        accelerator.wait_for_everyone()
    return accelerator, DEMO.format(images="320 drawn images, of which it is known what is wrong with them")


def open_sets(args):
    """Open sources and generated images, and check all inputs before any model is loaded."""
    folder = Path(args.output_dir)
    if (folder / METADATA).is_file():
        raise ValueError(f"{folder} holds generated images; give another --output_dir")
    if (folder / "dataset").exists() and not (folder / SETTINGS).is_file():
        raise ValueError(
            f"{folder / 'dataset'} is not of this script, which would replace it; give another --output_dir"
        )
    check_generated(args.generated)
    try:
        held_out = {"holdout_fraction": args.holdout_fraction, "seed": args.seed}
        sources = open_sources(args.source, args.data_root, **held_out, skip_unreadable=args.skip_unreadable)
    except ValueError as error:
        if args.origin["source"] == "flag" or args.demo:
            raise
        raise ValueError(
            f"{error}; {args.generated} knows its sources by their last names only: give --source"
        ) from None
    thresholds_by_domain(args, sources)
    generated = open_generated(args.generated, args.data_root, list(sources))
    check_identities(generated, sources)
    if args.captioner != "none":
        check_prompts(generated)
    for name in RATES:
        if getattr(args, name) is not None:
            check_calibration(generated, sources, f"--{name}")
    if args.push_to_hub:
        launch.check_login()
    return sources, generated


def wanted_models(args, sources):
    """The models that score, from the arguments."""
    # The stand-in CLIP was trained on images of people in this shape.
    own_shape = [128, 64] if args.clip_model == CLIP_DIR else None
    training = {name: getattr(args, name) for name in TRAINED_BY}
    return Wanted(
        clip=args.clip_model,
        clip_size=args.clip_resolution or own_shape,
        sentences=[args.clip_sentence, *args.clip_others],
        reid=given(args.reid_model, sources, "--reid_model"),
        classifiers=given(args.classifier_model, sources, "--classifier_model"),
        training=Training(**training, num_workers=args.dataloader_num_workers),
        captioner=args.captioner,
    )


def finish(args, sources, generated):
    """Choose images, then write the data set and the report."""
    folder = Path(args.output_dir)
    scores_path = folder / SCORES
    scores, choice, calibration = write_choice(args, sources)
    summary = summary_of(args.filter, {name: getattr(args, name) for name in CHOICE}, sources, scores, choice)
    summary["against_truth"] = against_truth(scores_path, scores, args.filter, choice)
    command = ["accelerate", "launch", "filter_generated.py", *(str(portable(word)) for word in sys.argv[1:])]
    write_set(
        folder / "dataset",
        generated,
        scores_path,
        summary,
        kind=args.format,
        size=args.resize,
        title=args.title,
        license=args.license,
        command=shlex.join(command),
        models={name: getattr(args, name) for name in ("clip_model", "reid_model", "classifier_model")},
    )
    report = kept_report(generated, args.generated, sources, scores_path, scores, choice, calibration, summary)
    with write_together(folder) as part:
        part("args.json").write_text(to_json(run_record(args)), encoding="utf-8")
        part("summary.json").write_text(to_json(summary), encoding="utf-8")
        report.write(part("report.html"))
    if args.filter == "reid" and args.true_match_rate is not None:
        for line in cameras_missing(sources):
            print(line)
    if args.captioner == "none" and has_prompts(generated):
        print(
            "Clothes were not compared with the prompts: --captioner MODEL --min_agreement 0.6, in another "
            "--output_dir, drops images that show others"
        )
    if args.captioner != "none" and (count := choosing.without_score(scores, "attributes")):
        print(f"{count:,} images have no attribute score: no answer says anything, or the prompt names no clothes")
    if summary["against_truth"]:
        print(text_table(*truth_table(summary["against_truth"])))
    print(
        f"{summary['kept']:,} of {summary['images']:,} images of {summary['identities']:,} identities are kept: "
        f"{folder / 'dataset'}; open {folder / 'report.html'}"
    )
    if args.push_to_hub:
        print(f"Uploaded: {upload_set(folder / 'dataset', args.hub_dataset_id or folder.resolve().name)}")


def run_script(args):
    lean = f"lower --eval_batch_size {args.eval_batch_size} or --train_batch_size"
    launch.end_with(main, args, "filter_generated.py", lean=lean)


if __name__ == "__main__":
    run_script(args)
