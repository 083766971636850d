"""Two plain folders of images as query and gallery, with whatever labels their names give."""

import os
import re
from pathlib import Path

from utils.datasets.schema import CAMERA, ENDINGS, UNKNOWN, Row, hidden, rows_to_dataset

LABELLED = re.compile(r"(-?\d+)_c(\d+)")


def read_folders(query_dir, gallery_dir):
    """Query and gallery data sets of all images below two folders.

    Identity and camera are read from names such as 0001_c2_x.jpg; else the folder an image lies in is its identity.
    The same name is the same person in both folders. What is not given is -1.
    """
    found = [image_paths(folder) for folder in (query_dir, gallery_dir)]
    names = sorted({identity_of(path) for paths in found for path in paths} - {None})
    # a longer number, such as a time stamp, does not fit a pid
    numeric = all(name.isdecimal() and len(name) <= 18 for name in names)
    pids = {name: int(name) if numeric else number for number, name in enumerate(names)}
    sides = []
    for folder, paths, split in zip((query_dir, gallery_dir), found, ("query", "gallery"), strict=True):
        rows = [Row(path.as_posix(), pids.get(identity_of(path), UNKNOWN), camera_of(path)) for path in paths]
        sides.append(rows_to_dataset(rows, str(folder), Path(folder).name, split))
    return tuple(sides)


def image_paths(folder):
    """Paths of the images below a folder, relative to it and sorted."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give one that holds images")
    paths = []
    for place, inner, names in os.walk(folder, followlinks=True):
        # A link to a folder above would lead round and round.
        above = os.path.join(os.path.realpath(place), "")
        reals = {name: os.path.join(os.path.realpath(os.path.join(place, name)), "") for name in inner}
        inner[:] = [name for name in inner if not hidden(name) and not above.startswith(reals[name])]
        names = [name for name in names if name.lower().endswith(ENDINGS) and not hidden(name)]
        paths += [Path(place, name).relative_to(folder) for name in names]
    if not paths:
        raise ValueError(f"{folder} holds no images; expected files that end in {', '.join(ENDINGS)}")
    return sorted(paths)


def identity_of(path):
    """The identity's name, a number without leading zeros, or None."""
    match = LABELLED.match(path.name)
    name = match[1] if match else path.parent.name
    if name.isdecimal():
        return str(int(name))
    return name if name and name != str(UNKNOWN) else None


def camera_of(path):
    match = LABELLED.match(path.name)
    if match:
        return int(match[2])
    camera = CAMERA.search(path.name)
    return int(camera[1]) if camera else UNKNOWN
