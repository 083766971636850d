"""The tables of adaptation: every run once, its numbers those of the runs' own files."""

import importlib
import json
from pathlib import Path

import pytest

from benchmarks.quality import adaptation
from utils.datasets.load import load_reid


@pytest.fixture
def runs(monkeypatch):
    """Stands in for the scripts, which have tests of their own: writes what they leave, and lists the calls."""
    calls = []

    def run(script, folder, words, done):
        if (folder / done).exists():
            return
        calls.append((script, words))
        importlib.import_module(script.removesuffix(".py")).parse_args(words)
        (folder / done).parent.mkdir(parents=True)
        (folder / done).touch()
        (folder / "args.json").touch()
        if script == "pretrain_backbone.py":
            return
        seed = int(words[words.index("--seed") + 1])
        cut = words.index("--target") + 1
        targets = [word for word in words[cut : cut + 2] if word.startswith("stored")]
        history = [
            {"epoch": epoch, "target": target, "mAP": 0.2 + 0.1 * epoch + 0.02 * seed, "rank1": 0.5, "rank5": 1}
            for epoch in range(3)
            for target in targets
        ]
        (folder / "metrics.json").write_text(json.dumps({"history": history}))
        if script == "adapt_reid.py":
            records = [{"epoch": epoch, "clusters": 9, "noise": 0.1, "ari": 0.3 * epoch} for epoch in range(3)]
            (folder / "clusters.json").write_text(json.dumps(records))
        if "idm" in words and seed:
            (folder / adaptation.COLLAPSED).touch()

    monkeypatch.setattr(adaptation, "run", run)
    monkeypatch.setattr(adaptation, "stored", lambda folder, domain: f"stored/{domain}")
    return calls


def test_table_of_all_runs(runs, tmp_path, capsys):
    arguments = ["--seeds", "0", "1", "--output_dir", str(tmp_path / "out"), "--json", str(tmp_path / "a.json")]
    adaptation.main(arguments)
    trainings = [words for name, words in runs if name != "pretrain_backbone.py"]
    assert len(trainings) == 2 * 2 * len(adaptation.RUNS) and len(runs) == len(trainings) + 1
    for words in trainings:
        start = Path(words[words.index("--backbone") + 1])
        seed = words[words.index("--seed") + 1]
        assert start.name == f"random-{seed}" or start.parts[-2:] == ("pretrain", "backbone")
    content = json.loads((tmp_path / "a.json").read_text())
    rows = {tuple(row[:3]): row[3:] for row in content["table"]}
    assert len(rows) == 2 * (len(adaptation.RUNS) + 2)
    for (_, name, target), row in rows.items():
        assert row[:3] == ["21.0 ± 1.4", "41.0 ± 1.4", "50.0 ± 0.0"] and target in ("b", "d", "e")
        assert row[3] == ("60.0 ± 0.0" if "SpCL" in name or "IDM" in name or "contrast" in name else "-")
    assert ("pre-trained", "a's labels and b, IDM (1 of 2 collapsed)", "b") in rows
    one = content["raw"]["runs"][1]
    assert one["training"] == "b, cluster contrast" and one["clusters"][2]["ari"] == 0.6
    assert [entry["epoch"] for entry in one["targets"]["b"]] == [0, 1, 2]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "mAP on d, pre-trained" in page and "ARI of the clusters, random weights" in page
    # Once more: nothing is run again, the table is the same.
    before = len(runs)
    adaptation.main(arguments)
    assert len(runs) == before and json.loads((tmp_path / "a.json").read_text())["table"] == content["table"]


def test_people_are_drawn_once_at_the_size_of_training(tmp_path, monkeypatch):
    monkeypatch.setattr(adaptation, "DOMAINS", {"b": (4, 4), "h": (3, 4)})
    place = adaptation.stored(tmp_path, "b")
    data, drawn = load_reid(place), load_reid("synthetic:domain=b,num_ids=4,images_per_id=4")
    assert {split: data[split]["path"][:] for split in data} == {split: drawn[split]["path"][:] for split in drawn}
    assert data["train"][3]["image"].size == (32, 64) and data["train"][3]["domain"] == "synthetic-b"
    monkeypatch.setattr(adaptation, "load_reid", None)
    assert adaptation.stored(tmp_path, "b") == place
    monkeypatch.undo()
    monkeypatch.setattr(adaptation, "DOMAINS", {"h": (3, 4)})
    assert list(load_reid(adaptation.stored(tmp_path, "h"))) == ["train"]


def test_a_folder_of_another_run_is_refused(tmp_path):
    folder = tmp_path / "x"
    folder.mkdir()
    (folder / "args.json").write_text(json.dumps({"command": ["adapt_reid.py", "--seed", "1"]}))
    with pytest.raises(ValueError, match="x holds a run of other arguments"):
        adaptation.run("adapt_reid.py", folder, ["--seed", "2"], "model/model.safetensors")


@pytest.mark.slow
def test_clusters_that_collapse_are_a_result(tmp_path, capsys):
    """A run of its own that ends with the script's one line; anything else that goes wrong stops the whole."""
    target = ["--target", "synthetic:domain=b,num_ids=4,images_per_id=4", "--cluster_k1", "6", "--eps", "0.001"]
    small = ["--resolution", "32", "16", "--train_batch_size", "4", "--images_per_id", "2", "--min_samples", "6"]
    for _ in range(2):
        adaptation.run("adapt_reid.py", tmp_path / "x", [*target, *small], "model/model.safetensors")
    said = (tmp_path / "x" / "collapsed.txt").read_text()
    assert "are in no cluster" in said and capsys.readouterr().out.count("adapt_reid.py x") == 1
    found = adaptation.found_in(tmp_path / "x", "pre-trained", "b, SpCL", 0)
    assert found["collapsed"] and len(next(iter(found["targets"].values()))) == 1
    with pytest.raises(
        ValueError, match="adapt_reid.py stopped: .*cannot be clustered by their --cluster_k1 16 nearest"
    ):
        adaptation.run(
            "adapt_reid.py", tmp_path / "y", [*target, *small, "--cluster_k1", "16"], "model/model.safetensors"
        )
