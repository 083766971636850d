"""The comparison of starts: one loop of runs, resumable, its table from the runs' own numbers."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from benchmarks import common
from benchmarks.common import revision
from benchmarks.quality import starts
from utils.datasets.load import load_reid

SPEC = "synthetic:domain=b,num_ids=8,images_per_id=4"


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """Stands in for the scripts, which have tests of their own: writes what they leave, and lists the calls."""
    calls = []

    def run(script, *command, logs):
        folder = Path(command[command.index("--output_dir") + 1])
        calls.append([script, *command])
        if script == "pretrain_backbone.py":
            (folder / "backbone").mkdir(parents=True)
            (folder / "backbone" / "model.safetensors").touch()
            return common.Run(0, "", "", 1.0, 1.0, 0.5)
        seed = int(command[command.index("--seed") + 1])
        backbone = command[command.index("--backbone") + 1]
        better = 0.2 if "new" in backbone or backbone.endswith("out/pretrain/backbone") else 0.0
        history = [
            {"epoch": epoch, "target": SPEC, "mAP": 0.3 + better + 0.1 * epoch + 0.02 * seed, "rank1": 0.5 + better}
            for epoch in range(3)
        ]
        assert logs == folder / "logs"
        (folder / "model").mkdir(parents=True)
        (folder / "model" / "model.safetensors").touch()
        (folder / "args.json").write_text(json.dumps({"command": [script, *command], "versions": {"git": revision()}}))
        (folder / "metrics.json").write_text(json.dumps({"history": history}))
        return common.Run(0, "", "", 1.0, 1.0, 0.5)

    monkeypatch.setattr(common, "run_script", run)
    return calls


def arguments(tmp_path, *more):
    return [
        "--starts", "old=base/old", "new=base/new", "--settings", "few-shot:0.1@30", "supervised", "--seeds", "0", "1",
        "--epochs", "2", "--source", "base/b", "--output_dir", str(tmp_path / "out"), "--json",
        str(tmp_path / "starts.json"), *more,
    ]  # fmt: skip


def test_every_pair_runs_once_with_the_same_part_and_seed(runs, tmp_path, capsys):
    starts.main(arguments(tmp_path))
    assert len(runs) == 8
    for command in runs:
        assert command[0] == "finetune_reid.py"
        values = dict(zip(command[1::2], command[2::2], strict=False))
        few = values["--setting"] == "few-shot"
        assert values["--seed"] == values["--fraction_seed"] and values["--source"] == "base/b"
        assert values["--num_train_epochs"] == ("30" if few else "2")
        assert values["--eval_every"] == ("4" if few else "1")
        assert values.get("--fraction") == ("0.1" if few else None)
    content = json.loads((tmp_path / "starts.json").read_text())
    # Seeds 0 and 1 end at 50 and 52 %, the better start at 20 points more.
    assert content["table"][0] == ["few-shot:0.1", "mAP %", "51.0 ± 1.4", "71.0 ± 1.4", "+20.0 ± 0.0"]
    assert content["table"][3] == ["supervised", "Rank-1 %", "50.0 ± 0.0", "70.0 ± 0.0", "+20.0 ± 0.0"]
    assert "few-shot:0.1" in capsys.readouterr().out
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("mAP of all starts") == 2 and "old, 0: 31.0 %" in page.replace("</title>", "")
    # Again: nothing is run twice.
    starts.main(arguments(tmp_path))
    assert len(runs) == 8
    with pytest.raises(ValueError, match="holds a run of .* give another --output_dir"):
        starts.main(arguments(tmp_path, "--epochs", "3"))


def test_scales_are_pretrained_on_shares_and_give_two_curves(runs, tmp_path):
    common = ["--settings", "few-shot:0.1@30", "--seeds", "0", "1", "--source", "base/b", "--eval_every", "1"]
    common += ["--pretrain", "--backbone resnet-small --source people", "--output_dir", str(tmp_path / "out")]
    common += ["--json", str(tmp_path / "scales.json"), "--scales", "1", "0.25", "0.5"]
    starts.main(common)
    shares = [command[command.index("people") + 1 : -4] for command in runs if command[0] == "pretrain_backbone.py"]
    flags = [["--image_fraction", "0.25"], ["--identity_fraction", "0.25"]]
    flags += [["--image_fraction", "0.5"], ["--identity_fraction", "0.5"], []]
    assert shares == flags and len(runs) == 5 + 2 * 5
    assert all(command[command.index("--eval_every") + 1] == "1" for command in runs[5:])
    content = json.loads((tmp_path / "scales.json").read_text())
    assert content["columns"] == ["setting", "number", "share", "of the images", "of the identities"]
    assert content["table"][0] == ["few-shot:0.1", "mAP %", "25 %", "51.0 ± 1.4", "51.0 ± 1.4"]
    assert content["table"][2] == ["few-shot:0.1", "mAP %", "100 %", "71.0 ± 1.4", "71.0 ± 1.4"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "share of the images, 25: 51.0 %" in page and "share of the identities, 100: 71.0 %" in page
    # Again: nothing is run twice.
    starts.main(common)
    assert len(runs) == 15


def test_a_run_that_fails_stops_the_loop(monkeypatch, tmp_path):
    ended = common.Run(1, "", "warning\nno such model\n", 1.0, 1.0, 0.5)
    monkeypatch.setattr(common, "run_script", lambda *words, logs: ended)
    with pytest.raises(ValueError, match="finetune_reid.py stopped: no such model; the same command continues"):
        starts.main(arguments(tmp_path))


def test_drawn_people_are_a_generated_set(monkeypatch, tmp_path):
    for name, value in {"DOMAINS": "ac", "NUM_IDS": 3, "IMAGES_PER_ID": 2}.items():
        monkeypatch.setattr(starts, name, value)
    starts.draw_people(tmp_path / "people")
    train = load_reid(str(tmp_path / "people"))["train"]
    assert len(train) == 12 and set(train["domain"]) == {"synthetic-a", "synthetic-c"}
    people = set(zip(train["domain"], train["pid"], strict=True))
    assert len(people) == 6 and all(pid % 2 == 0 for _, pid in people)
    table = pq.read_table(tmp_path / "people" / "metadata.parquet").to_pydict()
    assert all(table["synthetic"])
    with Image.open(tmp_path / "people" / table["path"][0]) as picture:
        assert '"synthetic": true' in picture.getexif()[0x010E] and picture.size == (64, 128)
    assert [path.name for path in tmp_path.iterdir()] == ["people"]


def test_two_different_names_are_needed(capsys):
    with pytest.raises(SystemExit):
        starts.parse_args(["--starts", "one=a", "one=b"])
    assert "different names" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        starts.parse_args(["--starts", "one=a", "two=b", "--scales", "0.5"])
    assert "--scales pre-trains its own starts" in capsys.readouterr().err


@pytest.mark.slow
def test_the_whole_comparison(tmp_path):
    command = [
        sys.executable, "-m", "benchmarks.quality.starts", "--output_dir", str(tmp_path / "out"), "--json",
        str(tmp_path / "starts.json"), "--seeds", "0", "--epochs", "2", "--settings", "small-scale:0.5",
        "--source", SPEC,
        "--pretrain", "--source synthetic:domain=a,num_ids=16 --backbone resnet-small --num_train_epochs 2",
        "--finetune", "--train_batch_size 8 --lr_milestones 9",
    ]  # fmt: skip
    subprocess.run(command, check=True, cwd=common.ROOT)
    content = json.loads((tmp_path / "starts.json").read_text())
    assert [one["start"] for one in content["raw"]["runs"]] == ["scratch", "pretrained"]
    first, second = (one["history"] for one in content["raw"]["runs"])
    assert [one["epoch"] for one in first] == [0, 1, 2] and first[0] != second[0]
