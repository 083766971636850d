"""A generated set drawn by code: the right decision of a filter is known for every image.

The set has the files and columns that `train_dreambooth_reid.py` writes, and the column `truth`.
"""

import dataclasses
import random
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from utils.generated.broken import BREAKAGE, OTHER_BREAKAGE, is_seen, near_miss
from utils.generated.made_set import METADATA, image_path, save_image
from utils.synthetic.camera import background, draw_image
from utils.synthetic.domains import DOMAINS
from utils.synthetic.world import SIZE, appearance, camera_of, file_name, home, lens_of, pose_of, render
from utils.worklist import sync

SOURCE, NEW, WRONG_SOURCE, WRONG_NEW, BROKEN, NOBODY = (
    "right, as in the source",
    "right, new scene",
    "wrong, as in the source",
    "wrong, new scene",
    "broken",
    "nobody",
)
NEAR = "near-miss"
TRUTHS = (SOURCE, NEW, WRONG_SOURCE, WRONG_NEW, BROKEN, NOBODY)
# The truths of an identity's images, repeated in this order; the second with `World.near_misses`.
CYCLE = (NEW, SOURCE, WRONG_SOURCE, WRONG_NEW, BROKEN, NOBODY, NEW, SOURCE, NEW, BROKEN)
LONG_CYCLE = (*CYCLE, NEAR, NEAR)
# Domains that serve as sources; the stand-ins are trained on the other domains.
PLACES = "abcde"
SCHEMA = METADATA.append(pa.field("truth", pa.string()))
PROMPT = "a photo of a person"
# Source images have the lower indices.
FIRST_INDEX = 1000


@dataclasses.dataclass(frozen=True)
class World:
    """The identities of the synthetic world to draw.

    With `few_cameras`, one or two cameras of the domain see an identity, as in CUHK03 and MSMT17; otherwise all do.
    A generator learns scenes from an identity's own source images, so an image drawn "as in the source" is in that
    identity's cameras, even if it shows another.

    `near_misses` adds images as in the source with one attribute of the identity changed. `unseen` takes every new
    scene from scenery and light of its own, and breaks images in other ways: for results on what nothing was set on.
    """

    domain: str = "a"
    num_ids: int = 32
    images_per_id: int = 10
    seed: int = 0
    # Not part of the random seed: worlds with and without it differ in cameras only.
    few_cameras: bool = dataclasses.field(default=False, repr=False)
    near_misses: bool = dataclasses.field(default=False, repr=False)
    unseen: bool = dataclasses.field(default=False, repr=False)

    @property
    def cycle(self):
        return LONG_CYCLE if self.near_misses else CYCLE


def draw(world, pid, number):
    """(picture, truth) of one generated image."""
    truth = world.cycle[number % len(world.cycle)]
    rng = random.Random(f"generated/{world}/{pid}/{number}")
    index = FIRST_INDEX + number
    if truth == NOBODY:
        return empty_scene(world, rng), truth
    camid, shown = source_camera(world, pid, index), pid
    if truth in (WRONG_SOURCE, WRONG_NEW):
        others = [other for other in range(0, 2 * world.num_ids, 2) if other != pid] or [pid + 1]
        shown = rng.choice(others)
    if truth in (NEW, WRONG_NEW):
        picture = in_scene(world, shown, rng.choice(other_places(world)), index)
    else:
        picture = render(world.domain, shown, camid, index, world.seed)
    if truth == NEAR:
        picture = near_to(picture, world, pid, camid, index, rng)
    if truth == BROKEN:
        picture = rng.choice(OTHER_BREAKAGE if world.unseen else BREAKAGE)(picture, rng)
    return picture, truth


def cameras_of(world, pid):
    """The cameras that see an identity, in the order of its route."""
    count = len(DOMAINS[world.domain]["cameras"])
    if not world.few_cameras:
        return [camera_of(world.domain, pid, 2 * place, world.seed) for place in range(count)]
    rng = random.Random(f"seen by/{world.domain}/{world.seed}/{pid}")
    return rng.sample(range(count), rng.choice((1, 2)))


def source_camera(world, pid, index):
    """The camera of a source image of an identity; it changes after every two images, as in `camera_of`."""
    cameras = cameras_of(world, pid)
    return cameras[index // 2 % len(cameras)]


def in_scene(world, pid, scene, index):
    """An image of an identity of the world, in the scene of any domain."""
    if scene == world.domain:
        return render(scene, pid, source_camera(world, pid, index), index, world.seed)
    camid = camera_of(scene, pid, index, world.seed)
    pose, rng = pose_of(scene, pid, camid, index, world.seed)
    lens = home(scene, f"unseen/{pid}/{index}", world.seed) if world.unseen else DOMAINS[scene]["cameras"][camid]
    return draw_image(appearance(world.domain, pid, world.seed), pose, lens, rng, SIZE)


def other_places(world):
    return PLACES.replace(world.domain, "")


def near_to(picture, world, pid, camid, index, rng):
    """The same image with one attribute changed that can be seen in it."""
    while True:
        pose, pose_rng = pose_of(world.domain, pid, camid, index, world.seed)
        person = near_miss(appearance(world.domain, pid, world.seed), rng)
        other = draw_image(person, pose, lens_of(world.domain, camid, world.seed), pose_rng, SIZE)
        if is_seen(picture, other):
            return other


def empty_scene(world, rng):
    camera = rng.choice(DOMAINS[rng.choice(other_places(world))]["cameras"])
    height, width = SIZE
    scene = background(camera["style"], camera["variant"], width * 6, height * 2)
    left = rng.randint(0, scene.width - 2 * width)
    return scene.crop((left, 0, left + 2 * width, 2 * height)).resize((width, height), Image.Resampling.BOX)


def write_source(folder, world, images_per_id=12):
    """Write the real images of a set's identities, as files that `load_reid` opens; an existing folder is kept."""
    folder = Path(folder)
    if folder.is_dir():
        return folder
    part, rows = folder.with_name(f".{folder.name}.part"), []
    shutil.rmtree(part, ignore_errors=True)
    for pid in range(0, 2 * world.num_ids, 2):
        for index in range(images_per_id):
            camid = source_camera(world, pid, index)
            name = file_name(world.domain, pid, camid, index, world.seed)
            (part / name).parent.mkdir(parents=True, exist_ok=True)
            # PNG is lossless: these are the pixels of the spec `synthetic:domain=...`.
            render(world.domain, pid, camid, index, world.seed).save(part / name)
            rows.append({"path": name, "pid": pid, "domain": f"synthetic-{world.domain}", "camid": camid})
    pq.write_table(pa.Table.from_pylist(rows), part / "metadata.parquet")
    sync(part / "metadata.parquet")
    part.rename(folder)
    return folder


def write_drawn(folder, world=World(), *, num_damaged=2, size=None, prompts=None):
    """Write the set to `folder` through a temporary folder, unless it exists. Returns its metadata file.

    The last `num_damaged` files are cut off in the middle. `size` (height, width) resizes the drawn images. `prompts`
    are those of the identities, {pid: prompt}; default: the same for all.
    """
    folder = Path(folder)
    if (folder / "metadata.parquet").is_file():
        return folder / "metadata.parquet"
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    total = world.num_ids * world.images_per_id
    with pq.ParquetWriter(part / "metadata.parquet", SCHEMA) as writer:
        for person_number in range(world.num_ids):
            pid, rows = 2 * person_number, []
            prompt = (prompts or {}).get(pid, PROMPT)
            for number in range(world.images_per_id):
                picture, truth = draw(world, pid, number)
                if size is not None:
                    picture = picture.resize(size[::-1], Image.Resampling.BOX)
                name = image_path(f"synthetic-{world.domain}/{pid:04d}", number, "jpg")
                path = part / name
                path.parent.mkdir(parents=True, exist_ok=True)
                save_image(picture, path, quality=95, prompt=prompt, seed=number, model="drawn")
                if person_number * world.images_per_id + number >= total - num_damaged:
                    path.write_bytes(path.read_bytes()[:200])
                    truth = BROKEN
                rows.append(metadata_of(world, pid, number, name, truth, prompt))
            writer.write_table(pa.Table.from_pylist(rows, schema=SCHEMA))
    sync(part / "metadata.parquet")
    part.rename(folder)
    return folder / "metadata.parquet"


def metadata_of(world, pid, number, name, truth, prompt=PROMPT):
    fixed = {"prompt": prompt, "steps": 0, "guidance": 0.0, "model": "drawn", "synthetic": True}
    labels = {"pid": pid, "domain": f"synthetic-{world.domain}", "camid": -1, "seed": number, "truth": truth}
    return {"file_name": name, "path": name} | labels | fixed
