"""The chains of benchmarks/robustness/chain.py, smaller still: every script opens what the one before it left."""

import csv
import importlib
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.robustness import chain, outcomes
from tests.runs import ROOT, run
from utils.datasets.load import load_reid
from utils.modeling.reid_model import ReIDModel

STEPS = [(name, step) for name, steps in chain.CHAINS.items() for step in steps]


@pytest.mark.parametrize("name, step", STEPS, ids=[step.name for _, step in STEPS])
@pytest.mark.parametrize("small", [False, True])
def test_commands_are_understood(name, step, small, tmp_path):
    words = chain.command_of(step, tmp_path, small)
    # --calibrate asks for the model's folder at once.
    (tmp_path / "finetune" / "model").mkdir(parents=True)
    if words[0] != "-m":
        args = importlib.import_module(words[0].removesuffix(".py")).parse_args(words[1:])
        assert args.output_dir == str(tmp_path / step.folder)
    before = [one.folder for one in chain.CHAINS[name][: chain.CHAINS[name].index(step)]]
    # What is read is what an earlier step writes.
    read = {Path(word).relative_to(tmp_path).parts[0] for word in words if word.startswith(str(tmp_path))}
    assert read <= {*before, step.folder}
    assert len(words) == len(chain.command_of(step, tmp_path, False)) + len(shlex.split(step.small)) * small


@pytest.fixture(scope="module")
def chained(tmp_path_factory):
    """All chains by the same words, in this process: a start of its own each would take longer than they do."""
    folder = tmp_path_factory.mktemp("chain")
    came_out = {}
    for name, step in STEPS:
        words = chain.command_of(step, folder / name, small=True)
        if words[0] == "-m":
            importlib.import_module(f"{words[1]}.__main__").main(words[2:])
        else:
            script = importlib.import_module(words[0].removesuffix(".py"))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", words)
                result = run(script, *words[1:])
            assert words[0] == "evaluate.py" or not result, words
        came_out[f"{name}/{step.name}"] = step.outcome(folder / name, folder / name / step.folder, True)
    (folder / "came_out.json").write_text(json.dumps(came_out))
    return folder


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


def test_from_captions_to_numbers(chained):
    folder = chained / "generation"
    generated, kept = load_reid(str(folder / "captions"))["train"], load_reid(str(folder / "filter/dataset"))["train"]
    assert len(generated) == 16 and 0 < len(kept) <= 13
    assert set(kept["pid"][:]) <= set(generated["pid"][:]) and set(kept["domain"][:]) == {"synthetic-a"}
    # The few-shot run starts from the weights that were pre-trained.
    recorded = json.loads((folder / "finetune" / "args.json").read_text())["arguments"]
    assert recorded["backbone"] == str(folder / "pretrain" / "backbone")
    metrics = metrics_of(folder / "evaluate")
    assert 0 < metrics["mAP"] <= 1 and 0 < metrics["reranked"]["mAP"] <= 1
    assert metrics["model"] == str(folder / "finetune" / "model")
    (trained,) = metrics_of(folder / "finetune")["targets"].values()
    # The same model on the same people, by the training's own measurement and from the disk.
    assert metrics["mAP"] == pytest.approx(trained["mAP"], abs=1e-4)


def test_from_one_domain_to_others(chained):
    folder = chained / "generalisation"
    (told,) = metrics_of(folder / "dcac")["targets"].values()
    assert metrics_of(folder / "unseen-b")["mAP"] == pytest.approx(told["mAP"], abs=1e-4)
    assert metrics_of(folder / "unseen-c")["mAP"] != metrics_of(folder / "unseen-b")["mAP"]
    history = metrics_of(folder / "adapted-b")["history"]
    assert history[0]["epoch"] == 0 and history[0]["mAP"] == pytest.approx(told["mAP"], abs=1e-4)
    assert ReIDModel.from_pretrained(folder / "adapted-b" / "model", num_ids=0).image_size == (128, 64)


def test_from_an_own_folder_to_identities(chained):
    """The model, its calibration and its decisions are of the same people from step to step."""
    folder = chained / "own-folder"
    assert len(list((folder / "own" / "people" / "anna").iterdir())) == 6
    ((spec, trained),) = metrics_of(folder / "finetune")["targets"].items()
    assert spec.endswith("own/people:holdout=0.5") and trained["num_valid"] == 24
    names = {split: set(part["pid"][:]) for split, part in load_reid(str(folder / "held-out")).items()}
    assert len(names["train"]) == len(names["query"]) == 8 and not names["train"] & names["query"]
    with open(folder / "search" / "decisions.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["query"] for row in rows] == sorted(path.name for path in (folder / "own" / "wanted").iterdir())
    # Each third of those who are looked for is not in the gallery.
    there = {path.name[:4] for path in (folder / "own" / "camera2").iterdir()}
    assert [name for name in ("0016", "0017", "0018", "0019", "0020", "0021") if name not in there] == ["0018", "0021"]
    with open(folder / "groups" / "identities.csv", newline="", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 10 * 4


def test_what_came_out_is_said_in_a_number(chained):
    came_out = json.loads((chained / "came_out.json").read_text())
    assert came_out.keys() == {f"{name}/{step.name}" for name, step in STEPS}
    assert came_out["own-folder/draw"] == "96 images of 16 people to train on, 6 wanted"
    assert came_out["own-folder/hold-out"] == "8 identities to train on, 8 held out"
    metrics = metrics_of(chained / "own-folder" / "calibrate")
    assert came_out["own-folder/calibrate"] == f"mAP {100 * metrics['mAP']:.1f} %"
    counts = metrics_of(chained / "own-folder" / "search")["decisions"]
    assert came_out["own-folder/search"].startswith(f"yes {counts['yes']} ({counts['right']['yes']} right), unsure ")
    assert came_out["own-folder/groups"].startswith("40 tracklets of 10 people in ")


@pytest.mark.parametrize(
    "place, file, change, words",
    [
        (
            "own-folder/finetune",
            "metrics.json",
            lambda content: content["history"][-1].update(mAP=0.01),
            "the training lost",
        ),
        (
            "own-folder/finetune",
            "metrics.json",
            lambda content: content["history"][-1].update(num_valid=3),
            "24 were held out",
        ),
        ("own-folder/calibrate", "metrics.json", lambda content: content.update(mAP=0.5), "at the end of"),
        (
            "own-folder/calibrate",
            "calibration.json",
            lambda content: content.update(protocol="x"),
            "another calibration",
        ),
        (
            "own-folder/search",
            "metrics.json",
            lambda content: content["decisions"].update(yes=4),
            "metrics.json differ",
        ),
        ("own-folder/groups", "groups.json", lambda content: content["truth"].update(ari=0.01), "that of chance"),
        ("generalisation/unseen-b", "metrics.json", lambda content: content.update(mAP=0.5), "at the end of"),
    ],
)
def test_a_result_that_cannot_be_right_stops_the_chain(chained, place, file, change, words):
    name, step = next((name, step) for name, step in STEPS if f"{name}/{step.name}" == place)
    path = chained / name / step.folder / file
    before = path.read_text()
    content = json.loads(before)
    change(content)
    path.write_text(json.dumps(content))
    try:
        with pytest.raises(ValueError, match=words):
            step.outcome(chained / name, path.parent, False)
    finally:
        path.write_text(before)


def test_a_file_that_is_missing_and_a_number_that_is_none(chained, tmp_path):
    for outcome in (outcomes.captioned, outcomes.filtered, outcomes.improved, outcomes.grouped):
        with pytest.raises(ValueError, match="is not there"):
            outcome(chained, tmp_path, False)
    for value in (0.0, 1.5, float("nan"), None):
        with pytest.raises(ValueError, match=f"mAP is {value}, not a share"):
            outcomes.share_of(value, "mAP")


def test_every_step_leaves_a_page_and_no_half_written_file(chained):
    folders = {chained / name / step.folder for name, step in STEPS if step.output == "--output_dir"}
    for folder in folders:
        assert (folder / "report.html").read_text().rstrip().endswith("</html>")
        assert (folder / "args.json").is_file()
        assert [path for path in folder.rglob("*") if path.name.endswith(".part") or path.name == ".work"] == []


def test_a_step_is_run_once_and_an_other_chain_is_refused(tmp_path, monkeypatch):
    (tmp_path / "count.py").write_text(
        "import sys\nfrom pathlib import Path\nfolder = Path(sys.argv[sys.argv.index('--output_dir') + 1])\n"
        "folder.mkdir(exist_ok=True)\nruns = folder / 'runs'\nruns.write_text(runs.read_text() + 'x' if runs.exists() "
        "else 'x')\nheld = bytearray(200 << 20)\nprint('held', len(held))\nsys.exit('--fail' in sys.argv and 'no')\n"
    )
    monkeypatch.setattr(chain, "ROOT", tmp_path)

    def runs_of(chain, folder, small):
        return (folder / "runs").read_text()

    step = chain.Step("one", "count.py --of {zero}/x", "", runs_of)
    found = chain.run(step, tmp_path, False)
    assert chain.run(step, tmp_path, False) == found
    assert (tmp_path / "one" / "runs").read_text() == "x" and found["said"] == ["held 209715200"]
    assert found["outcome"] == "x"
    assert found["command"] == "python count.py --of zero/x --output_dir one"
    # Memory is that of the step alone, not of this process.
    assert 0.19 < found["peak_gib"] < 0.4 and found["seconds"] >= found["cpu_seconds"] * 0.5
    with pytest.raises(ValueError, match="another chain, .* give another --output_dir"):
        chain.run(chain.Step("one", "count.py --more", "", runs_of), tmp_path, False)
    with pytest.raises(ValueError, match="count.py stopped with 1: no; the same command continues"):
        chain.run(chain.Step("two", "count.py --fail", "", runs_of), tmp_path, False)
    assert not (tmp_path / "steps" / "two.json").exists()

    def refuse(chain, folder, small):
        raise ValueError("nonsense")

    with pytest.raises(ValueError, match="nonsense"):
        chain.run(chain.Step("three", "count.py", "", refuse), tmp_path, False)
    assert not (tmp_path / "steps" / "three.json").exists()


@pytest.mark.slow
def test_the_command(tmp_path):
    command = shlex.split("-m benchmarks.robustness.chain --small --output_dir") + [
        str(tmp_path),
        "--json",
        str(tmp_path / "c"),
    ]
    subprocess.run([sys.executable, *command], check=True, cwd=ROOT)
    found = json.loads((tmp_path / "c").read_text())
    assert [row[1] for row in found["table"]] == [step.name for _, step in STEPS]
    assert all(one["peak_gib"] > 0.2 for steps in found["raw"]["chains"].values() for one in steps)
