"""What generators get wrong, drawn: bodies that fell apart, and people with one attribute of another."""

import math

from PIL import Image, ImageChops, ImageFilter, ImageOps

from utils.synthetic.person import COLOURS, HAIR, shade
from utils.synthetic.world import CARRIED_KINDS, HAIR_KINDS, HATS, LOWER_KINDS, PATTERNS, UPPER_KINDS, tint

# Range of piece sizes in pixels: a fixed size could equal the patches of a model.
PIECES = (5, 14)


def pieces(picture, rng):
    """Shuffled and turned squares."""
    width, height = picture.size
    piece = rng.randint(*PIECES)
    corners = [
        (left, top) for top in range(0, height - piece + 1, piece) for left in range(0, width - piece + 1, piece)
    ]
    mixed = picture.copy()
    for (left, top), place in zip(rng.sample(corners, len(corners)), corners, strict=True):
        mixed.paste(picture.crop((left, top, left + piece, top + piece)).rotate(rng.choice((0, 90, 180))), place)
    return mixed


def dissolved(picture, rng):
    return picture.resize((2, 3), Image.Resampling.BOX).resize(picture.size, Image.Resampling.BICUBIC)


def noise(picture, rng):
    width, height = picture.size
    drawn = Image.frombytes("RGB", picture.size, rng.randbytes(3 * width * height))
    return Image.blend(picture, drawn.filter(ImageFilter.GaussianBlur(1.5)), 0.93)


def melted(picture, rng):
    """Rows that are shifted along waves."""
    width, height = picture.size
    reach, length, start = rng.uniform(6, 11), rng.uniform(9, 22), rng.uniform(0, 2 * math.pi)
    moved = Image.new("RGB", picture.size)
    for top in range(height):
        row = picture.crop((0, top, width, top + 1))
        shift = round(reach * math.sin(start + 2 * math.pi * top / length)) % width
        moved.paste(row, (shift, top))
        moved.paste(row, (shift - width, top))
    return moved


def doubled(picture, rng):
    """Two bodies in one place."""
    width, height = picture.size
    moved = ImageOps.mirror(picture).transform(
        picture.size, Image.Transform.AFFINE, (1, 0, rng.choice((-1, 1)) * rng.randint(8, 16), 0, 1, 0)
    )
    return Image.blend(picture, moved, 0.5)


def two_heads(picture, rng):
    """The upper body again in place of the legs."""
    width, height = picture.size
    cut = round(rng.uniform(0.45, 0.55) * height)
    mixed = picture.copy()
    upper = picture.crop((0, 0, width, height - cut))
    mixed.paste(ImageOps.flip(upper) if rng.random() < 0.5 else upper, (0, cut))
    return mixed


BREAKAGE = (pieces, dissolved, noise)
# For results: nothing was chosen by looking at these.
OTHER_BREAKAGE = (melted, doubled, two_heads)
ATTRIBUTES = (
    "upper_colour", "upper_kind", "pattern", "lower_colour", "lower_kind", "shoes_colour", "hair", "carried", "hat",
)  # fmt: skip


def near_miss(person, rng):
    """The appearance with another value of one attribute."""
    part = rng.choice(ATTRIBUTES)
    if part == "pattern":
        return person | {"pattern": other(rng, PATTERNS, person["pattern"])}
    if part in ("upper_kind", "lower_kind"):
        return person | {part: other(rng, UPPER_KINDS if part == "upper_kind" else LOWER_KINDS, person[part])}
    if part == "hair":
        colour = other(rng, HAIR, person["hair_colour"])
        kind = rng.choice(HAIR_KINDS)
        return person | {"hair_kind": kind, "hair_colour": colour, "hair_rgb": tint(rng, HAIR[colour])}
    if part in ("carried", "hat"):
        kinds = CARRIED_KINDS if part == "carried" else HATS
        return person | {f"{part}_kind": other(rng, kinds, person[f"{part}_kind"])}
    garment = part.removesuffix("_colour")
    colour = other(rng, COLOURS, person[part])
    changed = person | {part: colour, f"{garment}_rgb": tint(rng, COLOURS[colour])}
    return changed | {"sleeve_rgb": shade(changed["upper_rgb"], 0.94)}


def is_seen(picture, other):
    """Whether 40 pixels or more differ by a quarter of their range in a channel."""
    counts = [channel.histogram()[64:] for channel in ImageChops.difference(picture, other).split()]
    return max(map(sum, counts)) >= 40


def other(rng, values, value):
    return rng.choice([each for each in values if each != value])
