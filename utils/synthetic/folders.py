"""Drawn people as plain folders of images, as people have them: to train on, to search in, and tracklets to group.

    python -m utils.synthetic --domain d --num_ids 64 --folders own

    own/people/anna/3_c2.png         a folder for each identity; the camera stands in the file name
    own/wanted/0064_c1_8.png         an image of each of other people, from camera 1
    own/camera2/0064_c2_10.png       images from camera 2: of most people in `wanted`, and of as many others
    own/tracklets/0064_c3/12.png     a folder for each of these people and each camera

The names in the last three tell who it is, so that the answers can be measured.
"""

import shutil
import tempfile
from pathlib import Path

from utils.synthetic.domains import DOMAINS
from utils.synthetic.world import camera_of, check_request, render

NAMES = (
    "anna", "bert", "chloe", "dora", "emil", "fritz", "greta", "hugo", "ida", "jan", "karla", "leo", "mia", "nils",
    "olga", "paul", "quinn", "rosa", "sven", "tina", "udo", "vera", "wim", "xenia", "yann", "zoe",
)  # fmt: skip
PARTS = ("people", "wanted", "camera2", "tracklets")
# Of the people in `wanted`, each third is not in `camera2`.
ABSENT = 3
IMAGES_IN_GALLERY = 3
IMAGES_OF_TRACKLET = 3
LEAST_SEARCHED = 6


def name_of(pid):
    """anna, bert, ..., then anna2, bert2, ..."""
    again, place = divmod(pid, len(NAMES))
    return f"{NAMES[place]}{again + 1}" if again else NAMES[place]


def images_of(domain, num_ids, images_per_id, seed=0):
    """[(path, arguments of `render`)] of all images."""
    check_request(domain, num_ids, images_per_id, seed)
    images = []
    for pid in range(num_ids):
        for index in range(images_per_id):
            camid = camera_of(domain, pid, index, seed)
            images.append((f"people/{name_of(pid)}/{index}_c{camid + 1}.png", (domain, pid, camid, index, seed)))
    # No two images of these have one index: they show other poses.
    searched = max(LEAST_SEARCHED, num_ids // 4)
    for number in range(2 * searched):
        pid, index = num_ids + number, images_per_id
        if number < searched:
            images.append((f"wanted/{pid:04d}_c1_{index}.png", (domain, pid, 0, index, seed)))
            if number % ABSENT == ABSENT - 1:
                continue
        for index in range(images_per_id + 1, images_per_id + 1 + IMAGES_IN_GALLERY):
            images.append((f"camera2/{pid:04d}_c2_{index}.png", (domain, pid, 1, index, seed)))
        for camid in range(len(DOMAINS[domain]["cameras"])):
            first = images_per_id + 1 + IMAGES_IN_GALLERY + IMAGES_OF_TRACKLET * camid
            for index in range(first, first + IMAGES_OF_TRACKLET):
                images.append((f"tracklets/{pid:04d}_c{camid + 1}/{index}.png", (domain, pid, camid, index, seed)))
    return images


def write_folders(root, domain, num_ids, images_per_id, seed=0):
    """Draw all images below `root`, which must not exist or be empty; returns {part: number of images}."""
    root = Path(root)
    if root.is_dir() and any(root.iterdir()):
        raise ValueError(f"{root} is not empty; give a new folder")
    images = images_of(domain, num_ids, images_per_id, seed)
    root.absolute().parent.mkdir(parents=True, exist_ok=True)
    # Drawn aside, so that a stopped run leaves no half of the images.
    part = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.absolute().parent))
    try:
        for path, arguments in images:
            place = part / path
            place.parent.mkdir(parents=True, exist_ok=True)
            render(*arguments).save(place)
        part.chmod(0o755)
        if root.is_dir():
            root.rmdir()
        part.rename(root)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return {name: sum(path.startswith(f"{name}/") for path, _ in images) for name in PARTS}
