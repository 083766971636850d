"""An identity leaves every file of an evaluation, and everything else stays as it was."""

import csv
import json

import pytest
import torch

from tests.tables import paint
from utils.datasets.tracklets import read_tracklets
from utils.evaluation.forget import forget, main, read
from utils.evaluation.groups.grouping import save_items
from utils.evaluation.kept_features import load_features, save_features
from utils.evaluation.metrics import Side
from utils.files import write_csv

PIDS = [7, 7, 3, 5, 3, 7]
PATHS = [f"{pid:04d}_{number}.jpg" for number, pid in enumerate(PIDS)]
FEATURES = torch.arange(12.0).view(6, 2)


def side(rows):
    pids = torch.tensor([PIDS[row] for row in rows])
    return Side(FEATURES[rows], pids, torch.tensor(rows), [PATHS[row] for row in rows])


@pytest.fixture
def results(tmp_path):
    """What evaluate.py leaves: images 0 and 2 were looked for among all others."""
    save_features(
        tmp_path / "features.safetensors",
        FEATURES,
        [([0, 2], side([0, 2]), [1, 3, 4, 5], side([1, 3, 4, 5]))],
        key="of-all",
    )
    ranking = [(PATHS[query], rank, PATHS[row], 0.5, 0) for query in (0, 2) for rank, row in enumerate((1, 3, 4, 5))]
    write_csv(tmp_path / "rankings.csv", ("query", "rank", "gallery", "distance", "match"), ranking)
    (tmp_path / "report.html").write_text("pictures")
    (tmp_path / "metrics.json").write_text("{}")
    (tmp_path / "chunks-ab").mkdir()
    return tmp_path


def rows_of(path):
    with open(path, newline="") as file:
        return [tuple(row[name] for name in ("query", "gallery")) for row in csv.DictReader(file)]


def test_an_identity_leaves_every_file(results):
    changes = forget(results, pid=7)
    ((queries, gallery),), header = load_features(results / "features.safetensors")
    assert queries.pids.tolist() == [3] and gallery.pids.tolist() == [5, 3]
    assert queries.features.equal(FEATURES[[2]]) and gallery.features.equal(FEATURES[[3, 4]])
    assert (queries.paths, gallery.paths) == ([PATHS[2]], [PATHS[3], PATHS[4]])
    assert gallery.camids.tolist() == [3, 4] and "key" not in header
    assert rows_of(results / "rankings.csv") == [(PATHS[2], PATHS[3]), (PATHS[2], PATHS[4])]
    assert sorted(path.name for path in results.iterdir()) == ["features.safetensors", "metrics.json", "rankings.csv"]
    assert [line.split(": ")[1] for line in changes] == ["3 rows removed", "6 rows removed"] + [
        "deleted; the same command makes it again"
    ] * 2
    with pytest.raises(ValueError, match="holds nothing of identity 7; it has 3, 5"):
        forget(results, pid=7)


def test_the_report_of_a_training_stays(results):
    (results / "training").mkdir()
    (results / "training" / "report.html").write_text("curves")
    (results / "training" / "args.json").write_text('{"command": ["finetune_reid.py"]}')
    for name, script in (("filtered", "filter_generated.py"), ("made", "train_dreambooth_reid.py")):
        (results / name).mkdir()
        (results / name / "report.html").write_text("pictures")
        (results / name / "args.json").write_text(f'{{"command": "python {script} --source x"}}')
    changes = forget(results, pid=7)
    assert [path.parent.name for path in results.rglob("report.html")] == ["training"]
    # It may show pictures: it is named.
    report = results / "training" / "report.html"
    assert f"{report}: stays, as nothing makes it again; if it shows the person, delete it by hand" in changes


def test_the_query_of_a_search_is_no_longer_named(results):
    """Its name is that of the data; lines of unreadable images hold whole paths, and --path may be repeated."""
    data = f"/home/u/my pictures/{PATHS[0]} in /home/u/cameras"
    (results / "args.json").write_text(json.dumps({"command": ["evaluate.py", f"/home/u/my pictures/{PATHS[0]}"]}))
    skipped = ["/home/u/cameras/bad.jpg: truncated", "/home/u/cameras/other.jpg: truncated"]
    (results / "metrics.json").write_text(json.dumps({"data": data, "skipped_images": skipped}))
    main([str(results), "--pid", "7", "--path", "bad.jpg", "--path=-1_c3.jpg"])
    assert PATHS[0] not in (results / "args.json").read_text() + (results / "metrics.json").read_text()
    kept = json.loads((results / "metrics.json").read_text())
    assert kept == {"data": "/home/u/my pictures/removed in /home/u/cameras", "skipped_images": skipped[1:]}


def test_what_killed_runs_left_and_unreadable_images(results):
    left = ["features.safetensors.part", "rankings.csv.part", "report.html.part", "00003.safetensors.part"]
    for name in left:
        (results / name).write_text("part")
    (results / "model.safetensors.part").write_text("a training that runs")
    skipped = ["query/0007_c1.jpg: truncated", "gallery/0003_c1.jpg: truncated"]
    (results / "metrics.json").write_text(json.dumps({"mAP": 0.5, "skipped_images": skipped}))
    changes = forget(results, pid=7, dry_run=True)
    assert all((results / name).exists() for name in left)
    assert forget(results, pid=7) == changes and not any((results / name).exists() for name in left)
    assert (results / "model.safetensors.part").exists()
    assert json.loads((results / "metrics.json").read_text()) == {"mAP": 0.5, "skipped_images": skipped[1:]}
    forget(results, paths=["gallery/0003_c1.jpg"])
    assert json.loads((results / "metrics.json").read_text())["skipped_images"] == []


def test_single_images_and_a_dry_run(results, capsys):
    before = {path.name: path.read_bytes() for path in results.iterdir() if path.is_file()}
    main([str(results), "--path", PATHS[4], "--dry_run"])
    assert "Nothing was changed" in capsys.readouterr().out
    assert before == {path.name: path.read_bytes() for path in results.iterdir() if path.is_file()}
    forget(results, paths=[PATHS[4]])
    ((queries, gallery),), _ = load_features(results / "features.safetensors")
    assert queries.paths == [PATHS[0], PATHS[2]] and gallery.paths == [PATHS[1], PATHS[3], PATHS[5]]


def test_features_that_several_splits_share(tmp_path):
    splits = [([0], [1, 2, 3]), ([2], [0, 4, 5])]
    path = tmp_path / "below" / "features.safetensors"
    path.parent.mkdir()
    save_features(path, FEATURES, [(query, side(query), rows, side(rows)) for query, rows in splits])
    forget(tmp_path, pid=3)
    sides, _ = load_features(path)
    assert [[part.paths for part in pair] for pair in sides] == [
        [[PATHS[0]], [PATHS[1], PATHS[3]]],
        [[], [PATHS[0], PATHS[5]]],
    ]
    for pair in sides:
        for part in pair:
            rows = [PATHS.index(name) for name in part.paths]
            assert part.features.equal(FEATURES[rows]) and part.pids.tolist() == [PIDS[row] for row in rows]


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "give --pid, or --path"),
        (["--pid", "-1"], "named by --path"),
        (["--pid", "4"], "holds nothing of identity 4; it has 3, 5, 7"),
        (["--path", "nobody.jpg"], "holds nothing of nobody.jpg"),
    ],
)
def test_bad_input(results, capsys, words, message):
    with pytest.raises(SystemExit) as error:
        main([str(results), *words])
    assert message in str(error.value) + capsys.readouterr().err


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(ValueError, match="is no folder"):
        forget(tmp_path / "nothing", pid=1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="there is no file of features, so name images by --path"):
        forget(tmp_path / "empty", pid=1)


def test_identities_with_names_are_removed_by_name(tmp_path):
    """A number is a name there too; the same name of an image on the other side is another image."""
    names = {"pid": ["1", "2", "anna"], "camid": None}

    def side_of(pids, paths):
        return Side(
            FEATURES[: len(pids)].clone(), torch.tensor(pids), torch.zeros(len(pids)).long(), paths, names=names
        )

    sides = side_of([2, 1], ["a.jpg", "b.jpg"]), side_of([0, 1, 2], ["a.jpg", "b.jpg", "c.jpg"])
    save_features(tmp_path / "features.safetensors", FEATURES, [([0, 1], sides[0], [0, 1, 2], sides[1])])
    pairs = [("b.jpg", "a.jpg"), ("b.jpg", "b.jpg"), ("a.jpg", "c.jpg"), ("a.jpg", "b.jpg")]
    write_csv(tmp_path / "rankings.csv", ("query", "rank", "gallery"), [(query, 1, row) for query, row in pairs])
    (tmp_path / "notes.csv").write_text("path,more\n\nx\n")
    with pytest.raises(ValueError, match="nothing of identity 0; it has 1, 2, anna"):
        forget(tmp_path, pid="0")
    forget(tmp_path, pid="1")
    ((queries, gallery),), _ = load_features(tmp_path / "features.safetensors")
    assert queries.paths == ["a.jpg", "b.jpg"] and gallery.paths == ["b.jpg", "c.jpg"]
    # The others keep their numbers.
    assert gallery.names["pid"] == ["", "2", "anna"] and gallery.identity_name(2) == "anna"
    assert rows_of(tmp_path / "rankings.csv") == pairs[1:]
    forget(tmp_path, pid="anna")
    assert b"anna" not in (tmp_path / "features.safetensors").read_bytes()
    assert rows_of(tmp_path / "rankings.csv") == [("b.jpg", "b.jpg")]


def test_what_stays_in_a_table_stays_as_it_was(results):
    rows = [[PATHS[0], "-0.125", "'=1+1"], [PATHS[2], "-0.125", "'=1+1"]]
    (results / "scores.csv").write_text("".join(",".join(row) + "\n" for row in (["query", "score", "more"], *rows)))
    forget(results, pid=7)
    assert (results / "scores.csv").read_text().split() == ["query,score,more", ",".join(rows[1])]


def test_items_of_groups_are_removed_by_name(tmp_path):
    for folder in ("anna/cam1", "7/cam1", "0/cam2"):
        paint(tmp_path / "items" / folder / "1.png")
    tracklets = read_tracklets(tmp_path / "items")
    assert sorted(tracklets.pid_names) == ["0", "7", "anna"]
    path = tmp_path / "out" / "group_features.safetensors"
    path.parent.mkdir()
    count = len(tracklets.items)
    save_items(path, torch.eye(count), torch.arange(count), tracklets, "key")
    forget(tmp_path / "out", pid="7")
    assert read(path).identities("g_") == [item.identity for item in tracklets.items if item.identity != "7"]
