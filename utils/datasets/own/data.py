"""Your own data: tables, archives, a saved data set, one folder per identity, or the Hub.

Image files stay where they are. Images inside a table are kept in memory, but a data set from `save_to_disk` is mapped
from the disk.
"""

import logging
import os
from pathlib import Path

import datasets
import numpy as np
import pyarrow.compute as pc
from huggingface_hub import HfApi, constants

from utils.datasets.images import PersonImage, storage_of
from utils.datasets.own.folders import read_identity_folders
from utils.datasets.own.labels import labels_in
from utils.datasets.own.patterns import read_named
from utils.datasets.own.tables import (
    METADATA,
    TABLES,
    check_asked_for,
    check_words,
    cut,
    is_table,
    locate_images,
    read_folder_tables,
    read_table,
)
from utils.datasets.own.tars import read_tars, tars_in
from utils.datasets.schema import SPLITS, features, listing, put, rows_to_dataset

logger = logging.getLogger(__name__)
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip", ".7z", ".rar")


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
    if columns.pid == "none" and set(splits) != {"train"}:
        raise ValueError(
            f"{where} has {', '.join(splits)}, which need a column of pids; name it: {where}:pid_column=..., or leave "
            "only the training images"
        )
    opened = {}
    for split, dataset in splits.items():
        if isinstance(dataset, datasets.Dataset):
            # A saved data set keeps its writer's format, in which columns may be tensors or missing.
            dataset, image = dataset.with_format(None), columns.image or "image"
        else:
            try:
                dataset, image = datasets.Dataset(dataset, split=datasets.NamedSplit(split)), "image"
            # A name that no data set can have, such as one with a null byte.
            except ValueError as error:
                raise ValueError(f"{where} has columns that cannot be read: {dataset.column_names}") from error
        if image not in dataset.column_names:
            raise ValueError(f"{where} has no column {image!r} for the images; its columns are {dataset.column_names}")
        opened[split] = dataset, image
    tables = {split: dataset for split, (dataset, _) in opened.items()}
    pid_names = camid_names = None
    pids = {split: np.zeros(len(dataset), dtype=np.int64) for split, dataset in tables.items()}
    camids = {split: np.full(len(dataset), int(split == "gallery")) for split, dataset in tables.items()}
    if columns.pid != "none":
        pids, pid_names = labels_in(tables, columns.pid, "pid", where)
    if columns.camid != "none":
        camids, camid_names = labels_in(tables, columns.camid, "camid", where)
    for split in tables:
        for name, values, least in (("pid", pids[split], 0), ("camid", camids[split], -1)):
            if (values < least).any():
                raise ValueError(f"{where}: {split} has {name} {values.min()}; the least allowed is {least}")
    unused_camera = 1 + max((int(values.max(initial=-1)) for values in camids.values()), default=-1)
    if camid_names and any((values < 0).any() for values in camids.values()):
        unused_camera, camid_names = len(camid_names), [*camid_names, "unknown"]
    schema, result = features(pid_names, camid_names), {}
    for split, (dataset, image) in opened.items():
        check_asked_for(columns, "domain", dataset.column_names, where)
        domains = [None] * len(dataset)
        if columns.domain in dataset.column_names:
            domains = words_of(dataset, columns.domain)
        domains = [str(domain if word is None or not str(word).strip() else word) for word in domains]
        if image != "image":
            dataset = dataset.select_columns([name for name in dataset.column_names if name != "image"])
            dataset = dataset.rename_column(image, "image")
        if hasattr(dataset.features["image"], "feature"):
            raise ValueError(
                f"{where}: the column {image} holds lists; a row is to have one image, so make a row of each"
            )
        dataset = dataset.cast_column("image", PersonImage(mode="RGB"))
        paths = paths_of(dataset, split)
        cameras = np.where(camids[split] < 0, unused_camera, camids[split])
        for name, values in (("pid", pids[split]), ("camid", cameras), ("domain", domains), ("path", paths)):
            dataset = put(dataset, name, values, schema[name])
        result[split] = dataset.select_columns(list(schema))
    return datasets.DatasetDict(result)


def read_local(path, columns, domain=None, names=None):
    """Your own folder or file, in any of the forms this module knows, or by a pattern of names (`read_named`)."""
    path = Path(path)
    if names is not None and not path.is_dir():
        raise ValueError(f"{path}: names={names} has no effect, it is no folder; leave it out")
    if path.is_file():
        if path.suffix == ".tar":
            return conform(*read_tars(path, columns), domain or path.stem, path)
        if path.name.lower().endswith(COMPRESSED):
            raise ValueError(unpack(path))
        if not is_table(path.name):
            raise ValueError(f"{path} is neither a folder, a parquet file, a table ({', '.join(TABLES)}) nor a .tar")
        table = locate_images(read_table(path), path, columns.image)
        domain = domain or (path.resolve().parent.name if path.name in METADATA else path.stem)
        return conform(cut(table, columns, path), columns, domain, path)
    domain = domain or path.resolve().name
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        try:
            stored = datasets.load_from_disk(str(path))
            stored = stored if isinstance(stored, datasets.DatasetDict) else {"train": stored}
            for part in stored.values():
                # Texts that joining sets would stumble over much later.
                "".join((part.info.description, part.info.citation, part.info.homepage, part.info.license))
        # Files that are not as datasets wrote them raise errors of many classes.
        except Exception as error:
            raise ValueError(f"{path} is a damaged save_to_disk folder: {error}") from error
        return conform(known_splits(stored, columns, path), columns, domain, path)
    if names is not None:
        return conform(*read_named(path, names, columns), domain, path)
    if not listing(path):
        raise ValueError(
            f"{path} is empty; expected images in one folder an identity, a metadata file or parquet files"
        )
    tables = read_folder_tables(path, columns)
    if tables is None and any(tars_in(place) for place in (path, *splits_of(path))):
        return conform(*read_tars(path, columns), domain, path)
    if tables is not None:
        return conform(tables, columns, domain, path)
    if (path / "list_train.txt").is_file():
        raise ValueError(f"{path} looks like MSMT17; name it: msmt17 instead of the folder, and --data_root {path}")
    packed = next((entry.path for entry in listing(path) if entry.name.lower().endswith(COMPRESSED)), None)
    if packed:
        raise ValueError(unpack(packed))
    rows, pid_names, camid_names = read_identity_folders(path, columns)
    names = {"pid_names": pid_names, "camid_names": camid_names}
    return datasets.DatasetDict({split: rows_to_dataset(rows[split], path, domain, split, **names) for split in rows})


def unpack(path):
    return f"{path} is compressed; unpack it to a plain .tar, or to a folder of images"


def splits_of(folder):
    return [folder / split for split in SPLITS if (folder / split).is_dir()]


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
