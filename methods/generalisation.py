"""Flags and published values of the methods for unseen domains, MetaBIN and META; imports nothing large.

`finetune_reid.py` reads them before torch is imported.
"""

import math

from utils.flags import RESNET_DIR
from utils.ranges import above_zero, at_least, fraction

METABIN, META = "metabin", "meta"
# Factors on the learning rate that rise by steps and fall by epochs.
EPOCH_COSINE = "epoch_cosine"
# The comparison of several papers: all images of four sets to train on, means of ten splits of four small ones.
PROTOCOL_2 = {
    "setting": "generalisation",
    "source": [f"{name}:all_for_training=true" for name in ("market1501", "cuhk02", "cuhk03np", "cuhksysu")],
    "target": ["prid", "grid", "viper", "ilids"],
    # One image of an identity is drawn several times.
    "single_image_ids": "repeat",
}
# Both need BatchNorm, which the other stand-in, a CLIP, has not.
DEMO = {"setting": "generalisation", "backbone": RESNET_DIR}
PUBLISHED = {
    METABIN: PROTOCOL_2
    | {
        "erasing": 0.0,
        "train_batch_size": 80,
        "num_train_epochs": 100,
        "optimizer": "sgd",
        "learning_rate": 0.01,
        "meta_first_order": True,
        "test_resample": "bicubic",
    },
    META: PROTOCOL_2
    | {
        "erasing": 0.0,
        "auto_augment": 0.1,
        "colour_jitter": 0.5,
        "optimizer": "sgd",
        "nesterov": True,
        "learning_rate": 0.04,
        "lr_scheduler": EPOCH_COSINE,
        "lr_warmup_steps": 500,
        "lr_warmup_factor": 0.1,
        "lr_final_factor": 1e-3,
        "freeze_steps": 500,
        "test_resample": "bicubic",
    },
}


def add_flags(parser):
    group = parser.group("meta", idle=only(META))
    group.add(
        "--meta_gate",
        choices=["learned", "code"],
        default="learned",
        help="what weighs the experts in a test: the learned gates, as corrected, or what the authors' code does",
    )
    group.add("--auto_augment", type=fraction, default=0.0, help="share of the images that AutoAugment changes")
    group.add("--colour_jitter", type=fraction, default=0.0, help="share with another brightness and contrast")

    group = parser.group("metabin", idle=only(METABIN))
    group.add("--meta_rate", type=above_zero, default=0.1, help="rate of the mixtures of norms")
    group.add(
        "--meta_inner_rates",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        default=[0.001, 0.1],
        help="the rate of the inner step is --meta_rate times a factor that goes up and down between these",
    )
    group.add("--meta_period", type=above_zero, default=5.0, help="epochs in which it does so once")
    group.add("--meta_first_steps", type=at_least(1), default=10, help="steps of the weights before the first of rho")
    group.switch("--meta_first_order", "without second derivatives, as the authors' code: less work")


def only(method):
    return lambda args: args.method != method, lambda args: f"--method {args.method}"


def check_start(method, name, family, *, owner=None):
    """ValueError if the method cannot train a backbone, `name`, of this family, or under `owner`, of its weights."""
    if method == META and family != "resnet":
        raise ValueError(
            f"--backbone {name} is a {family}; --method {META} gives a plain ResNet norms of each domain: "
            "give a ResNet, such as backbone/ of pretrain_backbone.py --backbone resnet50"
        )
    if method == METABIN and not family.startswith(("resnet", "osnet")):
        raise ValueError(
            f"--backbone {name} is a {family}: it has no BatchNorm, which --method {METABIN} mixes with "
            "InstanceNorm; give a ResNet, such as backbone/ of pretrain_backbone.py --backbone resnet50"
        )
    if method in PUBLISHED and owner:
        raise ValueError(f"--method {method} changes norms, which {owner} does not see; start it without {owner}")


def check_args(parser, args):
    """What the arguments alone show to be wrong."""
    if args.recipe in PUBLISHED and args.method != args.recipe:
        parser.error(f"--recipe {args.recipe} is of --method {args.recipe}, not of {args.method}; give one of the two")
    if args.method in PUBLISHED and args.setting != "generalisation":
        parser.error(f"--method {args.method} learns from several domains: it belongs to --setting generalisation")
    if args.method == META and args.triplet != "hard":
        parser.error(f"--triplet {args.triplet} does not work with --method {META}, whose triplets are hard")
    if args.method == META and args.centre_weight:
        parser.error(f"--centre_weight {args.centre_weight} does not work with --method {META}, which has no centres")
    low, high = args.meta_inner_rates
    if not 0 <= low <= high < math.inf:
        parser.error(f"--meta_inner_rates must be 0 or more, the lower one first, got {low} {high}")
