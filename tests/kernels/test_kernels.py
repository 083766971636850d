"""Retrieval on torch: every value against dense float64 references written from the definitions."""

import subprocess
import sys

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from kernels import cosine_topk, dispatch, k_reciprocal_rerank, measured, rank_metrics
from kernels.counting import match_ranks, ranks_by_sorting
from kernels.jaccard import k_reciprocal_vectors
from kernels.neighbours import self_neighbours_reference, strip_neighbours, symmetric_neighbours
from kernels.ranking import rank_metrics_reference
from kernels.reranking import k_reciprocal_rerank_reference
from kernels.tiles import cosine_reference, unit_rows
from kernels.topk import cosine_topk_reference

SWAP = 2e-6


def people(num_queries, num_gallery, depth, seed, num_ids=6, num_cams=3, spread=1.0):
    """Clustered features and labels; some gallery items have pid -1."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(num_ids, depth, generator=generator)
    pids = torch.randint(0, num_ids, (num_queries + num_gallery,), generator=generator)
    features = centres[pids] + spread * torch.randn(len(pids), depth, generator=generator)
    pids[num_queries:][torch.rand(num_gallery, generator=generator) < 0.1] = -1
    cams = torch.randint(0, num_cams, (len(pids),), generator=generator)
    cut = num_queries
    return features[:cut], features[cut:], (pids[:cut], pids[cut:], cams[:cut], cams[cut:])


def cosine(queries, gallery):
    return cosine_reference(queries.double(), gallery.double())


def check_order(values, got, count):
    """The first `count` of each row, allowing places to change only within the rounding of float32."""
    want = values.sort(dim=1, descending=True).values[:, :count]
    torch.testing.assert_close(values.gather(1, got), want, rtol=0, atol=SWAP)
    assert all(len(set(row)) == count for row in got.tolist())


def check_metrics(result, scores, ids, protocol="market", max_rank=50):
    """All fields against the ranks that sorting gives."""
    ranks = rank_metrics_reference(scores, *ids, protocol=protocol)
    cmc, aps, inps = torch.zeros(max_rank, dtype=torch.float64), [], []
    for query, found in enumerate(ranks):
        if len(found) == 0:
            assert torch.isnan(result.ap[query]) and torch.isnan(result.inp[query])
            assert result.first_match[query] == -1
            continue
        found = found.double()
        aps.append(float((torch.arange(1, len(found) + 1) / found).mean()))
        inps.append(float(len(found) / found[-1]))
        cmc[int(found[0]) - 1 :] += 1
        assert result.ap[query].item() == pytest.approx(aps[-1], abs=1e-12)
        assert result.inp[query].item() == pytest.approx(inps[-1], abs=1e-12)
        assert result.first_match[query] == found[0]
    assert (result.num_valid, result.num_skipped) == (len(aps), len(ranks) - len(aps))
    assert result.mAP == pytest.approx(sum(aps) / len(aps), abs=1e-12)
    assert result.mINP == pytest.approx(sum(inps) / len(inps), abs=1e-12)
    torch.testing.assert_close(result.cmc, cmc / len(aps), rtol=0, atol=1e-12)


def distinct(scores):
    """Whether no two scores of a row are so close that float32 may order them otherwise."""
    ordered = scores.sort(dim=1).values
    return bool((ordered[:, 1:] - ordered[:, :-1]).min() > SWAP) if scores.shape[1] > 1 else True


@pytest.mark.parametrize("q, g, d, k", [(1, 1, 1, 1), (3, 37, 5, 37), (65, 1001, 96, 7), (130, 5000, 33, 50)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_topk_matches_the_reference(q, g, d, k, dtype):
    queries, gallery, _ = people(q, g, d, seed=q)
    queries, gallery = queries.to(dtype), gallery.to(dtype)
    result = cosine_topk(queries, gallery, k)
    scores, indices = result
    assert result.backend == "torch" and scores.dtype == torch.float32 and indices.dtype == torch.int64
    want, _ = cosine_topk_reference(queries.double(), gallery.double(), k)
    torch.testing.assert_close(scores.double(), want, rtol=0, atol=2e-6)
    check_order(cosine(queries, gallery), indices, k)


@pytest.mark.parametrize("g, k", [(40, 40), (3000, 5), (20000, 64)])
def test_equal_rows_come_by_index(g, k):
    gallery = torch.randn(1, 24, generator=torch.Generator().manual_seed(3)).repeat(g, 1)
    result = cosine_topk(torch.randn(3, 24), gallery, k)
    assert result.backend == "torch"
    assert result.indices.equal(torch.arange(k).expand(3, k))
    assert (result.scores == result.scores[:, :1]).all()


def test_duplicates_keep_their_order_wherever_they_lie():
    for depth in (1, 7, 16, 100, 512):
        queries, gallery, _ = people(5, 900, depth, seed=depth)
        gallery[torch.arange(0, 900, 9)] = gallery[0].clone()
        for row in cosine_topk(queries, gallery, 900).indices:
            places = row[row % 9 == 0]
            assert places.equal(places.sort().values)


def test_strided_features_and_lengths_change_nothing():
    queries, gallery, ids = people(9, 70, 24, seed=1)
    want = cosine_topk(queries, gallery, 9)
    strided = torch.stack([gallery, gallery], dim=2)[..., 0].t().contiguous().t()
    assert not strided.is_contiguous()
    got = cosine_topk(queries * 1e20, strided * 1e-20, 9)
    assert got.backend == "torch" and got.indices.equal(want.indices)
    check_metrics(rank_metrics(queries, strided, *ids), cosine(queries, gallery), ids)


@pytest.mark.parametrize("protocol", ["market", "all"])
@pytest.mark.parametrize("q, g, d", [(4, 9, 4), (37, 301, 16), (70, 2500, 48)])
def test_metrics_match_the_reference(q, g, d, protocol):
    queries, gallery, ids = people(q, g, d, seed=g)
    result = rank_metrics(queries, gallery, *ids, protocol=protocol)
    assert result.backend == "torch"
    check_metrics(result, unit_scores(queries, gallery), ids, protocol)


def unit_scores(queries, gallery):
    """Similarities as the torch path computes them, so that ties and near ties are the same numbers."""
    units, others = unit_rows(("queries", queries)), unit_rows(("gallery", gallery))
    return (units @ others.t())[: len(queries), : len(gallery)]


@given(
    seed=st.integers(0, 10**6), q=st.integers(1, 9), g=st.integers(1, 60), d=st.integers(1, 9), coarse=st.booleans()
)
def test_metrics_of_random_sets(seed, q, g, d, coarse):
    queries, gallery, ids = people(q, g, d, seed, num_ids=4)
    if coarse:
        # Few distinct rows: ties everywhere, and exact in any order of summation.
        queries, gallery = (torch.sign(rows) for rows in (queries, gallery))
        scores = unit_scores(queries, gallery)
    else:
        scores = cosine(queries, gallery)
        if not distinct(scores):
            scores = unit_scores(queries, gallery)
    if not any(len(ranks) for ranks in rank_metrics_reference(scores, *ids)):
        with pytest.raises(ValueError, match="no query identity appears in the gallery"):
            rank_metrics(queries, gallery, *ids)
        return
    result = rank_metrics(queries, gallery, *ids, max_rank=10)
    assert result.backend == "torch"
    check_metrics(result, scores, ids, max_rank=10)


@given(
    seed=st.integers(0, 10**6),
    q=st.integers(1, 6),
    g=st.integers(1, 30),
    k1=st.integers(0, 40),
    k2=st.integers(0, 8),
    weight=st.sampled_from([0.0, 0.3, 1.0]),
    compat=st.sampled_from([None, "torchreid"]),
)
@example(seed=0, q=3, g=20, k1=0, k2=3, weight=0.3, compat=None)
@example(seed=0, q=3, g=20, k1=0, k2=0, weight=0.0, compat="torchreid")
def test_reranking_of_random_sets(seed, q, g, k1, k2, weight, compat):
    queries, gallery, _ = people(q, g, 12, seed)
    everything = torch.cat([queries, gallery])
    assume(distinct(cosine(everything, everything)))
    result = k_reciprocal_rerank(queries, gallery, k1=k1, k2=k2, lambda_value=weight, compat=compat)
    assert result.backend == "torch"
    want = k_reciprocal_rerank_reference(queries.double(), gallery.double(), k1, k2, weight, compat)
    torch.testing.assert_close(result.dense().double(), want, rtol=0, atol=3e-6)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_reranking_gives_one_set_of_values(weight):
    queries, gallery, ids = people(40, 700, 24, seed=5, num_ids=20)
    gallery[100:110] = gallery[3]
    result = k_reciprocal_rerank(queries, gallery, lambda_value=weight)
    dense = result.dense()
    want, order = dense.sort(dim=1, stable=True)
    for k in (1, 10, 700):
        best = result.topk(k)
        assert best.backend == "torch"
        assert best.indices.equal(order[:, :k]) and (-best.scores).equal(want[:, :k])
    metrics = result.metrics(*ids, max_rank=20)
    assert metrics.backend == "torch"
    check_metrics(metrics, -dense, ids, max_rank=20)


def test_reranking_of_identical_features():
    for rows in (torch.ones(30, 8), torch.randn(1, 8).repeat(30, 1)):
        dense = k_reciprocal_rerank(rows[:4], rows[4:], k1=5, k2=3).dense()
        want = k_reciprocal_rerank_reference(rows[:4].double(), rows[4:].double(), 5, 3)
        torch.testing.assert_close(dense.double(), want, rtol=0, atol=1e-6)


def test_neighbour_vectors_are_those_of_the_definition():
    features, _, _ = people(150, 1, 16, seed=2)
    rows = k_reciprocal_vectors(features, k1=10, k2=4)
    dense = rows.to_dense(150).double()
    torch.testing.assert_close(dense.sum(1), torch.ones(150, dtype=torch.float64), rtol=0, atol=1e-6)
    overlap = torch.minimum(dense[:, None], dense[None]).sum(-1)
    want = k_reciprocal_rerank_reference(features[:20].double(), features[20:].double(), 10, 4, 0.0)
    torch.testing.assert_close((1 - overlap / (2 - overlap))[:20, 20:], want, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "rows, depth, k, tile", [(1000, 16, 8, (64, 128)), (777, 7, 8, (64, 64)), (65, 4, 21, (64, 128))]
)
def test_half_of_the_tiles_finds_the_same_neighbours(rows, depth, k, tile):
    features, _, _ = people(rows, 1, depth, seed=rows)
    features[rows // 3 : rows // 2] = features[1]
    units = unit_rows(("features", features))
    got, want = symmetric_neighbours(units, rows, k, *tile), strip_neighbours(units, rows, k)
    assert got.indices.equal(want.indices) and got.lowest.equal(want.lowest)
    scores = cosine(features, features)
    lowest = self_neighbours_reference(features.double(), k).lowest
    torch.testing.assert_close(got.lowest.double(), lowest, rtol=0, atol=2e-6)
    check_order(scores.fill_diagonal_(torch.inf), got.indices, k)


def test_ranks_by_counting_equal_ranks_by_sorting():
    generator = torch.Generator().manual_seed(0)
    for levels in (2, 50, 10**6):
        strip = torch.randint(-levels, levels, (20, 640), generator=generator).float() / levels
        rows, columns = (torch.rand(20, 640, generator=generator) < 0.03).nonzero().unbind(1)
        got = match_ranks(strip, rows, columns, torch.empty(20, 640, dtype=torch.bool))
        want = ranks_by_sorting(strip, rows, columns)
        assert got[0].equal(want[0]) and got[1].equal(want[1])


def test_cuhk03_draws_one_image_of_each_identity():
    queries, gallery, ids = people(30, 400, 16, seed=8, num_ids=15)
    result = rank_metrics(queries, gallery, *ids, protocol="cuhk03", max_rank=10)
    market = rank_metrics(queries, gallery, *ids, max_rank=10)
    assert result.backend == "torch" and result.mAP == market.mAP
    assert result.cmc.equal(rank_metrics(queries, gallery, *ids, protocol="cuhk03", max_rank=10).cmc)
    assert not result.cmc.equal(rank_metrics(queries, gallery, *ids, protocol="cuhk03", max_rank=10, seed=1).cmc)
    assert (result.cmc[1:] >= result.cmc[:-1]).all() and 0 < result.cmc[0] <= 1
    # Where every identity has one image there is nothing to draw.
    single = torch.arange(6)
    alone = rank_metrics(queries[:6], gallery[:6], single, single, [0] * 6, [1] * 6, protocol="cuhk03")
    plain = rank_metrics(queries[:6], gallery[:6], single, single, [0] * 6, [1] * 6)
    torch.testing.assert_close(alone.cmc, plain.cmc, rtol=0, atol=1e-12)


def test_cuhk03_draws_each_image_from_its_own_identity():
    """All images of B are nearer than any of A, and all of C farther: in every draw A is second."""
    cosines = torch.tensor([0.5, 0.9, 0.1, 0.5, 0.9, 0.5, 0.9, 0.1, 0.9, 0.1])
    gallery = torch.stack([cosines, (1 - cosines**2).sqrt()], dim=1)
    pids = torch.tensor([1, 2, 3, 1, 2, 1, 2, 3, 2, 3])
    ids = torch.tensor([1]), pids, torch.tensor([0]), torch.ones(10, dtype=torch.int64)
    for seed in range(20):
        result = rank_metrics(torch.tensor([[1.0, 0.0]]), gallery, *ids, protocol="cuhk03", max_rank=3, seed=seed)
        assert result.cmc.tolist() == pytest.approx([0, 1, 1])


def test_float64_is_computed_in_float64():
    queries, gallery, ids = people(10, 200, 16, seed=4)
    queries, gallery = queries.double(), gallery.double()
    check_metrics(rank_metrics(queries, gallery, *ids), cosine(queries, gallery), ids)
    dense = k_reciprocal_rerank(queries, gallery, k1=8).dense()
    want = k_reciprocal_rerank_reference(queries, gallery, 8)
    torch.testing.assert_close(dense.double(), want, rtol=0, atol=1e-6)
    # As numpy makes it unasked, for one of the two.
    want = cosine_topk(queries.float().double(), gallery, 7)
    found = cosine_topk(queries.float(), gallery, 7)
    assert found.scores.equal(want.scores) and found.indices.equal(want.indices)
    check_metrics(rank_metrics(queries, gallery.float(), *ids), cosine(queries, gallery.float().double()), ids)


FINE = torch.eye(4)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: cosine_topk(FINE, torch.ones(3, 5), 1), "different widths: 4 and 5"),
        (lambda: cosine_topk(FINE, torch.ones(0, 4), 1), "gallery is empty"),
        (lambda: cosine_topk(torch.ones(0, 4), FINE, 1), "queries is empty"),
        (lambda: cosine_topk(FINE, FINE, 5), "k must be between 1 and 4"),
        (lambda: cosine_topk(FINE, FINE, 0), "k must be between 1 and 4"),
        (lambda: cosine_topk(FINE, FINE, 1.5), "whole number"),
        (lambda: cosine_topk(FINE.numpy(), FINE, 1), "torch tensor"),
        (lambda: cosine_topk(FINE.long(), FINE, 1), "float32, float16, bfloat16 or float64"),
        (lambda: cosine_topk(FINE, FINE, 1, backend="cuda"), "backend must be one of"),
        (lambda: cosine_topk(FINE.double(), FINE.double(), 1, backend="triton"), "not float64"),
        (lambda: cosine_topk(FINE, FINE * torch.tensor([[1.0], [0], [1], [0]]), 1), "gallery are all zero: rows 1, 3"),
        (lambda: cosine_topk(FINE.clone().fill_(torch.nan), FINE, 1), "queries are NaN or infinite: rows 0, 1"),
        (lambda: cosine_topk(FINE, FINE + torch.inf, 1), "gallery are NaN or infinite"),
        (lambda: rank_metrics(FINE, FINE, [0] * 3, [0] * 4, [0] * 4, [1] * 4), "query_pids must hold one number"),
        (lambda: rank_metrics(FINE, FINE, [0] * 4, [0] * 4, [0] * 4, [1] * 5), "gallery_cams must hold one number"),
        (lambda: rank_metrics(FINE, FINE, [0.5] * 4, [0] * 4, [0] * 4, [1] * 4), "query_pids must be integers"),
        (lambda: rank_metrics(FINE, FINE, [0] * 4, [0] * 4, None, None), "needs query_cams"),
        (lambda: rank_metrics(FINE, FINE, [0] * 4, [0] * 4, [0] * 4, [1] * 4, protocol="x"), "protocol must be one"),
        (lambda: rank_metrics(FINE, FINE, [0] * 4, [0] * 4, [0] * 4, [1] * 4, max_rank=0), "max_rank must be"),
        (lambda: rank_metrics(FINE, FINE, [3] * 4, [8] * 4, [0] * 4, [1] * 4), r"Query pids \[3\], cameras \[0\]"),
        (lambda: rank_metrics(FINE, FINE, [-1] * 4, [-1] * 4, [0] * 4, [1] * 4), "no query identity"),
        (lambda: k_reciprocal_rerank(FINE, FINE, k1=-1), "k1 must be at least 0"),
        (lambda: k_reciprocal_rerank(FINE, FINE, k2=-1), "k2 must be at least 0"),
        (lambda: k_reciprocal_rerank(FINE, FINE, lambda_value=1.01), "between 0 and 1"),
        (lambda: k_reciprocal_rerank(FINE, FINE, lambda_value=float("nan")), "between 0 and 1"),
        (lambda: k_reciprocal_rerank(FINE, FINE, compat="fast-reid"), "compat must be"),
        (lambda: k_reciprocal_rerank(FINE, FINE).topk(5), "k must be between 1 and 4"),
        (lambda: k_reciprocal_rerank(FINE, FINE).metrics([3] * 4, [8] * 4, [0] * 4, [1] * 4), "no query identity"),
    ],
)
def test_bad_input_says_what_was_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_precision_settings_of_others_move_nothing():
    queries, gallery, _ = people(20, 500, 64, seed=6)
    want = cosine_topk(queries, gallery, 20)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        got = cosine_topk(queries, gallery, 20)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert got.scores.equal(want.scores) and got.indices.equal(want.indices)


def test_features_with_a_gradient_are_only_read():
    queries, gallery, ids = people(6, 80, 16, seed=9)
    want = rank_metrics(queries, gallery, *ids)
    got = rank_metrics(queries.clone().requires_grad_(), gallery, *ids)
    assert got.backend == "torch" and got.mAP == want.mAP
    dense = k_reciprocal_rerank(queries.clone().requires_grad_(), gallery, k1=6).dense()
    assert dense.equal(k_reciprocal_rerank(queries, gallery, k1=6).dense())


def test_imports_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None; import torch; from kernels import cosine_topk\n"
        "eye = torch.eye(3)\n"
        "assert cosine_topk(eye, eye, 1).backend == 'torch'\n"
        "try: cosine_topk(eye, eye, 1, backend='triton')\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "triton is not installed" in done.stdout


@pytest.mark.slow
def test_more_rows_than_int32_products_hold():
    features = torch.nn.functional.normalize(torch.randn(47_000, 8, generator=torch.Generator().manual_seed(0)))
    found = symmetric_neighbours(unit_rows(("features", features)), 47_000, 5)
    some = torch.tensor([0, 1, 46_340, 46_341, 46_342, 46_999])
    check_order((features[some].double() @ features.double().t()).index_put(
        (torch.arange(6), some), torch.tensor(torch.inf, dtype=torch.float64)), found.indices[some], 5)  # fmt: skip


def test_the_environment_names_the_path(monkeypatch):
    eye = torch.eye(4)
    monkeypatch.setenv("DIFFREID_KERNELS", "torch")
    assert cosine_topk(eye, eye, 2).backend == "torch"
    monkeypatch.setenv("DIFFREID_KERNELS", "cuda")
    with pytest.raises(ValueError, match="DIFFREID_KERNELS must be one of auto, torch, triton, got 'cuda'"):
        cosine_topk(eye, eye, 2)
    monkeypatch.setenv("DIFFREID_KERNELS", "triton")
    with pytest.raises(ValueError, match="DIFFREID_KERNELS=triton cannot run here: "):
        rank_metrics(eye, eye, [1] * 4, [1] * 4, None, None, protocol="all")
    # An argument wins.
    assert cosine_topk(eye, eye, 2, backend="torch").backend == "torch"


@pytest.mark.parametrize(
    "shape, columns, k, wanted",
    [
        ((3_368, 512), 15_913, 50, ["4096", "16384", "512", "64"]),
        ((11_659, 2048), 82_161, 20, ["4096", "32768", "2048", "32"]),
        ((1, 7), 1, 1, ["16", "16", "16", "16"]),
        ((1 << 16, 512), (1 << 31) + 5, 33, ["4096", "32768", "512", "64"]),
    ],
)
def test_work_of_one_size_shares_a_choice(shape, columns, k, wanted):
    assert measured.size_class("cosine_topk", shape, columns, k) == wanted


@pytest.mark.parametrize("place", ["backends", "cuda", "mkldnn"])
def test_reduced_precision_that_users_allow_changes_nothing(place):
    """By torch's newer settings, which its older functions do not stand; they are as before afterwards."""
    where = torch.backends if place == "backends" else getattr(torch.backends, place).matmul
    value = "bf16" if place == "mkldnn" else "tf32"
    features = torch.randn(30, 16, generator=torch.Generator().manual_seed(0))
    wanted = cosine_topk(features, features, 5)
    before, where.fp32_precision = where.fp32_precision, value
    try:
        found = cosine_topk(features, features, 5)
        assert where.fp32_precision == value
    finally:
        where.fp32_precision = before
    assert torch.equal(found.scores, wanted.scores) and torch.equal(found.indices, wanted.indices)


def test_one_side_in_float64_is_computed_in_float64(monkeypatch):
    """Triton's kernels know no float64, whichever side has it."""
    asked = []
    monkeypatch.setattr(dispatch, "triton_obstacle", lambda device, dtype: asked.append(dtype) or "none")
    features = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    pids = torch.arange(12) % 4
    for sides in ((features, features.double()), (features.double(), features)):
        asked.clear()
        cosine_topk(*sides, 3)
        rank_metrics(*sides, pids, pids, torch.zeros(12).long(), torch.ones(12).long())
        k_reciprocal_rerank(*sides, k1=4, k2=2)
        assert set(asked) == {torch.float64}
