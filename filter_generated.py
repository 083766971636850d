"""Which generated images may stay: three filters score every image, one of them chooses, and a data set comes out.

    accelerate launch --config_file accelerate_config.yaml filter_generated.py
    accelerate launch filter_generated.py --recipe diff-person --source market1501 --data_root ~/reid --generated out

The first is a demo on drawn people with the shipped stand-in models; the second filters what
`train_dreambooth_reid.py` left in `out`, with real models. For an image x that is to show the identity y:

    CLIP        P("a photo of a person" | x) against other sentences, zero-shot
    CCTF        P(y | x) by an image classifier trained on the source images
    Re-ID CTF   mean of the 3 highest cosines of f(x) with the source images of y, f a Re-ID model of that source;
                and the nearest of all source images must show y

All scores go to scores.parquet. The same command with another --filter, --threshold, --keep_fraction,
--false_match_rate, --target_per_id or --near_duplicates chooses again from there, in seconds and without a model.
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
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPProcessor

from kernels import cosine_topk
from utils import filtering, tiny
from utils.drawn_generated import World, write_drawn
from utils.filter_models import check_models, given, left_out, settings_of
from utils.filter_page import build_page, truth_table
from utils.filter_scoring import FEATURES, PIECES, SCORES, Preparation, batches_ahead, score_pieces, transform_of
from utils.filter_sources import check_identities, check_sources, open_sources
from utils.filter_training import train_model
from utils.filtered_set import pieces_of, summary_of, write_scores, write_set
from utils.generated_images import METADATA, SCORED, open_generated
from utils.generated_set import portable
from utils.modeling import ReIDModel
from utils.reporting import run_record, to_json, write_together
from utils.targets import extract
from utils.training import check_ranges, describe_origin, end_with, parse_with_recipes, use_all_cores
from utils.training_page import text_table
from utils.worklist import differences

DEMO_SOURCE, DEMO_GENERATED = "synthetic:domain=a,num_ids=32,images_per_id=12", "output/generated"
OTHER_SENTENCES = ("a photo of a dog", "a photo of a car", "an empty street", "a picture of nothing")
RECIPES = {
    "diff-person": {
        "clip_model": "openai/clip-vit-large-patch14",
        "backbone": "openai/clip-vit-base-patch16",
        "resolution": [256, 128],
        "train_batch_size": 64,
        "num_train_epochs": 60,
        "learning_rate": 5e-6,
        "dataloader_num_workers": 8,
        "eval_batch_size": 128,
    }
}
BEST = 3
MAX_CALIBRATION_QUERIES = 2000
SETTINGS, CALIBRATION = "scoring.json", "calibration.safetensors"


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
        "--clip_model", default=tiny.CLIP_DIR, help="folder or Hub id, or none; default: the stand-in CLIP"
    )
    group.add_argument("--clip_sentence", default="a photo of a person", help="what CLIP should see in an image")
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
    group.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], help="default accelerate's setting")

    group = parser.add_argument_group("training of the models that are not given")
    group.add_argument("--backbone", default=tiny.CLIP_DIR, help="to start from; default: the stand-in CLIP")
    group.add_argument(
        "--resolution",
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        default=[128, 64],
        help="input in pixels; default 128 64",
    )
    group.add_argument("--num_train_epochs", type=int, default=10, help="default 10")
    group.add_argument("--train_batch_size", type=int, default=32, help="images a step; default 32")
    group.add_argument("--images_per_id", type=int, default=4, help="of each identity in a step; default 4")
    group.add_argument("--learning_rate", type=float, default=1e-4, help="default 1e-4, for the stand-ins")
    group.add_argument(
        "--holdout_fraction",
        type=float,
        default=0.2,
        help="share of each identity's source images that the Re-ID models never see: the threshold is calibrated on "
        "them; default 0.2",
    )

    group = parser.add_argument_group("choice")
    group.add_argument("--filter", choices=filtering.FILTERS, default="reid", help="which one chooses; default reid")
    group.add_argument(
        "--threshold", nargs="+", metavar="VALUE", help="least score that is kept: 0.6, or DOMAIN=0.6 for each source"
    )
    group.add_argument(
        "--keep_fraction", nargs="+", metavar="VALUE", help="the best share of each source: 0.7, or DOMAIN=0.7 ..."
    )
    group.add_argument(
        "--false_match_rate",
        type=float,
        help="threshold that this share of source images of other people reaches; default 0.01 for --filter reid "
        "where nothing else is asked for",
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
        "--format", choices=["parquet", "folder"], default="parquet", help="of dataset/: images inside, or as files"
    )
    group.add_argument(
        "--resize", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="of the images kept; default: as they are"
    )
    group.add_argument("--title", default="Filtered generated people", help="of the data card")
    group.add_argument("--license", default="other", help="of the data card; default other: the sources' terms hold")
    group.add_argument("--push_to_hub", **yes, help="upload dataset/, to a private repository where it is new")
    group.add_argument("--hub_dataset_id", help="repository; default: the name of --output_dir")

    group = parser.add_argument_group("running")
    group.add_argument("--eval_batch_size", type=int, default=64, help="images a process; default 64")
    group.add_argument("--dataloader_num_workers", type=int, default=2, help="threads that read images; default 2")
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
            "num_train_epochs", "train_batch_size", "images_per_id", "target_per_id", "min_per_id", "eval_batch_size",
        ],
        positive=["learning_rate"],
        not_negative=["dataloader_num_workers", "seed", "duplicate_distance"],
        fractions=["false_match_rate", "holdout_fraction"],
    )  # fmt: skip
    if args.generated is None and args.source is not None:
        parser.error("--source is given without --generated; give the folder of the generated images")
    if args.train_batch_size % args.images_per_id:
        parser.error(f"--train_batch_size {args.train_batch_size} is no multiple of --images_per_id")
    if min(args.resolution + (args.resize or [8])) < 8:
        parser.error("--resolution and --resize must be at least 8 pixels")
    if args.holdout_fraction >= 1:
        parser.error("--holdout_fraction must be below 1: something must be left to train on")
    ways = [name for name in ("threshold", "keep_fraction", "false_match_rate") if getattr(args, name) is not None]
    if len(ways) > 1:
        parser.error(f"--{ways[0]} and --{ways[1]} both set the threshold; give one")
    if args.false_match_rate is not None and args.filter != "reid":
        parser.error(f"--false_match_rate is calibrated for --filter reid, not {args.filter}; give --threshold")
    if not ways and args.target_per_id is None:
        if args.filter != "reid":
            parser.error(f"--filter {args.filter} needs --threshold, --keep_fraction or --target_per_id")
        args.false_match_rate = 0.01
    for name in ("threshold", "keep_fraction"):
        setattr(args, name, numbers_of(parser, name, getattr(args, name)))
    if args.keep_fraction and not all(0 < value <= 1 for value in args.keep_fraction.values()):
        parser.error("--keep_fraction must be above 0 and at most 1")
    excluded = [name for name in ("clip", "cctf") if left_out(args, name)]
    if args.filter in excluded:
        parser.error(f"--filter {args.filter} cannot choose without its model")
    return args


def numbers_of(parser, name, words):
    """{domain or None for all: number} of `0.6` or `market1501=0.6 msmt17=0.5`."""
    if words is None:
        return None
    found = {}
    for word in words:
        domain, equals, text = word.rpartition("=")
        try:
            number = float(text)
        except ValueError:
            number = float("nan")
        if not np.isfinite(number) or bool(domain) != bool(equals) or domain in found:
            parser.error(f"--{name} {word!r} is not as expected: a number, or DOMAIN=NUMBER for each source")
        found[domain or None] = number
    if None in found and len(found) > 1:
        parser.error(f"--{name} has a number for all sources and others for single ones; give one kind")
    return found


# The method


def clip_scores(clip, sentences, images):
    """Probability of the first of the sentences (S, D), unit length, by CLIP's own temperature: (B,)."""
    features = F.normalize(as_features(clip.get_image_features(pixel_values=images)).float(), dim=1)
    return (clip.logit_scale.float().exp() * features @ sentences.T).softmax(1)[:, 0]


def cctf_scores(classifier, images, labels):
    """Probability of each image's identity: (B,)."""
    _, logits = classifier.neck(classifier.backbone(images))
    return logits.float().softmax(1).gather(1, labels[:, None])[:, 0]


def reid_scores(features, labels, gallery, gallery_labels):
    """Mean of the best cosines with the identity's source images; the nearest image of all; whether it is its own."""
    nearest = cosine_topk(features, gallery, 1).indices[:, 0]
    scores = torch.empty(len(features), device=features.device)
    for label in labels.unique():
        rows, own = labels == label, gallery[gallery_labels == label]
        scores[rows] = cosine_topk(features[rows], own, min(BEST, len(own))).scores.mean(1)
    return scores, nearest, gallery_labels[nearest] == labels


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


# Sources and models


@dataclass
class Models:
    """What scores the images of one source."""

    reid: ReIDModel
    classifier: ReIDModel | None
    gallery: torch.Tensor
    labels: torch.Tensor
    label_of: dict
    paths: list


@dataclass
class Run:
    """What the functions below share."""

    args: argparse.Namespace
    accelerator: Accelerator
    sources: dict
    generated: object
    settings: dict

    @property
    def folder(self):
        return Path(self.args.output_dir)


# Scoring


def score_piece(run, models, clip_parts, table, readers):
    """Columns of `SCORED` for the rows of a table, and the Re-ID features (rows, D) in float16."""
    args, device = run.args, run.accelerator.device
    columns = {name: [None] * len(table) for name in SCORED.names}
    features = np.zeros((len(table), max(its.reid.num_features for its in models.values())), np.float16)
    domains, pids = table["domain"].to_pylist(), table["pid"].to_pylist()
    for domain in sorted(set(domains)):
        its = models[domain]
        prepare = Preparation(readers, {"reid": its.reid, "cctf": its.classifier}, clip_parts[1])
        rows = [row for row, one in enumerate(domains) if one == domain]
        for batch in batches_ahead(
            prepare, rows, batch_size=args.eval_batch_size, num_threads=args.dataloader_num_workers
        ):
            for row, inputs, found in batch:
                columns["perceptual_hash" if inputs else "error"][row] = found
            batch = [one for one in batch if one[1]]
            if not batch:
                continue
            rows = [row for row, _, _ in batch]
            labels = torch.tensor([its.label_of[pids[row]] for row in rows], device=device)
            found, vectors = score_batch(run, its, clip_parts, [inputs for _, inputs, _ in batch], labels)
            bad = ~np.isfinite(vectors).all(1)
            if bad.any():
                path = table["path"][rows[int(bad.argmax())]].as_py()
                raise ValueError(f"the features of {path} are not finite; run without --mixed_precision")
            features[rows, : vectors.shape[1]] = vectors
            for name, values in found.items():
                for row, value in zip(rows, values, strict=True):
                    columns[name][row] = value
    return columns, features


@torch.inference_mode()
def score_batch(run, its, clip_parts, inputs, labels):
    """{column: values} and features of one batch, filled up to the usual size: then any run rounds alike."""
    device, count = run.accelerator.device, len(inputs)
    clip, _, sentences = clip_parts
    inputs = inputs + inputs[-1:] * (run.args.eval_batch_size - count)
    stacked = {name: torch.stack([one[name] for one in inputs]).to(device) for name in inputs[0]}
    columns = {}
    with run.accelerator.autocast():
        features = its.reid(stacked["reid"])[:count].float()
        if clip is not None:
            columns["clip_score"] = clip_scores(clip, sentences, stacked["clip"])[:count].tolist()
        if its.classifier is not None:
            filled = torch.cat([labels, labels[-1:].expand(len(inputs) - count)])
            columns["cctf_score"] = cctf_scores(its.classifier, stacked["cctf"], filled)[:count].tolist()
    scores, nearest, match = reid_scores(features, labels, its.gallery, its.labels)
    columns |= {"reid_score": scores.tolist(), "reid_match": match.tolist()}
    columns["nearest"] = [its.paths[row] for row in nearest.tolist()]
    return columns, features.cpu().numpy()


def load_clip(args, accelerator):
    """CLIP, its processor, and the unit-length features of the sentences."""
    if args.clip_model == "none":
        return None, None, None
    clip = CLIPModel.from_pretrained(args.clip_model).to(accelerator.device).eval()
    processor = CLIPProcessor.from_pretrained(args.clip_model)
    sentences = [args.clip_sentence, *args.clip_others]
    tokens = processor.tokenizer(sentences, padding=True, truncation=True, return_tensors="pt").to(accelerator.device)
    with torch.inference_mode():
        features = F.normalize(as_features(clip.get_text_features(**tokens)).float(), dim=1)
    return clip, processor.image_processor, features


def as_features(output):
    """A tensor in older versions of transformers, an output object in newer ones."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output


def load_models(run):
    """{domain: Models}; those that are not given are trained, each by one process, and kept in models/."""
    args, accelerator = run.args, run.accelerator
    kinds = {"reid": given(args.reid_model, run.sources, "--reid_model")}
    if not left_out(args, "cctf"):
        kinds["classifier"] = given(args.classifier_model, run.sources, "--classifier_model")
    places = {kind: names or {} for kind, names in kinds.items()}
    wanted = [(kind, domain) for kind, names in kinds.items() if names is None for domain in run.sources]
    for kind, domain in wanted:
        places[kind][domain] = run.folder / "models" / f"{kind}-{domain}"
    for kind, domain in wanted[accelerator.process_index :: accelerator.num_processes]:
        if not (places[kind][domain] / "model.safetensors").is_file():
            quiet = not accelerator.is_main_process
            model = train_model(kind, run.sources[domain], args, accelerator.device, quiet)
            model.save_pretrained(places[kind][domain])
    accelerator.wait_for_everyone()
    models, calibration = {}, {}
    for domain, source in run.sources.items():
        reid = ReIDModel.from_pretrained(places["reid"][domain], num_ids=0).to(accelerator.device)
        classifier = None
        if "classifier" in places:
            classifier = ReIDModel.from_pretrained(places["classifier"][domain]).to(accelerator.device)
        gallery = extract(
            reid,
            source.train,
            transform_of(reid),
            accelerator=accelerator,
            batch_size=args.eval_batch_size,
            desc=f"features of {domain}",
        ).to(accelerator.device)
        labels = source.labels.to(accelerator.device)
        label_of = {pid: label for label, pid in enumerate(source.pids)}
        models[domain] = Models(reid, classifier, gallery, labels, label_of, source.train["path"][:])
        calibration |= calibrate(source, gallery, labels, args.seed)
    if accelerator.is_main_process:
        with write_together(run.folder) as aside:
            save_file(calibration, aside(CALIBRATION))
    return models


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
    """The flags' numbers for each source, as `filtering.thresholds_of` takes them."""
    wanted = {
        name: filtering.numbers_by_domain(getattr(args, name), list(sources), f"--{name}")
        for name in ("threshold", "keep_fraction")
    }
    return wanted | {"false_match_rate": args.false_match_rate}


def choose(run):
    """What is kept; written into scores.parquet, even where nothing is."""
    args, folder = run.args, run.folder
    scores = filtering.read_scores(folder / SCORES)
    stored = {name: tensor.numpy() for name, tensor in load_file(folder / CALIBRATION).items()}
    calibration = {
        domain: {kind: stored[f"{domain}/{kind}"] for kind in ("genuine", "impostor")} for domain in run.sources
    }
    few = [domain for domain in scores.domains if not len(calibration[domain]["impostor"])]
    if few and args.false_match_rate is not None:
        raise ValueError(
            f"no source images of {', '.join(few)} are held out, so --false_match_rate cannot be calibrated; give "
            "--threshold, or a --holdout_fraction above 0 with three images an identity"
        )
    thresholds = filtering.thresholds_of(
        scores, args.filter, **wanted_thresholds(args, run.sources), calibration=calibration
    )
    features = np.load(folder / FEATURES, mmap_mode="r")
    duplicates = filtering.duplicate_finder(scores, args.near_duplicates, args.duplicate_distance, features)
    limits = {"target_per_id": args.target_per_id, "min_per_id": args.min_per_id}
    choice = filtering.choose(scores, args.filter, thresholds, **limits, duplicates=duplicates)
    with write_together(folder) as aside, pq.ParquetFile(folder / SCORES, pre_buffer=False) as file:
        write_scores(aside(SCORES), pieces_of(file), choice)
    if not choice.kept.any():
        raise ValueError(filtering.nothing_left(scores, choice, args.filter))
    return scores, choice, calibration


# The run


def main(args):
    accelerator = Accelerator(
        # Without it, accelerate takes several processes of torchrun on a machine without a GPU for single ones.
        cpu=not torch.accelerator.is_available(),
        mixed_precision=args.mixed_precision,
        # One process may train for a day while the others wait for it.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=365))],
    )
    args.mixed_precision = accelerator.mixed_precision
    if accelerator.device.type == "cpu":
        use_all_cores(accelerator.num_processes)
    fill_in(args, accelerator)
    run = open_run(args, accelerator)
    if is_scored(run):
        accelerator.print(f"All {len(run.generated):,} images are scored: choosing from {run.folder / SCORES}")
    else:
        score(run)
    if accelerator.is_main_process:
        finish(run)
    accelerator.end_training()
    return 0


def score(run):
    """scores.parquet, features.npy and the calibration, from wherever an earlier run was stopped."""
    if not run.args.skip_unreadable:
        check_sources(run.sources)
    check_models(run.args, run.sources)
    if run.accelerator.is_main_process:
        with write_together(run.folder) as aside:
            aside(SETTINGS).write_text(to_json(run.settings), encoding="utf-8")
    run.accelerator.wait_for_everyone()
    models, clip_parts = load_models(run), load_clip(run.args, run.accelerator)

    def work(table, readers):
        return score_piece(run, models, clip_parts, table, readers)

    score_pieces(run.folder, run.generated, work, accelerator=run.accelerator)


def fill_in(args, accelerator):
    """What the demo filters, and the sources that a generated folder names."""
    say = accelerator.print
    if args.demo:
        args.generated = DEMO_GENERATED
        drawn = not (Path(DEMO_GENERATED) / METADATA).is_file()
        words = f"the images in {DEMO_GENERATED}"
        if drawn:
            args.source, args.generated = [DEMO_SOURCE], str(Path(args.output_dir) / "drawn")
            words = "320 drawn images, of which it is known what is wrong with them"
            if accelerator.is_main_process:
                Path(args.output_dir).mkdir(parents=True, exist_ok=True)
                write_drawn(args.generated, World())
        say(
            f"Demo: {words}, the shipped stand-in models, about two minutes on two cores. For your own: --generated "
            "DIR --source SPEC --data_root DIR, and --recipe diff-person for real models"
        )
        accelerator.wait_for_everyone()
    elif tiny.CLIP_DIR in (args.clip_model, args.backbone):
        say("Stand-in models, good for tests only, are used; --recipe diff-person has real ones")
    if args.source is None:
        try:
            args.source = json.loads((Path(args.generated) / "args.json").read_text())["arguments"]["source"]
        except (OSError, ValueError, KeyError, TypeError):
            raise ValueError(f"{args.generated} does not say what it was made from; give --source") from None
        say(f"Sources, as {args.generated} names them: {' '.join(args.source)}")
    for line in describe_origin(args, args.origin):
        say(line)


def open_run(args, accelerator):
    """Data and settings: all that can be wrong shows here, before a model is loaded."""
    sources = open_sources(
        args.source,
        args.data_root,
        holdout_fraction=args.holdout_fraction,
        seed=args.seed,
        skip_unreadable=args.skip_unreadable,
    )
    wanted_thresholds(args, sources)
    generated = open_generated(args.generated, args.data_root, list(sources))
    check_identities(generated, sources)
    if args.push_to_hub:
        try:
            HfApi().whoami()
        except Exception as error:
            raise ValueError(f"--push_to_hub needs a login that works: {error}; run `hf auth login`") from None
    return Run(args, accelerator, sources, generated, settings_of(args, generated, sources))


def is_scored(run):
    """Whether scores.parquet is that of these images and models; ValueError where it is another's."""
    try:
        before = json.loads((run.folder / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = None
    scored = (run.folder / SCORES).is_file()
    begun = scored or any((run.folder / PIECES).glob("*.parquet")) or (run.folder / "models").is_dir()
    if begun and before != run.settings:
        changed = "; ".join(differences(before or {}, run.settings))
        raise ValueError(
            f"{run.folder} holds scores of other models or images: {changed}. Give the same, or another --output_dir"
        )
    return scored


def finish(run):
    """The choice, the set, the page."""
    args, folder = run.args, run.folder
    scores, choice, calibration = choose(run)
    summary = summary_of(args, run.generated, run.sources, scores, choice, calibration)
    command = shlex.join(["filter_generated.py", *(str(portable(word)) for word in sys.argv[1:])])
    write_set(folder / "dataset", run.generated, folder / SCORES, summary, args, command)
    page = build_page(run, folder / SCORES, scores, choice, calibration, summary)
    with write_together(folder) as aside:
        aside("args.json").write_text(to_json(run_record(args)), encoding="utf-8")
        aside("summary.json").write_text(to_json(summary), encoding="utf-8")
        page.write(aside("report.html"))
    truth = truth_table(folder / SCORES, scores, choice, args.filter)
    if truth:
        print(text_table(*truth))
    print(
        f"{summary['kept']:,} of {summary['images']:,} images of {summary['identities']:,} identities are kept: "
        f"{folder / 'dataset'}; open {folder / 'report.html'}"
    )
    if args.push_to_hub:
        api, name = HfApi(), args.hub_dataset_id or folder.resolve().name
        name = api.create_repo(name, repo_type="dataset", private=True, exist_ok=True).repo_id
        print(f"Uploaded: {api.upload_folder(repo_id=name, repo_type='dataset', folder_path=folder / 'dataset')}")


if __name__ == "__main__":
    arguments = parse_args()
    end_with(
        main,
        arguments,
        os.path.basename(__file__),
        lean=f"lower --eval_batch_size {arguments.eval_batch_size} or --train_batch_size",
    )
