"""The chains of benchmarks/robustness/chain.py, smaller still: every script opens what the one before it left."""

import importlib
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.robustness import chain
from tests.runs import ROOT, run
from utils.datasets.load import load_reid
from utils.modeling.reid_model import ReIDModel

STEPS = [(name, step) for name, steps in chain.CHAINS.items() for step in steps]


@pytest.mark.parametrize("name, step", STEPS, ids=[step.name for _, step in STEPS])
@pytest.mark.parametrize("small", [False, True])
def test_commands_are_understood(name, step, small, tmp_path):
    words = chain.command_of(step, tmp_path, small)
    args = importlib.import_module(words[0].removesuffix(".py")).parse_args(words[1:])
    assert args.output_dir == str(tmp_path / step.folder)
    before = [one.folder for one in chain.CHAINS[name][: chain.CHAINS[name].index(step)]]
    # What is read is what an earlier step writes.
    read = {Path(word).relative_to(tmp_path).parts[0] for word in words if word.startswith(str(tmp_path))}
    assert read <= {*before, step.folder}
    assert not small or len(words) > len(chain.command_of(step, tmp_path, False)) or words[0] == "evaluate.py"


@pytest.fixture(scope="module")
def chained(tmp_path_factory):
    """Both chains by the same words, in this process: a start of its own each would take longer than they do."""
    folder = tmp_path_factory.mktemp("chain")
    for name, step in STEPS:
        words = chain.command_of(step, folder / name, small=True)
        script = importlib.import_module(words[0].removesuffix(".py"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", words)
            result = run(script, *words[1:])
        assert words[0] == "evaluate.py" or not result, words
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


def test_every_step_leaves_a_page_and_no_half_written_file(chained):
    folders = {chained / name / step.folder for name, step in STEPS}
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
    step = chain.Step("one", "count.py --of {zero}/x", "")
    found = chain.run(step, tmp_path, False)
    assert chain.run(step, tmp_path, False) == found
    assert (tmp_path / "one" / "runs").read_text() == "x" and found["said"] == ["held 209715200"]
    assert found["command"] == "python count.py --of zero/x --output_dir one"
    # Memory is that of the step alone, not of this process.
    assert 0.19 < found["peak_gib"] < 0.4 and found["seconds"] >= found["cpu_seconds"] * 0.5
    with pytest.raises(ValueError, match="another chain, .* give another --output_dir"):
        chain.run(chain.Step("one", "count.py --more", ""), tmp_path, False)
    with pytest.raises(ValueError, match="count.py stopped with 1: no; the same command continues"):
        chain.run(chain.Step("two", "count.py --fail", ""), tmp_path, False)
    assert not (tmp_path / "steps" / "two.json").exists()


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
