"""Labels of clusters: DBSCAN on sparse distances, and how far labels agree with true identities.

    labels = dbscan(as_matrix(graph.near), eps=0.5, min_samples=2)    # (N,) int64, -1 for noise
    agreement(labels, truth)                                          # ARI, NMI
    pair_scores(labels, truth), bcubed(labels, truth)                 # precision, recall, F1

In all of these numbers, every row of the noise counts as a cluster of its own.

sklearn is imported where it is first needed: every evaluation loads this file, few cluster.
"""

from typing import NamedTuple

import numpy as np
import scipy.sparse
import torch

NOISE = -1


def as_matrix(near):
    """SparseRows as a SciPy matrix; a stored 0 is a distance of 0, an absent entry means far apart."""
    offsets, columns = near.offsets.cpu().numpy(), near.columns.cpu().numpy()
    return scipy.sparse.csr_matrix((near.values.cpu().numpy(), columns, offsets), shape=[len(offsets) - 1] * 2)


def dbscan(near, eps, min_samples):
    """int64 labels from a sparse matrix of distances."""
    from sklearn.cluster import DBSCAN

    labels = DBSCAN(eps=eps, min_samples=min_samples, metric="precomputed").fit(near).labels_
    return torch.from_numpy(labels.astype(np.int64))


def singled_out(labels):
    """Labels in which every row of the noise has its own label, numbered after the clusters."""
    noise = labels == NOISE
    numbers = labels.clone()
    numbers[noise] = labels.max() + 1 + torch.arange(int(noise.sum()))
    return numbers


def agreement(labels, truth):
    """ARI and NMI of labels with the true labels, both (N,); every image of the noise counts as its own cluster."""
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    single_labels = singled_out(torch.as_tensor(labels)).numpy()
    truth = np.asarray(truth)
    return {
        "ari": float(adjusted_rand_score(truth, single_labels)),
        "nmi": float(normalized_mutual_info_score(truth, single_labels)),
    }


def pair_scores(labels, truth):
    """Precision, recall and F1 of the pairs of rows that have one label: do they have one identity?

    Precision is None without any pair of one label, recall without any pair of one identity, F1 without either.
    """
    shared, sizes, true_sizes = overlaps(labels, truth)
    right, labelled, true = (int((counts * (counts - 1)).sum()) // 2 for counts in (shared.counts, sizes, true_sizes))
    return {
        "precision": right / labelled if labelled else None,
        "recall": right / true if true else None,
        "f1": 2 * right / (labelled + true) if labelled + true else None,
    }


def bcubed(labels, truth):
    """B-cubed precision, recall and F1.

    The precision of a row is the share of its cluster that has its identity, its recall the share of its identity that
    is in its cluster; the row itself counts in both. The numbers are means over all rows.
    """
    shared, sizes, true_sizes = overlaps(labels, truth)
    squares = shared.counts.astype(np.float64) ** 2
    precision = float((squares / sizes[shared.labels]).sum() / shared.counts.sum())
    recall = float((squares / true_sizes[shared.identities]).sum() / shared.counts.sum())
    return {"precision": precision, "recall": recall, "f1": 2 * precision * recall / (precision + recall)}


class Shared(NamedTuple):
    """The cells of a contingency table that are not 0: rows with this label and this identity."""

    labels: np.ndarray
    identities: np.ndarray
    counts: np.ndarray


def overlaps(labels, truth):
    """(Shared, rows of each label, rows of each identity)."""
    _, labels = np.unique(singled_out(torch.as_tensor(labels)).numpy(), return_inverse=True)
    _, identities = np.unique(np.asarray(truth), return_inverse=True)
    pairs, counts = np.unique(np.stack([labels, identities]), axis=1, return_counts=True)
    return Shared(*pairs, counts), np.bincount(labels), np.bincount(identities)
