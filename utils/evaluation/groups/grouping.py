"""Global identities of images and tracklets: k-reciprocal Jaccard distances, DBSCAN, and times that exclude pairs.

    settings = settings_for(len(features), eps=0.5)
    groups = group(features, settings, moments)           # Groups: an identity for each row, cohesion of each group

Where times are known, DBSCAN's clusters are built again from their pairs, the nearest first. A pair is not joined if
both sides were seen by one camera at one time: that is two people. Rows of unknown time are never refused.
"""

import json
from bisect import bisect, insort
from dataclasses import asdict, dataclass

import numpy as np
import scipy.sparse
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from kernels.ring.graph import shared_graph
from utils.datasets.schema import UNKNOWN
from utils.evaluation.groups.clusters import NOISE, agreement, as_matrix, bcubed, dbscan, pair_scores, singled_out

FEATURES = "group_features.safetensors"
MOST_NEIGHBOURS, MOST_AVERAGED = 8, 4


@dataclass(frozen=True)
class Settings:
    """Of the distances and of DBSCAN; `k1` and `k2` are those of `kernels.jaccard_graph`."""

    eps: float
    min_samples: int
    k1: int
    k2: int


@dataclass(frozen=True)
class Groups:
    """The identity of every row, (N,) int64 from 1 on: first the groups, then single rows, each in order of rows.

    `cohesion` and `closeness`, (N,) float64, are means of 1 - J, in which J above eps counts as 1: over all pairs of
    the row's group, and over the pairs of the row itself. Both are NaN for single rows. `refused` is the number of
    pairs within eps, in one cluster of DBSCAN, that were kept apart by their times.
    """

    identities: torch.Tensor
    num_groups: int
    cohesion: torch.Tensor
    closeness: torch.Tensor
    refused: int


def settings_for(count, *, eps, min_samples=2, k1=None, k2=None):
    """`Settings` for so many rows; by default k1 is 8, or a third of the rows if they are few, and k2 at most 4."""
    described = f"{count} items (a folder of images is one item)"
    if count < 2:
        raise ValueError("there is nothing to group: one item only (a folder of images is one item); give more")
    for name, value in (("--cluster_k1", k1), ("--cluster_k2", k2)):
        if value is not None and value >= count:
            raise ValueError(
                f"{name} {value} asks for more neighbours than {described} have; lower it well below {count}"
            )
    if not 2 <= min_samples <= count:
        raise ValueError(f"--min_samples {min_samples} must be between 2 and the number of items: {described}")
    if not 0 < eps < 1:
        raise ValueError(f"--eps {eps} must be above 0 and below 1, the largest Jaccard distance")
    k1 = k1 or max(1, min(MOST_NEIGHBOURS, count // 3))
    return Settings(eps, min_samples, k1, k2 or min(MOST_AVERAGED, k1))


def group(features, settings, moments=None, *, backend="auto", processes=None):
    """`Groups` of (N, D) features; `moments[row]` lists (clock, first, last): when a camera saw the row.

    `processes`: the group of those that all have the features and share the work.
    """
    options = {"k1": settings.k1, "k2": settings.k2, "max_distance": settings.eps, "backend": backend}
    graph = shared_graph(features, **options, group=processes)
    near = as_matrix(graph.near)
    clusters = dbscan(near, settings.eps, settings.min_samples).numpy()
    pairs = scipy.sparse.triu(near, k=1).tocoo()
    inside = (clusters[pairs.row] == clusters[pairs.col]) & (clusters[pairs.row] != NOISE)
    rows, columns, distances = (values[inside] for values in (pairs.row, pairs.col, pairs.data))
    labels = joined(rows, columns, distances, moments) if moments and any(moments) else clusters
    same = labels[rows] == labels[columns]
    identities, num_groups = numbered(singled_out(torch.from_numpy(labels)).numpy())
    cohesion, closeness = cohesions(identities, rows[same], columns[same], distances[same])
    identities, cohesion, closeness = map(torch.from_numpy, (identities, cohesion, closeness))
    return Groups(identities, num_groups, cohesion, closeness, refused=int((~same).sum()))


def joined(rows, columns, distances, moments):
    """Labels of the rows after joining the pairs, the nearest first, wherever no camera saw both sides at one time."""
    parents = list(range(len(moments)))
    # Of each label, its sorted periods by clock; the periods of one clock do not overlap.
    seen = [by_clock(periods) for periods in moments]
    order = np.lexsort((columns, rows, distances))
    for row, column in zip(rows[order].tolist(), columns[order].tolist(), strict=True):
        label, other = root(parents, row), root(parents, column)
        if label == other or at_one_time(seen[label], seen[other]):
            continue
        # The smaller row number stays: labels do not depend on how the sides were built.
        label, other = sorted((label, other))
        parents[other] = label
        for clock, periods in seen[other].items():
            for period in periods:
                insort(seen[label].setdefault(clock, []), period)
        seen[other] = {}
    return np.array([root(parents, row) for row in range(len(parents))])


def root(parents, row):
    while parents[row] != row:
        parents[row] = parents[parents[row]]
        row = parents[row]
    return row


def by_clock(periods):
    clocks = {}
    for clock, first, last in sorted(periods):
        clocks.setdefault(clock, []).append((first, last))
    return clocks


def at_one_time(some, others):
    """Whether two sides have a common moment on any clock."""
    if sum(map(len, some.values())) > sum(map(len, others.values())):
        some, others = others, some
    for clock, periods in some.items():
        known = others.get(clock, ())
        for first, last in periods:
            # The last period that starts no later than this one ends.
            place = bisect(known, last, key=lambda period: period[0]) - 1
            if place >= 0 and known[place][1] >= first:
                return True
    return False


def numbered(labels):
    """(identities from 1 on, number of groups): groups before single rows, both in order of their first row."""
    _, first, label, counts = np.unique(labels, return_index=True, return_inverse=True, return_counts=True)
    order = np.lexsort((first, counts == 1))
    numbers = np.empty(len(order), dtype=np.int64)
    numbers[order] = np.arange(1, len(order) + 1)
    return numbers[label], int((counts > 1).sum())


def cohesions(identities, rows, columns, distances):
    """(cohesion, closeness) of each row from the pairs within eps that share an identity."""
    sizes = np.bincount(identities)[identities]
    sums = np.bincount(rows, 1 - distances.astype(np.float64), len(identities))
    sums += np.bincount(columns, 1 - distances.astype(np.float64), len(identities))
    with np.errstate(invalid="ignore"):
        closeness = np.where(sizes > 1, sums / (sizes - 1), np.nan)
    of_group = np.bincount(identities, closeness)[identities] / sizes
    return of_group, closeness


def doubts(groups):
    """The sum of J over the pairs of each group, J above eps as 1: (G,) float64, how many pairs are probably wrong.

    It grows with the pairs of a group and falls with their cohesion. On drawn people it tells groups of several
    identities better than cohesion, and about as well as size or better (`benchmarks.evaluation.grouping`): a group
    grows by wrong pairs, and cohesion alone puts pairs of two items before large groups.
    """
    grouped = (groups.identities <= groups.num_groups).nonzero().flatten()
    numbers = groups.identities[grouped] - 1
    sizes = numbers.bincount(minlength=groups.num_groups).double()
    cohesion = torch.zeros(groups.num_groups, dtype=torch.float64).index_add_(0, numbers, groups.cohesion[grouped])
    return sizes * (sizes - 1) / 2 * (1 - cohesion / sizes)


def scores(identities, truth):
    """Agreement with true identities, -1 where unknown: those rows are left out. None if no truth is known."""
    known = torch.as_tensor(truth) != UNKNOWN
    if not known.any():
        return None
    found, true = identities[known], torch.as_tensor(truth)[known]
    return {
        "num_known": int(known.sum()),
        "num_true_identities": len(true.unique()),
        "pairwise": pair_scores(found, true),
        "bcubed": bcubed(found, true),
        "ari": agreement(found, true)["ari"],
    }


def item_features(features, tracklets):
    """(features, typical rows): the mean of an item's unit features, unit length again, and its most typical image."""
    counts = torch.tensor([len(item.rows) for item in tracklets.items])
    rows = torch.tensor([row for item in tracklets.items for row in item.rows])
    owners = torch.repeat_interleave(counts)
    # A box or file belongs to one item only.
    units = F.normalize(features[rows].double(), dim=1)
    sums = torch.zeros(len(counts), features.shape[1], dtype=torch.float64).index_add_(0, owners, units)
    lengths = sums.norm(dim=1, keepdim=True)
    if (lengths < 1e-6).any():
        name = tracklets.items[int((lengths < 1e-6).flatten().nonzero()[0])].path
        raise ValueError(f"the features of {name} have no mean direction; its images have nothing in common")
    means = sums / lengths
    likeness = (units * means[owners]).sum(1)
    best = torch.full((len(counts),), -torch.inf, dtype=torch.float64).scatter_reduce(0, owners, likeness, "amax")
    typical = (likeness == best[owners]).nonzero().flatten()
    first = torch.full((len(counts),), len(rows)).scatter_reduce(0, owners[typical], typical, "amin")
    return means.float(), rows[first]


COLUMNS = (
    "path", "identity", "items", "camera", "images", "first_frame", "last_frame", "cohesion", "closeness", "truth"
)  # fmt: skip


def identity_rows(tracklets, groups):
    """The rows of identities.csv; what is unknown is empty."""
    sizes = groups.identities.bincount()[groups.identities].tolist()
    columns = groups.identities.tolist(), sizes, groups.cohesion.tolist(), groups.closeness.tolist()
    for item, identity, size, cohesion, closeness in zip(tracklets.items, *columns, strict=True):
        frames = [frame for _, *period in item.moments for frame in period]
        yield (
            item.path, identity, size, item.camera if item.camera is not None else "", len(item.rows),
            min(frames, default=""), max(frames, default=""),
            f"{cohesion:.4f}" if size > 1 else "", f"{closeness:.4f}" if size > 1 else "", item.identity or "",
        )  # fmt: skip


def group_metrics(tracklets, settings, groups):
    """The content of groups.json; it names no image."""
    return {
        "num_items": len(tracklets.items),
        "num_images": len(tracklets.images),
        "num_timed": sum(bool(item.moments) for item in tracklets.items),
        "num_identities": int(groups.identities.max()),
        "num_groups": groups.num_groups,
        "num_singles": int(groups.identities.max()) - groups.num_groups,
        "num_refused_pairs": groups.refused,
        "settings": asdict(settings),
        "truth": scores(groups.identities, tracklets.pids),
    }


def described(metrics):
    """The result in one line of text."""
    parts = [f"{metrics['num_items']:,} items: {metrics['num_groups']:,} groups, {metrics['num_singles']:,} alone"]
    truth = metrics["truth"]
    if truth:
        f1 = truth["pairwise"]["f1"]
        pairs = "no pairs" if f1 is None else f"pairwise F1 {100 * f1:.1f} %"
        parts.append(f"{pairs}, B-cubed F1 {100 * truth['bcubed']['f1']:.1f} %, ARI {truth['ari']:.3f}")
        parts.append(f"measured on {truth['num_known']:,} items of {truth['num_true_identities']:,} known identities")
    return "; ".join(parts)


def save_items(path, features, typical_rows, tracklets, key):
    """Write the features of all items under the names of a gallery, so that `utils.evaluation.forget` finds them."""
    tensors = {
        "gf": features,
        "g_pid": torch.tensor(tracklets.pids),
        "g_cam": torch.tensor(tracklets.camids),
        "g_row": typical_rows,
    }
    header = {"g_path": json.dumps([item.path for item in tracklets.items]), "key": json.dumps(key)}
    if tracklets.pid_names:
        header["g_names"] = json.dumps({"pid": tracklets.pid_names})
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=header)


def load_items(path, key):
    """(features, typical rows) if the file has exactly the features of this key, else None."""
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("key") != json.dumps(key):
                return None
            return file.get_tensor("gf"), file.get_tensor("g_row")
    except (OSError, SafetensorError):
        return None
