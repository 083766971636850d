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
    # Each seed has a start of its own; SOLIDER is pre-trained once for its three weights.
    assert len(pretrained) == 2 * (1 + 3) and len(trained) == 2 * 7
    for number, words in enumerate(pretrained):
        seed, objective = divmod(number, 4)
        first = objective == 0
        assert words[words.index("--seed") + 1] == str(seed)
        assert words[words.index("--source") + 1 :] == [f"stored/{domain}" for domain in ("fgh" if first else "bcde")]
        backbone = str(tmp_path / "out" / f"start-{seed}" / "backbone")
        assert words[words.index("--backbone") + 1] == (objectives.BACKBONE if first else backbone)
    starts = [Path(words[words.index("--backbone") + 1]) for words in trained[:7]]
    names = ["identities", "dino", "solider", "solider", "solider"]
    names = ["random-0", "start-0", *(f"pretrain-{name}-0" for name in names)]
    assert [start.name if start.name != "backbone" else start.parent.name for start in starts] == names
    weights = [words[words.index("--semantic_weight") + 1] for words in trained if "--semantic_weight" in words]
    assert weights == ["0.0", "1.0"] * 2
    content = json.loads((tmp_path / "a.json").read_text())
    assert [row[0] for row in content["table"]] == objectives.STARTS and content["columns"] == objectives.COLUMNS
    assert all(row[1:4] == ["21.0 ± 1.4", "31.0 ± 1.4", "50.0 ± 0.0"] for row in content["table"])
    assert [row[4] for row in content["table"]] == ["-", "-", *["+0.0 ± 0.0"] * 5]
    before = len(calls)
    objectives.main(arguments)
    assert len(calls) == before and "SOLIDER, weight 1.0" in capsys.readouterr().out


def test_gains_are_over_the_start_of_the_same_seed():
    ends = {objectives.NO_MORE: (0.1, 0.5), objectives.DINO: (0.3, 0.6), objectives.RANDOM: (0.05, 0.05)}
    runs = [
        {"start": start, "seed": seed, "history": [{"mAP": 0.0, "rank1": 0.0}, {"mAP": end, "rank1": 0.0}]}
        for start, pair in ends.items()
        for seed, end in enumerate(pair)
    ]
    assert [row[-1] for row in objectives.rows_of(runs, list(ends))] == ["-", "+15.0 ± 7.1", "-"]
    assert objectives.rows_of(runs[2:], [objectives.DINO])[0][-1] == "-"
