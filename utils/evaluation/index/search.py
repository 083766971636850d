"""Images of folders for a kept gallery: what is new, labels of both sides, the same files."""

import os
from contextlib import nullcontext
from pathlib import Path

import torch

from utils.datasets.images import check_images, storage_of
from utils.datasets.schema import UNKNOWN
from utils.datasets.search_folders import camera_of, counts_images, identity_of, numbered
from utils.evaluation.chunk_files import forget_chunks
from utils.evaluation.index.store import Index, Rows, alone
from utils.evaluation.metrics import Side
from utils.evaluation.self_matches import content_of


def open_kept(folder, gallery_dir, *, append):
    """The `Index` of a folder, empty for one that is to be made; ValueError where that is not what was asked for."""
    index = Index.open(folder)
    if index is None and not gallery_dir:
        raise ValueError(f"{folder} holds no gallery; give its images by --gallery_dir")
    if index is None and append:
        raise ValueError(f"{folder} holds no gallery to add to; leave out --append to make one")
    if index is not None and gallery_dir and not append:
        raise ValueError(
            f"{folder} holds a gallery of {len(index):,} images: add those of --gallery_dir that are new by --append, "
            "or leave out --gallery_dir"
        )
    if index is not None and not len(index) and not gallery_dir:
        raise ValueError(f"{folder} holds no images any more; add some by --gallery_dir and --append")
    return index or Index(folder)


def add_new(index, images, gallery_dir, extract, *, accelerator, **reading):
    """Extract the images of a data set that the gallery does not have, and add them: the unreadable ones.

    `extract(images, folder)` gives features; unfinished ones are in the folder. The main process writes.
    """
    new = images.select(new_images(index, images, gallery_dir))
    accelerator.print(f"{index.folder}: {len(index):,} images, {len(new):,} new in {gallery_dir}")
    if not len(new):
        return []
    new, skipped = check_images(new, **reading, may_be_empty=True)
    if len(new):
        with alone(index.folder) if accelerator.is_main_process else nullcontext():
            features = extract(new, index.folder)
            if accelerator.is_main_process:
                index.add(features, rows_of(new, index))
                forget_chunks(index.folder)
        accelerator.wait_for_everyone()
        index.files = Index.open(index.folder).files
    if not len(index):
        raise ValueError(f"{gallery_dir}: no readable gallery image is left")
    return skipped


def rows_of(images, index):
    """The `Rows` of a data set of a folder, beside those of the kept gallery."""
    files = storage_of(images, "image").to_pylist()
    status, paths = [os.stat(file["path"]) for file in files], [Path(path) for path in images["path"]]
    kept = index.rows()
    by_folder = counts_images(paths, kept=zip(map(Path, kept.paths), kept.identities, strict=True))
    return Rows(
        [path.as_posix() for path in paths],
        [identity_of(path, by_folder) for path in paths],
        [camera_of(path) for path in paths],
        [entry.st_size for entry in status],
        [entry.st_mtime_ns for entry in status],
        [content_of(file).hex() for file in files],
    )


def new_images(index, images, folder):
    """The rows of `images`, a data set of a folder, that the gallery does not have.

    ValueError for an image whose name is in the gallery with another content.
    """
    known = index.rows()
    places = {path: place for place, path in enumerate(known.paths)}
    new = []
    for row, (path, stored) in enumerate(zip(images["path"], storage_of(images, "image").to_pylist(), strict=True)):
        place = places.get(path)
        if place is None:
            new.append(row)
            continue
        entry = os.stat(stored["path"])
        same = (entry.st_size, entry.st_mtime_ns) == (known.sizes[place], known.times[place])
        if not same and content_of(stored).hex() != known.digests[place]:
            raise ValueError(
                f"{path} in {folder} is another image than the one of this name in {index.folder}; give it another "
                "name, or extract the gallery again into another folder"
            )
    return new


def sides_of(query_features, query_rows, index):
    """(queries, gallery) of a search, the gallery's features on disk; (same-file pairs as `same_files` gives them).

    Identities of one name are one identity on both sides.
    """
    gallery_rows = index.rows()
    sides = query_rows, gallery_rows
    labels, names = numbered(*((rows.identities, rows.cameras) for rows in sides))
    queries, gallery = (
        Side(features, torch.tensor(pids), torch.tensor(camids), rows.paths, names={"pid": names})
        for features, rows, (pids, camids) in zip((query_features, index.features()), sides, labels, strict=True)
    )
    return queries, gallery, same_contents(query_rows.digests, gallery_rows.digests)


def side_of(index):
    """(the gallery alone, its features on disk; digests of its files)."""
    rows = index.rows()
    ((pids, camids),), names = numbered((rows.identities, rows.cameras))
    side = Side(index.features(), torch.tensor(pids), torch.tensor(camids), rows.paths, names={"pid": names})
    return side, rows.digests


def same_contents(query_digests, gallery_digests):
    numbers = {digest: number for number, digest in enumerate(sorted({*query_digests} & {*gallery_digests}))}
    query, gallery = (
        torch.tensor([numbers.get(digest, UNKNOWN) for digest in digests], dtype=torch.int64)
        for digests in (query_digests, gallery_digests)
    )
    copies = torch.bincount(gallery[gallery >= 0], minlength=len(numbers) or 1)
    return query, gallery, int(copies[query[query >= 0]].sum())
