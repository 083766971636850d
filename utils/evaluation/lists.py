"""Details of a ranking: ranked lists, camera pairs, confusions."""

from collections import Counter
from dataclasses import dataclass

import torch

from kernels import cosine_topk
from kernels.dispatch import TRITON_MAX_K
from kernels.ring.processes import joined, shares_of
from utils.datasets.schema import UNKNOWN
from utils.evaluation.metrics import kept_labels, rank


def is_match(queries, gallery, row, column):
    """Whether a query row and a gallery row show the same identity; None where one is unknown."""
    query_pid, gallery_pid = int(queries.pids[row]), int(gallery.pids[column])
    return None if UNKNOWN in (query_pid, gallery_pid) else query_pid == gallery_pid


def dropped(queries, gallery, rows, columns, protocol):
    """Mask of the pairs (rows, columns) that the protocol drops; both are index tensors of one shape.

    Pairs of the same file are dropped too.
    """
    mask = torch.zeros_like(columns, dtype=torch.bool)
    if queries.contents is not None:
        mask = (queries.contents[rows] == gallery.contents[columns]) & (queries.contents[rows] >= 0)
    if protocol == "all":
        return mask
    same_identity = (queries.pids[rows] == gallery.pids[columns]) & (queries.pids[rows] != UNKNOWN)
    cameras = queries.camids[rows]
    return mask | (same_identity & (cameras == gallery.camids[columns]) & (cameras != UNKNOWN))


def left_out(queries, gallery):
    """How many pairs of one identity and one camera the market protocol leaves out, those of one file apart."""
    sides = [list(zip(side.pids.tolist(), side.camids.tolist(), strict=True)) for side in (queries, gallery)]
    there = Counter(sides[1])
    count = sum(there[label] for label in sides[0] if UNKNOWN not in label)
    if queries.contents is not None:
        contents = [side.contents.tolist() for side in (queries, gallery)]
        files = [list(zip(*both, strict=True)) for both in zip(sides, contents, strict=True)]
        there = Counter(files[1])
        count -= sum(there[label, file] for label, file in files[0] if UNKNOWN not in label and file != UNKNOWN)
    return count


def findable(queries, gallery, protocol):
    """Of each query, whether it has a match that the protocol keeps."""
    (query_pids, gallery_pids, query_cameras, gallery_cameras), protocol = kept_labels(queries, gallery, protocol)
    cameras = {}
    for pid, camid in torch.stack([gallery_pids, gallery_cameras], 1).unique(dim=0).tolist():
        cameras.setdefault(pid, set()).add(camid)
    labels = zip(query_pids.tolist(), query_cameras.tolist(), strict=True)
    excluded = (lambda camid: set()) if protocol == "all" else (lambda camid: {camid})
    return [pid != UNKNOWN and bool(cameras.get(pid, set()) - excluded(camid)) for pid, camid in labels]


def can_match(queries, gallery, protocol):
    """Whether any query has a match that the protocol keeps."""
    return any(findable(queries, gallery, protocol))


def ranked_lists(queries, gallery, k, *, protocol="market", reranking=None, backend="auto", group=None):
    """The first k kept gallery rows of each query: indices (Q, k), -1 where fewer are kept, and distances (Q, k).

    `reranking`: a `kernels.ReRanking` that gives the order and the distances; the default is the cosine distance.
    With a `group` of processes that all have both sides, each ranks its share of the queries.
    """
    if not 1 <= k <= len(gallery):
        raise ValueError(f"asked for {k} ranked images of a gallery of {len(gallery)}; ask for 1 to {len(gallery)}")
    wanted = min(len(gallery), k + _most_dropped(queries, gallery, protocol))
    if reranking is None:
        sides = shares_of(group, queries.features, gallery.features)
        # More than Triton's kernel keeps, where it was asked for.
        backend = "torch" if wanted > TRITON_MAX_K else backend
        scores, columns = cosine_topk(*sides, wanted, backend=backend, group=group)
        distances = (2 - 2 * scores).clamp(min=0)
    else:
        scores, columns = reranking.topk(wanted)
        # Rounding gives equal rows distances a little below 0.
        distances = (-scores).clamp(min=0)
    columns, distances = (joined(group, values).to(queries.pids.device) for values in (columns, distances))
    rows = torch.arange(len(queries), device=columns.device)[:, None].expand_as(columns)
    is_dropped = dropped(queries, gallery, rows, columns, protocol)
    # A stable sort by "dropped" moves the kept images to the front and preserves their order.
    order = is_dropped.to(torch.int8).argsort(dim=1, stable=True)[:, :k]
    is_dropped, columns, distances = (values.gather(1, order) for values in (is_dropped, columns, distances))
    return columns.masked_fill(is_dropped, -1), distances.masked_fill(is_dropped, torch.inf)


def _most_dropped(queries, gallery, protocol):
    """An upper bound of the images that are dropped for one query."""
    most = 0
    if queries.contents is not None and (gallery.contents >= 0).any():
        most += int(torch.bincount(gallery.contents[gallery.contents >= 0]).max())
    if protocol == "all":
        return most
    labels = [torch.stack([side.pids, side.camids], 1) for side in (queries, gallery)]
    known = [part[(part != UNKNOWN).all(1)] for part in labels]
    if not len(known[0]):
        return most
    _, groups = torch.unique(torch.cat(known), dim=0, return_inverse=True)
    counts = torch.bincount(groups[len(known[0]) :], minlength=int(groups.max()) + 1)
    return most + int(counts[groups[: len(known[0])]].max())


def camera_pairs(queries, gallery, *, protocol="market", backend="auto"):
    """mAP of each query camera against each gallery camera: (query cameras, gallery cameras, table of mAP or None)."""
    query_cameras, gallery_cameras = (side.camids.unique().tolist() for side in (queries, gallery))
    table = []
    for query_camera in query_cameras:
        camera_queries = queries.take((queries.camids == query_camera).nonzero().flatten())
        row = []
        for gallery_camera in gallery_cameras:
            camera_gallery = gallery.take((gallery.camids == gallery_camera).nonzero().flatten())
            pair_protocol = "all" if protocol == "all" else "market"
            row.append(
                float(rank(camera_queries, camera_gallery, protocol=pair_protocol, backend=backend).mAP)
                if can_match(camera_queries, camera_gallery, protocol)
                else None
            )
        table.append(row)
    return query_cameras, gallery_cameras, table


def ranking_rows(queries, gallery, indices, distances):
    """Rows of rankings.csv: query, rank, gallery image, distance, and whether it is a match."""
    for row, (columns, values) in enumerate(zip(indices.tolist(), distances.tolist(), strict=True)):
        for position, (column, distance) in enumerate(zip(columns, values, strict=True), start=1):
            if column >= 0:
                match = is_match(queries, gallery, row, column)
                label = "" if match is None else int(match)
                yield queries.paths[row], position, gallery.paths[column], f"{distance:.6f}", label


@dataclass
class Confusion:
    """Two confused identities: how many queries ranked the other one first, and the closest pair of rows."""

    pids: tuple
    count: int
    distance: float
    query: int
    gallery: int


def confusions(queries, gallery, indices, distances, limit=8):
    """The `limit` most frequent confusions: queries whose first image in the ranked lists shows another identity."""
    by_pair = {}
    for row, (column, distance) in enumerate(zip(indices[:, 0].tolist(), distances[:, 0].tolist(), strict=True)):
        query_pid, gallery_pid = int(queries.pids[row]), int(gallery.pids[column])
        if column < 0 or UNKNOWN in (query_pid, gallery_pid) or query_pid == gallery_pid:
            continue
        pair = (min(query_pid, gallery_pid), max(query_pid, gallery_pid))
        confusion = by_pair.setdefault(pair, Confusion(pair, 0, float("inf"), row, column))
        confusion.count += 1
        if distance < confusion.distance:
            confusion.distance, confusion.query, confusion.gallery = distance, row, column
    return sorted(by_pair.values(), key=lambda item: (-item.count, item.distance, item.pids))[:limit]
