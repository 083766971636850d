"""Published values and flags of the methods of adapt_reid.py. torch is not imported here: `--help` answers at once."""

import argparse
import sys

from utils.flags import check_optimizer
from utils.ranges import above_zero, at_least, below_one, fraction, not_negative

# The first of a setting is its default.
METHODS = {
    "unsupervised": ("cluster-contrast", "hhcl", "spcl", "pplr", "ice"),
    "adaptation": ("spcl", "idm", "cacl", "unrn", "glt", "hcd"),
}
NAMES = tuple(dict.fromkeys(name for names in METHODS.values() for name in names))
JACCARD = {"paper": None, "faiss": "faiss"}

PUBLISHED = {
    "target": ["market1501"],
    "backbone": "microsoft/resnet-50",
    "resolution": [256, 128],
    "padding": 10,
    "erasing": 0.5,
    "erasing_value": [0.485, 0.456, 0.406],
    "test_resample": "bicubic",
    "norm_group": 16,
    "jaccard": "faiss",
    "eps": 0.6,
    "min_samples": 4,
    "cluster_k1": 30,
    "cluster_k2": 6,
    "train_batch_size": 64,
    "images_per_id": 4,
    "num_train_epochs": 50,
    "steps_per_epoch": 400,
    "learning_rate": 3.5e-4,
    "lr_warmup_epochs": 0,
    "lr_milestones": [21, 41],
    "adam_weight_decay": 5e-4,
    "eval_every": 10,
    "log_every": 10,
    "checkpointing_steps": 1000,
    "dataloader_num_workers": 8,
}
LARGE_BATCH = {"train_batch_size": 256, "images_per_id": 16, "norm_group": 64, "memory_temperature": 0.05}
CLUSTERS = PUBLISHED | LARGE_BATCH | {"memory_momentum": 0.1}
SPCL = PUBLISHED | {
    "method": "spcl",
    "eps_gap": 0.02,
    "memory_temperature": 0.05,
    "memory_momentum": 0.2,
    "probability_floor": 1e-6,
}
ADAPTATION = {"setting": "adaptation", "source": ["msmt17"]}
HHCL = CLUSTERS | {"method": "hhcl", "eps": 0.45, "steps_per_epoch": 200, "num_train_epochs": 60}
HHCL |= {"lr_milestones": [21, 41], "hard_weight": 0.5, "mean_weight": 0.25}
PPLR = PUBLISHED | {
    "method": "pplr",
    "resolution": [384, 128],
    "eps": 0.4,
    "num_parts": 3,
    "agreement_neighbours": 20,
    "label_weight": 0.5,
    "smoothing_epochs": 5,
    "label_smoothing": 0.1,
    "camera_weight": 0.5,
    "hard_proxies": 50,
    "proxy_temperature": 0.07,
    "class_rows": 3000,
}
ICE = PUBLISHED | {
    "method": "ice",
    "eps": 0.55,
    "norm_group": 8,
    "train_batch_size": 32,
    "num_train_epochs": 40,
    # The authors' first epoch has a tenth of the rate, their eleventh all of it.
    "lr_warmup_epochs": 11,
    "lr_warmup_factor": 0.01,
    "lr_milestones": [],
    "erasing": 0.6,
    "blur": 0.5,
    "teacher_momentum": 0.999,
    "label_smoothing": 0.1,
    "centre_temperature": 0.5,
    "proxy_scale": "columns",
    "view_temperature": 0.1,
    "camera_weight": 0.5,
    "hard_proxies": 50,
    "proxy_temperature": 0.07,
    "consistency_weight": 10.0,
    "consistency_temperature": 0.4,
}
CACL = PUBLISHED | ADAPTATION | {"method": "cacl", "label_smoothing": 0.1}
SOURCE_FIRST = PUBLISHED | ADAPTATION
SOURCE_FIRST |= {
    "network": "sbs",
    "pooling": "gem",
    "erasing_value": [0.596, 0.558, 0.497],
    "source_epochs": 80,
    "source_steps": 200,
    "steps_per_epoch": 300,
    "lr_warmup_epochs": 10,
    "lr_warmup_factor": 0.01,
    "lr_milestones": [40, 70],
    "label_smoothing": 0.1,
    "teacher_momentum": 0.999,
    "centre_momentum": 0.2,
    "centre_weight": 1 / 18,
    "queue_size": 8192,
}
UNRN = SOURCE_FIRST | {"method": "unrn", "num_train_epochs": 280, "cluster_every": 6, "queue_weight": 0.05}
GLT = SOURCE_FIRST | {
    "method": "glt",
    "num_train_epochs": 160,
    "group_counts": [600, 700, 800],
    "rounds": 1,
    "round_epochs": 40,
    "round_milestones": [42, 72],
    "dropout": 0.2,
    "balance_power": 25.0,
    "queue_weight": 1 / 18,
}
HCD = SPCL | ADAPTATION
HCD |= {
    "method": "hcd",
    "pooling": "gem",
    "cluster_k1": 20,
    "min_samples": 3,
    "num_train_epochs": 60,
    "graph_rows": 64,
    "point_neighbours": 20,
    "part_neighbours": 30,
    "spread": 0.99,
    "least_similarity": 0.45,
    "least_score": 0.25,
    "peak_similarity": [0.4, 0.8],
    "most_peaks": 8,
}
MSMT17 = {"target": ["msmt17"]}
FROM_MARKET = MSMT17 | {"source": ["market1501"]}
RECIPES = {
    "cluster-contrast": CLUSTERS | {"method": "cluster-contrast", "pooling": "gem", "steps_per_epoch": 200},
    "hhcl": HHCL,
    "hhcl-msmt17": HHCL | MSMT17 | {"eps": 0.7, "steps_per_epoch": 300},
    "spcl": SPCL,
    "spcl-adaptation": SPCL | ADAPTATION,
    "pplr": PPLR,
    "pplr-msmt17": PPLR | MSMT17 | {"eps": 0.6, "camera_weight": 1.0},
    "ice": ICE,
    "ice-msmt17": ICE | MSMT17,
    "idm": PUBLISHED | ADAPTATION | {"method": "idm", "jaccard": "paper", "earlier_weight": 1.0},
    "cacl": CACL,
    "cacl-msmt17": CACL | FROM_MARKET,
    "unrn": UNRN,
    "unrn-msmt17": UNRN | FROM_MARKET,
    "glt": GLT,
    "glt-msmt17": GLT | FROM_MARKET,
    "hcd": HCD,
    "hcd-msmt17": HCD | FROM_MARKET | {"steps_per_epoch": 800},
}


def only(*methods):
    return lambda args: args.method not in methods, lambda args: f"--method {args.method}"


def named_method(input_args=None):
    """The method in a list of arguments, by default those of the process; None without one."""
    words = sys.argv[1:] if input_args is None else input_args
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--method", nargs="?")
    parser.add_argument("--recipe", nargs="?")
    known, _ = parser.parse_known_args(words)
    return known.method or RECIPES.get(known.recipe, {}).get("method")


class Flags:
    """Adds groups of flags of methods to a parser; with `shown`, the help lists only those of that method."""

    def __init__(self, parser, shown):
        self.parser, self.shown = parser, shown

    def group(self, *methods):
        self.hidden = self.shown in NAMES and self.shown not in methods
        title = None if self.hidden else f"{', '.join(methods[:-1])} and {methods[-1]}".removeprefix(" and ")
        self.flags = self.parser.group(title, idle=only(*methods))
        return self

    def add(self, name, *, of=(), idle=None, **options):
        """`of`: the methods of the group that have this flag, by default all; `idle`: when it has no effect."""
        hidden = self.hidden or (of and self.shown in NAMES and self.shown not in of)
        if hidden:
            options["help"] = argparse.SUPPRESS
        self.flags.add(name, idle=idle or (only(*of) if of else ()), **options)


def add_flags(parser, shown=None):
    """The flags of each method; one that several methods have stands once."""
    flags = Flags(parser, shown)
    group = flags.group("cluster-contrast", "hhcl", "spcl", "hcd")
    group.add("--memory_temperature", type=above_zero, default=0.05, help="temperature of the memory's loss")
    group.add("--memory_momentum", type=fraction, default=0.2, help="what a row of the memory keeps in an update")
    group.add(
        "--memory_update",
        choices=["momentum", "hard", "mean", "hybrid", "instances"],
        of=("cluster-contrast", "hhcl"),
        help="of cluster-contrast: a prototype is moved by each image in turn, by the one least like it, or by their "
        "mean; of hhcl: hybrid (two memories, of hard and of mean), or instances (the paper's own form); default "
        "momentum, of hhcl hybrid",
    )
    group.add("--hard_weight", type=not_negative, default=0.5, of=("hhcl",), help="of hhcl: of hard images")
    hybrid = (lambda args: args.memory_update != "hybrid", lambda args: f"--memory_update {args.memory_update}")
    words = "of hhcl's hybrid: of the means"
    group.add("--mean_weight", type=not_negative, default=0.25, of=("hhcl",), idle=hybrid, help=words)
    group.add(
        "--eps_gap",
        type=not_negative,
        default=0.02,
        of=("spcl",),
        help="of spcl: looser and tighter scale are this far from eps",
    )
    group.add(
        "--probability_floor",
        type=not_negative,
        default=0.0,
        of=("spcl", "hcd"),
        help="of spcl and hcd: added to a probability before its logarithm; 1e-6 in the authors' code",
    )

    group = flags.group("idm", "cacl", "pplr", "ice", "unrn", "glt")
    words = "of the classes; of unrn and glt in their source epochs"
    group.add("--label_smoothing", type=fraction, default=0.1, help=words)
    group = flags.group("idm")
    group.add("--margin", type=not_negative, default=0.3, help="of the triplets")
    group.add("--mix_stage", type=at_least(0), default=0, help="maps after so many stages are mixed")
    group.add("--mix_weight", type=fraction, default=0.7, help="weight of mixed against own labels")
    group.add("--bridge_weight", type=not_negative, default=0.1, help="weight of the bridge of features")
    group.add("--diversity_weight", type=not_negative, default=1.0, help="weight of ratios that differ")
    group.add(
        "--earlier_weight",
        type=not_negative,
        default=0.0,
        help="weight of the triplets with features of earlier batches (XBM); 1 in the published runs",
    )

    group = flags.group("pplr", "ice")
    group.add(
        "--camera_weight",
        type=not_negative,
        default=0.5,
        help="weight of the contrast with the cameras' proxies; with 0 no cameras are needed",
    )
    group.add("--hard_proxies", type=at_least(1), default=50, help="the most similar ones of other clusters")
    group.add("--proxy_temperature", type=above_zero, default=0.07, help="temperature of that contrast")

    group = flags.group("pplr")
    group.add("--num_parts", type=at_least(1), default=3, help="horizontal stripes of a map")
    group.add("--agreement_neighbours", type=at_least(1), default=20, help="nearest images that are compared")
    group.add("--label_weight", type=fraction, default=0.5, help="weight of pseudo label against parts' predictions")
    group.add("--smoothing_epochs", type=at_least(0), default=1, help="epochs before agreement smooths parts' labels")
    group.add(
        "--class_rows", type=at_least(2), default=3000, help="rows of the classifiers: the largest number of clusters"
    )

    group = flags.group("ice", "unrn", "glt")
    group.add("--teacher_momentum", type=fraction, default=0.99, help="what the teacher keeps in a step")

    group = flags.group("ice")
    group.add(
        "--proxy_scale",
        choices=["unit", "columns"],
        default="unit",
        help="length of cameras' proxies; columns: that of a column of their matrix, as in the authors' code",
    )
    group.add("--centre_temperature", type=above_zero, default=0.5, help="temperature of the clusters' centres")
    group.add("--view_temperature", type=above_zero, default=0.1, help="temperature between two views")
    group.add("--consistency_weight", type=not_negative, default=10.0, help="weight of equal likenesses in two views")
    group.add("--consistency_temperature", type=above_zero, default=0.4, help="temperature of these likenesses")

    group = flags.group("cacl")
    group.add("--stages", type=at_least(0), default=0, help="stages in which cameras are added; default one a camera")

    group = flags.group("unrn", "glt")
    group.add(
        "--source_epochs",
        type=at_least(0),
        default=1,
        help="the first ones of --num_train_epochs, which train on the source alone; 0 for a --backbone that has been "
        "trained on it. The rate's flags are of these epochs, counted from 0; after them the rate is --learning_rate",
    )
    group.add("--source_steps", type=at_least(1), help="steps of each of them; default --steps_per_epoch")
    group.add(
        "--cluster_every",
        type=at_least(1),
        default=2,
        of=("unrn",),
        help="of unrn: epochs between clusterings; the queue is used from the second epoch of a clustering on",
    )
    group.add("--centre_weight", type=not_negative, default=1 / 18, help="weight of the contrast with source centres")
    group.add("--centre_momentum", type=fraction, default=0.2, help="what a centre keeps when an image moves it")
    group.add("--queue_weight", type=not_negative, default=0.05, help="weight of the contrast with the queue")
    group.add("--queue_size", type=at_least(1), default=512, help="images of earlier batches in the queue")

    group = flags.group("glt")
    words = "numbers of groups of k-means; the middle one in this list makes batches and triplets"
    group.add("--group_counts", type=at_least(2), nargs="+", default=[8, 12, 16], help=words)
    words = "how often the target's training starts again from the source's model, with the groups found so far"
    group.add("--rounds", type=at_least(1), default=1, help=words)
    group.add(
        "--round_epochs", type=at_least(1), default=2, help="epochs of each round but the last, which has the rest"
    )
    group.add(
        "--round_milestones", type=at_least(1), nargs="*", default=[], help="epochs of a round when the rate drops"
    )
    group.add(
        "--dropout", type=below_one, default=0.2, help="share of the features' numbers that classifiers do not see"
    )
    group.add("--balance_power", type=above_zero, default=25.0, help="power of probabilities before they are balanced")

    group = flags.group("hcd")
    group.add("--graph_rows", type=at_least(2), default=16, help="nearest rows of the memory around a moved image")
    group.add("--point_neighbours", type=at_least(2), default=6, help="mutual neighbours in the graph of images")
    group.add("--part_neighbours", type=at_least(2), default=8, help="the same of clusters and of parts")
    group.add("--spread", type=below_one, default=0.5, help="share of a label that spreads on to neighbours")
    group.add("--least_similarity", type=fraction, default=0.75, help="cosine above which images are neighbours")
    group.add("--least_score", type=not_negative, default=0.15, help="score above which an image or cluster is joined")
    words = (
        "an image or part is a peak if its cosine to the nearest denser one lies between; there its cluster is split"
    )
    group.add("--peak_similarity", type=fraction, nargs=2, default=[0.4, 0.8], help=words)
    group.add("--most_peaks", type=at_least(2), default=8, help="largest number of parts of a split")


def check_stages(parser, args):
    """Whether an epoch is left for the target."""
    if args.method not in ("unrn", "glt"):
        return
    before, words = args.source_epochs, f"--source_epochs {args.source_epochs}"
    if args.method == "glt":
        before += args.round_epochs * (args.rounds - 1)
        words += f" and {args.rounds - 1} rounds of --round_epochs {args.round_epochs}"
    if before >= args.num_train_epochs:
        parser.error(f"{words} are all of --num_train_epochs {args.num_train_epochs}: give more than {before}")


def check_reid_training(parser, args):
    """What is wrong in any training whose losses look at whole batches."""
    check_optimizer(parser, args)
    if args.gradient_accumulation_steps != 1:
        parser.error(
            f"--gradient_accumulation_steps {args.gradient_accumulation_steps} cannot be: BatchNorm, triplets and "
            "memory look at a whole batch at once; for less memory use --gradient_checkpointing, --mixed_precision or "
            "more processes"
        )
