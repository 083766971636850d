"""Ranges as types of flags: a value that does not fit ends in one line.

group.add("--rank", type=at_least(1), default=8, help="rank of LoRA")
"""

import argparse
import functools
import math


def number(text, kind, fits, words):
    try:
        value = kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a {'whole ' * (kind is int)}number, got {text!r}") from None
    if not fits(value):
        raise argparse.ArgumentTypeError(f"must be {words}, got {value}")
    return value


@functools.cache
def at_least(least):
    """Whole numbers from `least` on."""
    return lambda text: number(text, int, lambda value: value >= least, f"{least} or more")


@functools.cache
def between(least, most):
    """Whole numbers from `least` to `most`."""
    return lambda text: number(text, int, lambda value: least <= value <= most, f"{least} to {most}")


def or_word(kind, *words):
    """Values of another range, or one of these words."""
    return lambda text: text if text in words else kind(text)


def one_or_more(text):
    return number(text, float, lambda value: 1 <= value < math.inf, "1 or more")


def above_zero(text):
    return number(text, float, lambda value: 0 < value < math.inf, "above 0")


def not_negative(text):
    return number(text, float, lambda value: 0 <= value < math.inf, "0 or more")


def fraction(text):
    return number(text, float, lambda value: 0 <= value <= 1, "between 0 and 1")


def share(text):
    return number(text, float, lambda value: 0 < value <= 1, "above 0 and at most 1")


def minority(text):
    return number(text, float, lambda value: 0 <= value < 0.5, "0 or more, and below 0.5")


def below_one(text):
    return number(text, float, lambda value: 0 <= value < 1, "between 0 and 1, and below 1")


def seed(text):
    return number(text, int, lambda value: 0 <= value < 2**32, "0 or more, and below 2^32")


def pixels(text):
    return number(text, int, lambda value: value >= 8, "at least 8 pixels")
