"""Train a Re-ID model without labels, or with the labels of another domain: pseudo labels by clustering, every epoch.

    accelerate launch --config_file accelerate_config.yaml adapt_reid.py
    accelerate launch adapt_reid.py --recipe cluster-contrast --target msmt17 --steps_per_epoch 400 \\
        --data_root ~/reid --backbone output/pretrain/backbone --output_dir output/msmt17-unsupervised
    accelerate launch adapt_reid.py --recipe idm --source market1501 --target msmt17 --data_root ~/reid ...

The first is a demo on drawn people with the shipped stand-in CLIP, about two minutes on two CPU cores.

Before every epoch the target's training images are clustered: DBSCAN on k-reciprocal Jaccard distances. Then, with
u the unit-length BNNeck feature of an image,

    cluster-contrast  CE(u M^T / temperature, cluster)         M: a prototype a cluster, moved after every step; noise
                                                               is left out
    spcl              CE(u C^T / temperature, class)           C: means of a memory with a row of each source identity
                                                               and of each target image; clusters that do not hold at
                                                               a looser and a tighter scale are dissolved, and each
                                                               image in none is a class of its own
    idm               classes of both domains, hard triplets, and a third domain between them: feature maps mixed with
                      ratios learned for each pair, whose labels and features are bridged likewise

Of the source, `--source`, labels are used; those of `--target`, where it has any, only for numbers in the report. A
batch has K images of each cluster, as different cameras saw it where the data say which camera an image is of.
With a source, BatchNorm has averages and weights of its own for each domain; the target's are saved.

Distances follow the paper on re-ranking; the authors' code counts an image among its own k1, and does not divide a
row's distances by its largest. Left out: GeM in cluster-contrast's code, IDM's memory of earlier batches (XBM).
"""

import argparse
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list, set_seed
from torch import nn

from methods.idm import Mixer
from utils.batches.samplers import PseudoBatches, in_groups
from utils.datasets.training_sets import digest_of, open_source, open_unlabelled
from utils.evaluation.features import extract
from utils.evaluation.targets import open_targets, results
from utils.files import to_json, write_together
from utils.flags import CLIP_DIR, OPTIMIZERS, SCHEDULES, SINGLE_IMAGE_IDS, check_ranges, parse_with_recipes
from utils.launch import EXIT_SIGTERM, end_with, gather_with_gradient, start_accelerator
from utils.modeling.losses import hard_triplet
from utils.modeling.memories import UPDATES, ClusterMemory, HybridMemory, class_means
from utils.modeling.norms import join_norms, share_batch_statistics, split_norms
from utils.modeling.reid_model import ReIDModel
from utils.training.checkpoints import load_checkpoint, open_state
from utils.training.cluster_report import add_clusters, add_contact_sheet, told
from utils.training.clustering import NOISE, agreement, check_clusters, check_settings, cluster, reliable, singled_out
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
    transform_of,
    write_arguments,
)
from utils.training.report import training_report

DEMO_SOURCE = "synthetic:domain=a,num_ids=64"
DEMO_TARGET = "synthetic:domain=b,num_ids=32,images_per_id=16"
METHODS = {"unsupervised": ("cluster-contrast", "spcl"), "adaptation": ("spcl", "idm")}
PUBLISHED = {
    "target": ["market1501"],
    "backbone": "microsoft/resnet-50",
    "resolution": [256, 128],
    "padding": 10,
    "erasing": 0.5,
    "eps": 0.6,
    "eps_gap": 0.02,
    "min_samples": 4,
    "k1": 30,
    "k2": 6,
    "memory_temperature": 0.05,
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
ADAPTATION = {"setting": "adaptation", "source": ["msmt17"]}
RECIPES = {
    "cluster-contrast": PUBLISHED
    | {
        "method": "cluster-contrast",
        "train_batch_size": 256,
        "images_per_id": 16,
        "steps_per_epoch": 200,
        "memory_momentum": 0.1,
    },
    "spcl": PUBLISHED | {"method": "spcl", "memory_momentum": 0.2},
    "spcl-adaptation": PUBLISHED | ADAPTATION | {"method": "spcl", "memory_momentum": 0.2},
    "idm": PUBLISHED | ADAPTATION | {"method": "idm"},
}


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    yes = {"action": "store_true"}
    parser.add_argument(
        "--recipe",
        choices=RECIPES,
        help="published values and an ImageNet ResNet-50, Market-1501 as target; any flag given wins (for MSMT17 "
        "cluster-contrast and spcl are published with twice the --steps_per_epoch). Default: values for the stand-ins",
    )
    parser.add_argument(
        "--setting",
        choices=METHODS,
        default="unsupervised",
        help="unsupervised: no labels at all; adaptation: those of --source; default unsupervised",
    )
    parser.add_argument(
        "--method",
        choices=dict.fromkeys(method for methods in METHODS.values() for method in methods),
        help="default cluster-contrast, under adaptation spcl",
    )

    group = parser.add_argument_group("data")
    group.add_argument("--source", nargs="+", metavar="SPEC", help=f"labelled sets; default {DEMO_SOURCE}")
    group.add_argument(
        "--target",
        nargs="+",
        metavar="SPEC",
        help="sets whose training images are clustered, or a folder of images; measured on where they have query and "
        f"gallery; default {DEMO_TARGET}",
    )
    group.add_argument("--data_root", help="folder in which the benchmarks lie")
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
        help="identities of the source with one image: stop, repeat the image, or leave them out; default error",
    )
    group.add_argument("--skip_unreadable", **yes, help="leave out images that do not decode, and list them")
    group.add_argument(
        "--dataloader_num_workers", type=int, default=0, help="processes that prepare images; default 0"
    )

    group = parser.add_argument_group("clustering")
    group.add_argument("--eps", type=float, default=0.4, help="distance of neighbours in DBSCAN, 0 to 1; default 0.4")
    group.add_argument("--min_samples", type=int, default=4, help="neighbours that make a core; default 4")
    group.add_argument("--k1", type=int, default=20, help="reciprocal neighbours of an image; default 20")
    group.add_argument("--k2", type=int, default=4, help="neighbours that are averaged over; default 4")
    group.add_argument(
        "--eps_gap",
        type=float,
        default=0.02,
        help="of spcl: looser and tighter scale are this far from eps; default 0.02",
    )

    group = parser.add_argument_group("method")
    group.add_argument(
        "--backbone",
        default=CLIP_DIR,
        help="to start from, folder or Hub id: CLIP, ResNet, Swin, such as backbone/ of pretrain_backbone.py, or a "
        "ReIDModel; default: the stand-in CLIP",
    )
    group.add_argument("--memory_temperature", type=float, default=0.05, help="of the memory's loss; default 0.05")
    group.add_argument("--memory_momentum", type=float, default=0.2, help="what a row of it keeps; default 0.2")
    group.add_argument(
        "--memory_update",
        choices=UPDATES,
        default="momentum",
        help="of cluster-contrast: a prototype is moved by each image in turn, by the one least like it, or by their "
        "mean; default momentum",
    )
    group.add_argument("--label_smoothing", type=float, default=0.1, help="of idm's classes; default 0.1")
    group.add_argument("--margin", type=float, default=0.3, help="of idm's triplets; default 0.3")
    group.add_argument(
        "--mix_stage", type=int, default=0, help="of idm: maps after so many stages are mixed; default 0"
    )
    group.add_argument("--mix_weight", type=float, default=0.7, help="of idm: mixed against own labels; default 0.7")
    group.add_argument("--bridge_weight", type=float, default=0.1, help="of idm's bridge of features; default 0.1")
    group.add_argument("--diversity_weight", type=float, default=1.0, help="of idm: ratios that differ; default 1")

    group = parser.add_argument_group("training")
    group.add_argument(
        "--train_batch_size", type=int, default=32, help="images a process, and as many of the source; default 32"
    )
    group.add_argument("--images_per_id", type=int, default=4, help="K: images of each cluster in a batch; default 4")
    group.add_argument("--num_train_epochs", type=int, default=8, help="default 8")
    group.add_argument("--steps_per_epoch", type=int, help="between clusterings; default: as many as the images fill")
    group.add_argument("--max_train_steps", type=int, help="stop after so many steps; default: all epochs")
    group.add_argument(
        "--gradient_accumulation_steps", type=int, default=1, help="1: whole batches are looked at, not parts of them"
    )
    group.add_argument("--learning_rate", type=float, default=1e-4, help="default 1e-4, for the stand-ins")
    group.add_argument(
        "--lr_scheduler", choices=SCHEDULES, default="warmup_multistep", help="default warmup_multistep"
    )
    group.add_argument("--lr_warmup_epochs", type=int, default=1, help="of warmup_multistep; default 1")
    group.add_argument("--lr_warmup_factor", type=float, default=0.1, help="of the rate at epoch 0; default 0.1")
    group.add_argument(
        "--lr_milestones", type=int, nargs="*", default=[7], help="epochs from which the rate is lower; default 7"
    )
    group.add_argument("--lr_gamma", type=float, default=0.1, help="factor at each milestone; default 0.1")
    group.add_argument("--lr_warmup_steps", type=int, default=0, help="of diffusers' schedules, in steps; default 0")
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
    group.add_argument("--eval_every", type=int, default=4, help="epochs between evaluations; default 4")
    group.add_argument("--eval_batch_size", type=int, default=64, help="images a process; default 64")
    group.add_argument("--rerank", **yes, help="k-reciprocal re-ranking beside the plain numbers")
    group.add_argument("--rerank_k1", type=int, default=20, help="its reciprocal neighbours; default 20")
    group.add_argument("--rerank_k2", type=int, default=6, help="its neighbours averaged over; default 6")
    group.add_argument("--lambda_value", type=float, default=0.3, help="its weight of the plain distance; default 0.3")

    group = parser.add_argument_group("output")
    group.add_argument("--output_dir", default="output/adapt", help="default output/adapt")
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


def parse_args(input_args=None):
    parser = build_parser()
    args, args.origin = parse_with_recipes(parser, RECIPES, input_args)
    args.demo = args.target is None and args.source is None
    args.target = args.target or [DEMO_TARGET]
    args.method = args.method or METHODS[args.setting][0]
    if args.setting == "adaptation" and args.source is None and args.demo:
        args.source = [DEMO_SOURCE]
    check_args(parser, args)
    return args


def check_args(parser, args):
    """All that can be told from the arguments alone."""
    if args.method not in METHODS[args.setting]:
        parser.error(
            f"--method {args.method} is not one of --setting {args.setting}: {', '.join(METHODS[args.setting])}"
        )
    if args.setting == "adaptation" and args.source is None:
        parser.error("--setting adaptation needs a labelled --source beside --target")
    if args.setting == "unsupervised" and args.source is not None:
        parser.error(
            f"--source {' '.join(args.source)} has labels, which --setting unsupervised does not use: name the images "
            "with --target, or choose --setting adaptation"
        )
    check_ranges(
        parser,
        args,
        one_or_more=[
            "train_batch_size", "num_train_epochs", "steps_per_epoch", "max_train_steps", "k1", "k2", "eval_every",
            "eval_batch_size", "checkpointing_steps", "checkpoints_total_limit", "log_every", "rerank_k1",
            "rerank_k2",
        ],
        positive=["memory_temperature", "learning_rate", "adam_epsilon"],
        not_negative=[
            "adam_weight_decay", "max_grad_norm", "dataloader_num_workers", "lr_warmup_epochs", "lr_warmup_steps",
            "seed", "padding", "eps_gap", "margin", "mix_stage", "bridge_weight", "diversity_weight",
        ],
        fractions=[
            "erasing", "memory_momentum", "label_smoothing", "mix_weight", "lr_warmup_factor", "lr_gamma",
            "lambda_value", "adam_beta1", "adam_beta2",
        ],
    )  # fmt: skip
    if not all(0 < eps < 1 for eps in scales(args)):
        gap = f" with --eps_gap {args.eps_gap}" if args.method == "spcl" else ""
        parser.error(f"--eps {args.eps}{gap} must be above 0 and below 1, the largest Jaccard distance")
    for name in ("min_samples", "images_per_id"):
        if getattr(args, name) < 2:
            parser.error(f"--{name} must be 2 or more, got {getattr(args, name)}")
    check_training(parser, args)


def scales(args):
    """The values of eps of a clustering: looser and tighter beside the own for spcl's criteria."""
    gaps = (0, -args.eps_gap, args.eps_gap) if args.method == "spcl" else (0,)
    return [args.eps + gap for gap in gaps]


# The method


class Adaptation(nn.Module):
    """Encoder, memory and pseudo labels; `forward` is the loss of one batch of source (where there is one) and target.

    With several processes each passes its share of the images through the backbone. The features are gathered, the
    domains one after the other, so that BatchNorm, memory and triplets see the whole batch, as one process would.
    """

    def __init__(self, encoder, args, num_source, num_images):
        super().__init__()
        self.encoder, self.args, self.num_source = encoder, args, num_source
        self.num_domains = 2 if num_source else 1
        # -1: in no cluster.
        self.register_buffer("pseudo_labels", torch.full((num_images,), NOISE))
        width, memory = encoder.num_features, (args.memory_temperature, args.memory_momentum)
        self.memory = self.mixer = None
        if args.method == "cluster-contrast":
            self.memory = ClusterMemory(torch.zeros(1, width), *memory, args.memory_update)
        elif args.method == "spcl":
            self.memory = HybridMemory(torch.zeros(num_source + num_images, width), *memory)
        else:
            encoder.reset_classifier(num_source + num_images)
            self.mixer = Mixer(encoder.backbone, args.mix_stage)
        if num_source:
            self.split_norms()

    def split_norms(self):
        """Past the mixer there are three domains. BNNeck comes last."""
        before = self.mixer.norms_before(self.encoder.backbone) if self.mixer else ()
        all_of_them = 2 if self.mixer is None else 3
        split_norms(self.encoder, lambda name: 2 if name in before else all_of_them)
        if self.mixer:
            self.mixer.attach(self.encoder.backbone)

    def forward(self, images, rows):
        """`rows`: of the source their labels, of the target the numbers of the images after those."""
        features = self.encoder.backbone(images)
        parts = self.num_domains + (self.mixer is not None)
        features, rows = by_domain(features, parts), by_domain(rows, self.num_domains)
        with torch.autocast(images.device.type, enabled=False):
            bn_features, logits = self.encoder.neck(features.float())
            if self.mixer is not None:
                ratios = gather_with_gradient(self.mixer.ratios).float()
                loss, values = self.bridged_losses(features.float(), logits, rows, ratios)
            else:
                loss, values = self.memory_losses(bn_features, rows)
        values = {"loss": loss, **values}
        return loss, {name: value.detach() for name, value in values.items()}, bn_features.detach(), rows

    def classes(self, rows):
        """Of source rows their identity, of target rows the number of their cluster, after the identities."""
        if not self.num_source:
            return self.pseudo_labels[rows]
        target = self.pseudo_labels[(rows - self.num_source).clamp(min=0)] + self.num_source
        return torch.where(rows < self.num_source, rows, target)

    def memory_losses(self, bn_features, rows):
        places = self.classes(rows) if self.args.method == "cluster-contrast" else rows
        domains = zip(bn_features.chunk(self.num_domains), places.chunk(self.num_domains), strict=True)
        losses = [self.memory(*domain) for domain in domains]
        names = ("loss_source", "loss_target") if self.num_source else ("loss_target",)
        return torch.stack(losses).sum(), dict(zip(names, losses, strict=True))

    @torch.no_grad()
    def update_memory(self, bn_features, rows):
        if self.memory is not None:
            self.memory.update(bn_features, self.classes(rows) if self.args.method == "cluster-contrast" else rows)

    def bridged_losses(self, features, logits, rows, ratios):
        """IDM's losses; `ratios` (B, 2): what a mixed image has of its source and of its target image."""
        args, classes = self.args, self.classes(rows)
        logits = logits[:, : self.num_source + int(self.pseudo_labels.max()) + 1]
        own, mixed = logits[: len(classes)], logits[len(classes) :]
        source, target, between = features.chunk(3)
        loss_id = F.cross_entropy(own, classes, label_smoothing=args.label_smoothing)
        sides = torch.stack(
            [
                F.cross_entropy(mixed, side, label_smoothing=args.label_smoothing, reduction="none")
                for side in classes.chunk(2)
            ],
            dim=1,
        )
        # A label that learned would turn to the easier side; ratios learn by the mixed maps, the bridge, their spread.
        loss_mixed = (ratios.detach() * sides).sum(1).mean()
        loss_triplet = hard_triplet(features[: len(classes)], classes, args.margin)
        apart = torch.stack([(between - side).square().sum(1).clamp(min=1e-12).sqrt() for side in (source, target)], 1)
        loss_bridge = (ratios * apart).sum(1).mean()
        loss_diversity = -ratios.var(0, correction=0).clamp(min=1e-12).sqrt().sum()
        loss = (1 - args.mix_weight) * loss_id + args.mix_weight * loss_mixed + loss_triplet
        loss = loss + args.bridge_weight * loss_bridge + args.diversity_weight * loss_diversity
        return loss, {
            "loss_id": loss_id,
            "loss_mixed": loss_mixed,
            "loss_triplet": loss_triplet,
            "loss_bridge": loss_bridge,
            "loss_diversity": loss_diversity,
        }


def by_domain(tensor, num_domains):
    """The whole batch from each process's share of [domain, domain, ...], the domains one after the other."""
    size = len(tensor)
    whole = gather_with_gradient(tensor)
    return whole.unflatten(0, (len(whole) // size, num_domains, size // num_domains)).transpose(0, 1).flatten(0, 2)


# Pseudo labels


def start_epoch(run, sampler, epoch):
    """An epoch that begins has its images clustered; one that goes on has its labels from the checkpoint."""
    if run.state["batch"] == 0:
        renew_labels(run, epoch)
    labels = run.bare.pseudo_labels.cpu()
    if run.args.method == "spcl":
        # Images in no cluster are trained on too: in random groups.
        labels = in_groups(labels, run.args.images_per_id, f"{run.args.seed}/{epoch}")
    sampler.take(labels)
    run.model.train()


@torch.no_grad()
def renew_labels(run, epoch):
    """Clusters of the target as the model sees it now; memory or classifier follow them."""
    args, bare, state = run.args, run.bare, run.state
    first = epoch == 1
    # spcl clusters what its memory holds.
    features = bare.memory.prototypes[bare.num_source :] if args.method == "spcl" and not first else features_of(run)
    labels, _ = shared_labels(run, features, epoch - 1, strict=True)
    device = bare.pseudo_labels.device
    bare.pseudo_labels.copy_(labels)
    source = None
    if bare.num_source and first:
        source = class_means(run.extract(run.source, "source"), run.source_labels, bare.num_source).to(device)
    if args.method == "cluster-contrast":
        bare.memory.renew(features, labels)
    elif args.method == "spcl":
        if first:
            rows = [features.to(device)] if source is None else [source, features.to(device)]
            bare.memory.prototypes.copy_(torch.cat(rows))
        known = torch.arange(bare.num_source, device=device)
        bare.memory.labels.copy_(torch.cat([known, bare.num_source + singled_out(labels).to(device)]))
    else:
        weight = bare.encoder.classifier.weight
        if first:
            weight[: bare.num_source] = source
        known, count = labels >= 0, int(labels.max()) + 1
        weight[bare.num_source : bare.num_source + count] = class_means(features[known], labels[known], count).to(
            device
        )
    state["num_clusters"] = int(labels.max()) + 1


def features_of(run):
    return run.extract(run.target, "target")


def shared_labels(run, features, epoch, strict):
    """(labels, Clusters or None) of the target, equal everywhere: one process clusters and tells the others.

    `strict`: ValueError where there are too few clusters to train with.
    """
    args, accelerator, state = run.args, run.accelerator, run.state
    told_others, found = [None], None
    if accelerator.is_main_process:
        try:
            found = cluster(
                features.to(accelerator.device),
                eps=scales(args),
                min_samples=args.min_samples,
                k1=args.k1,
                k2=args.k2,
            )
            labels, threshold = found[0].labels, state.get("independence")
            if args.method == "spcl" and found[0].num_clusters:
                labels, threshold = reliable(*found, threshold)
            if strict:
                check_clusters(found[0], where=" + ".join(args.target))
            told_others = [(labels, threshold)]
        except ValueError as error:
            told_others = [str(error)]
    answer = broadcast_object_list(told_others)[0]
    if isinstance(answer, str):
        raise ValueError(f"before epoch {epoch + 1}: {answer}")
    labels, state["independence"] = answer
    record = {
        "epoch": epoch,
        "clusters": int(labels.max()) + 1,
        "noise": float((labels == NOISE).double().mean()),
        **(agreement(labels, run.truth) if run.truth is not None else {"ari": None, "nmi": None}),
    }
    # A run that goes on clusters the images of an epoch it has begun with once more, at its end.
    state["clusters"] = [one for one in state["clusters"] if one["epoch"] != epoch] + [record]
    accelerator.print(f"epoch {epoch}: {told(record)}")
    numbers = {f"clusters/{name}": value for name, value in record.items() if value is not None and name != "epoch"}
    accelerator.log(numbers, step=state["step"])
    if accelerator.is_main_process:
        with write_together(args.output_dir) as aside:
            aside("clusters.json").write_text(to_json(state["clusters"]))
    return labels, found and found[0]


# Training


@dataclass
class Run:
    """What the functions below share. `truth`, the target's true labels, is for the report alone."""

    args: argparse.Namespace
    accelerator: Accelerator
    source: datasets.Dataset
    source_labels: torch.Tensor
    target: datasets.Dataset
    truth: np.ndarray
    measured: list
    state: dict
    model: Adaptation

    @property
    def bare(self):
        """The Adaptation module without what accelerate puts around it."""
        return self.accelerator.unwrap_model(self.model)

    def extract(self, dataset, words):
        encoder = self.bare.encoder
        return extract(
            encoder,
            dataset,
            transform_of(encoder),
            accelerator=self.accelerator,
            batch_size=self.args.eval_batch_size,
            num_workers=self.args.dataloader_num_workers,
            desc=f"features of the {words}",
        )


def main(args):
    accelerator = start_accelerator(args)
    introduce(
        args,
        f"Demo: {args.method} on drawn people, from the shipped stand-in CLIP; about two minutes on two cores. "
        "For your own images: --target SPEC --data_root DIR --backbone DIR --recipe cluster-contrast",
        accelerator.print,
    )
    # What can be wrong with data and configuration shows before a model is loaded.
    if args.method == "idm" and accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise ValueError(
            "--method idm writes the clusters' means into its classifier before every epoch, behind DeepSpeed's back; "
            "start it without DeepSpeed"
        )
    target, truth, measurable = open_unlabelled(args.target, args.data_root, skip_unreadable=args.skip_unreadable)
    source, source_labels = None, torch.zeros(0, dtype=torch.int64)
    if args.source is not None:
        source, source_labels, _ = open_source(
            args.source, args.data_root, single_image_ids=args.single_image_ids, skip_unreadable=args.skip_unreadable
        )
    measured = open_targets(measurable, args.data_root, skip_unreadable=args.skip_unreadable)
    check_settings(len(target), scales(args), args.min_samples, args.k1, args.k2)
    batch_size = args.train_batch_size * accelerator.num_processes
    num_source = int(source_labels.max()) + 1 if source else 0
    run = Run(args, accelerator, source, source_labels, target, truth, measured, None, None)
    sampler = PseudoBatches(
        batch_size,
        args.images_per_id,
        args.steps_per_epoch or max(1, len(target) // batch_size),
        list(zip(both(run)["domain"], both(run)["camid"], strict=True)),
        source_labels=source_labels.tolist(),
        seed=args.seed,
        rank=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )
    path, run.state = open_state(
        args,
        "adapt_reid.py",
        effective_batch_size=batch_size,
        data=[digest_of(target, torch.zeros(0)), digest_of(source, source_labels) if source else None],
        free=FREE_ON_RESUME,
        say=accelerator.print,
    )
    run.state.setdefault("clusters", [])
    accelerator.print(
        f"{' + '.join(args.target)}: {len(target)} images without labels"
        + (f"; {' + '.join(args.source)}: {len(source)} images of {num_source} identities" if source else "")
        + f"; measured on {', '.join(one.spec for one in measured) or 'nothing'}"
    )

    set_seed(args.seed)
    encoder = ReIDModel.for_training(args.backbone, num_ids=0, image_size=tuple(args.resolution))
    if args.gradient_checkpointing:
        encoder.enable_gradient_checkpointing()
    run.model = Adaptation(encoder, args, num_source, len(target))
    share_batch_statistics(encoder.backbone, accelerator.device)
    # The target's labels are nowhere to be found in a batch.
    labels = source_labels.tolist() + [-1] * len(target)
    loader = build_loader(args, accelerator, encoder, both(run), labels, sampler)
    run.model, optimizer = accelerator.prepare(run.model, optimizer_of(args, run.model))
    num_steps = args.num_train_epochs * sampler.steps
    rates = rates_of(args, optimizer, num_steps)
    if path:
        if args.method == "cluster-contrast":
            run.bare.memory.make_room(run.state["num_clusters"])
        load_checkpoint(path, run.model, optimizer, accelerator=accelerator)
    write_arguments(args, accelerator, "diffreid-adapt")
    rerank = args.rerank_k1, args.rerank_k2

    def measure_all(epoch):
        measure(args, accelerator, run.state, run.bare.encoder, measured, epoch, rerank)

    if not path:
        measure_all(0)
    params = trained(run.model)
    stopped_at = train_epochs(
        args,
        accelerator,
        run.state,
        loader,
        sampler,
        rates,
        kept=run.model,
        optimizer=optimizer,
        num_steps=num_steps,
        step=lambda batch: training_step(run, batch, optimizer, params),
        measure=measure_all,
        before=partial(start_epoch, run, sampler),
        rows=partial(name_images, accelerator, both(run)),
    )
    if stopped_at:
        accelerator.print(f"SIGTERM: {stopped_at} is written; go on with --resume_from_checkpoint latest")
    else:
        finish(run)
    accelerator.end_training()
    return EXIT_SIGTERM if stopped_at else 0


def training_step(run, batch, optimizer, params):
    """Losses, gradients, the optimiser's step, then the memory."""
    args, accelerator, bare = run.args, run.accelerator, run.bare
    images, labels, rows = (batch[name].to(accelerator.device) for name in ("images", "labels", "indices"))
    if run.source is not None:
        # Of the source the identity counts, of the target the image.
        rows = torch.where(rows < len(run.source), labels, rows - len(run.source) + bare.num_source)
    loss, values, bn_features, rows = run.model(images, rows)
    accelerator.backward(loss)
    norm = accelerator.clip_grad_norm_(params, args.max_grad_norm or float("inf"))
    optimizer.step()
    optimizer.zero_grad()
    bare.update_memory(bn_features, rows)
    return {"grad_norm": torch.as_tensor(0.0 if norm is None else norm, device=loss.device), **values}


# What the training is made of


def both(run):
    """Source and target as one data set, the source first."""
    if run.source is None:
        return run.target
    columns = run.target.column_names
    return datasets.concatenate_datasets([run.source.select_columns(columns), run.target])


# Results


def finish(run):
    """The trained model, its card, the page, the table."""
    args, encoder, state = run.args, run.bare.encoder, run.state
    features = features_of(run)
    ended = state["epoch"] if state["batch"] else state["epoch"] - 1
    labels, found = shared_labels(run, features, ended, strict=False)
    run.accelerator.wait_for_everyone()
    if not run.accelerator.is_main_process:
        return
    final = results(state["history"])
    title = f"{args.method} trained on {' + '.join(args.target)}"
    title += f" from {' + '.join(args.source)}" if run.source else ""
    join_norms(encoder)
    encoder.reset_classifier(0)
    card = save_model(args, "adapt_reid.py", encoder, title, final["targets"], {"images": len(run.target)})
    write_page(run, final["history"], found, labels, features)
    say_goodbye(args, encoder, card, final["history"])


def write_page(run, history, found, labels, features):
    args, output_dir = run.args, Path(run.args.output_dir)
    facts = [
        ("Target", " + ".join(args.target)),
        ("Images", f"{len(run.target):,}"),
        ("Start", Path(args.backbone).name),
        ("Steps", f"{run.state['step']:,}"),
        ("Batch", run.state["arguments"]["effective_batch_size"]),
        ("Clusters", told(run.state["clusters"][-1])),
        ("Seed", args.seed),
    ]
    if run.source is not None:
        facts.insert(0, ("Source", f"{' + '.join(args.source)}, {len(run.source):,} images"))
    page = training_report(
        f"{args.setting.capitalize()}: {args.method}",
        output_dir,
        history,
        lead="A Re-ID model, measured before and after it was trained on pseudo labels.",
        facts=facts,
    )
    add_clusters(page, run.state["clusters"], found)
    add_contact_sheet(page, run.target, labels, features, run.truth)
    with write_together(output_dir) as aside:
        page.write(aside("report.html"))


def run_script(args):
    end_with(main, args, "adapt_reid.py")


if __name__ == "__main__":
    run_script(parse_args())
