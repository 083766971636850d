"""Training images whose identities are not used: of any data set that `load_reid` opens, or of a folder of images."""

import os

import datasets
import numpy as np

from utils.datasets.images import check_images
from utils.datasets.load import labels_of, load_reid, parse_spec
from utils.datasets.own_labels import MissingColumn
from utils.datasets.schema import ENDINGS, Row, features, listing, rows_to_dataset


def open_unlabelled(specs, root=None, *, skip_unreadable=False):
    """(training rows of one or several data sets, true labels for a report or None, specs with query and gallery).

    There are no true labels for a folder with images directly in it or in its `train`, for a table without a column of
    pids, or for a data set whose images all have the same pid.
    """
    parts, truths, measurable = [], [], []
    for spec in dict.fromkeys(specs):
        place = folder_of_images(spec, root)
        data = {"train": read_images(place, spec)} if place else read_set(spec, root, skip_unreadable)
        if "train" not in data:
            raise ValueError(f"--target {spec} has no train split, only {', '.join(data)}; its images are trained on")
        if {"query", "gallery"} <= set(data):
            measurable.append(spec)
        train = data["train"]
        if not skip_unreadable:
            train, _ = check_images(train, where=spec)
        elif place:
            train, _ = check_images(train, where=spec, skip_unreadable=True)
        first = sum(int(truth.max()) + 1 for truth in truths)
        truths.append(first + labels_of(train))
        parts.append(train.select_columns(list(features())))
    train = parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
    truth = np.concatenate(truths)
    labelled = all(len(set(labels.tolist())) > 1 for labels in truths)
    return train, truth if labelled else None, measurable


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
    """The folder that holds unlabelled images, or None for any other data set."""
    name, options = parse_spec(spec)
    if options:
        return None
    for place in [name] if root is None else [name, os.path.join(root, name)]:
        for folder in (os.path.join(place, "train"), place):
            if os.path.isdir(folder):
                entries = listing(folder)
                if (
                    entries
                    and all(entry.is_file() for entry in entries)
                    and any(is_image(entry.name) for entry in entries)
                ):
                    return None if any(entry.name.startswith("metadata.") for entry in entries) else folder
    return None


def is_image(name):
    return name.lower().endswith(ENDINGS)


def read_images(folder, domain):
    rows = [Row(entry.name, 0, 0) for entry in listing(folder) if is_image(entry.name)]
    return rows_to_dataset(rows, folder, os.path.basename(domain.rstrip("/")), "train")
