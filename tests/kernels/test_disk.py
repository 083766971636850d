"""Features on disk give the bits of those in memory, in blocks; damaged files are refused in one line."""

import pytest
import torch
from safetensors.torch import save_file

from kernels import cosine_topk, k_reciprocal_rerank, rank_metrics
from kernels.disk import rows as disk
from kernels.disk.rows import RowsOnDisk
from tests.kernels.test_ring import a_set, same


def on_disk(folder, features, name):
    """The rows in files of uneven length."""
    ends = sorted({0, len(features) // 3, len(features)})
    paths = [folder / f"{name}{start}.safetensors" for start in ends[:-1]]
    for path, start, stop in zip(paths, ends, ends[1:], strict=False):
        save_file({"features": features[start:stop].contiguous()}, path)
    return RowsOnDisk.open(paths)


@pytest.mark.parametrize("seed", [0, 1, 2, 5])
def test_features_on_disk_equal_those_in_memory(tmp_path, monkeypatch, seed):
    for module in ("kernels.disk.rows", "kernels.ring.processes"):
        monkeypatch.setattr(f"{module}.BLOCK_ROWS", 192)
    queries, gallery, *labels = a_set(seed)
    queries = queries.repeat(4, 1)
    labels[0], labels[2] = labels[0].repeat(4), labels[2].repeat(4)
    kept = [on_disk(tmp_path, features, name) for features, name in ((queries, "q"), (gallery, "g"))]
    assert torch.equal(kept[1][:], gallery) and torch.equal(kept[1][5:9], gallery[5:9])
    numbers = torch.randint(len(gallery), (20,))
    assert torch.equal(kept[1][numbers], gallery[numbers])
    k = min(9, len(gallery))
    for sides in (kept, (queries, kept[1]), (kept[0], gallery)):
        found, wanted = cosine_topk(*sides, k), cosine_topk(queries, gallery, k)
        assert torch.equal(found.scores, wanted.scores) and torch.equal(found.indices, wanted.indices)
        for protocol in ("market", "all", "cuhk03"):
            wanted = rank_metrics(queries, gallery, *labels, protocol=protocol)
            assert same(rank_metrics(*sides, *labels, protocol=protocol), wanted)


def test_bad_files_are_refused(tmp_path):
    gallery = torch.randn(300, 8)
    kept = on_disk(tmp_path, gallery, "g")
    queries = torch.randn(3, 8)
    with pytest.raises(ValueError, match=r"k must be between 1 and 300 \(the number of gallery rows\), got 301"):
        cosine_topk(queries, kept, 301)
    with pytest.raises(ValueError, match="queries and gallery have different widths: 7 and 8"):
        cosine_topk(queries[:, :7], kept, 3)
    with pytest.raises(ValueError, match="features on disk cannot be re-ranked or clustered"):
        k_reciprocal_rerank(queries, kept)
    gallery[250, 3] = torch.nan
    with pytest.raises(ValueError, match="1 of 300 rows of gallery are NaN or infinite: rows 250"):
        cosine_topk(queries, on_disk(tmp_path, gallery, "nan"), 3)
    path = tmp_path / "g100.safetensors"
    path.write_bytes(path.read_bytes()[:-64])
    with pytest.raises(ValueError, match="g100.safetensors cannot be read, it is missing, damaged or cut short"):
        RowsOnDisk.open([tmp_path / "g0.safetensors", path])
    save_file({"features": torch.randn(4, 9)}, tmp_path / "wide.safetensors")
    with pytest.raises(ValueError, match=r"file 1 holds torch.float32 of shape \(4, 9\), file 0 torch.float32 of"):
        RowsOnDisk.open([tmp_path / "g0.safetensors", tmp_path / "wide.safetensors"])
    assert disk.BLOCK_ROWS % 192 == 0
