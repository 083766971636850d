"""Flags and published values of pretraining, and how a recipe's batch is shared; imports nothing large.

`pretrain_backbone.py` reads them before torch is imported.
"""

from utils.ranges import above_zero, at_least, fraction, not_negative

DINO, SOLIDER = "dino", "solider"
DISTILLED = (DINO, SOLIDER)
# What DINO's authors give for a batch of 1024, the rate in proportion to ours.
DINO_VALUES = {
    "objective": DINO,
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
}
# Of SOLIDER's authors: 8 processes of 48 images, 5e-4 for 256.
SOLIDER_VALUES = DINO_VALUES | {
    "objective": SOLIDER,
    "train_batch_size": 384,
    "learning_rate": 7.5e-4,
    "lr_end": 1e-6,
    "teacher_temperature": 0.04,
    "teacher_warmup_epochs": 0,
    "whole_area": [0.8, 1.0],
    "local_area": [0.05, 0.8],
    "crop_aspects": [0.4, 0.6],
}
# Identity classification; the other recipes change what they name.
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
    "diff-person-dino": PUBLISHED | DINO_VALUES,
    "solider": PUBLISHED | SOLIDER_VALUES,
    # After as many epochs of --objective dino, whose backbone --backbone names. The head starts anew; the authors go
    # on with that of DINO.
    "solider-after-dino": PUBLISHED
    | SOLIDER_VALUES
    | {"from_scratch": False, "num_train_epochs": 10, "learning_rate": 7.5e-5, "lr_warmup_epochs": 1},
}


def add_flags(parser):
    idle = lambda args: args.objective not in DISTILLED, lambda args: f"--objective {args.objective}"
    group = parser.group("dino and solider: crops", idle=idle)
    group.add("--local_crops", type=at_least(0), default=4, help="crops of parts of an image")
    group.size(
        "--local_resolution", help="size of those crops in pixels; default half of --resolution, of CLIP all of it"
    )
    area = {"type": float, "nargs": 2, "metavar": ("LEAST", "MOST")}
    group.add("--whole_area", **area, default=[0.4, 1.0], help="share of the image in crops of the whole")
    group.add("--local_area", **area, default=[0.05, 0.4], help="share of the image in crops of parts")
    group.add("--crop_aspects", **area, help="width to height of crops; default 3/4 to 4/3 of that of their size")
    group.add("--colours", type=fraction, default=0.25, help="strength of the changes of colour, by DINO itself 1")
    group.add("--hidden_sides", type=fraction, default=0.0, help="share of crops with noise in place of their sides")

    group = parser.group("dino and solider: head and teacher", idle=idle)
    group.add("--prototypes", type=at_least(1), default=512, help="width of the scores that are compared")
    group.add("--head_width", type=at_least(1), default=256, help="width of the head's hidden layers")
    group.add("--student_temperature", type=above_zero, default=0.1, help="temperature of the student's scores")
    group.add("--teacher_temperature", type=above_zero, default=0.04, help="temperature of the teacher's scores")
    group.add("--teacher_warmup_epochs", type=at_least(0), default=0, help="epochs in which it rises from 0.04")
    group.add("--teacher_momentum", type=fraction, default=0.99, help="what the teacher keeps, at first; 1 at the end")
    group.add("--centre_momentum", type=fraction, default=0.9, help="what the centre keeps")
    group.add(
        "--freeze_prototypes_epochs", type=at_least(0), default=1, help="first epochs in which the last layer stays"
    )

    idle = lambda args: args.objective != SOLIDER, lambda args: f"--objective {args.objective}"
    group = parser.group("solider", idle=idle)
    group.add(
        "--semantic_weight",
        type=fraction,
        default=0.2,
        help="how much of meaning, against looks, the saved backbone has; finetune_reid.py can ask for another",
    )
    group.add("--semantic_factor", type=not_negative, default=1.0, help="factor on the loss of the parts")


def check_args(parser, args):
    """What the arguments alone show to be wrong."""
    for name in ("whole_area", "local_area"):
        least, most = getattr(args, name)
        if not 0 < least <= most <= 1:
            parser.error(f"--{name} must be two shares of an image, above 0 and at most 1, got {least} {most}")
    if args.crop_aspects and not 0 < args.crop_aspects[0] <= args.crop_aspects[1] < float("inf"):
        parser.error(f"--crop_aspects must be above 0, the smaller first, got {' '.join(map(str, args.crop_aspects))}")
    if args.objective not in DISTILLED:
        return
    if args.ema_decay is not None:
        parser.error(
            f"--ema_decay is of classification; the result of {args.objective} is its teacher, see --teacher_momentum"
        )
    if not args.local_crops:
        parser.error(f"--local_crops must be 1 or more with --objective {args.objective}")


def share_batch_of_recipe(args, accelerator, *, multiple_of=1):
    """The batch of a recipe is that of a whole step: each process and pass takes its share. A given flag stays."""
    passes, processes = args.gradient_accumulation_steps, accelerator.num_processes
    whole, shares = args.train_batch_size, passes * processes
    if shares == 1:
        return
    if args.origin["train_batch_size"] != "recipe":
        accelerator.print(
            f"--train_batch_size {whole}: each of {processes} processes has {passes} x {whole} images in a step, "
            f"{whole * shares} together"
        )
        return
    if whole % (shares * multiple_of) or whole == shares:
        raise ValueError(
            f"the batch of --recipe {args.recipe}, {whole} images, cannot be shared by {processes} processes with "
            f"{passes} passes each; give --train_batch_size, the images of each process and pass"
        )
    args.train_batch_size = whole // shares
    accelerator.print(
        f"--train_batch_size {args.train_batch_size}: the share of {processes} processes with {passes} "
        f"{'pass' if passes == 1 else 'passes'} each of the {whole} images of a step in --recipe {args.recipe}; "
        "the learning rate stays"
    )
