"""Pre-train a backbone on many people, most of them generated, so that re-identification starts better.

    accelerate launch --config_file accelerate_config.yaml pretrain_backbone.py
    accelerate launch pretrain_backbone.py --recipe diff-person --source DIFF_PERSON --output_dir output/pretrained

The first is a demo on drawn people; the second the published pre-training of a ResNet-50 on the folder or Hub id of a
set that `filter_generated.py` wrote. What comes out is `backbone/`, a plain `transformers` folder: a start for
`train_dcac.py --backbone` and `finetune_reid.py --backbone`, and a model for `evaluate.py --model`.

--objective classification, one class an identity, of images x with identities y:

    x' = share x + (1 - share) x_other           Mixup; CutMix pastes a box instead; share is drawn once a step
    L  = share CE(W f(x'), y) + (1 - share) CE(W f(x'), y_other)                       labels smoothed

--objective dino, without labels, of two crops of the whole and several of parts of each image:

    p_teacher = softmax((g_teacher(whole) - centre) / t_teacher)    centre: running mean of what the teacher says
    p_student = softmax(g_student(crop) / t_student)                teacher: running mean of the student
    L = mean over wholes and other crops of CE(p_teacher, p_student)
"""

import argparse
import math
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import datasets
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DistributedType, send_to_device, set_seed
from huggingface_hub import HfApi
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from utils.batches.augmentation import MultiCrop, RandAugmentTransform
from utils.batches.images import ReIDImages
from utils.batches.mixing import Mixing, mix_images, mixed_loss
from utils.batches.samplers import RemainingBatches, ShuffleSampler
from utils.batches.streaming import StreamedImages, StreamLoader, open_stream
from utils.batches.transforms import test_transform
from utils.datasets.load import labels_of, subset
from utils.datasets.training_sets import digest_of, open_source
from utils.evaluation.targets import measure_targets, open_targets, results
from utils.files import portable, run_record, to_json, write_together
from utils.flags import check_ranges, describe_origin, parse_with_recipes
from utils.launch import EXIT_SIGTERM, end_with, global_batch_size, start_accelerator, tracked
from utils.modeling.backbones import ClipBackbone
from utils.modeling.folder import training_card, write_backbone_folder
from utils.modeling.names import NAMED, check_backbone, open_backbone
from utils.modeling.norms import share_batch_statistics
from utils.modeling.reid_model import ReIDModel
from utils.reporting.report import text_table
from utils.training.checkpoints import load_checkpoint, open_state
from utils.training.loop import name_images, train_epochs
from utils.training.optimizer import LearningRate, build_optimizer, parameter_groups
from utils.training.pretraining_report import draw_batch, write_page
from utils.training.report import before_and_after

DEMO_SOURCE = [f"synthetic:domain={domain},num_ids=64" for domain in "acde"]
DEMO_TARGET = "synthetic:domain=b"
PUBLISHED = {
    "backbone": "resnet50",
    "from_scratch": True,
    "resolution": [256, 128],
    "train_batch_size": 512,
    "num_train_epochs": 300,
    "learning_rate": 4e-3,
    "adam_weight_decay": 0.05,
    "lr_warmup_epochs": 20,
    "mixup": 0.8,
    "cutmix": 1.0,
    "randaugment_ops": 2,
    "randaugment_magnitude": 9,
    "erasing": 0.25,
    "padding": 10,
    "eval_every": 10,
    "log_every": 10,
    "checkpointing_steps": 1000,
    "dataloader_num_workers": 8,
    "mixed_precision": "bf16",
}
RECIPES = {
    "diff-person": PUBLISHED,
    # What DINO's authors give for a batch of 1024, the rate in proportion to ours.
    "diff-person-dino": PUBLISHED
    | {
        "objective": "dino",
        "backbone": "swin-t",
        "num_train_epochs": 100,
        "train_batch_size": 256,
        "learning_rate": 5e-4,
        "adam_weight_decay": 0.04,
        "weight_decay_end": 0.4,
        "lr_warmup_epochs": 10,
        "local_crops": 8,
        "colours": 1.0,
        "prototypes": 65536,
        "head_width": 2048,
        "teacher_temperature": 0.07,
        "teacher_warmup_epochs": 30,
        "teacher_momentum": 0.996,
        "max_grad_norm": 3.0,
    },
}
CARD = (
    "A backbone pre-trained on images of people, a start for person re-identification; `backbone/` is a plain "
    "`transformers` folder. Finding people again across cameras is surveillance: use it only where the law and the "
    "people concerned allow it."
)
# What may differ from the checkpoint's run without changing what it trains.
FREE_ON_RESUME = (
    "output_dir", "data_root", "resume_from_checkpoint", "checkpointing_steps", "checkpoints_total_limit",
    "log_every", "report_to", "dataloader_num_workers", "max_train_steps", "eval_batch_size", "recipe", "push_to_hub",
    "hub_model_id", "gradient_checkpointing", "demo", "origin",
)  # fmt: skip


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    yes, either = {"action": "store_true"}, {"action": argparse.BooleanOptionalAction, "default": None}
    size = {"type": int, "nargs": 2, "metavar": ("HEIGHT", "WIDTH")}
    area = {"type": float, "nargs": 2, "metavar": ("LEAST", "MOST")}
    parser.add_argument(
        "--recipe",
        choices=RECIPES,
        help="published values: diff-person, identity classification of a ResNet-50 for 300 epochs; diff-person-dino, "
        "DINO's own values on a Swin-T; any flag given wins",
    )

    group = parser.add_argument_group("data")
    group.add_argument("--source", nargs="+", metavar="SPEC", help=f"training sets; default {' '.join(DEMO_SOURCE)}")
    group.add_argument(
        "--target",
        nargs="+",
        metavar="SPEC",
        help=f"sets with query and gallery to measure the features on; default {DEMO_TARGET} in the demo, else none",
    )
    group.add_argument("--data_root", help="folder in which the benchmarks lie")
    group.add_argument("--image_fraction", type=float, help="keep this share of each identity's images; default all")
    group.add_argument("--identity_fraction", type=float, help="keep this share of the identities; default all")
    group.add_argument(
        "--fraction_seed", type=int, default=0, help="which part; small ones lie in large ones; default 0"
    )
    group.add_argument("--resolution", **size, default=[64, 32], help="of the backbone's input; default 64 32")
    group.add_argument(
        "--streaming",
        **yes,
        help="read images from the Hub, or from a folder of parquet files or images with metadata, only as they are "
        "needed; the order then depends on the numbers of processes and workers",
    )
    group.add_argument("--skip_unreadable", **yes, help="leave out images that do not decode, and list them")
    group.add_argument("--dataloader_num_workers", type=int, default=0, help="that prepare images; default 0")

    group = parser.add_argument_group("model")
    group.add_argument(
        "--backbone",
        default="resnet-small",
        help=f"{', '.join(NAMED)}, a folder, Hub id or ReIDModel; default resnet-small",
    )
    group.add_argument(
        "--from_scratch",
        **either,
        help="only the configuration of --backbone, with random weights; default for resnet-small and in the recipes",
    )

    group = parser.add_argument_group("objective")
    group.add_argument(
        "--objective",
        choices=["classification", "dino"],
        default="classification",
        help="see above; default classification",
    )
    group.add_argument(
        "--ema_decay", type=float, help="of a running mean of the weights, which is then the result; default: none"
    )
    group.add_argument("--layer_decay", type=float, default=1.0, help="factor on the rate, block by block; default 1")
    group.add_argument("--label_smoothing", type=float, default=0.1, help="classification; default 0.1")
    group.add_argument("--mixup", type=float, default=0.0, help="classification: alpha of Mixup; default 0, none")
    group.add_argument("--cutmix", type=float, default=0.0, help="classification: alpha of CutMix; default 0, none")
    group.add_argument("--randaugment_ops", type=int, default=2, help="classification: changes an image; default 2")
    group.add_argument(
        "--randaugment_magnitude", type=int, default=9, help="classification: their strength, 0 to 30; default 9"
    )
    group.add_argument("--erasing", type=float, default=0.25, help="probability of random erasing; default 0.25")
    group.add_argument("--padding", type=int, default=3, help="pixels around, of which a crop is taken; default 3")
    group.add_argument("--local_crops", type=int, default=4, help="dino: crops of parts of an image; default 4")
    group.add_argument(
        "--local_resolution", **size, help="dino: of those, in pixels; default half of --resolution, of CLIP all of it"
    )
    group.add_argument(
        "--whole_area",
        **area,
        default=[0.4, 1.0],
        help="dino: share of the image in crops of the whole; default 0.4 1",
    )
    group.add_argument(
        "--local_area",
        **area,
        default=[0.05, 0.4],
        help="dino: share of the image in crops of parts; default 0.05 0.4",
    )
    group.add_argument(
        "--colours", type=float, default=0.25, help="dino: how much they are changed, by DINO itself 1; default 0.25"
    )
    group.add_argument(
        "--hidden_sides", type=float, default=0.0, help="dino: share of crops with noise for sides; default 0"
    )
    group.add_argument("--prototypes", type=int, default=512, help="dino: width of what is compared; default 512")
    group.add_argument("--head_width", type=int, default=256, help="dino: of the head's hidden layers; default 256")
    group.add_argument("--student_temperature", type=float, default=0.1, help="dino; default 0.1")
    group.add_argument("--teacher_temperature", type=float, default=0.04, help="dino; default 0.04")
    group.add_argument("--teacher_warmup_epochs", type=int, default=0, help="dino: of its rise from 0.04; default 0")
    group.add_argument("--teacher_momentum", type=float, default=0.99, help="dino: at first, 1 at last; default 0.99")
    group.add_argument("--centre_momentum", type=float, default=0.9, help="dino: what the centre keeps; default 0.9")
    group.add_argument(
        "--freeze_prototypes_epochs",
        type=int,
        default=1,
        help="dino: first epochs, in which the last layer stays; default 1",
    )

    group = parser.add_argument_group("training")
    group.add_argument("--train_batch_size", type=int, default=64, help="images a process and forward; default 64")
    group.add_argument("--gradient_accumulation_steps", type=int, default=1, help="forwards a step; default 1")
    group.add_argument("--num_train_epochs", type=int, default=12, help="default 12")
    group.add_argument("--max_train_steps", type=int, help="stop after so many steps; default: all epochs")
    group.add_argument("--learning_rate", type=float, default=2e-3, help="default 2e-3, for resnet-small")
    group.add_argument(
        "--lr_scheduler", choices=["cosine", "linear", "constant_with_warmup"], default="cosine", help="default cosine"
    )
    group.add_argument("--lr_warmup_epochs", type=int, default=1, help="of linear rise before it; default 1")
    group.add_argument("--adam_beta1", type=float, default=0.9, help="default 0.9")
    group.add_argument("--adam_beta2", type=float, default=0.999, help="default 0.999")
    group.add_argument("--adam_epsilon", type=float, default=1e-8, help="default 1e-8")
    group.add_argument("--adam_weight_decay", type=float, default=0.05, help="not on norms, biases; default 0.05")
    group.add_argument("--weight_decay_end", type=float, help="where it is at last, by a cosine; default where it was")
    group.add_argument("--max_grad_norm", type=float, default=0.0, help="clip gradients; default 0, never")
    group.add_argument("--use_8bit_adam", **yes, help="bitsandbytes' 8-bit optimiser")
    group.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], help="default accelerate's setting")
    group.add_argument("--allow_tf32", **yes, help="TF32 matrix products on Ampere and newer")
    group.add_argument("--gradient_checkpointing", **yes, help="recompute activations, less memory for more time")
    group.add_argument("--torch_compile", **yes, help="compile the backbone")
    group.add_argument("--seed", type=int, default=0, help="of weights, batches and augmentation; default 0")

    group = parser.add_argument_group("evaluation")
    group.add_argument("--eval_every", type=int, default=3, help="epochs between evaluations; default 3")
    group.add_argument("--eval_batch_size", type=int, default=64, help="images a process; default 64")
    group.add_argument(
        "--test_resample",
        choices=["bilinear", "bicubic"],
        default="bilinear",
        help="resizing of targets; default bilinear",
    )

    group = parser.add_argument_group("output")
    group.add_argument("--output_dir", default="output/pretrain", help="default output/pretrain")
    group.add_argument("--checkpointing_steps", type=int, default=500, help="steps between checkpoints; default 500")
    group.add_argument("--checkpoints_total_limit", type=int, default=2, help="how many are kept; default 2")
    group.add_argument(
        "--resume_from_checkpoint", help="`latest` (from 0 where there is none), a name such as checkpoint-500, a path"
    )
    group.add_argument("--log_every", type=int, default=1, help="steps between writes of log.jsonl; default 1")
    group.add_argument(
        "--report_to", nargs="+", default=["none"], help="tensorboard, wandb, trackio or others; default none"
    )
    group.add_argument("--push_to_hub", **yes, help="upload the backbone when done")
    group.add_argument("--hub_model_id", help="repository; default: the name of --output_dir")
    return parser


def parse_args(input_args=None):
    parser = build_parser()
    args, args.origin = parse_with_recipes(parser, RECIPES, input_args)
    args.demo = args.source is None and args.target is None and args.recipe is None
    if args.recipe and args.source is None:
        parser.error(f"--recipe {args.recipe} needs --source: the set of images to pre-train on")
    args.source = args.source or DEMO_SOURCE
    args.target = [DEMO_TARGET] if args.demo else args.target or []
    if args.from_scratch is None:
        args.from_scratch = args.backbone == "resnet-small"
    check_args(parser, args)
    return args


def check_args(parser, args):
    """All that can be told from the arguments alone."""
    check_ranges(
        parser,
        args,
        one_or_more=[
            "train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_train_steps", "eval_every",
            "eval_batch_size", "checkpointing_steps", "checkpoints_total_limit", "log_every", "prototypes",
            "head_width",
        ],
        positive=[
            "learning_rate", "adam_epsilon", "layer_decay", "student_temperature", "teacher_temperature",
            "image_fraction", "identity_fraction",
        ],
        not_negative=[
            "mixup", "cutmix", "randaugment_ops", "adam_weight_decay", "max_grad_norm", "dataloader_num_workers",
            "lr_warmup_epochs", "seed", "padding", "local_crops", "teacher_warmup_epochs", "freeze_prototypes_epochs",
            "weight_decay_end",
        ],
        fractions=[
            "image_fraction", "identity_fraction", "erasing", "label_smoothing", "ema_decay", "layer_decay",
            "teacher_momentum", "centre_momentum", "colours", "hidden_sides", "adam_beta1", "adam_beta2",
        ],
    )  # fmt: skip
    if args.streaming and len(args.source) > 1:
        parser.error(f"--streaming reads one source, got {len(args.source)}; merge them into one set first")
    if args.randaugment_magnitude not in range(31):
        parser.error(f"--randaugment_magnitude must be 0 to 30, got {args.randaugment_magnitude}")
    if min(args.resolution + (args.local_resolution or [])) < 8:
        parser.error("--resolution and --local_resolution must be at least 8 pixels")
    for name in ("whole_area", "local_area"):
        least, most = getattr(args, name)
        if not 0 < least <= most <= 1:
            parser.error(f"--{name} must be two shares of an image, above 0 and at most 1, got {least} {most}")
    if args.lr_warmup_epochs >= args.num_train_epochs:
        parser.error(
            f"--lr_warmup_epochs {args.lr_warmup_epochs} leaves nothing of --num_train_epochs {args.num_train_epochs}"
        )
    if args.train_batch_size == 1:
        parser.error("--train_batch_size 1: BatchNorm needs two images or more")
    if args.objective == "classification" and (args.mixup or args.cutmix) and args.train_batch_size % 2:
        parser.error(
            f"--train_batch_size {args.train_batch_size}: --mixup and --cutmix mix pairs of images; it must be even"
        )
    if args.objective == "dino" and args.ema_decay is not None:
        parser.error("--ema_decay is of classification; the result of dino is its teacher, see --teacher_momentum")
    if args.weight_decay_end is not None and not args.adam_weight_decay:
        parser.error("--weight_decay_end starts from --adam_weight_decay, which must be above 0")
    if args.objective == "dino" and not args.local_crops:
        parser.error("--local_crops must be 1 or more with --objective dino")


# The objectives


class Classification(nn.Module):
    """One class an identity; `forward` is the loss of a batch."""

    def __init__(self, backbone, num_ids, label_smoothing=0.1):
        super().__init__()
        self.backbone = backbone
        self.classifier = nn.Linear(backbone.num_features, num_ids)
        nn.init.trunc_normal_(self.classifier.weight, std=0.02)
        nn.init.zeros_(self.classifier.bias)
        self.loss = partial(F.cross_entropy, label_smoothing=label_smoothing)

    def forward(self, images, labels, mix):
        features = self.backbone(mix_images(images, mix))
        with torch.autocast(images.device.type, enabled=False):
            logits = self.classifier(features.float())
            loss = mixed_loss(self.loss, logits, labels, mix)
            hit = mixed_loss(share_right, logits, labels, mix)
        return loss, {"loss": loss.detach(), "accuracy": hit}


def share_right(logits, labels):
    return (logits.argmax(1) == labels).float().mean()


class SelfDistillation(nn.Module):
    """DINO's student: backbone, head and prototypes; `forward` is the loss of a batch against a teacher's scores.

    Prototypes and what they are compared with have unit length, as in DINO with a last layer of norm 1.
    """

    def __init__(self, backbone, prototypes, width, student_temperature=0.1):
        super().__init__()
        self.backbone, self.student_temperature = backbone, student_temperature
        # 256 of 2048, as published: in fewer dimensions the scores of few prototypes differ enough.
        bottleneck = max(2, width // 8)
        # A ResNet's features are nearly the same for all images at first, and scores that are so stay so: where the
        # backbone has norms of the batch, the head has them too.
        normed = any(isinstance(module, nn.BatchNorm2d) for module in backbone.modules())
        norms = [nn.BatchNorm1d(width) if normed else nn.Identity() for _ in range(2)]
        norms.append(nn.BatchNorm1d(bottleneck, affine=False) if normed else nn.Identity())
        self.head = nn.Sequential(
            *(nn.Linear(backbone.num_features, width, bias=not normed), norms[0], nn.GELU()),
            *(nn.Linear(width, width, bias=not normed), norms[1], nn.GELU()),
            *(nn.Linear(width, bottleneck, bias=not normed), norms[2]),
        )
        self.prototypes = nn.Linear(bottleneck, prototypes, bias=False)
        for layer in (*self.head, self.prototypes):
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        self.register_buffer("centre", torch.zeros(prototypes))

    def scores(self, crops):
        """Cosines with the prototypes: (B, crops, 3, H, W) -> (crops, B, prototypes) float32."""
        features = self.backbone(crops.flatten(0, 1))
        with torch.autocast(crops.device.type, enabled=False):
            code = F.normalize(self.head(features.float()), dim=1)
            scores = F.linear(code, F.normalize(self.prototypes.weight, dim=1))
        return scores.unflatten(0, crops.shape[:2]).transpose(0, 1)

    def forward(self, crops, teacher_scores, teacher_temperature):
        student = torch.cat([self.scores(crops["whole"]), self.scores(crops["parts"])])
        with torch.autocast(student.device.type, enabled=False):
            loss, entropy = distillation_loss(
                student, teacher_scores, self.centre, self.student_temperature, teacher_temperature
            )
        return loss, {"loss": loss.detach(), "teacher_entropy": entropy}


def distillation_loss(student, teacher, centre, student_temperature, teacher_temperature):
    """Scores of the student's crops, whole ones first, and of the teacher's: loss, and mean entropy of the teacher."""
    wanted = ((teacher - centre) / teacher_temperature).softmax(-1)
    told = (student / student_temperature).log_softmax(-1)
    # [teacher's crops, student's crops]: means over the batch; a crop is not compared with itself.
    losses = -torch.einsum("tbk,sbk->ts", wanted, told) / wanted.shape[1]
    itself = torch.eye(*losses.shape, dtype=torch.bool, device=losses.device)
    loss = losses.masked_fill(itself, 0.0).sum() / (losses.numel() - len(losses))
    return loss, torch.special.entr(wanted).sum(-1).mean()


# Training


@dataclass
class Run:
    """What the functions below share."""

    args: argparse.Namespace
    accelerator: Accelerator
    train: datasets.Dataset
    labels: torch.Tensor
    targets: list
    state: dict
    model: nn.Module
    # The running mean of the model: the teacher of dino, or that of --ema_decay, or None.
    average: nn.Module | None
    num_steps: int

    @property
    def bare(self):
        """The model without what accelerate puts around it."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def result(self):
        """The backbone that is measured and saved."""
        return (self.bare if self.average is None else self.average.module).backbone


def main(args):
    accelerator = start_accelerator(args)
    introduce(args, accelerator.print)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise ValueError("DeepSpeed has no use for a backbone of this size; train by DDP, without it")
    # What can be wrong with data and configuration shows before a model is loaded.
    check_backbone(args.backbone, args.from_scratch)
    train, labels, stream = open_train(args)
    targets = open_targets(args.target, args.data_root, skip_unreadable=args.skip_unreadable)
    batch_size = global_batch_size(args, accelerator)
    share = accelerator.process_index, accelerator.num_processes
    sampler = RemainingBatches(ShuffleSampler(len(train), batch_size, args.seed, *share))
    steps_an_epoch, free = len(sampler), FREE_ON_RESUME
    if stream is not None:
        # They decide which image comes when.
        args.num_processes = accelerator.num_processes
        free = [name for name in free if name != "dataloader_num_workers"]
    path, state = open_state(
        args,
        "pretrain_backbone.py",
        effective_batch_size=batch_size,
        data=digest_of(train, labels),
        free=free,
        say=accelerator.print,
    )
    accelerator.print(
        f"{' + '.join(args.source)}: {len(train)} images of {int(labels.max()) + 1} identities; "
        f"measured on {', '.join(target.spec for target in targets) or 'nothing'}"
    )

    model, average = build_model(args, accelerator, num_ids=int(labels.max()) + 1)
    transform, on_gpu = build_transform(args, model.backbone), accelerator.device.type == "cuda"
    workers = {"num_workers": args.dataloader_num_workers, "pin_memory": on_gpu}
    if stream is None:
        images = ReIDImages(train, transform, labels.tolist())
        keep = args.dataloader_num_workers > 0
        loader = DataLoader(images, batch_sampler=sampler, persistent_workers=keep, **workers)
    else:
        images = StreamedImages(
            stream, train, labels.tolist(), transform, batch_size=batch_size // share[1], seed=args.seed, share=share
        )
        loader = sampler = StreamLoader(images, steps_an_epoch, **workers)
    prepared, optimizer = accelerator.prepare(model, optimizer_of(args, model))
    run = Run(
        args, accelerator, train, labels, targets, state, prepared, average, steps_an_epoch * args.num_train_epochs
    )
    kept = nn.ModuleDict({"model": model} if average is None else {"model": model, "average": average})
    if path:
        load_checkpoint(path, kept, optimizer, accelerator=accelerator)
    if accelerator.is_main_process:
        with write_together(args.output_dir) as aside:
            aside("args.json").write_text(to_json(run_record(args)))
    accelerator.init_trackers("diffreid-pretrain", config=tracked(args))

    if not path:
        measure(run, 0)
    params = [parameter for parameter in model.parameters() if parameter.requires_grad]
    stopped_at = train_epochs(
        args,
        accelerator,
        state,
        loader,
        sampler,
        rates_of(args, optimizer, steps_an_epoch),
        kept=kept,
        optimizer=optimizer,
        num_steps=run.num_steps,
        step=partial(training_step, run, optimizer=optimizer, params=params),
        measure=partial(measure, run),
        before=lambda epoch: set_modes(args, model, average),
        rows=partial(name_images, accelerator, train),
    )
    if stopped_at:
        accelerator.print(f"SIGTERM: {stopped_at} is written; go on with --resume_from_checkpoint latest")
    else:
        finish(run)
    accelerator.end_training()
    return EXIT_SIGTERM if stopped_at else 0


def set_modes(args, model, average):
    """A teacher's norms look at the batch as its student's do, but nothing drops out of it."""
    model.train()
    if args.objective == "dino":
        for module in average.module.eval().modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train()


def training_step(run, batch, *, optimizer, params):
    """Losses and gradients of all passes, the optimiser's step, then the running mean."""
    args, accelerator, model = run.args, run.accelerator, run.model
    batch = send_to_device(batch, accelerator.device, non_blocking=True)
    if run.state["step"] == 0 and accelerator.is_main_process:
        encoder = ReIDModel(run.bare.backbone)
        draw_batch(args.output_dir, batch["images"], mix_of(args, 0), encoder.image_mean, encoder.image_std)
    loss_of = classify if args.objective == "classification" else distil
    values, passes = [], args.gradient_accumulation_steps
    for number in range(passes):
        part = slice(number * args.train_batch_size, (number + 1) * args.train_batch_size)
        # Processes exchange their gradients once a step.
        with nullcontext() if number == passes - 1 else accelerator.no_sync(model):
            loss, found = loss_of(run, batch, part)
            accelerator.backward(loss / passes)
        values.append(found)
    values = {name: torch.stack([found[name] for found in values]).mean(0) for name in values[0]}
    if args.objective == "dino" and run.state["epoch"] <= args.freeze_prototypes_epochs:
        run.bare.prototypes.weight.grad = None
    norm = accelerator.clip_grad_norm_(params, args.max_grad_norm or float("inf"))
    for group in optimizer.param_groups:
        if group["weight_decay"]:
            group["weight_decay"] = weight_decay(args, run.state["step"], run.num_steps)
    optimizer.step()
    optimizer.zero_grad()
    if args.objective == "dino":
        update_centre(run, values.pop("centre"))
    if run.average is not None:
        run.average.multi_avg_fn = running_mean(momentum(args, run.state["step"], run.num_steps))
        run.average.update_parameters(run.bare)
    return {"grad_norm": norm, **values}


def running_mean(keep):
    """For `AveragedModel`. Whole numbers are copied: means of Swin's table of places would be cut off, one too low."""
    mean = get_ema_multi_avg_fn(keep)

    def update(averages, values, count):
        if averages[0].is_floating_point():
            mean(averages, values, count)
        else:
            for average, value in zip(averages, values, strict=True):
                average.copy_(value)

    return update


def mix_of(args, step):
    return Mixing(args.mixup, args.cutmix, args.seed).draw(step, args.resolution)


def classify(run, batch, part):
    return run.model(batch["images"][part], batch["labels"][part], mix_of(run.args, run.state["step"]))


def distil(run, batch, part):
    crops = {name: tensor[part] for name, tensor in batch["images"].items()}
    teacher = run.average.module
    with torch.no_grad(), run.accelerator.autocast():
        scores = teacher.scores(crops["whole"])
    loss, values = run.model(crops, scores, teacher_temperature(run.args, run.state["epoch"]))
    return loss, values | {"centre": scores.mean((0, 1))}


def update_centre(run, mean):
    keep = run.args.centre_momentum
    run.bare.centre.lerp_(run.accelerator.reduce(mean, reduction="mean"), 1 - keep)


def teacher_temperature(args, epoch):
    """From 0.04 in the first epoch to its value in the last of the warm-up."""
    start, rise = 0.04, args.teacher_temperature - 0.04
    done = min(1.0, (epoch - 1) / (args.teacher_warmup_epochs - 1)) if args.teacher_warmup_epochs > 1 else 1.0
    return start + rise * done


def weight_decay(args, step, num_steps):
    """Of a step (from 0), halfway between its two values at half of the training."""
    first = args.adam_weight_decay
    last = first if args.weight_decay_end is None else args.weight_decay_end
    return last + (first - last) * (1 + math.cos(math.pi * step / num_steps)) / 2


def momentum(args, step, num_steps):
    """What the running mean keeps after a step (from 0): rises to 1 for a teacher, and at first for --ema_decay."""
    if args.objective == "dino":
        return 1 - (1 - args.teacher_momentum) * (1 + math.cos(math.pi * step / num_steps)) / 2
    return min(args.ema_decay, (1 + step) / (10 + step))


# What the training is made of


def introduce(args, say):
    if args.demo:
        say(
            "Demo: identity classification of drawn people of domains a, c, d and e, by a small ResNet from scratch, "
            "and what its features are worth on the unseen domain b; about two minutes on two cores. For your own "
            "data: --source SPEC --target SPEC --data_root DIR"
        )
    elif args.backbone == "resnet-small":
        say("No --backbone or --recipe given: using resnet-small, made for drawn people. A real one: resnet50, swin-t")
    for line in describe_origin(args, args.origin):
        say(line)


def open_train(args):
    """Training rows and their labels, cut to the fractions, and the stream of their images where they are streamed."""
    stream = None
    if args.streaming:
        train, stream = open_stream(args.source[0])
        labels = torch.from_numpy(labels_of(train))
    else:
        # A single image of an identity is a class too.
        train, labels, _ = open_source(
            args.source, args.data_root, single_image_ids="repeat", skip_unreadable=args.skip_unreadable
        )
    fractions = {"image_fraction": args.image_fraction, "identity_fraction": args.identity_fraction}
    if any(value is not None for value in fractions.values()):
        train = subset(train, **fractions, seed=args.fraction_seed)
        labels = torch.from_numpy(labels_of(train))
    if args.objective == "classification" and int(labels.max()) < 1:
        raise ValueError(
            f"--source {' + '.join(args.source)}: classification needs two identities or more, there is one; give more"
        )
    return train, labels, stream


def build_model(args, accelerator, num_ids):
    """The model of the objective and its running mean, None where there is none."""
    set_seed(args.seed)
    backbone = open_backbone(args.backbone, tuple(args.resolution), args.from_scratch)
    if args.gradient_checkpointing:
        backbone.enable_gradient_checkpointing()
    if args.objective == "classification":
        model = Classification(backbone, num_ids, args.label_smoothing)
    else:
        model = SelfDistillation(backbone, args.prototypes, args.head_width, args.student_temperature)
    model = share_batch_statistics(model, accelerator.device)
    if accelerator.device.type == "cuda":
        model.to(accelerator.device, memory_format=torch.channels_last)
    average = None
    if args.objective == "dino" or args.ema_decay is not None:
        average = AveragedModel(model, use_buffers=True).to(accelerator.device)
        # The first update would copy the weights.
        average.n_averaged.fill_(1)
    if args.torch_compile:
        backbone.compile()
    return model, average


def build_transform(args, backbone):
    encoder = ReIDModel(backbone)
    mean, std = encoder.image_mean, encoder.image_std
    if args.objective == "classification":
        return RandAugmentTransform(
            args.resolution,
            mean,
            std,
            num_ops=args.randaugment_ops,
            magnitude=args.randaugment_magnitude,
            padding=args.padding,
            erasing=args.erasing,
        )
    of_one_size = isinstance(backbone, ClipBackbone)
    parts = args.local_resolution or [side if of_one_size else side // 2 for side in args.resolution]
    if of_one_size and list(parts) != list(args.resolution):
        raise ValueError(
            f"--local_resolution {' '.join(map(str, parts))}: CLIP takes images of one size; leave it out, or "
            "choose a ResNet or a Swin"
        )
    options = {"num_parts": args.local_crops, "whole_area": args.whole_area, "part_area": args.local_area}
    options |= {"colours": args.colours, "hidden": args.hidden_sides}
    return MultiCrop(args.resolution, parts, mean, std, **options)


def optimizer_of(args, model):
    groups = parameter_groups(
        model,
        learning_rate=args.learning_rate,
        weight_decay=args.adam_weight_decay,
        layer_decay=args.layer_decay,
    )
    return build_optimizer(
        groups,
        "adamw",
        learning_rate=args.learning_rate,
        weight_decay=args.adam_weight_decay,
        betas=(args.adam_beta1, args.adam_beta2),
        epsilon=args.adam_epsilon,
        use_8bit=args.use_8bit_adam,
    )


def rates_of(args, optimizer, steps_an_epoch):
    return LearningRate(
        optimizer,
        args.lr_scheduler,
        warmup_steps=steps_an_epoch * args.lr_warmup_epochs,
        num_steps=steps_an_epoch * args.num_train_epochs,
    )


# Results


def measure(run, epoch):
    """Every target's numbers, by the plain features of the backbone: what `evaluate.py` finds with `backbone/`."""
    args, accelerator = run.args, run.accelerator
    encoder = ReIDModel(run.result).to(accelerator.device)
    measure_targets(
        run.state,
        epoch,
        encoder,
        run.targets,
        test_transform(encoder.image_size, encoder.image_mean, encoder.image_std, args.test_resample),
        accelerator=accelerator,
        output_dir=args.output_dir,
        batch_size=args.eval_batch_size,
        num_workers=args.dataloader_num_workers,
    )


def finish(run):
    """The backbone, its card and the page."""
    args = run.args
    run.accelerator.wait_for_everyone()
    if not run.accelerator.is_main_process:
        return
    output_dir = Path(args.output_dir)
    final = results(run.state["history"])
    card = training_card(
        f"{Path(args.backbone).name} pre-trained on {' + '.join(portable(args.source))}",
        CARD,
        "pretrain_backbone.py",
        args,
        metrics=final["targets"],
        details={"images": len(run.train), "identities": int(run.labels.max()) + 1},
        library_name="transformers",
    )
    write_backbone_folder(run.result, output_dir / "backbone", ReIDModel(run.result).preprocessing(), card)
    objective = {"classification": "identity classification", "dino": "self-distillation (DINO)"}[args.objective]
    facts = [
        ("Source", " + ".join(args.source)),
        ("Images", f"{len(run.train):,} of {int(run.labels.max()) + 1:,} identities"),
        ("Backbone", Path(args.backbone).name + (", from scratch" if args.from_scratch else "")),
        ("Objective", objective),
        ("Steps", f"{run.state['step']:,}"),
        ("Batch", run.state["arguments"]["effective_batch_size"]),
        ("Seed", args.seed),
    ]
    write_page(output_dir, final["history"], facts)
    if final["history"]:
        print(text_table(["target", "number", "before", "after", "points"], before_and_after(final["history"])))
    print(f"Results: {output_dir}; open {output_dir / 'report.html'}")
    if args.push_to_hub:
        api = HfApi()
        repo_id = api.create_repo(args.hub_model_id or output_dir.resolve().name, exist_ok=True).repo_id
        print(f"Uploaded: {api.upload_folder(repo_id=repo_id, folder_path=output_dir / 'backbone')}")


def run_script(args):
    lean = (
        f"lower --train_batch_size {args.train_batch_size} and raise --gradient_accumulation_steps by as much, or add "
        "--gradient_checkpointing"
    )
    end_with(main, args, "pretrain_backbone.py", lean=lean)


if __name__ == "__main__":
    run_script(parse_args())
