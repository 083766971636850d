"""Calibrating a model with evaluate.py, and the decisions of its searches."""

import csv
import functools
import json
import shutil

import pytest
import torch

import evaluate
from tests import runs
from tests.reporting.test_reporting import Page
from tests.scripts.test_evaluate import folders_of_people
from utils.datasets.load import load_reid
from utils.evaluation.kept_features import load_features
from utils.evaluation.thresholds import pair_statistics
from utils.modeling.reid_model import ReIDModel

run = functools.partial(runs.run, evaluate)


@pytest.fixture(scope="module")
def calibrated(clip, tmp_path_factory):
    """A model folder with a calibration, the folder of the run that made it, and search folders of other people."""
    root = tmp_path_factory.mktemp("calibrated")
    model = shutil.copytree(clip, root / "model")
    run(
        "--model", model, "--resolution", 32, 16, "--data", "synthetic:domain=b,num_ids=26,images_per_id=5",
        "--calibrate", "--output_dir", root / "out", "--report_queries", 0,
    )  # fmt: skip
    search = folders_of_people(root, lambda pid, camid, number: f"{pid + 100:04d}_c{camid + 1}_{number}.png")
    return model, root / "out", ("--report_queries", 1, *search[:4], "--resolution", 32, 16)


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_labelled_run_writes_its_calibration_twice(calibrated):
    model, out, _ = calibrated
    content = read(out / "calibration.json")
    assert content == read(model / "calibration.json") and content["protocol"] == "market"
    sides = load_features(out / "features.safetensors")[0][0]
    limit = pair_statistics(*sides, rates=(0.1,)).thresholds["0.1"]
    entry = content["rates"]["0.1"]
    assert entry["threshold"] == pytest.approx(1 - limit["distance"] / 2, abs=1e-6)
    assert entry["right_match_rate"] == limit["true_match_rate"]
    assert "not measurable with 26 identities" in content["rates"]["0.001"]["reason"]
    assert len(content["camera_pairs"]) == 16
    # What was there before stays as it was.
    assert set(read(out / "metrics.json")["thresholds"]) == {"0.01", "0.001", "0.0001"}
    page = Page((out / "report.html").read_text())
    # The reasons stand below the table, which they would widen beyond the page.
    text = page.text[page.text.index("A score is the cosine of two images") :]
    assert "false-match rate 0.001not measurable–" in text
    assert text.index("Right results:") < text.index(
        "Two images: false-match rate 0.001: not measurable with 26 identi"
    )


def decided(calibrated, out, *more):
    metrics = run("--model", calibrated[0], *calibrated[2], "--output_dir", out, *more)
    with open(out / "decisions.csv", newline="", encoding="utf-8") as file:
        return metrics, list(csv.DictReader(file))


def test_a_search_with_a_calibrated_model_decides(calibrated, tmp_path, capsys):
    metrics, rows = decided(calibrated, tmp_path, "--false_alarm_rate", 0.4)
    said = capsys.readouterr().out
    counts = metrics["decisions"]
    assert len(rows) == metrics["num_queries"] == counts["yes"] + counts["unsure"] + counts["nobody"]
    (queries, gallery), *_ = load_features(tmp_path / "features.safetensors")[0]
    scores = queries.features @ gallery.features.T
    scores[(queries.pids[:, None] == gallery.pids) & (queries.camids[:, None] == gallery.camids)] = -1
    for row, name, best in zip(rows, queries.paths, scores.max(1).values, strict=True):
        assert row["query"] == name and float(row["score"]) == pytest.approx(float(best), abs=2e-6)
        assert 0 <= float(row["false_match_rate"]) <= 1 and (row["same_person"] == "nobody") == bool(row["miss_rate"])
        assert (row["same_person"] == "yes") == (float(row["false_alarm_rate"]) <= 0.4)
        assert f"{name}: " in said
    page = Page((tmp_path / "report.html").read_text())
    assert "same person: yes" in page.text or "nobody: no gallery image passes" in page.text
    right = counts["right"]
    counted = [
        f"{answer} ({right[answer]} right)".replace(answer, f"{answer} {counts[answer]}", 1) for answer in right
    ]
    assert f"Decisions of {len(rows)} queries: {', '.join(counted)}" in said
    text = " ".join(page.text.split())
    assert text.index("Decisions Is the nearest") < text.index("queries have a match to find")
    assert f"yesthe same person, within the accepted rate of false alarms{counts['yes']}{right['yes']} " in text


def test_a_gallery_without_the_person_asked_for(calibrated, tmp_path, capsys):
    """Nobody passes where no score reaches the calibrated ones."""
    content = read(calibrated[0] / "calibration.json")
    content["curve"]["false_alarm_rate"] = [1.0] * len(content["curve"]["score"])
    (tmp_path / "strict.json").write_text(json.dumps(content))
    metrics, rows = decided(calibrated, tmp_path / "out", "--calibration", tmp_path / "strict.json")
    assert {row["same_person"] for row in rows} == {"nobody"} and metrics["decisions"]["right"]["nobody"] == 0
    said = capsys.readouterr().out
    assert said.count("nobody: no gallery image passes") == min(len(rows), 20)
    assert "the best answer is 'unsure'" in said and "26 identities" in said


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda model: (model / "calibration.json").unlink(), "calibration.json does not exist"),
        (lambda model: (model / "calibration.json").write_text("{"), "calibration.json is damaged"),
        (None, "is of another model: its weights, image size or --camera_embeddings differ"),
    ],
)
def test_without_a_calibration_a_search_says_how_to_get_one(calibrated, spoil, words, tmp_path, capsys):
    model = shutil.copytree(calibrated[0], tmp_path / "model")
    resolution = (32, 16)
    if spoil:
        spoil(model)
    else:
        resolution = (48, 24)
    metrics = run("--model", model, *calibrated[2][:-2], *resolution, "--output_dir", tmp_path / "out")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("No decisions: ")]
    assert words in line and line.endswith(f"python evaluate.py --model {model} --data SPEC --calibrate")
    assert "decisions" not in metrics and not (tmp_path / "out" / "decisions.csv").exists()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--calibrate"], "--calibrate needs --model DIR and --data SPEC"),
        # Without data there is a demo of drawn people, by which nobody's searches are to decide.
        (["--calibrate", "--model", "."], "--calibrate needs --model DIR and --data SPEC"),
        (["--calibrate", "--model", "user/name", "--data", "viper"], "user/name is no folder to write to"),
        (["--calibrate", "--model", ".", "--query_dir", "a", "--gallery_dir", "b"], "images; leave out other inputs"),
        (["--calibration", "nowhere.json"], "nowhere.json: there is no such file"),
        (["--false_alarm_rate", "2"], "must"),
    ],
)
def test_flags_that_cannot_be(arguments, words, capsys):
    with pytest.raises(SystemExit):
        evaluate.parse_args(arguments)
    assert words in capsys.readouterr().err


def test_weights_make_the_fingerprint(calibrated):
    from utils.evaluation.calibration import fingerprint
    from utils.modeling.reid_model import ReIDModel

    model = ReIDModel.from_backbone(str(calibrated[0]), image_size=(32, 16))
    before = fingerprint(model)
    assert before == read(calibrated[0] / "calibration.json")["fingerprint"]
    with torch.no_grad():
        next(model.backbone.parameters()).add_(1e-3)
    assert fingerprint(model) != before


DRAWN = "synthetic:domain=b,num_ids=26,images_per_id=5"


@pytest.fixture
def model(clip, tmp_path):
    """A folder of a Re-ID model."""
    folder = tmp_path / "model"
    ReIDModel.from_backbone(clip, image_size=(32, 16)).save_pretrained(folder)
    return folder


@pytest.fixture
def people(tmp_path):
    """A folder of images to search for and in."""
    folder = tmp_path / "people"
    folder.mkdir()
    for number, row in enumerate(load_reid("synthetic", domain="a", num_ids=4)["query"]):
        row["image"].save(folder / f"{row['pid']:04d}_c{row['camid'] + 1}_{number}.png")
    return folder


def on_the_hub(cache, files, revision="0123abc"):
    """The files as a downloaded revision in the layout of the Hub's cache."""
    place = cache / "models--somebody--people"
    shutil.copytree(files, place / "snapshots" / revision)
    (place / "refs").mkdir(exist_ok=True)
    (place / "refs" / "main").write_text(revision)


def test_a_model_of_the_hub_brings_its_calibration_in_the_same_revision(tmp_path, monkeypatch, capsys, model, people):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    search = ("--model", "somebody/people", "--query_dir", people, "--gallery_dir", people, "--report_queries", 0)
    on_the_hub(tmp_path / "hub", model)
    found = run(*search, "--output_dir", tmp_path / "before")
    said = capsys.readouterr().out
    assert "decisions" not in found and "calibration.json does not exist" in said
    assert "--data SPEC --output_dir DIR, then search with --calibration DIR/calibration.json" in said

    run("--model", model, "--data", DRAWN, "--calibrate", "--output_dir", tmp_path / "made", "--report_queries", 0)
    said = capsys.readouterr().out
    assert f"Calibrated: {model}" in said and "the best answer is 'unsure'; calibrate with more identities" in said
    on_the_hub(tmp_path / "hub", model, "4567def")
    found = run(*search, "--output_dir", tmp_path / "after")
    assert sum(found["decisions"][answer] for answer in ("yes", "unsure", "nobody")) == len(list(people.iterdir()))
    # The calibration is that of the revision: an older one has none.
    (tmp_path / "hub" / "models--somebody--people" / "refs" / "main").write_text("0123abc")
    assert "decisions" not in run(*search, "--output_dir", tmp_path / "before")
