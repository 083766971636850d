"""The built-in world: pedestrians drawn by code, so that everything runs anywhere and nobody's privacy is in it.

    python -m utils.synthetic --domain a --num_ids 8 --out sheet.png

A domain is a set of cameras with a place, a light and a palette of clothes; an identity is body, skin, hair, garments,
shoes, bag and hat. (domain, seed, pid, camid, index) decides every pixel, on every machine. The true attributes are
there as words, so captions and filters can be checked against truth. Domains a to e are for training and testing,
f to h only for pre-training the stand-in models.
"""

import argparse
import functools
import io
import math
import random
import re

import datasets
import fsspec
from fsspec.spec import AbstractFileSystem
from PIL import Image, ImageDraw

from utils.drawing import COLOURS, HAIR, SKIN, shade
from utils.scenery import draw_image

SIZE = (128, 64)
PROTOCOL = "synthetic"
NAME = re.compile(r"synthetic-([a-z])/s(\d+)/(\d{4,})_c(\d+)_(\d{4,})\.png")
MIN_IMAGES_PER_ID = 3

# Words of every attribute; captions and the tokenizer of the stand-ins are made from these.
UPPER_KINDS = ("t-shirt", "shirt", "jacket", "coat", "hoodie")
PATTERNS = ("plain", "striped", "checked", "dotted", "printed")
LOWER_KINDS = ("trousers", "shorts", "skirt")
HAIR_KINDS = ("short", "long")
CARRIED_KINDS = ("nothing", "backpack", "handbag", "shoulder bag")
HATS = ("none", "cap", "beanie")
VIEWS = ("front", "back", "left", "right")
INDOORS = ("in a metro station", "in a shop", "in an indoor hall")


def camera(style, variant, **changes):
    values = {
        "style": style,
        "variant": variant,
        "gain": 1.0,
        "gamma": 1.0,
        "cast": (1.0, 1.0, 1.0),
        "flat": 0.0,
        "size": 0.86,
        "ground": 0.95,
        "tilt": 0.05,
        "blur": 0.0,
        "coarse": 1.0,
        "noise": 0.06,
        "quality": 80,
        "occlusion": 0.10,
        "occluders": ("pole",),
        "weather": None,
        "views": (3, 3, 2, 2),
    }
    return values | changes


# name, weights of the upper colours, of the lower colours, of the upper kinds (in their order above), and the cameras.
DOMAINS = {
    "a": {
        "place": "on a bright campus",
        "upper": {"white": 4, "blue": 3, "red": 3, "green": 2, "yellow": 2, "grey": 2, "pink": 2, "orange": 1},
        "lower": {"blue": 4, "black": 3, "beige": 2, "grey": 2},
        "kinds": (5, 3, 2, 0, 2),
        "cameras": [
            camera("campus", 0, gain=1.10, occluders=("bush", "pole")),
            camera("campus", 1, gain=0.78, cast=(0.92, 0.98, 1.10), tilt=0.10, size=0.80),
            camera("campus", 2, gain=1.25, cast=(1.12, 1.02, 0.84), flat=0.06, quality=55, occluders=("bush",)),
            camera("campus", 3, gain=0.95, cast=(0.95, 1.06, 0.92), blur=0.8, size=0.74, tilt=0.14, noise=0.10),
        ],
    },
    "b": {
        "place": "on a street at night",
        "upper": {"black": 4, "grey": 3, "white": 3, "purple": 2, "red": 2, "brown": 2, "blue": 2},
        "lower": {"black": 4, "grey": 3, "blue": 3, "brown": 2},
        "kinds": (2, 2, 5, 2, 3),
        "cameras": [
            camera("night", 0, gain=0.80, cast=(1.12, 0.98, 0.76), noise=0.20, quality=60),
            camera("night", 1, gain=0.66, cast=(0.86, 0.94, 1.20), noise=0.26, quality=55, tilt=0.10),
            camera("night", 2, gain=0.92, cast=(1.20, 0.94, 0.68), blur=0.7, noise=0.16, size=0.78),
            camera("night", 3, gain=0.60, gamma=0.86, flat=0.05, noise=0.30, quality=45, size=0.90),
        ],
    },
    "c": {
        "place": "in a metro station",
        "upper": {"black": 4, "blue": 3, "beige": 3, "green": 2, "grey": 3, "orange": 1, "purple": 1, "white": 2},
        "lower": {"black": 5, "blue": 3, "beige": 2, "brown": 1},
        "kinds": (2, 4, 4, 3, 2),
        "cameras": [
            camera("metro", 0, cast=(0.94, 1.08, 0.86), tilt=0.14, occlusion=0.2, occluders=("bar", "pole")),
            camera("metro", 1, gain=0.80, cast=(1.08, 1.06, 0.80), tilt=0.18, size=0.80, quality=50),
            camera("metro", 2, gain=1.15, cast=(0.90, 1.02, 1.04), flat=0.08, blur=0.9, occluders=("bar",)),
            camera("metro", 3, gain=0.70, cast=(1.0, 1.10, 0.90), noise=0.18, coarse=1.5, tilt=0.10),
        ],
    },
    "d": {
        "place": "in a shop",
        "upper": {"pink": 3, "white": 4, "red": 3, "yellow": 2, "black": 3, "beige": 2, "green": 2, "blue": 2},
        "lower": {"blue": 4, "black": 3, "white": 2, "pink": 1, "grey": 2},
        "kinds": (4, 4, 2, 1, 3),
        "cameras": [
            camera("shop", 0, cast=(1.10, 1.0, 0.84), tilt=0.18, occlusion=0.35, occluders=("bar",)),
            camera("shop", 1, gain=1.22, cast=(1.06, 1.0, 0.90), flat=0.05, tilt=0.22, size=0.80),
            camera("shop", 2, gain=0.76, cast=(1.16, 0.98, 0.76), tilt=0.12, occlusion=0.35, occluders=("bar",)),
            camera("shop", 3, gain=0.98, cast=(0.92, 1.0, 1.08), coarse=1.6, quality=60, tilt=0.26, size=0.78),
        ],
    },
    "e": {
        "place": "on a square seen from above",
        "upper": {"grey": 3, "black": 4, "white": 3, "blue": 3, "brown": 2, "red": 2, "yellow": 1, "purple": 1},
        "lower": {"black": 4, "blue": 3, "grey": 3, "beige": 2},
        "kinds": (3, 3, 3, 2, 3),
        "cameras": [
            camera("cctv", 0, tilt=0.36, size=0.74, coarse=1.8, quality=50, flat=0.10, cast=(0.98, 1.0, 0.96)),
            camera("cctv", 1, tilt=0.42, size=0.70, coarse=2.0, quality=45, flat=0.12, gain=0.84, noise=0.12),
            camera(
                "cctv", 2, tilt=0.32, size=0.78, coarse=1.6, quality=40, flat=0.08, gain=1.16, cast=(1.06, 1.0, 0.88)
            ),
            camera("cctv", 3, tilt=0.40, size=0.72, coarse=2.2, quality=55, flat=0.14, cast=(0.90, 0.98, 1.08)),
        ],
    },
    "f": {
        "place": "on a street in the rain",
        "upper": {
            "yellow": 3,
            "blue": 3,
            "black": 3,
            "green": 3,
            "red": 2,
            "grey": 2,
            "purple": 2,
            "orange": 2,
            "brown": 2,
        },
        "lower": {"black": 3, "blue": 3, "grey": 2, "brown": 2, "green": 1, "beige": 1, "white": 1},
        "kinds": (3, 3, 4, 3, 3),
        "cameras": [
            camera("rain", 0, gain=0.92, cast=(0.92, 1.0, 1.08), weather="rain"),
            camera("rain", 1, gain=0.78, flat=0.08, weather="rain", tilt=0.16, size=0.80, quality=60),
            camera("rain", 2, gain=1.06, cast=(0.96, 1.02, 1.06), weather="rain", blur=0.8, noise=0.12),
            camera("rain", 3, gain=0.66, cast=(1.10, 0.98, 0.80), weather="rain", noise=0.22, quality=50),
        ],
    },
    "g": {
        "place": "in the snow",
        "upper": {
            "red": 3,
            "white": 2,
            "orange": 2,
            "pink": 3,
            "purple": 3,
            "blue": 2,
            "black": 2,
            "beige": 2,
            "green": 2,
        },
        "lower": {"black": 3, "grey": 3, "blue": 2, "white": 2, "purple": 1, "red": 1, "brown": 1},
        "kinds": (3, 3, 4, 4, 3),
        "cameras": [
            camera("snow", 0, gain=1.12, weather="snow"),
            camera("snow", 1, gain=0.84, cast=(0.92, 0.98, 1.10), weather="snow", tilt=0.12, size=0.78),
            camera("snow", 2, gain=1.0, cast=(1.10, 1.0, 0.86), weather="snow", flat=0.06, quality=55),
            camera("snow", 3, gain=0.94, weather="snow", coarse=1.6, tilt=0.30, size=0.76),
        ],
    },
    "h": {
        "place": "in an indoor hall",
        "upper": {
            "white": 3,
            "beige": 2,
            "brown": 2,
            "pink": 2,
            "yellow": 3,
            "grey": 3,
            "orange": 3,
            "green": 2,
            "blue": 2,
        },
        "lower": {"blue": 3, "beige": 3, "white": 2, "black": 2, "pink": 2, "yellow": 1, "orange": 1},
        "kinds": (4, 4, 3, 2, 3),
        "cameras": [
            camera("hall", 0, cast=(1.10, 1.0, 0.84), occlusion=0.2, occluders=("bar", "pole")),
            camera("hall", 1, gain=0.72, cast=(1.06, 1.0, 0.90), tilt=0.20, size=0.80),
            camera("hall", 2, gain=1.28, cast=(1.04, 1.02, 0.92), flat=0.08, quality=60, tilt=0.12),
            camera("hall", 3, gain=0.90, cast=(0.96, 1.08, 0.92), blur=0.8, noise=0.16, tilt=0.26, size=0.76),
        ],
    },
}


def choose(rng, weights):
    return rng.choices(list(weights), list(weights.values()))[0]


def tint(rng, colour):
    """The same word covers many cloths: one shade of the colour."""
    level = rng.uniform(0.86, 1.12)
    return tuple(max(0, min(255, round(channel * level + rng.uniform(-12, 12)))) for channel in colour)


@functools.lru_cache(maxsize=4096)
def person(domain, pid, seed=0):
    """Everything that stays the same about one identity: words, colours and proportions."""
    spec = DOMAINS[domain]
    rng = random.Random(f"person/{domain}/{seed}/{pid}")
    who = {
        "build": rng.uniform(0.84, 1.22),
        "height": rng.uniform(0.93, 1.04),
        "skin": rng.randrange(len(SKIN)),
        "hair_kind": rng.choice(HAIR_KINDS),
        "hair_colour": choose(rng, {"black": 4, "brown": 4, "blond": 3, "grey": 2, "red": 1}),
        "upper_kind": rng.choices(UPPER_KINDS, spec["kinds"])[0],
        "upper_colour": choose(rng, spec["upper"]),
        "pattern": rng.choices(PATTERNS, (5, 2, 1, 1, 2))[0],
        "lower_kind": rng.choices(LOWER_KINDS, (6, 2, 2))[0],
        "lower_colour": choose(rng, spec["lower"]),
        "shoes_colour": choose(rng, {"black": 4, "white": 4, "brown": 2, "red": 1, "blue": 1}),
        "carried_kind": rng.choices(CARRIED_KINDS, (4, 3, 2, 2))[0],
        "carried_colour": choose(
            rng, {"black": 3, "brown": 2, "red": 2, "blue": 2, "green": 2, "yellow": 1, "purple": 1}
        ),
        "hat_kind": rng.choices(HATS, (6, 2, 2))[0],
        "hat_colour": choose(rng, {"black": 3, "red": 2, "blue": 2, "white": 2, "green": 1, "yellow": 1}),
        "second": rng.choice(("white", "black", "yellow", "red", "blue", "green")),
        "pitch": rng.uniform(0.040, 0.075),
        "print_x": rng.choice((-0.045, 0.0, 0.045)),
    }
    if who["second"] == who["upper_colour"]:
        who["second"] = "black" if who["upper_colour"] != "black" else "white"
    for part in ("upper", "lower", "shoes", "carried", "hat"):
        who[f"{part}_rgb"] = tint(rng, COLOURS[who[f"{part}_colour"]])
    who["hair_rgb"] = tint(rng, HAIR[who["hair_colour"]])
    who["second_rgb"] = tint(rng, COLOURS[who["second"]])
    who["inner_rgb"] = tint(rng, COLOURS[rng.choice(("white", "grey", "black", "blue", "red"))])
    who["sleeve_rgb"] = shade(who["upper_rgb"], 0.94)
    return who


def attributes(domain, pid, seed=0):
    """The truth about one identity, as words."""
    who = person(domain, pid, seed)
    pattern = "" if who["pattern"] == "plain" else f"{who['pattern']} "
    return {
        "upper": f"{who['upper_colour']} {pattern}{who['upper_kind']}",
        "upper_colour": who["upper_colour"],
        "upper_kind": who["upper_kind"],
        "pattern": who["pattern"],
        "lower": f"{who['lower_colour']} {who['lower_kind']}",
        "lower_colour": who["lower_colour"],
        "lower_kind": who["lower_kind"],
        "shoes": f"{who['shoes_colour']} shoes",
        "hair": f"{who['hair_kind']} {who['hair_colour']} hair",
        "carried": "nothing" if who["carried_kind"] == "nothing" else f"{who['carried_colour']} {who['carried_kind']}",
        "hat": "none" if who["hat_kind"] == "none" else f"{who['hat_colour']} {who['hat_kind']}",
    }


def caption(words, noun="person"):
    """One sentence in a fixed order from `attributes` (and a place, an action or a view where given)."""
    parts = [f"wearing a {words['upper']}, {words['lower']} and {words['shoes']}", f"with {words['hair']}"]
    if words["carried"] != "nothing":
        parts.append(f"carrying a {words['carried']}")
    if words["hat"] != "none":
        parts.append(f"in a {words['hat']}")
    parts += [words[key] for key in ("action", "view", "place") if key in words]
    return f"a photo of a {noun}, " + ", ".join(parts)


def pose_of(domain, pid, camid, index, seed=0):
    """What differs from picture to picture, and the generator that goes on to draw it."""
    lens = DOMAINS[domain]["cameras"][camid]
    rng = random.Random(f"image/{domain}/{seed}/{pid}/{camid}/{index}")
    walking = rng.random() < 0.75
    pose = {
        "view": rng.choices(VIEWS, lens["views"])[0],
        "phase": rng.uniform(0, 2 * math.pi),
        "stride": rng.uniform(0.6, 1.0) if walking else rng.uniform(0.0, 0.15),
        "zoom": rng.uniform(0.92, 1.06),
        "shift": rng.uniform(-0.09, 0.09),
        "drop": rng.uniform(-0.025, 0.025),
        "slant": round(rng.choice((-1, 1)) * rng.uniform(0.15, 0.5), 1),
        "exposure": rng.uniform(0.88, 1.12),
        "occluder": rng.choice(lens["occluders"]) if rng.random() < lens["occlusion"] else None,
        "walking": walking,
    }
    return pose, rng


def describe(domain, pid, camid, index, seed=0):
    """`attributes` and what is true of one picture only: action, view, place and scene."""
    pose, _ = pose_of(domain, pid, camid, index, seed)
    view = {"front": "seen from the front", "back": "seen from behind"}.get(pose["view"], "seen from the side")
    action = "walking" if pose["walking"] else "standing"
    place = DOMAINS[domain]["place"]
    scene = "indoors" if place in INDOORS else "outdoors"
    return attributes(domain, pid, seed) | {"action": action, "view": view, "place": place, "scene": scene}


def render(domain, pid, camid, index, seed=0):
    """One picture, 128 x 64."""
    pose, rng = pose_of(domain, pid, camid, index, seed)
    return draw_image(person(domain, pid, seed), pose, DOMAINS[domain]["cameras"][camid], rng, SIZE)


def camera_of(domain, pid, index, seed=0):
    """The camera of an identity's picture: two in one camera, then on to the next, starting anywhere."""
    count = len(DOMAINS[domain]["cameras"])
    start = random.Random(f"route/{domain}/{seed}/{pid}").randrange(count)
    return (start + index // 2) % count


def file_name(domain, pid, camid, index, seed=0):
    """Depends on nothing but its arguments; cameras count from 1 in file names, as in the benchmarks."""
    return f"synthetic-{domain}/s{seed}/{pid:04d}_c{camid + 1}_{index:04d}.png"


def parse_name(path):
    """The arguments of `render`, from a file name."""
    match = NAME.fullmatch(path)
    if match is None:
        raise ValueError(f"not a picture of the synthetic world: {path!r}; expected synthetic-a/s0/0003_c2_0005.png")
    domain, seed, pid, camid, index = match.groups()
    if domain not in DOMAINS or not 1 <= int(camid) <= len(DOMAINS[domain]["cameras"]):
        raise ValueError(f"no such domain or camera in the synthetic world: {path!r}")
    return {"domain": domain, "pid": int(pid), "camid": int(camid) - 1, "index": int(index), "seed": int(seed)}


class SyntheticFileSystem(AbstractFileSystem):
    """Files that are drawn when they are opened, so that an ordinary `datasets.Image` column reads them lazily."""

    protocol = PROTOCOL
    cachable = True

    def _open(self, path, mode="rb", **kwargs):
        if mode != "rb":
            raise ValueError(f"the synthetic world can only be read, got mode {mode!r}")
        buffer = io.BytesIO()
        render(**parse_name(self._strip_protocol(path))).save(buffer, "PNG", compress_level=1)
        buffer.seek(0)
        return buffer

    def info(self, path, **kwargs):
        name = self._strip_protocol(path)
        parse_name(name)
        return {"name": name, "size": None, "type": "file"}


fsspec.register_implementation(PROTOCOL, SyntheticFileSystem, clobber=True)

FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "pid": datasets.Value("int64"),
        "camid": datasets.Value("int64"),
        "domain": datasets.Value("string"),
        "path": datasets.Value("string"),
    }
)


def check_request(domain, num_ids, images_per_id, seed):
    if domain not in DOMAINS:
        raise ValueError(f"synthetic domain {domain!r} does not exist; there are {', '.join(DOMAINS)}")
    for name, value, least in (
        ("num_ids", num_ids, 1),
        ("images_per_id", images_per_id, MIN_IMAGES_PER_ID),
        ("seed", seed, 0),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(
                f"{name} of the synthetic world must be a whole number of at least {least}, got {value!r}"
            )


def load(domain="a", num_ids=32, images_per_id=8, seed=0):
    """`num_ids` identities for training and as many others for testing; larger numbers only add rows.

    Even identities train, odd ones test. An identity's first picture in a camera is a query, the rest are gallery.
    """
    check_request(domain, num_ids, images_per_id, seed)
    rows = {"train": [], "query": [], "gallery": []}
    for pid in range(2 * num_ids):
        seen = set()
        for index in range(images_per_id):
            camid = camera_of(domain, pid, index, seed)
            split = "train" if pid % 2 == 0 else ("gallery" if camid in seen else "query")
            seen.add(camid)
            rows[split].append((pid, camid, file_name(domain, pid, camid, index, seed)))
    splits = {}
    for split, entries in rows.items():
        pids, camids, paths = (list(column) for column in zip(*sorted(entries), strict=True))
        columns = {
            "image": [{"bytes": None, "path": f"{PROTOCOL}://{path}"} for path in paths],
            "pid": pids,
            "camid": camids,
            "domain": [f"synthetic-{domain}"] * len(paths),
            "path": paths,
        }
        splits[split] = datasets.Dataset.from_dict(columns, features=FEATURES, split=split)
    return datasets.DatasetDict(splits)


def contact_sheet(domain, num_ids=8, images_per_id=8, seed=0):
    """Identities downwards, their pictures camera by camera to the right."""
    check_request(domain, num_ids, images_per_id, seed)
    height, width = SIZE
    sheet = Image.new("RGB", (images_per_id * (width + 4) + 4, num_ids * (height + 4) + 18), (250, 250, 250))
    ink = ImageDraw.Draw(sheet)
    ink.text((4, 3), f"synthetic {domain}: {DOMAINS[domain]['place']}", fill=(20, 20, 20))
    for pid in range(num_ids):
        order = sorted(range(images_per_id), key=lambda index, pid=pid: (camera_of(domain, pid, index, seed), index))
        for column, index in enumerate(order):
            picture = render(domain, pid, camera_of(domain, pid, index, seed), index, seed)
            sheet.paste(picture, (4 + column * (width + 4), 18 + pid * (height + 4)))
    return sheet


def main(input_args=None):
    parser = argparse.ArgumentParser(description="Draw a contact sheet of the synthetic world: identities x cameras.")
    parser.add_argument("--domain", default="a", choices=sorted(DOMAINS), help="which domain")
    parser.add_argument("--num_ids", type=int, default=8, help="identities, one a row")
    parser.add_argument("--images_per_id", type=int, default=8, help="pictures of each, sorted by camera")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other people")
    parser.add_argument("--out", default="sheet.png", help="file to write")
    args = parser.parse_args(input_args)
    try:
        contact_sheet(args.domain, args.num_ids, args.images_per_id, args.seed).save(args.out)
    except ValueError as error:
        parser.error(str(error))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
