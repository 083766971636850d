"""Pixels and files of images: correct RGB from any mode, reading from any protocol, finding damaged images."""

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

logger = logging.getLogger(__name__)
IMAGE_TYPE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
# Below this number all images are decoded, which takes a second or two; in larger sets only doubtful ones are.
DECODE_ALL_BELOW = 4096
CHUNK = 512
# Images drawn on access cannot be damaged.
DRAWN = "synthetic://"
# Images inside a .tar, see utils/datasets/own/tars.py.
TARRED = "tarred://"


def as_rgb(image):
    """RGB pixels of any mode, without alpha; deep grey is scaled down (Pillow would clip it to white).

    Floats of at most 1 are shares of white; 32 bits that hold no more than 255 are as they are.
    """
    if image.mode.startswith(("I", "F")):
        deep = np.nan_to_num(np.asarray(image).astype(np.float64)).clip(0, 65535)
        largest = deep.max(initial=0)
        small = 255 if image.mode == "F" and largest <= 1 else 1
        factor = small if image.mode in ("I", "F") and largest <= 255 else 1 / 256
        image = Image.fromarray((deep * factor + (factor > 1) / 2).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


@dataclass
class PersonImage(datasets.Image):
    """`datasets.Image(mode="RGB")` that also decodes 16-bit grey correctly.

    It is stored as `datasets.Image`, and other programs read it as that. Always pass the mode: a default of this class
    would not be stored.
    """

    def decode_example(self, value, token_per_repo_id=None):
        if not isinstance(value, dict):
            return value
        plain = datasets.Image(decode=self.decode)
        try:
            return as_rgb(plain.decode_example(value, token_per_repo_id=token_per_repo_id))
        # Decoders raise errors of many classes, and none of them names the file.
        except Exception as error:
            raise ValueError(
                f"image {value['path'] or 'inside a table'} cannot be read: {reason_of(error)}"
            ) from error

    def embed_storage(self, storage, token_per_repo_id=None, **_):
        """Store all bytes in the table, read with any protocol; of the path only the file name is kept."""
        rows = []
        for row in storage.to_pylist():
            content = row["bytes"] if row["bytes"] is not None else read_bytes(row["path"])
            name = os.path.basename(row["path"] or "") or None
            rows.append({"bytes": as_plain_readers_see_it(content), "path": name})
        return pa.array(rows, type=IMAGE_TYPE)


def as_plain_readers_see_it(content):
    """The bytes; deep grey becomes an 8-bit image, because other readers would convert it wrongly."""
    with Image.open(BytesIO(content)) as image:
        if not image.mode.startswith(("I", "F")):
            return content
        buffer = BytesIO()
        as_rgb(ImageOps.exif_transpose(image)).save(buffer, format="PNG")
        return buffer.getvalue()


def read_bytes(path):
    if "://" not in path:
        return Path(path).read_bytes()
    with fsspec.open(path, "rb") as file:
        return file.read()


# Registered by name, so that a new worker of a data loader, which imports only this module, can draw too.
fsspec.register_implementation("synthetic", "utils.synthetic.world.SyntheticFileSystem", clobber=True)
fsspec.register_implementation("tarred", "utils.datasets.own.tars.TarFileSystem", clobber=True)
fsspec.register_implementation("lmdb", "utils.datasets.lmdb_files.LmdbFileSystem", clobber=True)
fsspec.register_implementation("crop", "utils.datasets.mot.CropFileSystem", clobber=True)


def storage_of(dataset, column):
    """A column in Arrow's storage form: images are not decoded, and data mapped from the disk is not copied."""
    return dataset.select_columns([column]).with_format("arrow")[:][column]


def local_files(dataset):
    """Paths of the images that are files on this machine."""
    storage = storage_of(dataset, "image")
    names = pc.struct_field(storage, "path").filter(pc.is_null(pc.struct_field(storage, "bytes")))
    return [name for name in names.to_pylist() if name and "://" not in name]


def check_files(data, where):
    """ValueError for files that are missing or empty; only file sizes are checked."""
    bad, total = [], 0
    for dataset in data.values():
        for path in local_files(dataset):
            try:
                if os.stat(path).st_size == 0:
                    bad.append((path, "empty file"))
            except (OSError, ValueError) as error:
                bad.append((path, reason_of(error)))
        total += len(dataset)
    if bad:
        raise ValueError(complaint(bad, total, where))


def complaint(bad, total, where):
    shown = "; ".join(f"{path} ({reason})" for path, reason in bad[:5])
    more = f"; and {len(bad) - 5} more" if len(bad) > 5 else ""
    return (
        f"{where}: {len(bad)} of {total} images cannot be read: {shown}{more}. "
        f"Replace them, or leave them out with skip_unreadable"
    )


def reason_of(error):
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def damage(content, path, decode):
    """Why an image cannot be read, or None. A complete header and trailer are enough unless `decode` is set."""
    try:
        on_disk = content is None and "://" not in path
        if content is None and not on_disk:
            content = read_bytes(path)
        size = os.stat(path).st_size if on_disk else len(content)
        if size == 0:
            return "empty file"
        with open(path, "rb") if on_disk else BytesIO(content) as file, Image.open(file) as image:
            if not decode:
                file.seek(max(0, size - 12))
                end = file.read()
                if image.format == "JPEG" and end.endswith(b"\xff\xd9"):
                    return None
                if image.format == "PNG" and end.startswith(b"\0\0\0\0IEND"):
                    return None
            file.seek(0)
            with Image.open(file) as image:
                image.load()
    # Decoders raise errors of many classes.
    except Exception as error:
        return reason_of(error)
    return None


def damaged_rows(dataset, decode, pool, bar):
    """(row, path, reason) of every image of a split that cannot be read."""
    storage = storage_of(dataset, "image")

    def look(start):
        bad_rows = []
        rows = storage.slice(start, CHUNK).to_pylist()
        for number, row in enumerate(rows, start):
            content, path = (row["bytes"], row["path"]) if row else (None, None)
            if content is None and path is None:
                bad_rows.append((number, f"row {number}", "neither bytes nor a path"))
            elif content is not None or not path.startswith(DRAWN):
                reason = damage(content, path, decode)
                bad_rows += [(number, path, reason)] if reason else []
        bar.update(len(rows))
        return bad_rows

    return [bad for bad_rows in pool.map(look, range(0, len(dataset), CHUNK)) for bad in bad_rows]


def check_images(data, *, skip_unreadable=False, decode=None, workers=None, where="data", may_be_empty=False):
    """Find images that cannot be decoded, before training starts; returns (data without them, list of them).

    They are an error unless `skip_unreadable` is set: then they are dropped, logged, and listed as (split, path,
    reason). Headers and trailers are checked, and doubtful images are decoded. All images are decoded in data sets
    with fewer than 4096 images, or with `decode=True`. `data` is a `DatasetDict` or one of its splits.
    """
    whole = isinstance(data, dict)
    splits = data if whole else {str(data.split or "data"): data}
    total = sum(len(dataset) for dataset in splits.values())
    decode = total < DECODE_ALL_BELOW if decode is None else decode
    readable, skipped = {}, []
    with ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1)) as pool:
        with tqdm(total=total, desc="checking images", disable=None) as bar:
            for split, dataset in splits.items():
                bad = damaged_rows(dataset, decode, pool, bar)
                drop = {row for row, _, _ in bad}
                readable[split] = (
                    dataset.select([row for row in range(len(dataset)) if row not in drop]) if bad else dataset
                )
                names = dataset.remove_columns("image")
                skipped += [(split, path or names[row]["path"], reason) for row, path, reason in bad]
    if skipped and not skip_unreadable:
        raise ValueError(complaint([(path, reason) for _, path, reason in skipped], total, where))
    if skipped:
        listed = "".join(f"\n  {split}: {path} ({reason})" for split, path, reason in skipped)
        logger.warning("%s: left out %d of %d images that cannot be read:%s", where, len(skipped), total, listed)
    empty = [split for split, dataset in readable.items() if not len(dataset)]
    if empty and not may_be_empty:
        raise ValueError(f"{where}: no readable image is left in {', '.join(empty)}")
    return (datasets.DatasetDict(readable) if whole else readable[next(iter(readable))]), skipped
