"""The scripts on sets of one's own, as a new user has them: without query, gallery, numbers or cameras."""

import functools
import json

import pytest

import evaluate
import finetune_reid
import pretrain_backbone
import train_dcac
from tests import runs
from utils import synthetic
from utils.datasets.load import load_reid

NAMES = ("Anna", "Bert", "Chloe", "Dora", "Emil", "Fritz")
SMALL = ("--resolution", 64, 32, "--train_batch_size", 8, "--max_train_steps", 1, "--eval_every", 9)
measure = functools.partial(runs.run, evaluate)


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """Six drawn people, four images each, seen by two cameras: one folder each, and a table with names."""
    root = tmp_path_factory.mktemp("people")
    lines = ["file_name,pid,camid"]
    for pid, name in enumerate(NAMES):
        for number in range(4):
            path = root / "folders" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            synthetic.render("a", pid, number % 2, number).save(path)
            lines.append(f"{name}/{number}.png,{name},{('door', 'yard')[number % 2]}")
    (root / "folders.csv").write_text("\n".join(lines))
    return root


def test_evaluate_measures_all_images(people, clip, tmp_path, capsys):
    common = ("--model", clip, "--resolution", 64, 32, "--output_dir", tmp_path / "out")
    metrics = measure(*common, "--data", people / "folders")
    assert (metrics["num_queries"], metrics["num_gallery"], metrics["num_valid"]) == (6, 18, 6)
    said = capsys.readouterr().out
    assert "has no query and gallery: all 6 identities are measured, 6 images as queries (one in four" in said
    html = (tmp_path / "out/report.html").read_text()
    assert "identity Anna" in html and "identity 0" not in html
    assert measure(*common, "--data", f"{people / 'folders'}:holdout=1")["mAP"] == metrics["mAP"]
    held_out = measure(*common, "--data", f"{people / 'folders'}:holdout=0.5,holdout_seed=1")
    assert held_out["num_queries"] == 3


def test_evaluate_names_cameras(people, clip, tmp_path):
    (people / "folders" / "set.csv").write_text((people / "folders.csv").read_text())
    try:
        metrics = measure(
            *("--model", clip, "--resolution", 64, 32, "--data", people / "folders", "--output_dir", tmp_path / "out")
        )
    finally:
        (people / "folders" / "set.csv").unlink()
    assert (metrics["num_queries"], metrics["num_gallery"]) == (12, 12)
    assert metrics["camera_pairs"]["names"] == ["door", "yard"]
    html = (tmp_path / "out/report.html").read_text()
    assert "identity Chloe, camera yard" in html and ">door</th>" in html


@pytest.mark.parametrize("script, more", [(finetune_reid, ()), (train_dcac, ("--diffusion", "none"))])
def test_training_holds_identities_out(people, clip, tmp_path, capsys, script, more):
    folder, out = str(people / "folders"), tmp_path / "out"
    runs.run(script, "--source", folder, "--backbone", clip, *SMALL, *more, "--output_dir", out)
    target = f"{folder}:holdout=0.3"
    assert f"{folder}: 2 of 6 identities are held out of training and measured" in capsys.readouterr().out
    results = json.loads((out / "metrics.json").read_text())
    assert list(results["targets"]) == [target] and results["targets"][target]["num_valid"] == 2
    assert json.loads((out / "args.json").read_text())
    # The same identities, and the same numbers, for whoever evaluates the model later.
    again = measure("--model", out / "model", "--data", target, "--output_dir", tmp_path / "again")
    assert again["mAP"] == pytest.approx(results["targets"][target]["mAP"], abs=1e-6)
    num_trained = {"train": 16, "query": 2, "gallery": 6}
    assert {split: len(part) for split, part in load_reid(target).items()} == num_trained


def test_training_on_all_identities(people, clip, tmp_path, capsys):
    common = ("--backbone", clip, *SMALL, "--output_dir", tmp_path / "out")
    runs.run(finetune_reid, "--source", people / "folders", *common, "--holdout", 0)
    said = capsys.readouterr().out
    assert "24 of 24 images, 6 identities; measured on nothing" in said and "held out" not in said


def test_dino_takes_a_folder_of_images(people, tmp_path, capsys):
    plain = tmp_path / "plain" / "monday" / "noon"
    plain.mkdir(parents=True)
    for number, path in enumerate(sorted((people / "folders").rglob("*.png"))):
        (plain / f"{number}.png").write_bytes(path.read_bytes())
    common = ("--train_batch_size", 8, "--max_train_steps", 1, "--output_dir", tmp_path / "out")
    dino = ("--objective", "dino", "--local_crops", 1, "--prototypes", 8, "--head_width", 16)
    for folder in (plain, tmp_path / "plain"):
        runs.run(pretrain_backbone, "--source", folder, *dino, *common, "--resolution", 64, 32)
        assert f"{folder}: 24 images without labels" in capsys.readouterr().out
    # A table that names no identities is as good.
    lines = ["file_name", *(path.name for path in plain.iterdir())]
    refused = runs.refused(pretrain_backbone, "--source", plain, *common)
    (plain / "list.csv").write_text("\n".join(lines))
    runs.run(pretrain_backbone, "--source", plain, *dino, *common, "--resolution", 64, 32)
    assert f"{plain}: 24 images without labels" in capsys.readouterr().out
    assert "without identities" in refused and "--objective dino" in refused
