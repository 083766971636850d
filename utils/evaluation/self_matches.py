"""The same file on both sides of a search: an image must not find itself.

Files are compared by their bytes. Before files are read, their sizes are compared, so only likely copies are read.
"""

import hashlib
import os

import torch

from utils.datasets.images import DRAWN, read_bytes, storage_of
from utils.datasets.load import known_names, parse_spec
from utils.datasets.schema import UNKNOWN, names_of


def copies_in(images, splits, *, is_search, protocol, spec=None):
    """For each split what `same_files` says, or None where the data's protocol counts copies as it does all images.

    In a search, under `all`, and in one's own images (`spec`) where no camera is on both sides, no image may find
    itself.
    """
    if images is None:
        return None
    own = spec and parse_spec(spec)[0] not in known_names()
    cameras = [set(camids) for split in splits for *_, camids in split]
    apart = own and not set().union(*cameras[::2]) & set().union(*cameras[1::2])
    if not (is_search or protocol == "all" or apart):
        return None
    copies = [same_files(images, split) for split in splits]
    if not is_search:
        for split, (query, gallery, _) in zip(splits, copies, strict=True):
            check_labels(query, gallery, split, images, names_of(images, "pid"), spec)
    return copies


def same_files(images, split):
    """(query contents, gallery contents, number of pairs): int64 numbers, equal for the same file, else -1.

    `split` is ((query rows, ...), (gallery rows, ...)), rows of `images`.
    """
    query_rows, gallery_rows = (list(rows) for rows, *_ in split)
    stored = storage_of(images, "image")
    rows = {row: stored[row].as_py() for row in {*query_rows, *gallery_rows}}
    sizes = {row: size_of(image) for row, image in rows.items()}
    both = {sizes[row] for row in query_rows} & {sizes[row] for row in gallery_rows}
    digests = {row: content_of(image) for row, image in rows.items() if sizes[row] in both}
    shared = {digests.get(row) for row in query_rows} & {digests.get(row) for row in gallery_rows} - {None}
    numbers = {digest: number for number, digest in enumerate(sorted(shared))}
    query, gallery = (
        torch.tensor([numbers.get(digests.get(row), -1) for row in rows], dtype=torch.int64)
        for rows in (query_rows, gallery_rows)
    )
    copies = torch.bincount(gallery[gallery >= 0], minlength=len(numbers) or 1)
    return query, gallery, int(copies[query[query >= 0]].sum())


def check_labels(query_contents, gallery_contents, split, images, names, where):
    """ValueError if a file that lies on both sides has two identities: it is neither a match nor another person."""
    query_rows, query_pids, _ = split[0]
    identities = {content: row for row, content in enumerate(query_contents.tolist()) if content >= 0}
    disputed = [
        (identities[content], row)
        for row, content in enumerate(gallery_contents.tolist())
        if content >= 0 and split[1][1][row] != query_pids[identities[content]]
    ]
    if not disputed:
        return
    query, copy = disputed[0]
    path, other = (images["path"][rows[row]] for rows, row in ((query_rows, query), (split[1][0], copy)))
    pid, other_pid = (
        names[number] if names else number for number in (query_pids[query], split[1][1][copy])
    )  # fmt: skip
    raise ValueError(
        f"{where}: {len(disputed)} gallery images are the same file as a query of another identity, such as {other} "
        f"({other_pid}) and {path} ({pid}); correct the labels, or remove one of the two files"
    )


def size_of(image):
    """The size of a file in bytes; what can be neither on a disk nor in a table is told apart by its path."""
    if image["bytes"] is not None:
        return len(image["bytes"])
    return image["path"] if "://" in image["path"] else os.stat(image["path"]).st_size


def content_of(image):
    if image["bytes"] is None and image["path"].startswith(DRAWN):
        return image["path"].encode()
    content = image["bytes"] if image["bytes"] is not None else read_bytes(image["path"])
    return hashlib.sha256(content).digest()


def mark(sides, copies, *, trusts_query=False, say=print):
    """Mark the same files on both sides of each split, and count the pairs; None where none are looked for."""
    if copies is None:
        return None
    total, disputed = 0, 0
    for (queries, gallery), (query_contents, gallery_contents, num_pairs) in zip(sides, copies, strict=True):
        queries.contents, gallery.contents = query_contents, gallery_contents
        total += num_pairs
        disputed += share_labels(queries, gallery) if trusts_query else 0
    if total:
        pairs = "1 pair of query and gallery is" if total == 1 else f"{total} pairs of query and gallery are"
        say(f"{pairs} the same file: dropped, no image finds itself")
    if disputed:
        say(f"{disputed} of these files have another identity in --gallery_dir; that of --query_dir counts")
    return total


def share_labels(queries, gallery):
    """Give a file that lies on both sides of a search one identity and one camera: those of the query side.

    In a search, the names of files and folders are only clues: the copy of a labelled query in a folder without
    labels would otherwise count as another identity. What the query side does not know, the gallery side may.
    Returns the number of gallery files whose identity changes although it was known.
    """
    labels = {}
    for side in (gallery, queries):
        for content, pid, camid in zip(
            *(part.tolist() for part in (side.contents, side.pids, side.camids)), strict=True
        ):
            known = labels.get(content, (UNKNOWN, UNKNOWN))
            labels[content] = (pid if pid != UNKNOWN else known[0], camid if camid != UNKNOWN else known[1])
    changed = 0
    for side in (queries, gallery):
        for row in (side.contents >= 0).nonzero().flatten().tolist():
            pid, camid = labels[int(side.contents[row])]
            changed += side is gallery and int(side.pids[row]) not in (UNKNOWN, pid)
            side.pids[row], side.camids[row] = pid, camid
    return changed
