"""Published values and flags of the methods of adapt_reid.py. torch is not imported here: `--help` answers at once."""

from utils.flags import above_zero, at_least, fraction, not_negative

# The first of a setting is its default.
METHODS = {"unsupervised": ("cluster-contrast", "spcl"), "adaptation": ("spcl", "idm")}
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
RECIPES = {
    "cluster-contrast": CLUSTERS | {"method": "cluster-contrast", "pooling": "gem", "steps_per_epoch": 200},
    "spcl": SPCL,
    "spcl-adaptation": SPCL | ADAPTATION,
    "idm": PUBLISHED | ADAPTATION | {"method": "idm", "jaccard": "paper", "earlier_weight": 1.0},
}


def only(*methods):
    return lambda args: args.method not in methods, lambda args: f"--method {args.method}"


def add_flags(parser):
    """The flags of each method; one that another method has too stands in the group of the first."""
    memory = ("cluster-contrast", "spcl")
    group = parser.group("cluster-contrast and spcl", idle=only(*memory))
    group.add("--memory_temperature", type=above_zero, default=0.05, help="temperature of the memory's loss")
    group.add("--memory_momentum", type=fraction, default=0.2, help="what a row of the memory keeps in an update")
    group.add(
        "--memory_update",
        choices=["momentum", "hard", "mean"],
        default="momentum",
        idle=only("cluster-contrast"),
        help="of cluster-contrast: a prototype is moved by each image in turn, by the one least like it, or by their "
        "mean",
    )
    group.add(
        "--eps_gap",
        type=not_negative,
        default=0.02,
        idle=only("spcl"),
        help="of spcl: looser and tighter scale are this far from eps",
    )
    group.add(
        "--probability_floor",
        type=not_negative,
        default=0.0,
        idle=only("spcl"),
        help="of spcl: added to a probability before its logarithm; 1e-6 in the authors' code",
    )

    group = parser.group("idm", idle=only("idm"))
    group.add("--label_smoothing", type=fraction, default=0.1, help="of the classes")
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
