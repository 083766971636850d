# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "accelerate>=1.12.0", "bitsandbytes>=0.50.0", "datasets>=4.5.0", "diffusers>=0.38.0", "huggingface_hub>=1.20.0",
#     "jinja2>=3.1.4", "numpy>=2.1.0", "peft>=0.19.0", "Pillow>=11.0.0", "safetensors>=0.7.0",
#     "scikit-learn>=1.5.2", "scipy>=1.14.1", "torch>=2.11.0", "torchvision>=0.26.0", "tqdm>=4.67.0",
#     "transformers>=5.17.0", "triton>=3.6.0; sys_platform == 'linux'",
# ]
# ///
"""Fine-tune a Re-ID model with labels, by one of seven methods, from any start: where does a better start show?

    accelerate launch --config_file accelerate_config.yaml finetune_reid.py
    accelerate launch finetune_reid.py --recipe published --source ./people --output_dir output/people
    accelerate launch finetune_reid.py --method agw --recipe published --setting few-shot --fraction 0.1 \\
        --backbone output/pretrain/backbone --source market1501 --data_root ~/reid --output_dir output/agw-10

The first is a demo on drawn people with the shipped stand-in CLIP, about two minutes on two CPU cores; the second
trains on your own images; the third starts from a backbone of `pretrain_backbone.py`, with the values that AGW was
published with. What a method makes of the backbone's map, and its losses:

    bot  mean, BNNeck                                         classes, smoothed; hard triplets, margin 0.3; centres
    agw  non-local blocks, GeM, BNNeck                        classes, smoothed; weighted triplets; centres
    sbs  non-local blocks, GeM, BNNeck                        circle loss of classes, smoothed; hard triplets, soft
                                                              margin, of what comes after BNNeck
    mgn  3 branches, whole + 2 + 3 stripes, each to 256       mean of 8 class losses; of 3 hard triplets, margin 1.2
    bdb  mean to 512; without a rectangle, maximum to 1024    2 class losses, smoothed; 2 hard triplets, soft margin

With `--setting generalisation` several sources are trained on and others measured, VIPeR, GRID, PRID and iLIDS on the
means of ten splits; beside these methods there is then

    metabin  mean, BNNeck; a ResNet's norms are mixtures     as bot, without centres; after each step the mixtures
             of batch and instance norm                      follow what helps held-out sources, see methods/metabin.py
    meta     GeM; a ResNet with norms of each source, its    as bot, without centres, of each source and of all; a
             experts, mixed by gates, and a branch of all    source's expert teaches the gates, see methods/meta.py

    accelerate launch finetune_reid.py --recipe protocol-2 --method meta --data_root ~/reid --output_dir output/meta

is the published comparison: all images of Market-1501, CUHK02, CUHK03 and CUHK-SYSU to train on.

In a ResNet the last stage keeps its resolution (stride 1), but for MGN's global branch. Swin and CLIP compare all
places in every block, so AGW and SBS add no non-local blocks to them, and MGN's branches share their one map of
tokens, of which they pool the stripes. CLIP's class token stands in for GeM, BDB's mean and MGN's global branch;
Swin's maps have signs, so GeM takes their positive and negative parts apart. A reduction is never wider than the
backbone. Left out: SBS's AutoAugment, MGN's mirrored images at test time. Results are those of the last epoch; most
published ones are those of the epoch that is best on the test set.
"""

import argparse
import math

from methods import generalisation
from methods.generalisation import EPOCH_COSINE, META, METABIN
from methods.settings import check_reid_training
from utils import flags, ranges
from utils.flags import CLIP_DIR, RESNET_DIR
from utils.ranges import above_zero, at_least, fraction, not_negative

DEMO_SOURCE = "synthetic:domain=a,num_ids=64"
DEMO_SOURCES = [f"synthetic:domain={name},num_ids=24" for name in "abc"]
DEMO_TARGETS = ["synthetic:domain=d,num_ids=16", "synthetic:domain=e,num_ids=16"]
SETTINGS = ("supervised", "few-shot", "small-scale", "generalisation")
PARTS = ("few-shot", "small-scale")
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
    META: {"triplet": "hard", "margin": 0.3, "label_smoothing": 0.1, "groups": "sum", "centre_weight": 0.0},
}
METHODS = tuple(LOSSES)
# Defaults of a method without a recipe. SBS is also how it is trained, at any size.
USUAL = {
    "sbs": {"lr_scheduler": DELAYED_COSINE, "lr_warmup_steps": 16, "lr_delay_epochs": 4, "freeze_steps": 16},
    METABIN: generalisation.DEMO,
    META: generalisation.DEMO,
}
STANDINS = {CLIP_DIR: "CLIP", RESNET_DIR: "ResNet, trained on domains f, g and h"}
BAG_OF_TRICKS = {
    "source": ["market1501"], "backbone": "microsoft/resnet-50", "resolution": [256, 128], "padding": 10,
    "erasing": 0.5, "train_batch_size": 64, "images_per_id": 4, "num_train_epochs": 120, "optimizer": "adam",
    "learning_rate": 3.5e-4, "lr_scheduler": "warmup_multistep", "lr_warmup_epochs": 10, "lr_warmup_factor": 0.01,
    "lr_milestones": [40, 70], "adam_weight_decay": 5e-4, "eval_every": 10, "log_every": 10,
    "checkpointing_steps": 1000, "dataloader_num_workers": 8,
}  # fmt: skip
PUBLISHED = {
    "bot": BAG_OF_TRICKS,
    "agw": BAG_OF_TRICKS,
    "sbs": BAG_OF_TRICKS | {
        "resolution": [384, 128], "images_per_id": 16, "num_train_epochs": 60, "lr_scheduler": DELAYED_COSINE,
        "lr_warmup_steps": 2000, "lr_warmup_factor": 0.1, "lr_delay_epochs": 30, "lr_final_factor": 0.002,
        "freeze_steps": 1000,
    },
    "mgn": BAG_OF_TRICKS | {
        "resolution": [384, 128], "padding": 0, "erasing": 0.0, "num_train_epochs": 80, "optimizer": "sgd",
        "learning_rate": 0.01, "lr_warmup_epochs": 0, "lr_milestones": [40, 60],
    },
    "bdb": BAG_OF_TRICKS | {
        # The authors' 400 epochs have four images of each identity, of Market-1501 about a quarter.
        "resolution": [384, 128], "padding": 0, "train_batch_size": 128, "num_train_epochs": 100,
        "learning_rate": 1e-3, "lr_warmup_epochs": 13, "lr_warmup_factor": 0.1, "lr_milestones": [50, 75],
    },
    METABIN: BAG_OF_TRICKS | generalisation.PUBLISHED[METABIN],
    META: BAG_OF_TRICKS | generalisation.PUBLISHED[META],
}  # fmt: skip


def recipes_of(method):
    published = PUBLISHED.get(method, {})
    return {
        "published": published,
        "protocol-2": published | generalisation.PROTOCOL_2,
        METABIN: PUBLISHED[METABIN] | {"method": METABIN},
        META: PUBLISHED[META] | {"method": META},
    }


DEMO_WORDS = (
    "Demo: {} on drawn people, from the shipped stand-in {}; about two minutes on two cores. "
    "For your own data: --source SPEC --data_root DIR --backbone DIR --recipe published"
)
STAND_IN = (
    "No --backbone or --recipe given: using the shipped stand-in {}, which knows drawn people only. "
    "A real one: --backbone microsoft/resnet-50"
)


def build_parser():
    parser = flags.Parser(__doc__, recipes=recipes_of("bot"))
    parser.add("--method", choices=METHODS, default="bot", help="method; its losses are set with it")
    flags.add_recipe(
        parser,
        "published: the method's published values, Market-1501 and an ImageNet ResNet-50; protocol-2: the same, but "
        "four sources, all their images, and four small sets to measure on; metabin, meta: protocol-2 of these "
        "methods, without --method",
    )
    data = flags.add_data(
        parser,
        source=f"training sets; default {DEMO_SOURCE}",
        target="sets with query and gallery to measure on; default the sources' own, or see --holdout",
    )
    flags.add_single_image_ids(data)
    flags.add_holdout(data)
    data.add(
        "--setting",
        choices=SETTINGS,
        default="supervised",
        help="supervised: all images; few-shot: --fraction of each identity's images, at least 2; small-scale: "
        "--fraction of the identities; generalisation: several sources, other targets. With one seed, smaller parts "
        "lie inside larger ones",
    )
    data.add("--fraction", type=ranges.share, help="of few-shot and small-scale, above 0, at most 1; default 0.1")
    data.add("--fraction_seed", type=at_least(0), default=0, help="another seed takes another part")
    flags.add_images(parser, resolution=[128, 64], padding=5, erasing=0.0)

    group = parser.group("model and losses")
    group.add(
        "--backbone",
        default=CLIP_DIR,
        help="model to start from, folder, Hub id, short name or file of weights: a backbone, such as backbone/ of "
        "pretrain_backbone.py, or a ReIDModel of bot or of the same method",
    )
    group.add(
        "--semantic_weight",
        type=fraction,
        help="of a backbone/ of pretrain_backbone.py --objective solider: another weight than that of the folder",
    )
    group.add("--triplet", choices=["hard", "weighted"], help="triplet loss; default by the method, see above")
    words = "of hard triplets, a number or `soft`; default by the method"
    group.add("--margin", type=ranges.or_word(not_negative, SOFT), help=words)
    group.add("--label_smoothing", type=fraction, help="of the class loss; default 0.1, of mgn 0")
    group.add(
        "--groups",
        choices=["sum", "mean"],
        idle=(lambda args: args.method == META, f"--method {META}"),
        help="of a method with several features: their losses' sum, or mean (mgn)",
    )
    group.add("--triplet_weight", type=not_negative, default=1.0, help="weight beside the class loss")
    group.add(
        "--centre_weight",
        type=not_negative,
        help="weight of the distance to the identity's centre; default 5e-4 of bot and agw, else 0",
    )
    sbs = (lambda args: args.method != "sbs", lambda args: f"--method {args.method}")
    group.add("--circle_scale", type=above_zero, default=64.0, idle=sbs, help="of sbs")
    group.add("--circle_margin", type=fraction, default=0.35, idle=sbs, help="of sbs")

    generalisation.add_flags(parser)
    group = flags.add_training(parser, batch=32, epochs=8, accumulation=flags.ONE_PASS)
    group.add("--freeze_steps", type=at_least(0), default=0, help="first steps in which the backbone does not train")
    group = flags.add_optimizer(parser, learning_rate=3e-4, weight_decay=5e-4)
    group.switch(
        "--nesterov",
        "of sgd",
        idle=(lambda args: args.optimizer != "sgd", lambda args: f"--optimizer {args.optimizer}"),
    )
    group = flags.add_schedule(parser, milestones=[7], own=[DELAYED_COSINE, EPOCH_COSINE])

    def scheduled(*names):
        return lambda args: args.lr_scheduler not in names, lambda args: f"--lr_scheduler {args.lr_scheduler}"

    group.add(
        "--lr_delay_epochs",
        type=at_least(0),
        default=0,
        idle=scheduled(DELAYED_COSINE),
        help="delayed_cosine (of SBS): flat epochs",
    )
    group.add(
        "--lr_final_factor",
        type=fraction,
        default=0.01,
        idle=scheduled(DELAYED_COSINE, EPOCH_COSINE),
        help="delayed_cosine, epoch_cosine (of META): factor at the end",
    )
    flags.add_memory(parser, compiled="the blocks of the backbone; not of metabin and meta")
    flags.add_evaluation(parser, every=1, resample=True)
    flags.add_output(parser, "output/finetune")
    return parser


def parse_args(input_args=None):
    parser = build_parser()
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--method")
    first.add_argument("--recipe")
    given = first.parse_known_args(input_args)[0]
    method = given.method or (given.recipe if given.recipe in (METABIN, META) else "bot")
    # A name that is none is refused below.
    parser.set_defaults(**LOSSES.get(method, {}), **USUAL.get(method, {}))
    args = parser.parse(input_args, recipes_of(method))
    args.demo = args.source is None and args.target is None
    if args.origin["lr_delay_epochs"] == "default":
        args.lr_delay_epochs = min(args.lr_delay_epochs, args.num_train_epochs - 1)
    if args.demo and args.setting == "generalisation":
        args.source, args.target = DEMO_SOURCES, DEMO_TARGETS
    args.source = args.source or [DEMO_SOURCE]
    if args.setting in PARTS and args.fraction is None:
        args.fraction = 0.1
    check_args(parser, args)
    args.notes = parser.notes(args)
    return args


def check_args(parser, args):
    """What the arguments alone show to be wrong."""
    if args.fraction is not None and args.setting not in PARTS:
        parser.error(f"--fraction {args.fraction} belongs to --setting few-shot or small-scale")
    generalisation.check_args(parser, args)
    if args.nesterov and not args.adam_beta1:
        parser.error("--nesterov needs momentum, --adam_beta1 above 0")
    for name in ("train_batch_size", "images_per_id"):
        if getattr(args, name) < 2:
            parser.error(
                f"--{name} must be 2 or more, got {getattr(args, name)}: BatchNorm has no statistics of one image, "
                "and a triplet takes two images of an identity"
            )
    if args.centre_weight and args.method in ("mgn", "bdb"):
        parser.error(f"--centre_weight {args.centre_weight} is for one feature an image; {args.method} has several")
    if args.torch_compile and args.method in (METABIN, META):
        parser.error(
            f"--torch_compile: {args.method} changes its norms from step to step, which would be compiled again and "
            "again; leave it out"
        )
    if args.triplet == "weighted" and args.margin != SOFT:
        parser.error(f"--margin {args.margin} is of --triplet hard; the weighted one has none, use --margin soft")
    check_reid_training(parser, args)
    if args.lr_scheduler == DELAYED_COSINE and args.lr_delay_epochs >= args.num_train_epochs:
        parser.error(
            f"--lr_delay_epochs {args.lr_delay_epochs} leaves no epoch of {args.num_train_epochs} for the cosine"
        )


if __name__ == "__main__":
    # Before torch and transformers are imported, so that --help and a mistyped flag answer at once.
    args = parse_args()

import random
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from torch import nn

from methods.meta import DomainBatches, Meta, cosine_after_warmup
from methods.metabin import BIAS_RATE, MetaBatches, balance
from utils import launch
from utils.batches.augmentation import AutoAugmentTransform, training_loader
from utils.batches.samplers import IdentitySampler
from utils.datasets.load import digest_of, labels_of, subset
from utils.evaluation.targets import open_sets
from utils.files import portable
from utils.launch import gather_with_gradient, splitter, whole_weights
from utils.modeling.folder import card_text
from utils.modeling.losses import CentreLoss, circle_logits, hard_triplet, weighted_triplet
from utils.modeling.names import check_start
from utils.modeling.networks.semantic_swin import set_semantic_weight
from utils.modeling.norms import add_batch_instance_norms, share_batch_statistics
from utils.modeling.reid_model import ReIDModel
from utils.modeling.stages import compile_blocks
from utils.training.loop import Training, norm_of, optimizer_of, rates_of, trained
from utils.training.parameter_groups import bias_groups

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


def main(args):
    # Of meta, a step leaves the experts of other domains out.
    unused = args.freeze_steps > 0 or args.method == META
    accelerator = launch.start_training(args, find_unused_parameters=unused, fsdp=True)
    standin = STANDINS.get(args.backbone)
    words = {"demo": DEMO_WORDS.format(args.method, standin or Path(args.backbone).name)}
    launch.introduce(args, accelerator, **words, stand_ins=standin and STAND_IN.format(standin))
    # What can be wrong with data and configuration shows before a model is loaded.
    family = check_start(args.backbone, args.method, args.semantic_weight)
    generalisation.check_start(args.method, args.backbone, family, owner=splitter(accelerator))
    batch_size = launch.global_batch_size(args, accelerator)
    options = {"root": args.data_root, "skip_unreadable": args.skip_unreadable, "say": accelerator.print}
    options |= {"holdout": args.holdout, "single_image_ids": args.single_image_ids}
    options |= {"least_left": least_left(args, batch_size), "all_splits": args.setting == "generalisation"}
    args.source, train, labels, targets = open_sets(args.source, args.target, **options)
    num_all, (train, labels) = len(train), part_of(args, train, labels)
    domains = domains_of(args, train)
    sampler = build_sampler(args, accelerator, train, labels, domains, batch_size)
    options = {"script": "finetune_reid.py", "data": digest_of(train, labels), "batch_size": batch_size}
    training = Training(args, accelerator, sampler, train, **options)
    num_ids = int(labels.max()) + 1
    accelerator.print(
        f"{' + '.join(args.source)}, {args.setting}: {len(train)} of {num_all} images, {num_ids} identities; "
        f"measured on {', '.join(target.spec for target in targets) or 'nothing'}"
    )

    id_domains = torch.zeros(num_ids, dtype=torch.int64).scatter(0, labels, domains)
    model = build_model(args, accelerator, num_ids, id_domains)
    workers = {"num_workers": args.dataloader_num_workers, "pin_memory": accelerator.device.type == "cuda"}
    changes = {"padding": args.padding, "erasing": args.erasing, "transform": transform_of(args, model)}
    loader = training_loader(model, train, labels.tolist(), sampler, **changes, **workers)
    bare = Meta(model, args, id_domains) if args.method == META else FineTuning(model, args)
    # MGN calls layers inside a block.
    networks = [] if args.method == "mgn" else [model.backbone]
    method, optimizer = launch.prepare(accelerator, bare, networks, lambda: optimizer_of(args, groups_of(args, model)))
    schedule = own_schedule(args, sampler.steps_of(1))
    training.begin(method, optimizer, rates_of(args, optimizer, training.num_steps, schedule))
    params = trained(method)

    if not training.resumed:
        training.measure(0, model, targets)
    for epoch in training.epochs():
        method.train()
        for batch in training.batches(loader):
            values = training_step(training, method, bare, batch, params)
            if args.method == METABIN:
                values |= balance(training, model, batch, domains)
            training.log(values)
        if training.measures(epoch):
            training.measure(epoch, model, targets)
    if not training.stopped:
        with whole_weights(method, accelerator):
            if accelerator.is_main_process:
                model.save_pretrained(Path(args.output_dir) / "model", card=card_of(args, training, model))
    return training.end(
        lambda: report_of(args, training, num_ids),
        upload=lambda repo_id: model.push_to_hub(repo_id, card=card_of(args, training, model)),
    )


def training_step(training, method, bare, batch, params):
    """Losses, gradients, the optimizer's step, then the centres."""
    args, accelerator, optimizer = training.args, training.accelerator, training.optimizer
    # Of metabin, the images of its meta-step come after the batch.
    images, labels = (
        batch[name][: args.train_batch_size].to(accelerator.device, non_blocking=True) for name in ("images", "labels")
    )
    # The same draw on every process, and again after a resume.
    rng = random.Random(f"step/{args.seed}/{training.step}")
    frozen = training.step < args.freeze_steps
    # Neither DeepSpeed nor FSDP2 does so by itself.
    with accelerator.autocast():
        loss, values, compared, labels = method(images, labels, rng=rng, frozen=frozen)
    accelerator.backward(loss)
    if frozen and splitter(accelerator) == "FSDP":
        # Its gradients belong to other tensors than those that rested in the forward pass.
        bare.model.backbone.zero_grad()
    norm = accelerator.clip_grad_norm_(params, args.max_grad_norm or float("inf"))
    optimizer.step()
    optimizer.zero_grad()
    if bare.centres is not None:
        bare.centres.update(compared[0], labels)
    if args.method == META:
        bare.learn_all()
    return {"grad_norm": norm_of(norm, loss.device), **values}


# What the training is made of


def least_left(args, batch_size):
    """The identities that a batch needs, or that must be there so that a fraction of them fills a batch."""
    needed = math.ceil(batch_size / args.images_per_id)
    return math.ceil(needed / args.fraction) if args.setting == "small-scale" else needed


def build_sampler(args, accelerator, train, labels, domains, batch_size):
    if batch_size < 2 * args.images_per_id:
        raise ValueError(
            f"a batch of {batch_size} images, {args.images_per_id} of each identity, holds one identity: a triplet "
            "takes two; raise --train_batch_size or lower --images_per_id"
        )
    share = accelerator.process_index, accelerator.num_processes
    if args.method == META:
        return DomainBatches(labels.tolist(), train["domain"][:], batch_size, args.images_per_id, args.seed, *share)
    sampler = IdentitySampler(labels.tolist(), batch_size, args.images_per_id, args.seed, *share)
    if args.method != METABIN:
        return sampler
    each = max(2, batch_size // args.images_per_id // (int(domains.max()) + 1))
    return MetaBatches(sampler, labels.tolist(), train["domain"][:], each, args.images_per_id, args.seed)


def build_model(args, accelerator, num_ids, id_domains):
    set_seed(args.seed)
    head = "bot" if args.method == METABIN else args.method
    options = {"domains": id_domains.bincount().tolist(), "gate": args.meta_gate} if args.method == META else None
    sizes = {"num_ids": num_ids, "image_size": tuple(args.resolution), "resample": args.test_resample}
    model = ReIDModel.for_training(args.backbone, method=head, head_options=options, **sizes)
    launch.print_notes(accelerator, model.notes)
    if args.semantic_weight is not None:
        set_semantic_weight(model.backbone, args.backbone, args.semantic_weight)
    if args.method == METABIN:
        add_batch_instance_norms(model.backbone)
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if args.torch_compile:
        compile_blocks(model.backbone, model.head)
    # The necks see the gathered batch anyway.
    for part in (model.backbone, *(getattr(model.head, name, None) for name in ("branches", "branch", "bottleneck"))):
        if part is not None:
            share_batch_statistics(part, accelerator.device)
    if accelerator.device.type == "cuda":
        model.to(accelerator.device, memory_format=torch.channels_last)
    return model


def groups_of(args, model):
    """Parameters for the optimizer: MetaBIN's biases are faster, META's do not decay."""
    if args.method not in (METABIN, META):
        return [{"params": trained(model)}]
    rate = {"lr": BIAS_RATE * args.learning_rate} if args.method == METABIN else {"weight_decay": 0.0}
    return bias_groups(model.named_parameters(), **rate)


def transform_of(args, model):
    """The transform of training images, where it is not the usual one."""
    if args.method != META or not (args.auto_augment or args.colour_jitter):
        return None
    changes = {"auto": args.auto_augment, "jitter": args.colour_jitter, "padding": args.padding}
    normal = model.image_size, model.image_mean, model.image_std
    return AutoAugmentTransform(*normal, **changes, erasing=args.erasing)


def own_schedule(args, steps_per_epoch):
    if args.lr_scheduler == EPOCH_COSINE:
        return lambda epoch, step: cosine_after_warmup(epoch, step, args, steps_per_epoch)
    return (lambda epoch, step: delayed_cosine(epoch, step, args)) if args.lr_scheduler == DELAYED_COSINE else None


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


def card_of(args, training, model):
    title = f"{args.method.upper()} fine-tuned on {' + '.join(portable(args.source))}"
    return training.card(title, card_text(model), identities=model.num_ids)


def report_of(args, training, num_ids):
    setting = args.setting if args.fraction is None else f"{args.setting}, {100 * args.fraction:g} %"
    return training.report(
        f"Fine-tuning: {args.method.upper()}",
        "A Re-ID model, trained with labels",
        [
            ("Source", " + ".join(portable(args.source))),
            ("Setting", setting),
            ("Images", f"{len(training.images):,} of {num_ids:,} identities"),
            ("Start", Path(args.backbone).name),
        ],
    )


def run_script(args):
    launch.end_with(main, args, "finetune_reid.py")


if __name__ == "__main__":
    run_script(args)
