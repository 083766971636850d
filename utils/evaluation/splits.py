"""The images of query and gallery, of one split or several: read and checked once each, then found by their rows."""

import datasets

from utils.datasets.images import check_images

SIDES = ("query", "gallery")


def readable_splits(pairs, *, skip_unreadable, where):
    """(images, splits, unreadable files) of pairs of data sets, (query, gallery) of each split; `where` they are from.

    A split is ((query rows, pids, camids), (gallery rows, pids, camids)). The splits of a small set choose from the
    same images, so an image is listed once.
    """
    images = datasets.concatenate_datasets([side for pair in pairs for side in pair])
    rows = list(range(len(images)))
    if len(pairs) > 1:
        first_row = {}
        rows = [first_row.setdefault(path, row) for row, path in enumerate(images["path"])]

    images = images.add_column("row", list(range(len(images)))).select(sorted(set(rows)))
    images, skipped = check_images(images, skip_unreadable=skip_unreadable, where=where)
    readable = {row: number for number, row in enumerate(images["row"])}
    splits, start = [], 0
    for pair in pairs:
        splits.append([])
        for side, name in zip(pair, SIDES, strict=True):
            labelled = zip(rows[start : start + len(side)], side["pid"], side["camid"], strict=True)
            columns = [(readable[row], pid, camid) for row, pid, camid in labelled if row in readable]
            if not columns:
                raise ValueError(f"{where}: no readable {name} image is left")
            splits[-1].append(tuple(map(list, zip(*columns, strict=True))))
            start += len(side)
    return images.remove_columns("row"), splits, [f"{path}: {reason}" for _, path, reason in skipped]
