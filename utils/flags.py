"""Flags of the scripts: groups that several share, recipes, and where each value came from.

    parser = Parser(__doc__, recipes=RECIPES)
    group = parser.group("method")
    group.add("--rank", type=at_least(1), default=8, help="rank of LoRA")
    add_optimizer(parser, learning_rate=1e-3)
    args = parser.parse(input_args)

The help adds each flag's default. torch is not imported here: `--help` and a mistyped flag answer at once.
"""

import argparse
import difflib
import re
from pathlib import Path

from utils.ranges import above_zero, at_least, below_one, fraction, not_negative, pixels, seed

STANDINS = Path(__file__).parent / "standins"
CLIP_DIR, DIFFUSION_DIR, CAPTIONER_DIR = (str(STANDINS / name) for name in ("clip", "stable-diffusion", "blip-vqa"))
# For methods that need a ResNet.
RESNET_DIR = str(STANDINS / "resnet")
MULTISTEP = "warmup_multistep"
# Those of diffusers.
STEP_SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
OPTIMIZERS = ("adam", "adamw", "sgd")
SINGLE_IMAGE_IDS = ("error", "repeat", "drop")
PRECISIONS = ("no", "fp16", "bf16")
SKIP_WORDS = "leave out images that do not decode and files not named as expected, and list them"


# The parser


class Help(argparse.RawDescriptionHelpFormatter):
    """Help of argparse, with the default at the end of each flag's line."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=30)

    def _get_help_string(self, action):
        words = action.help or ""
        unsaid = any(action.default is one for one in (None, False, argparse.SUPPRESS))
        if unsaid or "default" in words.split(";")[-1]:
            return words
        value = shown(action.default).replace("%", "%%")
        if value.startswith(str(STANDINS)):
            value = "the shipped stand-in"
        return f"{words}; default {value or 'none'}" if words else f"default {value or 'none'}"


class Parser(argparse.ArgumentParser):
    """An argparse parser with recipes below its flags.

    A flag may be `free`: a run with another value of it resumes from the same checkpoint. It may have `idle`, a test
    of the arguments and words for it: where the test holds, the flag has no effect, and a run that has it says so.
    """

    def __init__(self, description, *, recipes=None):
        super().__init__(description=description, formatter_class=Help, usage="%(prog)s [flags]")
        self.recipes, self.free, self.idle = recipes or {}, {"recipe"}, {}

    def group(self, title, *, free=False, idle=()):
        return Group(self, title, free, idle)

    def add(self, *names, free=False, idle=(), **options):
        return Group(self, None, free, idle).add(*names, **options)

    def parse(self, input_args=None, recipes=None):
        """The arguments, with `origin` ({name: flag | recipe | default}), `free_on_resume` and `notes` beside them."""
        recipes = self.recipes if recipes is None else recipes
        args, origin = parse_with_recipes(self, recipes, input_args)
        args.origin = origin
        args.free_on_resume = sorted({*self.free, *NOT_ARGUMENTS})
        return args

    def notes(self, args):
        """The first lines of a run: where its values came from, and which flags have no effect."""
        lines = describe_origin(args, args.origin)
        idle = {}
        for name, cases in self.idle.items():
            reasons = [words(args) if callable(words) else words for test, words in cases if test(args)]
            if reasons and args.origin[name] == "flag":
                idle[name] = reasons[0]
        if idle:
            lines.append(f"Without effect: {', '.join(f'--{name} ({reason})' for name, reason in idle.items())}")
        return lines

    def error(self, message):
        message = re.sub(r"^argument (--\w+)(?:/--\w+)*: must", r"\1 must", message)
        unknown = re.match(r"unrecognized arguments: --(\w+)", message)
        if unknown:
            known = [action.option_strings[-1] for action in self._actions if action.option_strings]
            near = difflib.get_close_matches(f"--{unknown[1]}", known, n=2, cutoff=0.75)
            message += f"; did you mean {' or '.join(near)}?" if near else ""
        # Not the whole usage, of up to a hundred lines, before it.
        self.exit(2, f"{self.prog}: error: {message}; --help lists all flags\n")


# What a parser adds to the arguments; no setting of a training.
NOT_ARGUMENTS = ("origin", "free_on_resume", "notes", "demo")


class Group:
    """A group of flags; `free` and `idle` hold for all of them."""

    def __init__(self, parser, title, free=False, idle=()):
        self.parser, self.free, self.idle = parser, free, idle
        self.arguments = parser.add_argument_group(title) if title else parser

    def add(self, *names, free=False, idle=(), **options):
        if "metavar" not in options and "choices" not in options and "action" not in options:
            options["metavar"] = "VALUE" if options.get("type") is None else "N"
        action = self.arguments.add_argument(*names, **options)
        if free or self.free:
            self.parser.free.add(action.dest)
        if idle or self.idle:
            self.parser.idle[action.dest] = [case for case in (self.idle, idle) if case]
        return action

    def switch(self, name, help, **options):
        return self.add(name, action="store_true", help=help, **options)

    def size(self, name, default=None, *, help, **options):
        return self.add(name, type=pixels, nargs=2, metavar=("HEIGHT", "WIDTH"), default=default, help=help, **options)


def parse_with_recipes(parser, recipes, input_args=None):
    """Parse with the values of `--recipe` as defaults; flags win. Returns (args, {name: flag | recipe | default})."""
    unset = object()
    names = [action.dest for action in parser._actions if action.dest != "help"]
    # argparse fills in a default only where the namespace has nothing: what stays unset was not given.
    seen = parser.parse_args(input_args, argparse.Namespace(**dict.fromkeys(names, unset)))
    given = {name for name in names if getattr(seen, name) is not unset}
    recipe = recipes.get(seen.recipe, {}) if "recipe" in given else {}
    if unknown := set(recipe) - set(names):
        raise AssertionError(f"the recipe sets arguments that do not exist: {unknown}")
    parser.set_defaults(**recipe)
    args = parser.parse_args(input_args)
    origin = {name: "flag" if name in given else "recipe" if name in recipe else "default" for name in names}
    return args, origin


def describe_origin(args, origin):
    """Lines that say which values came from the recipe and which from flags."""
    lines = []
    for source in ("recipe", "flag"):
        names = [name for name, where in origin.items() if where == source and name != "recipe"]
        if names:
            values = ", ".join(f"{name} {shown(getattr(args, name))}" for name in names)
            lines.append(f"From {f'--recipe {args.recipe}' if source == 'recipe' else 'the command line'}: {values}")
    return lines


def shown(value):
    """An argument's value in words."""
    if isinstance(value, dict):
        # A number for all, or one for each domain.
        return " ".join(f"{number}" if name is None else f"{name}={number}" for name, number in value.items())
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


# Groups that scripts share

ONE_PASS = "always 1: the losses look at whole batches, not at parts of them"


def add_recipe(parser, help, choices=None):
    parser.add("--recipe", choices=choices or tuple(parser.recipes), help=f"{help}; a given flag wins over the recipe")


def add_data(parser, *, source, target=None, workers=0):
    """`source`, `target`: the help of these two flags; without `workers` no processes prepare images."""
    group = parser.group("data")
    group.add("--source", nargs="+", metavar="SPEC", help=source)
    if target:
        group.add("--target", nargs="+", metavar="SPEC", help=target)
    group.add("--data_root", free=True, help="folder that holds the benchmarks")
    group.switch("--skip_unreadable", SKIP_WORDS)
    if workers is not None:
        add_workers(group, workers)
    return group


def add_workers(group, workers=0):
    words = "processes that prepare images"
    group.add("--dataloader_num_workers", type=at_least(0), default=workers, free=True, help=words)


def add_single_image_ids(group, idle=()):
    words = "identities with one image have no second one for a batch: stop, repeat the image, or drop the identity"
    group.add("--single_image_ids", choices=SINGLE_IMAGE_IDS, default="error", idle=idle, help=words)


def add_holdout(group):
    group.add(
        "--holdout",
        type=below_one,
        default=0.3,
        idle=(lambda args: bool(args.target), "--target is given"),
        help="share of the identities of your own --source without query and gallery that are not trained on but "
        "measured, where there is no --target; 0 trains on all",
    )


def add_images(parser, *, resolution, padding, erasing, idle=()):
    """How training images are resized and augmented."""
    group = parser.group("images")
    group.size("--resolution", resolution, help="input in pixels")
    group.add("--padding", type=at_least(0), default=padding, idle=idle, help="pixels added around an image, to crop")
    group.add("--erasing", type=fraction, default=erasing, idle=idle, help="probability of random erasing")
    return group


def add_training(parser, *, batch, epochs, accumulation, images_per_id=4, batch_help="images of each process"):
    """How long and in which batches; `accumulation`: the help of --gradient_accumulation_steps."""
    group = parser.group("training")
    group.add("--train_batch_size", type=at_least(1), default=batch, free=True, help=batch_help)
    group.add("--gradient_accumulation_steps", type=at_least(1), default=1, help=accumulation)
    if images_per_id:
        group.add("--images_per_id", type=at_least(1), default=images_per_id, help="of each identity in a batch")
    group.add("--num_train_epochs", type=at_least(1), default=epochs, help="passes over the images")
    group.add("--max_train_steps", type=at_least(1), free=True, help="stop after so many steps; default: all epochs")
    group.add("--seed", type=seed, default=0, help="of weights, batches, augmentation and noise")
    return group


def add_optimizer(parser, *, learning_rate, weight_decay, optimizers=OPTIMIZERS, clip=0.0, clip_default="0, never"):
    """Adam and its like; without a choice of `optimizers` it is AdamW. `clip` is the default of --max_grad_norm."""
    group = parser.group("optimizer")
    sgd = (lambda args: getattr(args, "optimizer", None) == "sgd", "--optimizer sgd")
    if optimizers:
        group.add("--optimizer", choices=optimizers, default="adam", help="adam: weight decay as L2")
    group.add("--learning_rate", type=above_zero, default=learning_rate, help="suits the stand-ins")
    words = "decay of the gradients" + ("; of sgd the momentum" if optimizers else "")
    group.add("--adam_beta1", type=below_one, default=0.9, help=words)
    group.add("--adam_beta2", type=below_one, default=0.999, idle=sgd, help="decay of the squared gradients")
    group.add("--adam_epsilon", type=above_zero, default=1e-8, idle=sgd, help="added to the root of these squares")
    group.add("--adam_weight_decay", type=not_negative, default=weight_decay, help="weight decay")
    group.add("--max_grad_norm", type=not_negative, default=clip, help=f"clip gradients to it; default {clip_default}")
    add_8bit(group)
    return group


def add_8bit(group):
    words = "8-bit optimizer of bitsandbytes; with the word torchao that of torchao, which compiles its steps"
    group.add("--use_8bit_adam", nargs="?", const=True, default=False, type=eight_bit, metavar="torchao", help=words)


def eight_bit(text):
    """A bare flag is bitsandbytes too."""
    if text not in ("bitsandbytes", "torchao"):
        raise argparse.ArgumentTypeError(f"must be bitsandbytes or torchao, got {text}")
    return text == "bitsandbytes" or text


def add_schedule(parser, *, milestones, own=()):
    """The learning rate over time; `own` are schedules of the script beside warmup_multistep and diffusers'."""
    group = parser.group("learning rate over time")
    by_step = (lambda args: args.lr_scheduler != MULTISTEP, lambda args: f"--lr_scheduler {args.lr_scheduler}")
    by_epoch = (lambda args: args.lr_scheduler == MULTISTEP, f"--lr_scheduler {MULTISTEP}")
    rising = (lambda args: args.lr_scheduler not in (MULTISTEP, *own), by_step[1])
    group.add("--lr_scheduler", choices=[*own, MULTISTEP, *STEP_SCHEDULES], default=MULTISTEP, help="how it changes")
    words = "warmup_multistep: the first epoch at the full rate"
    group.add("--lr_warmup_epochs", type=at_least(0), default=1, idle=by_step, help=words)
    group.add("--lr_warmup_factor", type=fraction, default=0.1, idle=rising, help="factor at epoch 0 of that rise")
    words = "warmup_multistep: when it drops"
    group.add("--lr_milestones", type=int, nargs="*", default=milestones, idle=by_step, help=words)
    group.add("--lr_gamma", type=fraction, default=0.1, idle=by_step, help="warmup_multistep: factor at a milestone")
    group.add("--lr_warmup_steps", type=at_least(0), default=0, idle=by_epoch, help="other schedules: steps of rise")
    return group


def add_memory(parser, *, checkpointing=True, compiled=None, xformers=False):
    """Speed and memory of a card; `compiled`: what --torch_compile compiles."""
    group = parser.group("speed and memory")
    group.add("--mixed_precision", choices=PRECISIONS, help="precision; default: accelerate's setting")
    group.switch("--allow_tf32", "TF32 in matrix products too, on Ampere and newer")
    if checkpointing:
        group.switch("--gradient_checkpointing", "recompute activations: less memory, more time", free=True)
    if compiled:
        group.switch("--torch_compile", f"compile {compiled}")
    if xformers:
        group.switch("--enable_xformers_memory_efficient_attention", "xformers in the U-Net; default torch's SDPA")
    return group


def add_evaluation(parser, *, every, resample=False, rerank=True):
    group = parser.group("evaluation")
    group.add("--eval_every", type=at_least(1), default=every, free=True, help="epochs between evaluations")
    group.add("--eval_batch_size", type=at_least(1), default=64, free=True, help="images of each process")
    if resample:
        words = "resizing of targets; default: as the model has it, most bilinear"
        group.add("--test_resample", choices=["bilinear", "bicubic"], help=words)
    if rerank:
        add_reranking(group)
    return group


def add_reranking(group):
    idle = (lambda args: not args.rerank, "no --rerank")
    group.switch("--rerank", "k-reciprocal re-ranking beside the plain numbers")
    group.add("--k1", type=at_least(1), default=20, idle=idle, help="re-ranking: reciprocal neighbours")
    group.add("--k2", type=at_least(1), default=6, idle=idle, help="re-ranking: neighbours averaged over, 1 for none")
    group.add("--lambda_value", type=fraction, default=0.3, idle=idle, help="re-ranking: weight of the plain distance")


def add_output(parser, folder, *, uploaded="the model"):
    group = parser.group("output", free=True)
    group.add("--output_dir", default=folder, help="folder of the results")
    group.add("--checkpointing_steps", type=at_least(1), default=500, help="steps between checkpoints")
    group.add("--checkpoints_total_limit", type=at_least(1), default=2, help="how many checkpoints are kept")
    group.add(
        "--resume_from_checkpoint", help="`latest` (from 0 where there is none), a name such as checkpoint-500, a path"
    )
    group.add("--log_every", type=at_least(1), default=1, help="steps between writes of log.jsonl")
    group.add("--report_to", nargs="+", default=["none"], help="trackers: tensorboard, wandb, trackio and others")
    add_upload(group, f"{uploaded} at the end, to a private repository where it is new")
    return group


def add_upload(group, uploaded, repository="--hub_model_id", **options):
    group.switch("--push_to_hub", f"upload {uploaded}", **options)
    idle = (lambda args: not args.push_to_hub, "no --push_to_hub")
    group.add(repository, idle=idle, help="repository; default: the name of --output_dir", **options)


def check_optimizer(parser, args):
    if args.use_8bit_adam and args.optimizer == "sgd":
        parser.error("--use_8bit_adam goes with --optimizer adam or adamw, not sgd")
