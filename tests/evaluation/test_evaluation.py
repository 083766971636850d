"""Thresholds, ranked lists, camera pairs and confusions against slow, plain references in float64."""

from collections import Counter

import numpy as np
import pytest
import torch

from utils import evaluation
from utils.evaluation import lists, thresholds
from utils.evaluation.metrics import Side


def people(num_queries, num_gallery, *, num_ids=6, num_cams=3, width=16, seed=0):
    """Two sides whose features are +-1: every cosine of width 16 is a multiple of 1/8, exact in float32, with ties."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randint(0, 2, (num_ids, width), generator=generator)

    def side(count, name):
        pids = torch.randint(0, num_ids, (count,), generator=generator)
        flips = torch.rand(count, width, generator=generator) < 0.25
        features = 2.0 * (centres[pids] ^ flips.long()) - 1
        cameras = torch.randint(0, num_cams, (count,), generator=generator)
        return Side(features, pids, cameras, [f"{name}/{row}.jpg" for row in range(count)])

    return side(num_queries, "q"), side(num_gallery, "g")


def dense(queries, gallery, protocol):
    """Distances in float64, which pairs are of one person, and which the protocol keeps."""
    units = [torch.nn.functional.normalize(side.features.double(), dim=1) for side in (queries, gallery)]
    same = (queries.pids[:, None] == gallery.pids) & (queries.pids[:, None] != -1)
    cameras = (queries.camids[:, None] == gallery.camids) & (gallery.camids != -1)
    kept = ~(same & cameras) if protocol != "all" else torch.ones_like(same)
    return 2 - 2 * units[0] @ units[1].T, same, kept


@pytest.mark.parametrize("protocol", ["market", "all"])
@pytest.mark.parametrize("seed", range(8))
def test_thresholds_are_the_largest_within_the_rate(protocol, seed, monkeypatch):
    monkeypatch.setattr(thresholds, "QUERY_TILE", 7)
    monkeypatch.setattr(thresholds, "GALLERY_TILE", 16)
    queries, gallery = people(30, 101, seed=seed)
    gallery.pids[:5] = -1
    queries.pids[0] = -1
    rates = (0.3, 0.1, 1e-2, 1e-3, 1e-4)
    found = thresholds.pair_statistics(queries, gallery, protocol=protocol, rates=rates)

    distances, same, kept = dense(queries, gallery, protocol)
    named = queries.pids[:, None] != -1
    matches, others = distances[same & kept & named], distances[~same & named]
    assert (found.num_matches, found.num_non_matches) == (len(matches), len(others))
    for rate in rates:
        one = found.thresholds[f"{rate:g}"]
        # All distances are multiples of 1/4, so the candidates are few.
        wanted = max((t for t in torch.arange(-1, 17) / 4 if (others <= t).double().mean() <= rate), default=None)
        assert one["false_match_rate"] == pytest.approx(float((others <= wanted).double().mean()), abs=1e-12)
        assert one["true_match_rate"] == pytest.approx(float((matches <= wanted).double().mean()), abs=1e-12)
        if one["distance"] is None:
            assert wanted < 0
        else:
            assert wanted <= one["distance"] < wanted + 0.25
            assert (others <= one["distance"]).double().mean() <= rate
    assert sum(found.match_counts) == len(matches) and sum(found.non_match_counts) == len(others)


@pytest.mark.parametrize("seed", range(4))
def test_thresholds_of_real_features_agree_with_sorting(seed):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(40, 64, generator=generator)
    pids = [torch.randint(0, 40, (count,), generator=generator) for count in (120, 700)]
    sides = [
        Side(centres[ids] + 2 * torch.randn(len(ids), 64, generator=generator), ids, ids % 3, [""] * len(ids))
        for ids in pids
    ]
    # A camera of each image's own, so that no match is dropped.
    sides[1].camids = torch.full_like(pids[1], 9)
    found = thresholds.pair_statistics(*sides)
    distances, same, _ = dense(*sides, "market")
    others, matches = distances[~same].sort().values, distances[same]
    for rate in thresholds.FALSE_MATCH_RATES:
        one, allowed = found.thresholds[f"{rate:g}"], int(rate * len(others))
        assert one["distance"] == pytest.approx(float(others[allowed]), abs=2e-6)
        assert one["false_match_rate"] == allowed / len(others)
        expected = float((matches < others[allowed]).double().mean())
        assert one["true_match_rate"] == pytest.approx(expected, abs=1.5 / len(matches))
    curve = found.curve
    assert len(curve["distance"]) > 50 and curve["false_match_rate"][-1] == curve["true_match_rate"][-1] == 1
    for distance, false, true in list(zip(*curve.values(), strict=True))[::10]:
        assert false == pytest.approx(float((others <= distance).double().mean()), abs=1e-4)
        assert true == pytest.approx(float((matches <= distance).double().mean()), abs=2e-3)


def test_thresholds_without_matches_or_without_strangers():
    queries, gallery = people(4, 9, num_ids=1)
    alone = thresholds.pair_statistics(queries, gallery, protocol="all")
    assert alone.num_non_matches == 0
    assert all(one["distance"] is None and one["false_match_rate"] is None for one in alone.thresholds.values())
    gallery.pids += 5
    strangers = thresholds.pair_statistics(queries, gallery, protocol="all")
    assert strangers.num_matches == 0 and strangers.thresholds["0.01"]["true_match_rate"] is None
    assert strangers.curve["distance"] == []


@pytest.mark.parametrize("scale", [2.0**-120, 2.0**120])
def test_the_length_of_features_does_not_matter(scale):
    """Not even where its square does not fit float32."""
    queries, gallery = people(30, 100, seed=2)
    found = thresholds.pair_statistics(queries, gallery)
    queries.features *= scale
    assert thresholds.pair_statistics(queries, gallery) == found


def test_identical_features_have_no_threshold():
    queries, gallery = people(5, 20, num_ids=3, seed=1)
    queries.features[:], gallery.features[:] = 1.0, 1.0
    found = thresholds.pair_statistics(queries, gallery)
    assert found.thresholds["0.01"] == {"distance": None, "true_match_rate": 0.0, "false_match_rate": 0.0}


@pytest.mark.parametrize("protocol", ["market", "all"])
@pytest.mark.parametrize("seed", range(5))
def test_ranked_lists_follow_the_protocol(protocol, seed):
    queries, gallery = people(17, 60, seed=seed)
    queries.pids[0], gallery.pids[:30] = -1, torch.where(torch.arange(30) % 4 == 0, -1, gallery.pids[:30])
    indices, distances = evaluation.ranked_lists(queries, gallery, 60, protocol=protocol)
    wanted, _, kept = dense(queries, gallery, protocol)
    for row in range(17):
        order = wanted[row].argsort(stable=True)
        order = order[kept[row][order]]
        found = indices[row][indices[row] >= 0]
        assert found.tolist() == order.tolist()
        torch.testing.assert_close(distances[row, : len(order)].double(), wanted[row][order], rtol=0, atol=1e-5)
        assert distances[row, len(order) :].isinf().all()
    short, _ = evaluation.ranked_lists(queries, gallery, 3, protocol=protocol)
    assert torch.equal(short, indices[:, :3])
    with pytest.raises(ValueError, match="61 ranked images of a gallery of 60"):
        evaluation.ranked_lists(queries, gallery, 61)


def average_precision(ranked_matches):
    hits = np.flatnonzero(ranked_matches) + 1
    return float(np.mean(np.arange(1, len(hits) + 1) / hits)) if len(hits) else None


@pytest.mark.parametrize("protocol", ["market", "all"])
def test_camera_pairs_equal_a_ranking_of_each_pair_alone(protocol):
    queries, gallery = people(40, 120, num_ids=12, seed=3)
    query_cameras, gallery_cameras, table = evaluation.camera_pairs(queries, gallery, protocol=protocol)
    distances, same, kept = dense(queries, gallery, protocol)
    assert query_cameras == gallery_cameras == [0, 1, 2]
    for ours in query_cameras:
        for theirs in gallery_cameras:
            precisions = []
            for row in (queries.camids == ours).nonzero().flatten().tolist():
                columns = ((gallery.camids == theirs) & kept[row]).nonzero().flatten()
                order = columns[distances[row, columns].argsort(stable=True)]
                precisions.append(average_precision(same[row, order].numpy()))
            precisions = [one for one in precisions if one is not None]
            expected = pytest.approx(np.mean(precisions), abs=1e-9) if precisions else None
            assert table[ours][theirs] == expected
    assert (table[0][0] is None) == (protocol == "market")


def test_cameras_that_share_only_unknown_people_have_no_number():
    queries, gallery = people(2, 3)
    queries.pids, queries.camids = torch.tensor([5, -1]), torch.tensor([0, 0])
    gallery.pids, gallery.camids = torch.tensor([5, -1, -1]), torch.tensor([1, 2, 2])
    assert evaluation.camera_pairs(queries, gallery) == ([0], [1, 2], [[1.0, None]])


def test_confusions_count_both_directions():
    queries, gallery = people(60, 80, num_ids=5, seed=5)
    lists = evaluation.ranked_lists(queries, gallery, 10)
    expected = Counter()
    for row, column in enumerate(lists[0][:, 0].tolist()):
        pair = sorted([int(queries.pids[row]), int(gallery.pids[column])])
        expected[tuple(pair)] += pair[0] != pair[1]
    found = evaluation.confusions(queries, gallery, *lists, limit=100)
    assert {one.pids: one.count for one in found} == {pair: count for pair, count in expected.items() if count}
    assert [one.count for one in found] == sorted((one.count for one in found), reverse=True)
    for one in found:
        assert sorted([int(queries.pids[one.query]), int(gallery.pids[one.gallery])]) == list(one.pids)


def test_mean_and_sample_deviation():
    mean, deviation = evaluation.mean_and_deviation([{"mAP": 0.1}, {"mAP": 0.4}, {"mAP": 0.7}])
    assert mean == pytest.approx({"mAP": 0.4}) and deviation == pytest.approx(
        {"mAP": float(np.std([1, 4, 7], ddof=1)) / 10}
    )
    assert evaluation.mean_and_deviation([{"mAP": 0.1}])[1] == {"mAP": 0.0}


def test_two_unknown_cameras_are_not_one_camera():
    """They drop nothing: neither from metrics nor from lists nor from thresholds."""
    queries, gallery = people(20, 60, seed=3)
    queries.camids[::2], gallery.camids[::2] = -1, -1
    distances, same, kept = dense(queries, gallery, "market")
    result = evaluation.rank(queries, gallery, protocol="market")
    assert int(result.num_valid) == int((same & kept).any(1).sum())
    columns, _ = evaluation.ranked_lists(queries, gallery, len(gallery), protocol="market")
    for row in range(len(queries)):
        assert set(columns[row][columns[row] >= 0].tolist()) == set(kept[row].nonzero().flatten().tolist())
    found = thresholds.pair_statistics(queries, gallery, protocol="market", rates=(0.1,))
    assert found.num_matches == int((same & kept).sum())


def test_images_without_labels_drop_nothing(monkeypatch):
    """A search of unlabelled images asks for no more of the gallery than it shows."""
    queries, gallery = people(10, 300)
    queries.pids[:], gallery.pids[:] = -1, -1
    asked, topk = [], lists.cosine_topk
    monkeypatch.setattr(lists, "cosine_topk", lambda q, g, k, **more: asked.append(k) or topk(q, g, k, **more))
    evaluation.ranked_lists(queries, gallery, 5, protocol="market")
    assert asked == [5]


def test_lists_longer_than_tritons_kernel_keeps_are_those_of_torch():
    """--backend triton runs where it can: on lists the kernel has a limit."""
    queries, gallery = people(10, 300, num_ids=1, num_cams=1)
    gallery.camids[100:] = 1
    asked = [evaluation.ranked_lists(queries, gallery, 5, backend=backend) for backend in ("triton", "torch")]
    for one, other in zip(*asked, strict=True):
        assert torch.equal(one, other)


def test_the_same_file_is_dropped_under_every_protocol():
    """Files in place of cameras keep the single shot of cuhk03."""
    queries, gallery = people(30, 90)
    queries.camids[:], gallery.camids[:] = 0, 1
    plain = evaluation.rank(queries, gallery, protocol="cuhk03")
    queries.contents, gallery.contents = torch.full((30,), -1), torch.full((90,), -1)
    found = evaluation.rank(queries, gallery, protocol="cuhk03")
    assert torch.equal(plain.cmc, found.cmc) and plain.mAP == found.mAP
    assert not torch.equal(plain.cmc, evaluation.rank(queries, gallery, protocol="market").cmc)
