"""Copies of a data set with the images inside, on disk or on the Hub, and a table of its counts."""

import glob
import os
import platform
import shutil
import tempfile
from pathlib import Path

import datasets
import psutil
from huggingface_hub import HfApi

from utils.datasets.images import PersonImage
from utils.datasets.load import people_of

IMAGES_AT_ONCE = 200


def embedded(data, folder):
    """The same rows with their images inside, mapped from files written to `folder`."""

    def read(table):
        images = PersonImage(mode="RGB").embed_storage(table["image"].combine_chunks())
        return table.set_column(table.column_names.index("image"), "image", images)

    folder.mkdir(parents=True)
    splits = {}
    for split, dataset in data.items():
        splits[split] = dataset.with_format("arrow").map(
            read,
            batched=True,
            batch_size=IMAGES_AT_ONCE,
            writer_batch_size=IMAGES_AT_ONCE,
            cache_file_name=str(folder / f"{split}.arrow"),
            features=dataset.features,
            desc=f"reading {split}",
        )
    return datasets.DatasetDict(splits).with_format(None)


def save(data, folder):
    """Write a portable copy, images inside, readable by `load_reid(folder)`: to a temporary folder, then renamed."""
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"{folder} exists already; give a new folder")
    mine = f".{folder.name}.part-{platform.node()}-"
    for leftover in folder.parent.glob(f"{glob.escape(mine)}*"):
        # A killed process left this folder; it may be as large as the data set.
        if not psutil.pid_exists(int(leftover.name.removeprefix(mine))):
            shutil.rmtree(leftover, ignore_errors=True)
    part = folder.with_name(f"{mine}{os.getpid()}")
    try:
        embedded(data, part / "read").save_to_disk(str(part / "written"))
        (part / "written").rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def push(data, name, private=True):
    """Push a portable copy, images inside, to the Hub."""
    try:
        # Called first, so that a missing token or network raises before all images are read.
        HfApi().create_repo(name, repo_type="dataset", private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            embedded(data, Path(folder) / "read").push_to_hub(name, private=private)
    # The Hub's client raises its own errors and also those of httpx.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"the Hub did not take {name}: {reason}") from error


def push_folder(folder, name, old_files, files=None):
    """Upload a folder, or its `files`, to the Hub, to a private repository where it is new. Returns the address.

    What is there of `old_files` and not in the folder goes; both are lists of patterns.
    """
    api, options = HfApi(), {"folder_path": folder, "allow_patterns": files, "delete_patterns": old_files}
    name = api.create_repo(name, repo_type="dataset", private=True, exist_ok=True).repo_id
    return api.upload_folder(repo_id=name, repo_type="dataset", **options)


def count_table(data):
    """A text table of the images, identities and cameras of each split."""
    lines = [f"{'split':<8} {'images':>9} {'ids':>7} {'cameras':>8}"]
    for split, dataset in data.items():
        people, cameras = len(set(people_of(dataset))), len(set(dataset["camid"][:]))
        lines.append(f"{split:<8} {len(dataset):>9,} {people:>7,} {cameras:>8,}")
    return "\n".join(lines)
