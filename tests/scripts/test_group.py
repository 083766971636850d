"""evaluate.py --group_dir from folders to identities: files, numbers, the report, a second run, bad input."""

import csv
import functools
import json
import math

import pytest
from PIL import Image

import evaluate
from tests import runs
from tests.datasets.test_tracklets import put, sequence
from tests.evaluation.test_grouping import parts
from tests.reporting.test_reporting import Page
from tests.runs import launch
from utils.datasets.load import load_reid
from utils.evaluation.forget import forget
from utils.evaluation.groups import report as group_report
from utils.evaluation.groups.grouping import COLUMNS

run = functools.partial(runs.run, evaluate)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Tracklets of drawn people: one folder for each identity and camera."""
    folder = tmp_path_factory.mktemp("world")
    data = load_reid("synthetic", domain="b", num_ids=10)
    for split in ("query", "gallery"):
        for number, row in enumerate(data[split]):
            place = folder / f"{row['pid']:04d}_c{row['camid'] + 1}"
            place.mkdir(exist_ok=True)
            row["image"].save(place / f"{split}{number}.png")
    return folder


@pytest.fixture(scope="module")
def grouped(world, tmp_path_factory):
    """A run with the shipped stand-in: its folder and what it returned."""
    folder = tmp_path_factory.mktemp("grouped")
    return folder, run("--group_dir", world, "--output_dir", folder)


def read_identities(folder):
    with open(folder / "identities.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_tracklet_has_an_identity_and_the_numbers_are_of_the_file(grouped, world):
    folder, returned = grouped
    rows = read_identities(folder)
    assert tuple(rows[0]) == COLUMNS
    assert [row["path"] for row in rows] == sorted(place.name for place in world.iterdir())
    for row in rows:
        assert int(row["images"]) == len(list((world / row["path"]).iterdir()))
        assert (f"{int(row['truth']):04d}_c{row['camera']}", row["first_frame"]) == (row["path"], "")
    found, truth = [[int(row[name]) for row in rows] for name in ("identity", "truth")]
    metrics = json.loads((folder / "groups.json").read_text())
    assert metrics["num_items"] == len(rows) and metrics["num_identities"] == max(found) == len(set(found))
    pairs = [(a, b) for a in range(len(rows)) for b in range(a)]
    right = sum(found[a] == found[b] and truth[a] == truth[b] for a, b in pairs)
    either = sum((found[a] == found[b]) + (truth[a] == truth[b]) for a, b in pairs)
    assert (
        metrics["truth"]["pairwise"]["f1"] == returned["truth"]["pairwise"]["f1"] == pytest.approx(2 * right / either)
    )
    # Far above chance: identities drawn at random with the same sizes reach an ARI of 0.
    assert metrics["truth"]["ari"] > 0.15
    assert {path.name for path in folder.iterdir()} == {
        "args.json", "group_features.safetensors", "groups.json", "identities.csv", "report.html",
    }  # fmt: skip


@pytest.mark.slow
def test_two_processes_group_as_one(grouped, world, tmp_path):
    launch("evaluate.py", "--group_dir", world, "--output_dir", tmp_path, processes=2)
    for name in ("identities.csv", "groups.json"):
        assert (tmp_path / name).read_text() == (grouped[0] / name).read_text()


def test_the_report_shows_doubtful_groups_first_with_names(grouped):
    folder, metrics = grouped
    rows = read_identities(folder)
    page = Page((folder / "report.html").read_text())
    cohesion = {row["identity"]: float(row["cohesion"]) for row in rows if row["cohesion"]}
    sizes = {number: sum(row["identity"] == number for row in rows) for number in cohesion}
    # The sum of J over the pairs.
    doubt = {number: math.comb(size, 2) * (1 - cohesion[number]) for number, size in sizes.items()}
    places = [page.text.index(f"Identity {number} ") for number in sorted(doubt, key=doubt.get, reverse=True)]
    assert len(places) == metrics["num_groups"] and places == sorted(places)
    # Neither size nor cohesion gives this order.
    assert sorted(doubt, key=doubt.get) not in (sorted(doubt, key=sizes.get), sorted(doubt, key=cohesion.get)[::-1])
    shown = sum(min(size, group_report.SHOWN_ITEMS) for size in sizes.values()) + metrics["num_singles"]
    assert len(page.images) == shown
    assert {image["alt"] for image in page.images} <= {row["path"] for row in rows}


def test_another_eps_extracts_nothing_again_and_pieces_are_smaller(grouped, world, tmp_path, capsys, monkeypatch):
    folder, before = grouped
    (tmp_path / "group_features.safetensors").write_bytes((folder / "group_features.safetensors").read_bytes())
    monkeypatch.setattr(evaluate, "extract", pytest.fail)
    monkeypatch.setattr(group_report, "SHOWN_GROUPS", 1)
    monkeypatch.setattr(group_report, "SHOWN_SINGLES", 2)
    after = run("--group_dir", world, "--output_dir", tmp_path, "--eps", 0.2)
    assert "extracted before" in capsys.readouterr().out
    assert after["num_identities"] > before["num_identities"] and after["num_singles"] > 2
    # DBSCAN's groups of a smaller eps, with two items for a core, lie inside those of a larger one.
    coarse, fine = ([row["identity"] for row in read_identities(place)] for place in (folder, tmp_path))
    assert all(any(piece <= whole for whole in parts(coarse)) for piece in parts(fine))
    page = Page((tmp_path / "report.html").read_text())
    assert f"Shown are 1 of {after['num_groups']} groups" in page.text
    assert f"Shown are 2 of {after['num_singles']};" in page.text
    assert len(page.images) <= group_report.SHOWN_ITEMS + 2


def test_tracks_of_two_cameras_are_kept_apart_where_they_meet(clip, tmp_path):
    """Two people walk through both cameras in equal clothes: only the frames say that they are two."""
    colours = {1: (200, 30, 30), 2: (200, 30, 30), 3: (30, 30, 200)}
    for name in ("hall", "gate"):
        lines = [f"{frame},{track},{40 * track - 40},0,32,64,1" for frame in (1, 2) for track in colours]
        sequence(tmp_path / "in" / name, "\n".join(lines), frames=(1, 2), file="tracks.txt")
        for frame in (1, 2):
            image = Image.new("RGB", (120, 64))
            for track, colour in colours.items():
                image.paste(colour, (40 * track - 40, 0, 40 * track - 8, 64))
            image.save(tmp_path / "in" / name / "img1" / f"{frame:06d}.png")
    settings = ("--eps", 0.9, "--cluster_k1", 3, "--cluster_k2", 1)
    metrics = run("--model", clip, "--resolution", 64, 32, "--group_dir", tmp_path / "in", *settings,
                  "--output_dir", tmp_path / "out")  # fmt: skip
    rows = read_identities(tmp_path / "out")
    by_path = {row["path"]: row for row in rows}
    assert sorted(by_path) == [f"{name}#{track}" for name in ("gate", "hall") for track in (1, 2, 3)]
    for name in ("gate", "hall"):
        assert by_path[f"{name}#1"]["identity"] != by_path[f"{name}#2"]["identity"]
        assert (by_path[f"{name}#1"]["first_frame"], by_path[f"{name}#1"]["last_frame"]) == ("1", "2")
    assert len({row["identity"] for row in rows if not row["path"].endswith("#3")}) == 2
    assert metrics["truth"] is None and metrics["num_refused_pairs"] > 0


def test_an_identity_can_be_taken_out(grouped, tmp_path):
    folder, _ = grouped
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    pid = int(read_identities(folder)[0]["truth"])
    forget(tmp_path, pid=pid)
    rows = read_identities(tmp_path)
    assert rows == [row for row in read_identities(folder) if int(row["truth"]) != pid]
    assert not (tmp_path / "report.html").exists()
    assert f"{pid:04d}_c" not in (tmp_path / "group_features.safetensors").read_bytes().decode("latin-1")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--eps", "1"], "--eps 1.0 must be above 0 and below 1"),
        (["--eps", "nan"], "--eps nan must be above 0"),
        (["--min_samples", "1"], "--min_samples must be 2 or more"),
        (["--data", "viper"], "--group_dir ranks nothing and is a job of its own; leave out --data"),
        (["--rerank", "--topk", "3"], "leave out --rerank, --topk"),
        (["--model", ".", "--calibrate"], "leave out --calibrate"),
        (["--report_queries", "2", "--data_root", "x"], "leave out --data_root, --report_queries"),
    ],
)
def test_bad_arguments_stop_in_the_parser(arguments, message, capsys):
    with pytest.raises(SystemExit):
        evaluate.parse_args(["--group_dir", "somewhere", *arguments])
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_flags_of_grouping_have_no_effect_elsewhere():
    assert "Without effect: --eps (no --group_dir)" in evaluate.parse_args(["--eps", "0.3"]).notes


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "there is nothing to group: one item only"),
        (["--cluster_k1", 9], "nothing to group"),
        (["--more", "--cluster_k1", 3], "--cluster_k1 3 asks for more neighbours than 3 items"),
        (["--more", "--min_samples", 4], "--min_samples 4 must be between 2 and the number of items"),
    ],
)
def test_bad_input_stops_before_a_model_loads(arguments, message, clip, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.ReIDModel, "open", pytest.fail)
    for name in ("t/1.png", "t/2.png", *(("t2/1.png", "3.png") if "--more" in arguments else ())):
        put(tmp_path / "in" / name)
    arguments = [argument for argument in arguments if argument != "--more"]
    with pytest.raises(ValueError, match=message):
        run("--model", clip, "--group_dir", tmp_path / "in", *arguments, "--output_dir", tmp_path / "out")
