"""The table of generalisation: every run once, its numbers those of the runs' own files."""

import importlib
import json
from pathlib import Path

import pytest

from benchmarks.quality import generalisation
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

    monkeypatch.setattr(generalisation, "run", run)
    monkeypatch.setattr(generalisation, "stored", lambda folder, domain: f"stored/{domain}")
    return calls


def test_table_of_all_runs(runs, tmp_path, capsys):
    arguments = ["--seeds", "0", "1", "--output_dir", str(tmp_path / "out"), "--json", str(tmp_path / "a.json")]
    generalisation.main(arguments)
    trainings = [words for name, words in runs if name != "pretrain_backbone.py"]
    assert len(trainings) == 2 * 2 * len(generalisation.RUNS) and len(runs) == len(trainings) + 1
    for words in trainings:
        start = Path(words[words.index("--backbone") + 1])
        seed = words[words.index("--seed") + 1]
        assert start.name == f"random-{seed}" or start.parts[-2:] == ("pretrain", "backbone")
    content = json.loads((tmp_path / "a.json").read_text())
    rows = {tuple(row[:3]): row[3:] for row in content["table"]}
    # Three are measured on two domains.
    assert len(rows) == 2 * (len(generalisation.RUNS) + 3)
    assert {target for *_, target in rows} == {"b", "d", "e"}
    assert all(row == ["21.0 ± 1.4", "41.0 ± 1.4", "50.0 ± 0.0"] for row in rows.values())
    one = content["raw"]["runs"][1]
    assert one["training"] == "labels of b" and [entry["epoch"] for entry in one["targets"]["b"]] == [0, 1, 2]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "mAP on d, pre-trained" in page and "mAP on b, random weights" in page
    # Once more: nothing is run again, the table is the same.
    before = len(runs)
    generalisation.main(arguments)
    assert len(runs) == before and json.loads((tmp_path / "a.json").read_text())["table"] == content["table"]


def test_people_are_drawn_once_at_the_size_of_training(tmp_path, monkeypatch):
    monkeypatch.setattr(generalisation, "DOMAINS", {"b": (4, 4), "h": (3, 4)})
    place = generalisation.stored(tmp_path, "b")
    data, drawn = load_reid(place), load_reid("synthetic:domain=b,num_ids=4,images_per_id=4")
    assert {split: data[split]["path"][:] for split in data} == {split: drawn[split]["path"][:] for split in drawn}
    assert data["train"][3]["image"].size == (32, 64) and data["train"][3]["domain"] == "synthetic-b"
    monkeypatch.setattr(generalisation, "load_reid", None)
    assert generalisation.stored(tmp_path, "b") == place
    monkeypatch.undo()
    monkeypatch.setattr(generalisation, "DOMAINS", {"h": (3, 4)})
    assert list(load_reid(generalisation.stored(tmp_path, "h"))) == ["train"]


def test_a_folder_of_another_run_is_refused(tmp_path):
    folder = tmp_path / "x"
    folder.mkdir()
    (folder / "args.json").write_text(
        json.dumps({"command": ["finetune_reid.py", "--seed", "1"], "versions": {"git": None}})
    )
    with pytest.raises(ValueError, match="x holds a run of other arguments"):
        generalisation.run("finetune_reid.py", folder, ["--seed", "2"], "model/model.safetensors")
