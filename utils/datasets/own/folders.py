"""Your own folders: one folder per identity, with or without folders of cameras, or files named by both."""

import os
import re

from utils.datasets.own.labels import warn_of_spellings
from utils.datasets.published import SPLIT_FOLDERS
from utils.datasets.schema import ENDINGS, LABELLED, SPLITS, Row, camera_in, dense, left_out, listing, warn_once

# `cam1`, `camera_b`, `C3`: a folder of one camera.
CAMERA_FOLDER = re.compile(r"(?:cam(?:era)?[ _-]?([0-9]{1,9}|[a-z])|c([0-9]{1,9}))", re.IGNORECASE)
# A file or folder of images of nobody in a benchmark.
JUNK = re.compile(r"-1(?:_|$)")
USUAL = {split: split for split in SPLITS}
# Of Person_reID_baseline_pytorch, which parts train_all into train and val.
PREPARED = USUAL | {"train": "train_all"}


def read_identity_folders(folder, columns):
    """(rows by split, names of the identities or None, names of the cameras or None).

    There is one folder per identity, directly in it or below its split. The splits are train, query and gallery, or
    the folders of Market-1501 or Person_reID_baseline_pytorch, of which junk (-1) and further folders are left out.
    Folders whose names are numbers keep them as pid; other folders are numbered in order of name. A folder, or a
    split, of files that are all named like 0001_c2_x.jpg needs no folders of identities. The camera is the number
    after `c` or `cam` in the file name (0001_c2_05.jpg), or a folder of its own (cam1, camera_b) below the identities
    or above them. If nothing names cameras, or with camid_column=none, all images get one camera, except that queries
    and gallery get two different ones: removing a query's own camera then never empties its ranking.
    """
    for kind, value in columns._asdict().items():
        if value != columns._field_defaults[kind] and (kind, value) != ("camid", "none"):
            raise ValueError(
                f"{folder} has no table but folders: {kind}_column={value} has no effect; leave it out"
                + (", or write camid_column=none for images without cameras" if kind == "camid" else "")
            )
    usual = folders_of_splits(folder)
    as_benchmark = usual is not USUAL
    split_folders = {split: name for split, name in usual.items() if (folder / name).is_dir()}
    odd = [entry.name for entry in listing(folder) if entry.is_dir() and entry.name not in SPLITS]
    if split_folders and odd and not as_benchmark:
        raise ValueError(
            f"{folder} has {odd[0]} beside {', '.join(split_folders)}; splits are {', '.join(SPLITS)}. A labelled "
            f"folder can be a set of its own: {folder / odd[0]}:holdout=1 is all query and gallery"
        )
    for entry in listing(folder) if split_folders and not as_benchmark else ():
        if entry.name.lower().endswith(ENDINGS) and entry.is_file():
            left_out(entry.path, f"{entry.path} lies beside {', '.join(split_folders)}; expected all images in these")
    images = []
    for split, name in (split_folders or {"train": ""}).items():
        images += [(split, *image) for image in images_of(folder / name, as_benchmark)]
    names = {identity for _, identity, _, _ in images}
    # A longer number, such as a time stamp, does not fit a pid.
    numbers = {int(name) for name in names if re.fullmatch(r"[0-9]{1,18}", name)}
    # 1 and 0001 are two folders, so they are two identities.
    numbered = len(numbers) == len(names)
    pids = {name: int(name) for name in names} if numbered else dense(names)
    warn_of_spellings(names, "identity", folder)
    cameras = cameras_of(images, folder) if columns.camid != "none" else {}
    splits = {split: [] for split in split_folders or ["train"]}
    for split, identity, path, camera in images:
        path = f"{split_folders[split]}/{path}" if split_folders else path
        camid = cameras[camera] if cameras else int(split == "gallery")
        splits[split].append(Row(path, pids[identity], camid))
    # Cameras 1, 2 and so on are shown so without names.
    as_usual = sorted(cameras) == list(range(1, len(cameras) + 1))
    return splits, None if numbered else sorted(names), None if as_usual else list(map(str, sorted(cameras)))


def folders_of_splits(folder):
    """{split: its folder}; people use the folders of a benchmark for images of their own too."""
    if any((folder / SPLIT_FOLDERS[split]).is_dir() for split in ("train", "gallery")):
        return SPLIT_FOLDERS
    return PREPARED if all((folder / PREPARED[split]).is_dir() for split in ("train", "gallery")) else USUAL


def images_of(place, as_benchmark=False):
    """(identity, path below the place, camera or None) of all images of one split."""
    entries = [entry for entry in listing(place) if not (as_benchmark and JUNK.match(entry.name))]
    if entries and not any(entry.is_dir() for entry in entries) and any(is_labelled(entry.name) for entry in entries):
        return images_by_name(place, entries)
    folders = []
    for entry in entries:
        if entry.is_dir():
            if JUNK.match(entry.name):
                warn_once(f"{entry.path} is left out: -1 is nobody")
            else:
                folders.append(entry)
            continue
        left_out(
            entry.path,
            f"{entry.path}: expected one folder an identity in {place}, files that are all named like 0001_c2_x.jpg, "
            f"a metadata file, or a pattern of names: {place}:names={{pid}}_cam{{camid}}_*",
        )
    inside = {folder.name: listing(folder.path) for folder in folders}
    below = [entry for entries in inside.values() for entry in entries if entry.is_dir()]
    if below:
        return images_of_cameras(place, inside, below)
    if len(inside) > 1 and all(camera_of_folder(name) is not None for name in inside):
        raise ValueError(
            f"{place} has folders of cameras, {', '.join(list(inside)[:3])}, and none of identities. Images without "
            f"identities are for adapt_reid.py --target and evaluate.py --group_dir; if these are identities: "
            f"{place}:names={{pid}}/*"
        )
    return [
        (identity, f"{identity}/{name}", camera_in(name))
        for identity, entries in inside.items()
        for name in image_names(entries)
    ]


def images_of_cameras(place, inside, below):
    """Images two folders deep: anna/cam1/1.jpg or cam1/anna/1.jpg, whichever of the two levels names cameras."""
    cameras_first = all(camera_of_folder(name) is not None for name in inside)
    cameras_last = all(camera_of_folder(entry.name) is not None for entry in below)
    if cameras_first == cameras_last:
        raise ValueError(
            f"{below[0].path} is a folder; expected images directly in {os.path.dirname(below[0].path)}, the folder "
            "of one identity, or folders of cameras named like cam1 (anna/cam1/1.jpg or cam1/anna/1.jpg). Describe "
            f"other folders by a pattern, such as {place}:names=*/{{camid}}/{{pid}}/*, or by a table with file_name, "
            "pid and camid"
        )
    images = []
    for outer, entries in inside.items():
        for entry in entries:
            if not entry.is_dir():
                left_out(
                    entry.path, f"{entry.path} lies beside folders; expected all images of {place} in such folders"
                )
                continue
            identity, camera = (entry.name, outer) if cameras_first else (outer, entry.name)
            camera = camera_of_folder(camera)
            names = image_names(listing(entry.path))
            images += [(identity, f"{outer}/{entry.name}/{name}", camera) for name in names]
    return images


def image_names(entries):
    """The names of image files; other entries are left out, or end it."""
    names = []
    for entry in entries:
        if entry.name.lower().endswith(ENDINGS) and entry.is_file():
            names.append(entry.name)
        elif entry.is_dir():
            raise ValueError(
                f"{entry.path} is a folder; expected images there. Describe deeper folders by a pattern, such as "
                "names=*/{camid}/{pid}/*, or by a table with file_name, pid and camid"
            )
        elif os.path.islink(entry.path) and not os.path.exists(entry.path):
            left_out(entry.path, f"{entry.path} is a link to a file that is not there")
        else:
            left_out(entry.path, f"{entry.path} is no image; expected files ending in {', '.join(ENDINGS)}")
    return names


def camera_of_folder(name):
    """The number of the camera that the name of a folder says, a letter's place in the alphabet, or None."""
    match = CAMERA_FOLDER.fullmatch(name)
    if match is None:
        return None
    word = match[1] or match[2]
    return int(word) if word.isdecimal() else ord(word.lower()) - ord("a") + 1


def is_labelled(name):
    return bool(LABELLED.match(name)) and name.lower().endswith(ENDINGS)


def images_by_name(place, entries):
    """Images such as 0001_c2_x.jpg, directly in the folder; -1 is no identity."""
    images = []
    for entry in entries:
        match = LABELLED.match(entry.name) if is_labelled(entry.name) else None
        if match is None or int(match[1]) < 0:
            left_out(entry.path, f"{entry.path} is not named as the others are, like 0001_c2_x.jpg")
            continue
        images.append((match[1], entry.name, int(match[2])))
    # 1_c1.jpg and 0001_c2.jpg show one identity: in file names the number counts.
    return [(str(int(number)), name, camera) for number, name, camera in images]


def cameras_of(images, folder):
    """{camera number in the file names: camid}, empty if no name has one."""
    with_camera = sum(camera is not None for *_, camera in images)
    if 0 < with_camera < len(images):
        split, _, path, _ = next(image for image in images if image[-1] is None)
        raise ValueError(
            f"{folder}: {os.path.join(split, path)} has no camera in its name, others do; expected ..._c2_... or "
            f"..._cam2_...; if the names tell no cameras at all: {folder}:camid_column=none"
        )
    return dense(camera for *_, camera in images) if with_camera else {}
