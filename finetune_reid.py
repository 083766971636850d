"""Fine-tune a Re-ID model with labels, by one of five methods, from any start: where does a better start show?

    accelerate launch --config_file accelerate_config.yaml finetune_reid.py
    accelerate launch finetune_reid.py --method agw --recipe published --setting few-shot --fraction 0.1 \\
        --backbone output/pretrain/backbone --source market1501 --data_root ~/reid --output_dir output/agw-10

The first is a demo on drawn people with the shipped stand-in CLIP, about two minutes on two CPU cores; the second
starts from a backbone of `pretrain_backbone.py`, with the values AGW was published with. What a method makes of the
backbone's map, and its losses:

    bot  mean, BNNeck                                         classes, smoothed; hard triplets, margin 0.3; centres
    agw  non-local blocks, GeM, BNNeck                        classes, smoothed; weighted triplets; centres
    sbs  non-local blocks, GeM, BNNeck                        circle loss of classes, smoothed; soft hard triplets of
                                                              what comes after BNNeck
    mgn  3 branches, whole + 2 + 3 stripes, each to 256       8 x classes; 3 x hard triplets (whole), margin 1.2
    bdb  mean to 512; without a rectangle, maximum to 1024    2 x classes, smoothed; 2 x soft hard triplets

With `--setting generalisation` several sources are trained on and others measured, VIPeR, GRID, PRID and iLIDS on the
means of ten splits; beside these methods there is then

    metabin  mean, BNNeck; a ResNet's norms are mixtures     as bot, without centres; after each step the mixtures
             of batch and instance norm                      follow what helps held-out sources, see methods/metabin.py

In a ResNet the last stage keeps its resolution (stride 1), but for MGN's global branch. Swin and CLIP compare all
places in every block, so AGW and SBS add no non-local blocks to them, and MGN's branches share their one map of
tokens, of which they pool the stripes. CLIP's class token stands in for GeM, BDB's mean and MGN's global branch;
Swin's maps have signs, so GeM takes their positive and negative parts apart. A reduction is never wider than the
backbone. Left out: SBS's AutoAugment, MGN's mirrored images at test time, MetaBIN's colour jitter.
"""

import argparse
import math
import random
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import datasets
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from torch import nn
from transformers import PreTrainedConfig

from methods.metabin import MetaBatches, domains_held_in, inner_rate, meta_step
from utils.batches.samplers import IdentitySampler, RemainingBatches
from utils.datasets.load import labels_of, subset
from utils.datasets.training_sets import digest_of, open_source
from utils.evaluation.targets import open_targets, results
from utils.files import write_together
from utils.flags import CLIP_DIR, OPTIMIZERS, SCHEDULES, SINGLE_IMAGE_IDS, check_ranges, parse_with_recipes
from utils.launch import EXIT_SIGTERM, end_with, gather_with_gradient, start_accelerator
from utils.modeling.backbones import read_config
from utils.modeling.folder import model_kind
from utils.modeling.heads import METHODS as HEADS
from utils.modeling.losses import CentreLoss, circle_logits, hard_triplet, weighted_triplet
from utils.modeling.norms import add_batch_instance_norms, share_batch_statistics
from utils.modeling.reid_model import ReIDModel
from utils.training.checkpoints import load_checkpoint, open_state
from utils.training.loop import name_images, train_epochs
from utils.training.reid import (
    FREE_ON_RESUME,
    build_loader,
    check_training,
    introduce,
    measure,
    optimizer_of,
    rates_of,
    save_model,
    say_goodbye,
    trained,
    write_arguments,
)
from utils.training.report import training_report

DEMO_SOURCE = "synthetic:domain=a,num_ids=64"
DEMO_SOURCES = [f"synthetic:domain={name},num_ids=24" for name in "abc"]
DEMO_TARGETS = ["synthetic:domain=d,num_ids=16", "synthetic:domain=e,num_ids=16"]
SETTINGS = ("supervised", "few-shot", "small-scale", "generalisation")
PARTS = ("few-shot", "small-scale")
METABIN = "metabin"
METHODS = (*HEADS, METABIN)
DELAYED_COSINE = "delayed_cosine"
SOFT = "soft"
# What a method's losses are made of; MGN takes the mean over its groups, BDB the sum, as their authors do.
LOSSES = {
    "bot": {"triplet": "hard", "margin": 0.3, "label_smoothing": 0.1, "groups": "sum", "centre_weight": 5e-4},
    "agw": {"triplet": "weighted", "margin": SOFT, "label_smoothing": 0.1, "groups": "sum", "centre_weight": 5e-4},
    "sbs": {"triplet": "hard", "margin": SOFT, "label_smoothing": 0.1, "groups": "sum", "centre_weight": 0.0},
    "mgn": {"triplet": "hard", "margin": 1.2, "label_smoothing": 0.0, "groups": "mean", "centre_weight": 0.0},
    "bdb": {"triplet": "hard", "margin": SOFT, "label_smoothing": 0.1, "groups": "sum", "centre_weight": 0.0},
    METABIN: {"triplet": "hard", "margin": 0.3, "label_smoothing": 0.1, "groups": "sum", "centre_weight": 0.0},
}
# SBS is also how it is trained, at any size.
DEMO = {"sbs": {"lr_scheduler": DELAYED_COSINE, "lr_warmup_steps": 16, "lr_delay_epochs": 4, "freeze_steps": 16}}
BAG_OF_TRICKS = {
    "source": ["market1501"],
    "backbone": "microsoft/resnet-50",
    "resolution": [256, 128],
    "padding": 10,
    "erasing": 0.5,
    "train_batch_size": 64,
    "images_per_id": 4,
    "num_train_epochs": 120,
    "optimizer": "adam",
    "learning_rate": 3.5e-4,
    "lr_scheduler": "warmup_multistep",
    "lr_warmup_epochs": 10,
    "lr_warmup_factor": 0.01,
    "lr_milestones": [40, 70],
    "adam_weight_decay": 5e-4,
    "eval_every": 10,
    "log_every": 10,
    "checkpointing_steps": 1000,
    "dataloader_num_workers": 8,
}
PUBLISHED = {
    "bot": BAG_OF_TRICKS,
    "agw": BAG_OF_TRICKS,
    "sbs": BAG_OF_TRICKS
    | {
        "resolution": [384, 128],
        "images_per_id": 16,
        "num_train_epochs": 60,
        "lr_scheduler": DELAYED_COSINE,
        "lr_warmup_steps": 2000,
        "lr_warmup_factor": 0.1,
        "lr_delay_epochs": 30,
        "lr_final_factor": 0.002,
        "freeze_steps": 1000,
    },
    "mgn": BAG_OF_TRICKS
    | {
        "resolution": [384, 128],
        "padding": 0,
        "erasing": 0.0,
        "num_train_epochs": 80,
        "optimizer": "sgd",
        "learning_rate": 0.01,
        "lr_warmup_epochs": 0,
        "lr_milestones": [40, 60],
    },
    "bdb": BAG_OF_TRICKS
    | {
        "resolution": [384, 128],
        "padding": 0,
        "train_batch_size": 128,
        "num_train_epochs": 400,
        "learning_rate": 1e-3,
        "lr_warmup_epochs": 50,
        "lr_warmup_factor": 0.1,
        "lr_milestones": [200, 300],
    },
    METABIN: BAG_OF_TRICKS
    | {
        "setting": "generalisation",
        "source": [f"{name}:all_for_training=true" for name in ("market1501", "cuhk02", "cuhk03np", "cuhksysu")],
        "target": ["prid", "grid", "viper", "ilids"],
        "erasing": 0.0,
        "train_batch_size": 80,
        "num_train_epochs": 100,
        "optimizer": "sgd",
        "learning_rate": 0.01,
        "meta_first_order": True,
    },
}


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    yes = {"action": "store_true"}
    parser.add_argument("--method", choices=METHODS, default="bot", help="default bot; its losses are set with it")
    parser.add_argument(
        "--recipe",
        choices=["published"],
        help="the method's published values, Market-1501 and an ImageNet ResNet-50; any flag given wins. Default: "
        "values for the stand-ins",
    )

    group = parser.add_argument_group("data")
    group.add_argument("--source", nargs="+", metavar="SPEC", help=f"training sets; default {DEMO_SOURCE}")
    group.add_argument(
        "--target",
        nargs="+",
        metavar="SPEC",
        help="sets with query and gallery to measure on; default the source's own",
    )
    group.add_argument("--data_root", help="folder in which the benchmarks lie")
    group.add_argument(
        "--setting",
        choices=SETTINGS,
        default="supervised",
        help="supervised: all images; few-shot: --fraction of each identity's images, at least 2; small-scale: "
        "--fraction of the identities; generalisation: several sources, other targets. With one seed, smaller parts "
        "lie inside larger ones; default supervised",
    )
    group.add_argument("--fraction", type=float, help="of few-shot and small-scale, above 0, at most 1; default 0.1")
    group.add_argument("--fraction_seed", type=int, default=0, help="which part it is; default 0")
    group.add_argument(
        "--resolution",
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        default=[128, 64],
        help="input in pixels; default 128 64",
    )
    group.add_argument("--padding", type=int, default=5, help="pixels around, of which a crop is taken; default 5")
    group.add_argument("--erasing", type=float, default=0.0, help="probability of random erasing; default 0")
    group.add_argument(
        "--single_image_ids",
        choices=SINGLE_IMAGE_IDS,
        default="error",
        help="identities with one image have nothing to be compared with in a batch: stop, repeat the image, or leave "
        "them out; default error",
    )
    group.add_argument("--skip_unreadable", **yes, help="leave out images that do not decode, and list them")
    group.add_argument(
        "--dataloader_num_workers", type=int, default=0, help="processes that prepare images; default 0"
    )

    group = parser.add_argument_group("model and losses")
    group.add_argument(
        "--backbone",
        default=CLIP_DIR,
        help="to start from, folder or Hub id: CLIP, ResNet, Swin, such as backbone/ of pretrain_backbone.py, or a "
        "ReIDModel of bot or of the same method; default: the stand-in CLIP",
    )
    group.add_argument("--triplet", choices=["hard", "weighted"], help="default by the method, see above")
    group.add_argument("--margin", type=margin, help="of hard triplets, a number or `soft`; default by the method")
    group.add_argument("--label_smoothing", type=float, help="of the class loss; default 0.1, of mgn 0")
    group.add_argument(
        "--groups", choices=["sum", "mean"], help="of a method with several features: their losses' sum, or mean (mgn)"
    )
    group.add_argument("--triplet_weight", type=float, default=1.0, help="beside the class loss; default 1")
    group.add_argument(
        "--centre_weight",
        type=float,
        help="of the distance to the identity's centre; default 5e-4 of bot and agw, else 0",
    )
    group.add_argument("--circle_scale", type=float, default=64.0, help="of sbs; default 64")
    group.add_argument("--circle_margin", type=float, default=0.35, help="of sbs; default 0.35")

    group.add_argument(
        "--meta_rate", type=float, default=0.1, help="of metabin: rate of the mixtures of norms; default 0.1"
    )
    group.add_argument(
        "--meta_inner_rates",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        default=[0.001, 0.1],
        help="of metabin: between these the rate of its inner step goes up and down; default 0.001 0.1",
    )
    group.add_argument(
        "--meta_period", type=float, default=5.0, help="of metabin: epochs in which it does so once; default 5"
    )
    group.add_argument(
        "--meta_first_order", **yes, help="of metabin: without second derivatives, as the authors' code: less work"
    )

    group = parser.add_argument_group("training")
    group.add_argument("--train_batch_size", type=int, default=32, help="images a process; default 32")
    group.add_argument("--images_per_id", type=int, default=4, help="K: images of each identity in a batch; default 4")
    group.add_argument("--num_train_epochs", type=int, default=8, help="default 8")
    group.add_argument("--max_train_steps", type=int, help="stop after so many steps; default: all epochs")
    group.add_argument(
        "--gradient_accumulation_steps", type=int, default=1, help="1: whole batches are looked at, not parts of them"
    )
    group.add_argument("--learning_rate", type=float, default=3e-4, help="default 3e-4, for the stand-ins")
    group.add_argument(
        "--freeze_steps", type=int, default=0, help="first steps in which the backbone stays as it is; default 0"
    )
    group.add_argument(
        "--lr_scheduler",
        choices=[DELAYED_COSINE, *SCHEDULES],
        default="warmup_multistep",
        help="delayed_cosine, SBS's own: warm-up of --lr_warmup_steps, flat for --lr_delay_epochs, then a cosine down "
        "to --lr_final_factor; default warmup_multistep",
    )
    group.add_argument("--lr_warmup_epochs", type=int, default=1, help="of warmup_multistep; default 1")
    group.add_argument("--lr_warmup_factor", type=float, default=0.1, help="of the rate, at the start; default 0.1")
    group.add_argument(
        "--lr_milestones", type=int, nargs="*", default=[7], help="epochs from which the rate is lower; default 7"
    )
    group.add_argument("--lr_gamma", type=float, default=0.1, help="factor at each milestone; default 0.1")
    group.add_argument("--lr_warmup_steps", type=int, default=0, help="of the other schedules, in steps; default 0")
    group.add_argument("--lr_delay_epochs", type=int, default=0, help="of delayed_cosine; default 0")
    group.add_argument("--lr_final_factor", type=float, default=0.01, help="of delayed_cosine; default 0.01")
    group.add_argument("--optimizer", choices=OPTIMIZERS, default="adam", help="default adam, weight decay as L2")
    group.add_argument("--adam_beta1", type=float, default=0.9, help="default 0.9; of sgd the momentum")
    group.add_argument("--adam_beta2", type=float, default=0.999, help="default 0.999")
    group.add_argument("--adam_epsilon", type=float, default=1e-8, help="default 1e-8")
    group.add_argument("--adam_weight_decay", type=float, default=5e-4, help="default 5e-4")
    group.add_argument(
        "--max_grad_norm", type=float, default=0.0, help="clip gradients to this norm; default 0, never"
    )
    group.add_argument("--use_8bit_adam", **yes, help="bitsandbytes' 8-bit optimiser")
    group.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], help="default accelerate's setting")
    group.add_argument("--allow_tf32", **yes, help="TF32 matrix products on Ampere and newer")
    group.add_argument("--gradient_checkpointing", **yes, help="recompute activations: less memory, more time")
    group.add_argument("--seed", type=int, default=0, help="of weights, batches and augmentation; default 0")

    group = parser.add_argument_group("evaluation")
    group.add_argument("--eval_every", type=int, default=1, help="epochs between evaluations; default 1")
    group.add_argument("--eval_batch_size", type=int, default=64, help="images a process; default 64")
    group.add_argument("--rerank", **yes, help="k-reciprocal re-ranking beside the plain numbers")
    group.add_argument("--k1", type=int, default=20, help="re-ranking: reciprocal neighbours; default 20")
    group.add_argument("--k2", type=int, default=6, help="re-ranking: neighbours averaged over; default 6")
    group.add_argument(
        "--lambda_value", type=float, default=0.3, help="re-ranking: weight of the plain distance, 0 to 1; default 0.3"
    )

    group = parser.add_argument_group("output")
    group.add_argument("--output_dir", default="output/finetune", help="default output/finetune")
    group.add_argument("--checkpointing_steps", type=int, default=500, help="steps between checkpoints; default 500")
    group.add_argument("--checkpoints_total_limit", type=int, default=2, help="how many are kept; default 2")
    group.add_argument(
        "--resume_from_checkpoint", help="`latest` (from 0 where there is none), a name such as checkpoint-500, a path"
    )
    group.add_argument("--log_every", type=int, default=1, help="steps between writes of log.jsonl; default 1")
    group.add_argument(
        "--report_to", nargs="+", default=["none"], help="tensorboard, wandb, trackio or others; default none"
    )
    group.add_argument("--push_to_hub", **yes, help="upload the model when done")
    group.add_argument("--hub_model_id", help="repository; default: the name of --output_dir")
    return parser


def margin(text):
    return text if text == SOFT else float(text)


def parse_args(input_args=None):
    parser = build_parser()
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--method", default="bot")
    method = first.parse_known_args(input_args)[0].method
    # A name that is none is refused below.
    parser.set_defaults(**LOSSES.get(method, {}), **DEMO.get(method, {}))
    args, args.origin = parse_with_recipes(parser, {"published": PUBLISHED.get(method, {})}, input_args)
    args.demo = args.source is None and args.target is None
    if args.demo and args.setting == "generalisation":
        args.source, args.target = DEMO_SOURCES, DEMO_TARGETS
    args.source = args.source or [DEMO_SOURCE]
    if args.setting in PARTS and args.fraction is None:
        args.fraction = 0.1
    check_args(parser, args)
    return args


def check_args(parser, args):
    """All that can be told from the arguments alone."""
    check_ranges(
        parser,
        args,
        one_or_more=[
            "num_train_epochs", "max_train_steps", "eval_every", "eval_batch_size", "checkpointing_steps",
            "checkpoints_total_limit", "log_every", "k1", "k2",
        ],
        positive=["learning_rate", "adam_epsilon", "circle_scale", "meta_rate", "meta_period"],
        not_negative=[
            "adam_weight_decay", "max_grad_norm", "dataloader_num_workers", "lr_warmup_epochs", "lr_warmup_steps",
            "lr_delay_epochs", "freeze_steps", "seed", "fraction_seed", "padding", "triplet_weight",
            "centre_weight",
        ],
        fractions=[
            "erasing", "label_smoothing", "lambda_value", "lr_warmup_factor", "lr_gamma", "lr_final_factor",
            "circle_margin", "adam_beta1", "adam_beta2",
        ],
    )  # fmt: skip
    if args.fraction is not None and not 0 < args.fraction <= 1:
        parser.error(f"--fraction must be above 0 and at most 1, got {args.fraction}")
    if args.fraction is not None and args.setting not in PARTS:
        parser.error(f"--fraction {args.fraction} belongs to --setting few-shot or small-scale")
    if args.method == METABIN and args.setting != "generalisation":
        parser.error(f"--method {METABIN} learns from several domains: it belongs to --setting generalisation")
    low, high = args.meta_inner_rates
    if not 0 <= low <= high < math.inf:
        parser.error(f"--meta_inner_rates must be 0 or more, the lower one first, got {low} {high}")
    for name in ("train_batch_size", "images_per_id"):
        if getattr(args, name) < 2:
            parser.error(
                f"--{name} must be 2 or more, got {getattr(args, name)}: BatchNorm has no statistics of one image, "
                "and a triplet takes two images of an identity"
            )
    if args.margin != SOFT and not 0 <= args.margin < math.inf:
        parser.error(f"--margin must be 0 or more, or `soft`, got {args.margin}")
    if args.centre_weight and args.method in ("mgn", "bdb"):
        parser.error(f"--centre_weight {args.centre_weight} is for one feature an image; {args.method} has several")
    if args.triplet == "weighted" and args.margin != SOFT:
        parser.error(f"--margin {args.margin} is of --triplet hard; the weighted one has none, use --margin soft")
    check_training(parser, args)
    if args.lr_scheduler == DELAYED_COSINE and args.lr_delay_epochs >= args.num_train_epochs:
        parser.error(
            f"--lr_delay_epochs {args.lr_delay_epochs} leaves no epoch of {args.num_train_epochs} for the cosine"
        )


def check_start(args):
    """Whether --backbone can start the method, told from its configuration."""
    family = "clip"
    if model_kind(args.backbone) == "reid":
        method = PreTrainedConfig.get_config_dict(args.backbone)[0].get("method", "bot")
        if method not in ("bot", args.method):
            raise ValueError(
                f"--backbone {args.backbone} is a model of method {method}; it can start --method {method} only"
            )
        family = PreTrainedConfig.get_config_dict(args.backbone)[0]["backbone"]["model_type"]
    elif model_kind(args.backbone) == "backbone":
        config = read_config(args.backbone, revision=None, token=None)
        family = config.model_type
        if args.method == "mgn" and config.model_type == "resnet" and len(config.hidden_sizes) < 2:
            raise ValueError(f"--backbone {args.backbone} has one stage; mgn parts in the last stage but one")
    if args.method == METABIN and family != "resnet":
        raise ValueError(
            f"--backbone {args.backbone} is a {family}: it has no BatchNorm, which --method {METABIN} mixes with "
            "InstanceNorm; give a ResNet, such as backbone/ of pretrain_backbone.py --backbone resnet50"
        )


# The method


class FineTuning(nn.Module):
    """A Re-ID model and its losses; `forward` is the loss of one batch.

    With several processes each passes its share of the images through the backbone. What comes out is gathered, so
    that BatchNorm, classifiers and triplets see the whole batch, as one process would.
    """

    def __init__(self, model, args):
        super().__init__()
        self.model, self.args = model, args
        self.centres = CentreLoss(model.num_ids, model.backbone.num_features) if args.centre_weight else None
        self.trained = trained(model.backbone)

    def forward(self, images, labels, rng=None, frozen=False):
        with self.frozen_backbone() if frozen else nullcontext():
            pooled = self.model.pool(images, rng)
        pooled, labels = gather_with_gradient(pooled), gather_with_gradient(labels)
        with torch.autocast(images.device.type, enabled=False):
            output = self.model.outputs(pooled.float())
            loss_id = self.together([self.class_loss(logits, labels) for logits in output.logits])
            loss_triplet = self.together([self.triplet_loss(features, labels) for features in output.compared])
            loss_centre = torch.zeros_like(loss_id)
            if self.centres is not None:
                loss_centre = self.centres(output.compared[0], labels)
        loss = loss_id + self.args.triplet_weight * loss_triplet + self.args.centre_weight * loss_centre
        values = {"loss": loss, "loss_id": loss_id, "loss_triplet": loss_triplet, "loss_centre": loss_centre}
        compared = [features.detach() for features in output.compared]
        return loss, {name: value.detach() for name, value in values.items()}, compared, labels

    def class_loss(self, logits, labels):
        if self.args.method == "sbs":
            logits = circle_logits(logits, labels, self.args.circle_scale, self.args.circle_margin)
        return F.cross_entropy(logits, labels, label_smoothing=self.args.label_smoothing)

    def triplet_loss(self, features, labels):
        if self.args.triplet == "weighted":
            return weighted_triplet(features, labels)
        return hard_triplet(features, labels, None if self.args.margin == SOFT else self.args.margin)

    def together(self, losses):
        losses = torch.stack(losses)
        return losses.mean() if self.args.groups == "mean" else losses.sum()

    @contextmanager
    def frozen_backbone(self):
        """No gradient to the backbone, and its BatchNorm as in a test; a checkpoint still holds its weights."""
        for parameter in self.trained:
            parameter.requires_grad_(False)
        self.model.backbone.eval()
        try:
            yield
        finally:
            self.model.backbone.train()
            for parameter in self.trained:
                parameter.requires_grad_(True)


def delayed_cosine(epoch, step, args):
    """Factor on the learning rate: warm-up by steps, flat for --lr_delay_epochs, then a cosine by epochs."""
    factor = 1.0
    if step < args.lr_warmup_steps:
        factor = args.lr_warmup_factor + (1 - args.lr_warmup_factor) * step / args.lr_warmup_steps
    # [0, 1): the last epoch is one step above --lr_final_factor.
    passed = max(0, epoch - 1 - args.lr_delay_epochs) / (args.num_train_epochs - args.lr_delay_epochs)
    return factor * (args.lr_final_factor + (1 - args.lr_final_factor) * (1 + math.cos(math.pi * passed)) / 2)


# Training


@dataclass
class Run:
    """What the functions below share."""

    args: argparse.Namespace
    accelerator: Accelerator
    train: datasets.Dataset
    labels: torch.Tensor
    domains: torch.Tensor
    period: int
    targets: list
    state: dict
    method: FineTuning

    @property
    def model(self):
        """The ReIDModel without what accelerate puts around it."""
        return self.accelerator.unwrap_model(self.method).model


def main(args):
    accelerator = start_accelerator(args, find_unused_parameters=args.freeze_steps > 0)
    introduce(
        args,
        f"Demo: {args.method} on drawn people, from the shipped stand-in CLIP; about two minutes on two cores. "
        "For your own data: --source SPEC --data_root DIR --backbone DIR --recipe published",
        accelerator.print,
    )
    # What can be wrong with data and configuration shows before a model is loaded.
    check_start(args)
    if args.method == METABIN and accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise ValueError(f"--method {METABIN} moves norms behind DeepSpeed's back; start it without DeepSpeed")
    train, labels, data = open_source(
        args.source, args.data_root, single_image_ids=args.single_image_ids, skip_unreadable=args.skip_unreadable
    )
    num_all, (train, labels) = len(train), part_of(args, train, labels)
    domains = domains_of(args, train)
    own = args.source if len(args.source) == 1 and {"query", "gallery"} <= set(data) else []
    targets = open_targets(
        args.target or own,
        args.data_root,
        skip_unreadable=args.skip_unreadable,
        all_splits=args.setting == "generalisation",
    )
    batch_size = args.train_batch_size * accelerator.num_processes
    if batch_size < 2 * args.images_per_id:
        raise ValueError(
            f"a batch of {batch_size} images, {args.images_per_id} of each identity, holds one identity: a triplet "
            "takes two; raise --train_batch_size or lower --images_per_id"
        )
    share = accelerator.process_index, accelerator.num_processes
    sampler = IdentitySampler(labels.tolist(), batch_size, args.images_per_id, args.seed, *share)
    if args.method == METABIN:
        each = max(2, batch_size // args.images_per_id // (int(domains.max()) + 1))
        sampler = MetaBatches(sampler, labels.tolist(), train["domain"][:], each, args.images_per_id, args.seed)
    sampler = RemainingBatches(sampler)
    path, state = open_state(
        args,
        "finetune_reid.py",
        effective_batch_size=batch_size,
        data=digest_of(train, labels),
        free=FREE_ON_RESUME,
        say=accelerator.print,
    )
    num_ids = int(labels.max()) + 1
    accelerator.print(
        f"{' + '.join(args.source)}, {args.setting}: {len(train)} of {num_all} images, {num_ids} identities; "
        f"measured on {', '.join(target.spec for target in targets) or 'nothing'}"
    )

    set_seed(args.seed)
    head = "bot" if args.method == METABIN else args.method
    model = ReIDModel.for_training(args.backbone, num_ids=num_ids, image_size=tuple(args.resolution), method=head)
    if args.method == METABIN:
        add_batch_instance_norms(model.backbone)
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    # The necks see the gathered batch anyway.
    for part in (model.backbone, getattr(model.head, "branches", None), getattr(model.head, "bottleneck", None)):
        if part is not None:
            share_batch_statistics(part, accelerator.device)
    period = max(2, round(args.meta_period * sampler.steps_of(1)))
    run = Run(args, accelerator, train, labels, domains, period, targets, state, FineTuning(model, args))
    loader = build_loader(args, accelerator, model, train, labels.tolist(), sampler)
    run.method, optimizer = accelerator.prepare(run.method, optimizer_of(args, model))
    num_steps = sampler.steps_of(args.num_train_epochs)
    own_schedule = partial(delayed_cosine, args=args) if args.lr_scheduler == DELAYED_COSINE else None
    rates = rates_of(args, optimizer, num_steps, own_schedule)
    if path:
        load_checkpoint(path, run.method, optimizer, accelerator=accelerator)
    write_arguments(args, accelerator, "diffreid-finetune")

    def measured(epoch):
        measure(args, accelerator, state, run.model, targets, epoch, (args.k1, args.k2))

    if not path:
        measured(0)
    params = trained(run.method)
    stopped_at = train_epochs(
        args,
        accelerator,
        state,
        loader,
        sampler,
        rates,
        kept=run.method,
        optimizer=optimizer,
        num_steps=num_steps,
        step=lambda batch: training_step(run, batch, optimizer, params),
        measure=measured,
        before=lambda epoch: run.method.train(),
        rows=partial(name_images, accelerator, train),
    )
    if stopped_at:
        accelerator.print(f"SIGTERM: {stopped_at} is written; go on with --resume_from_checkpoint latest")
    else:
        finish(run)
    accelerator.end_training()
    return EXIT_SIGTERM if stopped_at else 0


def training_step(run, batch, optimizer, params):
    args, accelerator, step = run.args, run.accelerator, run.state["step"]
    images, labels = (batch[name].to(accelerator.device, non_blocking=True) for name in ("images", "labels"))
    # Of metabin, what its meta-step takes comes after the batch.
    (images, meta_images), (labels, meta_labels) = (
        (whole[: args.train_batch_size], whole[args.train_batch_size :]) for whole in (images, labels)
    )
    # The same draw on every process, and again after a resume.
    rng = random.Random(f"step/{args.seed}/{step}")
    loss, values, compared, labels = run.method(images, labels, rng=rng, frozen=step < args.freeze_steps)
    accelerator.backward(loss)
    norm = accelerator.clip_grad_norm_(params, args.max_grad_norm or float("inf"))
    optimizer.step()
    optimizer.zero_grad()
    bare = accelerator.unwrap_model(run.method)
    if bare.centres is not None:
        bare.centres.update(compared[0], labels)
    if args.method == METABIN:
        domains = run.domains[batch["indices"][args.train_batch_size :]].to(labels.device)
        values = {**values, **balance(run, meta_images, meta_labels, domains)}
    return {"grad_norm": torch.as_tensor(0.0 if norm is None else norm, device=loss.device), **values}


def balance(run, images, labels, domains):
    """MetaBIN's second half of a step: every norm's mixture moves, and nothing else. Its losses."""
    args, step = run.args, run.state["step"]
    return meta_step(
        run.model.backbone,
        images,
        labels,
        domains,
        domains_held_in(int(run.domains.max()) + 1, f"{args.seed}/{step}"),
        inner_rate=inner_rate(step, run.period, *args.meta_inner_rates),
        outer_rate=args.meta_rate,
        first_order=args.meta_first_order,
        reduce=partial(run.accelerator.reduce, reduction="mean"),
    )


# What the training is made of


def part_of(args, train, labels):
    """The training images of the setting, with labels 0..N-1."""
    if args.setting not in PARTS:
        return train, labels
    kind = "image_fraction" if args.setting == "few-shot" else "identity_fraction"
    train = subset(train, **{kind: args.fraction}, min_images=2, seed=args.fraction_seed)
    return train, torch.from_numpy(labels_of(train))


def domains_of(args, train):
    """The number of each image's domain; ValueError where several are asked for and one is there."""
    names = train["domain"][:]
    numbers = {name: number for number, name in enumerate(sorted(set(names)))}
    if args.setting == "generalisation" and len(numbers) < 2:
        raise ValueError(
            f"--setting generalisation learns from several domains; {' + '.join(args.source)} has one, "
            f"{next(iter(numbers))}: name more with --source, or choose --setting supervised"
        )
    return torch.tensor([numbers[name] for name in names])


# Results


def finish(run):
    """The trained model, its card, the page, the table."""
    args, model = run.args, run.model
    run.accelerator.wait_for_everyone()
    if not run.accelerator.is_main_process:
        return
    final = results(run.state["history"])
    title = f"{args.method.upper()} fine-tuned on {' + '.join(args.source)}"
    details = {"images": len(run.train), "identities": model.num_ids}
    card = save_model(args, "finetune_reid.py", model, title, final["targets"], details)
    write_page(run, final["history"])
    say_goodbye(args, model, card, final["history"])


def write_page(run, history):
    args, output_dir = run.args, Path(run.args.output_dir)
    setting = args.setting if args.fraction is None else f"{args.setting}, {100 * args.fraction:g} %"
    page = training_report(
        f"Fine-tuning: {args.method.upper()}",
        output_dir,
        history,
        lead="A Re-ID model, measured before and after it was trained with labels.",
        facts=[
            ("Source", " + ".join(args.source)),
            ("Setting", setting),
            ("Images", f"{len(run.train):,} of {run.model.num_ids:,} identities"),
            ("Start", Path(args.backbone).name),
            ("Steps", f"{run.state['step']:,}"),
            ("Batch", run.state["arguments"]["effective_batch_size"]),
            ("Seed", args.seed),
        ],
    )
    with write_together(output_dir) as aside:
        page.write(aside("report.html"))


def run_script(args):
    end_with(main, args, "finetune_reid.py")


if __name__ == "__main__":
    run_script(parse_args())
