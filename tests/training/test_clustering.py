"""Pseudo labels: sparse distances against the dense definition, DBSCAN on them against DBSCAN on the matrix."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.cluster import DBSCAN

from kernels.jaccard_graph import jaccard_graph
from kernels.reranking import k_reciprocal_rerank_reference
from utils.evaluation.groups.clusters import NOISE, agreement, as_matrix, dbscan, singled_out
from utils.training.clustering import check_clusters, cluster


def people(num_rows, num_ids, depth=24, noise=0.9, seed=0):
    """Features around one direction an identity, and the identities."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.nn.functional.normalize(torch.randn(num_ids, depth, generator=generator), dim=1)
    ids = torch.arange(num_rows) % num_ids
    return centres[ids] + noise * torch.randn(num_rows, depth, generator=generator) / depth**0.5, ids


def dense_jaccard(features, k1, k2):
    """The definition in float64, and which pairs it is known of: the reference gives one half against the other."""
    num_rows = len(features)
    distance = torch.zeros(num_rows, num_rows, dtype=torch.float64)
    half = num_rows // 2
    for order in (torch.arange(num_rows), torch.arange(num_rows).view(2, -1).t().flatten()):
        for turned in (order, order.roll(half // 2)):
            sides = turned[:half], turned[half:]
            block = k_reciprocal_rerank_reference(*(features[side].double() for side in sides), k1, k2, 0.0)
            distance[sides[0][:, None], sides[1]] = block
            distance[sides[1][:, None], sides[0]] = block.t()
    known = distance > 0
    return distance, known


def dense_of(graph):
    num_rows = len(graph.reach)
    rows = torch.repeat_interleave(torch.arange(num_rows), graph.near.counts)
    return torch.ones(num_rows, num_rows).index_put_((rows, graph.near.columns), graph.near.values)


@pytest.mark.parametrize("k1, k2", [(12, 4), (7, 1), (1, 3)])
def test_distances_are_those_of_the_definition(k1, k2):
    features, _ = people(72, 9)
    want, known = dense_jaccard(features, k1, k2)
    graph = jaccard_graph(features, k1=k1, k2=k2)
    assert graph.backend == "torch"
    found = dense_of(graph)
    assert known.sum() > 3500
    torch.testing.assert_close(found[known].double(), want[known], rtol=0, atol=2e-6)
    assert torch.equal(found, found.t()) and (found.diagonal() == 0).all()


def faiss_jaccard(features, k1, k2):
    """As clustering methods release it, dense, in float64: row by row, sets of row numbers."""
    units = torch.nn.functional.normalize(features.double(), dim=1)
    distance = 2 - 2 * units @ units.t()
    num_rows = len(units)
    order = distance.clone().fill_diagonal_(-1).argsort(dim=1, stable=True)[:, : max(k1, k2)]
    wide, half = ([set(row[:size].tolist()) for row in order] for size in (k1, min(k1, round(k1 / 2) + 1)))
    near, inner = ([{j for j in rows[i] if i in rows[j]} for i in range(num_rows)] for rows in (wide, half))
    vectors = torch.zeros(num_rows, num_rows, dtype=torch.float64)
    for i in range(num_rows):
        more = (inner[c] for c in near[i] if len(inner[c] & near[i]) > 2 / 3 * len(inner[c]))
        members = sorted(near[i].union(*more))
        vectors[i, members] = (-distance[i, members]).softmax(0)
    if k2 != 1:
        vectors = torch.stack([vectors[order[i, :k2]].mean(0) for i in range(num_rows)])
    shared = torch.stack([torch.minimum(row, vectors).sum(1) for row in vectors])
    return (1 - shared / (2 - shared)).clamp(min=0)


@pytest.mark.parametrize("k1, k2", [(12, 4), (7, 1), (2, 3), (1, 1)])
def test_the_distance_of_clustering_methods(k1, k2):
    features, _ = people(72, 9)
    want = faiss_jaccard(features, k1, k2)
    found = dense_of(jaccard_graph(features, k1=k1, k2=k2, compat="faiss"))
    torch.testing.assert_close(found.double(), want.fill_diagonal_(0), rtol=0, atol=2e-6)
    if k1 > 2:
        assert (found - dense_of(jaccard_graph(features, k1=k1, k2=k2))).abs().max() > 0.05
        labels = DBSCAN(eps=0.6, min_samples=3, metric="precomputed").fit_predict(want.numpy())
        found = cluster(features, eps=0.6, min_samples=3, k1=k1, k2=k2, compat="faiss")
        assert found.labels.tolist() == labels.tolist()


def test_only_pairs_within_the_distance_are_kept():
    features, _ = people(80, 10)
    whole = jaccard_graph(features, k1=12, k2=4, nearest=5)
    part = jaccard_graph(features, k1=12, k2=4, max_distance=0.5, nearest=5)
    dense = dense_of(whole)
    near = dense <= 0.5
    assert 80 < near.sum() < 80 * 80 / 2
    assert torch.equal(part.near.counts, near.sum(1)) and torch.equal(part.near.columns, near.nonzero()[:, 1])
    assert torch.equal(part.near.values, dense[near])
    assert torch.equal(part.reach, dense.sort(dim=1).values[:, :5])


@pytest.mark.parametrize("eps", [0.25, 0.4, 0.55, 0.7])
@pytest.mark.parametrize("min_samples", [2, 4])
def test_clusters_are_those_of_dbscan_on_the_matrix(eps, min_samples):
    features, _ = people(120, 12, noise=1.1)
    want, known = dense_jaccard(features, 12, 4)
    found = cluster(features, eps=eps, min_samples=min_samples, k1=12, k2=4)
    dense = dense_of(jaccard_graph(features, k1=12, k2=4)).numpy()
    assert np.abs(dense - want.numpy())[known.numpy()].max() < 2e-6
    assert np.abs(dense - eps).min() > 1e-6
    labels = DBSCAN(eps=eps, min_samples=min_samples, metric="precomputed").fit_predict(dense)
    assert found.labels.tolist() == labels.tolist()
    assert found.num_clusters == labels.max() + 1 and found.noise == pytest.approx((labels == -1).mean())
    core = (dense <= eps).sum(1) >= min_samples
    assert ((found.reach <= eps).numpy() == core).all()


def test_people_are_found():
    features, ids = people(240, 20, noise=0.7)
    found = cluster(features, eps=0.5, k1=12, k2=4)
    measured = agreement(found.labels, ids)
    assert found.num_clusters == 20 and measured["ari"] > 0.9 and measured["nmi"] > 0.9
    assert found.labels[ids == 0].unique().numel() <= 2
    firsts = [int((found.labels == label).nonzero()[0]) for label in range(found.num_clusters)]
    assert firsts == sorted(firsts)


def test_several_scales_are_those_one_by_one():
    features, _ = people(150, 15, noise=1.2)
    together = cluster(features, eps=[0.35, 0.5, 0.65], k1=12, k2=4)
    for one in together:
        alone = cluster(features, eps=one.eps, k1=12, k2=4)
        assert torch.equal(one.labels, alone.labels) and torch.equal(one.reach, alone.reach)
    assert together[0].noise > together[2].noise


def test_strips_and_groups_change_nothing(monkeypatch):
    """The same graph from strips of 64 rows, and from groups of few entries, as from one piece."""
    features, _ = people(200, 20)
    whole = jaccard_graph(features, k1=12, k2=4, max_distance=0.7, nearest=3)
    monkeypatch.setattr("kernels.jaccard_graph.strip_height", lambda columns, device: 64)
    monkeypatch.setattr("kernels.jaccard_graph.ENTRY_LIMIT", 3000)
    parts = jaccard_graph(features, k1=12, k2=4, max_distance=0.7, nearest=3)
    assert torch.equal(whole.reach, parts.reach)
    for name, tensor in vars(whole.near).items():
        assert torch.equal(tensor, getattr(parts.near, name)), name


def test_agreement_counts_noise_as_single_images():
    labels = torch.tensor([0, 0, NOISE, 1, NOISE])
    assert singled_out(labels).tolist() == [0, 0, 2, 1, 3]
    assert agreement(torch.tensor([1, 1, 0, 0]), [5, 5, 7, 7]) == {"ari": 1.0, "nmi": 1.0}
    # Pairs: 1 in both, expected 1 * 1 / 10, largest (1 + 1) / 2.
    assert agreement(labels, [3, 3, 4, 5, 6])["ari"] == 1
    assert agreement(labels, [3, 3, 3, 5, 6])["ari"] == pytest.approx((1 - 0.3) / (2 - 0.3))


def test_collapse_says_what_to_turn():
    generator = torch.Generator().manual_seed(0)
    alone = cluster(torch.randn(60, 64, generator=generator), eps=0.05, k1=8, k2=2)
    with pytest.raises(ValueError) as stop:
        check_clusters(alone, where="market1501")
    words = str(stop.value)
    assert "100 % of market1501 are in no cluster" in words and "Raise --eps 0.05" in words and "50 % of them" in words
    one = cluster(people(60, 1, noise=0.1)[0], eps=0.9, k1=40, k2=6)
    with pytest.raises(ValueError, match=r"fell into 1\. .*Lower --eps 0\.9 or --cluster_k1"):
        check_clusters(one)
    check_clusters(cluster(people(120, 10, noise=0.7)[0], eps=0.5, k1=12, k2=4))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"k1": 30}, "30 images cannot be clustered by their --cluster_k1 30"),
        ({"k1": 8, "k2": 30}, "30 images cannot be averaged over their --cluster_k2 30"),
        ({"k1": 8, "min_samples": 1}, "min_samples must be between 2 and the 30 images, got 1"),
        ({"k1": 8, "eps": 1.0}, "eps must be above 0 and below 1"),
        ({"k1": 8, "eps": [0.5, 0.0]}, "eps must be above 0 and below 1"),
    ],
)
def test_settings_that_cannot_be(options, words):
    with pytest.raises(ValueError, match=words):
        cluster(torch.randn(30, 8), **options)


def test_bad_features_are_named():
    features = torch.randn(40, 8)
    features[7] = float("nan")
    with pytest.raises(ValueError, match="rows 7"):
        cluster(features, k1=8)


def test_stored_zeros_are_neighbours():
    near = as_matrix(jaccard_graph(torch.eye(2, 8).repeat(4, 1), k1=3, k2=1, max_distance=0.2).near)
    assert dbscan(near, 0.1, 4).tolist() == [0, 1] * 4


@pytest.mark.slow
def test_memory_grows_with_the_rows_not_their_square():
    """12,000 rows: the two float32 matrices of dense implementations alone take 1,099 MiB."""
    script = """
import torch
from pathlib import Path
from tests.training.test_clustering import people
from utils.training.clustering import cluster
features = people(12_000, 600)[0]
def status(field):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
assert cluster(features, eps=0.5).num_clusters > 300
print(status("VmHWM") - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 800


@pytest.mark.slow
def test_triton_finds_the_same_graph():
    """In the interpreter, so in a process of its own."""
    script = """
import torch
from kernels.jaccard_graph import jaccard_graph
from tests.training.test_clustering import people
features = people(60, 6)[0]
found, want = (jaccard_graph(features, k1=8, k2=3, max_distance=0.8, backend=one) for one in ("triton", "torch"))
assert (found.backend, want.backend) == ("triton", "torch")
assert torch.equal(found.near.columns, want.near.columns)
torch.testing.assert_close(found.near.values, want.near.values, rtol=0, atol=1e-6)
"""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
