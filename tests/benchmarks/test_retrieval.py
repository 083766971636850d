"""The peers of the retrieval benchmarks that are written out there, and what is said of them."""

import numpy as np
import pytest
import torch

from benchmarks.speed import end_to_end, retrieval, retrieval_peers
from benchmarks.speed.reid_features import reid_features
from kernels import k_reciprocal_rerank
from utils.datasets.load import load_reid


@pytest.fixture(scope="module")
def data():
    return reid_features((6, 40, 5, 3, 0.1))


def test_graph_by_loops(data):
    rows = np.concatenate([data["queries"], data["gallery"]]).astype(np.float64)
    scores = rows @ rows.T
    near = np.argsort(-scores, 1, kind="stable")
    graph = np.zeros_like(scores)
    for one, others in enumerate(near[:, : retrieval_peers.GRAPH_K1]):
        graph[one, others] = 1
    for _ in range(2):
        both = graph + graph.T
        for one, others in enumerate(near[:, : retrieval_peers.GRAPH_K2]):
            row = sum(scores[one, other] ** 2 * both[other] for other in others)
            graph[one] = row / np.linalg.norm(row)
    wanted = -0.7 * graph[:6] @ graph[6:].T - 0.3 * scores[:6, 6:]
    assert np.abs(retrieval_peers.graph_distances("rerank", data, None) - wanted).max() < 1e-5


def test_rank_correlation_with_the_exact_distances(data):
    exact = k_reciprocal_rerank(torch.from_numpy(data["queries"]), torch.from_numpy(data["gallery"])).dense().numpy()
    assert retrieval.correlation(exact, data) == pytest.approx(1)
    assert retrieval.correlation(-exact, data) == pytest.approx(-1)
    graph = retrieval.correlation(retrieval_peers.graph_distances("rerank", data, None), data)
    assert 0.5 < graph < 0.9999


def test_drawn_people_in_the_layout_of_market(tmp_path):
    spec = "synthetic:domain=b,num_ids=3,images_per_id=4"
    drawn = load_reid(spec)
    assert end_to_end.write_market(spec, tmp_path) == len(drawn["query"]) + len(drawn["gallery"])
    read = load_reid("market1501", root=tmp_path / "market1501")
    for split in ("query", "gallery"):
        labels = [sorted((row["camid"], row["pid"]) for row in one[split]) for one in (drawn, read)]
        assert [camera for camera, _ in labels[0]] == [camera for camera, _ in labels[1]]
        assert len({pid for _, pid in labels[0]}) == len({pid for _, pid in labels[1]}) == 3
