"""Training images whose identities are not asked for: of any set that `load_reid` knows, or of a folder of images."""

import os

import datasets
import numpy as np

from utils.datasets.images import check_images
from utils.datasets.load import labels_of, load_reid, parse_spec
from utils.datasets.own_data import MissingColumn
from utils.datasets.schema import ENDINGS, Row, features, listing, rows_to_dataset


def open_unlabelled(specs, root=None, *, skip_unreadable=False):
    """(training rows of one or several sets, their true labels for a report or None, specs with query and gallery).

    A folder with images in it, or in its `train`, and no folder an identity has no labels, nor has a table without a
    column of pids. Neither has a set whose images all bear one.
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
    """What `load_reid` gives; a table may lack pids, and then cameras too."""
    absent = {}
    for column in ("pid", "camid"):
        try:
            return load_reid(spec, root, skip_unreadable=skip_unreadable, **absent)
        except MissingColumn as error:
            # One that somebody named must be there.
            if error.column != column:
                raise
            absent[f"{column}_column"] = "none"
    return load_reid(spec, root, skip_unreadable=skip_unreadable, **absent)


def folder_of_images(spec, root):
    """The folder in which unlabelled images lie, or None for any other set."""
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
