"""The built-in world: pedestrians drawn by code, so that everything runs without downloads or real people's images.

    python -m utils.synthetic --domain a --num_ids 8 --out sheet.png

A domain is a set of cameras with a place, a light and a palette of clothes. An identity has a body, skin, hair,
clothes, shoes, bag and hat. (domain, seed, pid, camid, index) determines every pixel on every machine with the same
version of Pillow; another version changes a few edges slightly. The true attributes are available as words, so
captions and filters can be checked against them. Domains a to e are for training and testing, f to h only for
pre-training the stand-in models.
"""

import functools
import io
import math
import random
import re

from fsspec.spec import AbstractFileSystem

from utils.synthetic.camera import draw_image
from utils.synthetic.domains import DOMAINS, INDOORS
from utils.synthetic.person import COLOURS, HAIR, SKIN, shade

SIZE = (128, 64)
PROTOCOL = "synthetic"
NAME = re.compile(r"synthetic-([a-z])/s(\d+)/(\d{4,})_c(\d+)_(\d{4,})\.png")
MIN_IMAGES_PER_ID = 3
# The words of every attribute; captions and the stand-ins' tokenizer are made from them.
UPPER_KINDS = ("t-shirt", "shirt", "jacket", "coat", "hoodie")
PATTERNS = ("plain", "striped", "checked", "dotted", "printed")
LOWER_KINDS = ("trousers", "shorts", "skirt")
HAIR_KINDS = ("short", "long")
CARRIED_KINDS = ("nothing", "backpack", "handbag", "shoulder bag")
HATS = ("none", "cap", "beanie")
VIEWS = ("front", "back", "left", "right")


def weighted_choice(rng, weights):
    return rng.choices(list(weights), list(weights.values()))[0]


def tint(rng, colour):
    """A random shade of the colour: one word stands for many shades."""
    level = rng.uniform(0.86, 1.12)
    return tuple(max(0, min(255, round(channel * level + rng.uniform(-12, 12)))) for channel in colour)


@functools.lru_cache(maxsize=4096)
def appearance(domain, pid, seed=0):
    """The constant properties of one identity: words, colours and proportions."""
    spec = DOMAINS[domain]
    rng = random.Random(f"person/{domain}/{seed}/{pid}")
    person = {
        "build": rng.uniform(0.84, 1.22),
        "height": rng.uniform(0.93, 1.04),
        "skin": rng.randrange(len(SKIN)),
        "hair_kind": rng.choice(HAIR_KINDS),
        "hair_colour": weighted_choice(rng, {"black": 4, "brown": 4, "blond": 3, "grey": 2, "red": 1}),
        "upper_kind": rng.choices(UPPER_KINDS, spec["kinds"])[0],
        "upper_colour": weighted_choice(rng, spec["upper"]),
        "pattern": rng.choices(PATTERNS, (5, 2, 1, 1, 2))[0],
        "lower_kind": rng.choices(LOWER_KINDS, (6, 2, 2))[0],
        "lower_colour": weighted_choice(rng, spec["lower"]),
        "shoes_colour": weighted_choice(rng, {"black": 4, "white": 4, "brown": 2, "red": 1, "blue": 1}),
        "carried_kind": rng.choices(CARRIED_KINDS, (4, 3, 2, 2))[0],
        "carried_colour": weighted_choice(
            rng, {"black": 3, "brown": 2, "red": 2, "blue": 2, "green": 2, "yellow": 1, "purple": 1}
        ),
        "hat_kind": rng.choices(HATS, (6, 2, 2))[0],
        "hat_colour": weighted_choice(rng, {"black": 3, "red": 2, "blue": 2, "white": 2, "green": 1, "yellow": 1}),
        "second": rng.choice(("white", "black", "yellow", "red", "blue", "green")),
        "pitch": rng.uniform(0.040, 0.075),
        "print_x": rng.choice((-0.045, 0.0, 0.045)),
    }
    if person["second"] == person["upper_colour"]:
        person["second"] = "black" if person["upper_colour"] != "black" else "white"
    for part in ("upper", "lower", "shoes", "carried", "hat"):
        person[f"{part}_rgb"] = tint(rng, COLOURS[person[f"{part}_colour"]])
    person["hair_rgb"] = tint(rng, HAIR[person["hair_colour"]])
    person["second_rgb"] = tint(rng, COLOURS[person["second"]])
    person["inner_rgb"] = tint(rng, COLOURS[rng.choice(("white", "grey", "black", "blue", "red"))])
    person["sleeve_rgb"] = shade(person["upper_rgb"], 0.94)
    return person


def attributes(domain, pid, seed=0):
    """The true attributes of one identity, as words."""
    person = appearance(domain, pid, seed)
    pattern = "" if person["pattern"] == "plain" else f"{person['pattern']} "
    return {
        "upper": f"{person['upper_colour']} {pattern}{person['upper_kind']}",
        "upper_colour": person["upper_colour"],
        "upper_kind": person["upper_kind"],
        "pattern": person["pattern"],
        "lower": f"{person['lower_colour']} {person['lower_kind']}",
        "lower_colour": person["lower_colour"],
        "lower_kind": person["lower_kind"],
        "shoes": f"{person['shoes_colour']} shoes",
        "hair": f"{person['hair_kind']} {person['hair_colour']} hair",
        "carried": "nothing"
        if person["carried_kind"] == "nothing"
        else f"{person['carried_colour']} {person['carried_kind']}",
        "hat": "none" if person["hat_kind"] == "none" else f"{person['hat_colour']} {person['hat_kind']}",
    }


def caption(words, noun="person"):
    """One sentence in a fixed order from `attributes` (and from a place, an action or a view if there is one)."""
    parts = [f"wearing a {words['upper']}, {words['lower']} and {words['shoes']}", f"with {words['hair']}"]
    if words["carried"] != "nothing":
        parts.append(f"carrying a {words['carried']}")
    if words["hat"] != "none":
        parts.append(f"in a {words['hat']}")
    parts += [words[key] for key in ("action", "view", "place") if key in words]
    return f"a photo of a {noun}, " + ", ".join(parts)


def pose_of(domain, pid, camid, index, seed=0):
    """(the properties that differ between pictures, the generator for the rest of the picture)."""
    lens = lens_of(domain, camid, seed)
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


def lens_of(domain, camid, seed=0):
    """A camera of the domain, or the place and light of one identity: numbers after the cameras are homes."""
    cameras = DOMAINS[domain]["cameras"]
    return cameras[camid] if camid < len(cameras) else home(domain, camid - len(cameras), seed)


@functools.lru_cache(maxsize=4096)
def home(domain, pid, seed):
    """A camera where only this identity is seen: its kind of place is that of the domain, its light is not."""
    rng = random.Random(f"home/{domain}/{seed}/{pid}")
    lens = rng.choice(DOMAINS[domain]["cameras"])
    light = {"gain": rng.uniform(0.7, 1.2), "cast": tuple(rng.uniform(0.75, 1.2) for _ in range(3))}
    return lens | light | {"variant": f"home/{seed}/{pid}"}


def describe(domain, pid, camid, index, seed=0):
    """`attributes`, and the properties of one picture: action, view, place and scene."""
    pose, _ = pose_of(domain, pid, camid, index, seed)
    view = {"front": "seen from the front", "back": "seen from behind"}.get(pose["view"], "seen from the side")
    action = "walking" if pose["walking"] else "standing"
    place = DOMAINS[domain]["place"]
    scene = "indoors" if place in INDOORS else "outdoors"
    return attributes(domain, pid, seed) | {"action": action, "view": view, "place": place, "scene": scene}


def render(domain, pid, camid, index, seed=0):
    """One picture, 128 x 64."""
    pose, rng = pose_of(domain, pid, camid, index, seed)
    return draw_image(appearance(domain, pid, seed), pose, lens_of(domain, camid, seed), rng, SIZE)


def camera_of(domain, pid, index, seed=0):
    """The camera of an identity's picture: two pictures in each camera in turn, from a random first camera."""
    count = len(DOMAINS[domain]["cameras"])
    start = random.Random(f"route/{domain}/{seed}/{pid}").randrange(count)
    return (start + index // 2) % count


def file_name(domain, pid, camid, index, seed=0):
    """The file name of a picture; cameras count from 1 in file names, as in the benchmarks."""
    return f"synthetic-{domain}/s{seed}/{pid:04d}_c{camid + 1}_{index:04d}.png"


def parse_name(path):
    """The arguments of `render`, from a file name."""
    match = NAME.fullmatch(path)
    if match is None:
        raise ValueError(f"not a picture of the synthetic world: {path!r}; expected synthetic-a/s0/0003_c2_0005.png")
    domain, seed, pid, camid, index = match.groups()
    count = len(DOMAINS[domain]["cameras"]) if domain in DOMAINS else 0
    if not 1 <= int(camid) <= count and (not count or int(camid) != count + 1 + int(pid)):
        raise ValueError(f"no such domain or camera in the synthetic world: {path!r}")
    return {"domain": domain, "pid": int(pid), "camid": int(camid) - 1, "index": int(index), "seed": int(seed)}


class SyntheticFileSystem(AbstractFileSystem):
    """Files that are drawn when they are opened, so that an ordinary `datasets.Image` column reads them lazily.

    `utils.datasets.images` registers it by name.
    """

    protocol = PROTOCOL
    cachable = True

    def _open(self, path, mode="rb", **kwargs):
        if mode != "rb":
            raise ValueError(f"the synthetic world can only be read, got mode {mode!r}")
        buffer = io.BytesIO()
        # Not compressed: compression would take as long as drawing.
        render(**parse_name(self._strip_protocol(path))).save(buffer, "PNG", compress_level=0)
        buffer.seek(0)
        return buffer

    def info(self, path, **kwargs):
        name = self._strip_protocol(path)
        parse_name(name)
        return {"name": name, "size": None, "type": "file"}


def check_request(domain, num_ids, images_per_id, seed, shortcut=0.0):
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
    if isinstance(shortcut, bool) or not isinstance(shortcut, (int, float)) or not 0 <= shortcut <= 1:
        raise ValueError(f"shortcut of the synthetic world must be a share between 0 and 1, got {shortcut!r}")


def rows(domain="a", num_ids=32, images_per_id=8, seed=0, shortcut=0.0):
    """{split: [(path, pid, camid)]}: `num_ids` identities for training and as many others for testing.

    With larger numbers, rows are only added. Even identities train, odd ones test. An identity's first picture in a
    camera is a query, its other pictures are in the gallery.

    `shortcut`: so many of each training identity's pictures, of 1, are taken in a place and light of its own, so that
    the background tells who it is. Query and gallery stay as they are.
    """
    check_request(domain, num_ids, images_per_id, seed, shortcut)
    num_cameras = len(DOMAINS[domain]["cameras"])
    splits = {"train": [], "query": [], "gallery": []}
    for pid in range(2 * num_ids):
        seen_cameras = set()
        for index in range(images_per_id):
            camid = camera_of(domain, pid, index, seed)
            # Spread evenly, so that more pictures only add rows.
            at_home = math.floor((index + 1) * shortcut + 1e-9) > math.floor(index * shortcut + 1e-9)
            if at_home and pid % 2 == 0:
                camid = num_cameras + pid
            split = "train" if pid % 2 == 0 else ("gallery" if camid in seen_cameras else "query")
            seen_cameras.add(camid)
            splits[split].append((file_name(domain, pid, camid, index, seed), pid, camid))
    return {
        split: sorted(entries, key=lambda entry: (entry[1], entry[2], entry[0])) for split, entries in splits.items()
    }
