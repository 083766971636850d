"""The Triton kernels: interpreted on the CPU against float64 references, and compiled ahead of time.

Whether kernels are interpreted is settled when triton is imported. The interpreted tests of this file therefore run in
a process of their own, which `test_kernels_under_the_interpreter` starts.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import cosine_topk, k_reciprocal_rerank, measured, rank_metrics
from kernels.ranking import rank_metrics_reference
from kernels.reranking import k_reciprocal_rerank_reference
from kernels.tiles import cosine_reference
from kernels.topk import cosine_topk_reference
from tests.kernels.test_kernels import check_metrics, check_order, cosine, people

ROOT = Path(__file__).resolve().parents[2]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process with TRITON_INTERPRET=1")
outside = pytest.mark.skipif(INTERPRETED, reason="runs in the process that compiles")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@outside
def test_kernels_under_the_interpreter():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-rs", "-p", "no:xdist", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@outside
def test_kernels_compile_for_every_architecture(tmp_path):
    pytest.importorskip("triton")
    table = tmp_path / "table.json"
    command = [sys.executable, "-m", "kernels.build_table", "--json", str(table)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert table.exists(), done.stderr[-3000:]
    rows = json.loads(table.read_text())
    assert {row["arch"] for row in rows} == {80, 86, 89, 90, 120}
    assert {row["kernel"].split()[0] for row in rows} == {"topk", "match_scores", "count", "overlap"}
    for row in rows:
        assert row["spill_bytes"] == 0, row
        assert row["shared_bytes"] <= 96 << 10, row
        assert 0 < row["registers"] <= 255, row
    assert done.returncode == 0


@outside
def test_forcing_triton_on_the_cpu_says_why():
    pytest.importorskip("triton")
    eye = torch.eye(3)
    for call in (
        lambda: cosine_topk(eye, eye, 1, backend="triton"),
        lambda: rank_metrics(eye, eye, [0] * 3, [0] * 3, [0] * 3, [1] * 3, backend="triton"),
        lambda: k_reciprocal_rerank(eye, eye, backend="triton"),
    ):
        with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
            call()


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("q, g, d, k", [(1, 1, 3, 1), (5, 64, 16, 64), (67, 301, 33, 20)])
def test_topk(q, g, d, k, dtype):
    queries, gallery, _ = people(q, g, d, seed=g)
    queries, gallery = queries.to(dtype), gallery.to(dtype)
    result = cosine_topk(queries, gallery, k, backend="triton")
    assert result.backend == "triton" and result.scores.dtype == torch.float32
    want, _ = cosine_topk_reference(queries.double(), gallery.double(), k)
    torch.testing.assert_close(result.scores.double(), want, rtol=0, atol=2e-6)
    check_order(cosine(queries, gallery), result.indices, k)


@interpreted
def test_equal_rows_come_by_index():
    gallery = torch.randn(1, 20).repeat(200, 1)
    gallery[77] = -gallery[77]
    result = cosine_topk(gallery[:3], gallery, 33, backend="triton")
    assert result.backend == "triton"
    assert result.indices.equal(torch.arange(33).expand(3, 33))


@interpreted
def test_strided_rows_of_any_length():
    queries, gallery, _ = people(4, 90, 24, seed=3)
    want = cosine_topk(queries, gallery, 5, backend="torch")
    got = cosine_topk(queries.t().contiguous().t() * 1e-25, gallery * 1e25, 5, backend="triton")
    assert (want.backend, got.backend) == ("torch", "triton") and got.indices.equal(want.indices)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("protocol", ["market", "all"])
@pytest.mark.parametrize("q, g, d", [(3, 40, 4), (70, 333, 16)])
def test_metrics(q, g, d, protocol, dtype):
    queries, gallery, ids = people(q, g, d, seed=q)
    # Signs, at lengths that are powers of two, are exact in any order of summation: every tie counts.
    queries, gallery = (torch.sign(rows).to(dtype) for rows in (queries, gallery))
    scores = cosine_reference(queries.float(), gallery.float())
    scores = (scores * d).round()
    result = rank_metrics(queries, gallery, *ids, protocol=protocol, backend="triton")
    assert result.backend == "triton"
    check_metrics(result, scores, ids, protocol)


@interpreted
def test_metrics_of_real_features(monkeypatch):
    from kernels import ranking_triton

    queries, gallery, ids = people(33, 500, 48, seed=2, num_ids=40)
    ids[0][5] = 999
    result = rank_metrics(queries, gallery, *ids, backend="triton")
    assert result.backend == "triton" and result.num_skipped >= 1
    check_metrics(result, cosine(queries, gallery), ids)
    assert len(rank_metrics_reference(cosine(queries, gallery), *ids)[5]) == 0
    # Of some queries after the others, as where all matches would not fit.
    monkeypatch.setattr(ranking_triton, "PAIR_LIMIT", 40)
    some = rank_metrics(queries, gallery, *ids, backend="triton")
    assert torch.equal(some.cmc, result.cmc) and some.mAP == result.mAP and some.num_skipped == result.num_skipped


@interpreted
@pytest.mark.parametrize("weight, compat", [(0.3, None), (0.0, None), (1.0, None), (0.3, "torchreid")])
def test_reranking(weight, compat):
    queries, gallery, ids = people(12, 150, 16, seed=7, num_ids=15)
    options = {"k1": 12, "k2": 4, "lambda_value": weight, "compat": compat}
    result = k_reciprocal_rerank(queries, gallery, backend="triton", **options)
    dense = result.dense()
    want = k_reciprocal_rerank_reference(queries.double(), gallery.double(), 12, 4, weight, compat)
    torch.testing.assert_close(dense.double(), want, rtol=0, atol=3e-6)
    metrics = result.metrics(*ids)
    assert result.backend == metrics.backend == "triton"
    check_metrics(metrics, -dense, ids)


@interpreted
def test_more_neighbours_than_registers_hold_is_an_error():
    features = torch.randn(100, 8)
    with pytest.raises(ValueError, match="at most 64"):
        cosine_topk(features, features, 65, backend="triton")
    with pytest.raises(ValueError, match="at most 64"):
        k_reciprocal_rerank(features, features, k1=64, backend="triton")
    with pytest.raises(ValueError, match="needs backend='torch'"):
        labels = torch.arange(100)
        rank_metrics(features, features, labels, labels, labels, labels + 1, protocol="cuhk03", backend="triton")


@interpreted
def test_places_beyond_int32():
    from kernels.jaccard import SparseRows
    from kernels.jaccard_triton import add_overlaps_triton

    # 46,400 squared does not fit int32. Only the pages that are touched exist.
    side = 46_400
    try:
        shared = torch.empty(side * side, dtype=torch.int32).view(side, side)
    except RuntimeError as error:
        pytest.skip(f"no address space for {side} x {side} integers: {error}")
    rows, others = torch.tensor([0, side - 1]), torch.tensor([3, side - 2])
    shared[rows[:, None], others] = 0
    inverted = SparseRows(torch.tensor([0, 2]), others, torch.tensor([7, 11], dtype=torch.int32))
    add_overlaps_triton(shared, rows, torch.tensor([0, 0]), torch.tensor([9, 5], dtype=torch.int32), inverted)
    assert shared[rows[:, None], others].tolist() == [[7, 9], [5, 5]]


@interpreted
@pytest.mark.parametrize("operation", ["cosine_topk", "rank_metrics"])
def test_the_faster_path_is_measured_once(operation, tmp_path, caplog, monkeypatch):
    """Both paths run; only the clock is not that of the card."""
    monkeypatch.setattr(measured, "ROUNDS", 1)
    monkeypatch.setattr(measured, "LEAST_PRODUCTS", 0)
    features, file, calls = torch.zeros(20, 12), tmp_path / "cache" / "kernels.json", []

    def clock(fast):
        def seconds(call):
            call()
            calls.append(fast)
            return 1.0 if (len(calls) % 2 == 0) == (fast == "triton") else 2.0

        return seconds

    def never(call):
        raise AssertionError("measured again")

    choose = functools.partial(measured.faster, operation, features, 30, 8, path=file)
    assert choose(clock=clock("triton")) == "triton" and len(calls) == 2 * measured.ROUNDS
    assert choose(clock=never) == "triton"
    # Another process reads the file.
    measured.KNOWN.clear()
    assert choose(clock=never) == "triton"
    ((key, entry),) = json.loads(file.read_text()).items()
    assert key.split(" | ")[0] == "cpu" and f"torch {torch.__version__}" in key and operation in key
    assert entry == {"path": "triton", "seconds": {"torch": 2.0, "triton": 1.0}}
    # Another type, another size, and what was damaged are measured again.
    half = functools.partial(measured.faster, operation, features.half(), 30, 8, path=file)
    assert half(clock=clock("torch")) == "torch"
    assert measured.faster(operation, features, 300, 8, path=file, clock=clock("torch")) == "torch"
    assert len(json.loads(file.read_text())) == 3 and choose(clock=never) == "triton"
    file.write_text("{damaged")
    measured.KNOWN.clear()
    assert choose(clock=clock("torch")) == "torch"
    assert not caplog.records and [path.name for path in file.parent.iterdir()] == ["kernels.json"]


@interpreted
def test_both_paths_of_reranking_are_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(measured, "ROUNDS", 1)
    monkeypatch.setattr(measured, "LEAST_PRODUCTS", 0)
    features, file, taken = torch.zeros(16, 8), tmp_path / "kernels.json", iter((2.0, 1.0))
    choice = measured.faster("k_reciprocal_rerank", features, 16, 8, path=file, clock=lambda call: next(taken))
    assert choice == "triton" and next(taken, None) is None


@interpreted
def test_a_kernel_that_fails_or_disagrees_is_not_taken(tmp_path, caplog, monkeypatch):
    features, file = torch.zeros(20, 12), tmp_path / "kernels.json"
    monkeypatch.setattr(measured, "LEAST_PRODUCTS", 0)
    # More neighbours than the kernel has registers for; and a card without memory for the sample or for a round.
    assert measured.faster("cosine_topk", features, 300, 100, path=file, clock=None) == "torch"
    assert "triton failed (ValueError: " in caplog.text and "at most 64 neighbours" in caplog.text

    def full(*given):
        raise torch.OutOfMemoryError("the card is full")

    assert measured.faster("cosine_topk", features, 60, 8, path=file, clock=full) == "torch"
    with monkeypatch.context() as patch:
        patch.setattr(measured, "sample_of", full)
        assert measured.faster("cosine_topk", features, 99, 8, path=file, clock=None) == "torch"
    assert "the sample failed (OutOfMemoryError: the card is full)" in caplog.text
    # The next process may have the memory.
    assert not file.exists() and len(caplog.records) == 3
    monkeypatch.setitem(measured.TOLERANCE, torch.float32, -1.0)
    assert measured.faster("cosine_topk", features, 30, 8, path=file, clock=None) == "torch"
    (entry,) = json.loads(file.read_text()).values()
    assert "results differ by" in entry["reason"]
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 4
    monkeypatch.undo()
    # Milliseconds of work are not measured.
    assert measured.faster("cosine_topk", features, 16, 8, path=file, clock=None) == "torch"
    # A folder that cannot be written to: the choice is made all the same.
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(measured, "LEAST_PRODUCTS", 0)
    path = tmp_path / "file" / "kernels.json"
    assert measured.faster("cosine_topk", features, 30, 8, path=path, clock=lambda call: 1.0) == "torch"
    assert "cannot be remembered" in caplog.text


@interpreted
def test_a_gallery_beyond_int32_is_no_work_for_triton():
    rows = torch.ones(1, 4).expand((1 << 31) + 1, 4)
    with pytest.raises(ValueError, match="number at most 2,147,483,647 gallery rows, there are 2,147,483,649"):
        cosine_topk(torch.ones(1, 4), rows, 2, backend="triton")
