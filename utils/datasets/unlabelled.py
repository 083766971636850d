"""Training images whose identities are not used, or not needed: of any set of `load_reid`, or a folder of images."""

import os
from pathlib import Path

import datasets
import numpy as np
import torch

from utils.datasets.images import check_images, storage_of
from utils.datasets.load import known_names, labels_of, load_reid, open_source, parse_spec
from utils.datasets.own.folders import camera_of_folder
from utils.datasets.own.labels import MissingColumn
from utils.datasets.own.tables import is_table
from utils.datasets.schema import ENDINGS, SPLITS, UNKNOWN, Row, features, listing, put, rows_to_dataset
from utils.datasets.search_folders import camera_of, levels_of


def open_unlabelled(specs, root=None, *, skip_unreadable=False):
    """(training rows of one or several data sets, true labels for a report or None, specs with query and gallery).

    There are no true labels for a folder of images (see `folder_of_images`), for a table without a column of pids, or
    for a data set whose images all have the same pid.
    """
    parts, truths, measurable, domains = [], [], [], set()
    for spec in dict.fromkeys(specs):
        place = folder_of_images(spec, root)
        if place:
            # Cameras of two folders of one name are not the same.
            domain = name_beside(domains, spec)
            data = {"train": read_images(place, domain)}
        else:
            data = read_set(spec, root, skip_unreadable)
        if "train" not in data:
            raise ValueError(f"{spec} has no train split, only {', '.join(data)}; its images are trained on")
        if {"query", "gallery"} <= set(data):
            measurable.append(spec)
        train = data["train"]
        domains |= {*train.unique("domain")}
        if not skip_unreadable:
            train, _ = check_images(train, where=spec)
        elif place:
            train, _ = check_images(train, where=spec, skip_unreadable=True)
        first = sum(int(truth.max()) + 1 for truth in truths)
        truths.append(first + labels_of(train))
        parts.append(without_names(train.select_columns(list(features()))))
    train = parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
    truth = np.concatenate(truths)
    labelled = all(len(set(labels.tolist())) > 1 for labels in truths)
    return train, truth if labelled else None, measurable


def open_either(specs, root=None, *, skip_unreadable=False, needs_labels=False):
    """(training rows, labels) of data sets with identities, or, unless labels are needed, without."""
    plain = [spec for spec in specs if folder_of_images(spec, root)]
    if plain and needs_labels:
        raise ValueError(
            f"--source {plain[0]} is a folder of images without identities: classification needs one folder an "
            "identity, or a table; --objective dino takes the images as they are"
        )
    if not plain:
        try:
            # A single image of an identity is a class too.
            return open_source(specs, root, single_image_ids="repeat", skip_unreadable=skip_unreadable)[:2]
        except MissingColumn:
            if needs_labels:
                raise
    train, _, _ = open_unlabelled(specs, root, skip_unreadable=skip_unreadable)
    return train, torch.from_numpy(labels_of(train))


def read_set(spec, root, skip_unreadable):
    """The data set from `load_reid`; a table may have no pids, or no pids and no cameras."""
    absent = {}
    for column in ("pid", "camid"):
        try:
            return load_reid(spec, root, skip_unreadable=skip_unreadable, **absent)
        except MissingColumn as error:
            # A column that the user named must exist.
            if error.column != column:
                raise
            absent[f"{column}_column"] = "none"
    return load_reid(spec, root, skip_unreadable=skip_unreadable, **absent)


def folder_of_images(spec, root):
    """The folder that holds unlabelled images, or None for any other data set.

    Its images lie directly in it (or in its `train`), or deeper than in one folder per identity without folders of
    cameras.
    """
    name, options = parse_spec(spec)
    if options or name in known_names():
        return None
    for place in [name] if root is None else [name, os.path.join(root, name)]:
        for folder in (os.path.join(place, "train"), place):
            if os.path.isdir(folder) and is_plain(folder):
                return folder
    return None


def is_plain(folder):
    entries = listing(folder)
    names = {entry.name for entry in entries}
    described = any(is_table(name) or name.endswith(".tar") for name in names)
    if described or names & {*SPLITS, "data", "bounding_box_train"}:
        return False
    files = [entry for entry in entries if entry.is_file()]
    if files:
        return len(files) == len(entries) and any(is_image(entry.name) for entry in files)
    for entry in entries:
        inner = listing(entry.path)
        if inner:
            cameras = are_cameras(names)
            if cameras and any(is_image(one.name) for one in inner):
                # Cameras, each with images of anybody.
                return True
            deep = all(one.is_dir() for one in inner) and any(list_images(entry.path))
            return deep and not (cameras or are_cameras(one.name for one in inner))
    return False


def are_cameras(names):
    """Whether all names are of folders of cameras; a camera may be number 0."""
    return all(camera_of_folder(name) is not None for name in names)


def is_image(name):
    return name.lower().endswith(ENDINGS)


def list_images(folder):
    """Paths below the folder of all images in it, at any depth, in the order of folders and names."""
    for level, inner, images in levels_of(folder):
        inner.sort()
        place = os.path.relpath(level, folder)
        yield from (os.path.normpath(os.path.join(place, name)) for name in sorted(path.name for path in images))


def name_beside(others, spec):
    """The last folders of a path, as few as tell it from the other names."""
    parts = Path(spec).parts
    names = ("/".join(parts[-count:]) for count in range(1, len(parts) + 1))
    return next((name for name in names if name not in others), spec)


def read_images(folder, domain):
    paths = list(list_images(folder))
    # The cameras that all names tell, in files like 0001_c2_x.jpg or folders like cam1; identities are not read.
    cameras = [camera_of(Path(path)) for path in paths]
    cameras = cameras if UNKNOWN not in cameras else [0] * len(paths)
    rows = [Row(path, 0, camera) for path, camera in zip(paths, cameras, strict=True)]
    return rows_to_dataset(rows, folder, domain, "train")


def without_names(dataset):
    """The same numbers without their names, as it is needed to join data sets with different names."""
    for column in ("pid", "camid"):
        dataset = put(dataset, column, storage_of(dataset, column).combine_chunks())
    return dataset
