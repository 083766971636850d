"""The people that the stand-ins learn: pictures of the synthetic domains f to h, and what can be said of them."""

import random

import torch
import torch.nn.functional as F
from tqdm import tqdm

from utils import synthetic
from utils.synthetic.camera import draw_image
from utils.synthetic.domains import DOMAINS as SPECS
from utils.synthetic.domains import INDOORS

DOMAINS = ("f", "g", "h")
IMAGES_PER_ID = 4


class People:
    """All pictures of some identities in memory, as bytes; `rows` are (domain, pid, camid, index)."""

    def __init__(self, num_ids, first_pid=0):
        self.rows = [
            (domain, pid, synthetic.camera_of(domain, pid, 2 * index), index)
            for pid in range(first_pid, first_pid + num_ids)
            for domain in DOMAINS
            for index in range(IMAGES_PER_ID)
        ]
        pictures = [
            torch.frombuffer(bytearray(self.picture(row).tobytes()), dtype=torch.uint8).view(*synthetic.SIZE, 3)
            for row in tqdm(self.rows, desc="drawing", disable=None)
        ]
        self.pixels = torch.stack(pictures).permute(0, 3, 1, 2).contiguous()

    def __len__(self):
        return len(self.rows)

    def images(self, numbers, size, generator=None, jitter=0.0):
        """Float images in -1..1, half of them mirrored; `jitter` moves exposure and colour cast."""
        images = self.pixels[numbers].float().div_(127.5).sub_(1.0)
        if size != tuple(images.shape[-2:]):
            images = F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False).clamp_(-1, 1)
        if generator is not None:
            mirrored = torch.rand(len(images), generator=generator) < 0.5
            images[mirrored] = images[mirrored].flip(-1)
        if jitter:
            gain = 1.0 + jitter * (2 * torch.rand(len(images), 3, 1, 1, generator=generator) - 1)
            images = ((images + 1) * gain - 1).clamp_(-1, 1)
        return images

    def picture(self, row):
        return synthetic.render(*row)

    def words(self, number):
        return synthetic.describe(*self.rows[number])


class Wanderers(People):
    """The same people anywhere: half before the scenery of another camera, half before none, each through any lens.

    With its own scenery alone a model would learn clothes from the background: in snow nobody wears yellow. With none,
    it would take a green lawn for clothes.
    """

    def picture(self, row):
        pose, rng = synthetic.pose_of(*row)
        return draw_image(synthetic.appearance(*row[:2]), pose, self.camera(row)[1], rng, synthetic.SIZE)

    def words(self, number):
        """What a picture does not show is None."""
        place, _ = self.camera(self.rows[number])
        scene = place and ("indoors" if place in INDOORS else "outdoors")
        return super().words(number) | {"place": place, "scene": scene}

    def camera(self, row):
        rng = random.Random("/".join(map(str, ("camera", *row))))
        every = [(SPECS[domain]["place"], one) for domain in DOMAINS for one in SPECS[domain]["cameras"]]
        (place, scenery), (_, lens) = rng.choices(every, k=2)
        kept = {key: scenery[key] for key in ("style", "variant", "occluders")}
        weather = scenery["weather"] and rng.choice(("rain", "snow", None))
        if rng.random() < 0.5:
            place, kept = None, kept | {"style": "clutter", "variant": rng.randrange(48)}
        return place, lens | kept | {"weather": weather}


def spoken(words, rng):
    """A caption as people would write it: some things are left out, the place is named loosely."""
    words = dict(words)
    if rng.random() < 0.15:
        words["hat"] = "none"
    for key in ("action", "view", "place"):
        if rng.random() < 0.3:
            words.pop(key)
    if "place" in words and rng.random() < 0.4:
        words["place"] = words["scene"]
    return synthetic.caption(words)


def answers_of(words):
    """The true answer to each question of `utils.generated.texts.captions`."""
    view = words["view"].removeprefix("seen from ").removeprefix("the ")
    hat = "nothing" if words["hat"] == "none" else words["hat"]
    return {key: words[key] for key in ("upper", "lower", "shoes", "hair", "carried", "action", "scene")} | {
        "view": view,
        "hat": hat,
    }


def parts_of(words):
    """Everything that can be seen of a person, word by word: what the eyes learn to tell before they are asked."""
    alone = ("upper_colour", "pattern", "upper_kind", "lower_colour", "lower_kind", "shoes", "action", "view", "scene")
    split = [words[key].partition(" ") for key in ("hair", "carried", "hat")]
    return [words[key] for key in alone] + [part for first, _, rest in split for part in (first, rest)]


def seen_anyhow(images, size, generator):
    """Pictures in 0..1, moved and cut a little, in more kinds of light than the cameras have."""

    def draw(*shape, low=0.0, high=1.0):
        return low + (high - low) * torch.rand(*shape, generator=generator)

    count = len(images)
    zoom = draw(count, 2, low=0.88)
    where = torch.zeros(count, 2, 3)
    where[:, [0, 1], [0, 1]] = zoom
    where[:, 0, 0] *= torch.sign(draw(count, low=-1.0))
    where[:, :, 2] = draw(count, 2, low=-1.0) * (1.04 - zoom)
    grid = F.affine_grid(where, (count, 3, *size), align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    light = draw(count, 3, 1, 1, low=0.85, high=1.15) * draw(count, 1, 1, 1, low=0.55, high=1.3)
    return (images * light + 0.1 * draw(count, 1, 1, 1)).clamp_(0, 1)
