# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "accelerate>=1.12.0", "bitsandbytes>=0.50.0", "datasets>=4.5.0", "diffusers>=0.38.0", "huggingface_hub>=1.20.0",
#     "jinja2>=3.1.4", "numpy>=2.1.0", "peft>=0.19.0", "Pillow>=11.0.0", "safetensors>=0.7.0",
#     "scikit-learn>=1.5.2", "scipy>=1.14.1", "torch>=2.11.0", "torchvision>=0.26.0", "tqdm>=4.67.0",
#     "transformers>=5.17.0", "triton>=3.6.0; sys_platform == 'linux'",
# ]
# ///
"""Pre-train a backbone on many people, most of them generated, so that re-identification starts better.

    accelerate launch --config_file accelerate_config.yaml pretrain_backbone.py
    accelerate launch pretrain_backbone.py --recipe diff-person --source DIFF_PERSON --output_dir output/pretrained

    accelerate launch pretrain_backbone.py --recipe diff-person-dino --source ./people --output_dir output/dino
    accelerate launch pretrain_backbone.py --recipe solider --source ./people --output_dir output/solider

The first is a demo on drawn people; the second the published pre-training of a ResNet-50 on the folder or Hub id of a
set that `filter_generated.py` wrote; the others learn from your own images without their labels. What comes out is
`backbone/`, a plain `transformers` folder: a start for `train_dcac.py --backbone` and `finetune_reid.py --backbone`,
and a model for `evaluate.py --model`.

--objective classification, one class an identity, of images x with identities y:

    x' = share x + (1 - share) x_other           Mixup; CutMix pastes a box instead; share is drawn once a step
    L  = share CE(W f(x'), y) + (1 - share) CE(W f(x'), y_other)                       labels smoothed

--objective dino, without labels, of two crops of the whole and several of parts of each image:

    p_teacher = softmax((g_teacher(whole) - centre) / t_teacher)    centre: running mean of what the teacher says
    p_student = softmax(g_student(crop) / t_student)                teacher: running mean of the student
    L = mean over wholes and other crops of CE(p_teacher, p_student)

--objective solider: DINO on a Swin whose features also tell the parts of the body apart, see methods/solider.py.
--semantic_weight says how much, and can be changed later; `backbone/` is a plain Swin with that weight.
"""

import argparse
import math

from methods import pretraining
from methods.pretraining import DINO_VALUES, DISTILLED, SOLIDER
from utils import flags, ranges
from utils.ranges import at_least, fraction, not_negative

DEMO_SOURCE = [f"synthetic:domain={domain},num_ids=64" for domain in "acde"]
DEMO_TARGET = "synthetic:domain=b"
CARD = (
    "A backbone pre-trained on images of people, a start for person re-identification; `backbone/` is a plain "
    "`transformers` folder. Finding people again across cameras is surveillance: use it only where the law and the "
    "people concerned allow it."
)
DEMO_WORDS = (
    "Demo: {} of drawn people of domains a, c, d and e, by {} from scratch, and what its features are worth on the "
    "unseen domain b; about two minutes on two cores with identities, longer without labels. For your own data: "
    "--source SPEC --target SPEC --data_root DIR"
)
STAND_IN = (
    "No --backbone or --recipe given: using {}, small, with random weights, for drawn people. A real one: resnet50, "
    "swin-t"
)
OBJECTIVES = {"classification": "identity classification"}
OBJECTIVES |= {name: f"self-distillation ({name.upper()})" for name in DISTILLED}
# Short names of backbones, see utils/modeling/names.py.
SMALL = ("resnet-small", "swin-mini")
CLIP = DINO_VALUES["max_grad_norm"]
NAMED = (*SMALL, "resnet50", "swin-t", "swin-s", "swin-b", "clip-b16")
SCHEDULES = ("cosine", "linear", "constant_with_warmup")


def build_parser():
    parser = flags.Parser(__doc__, recipes=pretraining.RECIPES)
    flags.add_recipe(
        parser,
        "published values: diff-person, identity classification of a ResNet-50 for 300 epochs; diff-person-dino, "
        "DINO's own values on a Swin-T; solider, SOLIDER's on a Swin-T; solider-after-dino, 10 epochs of it from the "
        "backbone of as many of DINO, which --backbone names",
    )
    data = flags.add_data(
        parser,
        source=f"training sets; default {' '.join(DEMO_SOURCE)}",
        target=f"sets with query and gallery to measure the features on; default {DEMO_TARGET} in the demo, else none",
    )
    data.add("--image_fraction", type=ranges.share, help="share of each identity's images that is kept; default all")
    data.add("--identity_fraction", type=ranges.share, help="share of the identities that is kept; default all")
    data.add("--fraction_seed", type=at_least(0), default=0, help="another seed takes another part")
    data.switch(
        "--streaming",
        "read images from the Hub, or from a folder of parquet files or images with metadata, only as they are "
        "needed; the order then depends on the numbers of processes and workers",
    )
    whole = (lambda args: not args.streaming, "no --streaming")
    words = "images that each worker shuffles among, as they are stored: sets are often sorted by identity"
    data.add("--streaming_buffer", type=at_least(1), default=10_000, idle=whole, help=words)
    crops = lambda args: args.objective in DISTILLED, lambda args: f"--objective {args.objective} has its own crops"
    flags.add_images(parser, resolution=[64, 32], padding=3, erasing=0.25, idle=crops)

    group = parser.group("model and objective")
    group.add(
        "--backbone",
        help=f"{', '.join(NAMED)}, folder, Hub id, file or ReIDModel; default resnet-small, of solider swin-mini",
    )
    group.add(
        "--from_scratch",
        action=argparse.BooleanOptionalAction,
        default=None,
        help=f"only the configuration of --backbone, with random weights; default for {', '.join(SMALL)} and in the "
        "recipes",
    )
    group.add("--objective", choices=list(OBJECTIVES), default="classification", help="loss, see above")

    idle = lambda args: args.objective in DISTILLED, lambda args: f"--objective {args.objective}"
    group = parser.group("classification", idle=idle)
    group.add("--label_smoothing", type=fraction, default=0.1, help="of the class loss")
    group.add("--mixup", type=not_negative, default=0.0, help="alpha of Mixup, 0 for none")
    group.add("--cutmix", type=not_negative, default=0.0, help="alpha of CutMix, 0 for none")
    group.add("--randaugment_ops", type=at_least(0), default=2, help="changes of an image")
    words = "strength of the changes, 0 to 30"
    group.add("--randaugment_magnitude", type=ranges.between(0, 30), default=9, help=words)
    group.add(
        "--augment_on",
        choices=["auto", "loader", "device"],
        default="auto",
        help="where images are augmented: one by one in the loader, or in batches on the device; auto: on a GPU",
    )
    group.arguments.add_argument(
        "--ema_decay",
        type=fraction,
        metavar="N",
        help="decay of a running mean of the weights, which is then the result; default: none",
    )

    pretraining.add_flags(parser)
    flags.add_training(
        parser,
        batch=64,
        epochs=12,
        images_per_id=None,
        batch_help="images of each process and forward pass; that of a recipe is shared by all of them",
        accumulation="forward passes of a step",
    )
    # Here BatchNorm and Mixup see each pass by itself, so that both change the training.
    parser.free -= {"train_batch_size"}
    clip_default = f"{CLIP} for each tensor of dino and solider, else 0, never"
    group = flags.add_optimizer(
        parser, learning_rate=2e-3, weight_decay=0.05, optimizers=None, clip=None, clip_default=clip_default
    )
    group.add("--weight_decay_end", type=not_negative, help="weight decay at the end of a cosine; default constant")
    group.add("--layer_decay", type=ranges.share, default=1.0, help="factor on the rate from block to block")
    group.add("--lr_scheduler", choices=SCHEDULES, default="cosine", help="how the rate changes")
    group.add("--lr_warmup_epochs", type=at_least(0), default=1, help="epochs of linear rise before it")
    cosine = (lambda args: args.lr_scheduler != "cosine", lambda args: f"--lr_scheduler {args.lr_scheduler}")
    group.add("--lr_end", type=not_negative, default=0.0, idle=cosine, help="rate at the end of a cosine")
    flags.add_memory(parser, compiled="the blocks of the backbone")
    flags.add_evaluation(parser, every=3, resample=True, rerank=False)
    flags.add_output(parser, "output/pretrain", uploaded="the backbone")
    return parser


def parse_args(input_args=None):
    parser = build_parser()
    args = parser.parse(input_args)
    args.demo = args.source is None and args.target is None and args.recipe is None
    if args.recipe and args.source is None:
        parser.error(f"--recipe {args.recipe} needs --source: the set of images to pre-train on")
    args.source = args.source or DEMO_SOURCE
    args.target = [DEMO_TARGET] if args.demo else args.target or []
    args.backbone = args.backbone or ("swin-mini" if args.objective == SOLIDER else "resnet-small")
    if args.from_scratch is None:
        args.from_scratch = args.backbone in SMALL
    if args.max_grad_norm is None:
        # Of random weights their first gradients are enormous, and Adam would remember them for long.
        args.max_grad_norm = CLIP if args.objective in DISTILLED else 0.0
    check_args(parser, args)
    args.notes = parser.notes(args)
    return args


def check_args(parser, args):
    """What the arguments alone show to be wrong."""
    if args.streaming and len(args.source) > 1:
        parser.error(f"--streaming reads one source, got {len(args.source)}; merge them into one set first")
    pretraining.check_args(parser, args)
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
    if args.weight_decay_end is not None and not args.adam_weight_decay:
        parser.error("--weight_decay_end starts from --adam_weight_decay, which must be above 0")


if __name__ == "__main__":
    # Before torch and transformers are imported, so that --help and a mistyped flag answer at once.
    args = parse_args()

from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate.utils import DistributedType, send_to_device, set_seed
from huggingface_hub import HfApi
from torch import nn
from torch.optim.swa_utils import AveragedModel

from methods.dino import SelfDistillation
from methods.solider import Solider, drawn
from utils import launch
from utils.batches.augmentation import MultiCrop, RandAugmentTransform
from utils.batches.device_augmentation import BatchAugmentation, OnDevice
from utils.batches.mixing import Mixing, mix_images, mixed_loss
from utils.batches.shuffled import ShuffleSampler
from utils.batches.streaming import StreamedImages, StreamLoader, open_stream
from utils.batches.transforms import ReIDImages, loader_of
from utils.datasets.load import digest_of, labels_of, subset
from utils.datasets.unlabelled import open_either
from utils.evaluation.targets import open_targets
from utils.files import portable
from utils.modeling.backbones import ClipBackbone
from utils.modeling.export import write_backbone_folder
from utils.modeling.names import check_backbone, check_swin, open_backbone
from utils.modeling.networks.plain_vit import PlainViTBackbone
from utils.modeling.networks.semantic_swin import SemanticSwinBackbone
from utils.modeling.norms import share_batch_statistics
from utils.modeling.reid_model import ReIDModel
from utils.modeling.stages import compile_blocks
from utils.training.loop import Training, optimizer_of, trained
from utils.training.optimizer import LearningRate
from utils.training.parameter_groups import parameter_groups
from utils.training.pretraining_report import draw_batch, first_batch
from utils.training.teacher import running_mean

# The objectives


class Classification(nn.Module):
    """One class an identity; `forward` is the loss of a batch."""

    def __init__(self, backbone, num_ids, label_smoothing=0.1):
        super().__init__()
        self.backbone = backbone
        self.classifier = nn.Linear(backbone.num_features, num_ids)
        nn.init.trunc_normal_(self.classifier.weight, std=0.02)
        nn.init.zeros_(self.classifier.bias)
        self.label_smoothing = label_smoothing

    def forward(self, images, labels, mix):
        features = self.backbone(mix_images(images, mix))
        with torch.autocast(images.device.type, enabled=False):
            logits = self.classifier(features.float())
            loss = mixed_loss(self.class_loss, logits, labels, mix)
            hit = mixed_loss(share_right, logits, labels, mix)
        return loss, {"loss": loss.detach(), "accuracy": hit}

    def class_loss(self, logits, labels):
        return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)


def share_right(logits, labels):
    return (logits.argmax(1) == labels).float().mean()


# Training


def main(args):
    accelerator = launch.start_training(args)
    stand_ins = STAND_IN.format(args.backbone) if args.backbone in SMALL else None
    demo = DEMO_WORDS.format(OBJECTIVES[args.objective], args.backbone)
    launch.introduce(args, accelerator, demo=demo, stand_ins=stand_ins)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise ValueError("DeepSpeed is not for backbones; start it with accelerate_configs/multi_gpu.yaml")
    # What can be wrong with data and configuration shows before a model is loaded.
    check_backbone(args.backbone, args.from_scratch)
    if args.objective == SOLIDER:
        check_swin(args.backbone)
    train, labels, stream = open_train(args)
    targets = open_targets(args.target, args.data_root, skip_unreadable=args.skip_unreadable)
    mixes = args.objective == "classification" and (args.mixup or args.cutmix)
    pretraining.share_batch_of_recipe(args, accelerator, multiple_of=2 if mixes else 1)
    batch_size = launch.global_batch_size(args, accelerator)
    share = accelerator.process_index, accelerator.num_processes
    sampler, free = ShuffleSampler(len(train), batch_size, args.seed, *share), args.free_on_resume
    if stream is not None:
        # They decide which image comes when.
        args.num_processes = accelerator.num_processes
        free = [name for name in free if name != "dataloader_num_workers"]
    training = Training(
        args, accelerator, sampler, train, script="pretrain_backbone.py", data=digest_of(train, labels), free=free
    )
    num_ids = int(labels.max()) + 1
    people = f"of {num_ids} identities" if num_ids > 1 else "without labels"
    measured_on = ", ".join(target.spec for target in targets) or "nothing"
    accelerator.print(f"{' + '.join(args.source)}: {len(train)} images {people}; measured on {measured_on}")

    bare, average = build_model(args, accelerator, num_ids)
    # What is measured and saved: the running mean where there is one.
    result = (bare if average is None else average.module).backbone
    transform = build_transform(args, bare.backbone, accelerator.device)
    augment = transform if isinstance(transform, BatchAugmentation) else None
    transform = augment.draw if augment else transform
    workers = {"num_workers": args.dataloader_num_workers, "pin_memory": accelerator.device.type == "cuda"}
    if stream is None:
        loader = loader_of(ReIDImages(train, transform, labels.tolist()), sampler, **workers)
    else:
        drawn = {
            "batch_size": batch_size // share[1],
            "seed": args.seed,
            "share": share,
            "buffer": args.streaming_buffer,
        }
        images = StreamedImages(stream, train, labels.tolist(), transform, **drawn)
        loader = training.sampler = StreamLoader(images, len(sampler), **workers)
    loader = OnDevice(loader, augment, accelerator.device) if augment else loader
    model, optimizer = accelerator.prepare(bare, build_optimizer(args, bare))
    kept = nn.ModuleDict({"model": bare} if average is None else {"model": bare, "average": average})
    training.begin(model, optimizer, build_rates(args, optimizer, sampler.steps_of(1)), kept=kept)
    params = trained(bare)

    def measure(epoch):
        """By the plain features of the backbone: what `evaluate.py` finds with `backbone/`."""
        training.measure(epoch, encoder_of(args, result).to(accelerator.device), targets)

    if not training.resumed:
        measure(0)
    for epoch in training.epochs():
        set_modes(args, bare, average)
        for batch in training.batches(loader):
            if training.step == 0 and accelerator.is_main_process:
                encoder = ReIDModel(bare.backbone)
                draw_batch(args.output_dir, batch["images"], mix_of(args, 0), encoder.image_mean, encoder.image_std)
            training.log(training_step(training, model, bare, average, batch, params))
        if training.measures(epoch):
            measure(epoch)
    if not training.stopped and accelerator.is_main_process:
        save(args, training, result, num_ids)
    return training.end(
        lambda: report_of(args, training, num_ids),
        upload=lambda repo_id: upload(repo_id, Path(args.output_dir) / "backbone"),
    )


def set_modes(args, model, average):
    """A teacher's norms look at the batch as its student's do, but nothing drops out of it."""
    model.train()
    if args.objective in DISTILLED:
        for module in average.module.eval().modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train()


def training_step(training, model, bare, average, batch, params):
    """Losses and gradients of all passes, the optimizer's step, then the running mean."""
    args, accelerator, optimizer = training.args, training.accelerator, training.optimizer
    batch = send_to_device(batch, accelerator.device, non_blocking=True)
    parts, passes = [], args.gradient_accumulation_steps
    for number in range(passes):
        rows = slice(number * args.train_batch_size, (number + 1) * args.train_batch_size)
        # Processes exchange their gradients once a step.
        with nullcontext() if number == passes - 1 else accelerator.no_sync(model):
            if args.objective == "classification":
                mix = mix_of(args, training.step)
                loss, values = model(batch["images"][rows], batch["labels"][rows], mix)
            else:
                crops = {name: tensor[rows] for name, tensor in batch["images"].items()}
                with torch.no_grad(), accelerator.autocast():
                    scores, more = taught(training, average.module, crops["whole"], rows)
                loss, values = model(crops, scores, teacher_temperature(args, training.epoch), *more)
                values = values | {"centre": scores.mean((0, 1))}
            accelerator.backward(loss / passes)
        parts.append(values)
    values = {name: torch.stack([part[name] for part in parts]).mean(0) for name in parts[0]}
    if args.objective in DISTILLED and training.epoch <= args.freeze_prototypes_epochs:
        bare.prototypes.weight.grad = None
    norm = clipped(accelerator, params, args.max_grad_norm or float("inf"), each=args.objective in DISTILLED)
    for group in optimizer.param_groups:
        if group["weight_decay"]:
            group["weight_decay"] = weight_decay(args, training.step, training.num_steps)
    optimizer.step()
    optimizer.zero_grad()
    if args.objective in DISTILLED:
        mean = accelerator.reduce(values.pop("centre"), reduction="mean")
        bare.centre.lerp_(mean, 1 - args.centre_momentum)
    if average is not None:
        average.multi_avg_fn = running_mean(momentum(args, training.step, training.num_steps))
        average.update_parameters(bare)
    return {"grad_norm": norm, **values}


def clipped(accelerator, params, most, *, each):
    """Clip the gradients to a norm, of all together or of `each` tensor; the norm of all before it."""
    if not each:
        return accelerator.clip_grad_norm_(params, most)
    accelerator.unscale_gradients()
    gradients = [parameter.grad for parameter in params if parameter.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients))
    torch._foreach_mul_(gradients, (most / (norms + 1e-6)).clamp(max=1).unbind())
    return norms.norm()


def taught(training, teacher, whole, rows):
    """The teacher's scores of the whole crops of some rows of the batch, and what SOLIDER's student needs beside."""
    args, accelerator = training.args, training.accelerator
    if args.objective != SOLIDER:
        return teacher.scores(whole), ()
    share = training.batch_size // accelerator.num_processes
    start = accelerator.process_index * share + rows.start
    weights, blank = drawn(
        args.seed, training.step, training.batch_size, slice(start, start + len(whole)), whole.device
    )
    scores, parts = teacher.teach(whole, weights)
    return scores, (weights, blank, *parts)


def mix_of(args, step):
    return Mixing(args.mixup, args.cutmix, args.seed).draw(step, args.resolution)


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
    if args.objective in DISTILLED:
        return 1 - (1 - args.teacher_momentum) * (1 + math.cos(math.pi * step / num_steps)) / 2
    return min(args.ema_decay, (1 + step) / (10 + step))


# What the training is made of


def open_train(args):
    """Training rows and their labels, cut to the fractions, and the stream of their images where they are streamed."""
    stream = None
    if args.streaming:
        train, stream = open_stream(args.source[0])
        labels = torch.from_numpy(labels_of(train))
    else:
        needs_labels = args.objective == "classification"
        reading = {"skip_unreadable": args.skip_unreadable, "needs_labels": needs_labels}
        train, labels = open_either(args.source, args.data_root, **reading)
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
    launch.print_notes(accelerator, backbone.notes)
    if args.objective == SOLIDER:
        backbone = SemanticSwinBackbone.on(backbone, args.backbone, args.semantic_weight)
    if args.gradient_checkpointing:
        backbone.enable_gradient_checkpointing()
    if args.objective == "classification":
        model = Classification(backbone, num_ids, args.label_smoothing)
    else:
        model = SelfDistillation(backbone, args.prototypes, args.head_width, args.student_temperature)
        if args.objective == SOLIDER:
            model = Solider(model, args.head_width, args.semantic_factor)
    model = share_batch_statistics(model, accelerator.device)
    if accelerator.device.type == "cuda":
        model.to(accelerator.device, memory_format=torch.channels_last)
    average = None
    if args.objective in DISTILLED or args.ema_decay is not None:
        average = AveragedModel(model, use_buffers=True).to(accelerator.device)
        # The first update would copy the weights.
        average.n_averaged.fill_(1)
    if args.torch_compile:
        compile_blocks(backbone)
    return model, average


def build_transform(args, backbone, device):
    encoder = ReIDModel(backbone)
    mean, std = encoder.image_mean, encoder.image_std
    if args.objective == "classification":
        on_device = args.augment_on == "device" or args.augment_on == "auto" and device.type == "cuda"
        return (BatchAugmentation if on_device else RandAugmentTransform)(
            args.resolution,
            mean,
            std,
            num_ops=args.randaugment_ops,
            magnitude=args.randaugment_magnitude,
            padding=args.padding,
            erasing=args.erasing,
        )
    of_one_size = isinstance(backbone, (ClipBackbone, PlainViTBackbone))
    parts = args.local_resolution or [side if of_one_size else side // 2 for side in args.resolution]
    if of_one_size and list(parts) != list(args.resolution):
        raise ValueError(
            f"--local_resolution {' '.join(map(str, parts))}: CLIP and ViT take images of one size; leave it out, "
            "or choose a ResNet or a Swin"
        )
    options = {"num_parts": args.local_crops, "whole_area": args.whole_area, "part_area": args.local_area}
    options |= {"colours": args.colours, "hidden": args.hidden_sides, "aspects": args.crop_aspects}
    return MultiCrop(args.resolution, parts, mean, std, **options)


def build_optimizer(args, model):
    """AdamW; norms and biases do not decay, and each block has its own rate."""
    groups = parameter_groups(
        model,
        learning_rate=args.learning_rate,
        weight_decay=args.adam_weight_decay,
        layer_decay=args.layer_decay,
    )
    return optimizer_of(args, groups)


def build_rates(args, optimizer, steps_an_epoch):
    warmup, num_steps = steps_an_epoch * args.lr_warmup_epochs, steps_an_epoch * args.num_train_epochs
    name = args.lr_scheduler
    if name == "cosine" and args.lr_end:
        name = cosine_to(args.lr_end / args.learning_rate, warmup, num_steps)
    return LearningRate(optimizer, name, warmup_steps=warmup, num_steps=num_steps)


def cosine_to(end, warmup, num_steps):
    """Factor on the learning rate by epoch and step: a linear rise, then half a cosine to `end`."""

    def factor(epoch, step):
        if step < warmup:
            return step / warmup
        return end + (1 - end) * (1 + math.cos(math.pi * (step - warmup) / (num_steps - warmup))) / 2

    return factor


# Results


def save(args, training, backbone, num_ids):
    """The backbone and its card."""
    title = f"{Path(args.backbone).name} pre-trained on {' + '.join(portable(args.source))}"
    people = {} if args.objective in DISTILLED else {"identities": num_ids}
    card = training.card(title, CARD, **people, library_name="transformers")
    write_backbone_folder(
        backbone, Path(args.output_dir) / "backbone", encoder_of(args, backbone).preprocessing(), card
    )


def encoder_of(args, backbone):
    """The plain features of the backbone."""
    usual = (getattr(backbone, "preprocessing", None) or {}).get("resample", "bilinear")
    return ReIDModel(backbone, resample=args.test_resample or usual)


def upload(repo_id, folder):
    api = HfApi()
    repo_id = api.create_repo(repo_id, private=True, exist_ok=True).repo_id
    return api.upload_folder(repo_id=repo_id, folder_path=folder)


def of_people(args, num_ids):
    return ", labels are not used" if args.objective in DISTILLED else f" of {num_ids:,} identities"


def report_of(args, training, num_ids):
    facts = [
        ("Source", " + ".join(portable(args.source))),
        ("Images", f"{len(training.images):,}{of_people(args, num_ids)}"),
        ("Backbone", Path(args.backbone).name + (", from scratch" if args.from_scratch else "")),
        ("Objective", OBJECTIVES[args.objective]),
    ]
    more = first_batch(args.output_dir) | {"whom": "people it was not trained on, by its plain features"}
    return training.report("Pre-training", "A backbone", facts, **more)


def run_script(args):
    lean = (
        f"lower --train_batch_size {args.train_batch_size} and raise --gradient_accumulation_steps by as much, or add "
        "--gradient_checkpointing"
    )
    launch.end_with(main, args, "pretrain_backbone.py", lean=lean)


if __name__ == "__main__":
    run_script(args)
