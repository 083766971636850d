"""The small data sets, tested by the mean of ten splits: VIPeR, GRID, PRID2011, iLIDS.

`split` (0 to 9) is the number of a split drawn from a fixed seed; `split_file` gives the identities to test on
instead. `train` holds identities outside the split's test set.
"""

import hashlib
import json
import os
import re
from pathlib import Path

from utils.datasets.schema import Form, Reading, number_and_camera, read_names

NUM_SPLITS = 10
SIDES = ("query", "gallery")
SMALL_SETS = ("viper", "grid", "prid", "ilids")
VIPER = Form(re.compile(r"(\d{3})_(\d{1,3})\.bmp"), "001_45.bmp")
GRID = Form(re.compile(r"(\d{4})_(\d)_(\d{5})_.*\.jpeg"), "0001_1_25004_107_32_106_221.jpeg")
PRID = Form(re.compile(r"person_(\d{4})\.png"), "person_0001.png")
ILIDS = Form(re.compile(r"(\d{4})(\d{3})\.jpg"), "0001001.jpg")


def identities_to_test(name, identities, number, split, split_file, form):
    """(the identities a split tests on, files of its sides or None, a note): of a file, else drawn by hashing.

    A hash gives the same order on every machine and with every version of Python and its packages.
    """
    if split_file is not None:
        chosen, sides = read_split_file(split_file, split, form)
        unknown = sorted(chosen - set(identities))
        if unknown or not chosen:
            raise ValueError(f"{split_file}: split {split} tests on {unknown[:5] or 'nobody'}, not people of {name}")
        return chosen, sides, f"{name}: split {split} of {split_file}"
    if isinstance(split, bool) or split not in range(NUM_SPLITS):
        raise ValueError(f"{name}: split must be 0 to {NUM_SPLITS - 1}, not {split!r}")
    note = f"{name}: split {split} of {NUM_SPLITS}, drawn from the seed '{name} split {split}'"
    return set(in_drawn_order(identities, f"{name} split {split}")[:number]), None, note


def in_drawn_order(items, seed):
    return sorted(items, key=lambda item: hashlib.sha256(f"{seed} {item}".encode()).digest())


def read_split_file(file, split, form):
    """(identities to test on, files of query and gallery or None) from a text file (one per line) or JSON.

    JSON holds one list, or a list of splits. A split is a list, or a dict with `test` (identities) or `query` and
    `gallery` (entries that start with a path, as torchreid writes them): these files are the two sides.
    """
    try:
        text = Path(str(file)).read_text()
        content = json.loads(text) if str(file).endswith(".json") else [int(word) for word in text.split()]
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"split_file {file} cannot be read as identities: {error}") from error
    try:
        if isinstance(content, list) and content and not isinstance(content[0], int):
            if split < 0:
                raise IndexError(split)
            content = content[split]
        sides = None
        if isinstance(content, dict) and "test" in content:
            content = content["test"]
        elif isinstance(content, dict):
            sides = [{ending_of(entry[0]) for entry in content[side]} for side in SIDES if side in content]
            content = [form.pattern.fullmatch(os.path.basename(name))[1] for name in sides[0]]
            sides = sides if len(sides) == len(SIDES) else None
        return {int(pid) for pid in content}, sides
    except (IndexError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"split_file {file} has no split {split} in a form this set knows") from error


def ending_of(path):
    """The last folder and the name of a file, which tell its view."""
    return "/".join(path.replace("\\", "/").split("/")[-2:])


def of_sides(rows, sides):
    """The rows of query and of gallery, in the order of the set."""
    return {
        side: [row for row in rows if ending_of(row.path) in names] for side, names in zip(SIDES, sides, strict=True)
    }


def two_views(name, first, second, split, split_file, form, negatives=()):
    """Half of the identities in both views train, the others test: the first view queries the second."""
    shared = {row.pid for row in first} & {row.pid for row in second}
    chosen, sides, note = identities_to_test(name, shared, len(shared) // 2, split, split_file, form)
    splits = {
        "train": [row for row in [*first, *second] if row.pid in shared - chosen],
        "query": [row for row in first if row.pid in chosen],
        "gallery": [row for row in second if row.pid in chosen] + list(negatives),
    }
    if sides:
        splits |= of_sides(dict.fromkeys([*first, *second, *negatives]), sides)
    return Reading(splits, note)


def viper(root, *, split=0, split_file=None, reverse=False, all_for_training=False):
    """316 of 632 identities train. Camera a queries b, with `reverse` b queries a."""
    views = [
        read_names(root, folder, VIPER, lambda match, camera=camera: (int(match[1]), camera))
        for camera, folder in enumerate(("cam_a", "cam_b"))
    ]
    if all_for_training:
        return {"train": views[0] + views[1]}
    return two_views("viper", *(views[::-1] if reverse else views), split, split_file, VIPER)


def grid(root, *, split=0, split_file=None, all_for_training=False):
    """125 of 250 pairs train; the 775 distractors (pid 0) are in every gallery."""
    probe = read_names(root, "probe", GRID, number_and_camera)
    gallery = read_names(root, "gallery", GRID, number_and_camera)
    pairs = [row for row in gallery if row.pid != 0]
    distractors = [row for row in gallery if row.pid == 0]
    cameras = {row.pid: row.camid for row in probe}
    if any(cameras.get(row.pid) == row.camid for row in pairs):
        # In this copy the digit does not distinguish the two views of a pair, so the folders do.
        probe = [row._replace(camid=0) for row in probe]
        pairs, distractors = ([row._replace(camid=1) for row in rows] for rows in (pairs, distractors))
    if all_for_training:
        return {"train": probe + pairs}
    return two_views("grid", probe, pairs, split, split_file, GRID, distractors)


def prid(root, *, split=0, split_file=None, all_for_training=False):
    """Identities 1 to 200 are in both cameras: 100 train, 100 of camera a are searched among 649 of camera b.

    From 201 on, the same number means different people in the two cameras; those of camera a become 1000 + number.
    """

    def label_first(match):
        number = int(match[1])
        return (number if number <= 200 else 1000 + number), 0

    first = read_names(root, "single_shot/cam_a", PRID, label_first)
    second = read_names(root, "single_shot/cam_b", PRID, lambda match: (int(match[1]), 1))
    if all_for_training:
        return {"train": first + second}
    first_pids = {row.pid for row in first}
    only_second = [row for row in second if row.pid not in first_pids]
    return two_views("prid", first, second, split, split_file, PRID, only_second)


def ilids(root, *, split=0, split_file=None, all_for_training=False):
    """60 of 119 identities test, one query and one gallery image each. The image's index replaces the camera."""
    rows = read_names(root, "Persons", ILIDS, lambda match: (int(match[1]), int(match[2])))
    people = {}
    for row in rows:
        people.setdefault(row.pid, []).append(row._replace(camid=len(people.get(row.pid, []))))
    if all_for_training:
        return {"train": [row for group in people.values() for row in group]}
    several = {pid for pid, group in people.items() if len(group) > 1}
    chosen, sides, note = identities_to_test("ilids", several, (len(people) + 1) // 2, split, split_file, ILIDS)
    drawn = {pid: in_drawn_order(people[pid], f"ilids split {split}") for pid in sorted(chosen)}
    splits = {
        "train": [row for pid, group in people.items() if pid not in chosen for row in group],
        "query": [images[0] for images in drawn.values()],
        "gallery": [images[1] for images in drawn.values()],
    }
    return Reading(splits | of_sides(sum(people.values(), []), sides) if sides else splits, note)
