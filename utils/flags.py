"""Flags of the scripts: recipes below what the command line gives, ranges, and where each value came from.

torch is not imported here: `--help` and a mistyped flag answer at once.
"""

import argparse
import math
from pathlib import Path


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


STANDINS = Path(__file__).parent / "standins"
CLIP_DIR, DIFFUSION_DIR, CAPTIONER_DIR = (str(STANDINS / name) for name in ("clip", "stable-diffusion", "blip-vqa"))
OWN_SCHEDULE = "warmup_multistep"
# diffusers' own after it, but the one that takes rules.
SCHEDULES = (
    OWN_SCHEDULE, "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
)  # fmt: skip
OPTIMIZERS = ("adam", "adamw", "sgd")
SINGLE_IMAGE_IDS = ("error", "repeat", "drop")
