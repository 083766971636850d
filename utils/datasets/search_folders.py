"""Plain folders of images, or single images, as query and gallery, with the labels that their names give."""

import os
from pathlib import Path

from utils.datasets.own.folders import camera_of_folder
from utils.datasets.published import SPLIT_FOLDERS
from utils.datasets.schema import (
    ENDINGS,
    LABELLED,
    SPLITS,
    UNKNOWN,
    Row,
    camera_in,
    hidden,
    rows_to_dataset,
    warn_once,
)

FOLDERS_OF_SPLITS = {*SPLITS, *SPLIT_FOLDERS.values()}
# Images that Pillow does not open by itself.
UNREAD = (".heic", ".heif", ".avif", ".jxl", ".jp2", ".dng")


def read_folders(query_dir, gallery_dir=None):
    """Query and gallery data sets of all images below two folders; either may be a single image instead.

    Identity and camera are read from names such as 0001_c2_x.jpg; other images have their folder as identity, and a
    folder like cam1 as camera. Where the numbers in names count the images of each folder (anna/3_c2.jpg), the folder
    is the identity too: see `counts_images`. The same name is the same identity in both folders. Cameras count from 0,
    as in other data sets: c1 becomes 0, unless there is a c0. An unknown identity or camera is -1. Without
    `gallery_dir` there are only queries.
    """
    sides = [images_of(place) for place in (query_dir, gallery_dir) if place is not None]
    by_folder = counts_images(*(paths for _, paths in sides))
    found = ([[identity_of(path, by_folder) for path in paths], [*map(camera_of, paths)]] for _, paths in sides)
    labels, names = numbered(*found)
    result = []
    for (folder, paths), (pids, camids), split in zip(sides, labels, ("query", "gallery"), strict=False):
        rows = [Row(path.as_posix(), *ids) for path, *ids in zip(paths, pids, camids, strict=True)]
        result.append(rows_to_dataset(rows, str(folder), folder.name, split, pid_names=names))
    return tuple(result)


def numbered(*sides):
    """([(pids, camids) of each side], names by pid or None where they are numbers) from names of identities, cameras.

    A side is (identity names or None, numbers of cameras in file names or -1).
    """
    names = {name for identities, _ in sides for name in identities}
    # One name for all, such as that of a folder in each, tells nobody apart.
    names = sorted(names - {None}) if len(names) > 1 else []
    first = 0 if any(camera == 0 for _, cameras in sides for camera in cameras) else 1
    # A longer number, such as a time stamp, does not fit a pid.
    numeric = all(name.isdecimal() and len(name) <= 18 for name in names)
    pids = {name: int(name) if numeric else number for number, name in enumerate(names)}
    labels = [
        (
            [pids.get(name, UNKNOWN) for name in identities],
            [UNKNOWN if camera == UNKNOWN else camera - first for camera in cameras],
        )
        for identities, cameras in sides
    ]
    return labels, None if numeric else names


def images_of(place):
    """(folder, sorted relative paths of the images below it); for a file, its folder and name."""
    folder = Path(place)
    if folder.is_file():
        return folder.parent, [Path(folder.name)]
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give one that holds images, or an image")
    paths = [path.relative_to(folder) for _, _, images in levels_of(folder) for path in images]
    if not paths:
        raise ValueError(f"{folder} holds no images; expected files that end in {', '.join(ENDINGS)}")
    return folder, sorted(paths)


def levels_of(folder):
    """(folder, names of inner folders, paths of images) of a folder and of all below it; links are followed.

    As in os.walk, folders whose names are removed from the list are left out.
    """
    unread, ways = [], {}
    for level, inner, names in os.walk(folder, followlinks=True):
        # A link to a folder on the way here would give an endless loop.
        way = ways.pop(level, (os.path.join(os.path.realpath(level), ""),))
        reals = {name: os.path.join(os.path.realpath(os.path.join(level, name)), "") for name in inner}
        inner[:] = [
            name for name in inner if not hidden(name) and not any(real.startswith(reals[name]) for real in way)
        ]
        ways |= {os.path.join(level, name): (*way, reals[name]) for name in inner}
        names = [name for name in names if not hidden(name)]
        unread += [Path(level, name) for name in names if name.lower().endswith(UNREAD)]
        yield Path(level), inner, [Path(level, name) for name in names if name.lower().endswith(ENDINGS)]
    warn_of_unread(folder, sorted(unread))


def warn_of_unread(folder, paths):
    """A warning of images of other kinds, which a search or a training would miss without a word."""
    if paths:
        kinds = ", ".join(ENDINGS)
        warn_once(
            f"{folder} has images that are not read, {len(paths)} of them, such as {paths[0]}; convert to {kinds}"
        )


def counts_images(*sides, kept=()):
    """Whether numbers in names such as 3_c2.jpg count the images of each folder, so that the folder is the identity.

    Several folders of the paths of a side then have the same numbers, and none has one twice. Numbers with zeros in
    front, such as 0001, are people's. `kept`: (path, identity) of a gallery, for which it was decided before.
    """
    for path, identity in kept:
        match, folder = LABELLED.match(path.name), folder_of(path)
        if match and str(int(match[1])) != folder and identity in (folder, str(int(match[1]))):
            return identity == folder
    numbers = {}
    # A folder may be both sides.
    for place, paths in enumerate({frozenset(paths) for paths in sides}):
        for path in paths:
            match, folder = LABELLED.match(path.name), folder_of(path)
            if match and (folder is None or match[1] != str(int(match[1]))):
                return False
            if match:
                numbers.setdefault((place, folder), []).append(int(match[1]))
    once = all(len(set(found)) == len(found) for found in numbers.values())
    several = max(map(len, numbers.values()), default=0) > 1
    return once and several and len(set().union(*numbers.values())) < sum(map(len, numbers.values()))


def folder_of(path):
    """The name of the innermost folder that is neither a camera's nor a split's, or None."""
    names = (name for name in reversed(path.parent.parts) if camera_of_folder(name) is None)
    return next((name for name in names if name not in FOLDERS_OF_SPLITS), None)


def identity_of(path, by_folder=False):
    """The identity's name, a number without leading zeros, or None."""
    match = None if by_folder else LABELLED.match(path.name)
    folders = [name for name in path.parent.parts if camera_of_folder(name) is None]
    name = match[1] if match else folders[-1] if folders else ""
    if name.isdecimal():
        return str(int(name))
    return name if name and name != str(UNKNOWN) else None


def camera_of(path):
    match = LABELLED.match(path.name)
    if match:
        return int(match[2])
    named = [*map(camera_of_folder, reversed(path.parent.parts)), camera_in(path.name)]
    return next((camera for camera in named if camera is not None), UNKNOWN)
