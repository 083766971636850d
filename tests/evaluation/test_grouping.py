"""Grouping against definitions by loops: scores, times that exclude pairs, cohesion, features of tracklets."""

import itertools
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kernels.jaccard_graph import jaccard_graph
from tests.training.test_clustering import dense_of, people
from utils.evaluation.groups.clusters import NOISE, as_matrix, bcubed, dbscan, pair_scores
from utils.evaluation.groups.grouping import Settings, doubts, group, item_features, joined, scores, settings_for


@pytest.mark.parametrize("seed", range(6))
def test_scores_are_those_of_loops_over_pairs_and_rows(seed):
    rng = random.Random(seed)
    rows = range(40)
    labels = [rng.choice([NOISE, 0, 1, 2, 3, 7]) for _ in rows]
    truth = [rng.randrange(seed + 1, 9) for _ in rows]

    def same(a, b):
        return a == b or (labels[a] == labels[b] and labels[a] != NOISE)

    pairs = list(itertools.combinations(rows, 2))
    together = [pair for pair in pairs if same(*pair)]
    true = [pair for pair in pairs if truth[pair[0]] == truth[pair[1]]]
    right = len(set(together) & set(true))
    precision, recall = right / len(together), right / len(true)
    want = {"precision": precision, "recall": recall, "f1": 2 * precision * recall / (precision + recall)}
    assert pair_scores(torch.tensor(labels), truth) == pytest.approx(want)

    precisions, recalls = [], []
    for row in rows:
        cluster = {other for other in rows if same(row, other)}
        identity = {other for other in rows if truth[row] == truth[other]}
        precisions.append(len(cluster & identity) / len(cluster))
        recalls.append(len(cluster & identity) / len(identity))
    precision, recall = np.mean(precisions), np.mean(recalls)
    want = {"precision": precision, "recall": recall, "f1": 2 * precision * recall / (precision + recall)}
    assert bcubed(torch.tensor(labels), truth) == pytest.approx(want)


def test_scores_at_their_ends():
    single = {"precision": None, "recall": None, "f1": None}
    assert pair_scores(torch.tensor([NOISE, NOISE]), [1, 2]) == single
    assert pair_scores(torch.tensor([NOISE, NOISE]), [1, 1]) == {"precision": None, "recall": 0, "f1": 0}
    assert scores(torch.tensor([1, 1, 2]), [-1, -1, -1]) is None
    measured = scores(torch.tensor([1, 1, 1, 2]), [5, 5, -1, 8])
    assert measured["num_known"] == 3 and measured["num_true_identities"] == 2
    assert measured["pairwise"]["f1"] == measured["bcubed"]["f1"] == measured["ari"] == 1


def random_moments(rng, count):
    """Periods on up to two clocks; some rows have no time, some tracks have gaps."""
    moments = []
    for _ in range(count):
        start, periods = rng.randrange(60), []
        for _ in range(rng.choice([0, 1, 1, 2])):
            periods.append([start, start + rng.randrange(8)])
            start = periods[-1][1] + 2 + rng.randrange(6)
        clock = rng.choice(["c1", "c2"])
        moments.append([(clock, *period) for period in periods])
    return moments


def clash(some, others):
    """Whether two rows share a frame: all frames are compared."""
    frames = [{(clock, frame) for clock, a, b in moments for frame in range(a, b + 1)} for moments in (some, others)]
    return bool(frames[0] & frames[1])


def joined_slowly(near, clusters, moments, eps):
    """The definition: groups as sets; every pair of members is looked at before two are joined."""
    groups = [{row} for row in range(len(clusters))]
    pairs = [
        (float(near[a, b]), a, b)
        for a, b in itertools.combinations(range(len(clusters)), 2)
        if near[a, b] <= eps and clusters[a] == clusters[b] != NOISE
    ]
    for _, a, b in sorted(pairs):
        one, other = (next(group for group in groups if row in group) for row in (a, b))
        if one is not other and not any(clash(moments[x], moments[y]) for x in one for y in other):
            groups.remove(other)
            one |= other
    return {frozenset(group) for group in groups}


def parts(labels):
    return {frozenset(np.flatnonzero(np.asarray(labels) == label).tolist()) for label in np.unique(labels)}


@pytest.mark.parametrize("seed", range(8))
def test_no_camera_sees_an_identity_twice_at_one_time(seed):
    rng = random.Random(seed)
    features, _ = people(60, 6, noise=1.0, seed=seed)
    moments = random_moments(rng, 60)
    settings = Settings(eps=0.6, min_samples=2 + seed % 2, k1=12, k2=4)
    found = group(features, settings, moments)
    for a, b in itertools.combinations(range(60), 2):
        assert found.identities[a] != found.identities[b] or not clash(moments[a], moments[b])
    near = dense_of(jaccard_graph(features, k1=12, k2=4))
    clusters = dbscan(as_matrix(jaccard_graph(features, k1=12, k2=4, max_distance=0.6).near), 0.6, 2 + seed % 2)
    want = joined_slowly(near, clusters.tolist(), moments, 0.6)
    assert parts(found.identities) == want
    # The test would say nothing if times excluded nothing.
    assert found.refused > 0 and parts(found.identities) != parts(group(features, settings).identities)
    again = group(features, settings, moments)
    assert torch.equal(found.identities, again.identities) and found.refused == again.refused


def test_without_conflicts_the_groups_are_those_of_dbscan():
    features, _ = people(80, 10, noise=0.9)
    graph = jaccard_graph(features, k1=12, k2=4, max_distance=0.5)
    clusters = dbscan(as_matrix(graph.near), 0.5, 3).numpy()
    apart = [[("c1", 10 * row, 10 * row + 5)] for row in range(80)]
    for moments in (None, [[] for _ in range(80)], apart):
        found = group(features, Settings(0.5, 3, 12, 4), moments)
        singles = np.where(clusters == NOISE, 1000 + np.arange(80), clusters)
        assert parts(found.identities) == parts(singles) and found.refused == 0
        # Groups come first, and both are numbered in order of rows.
        sizes = found.identities.bincount()[1:]
        assert (sizes[: found.num_groups] > 1).all() and (sizes[found.num_groups :] == 1).all()
        for part in (range(1, found.num_groups + 1), range(found.num_groups + 1, len(sizes) + 1)):
            firsts = [int((found.identities == number).nonzero()[0]) for number in part]
            assert firsts == sorted(firsts)


def test_a_pair_of_equal_distance_is_taken_in_order_of_rows():
    """Row 1 is as near to 0 as to 2, which were seen together."""
    moments = [[("c1", 1, 5)], [], [("c1", 5, 9)]]
    labels = joined(np.array([1, 0]), np.array([2, 1]), np.array([0.25, 0.25]), moments)
    assert parts(labels) == {frozenset({0, 1}), frozenset({2})}


def test_cohesion_is_the_mean_over_pairs():
    features, _ = people(60, 6, noise=1.0)
    found = group(features, Settings(0.55, 2, 12, 4))
    likeness = 1 - dense_of(jaccard_graph(features, k1=12, k2=4)).double()
    likeness[likeness < 1 - 0.55] = 0
    assert found.num_groups >= 3
    for number in range(1, found.num_groups + 1):
        rows = (found.identities == number).nonzero().flatten().tolist()
        closeness = [np.mean([float(likeness[row, other]) for other in rows if other != row]) for row in rows]
        assert found.closeness[rows].tolist() == pytest.approx(closeness, abs=1e-6)
        assert found.cohesion[rows].tolist() == pytest.approx([np.mean(closeness)] * len(rows), abs=1e-6)
    pairs = {number: [] for number in range(1, found.num_groups + 1)}
    for a, b in itertools.combinations(range(60), 2):
        if found.identities[a] == found.identities[b]:
            pairs[int(found.identities[a])].append(1 - float(likeness[a, b]))
    assert doubts(found).tolist() == pytest.approx([sum(values) for values in pairs.values()], abs=1e-5)
    alone = found.identities > found.num_groups
    assert found.cohesion[alone].isnan().all()


def test_the_feature_of_a_tracklet_is_the_mean_of_unit_features():
    features = torch.randn(7, 5) * torch.tensor([1.0, 9, 1, 3, 1, 1, 2])[:, None]
    items = [SimpleNamespace(path=str(rows), rows=rows) for rows in ([4, 0, 6], [2], [1, 3, 5])]
    means, typical = item_features(features, SimpleNamespace(items=items))
    for mean, row, item in zip(means, typical.tolist(), items, strict=True):
        units = [features[index] / features[index].norm() for index in item.rows]
        want = sum(units) / sum(units).norm()
        torch.testing.assert_close(mean, want, rtol=1e-5, atol=1e-6)
        assert row == item.rows[int(torch.stack([unit @ want for unit in units]).argmax())]


def test_opposite_features_have_no_mean():
    items = [SimpleNamespace(path="cam1/track3", rows=[0, 1])]
    with pytest.raises(ValueError, match="cam1/track3 have no mean direction"):
        item_features(torch.tensor([[1.0, 0], [-2.0, 0]]), SimpleNamespace(items=items))


@pytest.mark.parametrize(
    "count, options, message",
    [
        (1, {}, "nothing to group: one item only"),
        (12, {"k1": 12}, "--cluster_k1 12 asks for more neighbours than 12 items"),
        (12, {"k2": 30}, "--cluster_k2 30 asks for more neighbours"),
        (4, {"min_samples": 5}, "--min_samples 5 must be between 2 and the number of items: 4"),
        (4, {"eps": 1.0}, "--eps 1.0 must be above 0 and below 1"),
    ],
)
def test_settings_that_cannot_be(count, options, message):
    with pytest.raises(ValueError, match=message):
        settings_for(count, **({"eps": 0.5} | options))


def test_few_items_have_few_neighbours():
    assert settings_for(2, eps=0.4) == Settings(0.4, 2, 1, 1)
    assert settings_for(9, eps=0.4) == Settings(0.4, 2, 3, 3)
    assert settings_for(900, eps=0.4, k2=1) == Settings(0.4, 2, 8, 1)
