"""The benchmark of labels: each method's own clustering and labels run, and are timed."""

import pytest
import torch

from benchmarks.speed import labels


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# CaCL's distances between domains take longer.
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "cacl" else name for name in labels.NAMES]
)
def test_labels_of_each_method(name, monkeypatch):
    monkeypatch.setattr(labels, "GROUPS", (24, 28, 32))
    found = labels.measure(name, 600)
    assert 0 < found["clustering"] <= found["seconds"] and found["peak_gib"] < 1
    (row,) = labels.rows_of({"images": 600, "methods": {name: found}})
    assert row[:2] == [name, "600"] and len(row) == len(labels.COLUMNS)
