"""Pseudo labels from features: DBSCAN on sparse k-reciprocal Jaccard distances, or k-means.

    clusters = cluster(features, eps=0.6)      # Clusters: labels (N,) int64, -1 for noise
    check_clusters(clusters)                   # ValueError if they collapsed, with flags to change

`features` (N, D) need not be unit length. No N x N matrix is stored: memory is that of the pairs within eps.
"""

import math
from dataclasses import dataclass

import torch
from accelerate.utils import broadcast_object_list

from kernels.ring.graph import shared_graph
from utils.evaluation.groups.clusters import NOISE, as_matrix, dbscan, singled_out

SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)


@dataclass(frozen=True)
class Clusters:
    """Labels 0..num_clusters-1 in the order of their first cores, -1 for noise.

    `reach` (N,) is the distance within which a row has `min_samples` rows, itself included: from this eps on, the row
    is a core of a cluster. Those of k-means have neither noise nor a reach.
    """

    labels: torch.Tensor
    reach: torch.Tensor | None = None
    eps: float | None = None
    min_samples: int | None = None

    @property
    def num_clusters(self):
        return int(self.labels.max()) + 1

    @property
    def noise(self):
        """Share of the rows that belong to no cluster."""
        return float((self.labels == NOISE).double().mean())


def cluster(features, *, eps=0.6, min_samples=4, k1=30, k2=6, compat=None, backend="auto", group=None):
    """One `Clusters` for a number `eps`, a list for a list of eps; the distances are computed once.

    `compat="faiss"`: the Jaccard distance of `kernels.jaccard` that counts an image among its own k1. The processes
    of a `group`, which all have the features, share the work and get the same clusters.
    """
    several = isinstance(eps, (list, tuple))
    scales = list(eps) if several else [eps]
    check_settings(len(features), scales, min_samples, k1, k2)
    settings = {"max_distance": max(scales), "nearest": min_samples, "compat": compat, "backend": backend}
    graph = shared_graph(features, k1=k1, k2=k2, **settings, group=group)
    near, reach = as_matrix(graph.near), graph.reach[:, -1].cpu()
    clusterings = [Clusters(dbscan(near, scale, min_samples), reach, scale, min_samples) for scale in scales]
    return clusterings if several else clusterings[0]


def check_settings(num_rows, scales, min_samples, k1, k2=1):
    if num_rows <= k1:
        raise ValueError(
            f"{num_rows} images cannot be clustered by their --cluster_k1 {k1} nearest: every image would be a "
            f"neighbour of every other. Give more images, or lower --cluster_k1 well below {num_rows}"
        )
    if num_rows <= k2:
        raise ValueError(
            f"{num_rows} images cannot be averaged over their --cluster_k2 {k2} nearest: all of them would become "
            f"equal. Give more images, or lower --cluster_k2 well below {num_rows}"
        )
    if not 2 <= min_samples <= num_rows:
        raise ValueError(f"--min_samples must be between 2 and the {num_rows} images, got {min_samples}")
    if not all(0 < scale < 1 for scale in scales):
        raise ValueError(f"--eps must be above 0 and below 1, the largest Jaccard distance, got {scales}")


def check_clusters(clusters, *, where="the images", least=2):
    """ValueError for fewer than `least` clusters: all images are noise, or all are in one cluster."""
    if clusters.num_clusters >= least:
        return
    quantiles = torch.quantile(clusters.reach.double(), torch.tensor(SHARES, dtype=torch.float64)).tolist()
    listed = ", ".join(
        f"{100 * share:.0f} % of them within {value:.2f}" for share, value in zip(SHARES, quantiles, strict=True)
    )
    if clusters.noise > 0.5:
        problem = f"{100 * clusters.noise:.0f} % of {where} are in no cluster"
        advice = (
            f"Raise --eps {clusters.eps:g}, or lower --min_samples {clusters.min_samples}; "
            "or start from a better model"
        )
    else:
        problem = f"{100 * (1 - clusters.noise):.0f} % of {where} fell into {max(clusters.num_clusters, 1)}"
        advice = f"Lower --eps {clusters.eps:g} or --cluster_k1; or start from a better model"
    raise ValueError(
        f"the clusters collapsed: {problem}. Distances to the nearest {clusters.min_samples - 1} others: {listed}. "
        f"{advice}"
    )


def reliable(middle, tight, loose, threshold=None):
    """SpCL's self-paced labels from clusterings at three scales: those of `middle`, with -1 for unreliable rows.

    A row's independence is 1 - |C n C_loose| / |C u C_loose| with C its cluster and C_loose its cluster at the looser
    scale. Its compactness is the same with the tighter scale. Both are 0 where the clusters are equal. The value of a
    cluster is that of its best row. Clusters with an independence above `threshold` are dissolved; None stands for the
    90 % quantile of this clustering, which is returned for later epochs. In the other clusters, rows whose compactness
    is above that of the best row become noise. Returns (labels numbered as in `cluster`, threshold).
    """
    labels = singled_out(middle.labels)
    independence = unlike(labels, singled_out(loose.labels))
    compactness = unlike(labels, singled_out(tight.labels))
    best = torch.full((len(labels),), torch.inf, dtype=torch.float64)
    by_independence = best.scatter_reduce(0, labels, independence, "amin")
    by_compactness = best.scatter_reduce(0, labels, compactness, "amin")
    if threshold is None:
        several = (labels.bincount(minlength=len(labels)) > 1).nonzero().flatten()
        ordered = by_independence[several].sort().values.tolist()
        threshold = ordered[min(len(ordered) - 1, round(0.9 * len(ordered)))] if ordered else 0.0
    is_reliable = (by_independence[labels] <= threshold) & (compactness <= by_compactness[labels])
    reliable_labels = torch.where(is_reliable & (middle.labels != NOISE), middle.labels, NOISE)
    # A single image is not a cluster.
    counts = torch.bincount(reliable_labels[reliable_labels != NOISE], minlength=len(reliable_labels))
    reliable_labels[(reliable_labels != NOISE) & (counts[reliable_labels] < 2)] = NOISE
    return renumbered(reliable_labels), threshold


def unlike(labels, others):
    """1 - |A n B| / |A u B| for the two clusters of every row, float64."""
    pairs = labels * (int(others.max()) + 1) + others
    _, pair, shared = pairs.unique(return_inverse=True, return_counts=True)
    shared, size, other_size = shared[pair], labels.bincount()[labels], others.bincount()[others]
    return 1 - shared.double() / (size + other_size - shared)


def renumbered(labels):
    """Labels 0 and up without gaps, in the same order; noise stays."""
    present = labels[labels != NOISE].unique()
    numbers = torch.searchsorted(present, labels) if len(present) else labels
    return torch.where(labels == NOISE, NOISE, numbers)


@torch.no_grad()
def k_means(features, count, *, seed=0, starts=10, most_rounds=300):
    """`Clusters` of features (N, D): `count` groups by k-means, the best of some starts of k-means++.

    A group that loses all its rows takes the row farthest from its own centre.
    """
    different = len(features.unique(dim=0))
    if different < count:
        raise ValueError(
            f"the clusters collapsed: {len(features)} images have {different} different features, too few for {count} "
            "groups. Lower --group_counts or --learning_rate; or start from a better model"
        )
    squares, best, least = features.square().sum(1), None, torch.inf
    for rows in first_rows(features, squares, count, starts, torch.Generator().manual_seed(seed)):
        centres, labels = features[rows], rows.new_full((len(features),), NOISE)
        distances = squared_distances(centres, features, squares)
        for _ in range(most_rounds):
            distance, nearest = distances.min(0)
            empty = (nearest.bincount(minlength=count) == 0).nonzero().flatten()
            nearest[distance.topk(len(empty)).indices] = empty
            changed = nearest != labels
            if not changed.any():
                break
            # The centres of the other groups stay, and in later rounds these are most.
            moved = torch.cat([labels[changed], nearest[changed]]).unique()
            moved = moved[moved != NOISE]
            labels = nearest
            sums = torch.zeros_like(centres).index_add_(0, labels, features)
            counts = labels.bincount(minlength=count)[:, None]
            centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
            distances[moved] = squared_distances(centres[moved], features, squares)
        if (spread := float(distance.double().sum())) < least:
            best, least = labels, spread
    return Clusters(best.cpu())


def first_rows(features, squares, count, starts, generator):
    """(starts, count) rows by greedy k-means++: some rows are drawn, in proportion to their squared distance to the
    nearest of those before; the next is the one that leaves the smallest sum of these distances.

    All starts go side by side, so that each step is one large product.
    """
    tries, rows, draws = 2 + int(math.log(count)), [], []
    for _ in range(starts):
        rows.append(torch.randint(len(features), (1,), generator=generator))
        draws.append([torch.rand(tries, generator=generator, dtype=torch.float64) for _ in range(count - 1)])
    rows, each = torch.stack(rows).to(features.device), torch.arange(starts, device=features.device)
    nearest = squared_distances(features[rows[:, 0]], features, squares)
    # Rounding leaves a row a little away from itself.
    nearest[each, rows[:, 0]] = 0
    for step in range(count - 1):
        passed = nearest.double().cumsum(1)
        places = torch.stack([draw[step] for draw in draws]).to(features.device) * passed[:, -1:]
        drawn = torch.searchsorted(passed, places, right=True).clamp(max=len(features) - 1)
        left = squared_distances(features[drawn.flatten()], features, squares).unflatten(0, drawn.shape)
        left = torch.minimum(nearest[:, None], left)
        best = left.double().sum(2).argmin(1)
        rows = torch.cat([rows, drawn[each, best, None]], dim=1)
        nearest = left[each, best]
        nearest[each, rows[:, -1]] = 0
    return rows


def squared_distances(centres, features, squares):
    """(K, N), with `squares` of the features."""
    return (centres.square().sum(1)[:, None] + squares - 2 * centres @ features.t()).clamp(min=0)


def from_main(compute):
    """What `compute` returns on the main process, on all processes; its ValueError is raised on all."""
    main = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    message = [None]
    if main:
        try:
            message = [(compute(), None)]
        except ValueError as error:
            message = [(None, str(error))]
    if torch.distributed.is_initialized():
        message = broadcast_object_list(message)
    answer, problem = message[0]
    if problem:
        raise ValueError(problem)
    return answer
