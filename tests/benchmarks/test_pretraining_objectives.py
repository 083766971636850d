"""The table of objectives: every run once with arguments that its script accepts, its numbers those of the runs."""

import importlib
import json
from pathlib import Path

import pytest

from benchmarks.quality import pretraining_objectives as objectives


@pytest.fixture
def calls(monkeypatch):
    """Stands in for the scripts, which have tests of their own: writes what they leave, and lists the calls."""
    calls = []

    def run(script, folder, words, done):
        if (folder / done).exists():
            return
        calls.append((script, words))
        args = importlib.import_module(script.removesuffix(".py")).parse_args(words)
        (folder / done).parent.mkdir(parents=True)
        (folder / done).touch()
        history = [{"epoch": epoch, "mAP": 0.2 + 0.01 * epoch + 0.02 * args.seed, "rank1": 0.5} for epoch in (0, 10)]
        (folder / "metrics.json").write_text(json.dumps({"history": history}))

    monkeypatch.setattr(objectives, "run", run)
    monkeypatch.setattr(objectives, "stored", lambda folder, domain: f"stored/{domain}")
    return calls


def test_table_of_all_starts(calls, tmp_path, capsys):
    arguments = ["--seeds", "0", "1", "--output_dir", str(tmp_path / "out"), "--json", str(tmp_path / "a.json")]
    objectives.main(arguments)
    pretrained = [words for script, words in calls if script == "pretrain_backbone.py"]
    trained = [words for script, words in calls if script == "finetune_reid.py"]
    # The start is made once, and SOLIDER is pre-trained once for its three weights.
    assert len(pretrained) == 1 + 2 * 3 and len(trained) == 2 * 7
    for number, words in enumerate(pretrained):
        assert words[words.index("--source") + 1 :] == [f"stored/{domain}" for domain in ("bcde" if number else "fgh")]
        assert number == 0 or words[words.index("--backbone") + 1] == str(tmp_path / "out" / "start" / "backbone")
    starts = [Path(words[words.index("--backbone") + 1]) for words in trained[:7]]
    names = ["identities", "dino", "solider", "solider", "solider"]
    names = ["random-0", "start", *(f"pretrain-{name}-0" for name in names)]
    assert [start.name if start.name != "backbone" else start.parent.name for start in starts] == names
    weights = [words[words.index("--semantic_weight") + 1] for words in trained if "--semantic_weight" in words]
    assert weights == ["0.0", "1.0"] * 2
    content = json.loads((tmp_path / "a.json").read_text())
    assert [row[0] for row in content["table"]] == objectives.STARTS and content["columns"] == objectives.COLUMNS
    assert all(row[1:] == ["21.0 ± 1.4", "31.0 ± 1.4", "50.0 ± 0.0"] for row in content["table"])
    before = len(calls)
    objectives.main(arguments)
    assert len(calls) == before and "SOLIDER, weight 1.0" in capsys.readouterr().out
