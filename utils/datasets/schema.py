"""The one schema of all sources of images, and helpers to read folders of named files."""

import os
import re
from typing import NamedTuple

import datasets
import pyarrow as pa

from utils.datasets.images import PersonImage, storage_of

SPLITS = ("train", "query", "gallery")
# The identity or camera of an image where it is unknown.
UNKNOWN = -1
ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif")
CAMERA = re.compile(r"(?:^|[_.-])c(?:am)?_?(\d+)", re.IGNORECASE)


class Row(NamedTuple):
    """One image: its path below the root, and its labels."""

    path: str
    pid: int
    camid: int


class Reading(NamedTuple):
    """A source's rows by split, a note on how they were chosen, and the root of their files if it is another."""

    splits: dict
    note: str = ""
    root: str | None = None


def features():
    return datasets.Features(
        {
            "image": PersonImage(mode="RGB"),
            "pid": datasets.Value("int64"),
            "camid": datasets.Value("int64"),
            "domain": datasets.Value("string"),
            "path": datasets.Value("string"),
        }
    )


def hidden(name):
    """Whether a file belongs to the operating system: .DS_Store, ._*, every other dot-file, __MACOSX, Thumbs.db."""
    return name.startswith(".") or name.lower() in ("__macosx", "thumbs.db", "desktop.ini")


def listing(folder):
    """Entries of a folder in order of name, without the hidden ones."""
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if not hidden(entry.name)), key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{folder} is not a folder; give the folder that holds the images") from None
    except PermissionError:
        raise ValueError(f"{folder} cannot be read: permission denied") from None


def dense(values):
    """{value: number}, numbered from 0 in the order of the sorted distinct values."""
    return {value: number for number, value in enumerate(sorted(set(values)))}


def rows_to_dataset(rows, root, domain, split, note=""):
    """A split as a data set; the image column holds paths, not pixels."""
    paths = [row.path for row in rows]
    prefix = os.path.join(root, "")
    try:
        files = pa.array([prefix + path for path in paths], pa.string())
    except UnicodeEncodeError:
        odd = next(path for path in paths if not readable(prefix + path))
        raise ValueError(f"{ascii(prefix + odd)} is no UTF-8, as names unpacked elsewhere may be: rename it") from None
    table = pa.table(
        {
            "image": as_images(files),
            "pid": pa.array([row.pid for row in rows], pa.int64()),
            "camid": pa.array([row.camid for row in rows], pa.int64()),
            "domain": pa.repeat(pa.scalar(domain), len(rows)),
            "path": pa.array(paths, pa.string()),
        }
    )
    info = datasets.DatasetInfo(description=note, features=features())
    return datasets.Dataset(table.cast(features().arrow_schema), info=info, split=datasets.NamedSplit(split))


def readable(name):
    """Whether a file name is valid text; the file system gives invalid bytes as lone surrogates."""
    return not any("\ud800" <= letter <= "\udfff" for letter in name)


def as_images(files):
    """Paths as the storage of an image column."""
    return pa.StructArray.from_arrays([pa.nulls(len(files), pa.binary()), files], ["bytes", "path"])


def put(dataset, name, values):
    """The data set with these values in a column; equal columns stay, so that they remain mapped from the disk."""
    feature = features()[name]
    values = pa.array(values, feature.pa_type)
    if name in dataset.column_names:
        if dataset.features[name] == feature and storage_of(dataset, name).equals(pa.chunked_array([values])):
            return dataset
        dataset = dataset.remove_columns(name)
    return dataset.add_column(name, values, feature=feature)


class Form(NamedTuple):
    """The pattern of a file name, and an example."""

    pattern: re.Pattern
    example: str


def parse(form, name, place):
    match = form.pattern.fullmatch(name)
    if match is None:
        raise ValueError(f"{place}: {name!r} is not named as expected, like {form.example}")
    return match


def read_names(root, folder, form, label):
    """Rows of one folder; `label` returns (pid, camid) for the match of a name."""
    place = os.path.join(root, folder)
    if not os.path.isdir(place):
        raise ValueError(f"{place} is missing; it should hold images with names like {form.example}")
    rows = [Row(f"{folder}/{entry.name}", *label(parse(form, entry.name, place))) for entry in listing(place)]
    if not rows:
        raise ValueError(f"{place} holds no images; expected names like {form.example}")
    return rows


def number_and_camera(match):
    return int(match[1]), int(match[2]) - 1


def check_listed(root, paths, source):
    """ValueError if a path from a list or a table leaves the root, also by following links."""
    root = os.path.realpath(root)
    folders = {}
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in folders:
            real = os.path.realpath(os.path.join(root, folder))
            folders[folder] = ".." not in folder.split("/") and (real + os.sep).startswith(os.path.join(root, ""))
        file = os.path.join(root, path)
        inside = folders[folder] and name != ".." and not os.path.isabs(path)
        if inside and os.path.islink(file):
            inside = os.path.realpath(file).startswith(os.path.join(root, ""))
        if not inside:
            raise ValueError(f"{source} names {path!r}, which leaves {root}; paths must be relative and stay below it")
