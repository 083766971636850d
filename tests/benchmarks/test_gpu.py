"""The one call that measures a GPU: what it needs, what it names, and that its parts run."""

import json

import pytest
import torch

from benchmarks import gpu


def test_a_gpu_is_asked_for(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "there is no GPU here; --small" in capsys.readouterr().err


def test_gpu_parts_without_time_are_named(tmp_path, capsys):
    with pytest.raises(SystemExit, match="retrieval, dcac_step did not end well"):
        gpu.main(["--small", "--parts", "retrieval", "dcac_step", "--limit", "0", "--json_dir", str(tmp_path)])
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert {name: one["ended"] for name, one in found["raw"]["parts"].items()} == dict.fromkeys(
        ("retrieval", "dcac_step"), "no time left"
    )
    assert str(tmp_path) not in (tmp_path / "gpu.json").read_text()


def test_gpu_parts_whose_loss_is_none_are_found():
    rows = {"ours": {"ms": 3.0, "loss": 5.1, "peak": None}, "paper": {"loss": None}}
    assert gpu.lost({"batches": [{"lora": rows}]}) == ["/batches/0/lora/paper/loss"]


@pytest.mark.slow
def test_gpu_parts_run_small(tmp_path):
    gpu.main(["--small", "--json_dir", str(tmp_path)])
    parts = json.loads((tmp_path / "gpu.json").read_text())["raw"]["parts"]
    assert {one["ended"] for one in parts.values()} == {"done"} and list(parts) == list(gpu.PARTS)
