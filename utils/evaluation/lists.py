"""What a ranking is looked at for: ranked lists, camera pairs, confusions."""

from dataclasses import dataclass

import torch

from kernels import cosine_topk
from utils.datasets.schema import UNKNOWN
from utils.evaluation.metrics import can_match, rank


def is_match(queries, gallery, row, column):
    """Whether a query row and a gallery row show one person; None where the query has no name."""
    asked, answered = int(queries.pids[row]), int(gallery.pids[column])
    return None if asked == UNKNOWN else asked == answered


def dropped(queries, gallery, rows, columns, protocol):
    """Which of the pairs (rows, columns), index tensors of one shape, the protocol leaves out."""
    if protocol == "all":
        return torch.zeros_like(columns, dtype=torch.bool)
    same_person = (queries.pids[rows] == gallery.pids[columns]) & (queries.pids[rows] != UNKNOWN)
    return same_person & (queries.camids[rows] == gallery.camids[columns])


def ranked_lists(queries, gallery, k, *, protocol="market", reranking=None, backend="auto"):
    """The first k kept gallery rows of each query: indices (Q, k), -1 where fewer are kept, and distances (Q, k).

    `reranking` is a `kernels.ReRanking` whose order and distances to take; the default is the cosine distance.
    """
    if not 1 <= k <= len(gallery):
        raise ValueError(f"asked for {k} ranked images of a gallery of {len(gallery)}; ask for 1 to {len(gallery)}")
    wanted = min(len(gallery), k + _most_dropped(queries, gallery, protocol))
    if reranking is None:
        scores, columns = cosine_topk(queries.features, gallery.features, wanted, backend=backend)
        distances = (2 - 2 * scores).clamp(min=0)
    else:
        scores, columns = reranking.topk(wanted)
        distances = -scores
    columns, distances = columns.to(queries.pids.device), distances.to(queries.pids.device)
    rows = torch.arange(len(queries), device=columns.device)[:, None].expand_as(columns)
    out = dropped(queries, gallery, rows, columns, protocol)
    # A stable sort by "dropped" moves the kept ones to the front in their order.
    order = out.to(torch.int8).argsort(dim=1, stable=True)[:, :k]
    out, columns, distances = (values.gather(1, order) for values in (out, columns, distances))
    return columns.masked_fill(out, -1), distances.masked_fill(out, torch.inf)


def _most_dropped(queries, gallery, protocol):
    if protocol == "all":
        return 0
    both = torch.cat([torch.stack([side.pids, side.camids], 1) for side in (queries, gallery)])
    _, groups = torch.unique(both, dim=0, return_inverse=True)
    counts = torch.bincount(groups[len(queries) :], minlength=int(groups.max()) + 1)
    return int(counts[groups[: len(queries)]].max())


def camera_pairs(queries, gallery, *, protocol="market", backend="auto"):
    """mAP of each query camera against each gallery camera alone: cameras, cameras, and a table of floats or None."""
    query_cameras, gallery_cameras = (side.camids.unique().tolist() for side in (queries, gallery))
    table = []
    for ours in query_cameras:
        asked = queries.take((queries.camids == ours).nonzero().flatten())
        row = []
        for theirs in gallery_cameras:
            searched = gallery.take((gallery.camids == theirs).nonzero().flatten())
            pair_protocol = "all" if protocol == "all" else "market"
            row.append(
                float(rank(asked, searched, protocol=pair_protocol, backend=backend).mAP)
                if can_match(asked, searched, protocol)
                else None
            )
        table.append(row)
    return query_cameras, gallery_cameras, table


@dataclass
class Confusion:
    """Two identities taken for each other: how many queries ranked the other first, and the closest pair of rows."""

    pids: tuple
    count: int
    distance: float
    query: int
    gallery: int


def confusions(queries, gallery, indices, distances, limit=8):
    """The identities confused most often: queries whose first image in the ranked lists shows someone else."""
    found = {}
    for row, (column, distance) in enumerate(zip(indices[:, 0].tolist(), distances[:, 0].tolist(), strict=True)):
        asked, answered = int(queries.pids[row]), int(gallery.pids[column])
        if column < 0 or UNKNOWN in (asked, answered) or asked == answered:
            continue
        pair = (min(asked, answered), max(asked, answered))
        best = found.setdefault(pair, Confusion(pair, 0, float("inf"), row, column))
        best.count += 1
        if distance < best.distance:
            best.distance, best.query, best.gallery = distance, row, column
    return sorted(found.values(), key=lambda one: (-one.count, one.distance, one.pids))[:limit]
