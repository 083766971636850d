"""Public code that ranks and re-ranks dense distances, called as its own programs call it; numpy float32 throughout.

    pip install --no-deps --target PEERS torchreid==0.2.5 fastreid==1.4.0 faiss-cpu
    (cd PEERS/fastreid/evaluation/rank_cylib && python setup.py build_ext --inplace)    # needs Cython and a compiler

Only single files of them are opened: the whole packages import much else, and fast-reid's fails on a current Python.
"""

import importlib.util
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy import sparse

K1, K2, WEIGHT = 20, 6, 0.3
GRAPH = "graph"
# Of it, as published for Market-1501.
GRAPH_K1, GRAPH_K2 = 26, 7


class Peer(NamedTuple):
    """`distances(work, data, folder)` and `ranked(distances, ids, folder)`: (mAP, Rank-1)."""

    distances: object
    ranked: object


def module_of(path):
    """One file of a peer, without importing the rest of its package."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        # That its compiled ranking is missing.
        warnings.simplefilter("ignore")
        spec.loader.exec_module(module)
    return module


def squared(left, right):
    return (2 - 2 * torch.from_numpy(left) @ torch.from_numpy(right).t()).clamp_(min=0).numpy()


def sides(data):
    return data["queries"], data["gallery"]


def torchreid_distances(work, data, folder):
    queries, gallery = sides(data)
    distance = squared(queries, gallery)
    if work == "metrics":
        return distance
    near = [np.sqrt(squared(rows, rows)) for rows in (queries, gallery)]
    rerank = module_of(folder / "torchreid/reid/utils/rerank.py").re_ranking
    return rerank(np.sqrt(distance), *near, k1=K1, k2=K2, lambda_value=WEIGHT)


def torchreid_ranked(distances, ids, folder):
    """Its Python path: what pip installs has no other."""
    rank = module_of(folder / "torchreid/reid/metrics/rank.py")
    curve, mean = rank.evaluate_rank(distances, *ids, max_rank=50, use_cython=False)
    return float(mean), float(curve[0])


def fastreid_distances(work, data, folder):
    """Re-ranking is that of OpenUnReID: k1 neighbours by faiss' flat index, dense after that."""
    queries, gallery = sides(data)
    distance = 1 - (torch.from_numpy(queries) @ torch.from_numpy(gallery).t()).numpy()
    if work == "metrics":
        return distance
    with imports_from(folder):
        from fastreid.utils.compute_dist import compute_jaccard_distance

        rows = torch.from_numpy(np.concatenate([queries, gallery]))
        jaccard = compute_jaccard_distance(rows, k1=K1, k2=K2, search_option=3)
    return (1 - WEIGHT) * jaccard[: len(queries), len(queries) :] + WEIGHT * distance


def fastreid_ranked(distances, ids, folder):
    place = folder / "fastreid/evaluation"
    rank = module_of(place / "rank.py")
    with imports_from(place / "rank_cylib"):
        from rank_cy import evaluate_cy

    rank.evaluate_cy, rank.IS_CYTHON_AVAI = evaluate_cy, True
    curve, precisions, _ = rank.evaluate_rank(distances, *ids)
    return float(np.mean(precisions)), float(curve[0])


def graph_distances(work, data, folder):
    """Zhang et al. 2020, which approximates: rows of the graph of neighbours are averaged over neighbours, twice.

    Written out here with sparse matrices, since its own kernels need a GPU.
    """
    queries, gallery = sides(data)
    rows = torch.from_numpy(np.concatenate([queries, gallery]))
    found = [(rows[start : start + 1024] @ rows.t()).topk(GRAPH_K1) for start in range(0, len(rows), 1024)]
    scores, near = (torch.cat(parts).numpy() for parts in zip(*found, strict=True))
    graph = of_neighbours(np.ones_like(scores), near)
    weights = of_neighbours(scores[:, :GRAPH_K2] ** 2, near[:, :GRAPH_K2])
    for _ in range(2):
        graph = weights @ (graph + graph.T)
        length = np.sqrt(np.asarray(graph.multiply(graph).sum(1)))
        graph = sparse.csr_matrix(graph.multiply(1 / length))
    shared = (graph[: len(queries)] @ graph[len(queries) :].T).toarray()
    return -(1 - WEIGHT) * shared - WEIGHT * (queries @ gallery.T)


def of_neighbours(values, near):
    """(N, N) with values (N, k) in the columns of the neighbours."""
    rows = np.arange(len(near)).repeat(near.shape[1])
    return sparse.csr_matrix((values.ravel(), (rows, near.ravel())), shape=(len(near), len(near)))


@contextmanager
def imports_from(folder):
    """Imports find a folder's modules."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


PEERS = {
    "torchreid": Peer(torchreid_distances, torchreid_ranked),
    "fastreid": Peer(fastreid_distances, fastreid_ranked),
    # It has no ranking of its own, and its distances are not those of k-reciprocal neighbours.
    GRAPH: Peer(graph_distances, fastreid_ranked),
}
