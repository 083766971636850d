"""Mixup and CutMix of neighbours in a batch: one draw per step, the same on any number of processes.

Image 2i is mixed with image 2i + 1. Both are on the same process if every process has an even number of images. The
order of a batch is random, so its pairs are random too.
"""

import math
import random
from typing import NamedTuple


class Mix(NamedTuple):
    """How the images of a step are mixed: not at all (share 1), a blend, or a pasted `box` (top, bottom, left, right).

    `share` is the part of an image that stays unchanged, and the weight of its own label.
    """

    share: float = 1.0
    box: tuple | None = None


class Mixing:
    """Mixup with Beta(`mixup`, `mixup`) or CutMix with Beta(`cutmix`, `cutmix`), chosen at random; 0 turns one off."""

    def __init__(self, mixup=0.0, cutmix=0.0, seed=0):
        self.mixup, self.cutmix, self.seed = mixup, cutmix, seed

    def draw(self, step, image_size):
        kinds = [kind for kind in ("mixup", "cutmix") if getattr(self, kind)]
        if not kinds:
            return Mix()
        rng = random.Random(f"mixing/{self.seed}/{step}")
        kind = rng.choice(kinds)
        alpha = getattr(self, kind)
        share = rng.betavariate(alpha, alpha)
        return Mix(share) if kind == "mixup" else cut(share, image_size, rng)


def cut(share, image_size, rng):
    """A box with 1 - share of the area, at a random place, cut at the edges; the share is then corrected."""
    height, width = image_size
    half = 0.5 * math.sqrt(1 - share)
    y, x = rng.randrange(height), rng.randrange(width)
    top, bottom = max(0, y - int(half * height)), min(height, y + int(half * height))
    left, right = max(0, x - int(half * width)), min(width, x + int(half * width))
    return Mix(1 - (bottom - top) * (right - left) / (height * width), (top, bottom, left, right))


def neighbours(tensor):
    """Swaps the two entries of each pair."""
    return tensor.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def mix_images(images, mix):
    """Mixed images (B, C, H, W), B even; the input is not changed."""
    if mix.share == 1:
        return images
    others = neighbours(images)
    if mix.box is None:
        return images.lerp(others, 1 - mix.share)
    top, bottom, left, right = mix.box
    mixed = images.clone()
    mixed[..., top:bottom, left:right] = others[..., top:bottom, left:right]
    return mixed


def mixed_loss(loss, logits, labels, mix):
    """The loss for labels mixed like the images; `loss` must be linear in its labels, as cross-entropy is."""
    own_loss = loss(logits, labels)
    return own_loss if mix.share == 1 else mix.share * own_loss + (1 - mix.share) * loss(logits, neighbours(labels))
