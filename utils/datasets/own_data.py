"""Your own data: a metadata file, parquet files, a saved data set, one folder per identity, or the Hub.

Image files stay where they are. Images inside a table are kept in memory, but a data set from `save_to_disk` is mapped
from the disk.
"""

import logging
import os
import re
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
from huggingface_hub import HfApi, constants

from utils.datasets.images import PersonImage, storage_of
from utils.datasets.own_tables import (
    METADATA,
    check_asked_for,
    check_words,
    cut,
    locate_images,
    read_folder_tables,
    read_table,
)
from utils.datasets.schema import CAMERA, ENDINGS, SPLITS, Row, dense, features, listing, put, rows_to_dataset

logger = logging.getLogger(__name__)


def read_identity_folders(folder):
    """One folder per identity, directly or under train, query and gallery.

    Folders whose names are numbers keep them as pid; other folders are numbered in order of name. The camera is the
    number after `c` or `cam` in the file name (0001_c2_05.jpg). If no name has a camera, all images get one camera,
    except that queries and gallery get two different ones: removing a query's own camera then never empties its
    ranking.
    """
    split_folders = [split for split in SPLITS if (folder / split).is_dir()]
    odd = [entry.name for entry in listing(folder) if entry.is_dir() and entry.name not in SPLITS]
    if split_folders and odd:
        raise ValueError(f"{folder} has {odd[0]} beside {', '.join(split_folders)}; splits are {', '.join(SPLITS)}")
    images = []
    for split, place in [(split, folder / split) for split in split_folders] or [("train", folder)]:
        for identity in listing(place):
            if not identity.is_dir():
                raise ValueError(f"{identity.path}: expected one folder an identity in {place}, or a metadata file")
            for entry in listing(identity.path):
                if not entry.name.lower().endswith(ENDINGS) or not entry.is_file():
                    raise ValueError(f"{entry.path} is no image; expected files ending in {', '.join(ENDINGS)}")
                camera = CAMERA.search(entry.name)
                images.append((split, identity.name, entry.name, camera and int(camera[1])))
    names = {identity for _, identity, _, _ in images}
    # A longer number, such as a time stamp, does not fit a pid.
    numbers = {int(name) for name in names if re.fullmatch(r"[0-9]{1,18}", name)}
    # 1 and 0001 are two folders, so they are two identities.
    numbered = len(numbers) == len(names)
    pids = {name: int(name) for name in names} if numbered else dense(names)
    with_camera = sum(camera is not None for *_, camera in images)
    if 0 < with_camera < len(images):
        odd = next((split, identity, name) for split, identity, name, camera in images if camera is None)
        raise ValueError(
            f"{folder}: {'/'.join(odd)} has no camera in its name, others do; expected ..._c2_... or ..._cam2_..."
        )
    cameras = dense(camera for *_, camera in images)
    splits = {split: [] for split in split_folders or ["train"]}
    for split, identity, name, camera in images:
        path = f"{split}/{identity}/{name}" if split_folders else f"{identity}/{name}"
        camid = cameras[camera] if with_camera else int(split == "gallery")
        splits[split].append(Row(path, pids[identity], camid))
    return splits


class MissingColumn(ValueError):
    """A table lacks the `column` that should hold its pids or cameras."""

    def __init__(self, column, message):
        super().__init__(message)
        self.column = column


def integers(dataset, column, meaning, where):
    """The values of an integer column; ValueError with what to do if there is no such column."""
    if column not in dataset.column_names:
        raise MissingColumn(
            column,
            f"{where} has no column {column!r} for the {meaning}; its columns are {dataset.column_names}. "
            f"Name the right one: {where}:{meaning}_column=...",
        )
    values = dataset.select_columns([column]).with_format("arrow")[:][column]
    if not pa.types.is_integer(values.type):
        example = values[0].as_py() if len(values) else None
        raise ValueError(f"{where}: column {column!r} must hold integers, it is {values.type} ({example!r})")
    if values.null_count:
        raise ValueError(f"{where}: column {column!r} is empty in {values.null_count} of {len(values)} rows")
    return values.combine_chunks().cast(pa.int64()).to_numpy(zero_copy_only=False)


def words_of(dataset, column):
    """A column's values; values of a `ClassLabel` become their names."""
    values, feature = storage_of(dataset, column).to_pylist(), dataset.features[column]
    if isinstance(feature, datasets.ClassLabel):
        return [None if value is None else feature.int2str(value) for value in values]
    return values


def paths_of(dataset, split):
    """The path column, or names made from split, row and file name, which contain no folder of this machine."""
    if "path" in dataset.column_names:
        paths = storage_of(dataset, "path").to_pylist()
        if all(isinstance(path, str) and not os.path.isabs(path) for path in paths):
            return paths
    names = pc.struct_field(storage_of(dataset, "image"), "path").to_pylist()
    return [f"{split}/{row:07d}_{os.path.basename(name or '')}".rstrip("_") for row, name in enumerate(names)]


def conform(splits, columns, domain, where):
    """Convert tables with any column names to the one schema; camera -1 (generated images) becomes a new camera.

    Without cameras, queries and gallery get two different ones, as in `read_identity_folders`. Without pids, all
    training images get one identity, and query and gallery are not allowed.
    """
    result, cameras = {}, {}
    if columns.pid == "none" and set(splits) != {"train"}:
        raise ValueError(
            f"{where} has {', '.join(splits)}, which need a column of pids; name it: {where}:pid_column=..., or leave "
            "only the training images"
        )
    for split, dataset in splits.items():
        if isinstance(dataset, datasets.Dataset):
            # A saved data set keeps its writer's format, in which columns may be tensors or missing.
            dataset, image = dataset.with_format(None), columns.image or "image"
        else:
            dataset, image = datasets.Dataset(dataset, split=datasets.NamedSplit(split)), "image"
        if image not in dataset.column_names:
            raise ValueError(f"{where} has no column {image!r} for the images; its columns are {dataset.column_names}")
        numbers = {}
        if columns.pid == "none":
            numbers["pid"] = np.zeros(len(dataset), dtype=np.int64)
        else:
            numbers["pid"] = integers(dataset, columns.pid, "pid", where)
        if columns.camid == "none":
            numbers["camid"] = np.full(len(dataset), int(split == "gallery"))
        else:
            numbers["camid"] = integers(dataset, columns.camid, "camid", where)
        for name, least in (("pid", 0), ("camid", -1)):
            if (numbers[name] < least).any():
                raise ValueError(f"{where}: {split} has {name} {numbers[name].min()}; the least allowed is {least}")
        cameras[split] = numbers["camid"]
        check_asked_for(columns, "domain", dataset.column_names, where)
        domains = [None] * len(dataset)
        if columns.domain in dataset.column_names:
            domains = words_of(dataset, columns.domain)
        domains = [str(domain if word is None else word) for word in domains]
        if image != "image":
            dataset = dataset.select_columns([name for name in dataset.column_names if name != "image"])
            dataset = dataset.rename_column(image, "image")
        dataset = dataset.cast_column("image", PersonImage(mode="RGB"))
        paths = paths_of(dataset, split)
        for name, values in (("pid", numbers["pid"]), ("domain", domains), ("path", paths)):
            dataset = put(dataset, name, values)
        result[split] = dataset
    unused_camera = 1 + max((int(values.max(initial=-1)) for values in cameras.values()), default=-1)
    for split, values in cameras.items():
        dataset = put(result[split], "camid", np.where(values < 0, unused_camera, values))
        result[split] = dataset.select_columns(list(features()))
    return datasets.DatasetDict(result)


def read_local(path, columns, domain=None):
    """Your own folder or file, in any of the forms this module knows."""
    path = Path(path)
    if path.is_file():
        if path.name not in METADATA and path.suffix != ".parquet":
            raise ValueError(f"{path} is neither a folder, a parquet file nor one of {', '.join(METADATA)}")
        table = locate_images(read_table(path), path, columns.image)
        domain = domain or (path.resolve().parent.name if path.name in METADATA else path.stem)
        return conform(cut(table, columns, path), columns, domain, path)
    domain = domain or path.resolve().name
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        try:
            stored = datasets.load_from_disk(str(path))
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            raise ValueError(f"{path} is a damaged save_to_disk folder: {error}") from error
        stored = stored if isinstance(stored, datasets.DatasetDict) else {"train": stored}
        return conform(known_splits(stored, columns, path), columns, domain, path)
    if not listing(path):
        raise ValueError(
            f"{path} is empty; expected images in one folder an identity, a metadata file or parquet files"
        )
    tables = read_folder_tables(path, columns)
    if tables is not None:
        return conform(tables, columns, domain, path)
    if (path / "bounding_box_train").is_dir() or (path / "list_train.txt").is_file():
        raise ValueError(f"{path} looks like a benchmark; name it, as in load_reid('market1501', root={str(path)!r})")
    rows = read_identity_folders(path)
    return datasets.DatasetDict({split: rows_to_dataset(rows[split], path, domain, split) for split in rows})


def read_hub(name, columns, domain=None, revision=None):
    """A data set from the Hub with these columns; ValueError for any error of the Hub or the network."""
    try:
        if not constants.HF_HUB_OFFLINE:
            # This finds an absent name within a second; load_dataset would retry many times.
            HfApi().dataset_info(name, revision=revision, timeout=10)
        stored = datasets.load_dataset(name, revision=revision)
    # The libraries raise their own errors and also those of httpx.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"{name} is no folder here, and the Hub does not give it: {reason}") from error
    return conform(known_splits(stored, columns, name), columns, domain or name.split("/")[-1], name)


def known_splits(stored, columns, where):
    """The splits of a stored data set; if it has only `train`, the splits that its split column gives."""
    if set(stored) == {"train"}:
        whole = stored["train"]
        check_asked_for(columns, "split", whole.column_names, where)
        if columns.split in whole.column_names:
            words = words_of(whole, columns.split)
            check_words(words, where)
            stored = {
                split: whole.select([row for row, word in enumerate(words) if word == split])
                for split in SPLITS
                if split in words
            }
    splits = {split: stored[split] for split in SPLITS if split in stored}
    if not splits:
        raise ValueError(f"{where} has the splits {list(stored)}; expected some of {', '.join(SPLITS)}")
    ignored = [split for split in stored if split not in splits]
    if ignored:
        logger.warning(
            "%s: the splits %s are left out, only %s are read", where, ", ".join(ignored), ", ".join(SPLITS)
        )
    return splits
