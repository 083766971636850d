"""The one schema of all sources of images, and helpers to read folders of named files."""

import functools
import logging
import os
import re
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import datasets
import pyarrow as pa

from utils.datasets.images import PersonImage, storage_of

SPLITS = ("train", "query", "gallery")
# The identity or camera of an image where it is unknown.
UNKNOWN = -1
ENDINGS = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif")
# `_c2`, `-cam10`, `c3s1`, `c4f0012`, after the number a word ends; or, as in MARS, `0001C1T0002F003`.
CAMERA = re.compile(
    r"(?:(?:^|[_.-])c(?:am(?:era)?)?_?|^[\d-]+C(?=\d+T\d+F\d))(\d{1,9})(?=$|[^0-9a-z]|[sft]\d)", re.IGNORECASE
)
# A UUID, or a checksum in hexadecimal digits: the `c2` inside one is no camera.
RANDOM_NAME = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|[0-9a-f]{16,}", re.IGNORECASE)
LABELLED = re.compile(r"(-?\d+)_c(\d+)")
# Files about a data set, not of it.
DOCUMENT = re.compile(r"(?:read[ _-]?me|licen[cs]e|copying|citation)(?:\.(?:txt|md|rst|pdf|html|cff))?", re.IGNORECASE)
logger = logging.getLogger(__name__)
# Files that are left out because of their names, while `leaving_out` runs; None: such a file is an error.
LEFT_OUT = ContextVar("LEFT_OUT", default=None)


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


def features(pids=None, camids=None):
    """The schema. `pids` and `camids` are the names of identities and cameras that have names, in order of number."""
    return datasets.Features(
        {
            "image": PersonImage(mode="RGB"),
            "pid": datasets.ClassLabel(names=pids) if pids else datasets.Value("int64"),
            "camid": datasets.ClassLabel(names=camids) if camids else datasets.Value("int64"),
            "domain": datasets.Value("string"),
            "path": datasets.Value("string"),
        }
    )


def names_of(dataset, column):
    """The names of a data set's identities (`pid`) or cameras (`camid`) by number, or None if they are numbers."""
    return getattr(dataset.features[column], "names", None)


@functools.lru_cache(maxsize=256)
def warn_once(message):
    """A set may be opened several times in a run."""
    logger.warning("%s", message)


def camera_in(name):
    """The number of the camera in a file name, or None."""
    match = CAMERA.search(RANDOM_NAME.sub("", name))
    return int(match[1]) if match else None


def hidden(name):
    """Whether a file belongs to the operating system: .DS_Store, ._*, every other dot-file, __MACOSX, Thumbs.db."""
    return name.startswith(".") or name.lower() in ("__macosx", "thumbs.db", "desktop.ini")


def listing(folder):
    """Entries of a folder in order of name, without the hidden ones and files such as README.txt or LICENSE."""
    try:
        with os.scandir(folder) as entries:
            seen = [entry for entry in entries if not hidden(entry.name)]
            seen = [entry for entry in seen if not (DOCUMENT.fullmatch(entry.name) and entry.is_file())]
            return sorted(seen, key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{folder} is not a folder; give the folder that holds the images") from None
    except PermissionError:
        raise ValueError(f"{folder} cannot be read: permission denied") from None


def dense(values):
    """{value: number}, numbered from 0 in the order of the sorted distinct values."""
    return {value: number for number, value in enumerate(sorted(set(values)))}


def rows_to_dataset(rows, root, domain, split, note="", pid_names=None, camid_names=None):
    """A split as a data set; the image column holds paths, not pixels."""
    paths = [row.path for row in rows]
    prefix = os.path.join(root, "")
    try:
        files = pa.array([prefix + path for path in paths], pa.string())
        pids, camids = (pa.array([getattr(row, name) for row in rows], pa.int64()) for name in ("pid", "camid"))
    except UnicodeEncodeError:
        odd = next(path for path in paths if not readable(prefix + path))
        raise ValueError(f"{ascii(prefix + odd)} is no UTF-8, as names unpacked elsewhere may be: rename it") from None
    except OverflowError:
        odd = next(row for row in rows if max(abs(row.pid), abs(row.camid)) >= 2**63)
        raise ValueError(f"{prefix + odd.path}: {odd.pid} or {odd.camid} is too large a number") from None
    schema, domains = features(pid_names, camid_names), pa.repeat(pa.scalar(domain), len(rows))
    table = pa.table([as_images(files), pids, camids, domains, pa.array(paths, pa.string())], names=list(schema))
    info = datasets.DatasetInfo(description=note, features=schema)
    return datasets.Dataset(table.cast(schema.arrow_schema), info=info, split=datasets.NamedSplit(split))


def readable(name):
    """Whether a file name is valid text; the file system gives invalid bytes as lone surrogates."""
    return not any("\ud800" <= letter <= "\udfff" for letter in name)


def as_images(files):
    """Paths as the storage of an image column."""
    return pa.StructArray.from_arrays([pa.nulls(len(files), pa.binary()), files], ["bytes", "path"])


def put(dataset, name, values, feature=None):
    """The data set with these values in a column; equal columns stay, so that they remain mapped from the disk."""
    feature = feature or features()[name]
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


@contextmanager
def leaving_out(where, skip):
    """With `skip`, files whose names say nothing (see `left_out`) are left out and listed, here in the log."""
    names = []
    token = LEFT_OUT.set(names if skip else None)
    try:
        yield names
    finally:
        LEFT_OUT.reset(token)
    if names:
        listed = "".join(f"\n  {name}" for name in names)
        warn_once(f"{where}: left out {len(names)} files that are not as expected:{listed}")


def left_out(path, complaint):
    """Note a file to leave out; ValueError with the complaint if such files are errors."""
    names = LEFT_OUT.get()
    if names is None:
        raise ValueError(f"{complaint}; skip_unreadable leaves such files out")
    names.append(os.fspath(path))


def parsed(form, names, place):
    """Yield (name, match) of file names, which may have folders before them."""
    for name in names:
        base = os.path.basename(name)
        match = form.pattern.fullmatch(base)
        if match is None:
            left_out(os.path.join(place, name), f"{place}: {base!r} is not named as expected, like {form.example}")
        else:
            yield name, match


def read_names(root, folder, form, label):
    """Rows of one folder; `label` returns (pid, camid) for the match of a name."""
    place = os.path.join(root, folder)
    if not os.path.isdir(place):
        raise ValueError(f"{place} is missing; it should hold images with names like {form.example}")
    names = [entry.name for entry in listing(place)]
    rows = [Row(f"{folder}/{name}", *label(match)) for name, match in parsed(form, names, place)]
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
        if not inside and os.path.isabs(path):
            raise ValueError(
                f"{source} names {path!r}, which leaves {root}; paths must be relative and stay below it: move the "
                "table to a folder above its images, or put the images inside it (before to_parquet, dataset = "
                "dataset.with_format('arrow').map(datasets.table.embed_table_storage, batched=True))"
            )
        if not inside:
            raise ValueError(f"{source} names {path!r}, which leaves {root}; paths must be relative and stay below it")
