"""Arguments of the scripts: recipes under flags, ranges, and an end that says in one line what was wrong.

torch is not imported here, so that what needs no model can start at once.
"""

import argparse
import json
import math
import os
import sys
from pathlib import Path

from safetensors import SafetensorError

SCRIPTS = (
    "adapt_reid.py", "evaluate.py", "filter_generated.py", "finetune_reid.py", "pretrain_backbone.py", "train_dcac.py",
    "train_dreambooth_reid.py",
)  # fmt: skip


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
            told = ", ".join(f"{name} {shown(getattr(args, name))}" for name in names)
            lines.append(f"From {f'--recipe {args.recipe}' if source == 'recipe' else 'the command line'}: {told}")
    return lines


def shown(value):
    """An argument's value in words."""
    if isinstance(value, dict):
        # A number for all, or one for each domain.
        return " ".join(f"{number}" if name is None else f"{name}={number}" for name, number in value.items())
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def check_ranges(parser, args, *, one_or_more=(), positive=(), not_negative=(), fractions=()):
    """parser.error for the first argument out of its range; None is never out."""
    kinds = (
        (one_or_more, "1 or more", lambda value: value >= 1),
        (positive, "above 0", lambda value: 0 < value < math.inf),
        (not_negative, "0 or more", lambda value: value >= 0),
        (fractions, "between 0 and 1", lambda value: 0 <= value <= 1),
    )
    for names, words, fits in kinds:
        for name in names:
            value = getattr(args, name)
            if value is not None and not fits(value):
                parser.error(f"--{name} must be {words}, got {value}")
    for name in ("adam_beta1", "adam_beta2"):
        if getattr(args, name, 0) == 1:
            parser.error(f"--{name} must be below 1, got {getattr(args, name)}")
    # What numpy takes.
    if getattr(args, "seed", 0) >= 2**32:
        parser.error(f"--seed must be below 2^32, got {args.seed}")


def check_folder(folder, script):
    """ValueError where `folder` cannot be written, or holds what another of the scripts left.

    Results must not write over each other. A script of one's own, copied from one of them, may go on where that was.
    """
    place = Path(folder)
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise ValueError(f"--output_dir {folder}: {place} is no folder that can be written to; give another")
    try:
        command = json.loads((Path(folder) / "args.json").read_text(encoding="utf-8"))["command"]
        words = [word for word in command.split() if word.endswith(".py")] if isinstance(command, str) else command
        owner = words[0]
    except (OSError, ValueError, LookupError, TypeError):
        return
    if owner in SCRIPTS and owner != script:
        raise ValueError(f"{folder} holds what {owner} left; give another --output_dir")


def end_with(main, args, script, *, lean="lower --train_batch_size, or add --gradient_checkpointing"):
    """main(args) and exit, with what a user can do something about said in one line; `lean` is for a full card."""
    try:
        check_folder(args.output_dir, script)
        code = main(args)
    except ValueError as error:
        message = str(error)
    except (OSError, SafetensorError) as error:
        message = f"{error}; checkpoints and results in {args.output_dir} are as they were before"
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        message = f"{error}; {lean}"
    else:
        # What else a main returns is for those who call it.
        sys.exit(code if isinstance(code, int) else 0)
    sys.exit(f"{script}: {' '.join(message.split())}")
