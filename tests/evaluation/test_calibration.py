"""Calibration against plain sums over all pairs, intervals by drawing identities, and decisions."""

import json
import math

import pytest
import torch

from benchmarks.evaluation import coverage
from tests.evaluation.test_evaluation import dense, people
from utils.evaluation import calibration, decisions, thresholds
from utils.evaluation.calibration import identity_counts, rates, resampling
from utils.evaluation.calibration.identity_counts import IdentityCounts
from utils.evaluation.calibration.rates import PairRates, needed_identities
from utils.evaluation.metrics import Side
from utils.evaluation.thresholds import pair_statistics
from utils.files import to_json


def scores_of(queries, gallery, protocol):
    distances, same, kept = dense(queries, gallery, protocol)
    return 1 - distances / 2, same, kept


def counted(queries, gallery, low=-0.01, protocol="market"):
    counts = IdentityCounts(queries, gallery, low, protocol)
    return counts, list(counts.camera_pairs())


@pytest.mark.parametrize("protocol", ["market", "all"])
@pytest.mark.parametrize("seed", range(3))
def test_counts_are_those_of_all_pairs(protocol, seed, monkeypatch):
    monkeypatch.setattr(thresholds, "QUERY_TILE", 5)
    monkeypatch.setattr(thresholds, "GALLERY_TILE", 8)
    queries, gallery = people(31, 90, num_ids=9, seed=seed)
    gallery.pids[:3] = -1
    gallery.pids[gallery.pids == 4] = 40
    queries.pids[1] = -1
    # Scores are multiples of 1/8: no edge of the grid may lie near one.
    counts, parts = counted(queries, gallery, -0.013, protocol)
    queries = queries.take((queries.pids != -1).nonzero().flatten())
    scores, same, kept = scores_of(queries, gallery, protocol)
    names = sorted({*queries.pids.tolist(), *gallery.pids[gallery.pids != -1].tolist()})
    assert counts.num_ids == len(names) + 3 and len(parts) == 9

    strangers, matches = (counts.grid.reaching(table) for table in (counts.total.strangers, counts.total.matches))
    for edge in (0, 200, 400):
        reaches = scores >= counts.grid.edges[edge]
        for number, pid in enumerate(names):
            of_query, of_gallery = (queries.pids == pid)[:, None], (gallery.pids == pid)[None]
            other = reaches & ~same
            assert strangers[number, edge] == (other & of_query).sum() + (other & of_gallery).sum()
            assert matches[number, edge] == (reaches & same & kept & of_query).sum()
        assert strangers[len(names) :, edge].sum() == (reaches & (gallery.pids == -1)).sum()
    assert counts.total.strangers.sum() == 2 * (~same).sum()

    # Identity by identity, for each query.
    found = counts.searches
    for row in range(len(queries)):
        best = {}
        for column, pid in enumerate(gallery.pids.tolist()):
            if not same[row, column]:
                name = pid if pid != -1 else ("background", column)
                best[name] = max(best.get(name, -2), float(scores[row, column]))
        first, second = sorted(best.values(), reverse=True)[:2]
        assert (float(found.best[row]), float(found.second[row])) == pytest.approx((first, second))
        own = scores[row][same[row] & kept[row]]
        assert float(found.right[row]) == (pytest.approx(float(own.max())) if len(own) else -math.inf)


def test_each_pair_of_cameras_counts_its_own_pairs():
    queries, gallery = people(30, 80, num_ids=8, seed=1)
    counts, parts = counted(queries, gallery, -1.0)
    scores, same, kept = scores_of(queries, gallery, "market")
    for ours, theirs, part in parts:
        here = (queries.camids == ours)[:, None] & (gallery.camids == theirs)
        assert part.strangers.sum() == 2 * (here & ~same).sum()
        assert part.matches.sum() == (here & same & kept).sum()
        assert part.num_query_ids == len(queries.pids[queries.camids == ours].unique())


def test_background_images_count_by_themselves(monkeypatch):
    queries, gallery = torch.tensor([3, 3, 8]), torch.tensor([3, 8, 8, 9, *[0] * 20, -1])
    numbers = identity_counts.number_identities(queries, gallery)
    assert numbers[0].tolist() == [0, 0, 1] and numbers[1][:4].tolist() == [0, 1, 1, 2]
    assert numbers[1][4:].tolist() == list(range(3, 24)) and numbers[2] == 24
    monkeypatch.setattr(identity_counts, "BACKGROUND_GROUPS", 5)
    numbers = identity_counts.number_identities(queries, gallery)
    assert numbers[2] == 8 and numbers[1][4:].bincount()[3:].tolist() == [5, 4, 4, 4, 4]


def test_a_replicate_weighs_pairs_by_their_identities():
    queries, gallery = people(60, 90, num_ids=32, seed=4)
    counts, _ = counted(queries, gallery)
    draws = resampling.Resampling(counts.num_ids, replicates=6, seed=3)
    scores, same, kept = scores_of(queries, gallery, "market")
    rates = PairRates(counts.total, counts.grid, draws)
    numbers = torch.unique(torch.cat([queries.pids, gallery.pids]), return_inverse=True)[1]
    edges = list(range(0, counts.grid.num_steps + 1, 50))
    for replicate, weights in enumerate(draws.weights):
        pair_weights = weights[numbers[:60]][:, None] + weights[numbers[60:]][None] - 1
        shares = []
        for edge in edges:
            reaches = scores >= counts.grid.edges[edge]
            share = float(pair_weights[reaches & ~same].sum() / pair_weights[~same].sum())
            shares.append(max(0.0, share))
            hits, misses = draws.halves[replicate, :2, 0] * (same & kept).sum() / rates.num_matched
            own = weights[numbers[:60]][:, None].expand_as(scores)
            share = (own[reaches & same & kept].sum() + hits) / (own[same & kept].sum() + hits + misses)
            assert float(rates.right_drawn[replicate, edge]) == pytest.approx(float(share), rel=1e-9)
        # Scores are multiples of 1/8, so that no share changes between these edges without being seen.
        monotone = [max(shares[place:]) for place in range(len(shares))]
        assert rates.false_drawn[replicate, edges].tolist() == pytest.approx(monotone, rel=1e-9)


@pytest.fixture(scope="module")
def made():
    """A calibration of 80 drawn identities, and the two sides."""
    sides = coverage.draw(80, "weak", torch.Generator().manual_seed(5))
    pairs = pair_statistics(*sides, rates=calibration.FALSE_MATCH_RATES)
    content = calibration.calibrate(*sides, pairs, replicates=200)
    return json.loads(to_json({"model": "m", "fingerprint": "f"} | content)), sides


def test_numbers_are_those_of_the_definitions(made):
    content, (queries, gallery) = made
    others, matches, best, right = coverage.split_scores(queries, gallery)
    for rate in (0.1, 0.01):
        entry = content["rates"][f"{rate:g}"]
        threshold = entry["threshold"]
        assert entry["false_match_rate"] == pytest.approx(float((others >= threshold).double().mean()), abs=1e-4)
        assert entry["false_match_rate"] <= rate < float((others >= threshold - 1e-3).double().mean())
        assert entry["right_match_rate"] == pytest.approx(float((matches >= threshold).double().mean()), abs=3e-3)
        for name in ("threshold", "right_match_rate"):
            low, high = entry[f"{name}_interval"]
            assert low <= entry[name] <= high and low < high
    search = content["open_set"]["rates"]["0.1"]
    assert search["false_alarm_rate"] == 0.1
    assert float((best >= search["threshold"] + 1e-6).double().mean()) <= 0.1
    assert float((best >= search["threshold"] - 1e-6).double().mean()) > 0.1
    hit = (right >= search["threshold"]) & (right > best)
    assert search["TPIR"] == pytest.approx(float(hit.double().mean()), abs=0.01)
    assert search["TPIR_interval"][0] < search["TPIR"] < search["TPIR_interval"][1]
    assert content["open_set"]["gallery_images"] == len(gallery) - coverage.GALLERY
    (pair,) = content["camera_pairs"]
    assert (pair["query_camera"], pair["gallery_camera"]) == (0, 1)
    step = (1 - content["curve"]["score"][0]) / 512
    assert abs(pair["rates"]["0.1"]["threshold"] - content["rates"]["0.1"]["threshold"]) <= step
    assert pair["rates"]["0.1"]["at_overall_threshold"]["false_match_rate"] == pytest.approx(0.1, abs=0.003)


def test_of_many_cameras_all_is_counted_at_once(made, monkeypatch):
    """The same numbers, without the table of cameras."""
    content, sides = made
    pairs = pair_statistics(*sides, rates=calibration.FALSE_MATCH_RATES)
    monkeypatch.setattr(rates, "MOST_CAMERAS", 0)
    monkeypatch.setattr(IdentityCounts, "camera_pairs", lambda self: pytest.fail("too many"))
    at_once = json.loads(to_json(calibration.calibrate(*sides, pairs, replicates=200)))
    assert at_once == {name: value for name, value in content.items() if name in at_once} | {"camera_pairs": []}


def test_what_the_identities_cannot_show_is_not_measurable(made):
    content, _ = made
    for entry, words in (
        (content["rates"]["0.001"], "not measurable with 80 identities: 30,000 pairs of two identities are needed"),
        (content["open_set"]["rates"]["0.01"], "not measurable with 80 identities: 500 are needed"),
    ):
        assert entry["threshold"] is None and entry["reason"].startswith(words)
    assert needed_identities(0.001) == 246 and 246 * 245 / 2 >= 30_000 > 245 * 244 / 2
    for num_ids in (1, 2, 5):
        queries, gallery = people(9, 20, num_ids=num_ids, seed=2)
        pairs = pair_statistics(queries, gallery, rates=calibration.FALSE_MATCH_RATES)
        few = calibration.calibrate(queries, gallery, pairs, replicates=20)
        entries = [*few["rates"].values(), *few["open_set"]["rates"].values()]
        assert all("not measurable with" in entry["reason"] for entry in entries)
    queries, gallery = people(60, 90, num_ids=40, seed=2)
    queries.features[:], gallery.features[:] = 1.0, 1.0
    pairs = pair_statistics(queries, gallery, rates=calibration.FALSE_MATCH_RATES)
    equal = calibration.calibrate(queries, gallery, pairs, replicates=20)
    assert "their scores are too equal" in equal["rates"]["0.1"]["reason"]


def shares(found, number, method):
    counts = found[f"pairs {number} {method}"]
    return counts[1] / counts[0]


def test_intervals_hold_the_truth_and_those_of_pairs_do_not(monkeypatch):
    for name, value in {"TRUTH_ROUNDS": 6, "SEARCHED_IDS": 4000}.items():
        monkeypatch.setattr(coverage, name, value)
    found = coverage.covered(40, "strong", 30, replicates=120)
    for number in ("0.1 threshold", "0.1 right"):
        assert shares(found, number, "identities") >= 0.8
        assert shares(found, number, "pairs") <= 0.75


@pytest.mark.slow
@pytest.mark.parametrize("world", coverage.WORLDS)
@pytest.mark.parametrize(
    "num_ids, smallest", [(80, {"pairs 0.01", "searches 0.1"}), (800, {"pairs 0.0001", "searches 0.01"})]
)
def test_intervals_hold_the_truth_in_92_to_98_percent_of_draws(world, num_ids, smallest):
    """All numbers that `evaluate.py` calls measurable with so many identities, down to the smallest rates."""
    found = coverage.covered(num_ids, world, 1000, with_pairs=num_ids == 80)
    rates = set()
    for key, counts in found.items():
        kind, rate, number, method = key.split()
        if method == "pairs":
            assert counts[1] / counts[0] < 0.8, key
        elif coverage.is_measurable(kind, float(rate), num_ids):
            assert counts[0] == 1000 and 0.92 <= counts[1] / counts[0] <= 0.98, (key, counts)
            rates.add(f"{kind} {rate}")
    assert smallest <= rates


# Decisions


def hand_made(**changes):
    """A calibration with 100 gallery images whose rates are easy to compute with."""
    curve = {
        "score": [0.0, 0.5, 1.0],
        "false_match_rate": [1.0, 0.01, 0.0],
        "right_match_rate": [1.0, 0.9, 0.0],
        "false_alarm_rate": [1.0, 0.2, 0.0],
        "TPIR": [0.8, 0.6, 0.0],
        "least_false_match_rate": 1e-3,
        "least_false_alarm_rate": 0.005,
    }
    open_set = {"gallery_images": 100.0, "num_identities": 1000}
    return {"version": 1, "fingerprint": "f", "curve": curve | changes, "open_set": open_set}


def answers(content, scores, num_gallery=100, accepted=0.01):
    distances = 2 - 2 * torch.tensor(scores)[:, None]
    lists = torch.zeros(len(scores), 1, dtype=torch.long), distances
    return decisions.decide(content, lists, num_gallery, accepted)


def test_decisions_follow_the_chance_of_a_false_alarm():
    found = answers(hand_made(), [1.0, 0.98, 0.96, 0.76, 0.74, 0.3])
    assert [one.answer for one in found] == ["yes", "yes", "unsure", "unsure", "nobody", "nobody"]
    assert found[1].false_alarm_rate == pytest.approx(0.008, abs=1e-6) and not found[1].false_alarm_below
    assert found[0].false_alarm_rate == pytest.approx(0.005) and found[0].false_alarm_below
    assert (found[0].false_match_rate, found[0].false_match_below) == (0.001, True)
    assert found[4].false_match_rate == pytest.approx(0.01 * 0.26 / 0.5, rel=1e-5)
    # A score passes from 0.75 on, which the stored points show at 1.0 only.
    assert found[5].miss_rate == 1.0 and found[0].miss_rate is None
    assert "same person: yes" in found[0].describe() and "below" in found[0].describe()
    assert found[5].describe().startswith("nobody: no gallery image passes")


def test_a_larger_gallery_has_more_false_alarms():
    one, ten = (answers(hand_made(), [0.98], count)[0] for count in (100, 1000))
    assert ten.false_alarm_rate == pytest.approx(1 - (1 - one.false_alarm_rate) ** 10)
    assert (one.answer, ten.answer) == ("yes", "unsure")


def test_few_identities_give_no_yes():
    content = hand_made(least_false_alarm_rate=0.2)
    assert [one.answer for one in answers(content, [1.0, 0.6, 0.4])] == ["unsure", "unsure", "nobody"]
    assert "down to 20.0 %" in decisions.limits(content, 100, 0.01) and decisions.limits(content, 100, 0.2) is None
    # Above one half nothing passes, however much is accepted otherwise.
    assert answers(hand_made(), [0.2], accepted=0.3)[0].answer == "nobody"


def test_nobody_is_right_where_the_protocol_leaves_nobody():
    """The only gallery image of the first person is of the query's camera, that of the second is the query's file."""
    pids, contents = torch.tensor([1, 2, 3]), torch.tensor([-1, 5, -1])
    queries = Side(torch.eye(3), pids, torch.tensor([0, -1, 0]), ["a", "b", "c"], contents)
    gallery = Side(torch.eye(3), pids, torch.tensor([0, -1, 1]), ["d", "e", "f"], contents)
    decided = answers(hand_made(), [0.3, 0.3, 0.3])
    assert [one.answer for one in decided] == ["nobody"] * 3
    assert decisions.summary(decided, queries, gallery, "market")["right"]["nobody"] == 2
    assert decisions.summary(decided, queries, gallery, "all")["right"]["nobody"] == 1


def test_a_query_without_any_gallery_image_has_nobody():
    lists = torch.tensor([[-1]]), torch.tensor([[torch.inf]])
    (one,) = decisions.decide(hand_made(), lists, 100)
    assert one.answer == "nobody" and one.score == -1


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "does not exist"),
        ("{half", "is damaged"),
        ("[]", "is damaged (it is no calibration of version 1)"),
        (hand_made() | {"version": 2}, "no calibration of version 1"),
        (hand_made(TPIR=[0.1]), "columns of its curve differ in length"),
        (hand_made(TPIR=[0.1, "x", 0.1]), "something else than numbers"),
        (hand_made(score=[1.0, 0.5, 0.0]), "out of range"),
        ({"version": 1, "fingerprint": "f"}, "is missing"),
        (hand_made() | {"fingerprint": "g"}, "is of another model"),
        (hand_made(), None),
    ],
)
def test_a_calibration_that_cannot_be_used_is_ignored_with_its_reason(content, words, tmp_path):
    path = tmp_path / "calibration.json"
    if content is not None:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    found, problem = calibration.read_calibration(path, "f")
    if words is None:
        assert problem is None and found == content
    else:
        assert found is None and words in problem and "\n" not in problem
