"""Webdataset archives: .tar files of images, each with a label of the same name that ends in .cls or .json.

Nothing is unpacked: an image is read from its place in the archive when it is needed.
"""

import json
import os
import re
import tarfile
from io import BytesIO
from pathlib import Path, PurePosixPath

import pyarrow as pa
from fsspec.spec import AbstractFileSystem

from utils.datasets.images import IMAGE_TYPE, TARRED
from utils.datasets.own.labels import MissingColumn
from utils.datasets.own.tables import cut, split_of_file
from utils.datasets.schema import ENDINGS, SPLITS, hidden, left_out, listing

LABELS = (".cls", ".json")
# What an address cannot hold.
ODD = re.compile(r"[^\w.-]")


class TarFileSystem(AbstractFileSystem):
    """A file inside an archive: tarred:///folder/shard.tar!OFFSET!SIZE/name.jpg."""

    protocol = TARRED.removesuffix("://")

    def _open(self, path, mode="rb", **_):
        # Some fsspec calls remove the first slash.
        archive, offset, rest = ("/" + self._strip_protocol(path).lstrip("/")).rsplit("!", 2)
        with open(archive, "rb") as file:
            file.seek(int(offset))
            size = int(rest.partition("/")[0])
            content = file.read(size)
        if len(content) < size:
            raise OSError(f"{archive} ends in the middle of the image")
        return BytesIO(content)


def tars_in(folder):
    return [Path(entry.path) for entry in listing(folder) if entry.name.endswith(".tar") and entry.is_file()]


def read_tars(place, columns):
    """(tables by split, columns): of one archive, or of a folder that holds archives directly or in its splits.

    The splits are those of the names (train-000000.tar), of the folders, or of `split` in the .json files.
    """
    if place.is_file():
        groups = {None: [place]}
    elif tars_in(place):
        groups = {}
        files = tars_in(place)
        for split in (*SPLITS, None):
            groups |= {split: part} if (part := [file for file in files if split_of_file(file) == split]) else {}
    else:
        groups = {split: tars_in(place / split) for split in SPLITS if (place / split).is_dir()}
    empty = [split for split, files in groups.items() if not files]
    if empty:
        raise ValueError(f"{place / empty[0]} holds no .tar, other splits do")
    if None in groups and len(groups) > 1:
        raise ValueError(
            f"{place} has {groups[None][0].name} beside archives of {', '.join(filter(None, groups))}; it belongs to "
            f"none of {', '.join(SPLITS)}: move it away, or rename it"
        )
    root = place.parent if place.is_file() else place
    samples = {split: [one for file in files for one in samples_of(file, root)] for split, files in groups.items()}
    known = {name for part in samples.values() for _, _, label in part for name in label}
    if known:
        samples = {split: [sample for sample in part if has_label(*sample)] for split, part in samples.items()}
    if "cls" in known and columns.camid not in known and columns.camid == columns._field_defaults["camid"]:
        # A .cls has no place for a camera.
        columns = columns._replace(camid="none")
    tables = {split: table_of(part, columns, known, place) for split, part in samples.items()}
    return (cut(tables[None], columns, place) if None in tables else tables), columns


def samples_of(file, root):
    """(path, url, label) of every image of an archive; a label is a dict, empty if there is none."""
    images, labels, stems = {}, {}, {}
    try:
        with tarfile.open(file, "r:") as archive:
            for member in archive:
                name = PurePosixPath(member.name)
                if member.isdir() or any(hidden(part) for part in name.parts if part != ".."):
                    continue
                if name.is_absolute() or ".." in name.parts:
                    raise ValueError(
                        f"{file} holds {member.name!r}, which leaves the archive; pack it again with plain names"
                    )
                ending = name.suffix.lower()
                if ending not in (*ENDINGS, *LABELS):
                    continue
                if not member.isreg():
                    raise ValueError(f"{file}: {member.name} is a link or a device; pack the file itself")
                if ending in ENDINGS:
                    if name in images:
                        raise ValueError(f"{file} holds {member.name} twice")
                    images[name] = member.offset_data, member.size
                else:
                    label = read_label(archive.extractfile(member).read(), ending, f"{file}: {member.name}")
                    exact, short = keys_of(name)
                    labels[exact] = labels.get(exact, {}) | label
                    stems.setdefault(short, set()).add(exact)
    except (tarfile.TarError, OSError) as error:
        raise ValueError(
            f"{file} cannot be read as a .tar: {error}; a compressed archive must be unpacked to a plain .tar first"
        ) from error
    if "*" in os.path.abspath(file):
        raise ValueError(f"{file}: rename it, as * in a path stands for many")
    if not images:
        raise ValueError(f"{file} holds no images; expected names that end in {', '.join(ENDINGS)}")
    # A label may be that of a sample, up to the first dot, unless it is that of one image.
    own = {keys_of(name)[0] for name in images}
    for short, exacts in stems.items():
        for exact in sorted(exacts - own - {short}):
            labels[short] = labels.get(short, {}) | labels[exact]
    # Two images of one sample, such as an image and its mask, are no problem if each has a label of its own.
    twins = {}
    for name in images:
        twins.setdefault(next((key for key in keys_of(name) if key in labels), name), []).append(str(name))
    several = next((names for names in twins.values() if len(names) > 1), None)
    if several:
        raise ValueError(f"{file}: {' and '.join(several[:3])} share one label; keep one image in each sample")
    return [
        (
            os.path.join(os.path.relpath(file, root), str(name)),
            f"{TARRED}{os.path.abspath(file)}!{offset}!{size}/{ODD.sub('_', name.name)}",
            next((labels[key] for key in keys_of(name) if key in labels), {}),
        )
        for name, (offset, size) in sorted(images.items())
    ]


def keys_of(name):
    """What a label shares with its image: the name without its ending, or up to the first dot as webdataset has it."""
    return str(name.with_suffix("")), str(name.with_name(name.name.partition(".")[0] or name.name))


def read_label(content, ending, where):
    try:
        text = content.decode().strip()
        label = {"cls": text} if ending == ".cls" else json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where} cannot be read as a label: {error}") from error
    if not isinstance(label, dict):
        raise ValueError(f"{where} must hold an object with pid and camid, not {text[:40]!r}")
    return label


def has_label(path, _, label):
    if not label:
        left_out(path, f"{path} has no label; expected a file of the same name that ends in .cls or .json")
    return bool(label)


def table_of(samples, columns, known, place):
    """The samples of a split as a table with the columns that a user's table has."""
    table = {
        "image": pa.array([{"bytes": None, "path": url} for _, url, _ in samples], IMAGE_TYPE),
        "path": pa.array([path for path, _, _ in samples]),
    }
    for kind, name in columns._asdict().items():
        if kind == "image" or name == "none":
            continue
        key = "cls" if kind == "pid" and name not in known and name == columns._field_defaults["pid"] else name
        if key in known:
            table[name] = pa.array([value_of(label, key, path) for path, _, label in samples], pa.string())
        elif kind in ("pid", "camid"):
            keys = sorted(known) or "no .cls and no .json"
            raise MissingColumn(
                name,
                f"{place}: no label has {name!r} for the {kind}; the labels have {keys}. Name the right one: "
                f"{place}:{kind}_column=..." + (f", or {kind}_column=none" if kind == "camid" else ""),
            )
    return pa.table(table)


def value_of(label, key, path):
    """A label's value as text; text of whole numbers counts as numbers later on."""
    value = label.get(key)
    if isinstance(value, bool) or not isinstance(value, (str, int, float, type(None))):
        raise ValueError(f"{path}: {key} must be a number or text, not {value!r}")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return None if value is None else str(value)
