"""The comparison of starts: one loop of runs, resumable, its table from the runs' own numbers."""

import json
import subprocess
import sys

import pytest

from benchmarks import starts

SPEC = "synthetic:domain=b,num_ids=8,images_per_id=4"


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """Stands in for the scripts, which have tests of their own: writes what they leave, and lists the calls."""
    calls = []

    def run(command, **options):
        folder = starts.Path(command[command.index("--output_dir") + 1])
        calls.append(command[1:])
        seed = int(command[command.index("--seed") + 1])
        better = 0.2 if "new" in command[command.index("--backbone") + 1] else 0.0
        history = [
            {"epoch": epoch, "target": SPEC, "mAP": 0.3 + better + 0.1 * epoch + 0.02 * seed, "rank1": 0.5 + better}
            for epoch in range(3)
        ]
        (folder / "model").mkdir(parents=True)
        (folder / "model" / "model.safetensors").touch()
        (folder / "args.json").write_text(json.dumps({"command": command[1:]}))
        (folder / "metrics.json").write_text(json.dumps({"history": history}))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(starts.subprocess, "run", run)
    monkeypatch.setattr(starts, "environment", lambda: {})
    return calls


def arguments(tmp_path, *more):
    return [
        "--starts", "old=base/old", "new=base/new", "--settings", "few-shot:0.1", "supervised", "--seeds", "0", "1",
        "--epochs", "2", "--output_dir", str(tmp_path / "out"), "--json", str(tmp_path / "starts.json"), *more,
    ]  # fmt: skip


def test_every_pair_runs_once_with_the_same_part_and_seed(runs, tmp_path, capsys):
    starts.main(arguments(tmp_path))
    assert len(runs) == 8
    for command in runs:
        assert command[0] == "finetune_reid.py"
        values = dict(zip(command[1::2], command[2::2], strict=False))
        assert values["--seed"] == values["--fraction_seed"] and values["--eval_every"] == "1"
        assert ("--fraction" in values) == (values["--setting"] == "few-shot")
    content = json.loads((tmp_path / "starts.json").read_text())
    # Seeds 0 and 1 end at 50 and 52 %, the better start at 20 points more.
    assert content["table"][0] == ["few-shot:0.1", "mAP %", "51.0 ± 1.4", "71.0 ± 1.4", "+20.0 ± 0.0"]
    assert content["table"][3] == ["supervised", "Rank-1 %", "50.0 ± 0.0", "70.0 ± 0.0", "+20.0 ± 0.0"]
    assert "few-shot:0.1" in capsys.readouterr().out
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("mAP of both starts") == 2 and "old, 0: 31.0 %" in page.replace("</title>", "")
    # Again: nothing is run twice.
    starts.main(arguments(tmp_path))
    assert len(runs) == 8
    with pytest.raises(ValueError, match="holds a run of .* give another --output_dir"):
        starts.main(arguments(tmp_path, "--epochs", "3"))


def test_a_run_that_fails_stops_the_loop(monkeypatch, tmp_path):
    monkeypatch.setattr(starts.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1))
    with pytest.raises(SystemExit, match="finetune_reid.py stopped"):
        starts.main(arguments(tmp_path))


def test_two_different_names_are_needed(capsys):
    with pytest.raises(SystemExit):
        starts.parse_args(["--starts", "one=a", "one=b"])
    assert "different names" in capsys.readouterr().err


@pytest.mark.slow
def test_the_whole_comparison(tmp_path):
    command = [
        sys.executable, "-m", "benchmarks.starts", "--output_dir", str(tmp_path / "out"), "--json",
        str(tmp_path / "starts.json"), "--seeds", "0", "--epochs", "2", "--settings", "small-scale:0.5",
        "--source", SPEC,
        "--pretrain", "--source synthetic:domain=a,num_ids=16 --backbone resnet-small --num_train_epochs 2",
        "--finetune", "--train_batch_size 8 --lr_milestones 9",
    ]  # fmt: skip
    subprocess.run(command, check=True, cwd=starts.ROOT)
    content = json.loads((tmp_path / "starts.json").read_text())
    assert [one["start"] for one in content["runs"]] == ["scratch", "pretrained"]
    first, second = (one["history"] for one in content["runs"])
    assert [one["epoch"] for one in first] == [0, 1, 2] and first[0] != second[0]
