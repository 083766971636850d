"""Agreement with torchreid's own functions, where it is installed."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from kernels import k_reciprocal_rerank, rank_metrics
from tests.kernels.test_kernels import cosine, people


def peer_file(path):
    """One file of torchreid: the package itself wants a dozen others."""
    found = importlib.util.find_spec("torchreid")
    if found is None:
        pytest.skip("torchreid is not installed")
    file = Path(found.submodule_search_locations[0]) / "reid" / path
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_metrics_agree_with_torchreid():
    rank = peer_file("metrics/rank.py")
    queries, gallery, ids = people(60, 900, 32, seed=0, num_ids=30)
    distance = (2 - 2 * cosine(queries, gallery)).numpy()
    arrays = [array.numpy() for array in ids]
    cmc, mean = rank.evaluate_rank(distance, *arrays, max_rank=50, use_cython=False)
    ours = rank_metrics(queries, gallery, *ids)
    assert ours.backend == "torch"
    assert ours.mAP == pytest.approx(float(mean), abs=1e-6)
    np.testing.assert_allclose(ours.cmc.numpy(), cmc, atol=1e-6)


@pytest.mark.parametrize("compat", [None, "torchreid"])
def test_reranking_agrees_with_torchreid(compat):
    peer = peer_file("utils/rerank.py")
    queries, gallery, _ = people(40, 400, 32, seed=1, num_ids=30)
    parts = [(queries, gallery), (queries, queries), (gallery, gallery)]
    distances = [(2 - 2 * cosine(*pair)).clamp(min=0).numpy() for pair in parts]
    if compat is None:
        # The peer squares what it is given: the definition wants it squared once in all.
        distances = [np.sqrt(distance) for distance in distances]
    want = torch.from_numpy(peer.re_ranking(*distances, k1=20, k2=6, lambda_value=0.3))
    ours = k_reciprocal_rerank(queries, gallery, compat=compat)
    assert ours.backend == "torch"
    torch.testing.assert_close(ours.dense().double(), want.double(), rtol=0, atol=3e-5)
