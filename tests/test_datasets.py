"""One's own data in every form, bad input, merging, parts, damaged images, portable copies."""

import csv
import json
import logging
import multiprocessing
import os
import pickle
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from utils import own_data
from utils.datasets import check_images, labels_of, load_reid, load_sources, main, parse_spec, save, subset
from utils.images import PersonImage

ROOT = Path(__file__).parents[1]
COLUMNS = ["image", "pid", "camid", "domain", "path"]
# (split, pid, camid, file)
ROWS = [
    ("train", 7, 0, "train/a.png"),
    ("train", 7, 2, "train/b.png"),
    ("train", 3, 0, "train/c.png"),
    ("query", 11, 0, "query/d.png"),
    ("gallery", 11, 1, "gallery/e.png"),
    ("gallery", 12, 1, "gallery/f.png"),
]


def paint(path, colour=(200, 30, 60), size=(4, 8), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)
    return path


def contents(data):
    return {
        split: list(zip(*(part[key][:] for key in ("pid", "camid", "path")), strict=True))
        for split, part in data.items()
    }


def expected(rows=ROWS):
    out = {}
    for split, pid, camid, path in rows:
        out.setdefault(split, []).append((pid, camid, path))
    return out


def image_bytes(colour):
    buffer = BytesIO()
    Image.new("RGB", (4, 8), colour).save(buffer, format="PNG")
    return buffer.getvalue()


def red(index):
    return (20 * index, 0, 0)


def write_table(path, rows, file_column="file_name", **renamed):
    """metadata.csv, .jsonl or .parquet of `rows`."""
    pid, camid = renamed.get("pid", "pid"), renamed.get("camid", "camid")
    records = [{file_column: file, pid: number, camid: camera} for _, number, camera, file in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(records[0]))
            writer.writeheader()
            writer.writerows(records)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        pq.write_table(pa.Table.from_pylist(records), path)


@pytest.fixture
def folder(tmp_path):
    """The images of ROWS, each of its own red."""
    for index, (_, _, _, path) in enumerate(ROWS):
        paint(tmp_path / "mine" / path, red(index))
    return tmp_path / "mine"


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "metadata.parquet"])
@pytest.mark.parametrize("column", ["file_name", "path"])
def test_metadata_file(folder, name, column):
    write_table(folder / name, ROWS, column)
    before = sorted(folder.rglob("*"))
    data = load_reid(str(folder))
    assert contents(data) == expected()
    assert data["train"].column_names == COLUMNS
    assert set(data["train"]["domain"][:]) == {"mine"}
    assert data["train"][1]["image"].getpixel((0, 0)) == red(1)
    assert isinstance(data["train"].features["image"], PersonImage)
    # nothing is written where somebody's images lie
    assert sorted(folder.rglob("*")) == before
    assert contents(load_reid("mine", folder.parent, domain="street")) == expected()
    alone = load_reid(folder / name)
    assert contents(alone) == expected() and set(alone["train"]["domain"][:]) == {"mine"}


def test_metadata_file_a_split(folder):
    for split in ("train", "query", "gallery"):
        rows = [(s, pid, camid, path.split("/")[1]) for s, pid, camid, path in ROWS if s == split]
        write_table(folder / split / "metadata.csv", rows)
    assert contents(load_reid(folder)) == expected()
    (folder / "query" / "metadata.csv").unlink()
    with pytest.raises(ValueError, match="query has no metadata.csv"):
        load_reid(folder)


def test_other_column_names(folder):
    write_table(folder / "metadata.csv", ROWS, "picture", pid="label", camid="view")
    data = load_reid(folder, image_column="picture", pid_column="label", camid_column="view")
    assert contents(data) == expected()
    with pytest.raises(ValueError, match=r"no column 'pid'.*'label'.*pid_column="):
        load_reid(folder, image_column="picture")
    with pytest.raises(ValueError, match=r"no column 'camid'.*camid_column="):
        load_reid(folder, image_column="picture", pid_column="label")
    with pytest.raises(ValueError, match="no column file_name or path|no column image or file_name or path"):
        load_reid(folder, pid_column="label")
    with pytest.raises(ValueError, match=r"'pid_colum'.*pid_column"):
        load_reid(folder, pid_colum="label")


def test_without_cameras(folder):
    rows = [row for row in ROWS if row[0] == "train"]
    write_table(folder / "metadata.csv", rows)
    data = load_reid(folder, camid_column="none")
    assert data["train"]["camid"][:] == [0, 0, 0]


def test_generated_set(folder):
    """Several domains, camera -1, and columns the schema does not have."""
    records = [
        {
            "path": path,
            "pid": pid,
            "domain": domain,
            "camid": camid,
            "prompt": "a person",
            "seed": 1,
            "synthetic": True,
        }
        for (_, pid, _, path), domain, camid in zip(ROWS[:3], ["x", "x", "y"], [4, -1, -1], strict=True)
    ]
    pq.write_table(pa.Table.from_pylist(records), folder / "metadata.parquet")
    data = load_reid(folder)
    train = data["train"]
    assert train.column_names == COLUMNS
    assert train["domain"][:] == ["x", "x", "y"]
    assert train["camid"][:] == [4, 5, 5]
    assert train["path"][:] == ["train/a.png", "train/b.png", "train/c.png"]


@pytest.mark.parametrize("embedded", [True, False])
def test_parquet(folder, embedded):
    def write(path, rows):
        numbers = [ROWS.index(row) for row in rows]
        images = [{"bytes": image_bytes(red(number)), "path": None} for number in numbers]
        columns = {
            "pid": pa.array([row[1] for row in rows], pa.int32()),
            "camid": pa.array([row[2] for row in rows], pa.uint8()),
        }
        if embedded:
            columns |= {"image": images, "path": [row[3] for row in rows]}
        else:
            columns |= {"image": [row[3] for row in rows]}
        if path.name == "all.parquet":
            columns["split"] = [row[0] for row in rows]
        path.parent.mkdir(exist_ok=True)
        pq.write_table(pa.table(columns), path)

    write(folder / "all.parquet", ROWS)
    data = load_reid(folder / "all.parquet")
    assert contents(data) == expected()
    assert data["gallery"][0]["image"].getpixel((0, 0)) == red(4)
    assert data["gallery"].features["pid"].dtype == "int64"
    (folder / "all.parquet").unlink()
    if embedded:
        for split in ("train", "query", "gallery"):
            write(folder / "data" / f"{split}-00000-of-00001.parquet", [row for row in ROWS if row[0] == split])
        data = load_reid(folder)
        assert contents(data) == expected()
        assert data["gallery"][0]["image"].getpixel((0, 0)) == red(4)


def test_folder_an_identity(tmp_path):
    for path in ("train/0007/x_c3_1.jpg", "train/0009/x_c1_1.jpg", "query/11/cam1_0.png", "gallery/11/a-cam10.PNG"):
        paint(tmp_path / "own" / path)
    for junk in (".DS_Store", "train/._x", "train/0007/Thumbs.db", "train/0007/._x_c3_1.jpg"):
        (tmp_path / "own" / junk).write_bytes(b"junk")
    (tmp_path / "own/train/__MACOSX").mkdir()
    data = load_reid(tmp_path / "own")
    assert contents(data) == {
        "train": [(7, 1, "train/0007/x_c3_1.jpg"), (9, 0, "train/0009/x_c1_1.jpg")],
        "query": [(11, 0, "query/11/cam1_0.png")],
        "gallery": [(11, 2, "gallery/11/a-cam10.PNG")],
    }


def test_folder_an_identity_by_name_and_without_cameras(tmp_path):
    for path in ("zoe/2.jpg", "zoe/1.jpg", "adam/1.jpg"):
        paint(tmp_path / "own" / path)
    data = load_reid(tmp_path / "own")
    assert contents(data) == {"train": [(0, 0, "adam/1.jpg"), (1, 0, "zoe/1.jpg"), (1, 0, "zoe/2.jpg")]}
    paint(tmp_path / "two/query/eva/1.jpg")
    paint(tmp_path / "two/gallery/eva/2.jpg")
    assert contents(load_reid(tmp_path / "two")) == {
        "query": [(0, 0, "query/eva/1.jpg")],
        "gallery": [(0, 1, "gallery/eva/2.jpg")],
    }
    paint(tmp_path / "own/adam/x_c2.jpg")
    with pytest.raises(ValueError, match=r"adam/1.jpg has no camera in its name"):
        load_reid(tmp_path / "own")


@pytest.mark.parametrize(
    "paths, words",
    [
        (["a/1.jpg", "a/notes.txt"], r"notes.txt is no image; expected files ending in .jpg"),
        (["a/1.jpg", "2.jpg"], r"2.jpg: expected one folder an identity"),
        (["train/a/1.jpg", "test/a/1.jpg"], r"has test beside train"),
        (["bounding_box_train/0001_c1s1_000001_00.jpg"], r"name it, as in load_reid\('market1501'"),
        (["train/a/1.jpg", "query/a/1.jpg"], "query and gallery go together"),
    ],
)
def test_folders_that_are_not_understood(tmp_path, paths, words):
    for path in paths:
        paint(tmp_path / "own" / path, format="JPEG")
    with pytest.raises(ValueError, match=words):
        load_reid(tmp_path / "own")


def test_names_that_are_nothing(tmp_path):
    with pytest.raises(ValueError, match="did you mean market1501"):
        load_reid("markt1501", tmp_path)
    with pytest.raises(ValueError, match="did you mean dukemtmcreid"):
        load_reid("DukeMTMC-reID:split=1", tmp_path)
    with pytest.raises(ValueError, match="the known sets are synthetic, market1501"):
        load_reid("qqqq", tmp_path)
    for name in ("/no/such/folder", "./nothing", "a/b/c", "../x"):
        with pytest.raises(ValueError, match="does not exist"):
            load_reid(name)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/.DS_Store").write_bytes(b"x")
    with pytest.raises(ValueError, match="empty is empty"):
        load_reid(tmp_path / "empty")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match="neither a folder, a parquet file"):
        load_reid(tmp_path / "notes.txt")


def with_rows(folder, *changes, drop=()):
    rows = [row for index, row in enumerate(ROWS) if index not in drop]
    write_table(folder / "metadata.jsonl", [*rows, *changes])
    return folder


@pytest.mark.parametrize(
    "row, words",
    [
        (("train", 7, 0, "train/none.png"), r"1 of 7 images cannot be read: \S*none.png \(no such file\)"),
        (("train", 7, 0, "train/a.png"), "lists train/a.png of mine twice, in train and in train"),
        (("train", 7, 0, "train/../train/b.png"), "leaves"),
        (("train", 7, 0, "/etc/passwd"), "leaves"),
        (("train", 7, 0, "../secret.png"), "leaves"),
        (("train", 7, 0, ""), "empty in row 6"),
        (("train", -2, 0, "train/g.png"), "pid -2; the least allowed is 0"),
        (("train", 7, -3, "train/g.png"), "camid -3; the least allowed is -1"),
        (("train", "x", 0, "train/g.png"), "metadata.jsonl cannot be read|must hold integers"),
        (("train", 7.5, 0, "train/g.png"), "'pid' must hold integers, it is double"),
        (("train", None, 0, "train/g.png"), "'pid' is empty in 1 of"),
        (("test", 7, 0, "test/g.png"), r"\['test'\] beside known splits"),
    ],
)
def test_rows_that_are_wrong(folder, row, words):
    paint(folder / "train/g.png")
    paint(folder.parent / "secret.png")
    with pytest.raises(ValueError, match=words):
        load_reid(with_rows(folder, row))


def test_tables_with_nothing_in_them(folder):
    for content, words in (("file_name,pid,camid\n", "metadata.csv has no rows"), ("", "metadata.csv cannot be read")):
        (folder / "metadata.csv").write_text(content)
        with pytest.raises(ValueError, match=words):
            load_reid(folder)


def test_columns_of_a_wrong_type(folder):
    write_table(folder / "metadata.jsonl", [(split, str(pid), camid, path) for split, pid, camid, path in ROWS])
    with pytest.raises(ValueError, match=r"column 'pid' must hold integers, it is string \('7'\)"):
        load_reid(folder)
    write_table(folder / "metadata.jsonl", [(split, pid, bool(camid), path) for split, pid, camid, path in ROWS])
    with pytest.raises(ValueError, match=r"column 'camid' must hold integers, it is bool"):
        load_reid(folder)


def test_link_in_a_list_that_leaves_the_folder(folder, tmp_path):
    paint(tmp_path / "secret.png")
    (folder / "train/link.png").symlink_to(tmp_path / "secret.png")
    (folder / "out").symlink_to(tmp_path)
    (folder / "train/fine.png").symlink_to(folder / "train/a.png")
    assert len(load_reid(with_rows(folder, ("train", 7, 0, "train/fine.png")))["train"]) == 4
    for path in ("train/link.png", "out/secret.png"):
        with pytest.raises(ValueError, match=f"{path}.*leaves"):
            load_reid(with_rows(folder, ("train", 7, 0, path)))


def test_queries_that_cannot_be_found(folder):
    with pytest.raises(
        ValueError, match=r"no query identity appears.*queries: 11 \(camera 0\).*gallery: 12 \(cameras \[1\]\)"
    ):
        load_reid(with_rows(folder, drop=[4]))
    paint(folder / "gallery/g.png")
    with pytest.raises(ValueError, match=r"only under the query's own camera.*11 \(camera 0\)"):
        load_reid(with_rows(folder, ("gallery", 11, 0, "gallery/g.png"), drop=[4]))


def test_saved_set(folder, tmp_path, capsys):
    write_table(folder / "metadata.csv", ROWS)
    data = load_reid(folder)
    save(data, tmp_path / "saved")
    os.rename(folder, tmp_path / "moved")
    stored = load_reid(tmp_path / "saved")
    assert contents(stored) == expected()
    assert [row["image"].getpixel((0, 0)) for row in stored["gallery"]] == [red(4), red(5)]
    # mapped from the disk, not copied into memory; and any reader of the library can have it
    assert stored["train"].cache_files
    assert datasets.load_from_disk(str(tmp_path / "saved"))["gallery"][0]["image"].getpixel((1, 1)) == red(4)
    for file in (tmp_path / "saved").rglob("*"):
        assert file.is_dir() or str(tmp_path).encode() not in file.read_bytes()
    assert not list(tmp_path.glob(".saved*"))
    with pytest.raises(ValueError, match="saved exists already"):
        save(data, tmp_path / "saved")
    (tmp_path / "saved/train/state.json").write_text("{")
    with pytest.raises(ValueError, match="damaged save_to_disk folder"):
        load_reid(tmp_path / "saved")


def test_saved_set_of_somebody_else(tmp_path):
    """A single split, other types, absolute paths: nothing is written into its folder."""
    file = paint(tmp_path / "x.png", (9, 8, 7))
    table = {"image": [str(file)] * 2, "pid": [1, 2], "camid": [0, -1], "path": [str(file), "/elsewhere/y.png"]}
    features = datasets.Features(
        {"image": datasets.Image(), "pid": datasets.Value("int16"), "camid": datasets.Value("int32")}
    )
    features["path"] = datasets.Value("string")
    datasets.Dataset.from_dict(table, features=features).save_to_disk(str(tmp_path / "theirs"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "theirs").rglob("*")}
    train = load_reid(tmp_path / "theirs")["train"]
    assert train.column_names == COLUMNS
    assert (train["pid"][:], train["camid"][:]) == ([1, 2], [0, 1])
    assert not any(os.path.isabs(path) for path in train["path"][:]) and len(set(train["path"][:])) == 2
    assert train[1]["image"].getpixel((0, 0)) == (9, 8, 7)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "theirs").rglob("*")} == before


def test_save_that_fails_leaves_nothing(folder, tmp_path):
    write_table(folder / "metadata.csv", ROWS)
    data = load_reid(folder)
    (folder / "gallery/e.png").unlink()
    with pytest.raises(FileNotFoundError):
        save(data, tmp_path / "saved")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_hub(folder, monkeypatch):
    write_table(folder / "metadata.csv", ROWS)
    stored = load_reid(folder).rename_columns({"pid": "label"})

    def fake_load(name, revision=None):
        assert (name, revision) == ("someone/people", "v2")
        return datasets.DatasetDict({**stored, "extra": stored["train"]})

    monkeypatch.setattr(own_data.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(own_data.datasets, "load_dataset", fake_load)
    data = load_reid("someone/people", pid_column="label", revision="v2")
    assert contents(data) == expected() and set(data) == {"train", "query", "gallery"}

    def refuse(*_, **__):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'someone/people' doesn't exist on the Hub")

    monkeypatch.setattr(own_data.datasets, "load_dataset", refuse)
    with pytest.raises(ValueError, match="someone/people is no folder here, and the Hub does not give it: Dataset"):
        load_reid("someone/people")
    monkeypatch.setattr(
        own_data.datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict({"test": stored["train"]})
    )
    with pytest.raises(ValueError, match=r"has the splits \['test'\]; expected some of train, query, gallery"):
        load_reid("someone/people")


@pytest.mark.parametrize(
    "spec, want",
    [
        ("market1501", ("market1501", {})),
        ("viper:split=3", ("viper", {"split": 3})),
        ("cuhk03np:variant=labeled", ("cuhk03np", {"variant": "labeled"})),
        ("viper:reverse=true, split=-1", ("viper", {"reverse": True, "split": -1})),
        (
            "synthetic:domain=a,num_ids=32,image_fraction=0.5",
            ("synthetic", {"domain": "a", "num_ids": 32, "image_fraction": 0.5}),
        ),
        ("/data/a:b=c", ("/data/a:b=c", {})),
        ("someone/people", ("someone/people", {})),
        ("markt:split=1", ("markt:split=1", {})),
    ],
)
def test_spec(spec, want):
    name, options = parse_spec(spec)
    assert (name, options) == want
    assert {key: type(value) for key, value in options.items()} == {key: type(value) for key, value in want[1].items()}


@pytest.mark.parametrize(
    "spec", ["viper:", "viper:split", "viper:split=", "viper:split=1,split=2", "viper:=3", "viper:a b=1"]
)
def test_spec_that_is_wrong(spec):
    with pytest.raises(ValueError, match="a spec is NAME or NAME:key=value,key=value"):
        parse_spec(spec)


def test_synthetic():
    data = load_reid("synthetic:num_ids=4", images_per_id=6, domain="b")
    assert data["train"].column_names == COLUMNS
    assert len(data["train"]) == 24 and set(data["train"]["domain"][:]) == {"synthetic-b"}
    image = data["query"][0]["image"]
    assert image.mode == "RGB" and np.asarray(image).std() > 5
    with pytest.raises(ValueError, match=r"'people'.*num_ids=32"):
        load_reid("synthetic", people=3)
    with pytest.raises(ValueError, match="num_ids must be of type int, not '3'"):
        load_reid("synthetic", num_ids="3")


def test_several_sources(folder):
    write_table(folder / "metadata.csv", ROWS)
    specs = ["synthetic:domain=b,num_ids=4", str(folder), "synthetic:domain=a,num_ids=3"]
    data = load_reid(specs)
    again = load_sources(specs)
    parts = [load_reid(spec) for spec in specs]
    for split in ("train", "query", "gallery"):
        assert data[split]["path"][:] == sum((part[split]["path"][:] for part in parts), [])
        assert data[split]["domain"][:] == sum((part[split]["domain"][:] for part in parts), [])
        assert data[split].remove_columns("image").to_dict() == again[split].remove_columns("image").to_dict()
    assert sorted(set(data["train"]["pid"][:])) == list(range(4 + 2 + 3))
    # in order of number within a source: 3 before 7
    mine = data["train"].select(range(len(parts[0]["train"]), len(parts[0]["train"]) + 3))
    assert mine["pid"][:] == [5, 5, 4]
    cameras = {part: set() for part in range(3)}
    for split in data:
        bounds = np.cumsum([0] + [len(part[split]) for part in parts])
        for part in range(3):
            cameras[part] |= set(data[split]["camid"][bounds[part] : bounds[part + 1]])
    assert cameras[1] == {max(cameras[0]) + number for number in (1, 2, 3)}
    assert sorted(cameras[0] | cameras[1] | cameras[2]) == list(range(len(cameras[0]) + 3 + len(cameras[2])))
    asked = set(zip(data["query"]["pid"][:], data["query"]["domain"][:], strict=True))
    assert asked <= set(zip(data["gallery"]["pid"][:], data["gallery"]["domain"][:], strict=True))
    assert len({pid for pid, _ in asked}) == len(asked)
    assert labels_of(data["train"]).tolist() == data["train"]["pid"][:]
    assert data["train"][len(data["train"]) - 1]["image"].size == (64, 128)
    with pytest.raises(ValueError, match="twice"):
        load_sources([specs[0], specs[0]])
    with pytest.raises(ValueError, match="no data set is named"):
        load_sources([])


def test_labels_are_sorted_and_tell_domains_apart():
    rows = {"pid": [9, 2, 9, 2, 5], "domain": ["x", "y", "y", "x", "x"]}
    labels = labels_of(datasets.Dataset.from_dict(rows))
    assert labels.tolist() == [3, 1, 4, 0, 2] and labels.dtype == np.int64
    order = [4, 2, 0, 1, 3]
    turned = datasets.Dataset.from_dict({key: [values[index] for index in order] for key, values in rows.items()})
    assert labels_of(turned).tolist() == [labels[index] for index in order]


@pytest.fixture(scope="module")
def crowd():
    """64 people with 1 to 20 images each."""
    rows = [(pid, image) for pid in range(64) for image in range(1 + pid * 7 % 20)]
    return datasets.Dataset.from_dict(
        {
            "pid": [pid for pid, _ in rows],
            "domain": ["x"] * len(rows),
            "path": [f"{pid:04d}/{image:02d}.jpg" for pid, image in rows],
        }
    )


@pytest.mark.parametrize("seed", [0, 1])
def test_few_shot(crowd, seed):
    before, sizes = set(), np.bincount(crowd["pid"][:])
    for fraction in (0.05, 0.1, 0.3, 0.5, 0.9, 1):
        part = subset(crowd, image_fraction=fraction, seed=seed)
        paths = part["path"][:]
        assert len(paths) == max(64, round(fraction * len(crowd)))
        assert paths == sorted(paths) and set(part["pid"][:]) == set(range(64))
        assert before <= set(paths)
        if fraction >= 0.5:
            assert (abs(np.bincount(part["pid"][:]) - fraction * sizes) <= 1.5).all()
        before = set(paths)
    assert before == set(crowd["path"][:])
    assert (
        subset(crowd, image_fraction=0.3, seed=seed)["path"][:] != subset(crowd, image_fraction=0.3, seed=2)["path"][:]
    )


def test_small_scale(crowd):
    before = set()
    for fraction, people in ((0.001, 1), (0.1, 6), (0.3, 19), (0.5, 32), (1.0, 64)):
        part = subset(crowd, identity_fraction=fraction)
        assert len(set(part["pid"][:])) == people
        # whoever stays keeps every image
        assert len(part) == sum(pid in set(part["pid"][:]) for pid in crowd["pid"][:])
        assert before <= set(part["path"][:])
        before = set(part["path"][:])
    both = subset(crowd, identity_fraction=0.5, image_fraction=0.2)
    assert set(both["pid"][:]) == set(subset(crowd, identity_fraction=0.5)["pid"][:])


@pytest.mark.parametrize("fraction", [0, -0.1, 1.01, float("nan"), "half", True])
def test_fractions_that_are_none(crowd, fraction):
    for name in ("image_fraction", "identity_fraction"):
        with pytest.raises(ValueError, match=f"{name} must be above 0 and at most 1"):
            subset(crowd, **{name: fraction})


def test_parts_by_option():
    whole = load_reid("synthetic:num_ids=8")
    part = load_reid("synthetic:num_ids=8,image_fraction=0.5", identity_fraction=0.5)
    assert len(set(part["train"]["pid"][:])) == 4 and len(part["train"]) == 16
    assert part["query"]["path"][:] == whole["query"]["path"][:]
    assert part["train"]["path"][:] == subset(whole, image_fraction=0.5, identity_fraction=0.5)["train"]["path"][:]
    with pytest.raises(ValueError, match="image_fraction"):
        load_reid("synthetic:image_fraction=2")


def gradient():
    """(8, 4, 3) bytes, every pixel its own."""
    return (np.arange(8 * 4 * 3, dtype=np.uint8) * 2 + 5).reshape(8, 4, 3)


def grey16(pixels):
    return Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 257)


def palette(pixels):
    image = Image.fromarray(np.arange(32, dtype=np.uint8).reshape(8, 4), "L").convert("P")
    image.putpalette(pixels.reshape(32, 3).tobytes())
    return image


def turned(pixels):
    return Image.fromarray(np.rot90(pixels).copy())


def cmyk(pixels):
    return Image.fromarray(np.dstack([255 - pixels, np.zeros((8, 4), np.uint8)]), "CMYK")


def grey(pixels):
    return np.repeat(pixels[:, :, :1], 3, axis=2)


def bits(pixels):
    return np.repeat((pixels[:, :, :1] > 50) * np.uint8(255), 3, axis=2)


MODES = {
    "rgb.png": (Image.fromarray, lambda pixels: pixels),
    "grey.png": (lambda pixels: Image.fromarray(pixels[:, :, 0].copy()), grey),
    "grey16.png": (grey16, grey),
    "grey16.tif": (grey16, grey),
    "grey_alpha.png": (lambda pixels: Image.fromarray(pixels[:, :, :2].copy(), "LA"), grey),
    "rgba.png": (lambda pixels: Image.fromarray(np.dstack([pixels, pixels[:, :, 0]])), lambda pixels: pixels),
    "palette.png": (palette, lambda pixels: pixels),
    "bits.png": (lambda pixels: Image.fromarray(pixels[:, :, 0] > 50), bits),
    "cmyk.tif": (cmyk, lambda pixels: pixels),
    "turned.png": (turned, lambda pixels: pixels),
    "rgb.bmp": (Image.fromarray, lambda pixels: pixels),
    "rgb.webp": (Image.fromarray, lambda pixels: pixels),
}


def test_pixels_of_every_mode(tmp_path):
    pixels = gradient()
    for name, (make, _) in MODES.items():
        options = {"lossless": True} if name.endswith("webp") else {}
        if name == "turned.png":
            exif = Image.Exif()
            # shown after a turn to the right, which undoes np.rot90
            exif[0x0112] = 6
            options["exif"] = exif
        (tmp_path / "own/0001").mkdir(parents=True, exist_ok=True)
        make(pixels).save(tmp_path / "own/0001" / name, **options)
    data = load_reid(tmp_path / "own")
    save(data, tmp_path / "saved")
    plain = datasets.load_from_disk(str(tmp_path / "saved"))
    for source in (
        data["train"],
        load_reid(tmp_path / "saved")["train"],
        plain["train"],
        pickle.loads(pickle.dumps(data))["train"],
    ):
        assert len(source) == len(MODES)
        for row in source:
            want = MODES[os.path.basename(row["path"])][1](pixels)
            np.testing.assert_array_equal(np.asarray(row["image"]), want, err_msg=row["path"])
    assert check_images(data)[1] == []


def test_cmyk_jpeg(tmp_path):
    """JPEG stores CMYK inverted, and loses a little."""
    (tmp_path / "own/1").mkdir(parents=True)
    Image.new("CMYK", (16, 16), (0, 200, 255, 30)).save(tmp_path / "own/1/a.jpg", quality=95)
    red, green, blue = load_reid(tmp_path / "own")["train"][0]["image"].getpixel((8, 8))
    assert abs(red - 225) < 6 and abs(green - 49) < 6 and abs(blue) < 6


@pytest.fixture
def damaged(tmp_path):
    """Twelve noisy images in three formats, of which several are broken; (folder, broken names with reasons)."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 32, 3), dtype=np.uint8)
    for number in range(4):
        for ending in ("jpg", "png", "bmp"):
            file = tmp_path / f"own/1/{number}.{ending}"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noise).save(file)
    broken = {}
    for name, keep in (("0.jpg", 0.5), ("0.png", 0.7), ("0.bmp", 0.9), ("1.jpg", 0.99)):
        file = tmp_path / "own/1" / name
        file.write_bytes(file.read_bytes()[: int(keep * file.stat().st_size)])
        broken[name] = "truncated|trunc|broken|not enough"
    (tmp_path / "own/1/1.png").write_bytes(b"this is no picture")
    broken["1.png"] = "not an image"
    return tmp_path / "own", broken


@pytest.mark.parametrize("decode", [None, True, False])
def test_damaged_images(damaged, decode, caplog):
    folder, broken = damaged
    data = load_reid(folder)
    with pytest.raises(ValueError, match=r"own: 5 of 12 images cannot be read: \S*0.bmp \(.*skip_unreadable"):
        check_images(data, decode=decode, where="own")
    with caplog.at_level(logging.WARNING):
        kept, skipped = check_images(data, decode=decode, skip_unreadable=True)
    assert {os.path.basename(path) for _, path, _ in skipped} == set(broken)
    assert {split for split, _, _ in skipped} == {"train"}
    assert "left out 5 of 12" in caplog.text and all(name in caplog.text for name in broken)
    assert sorted(kept["train"]["path"][:]) == sorted(
        f"1/{n}.{e}" for n in range(4) for e in ("jpg", "png", "bmp") if f"{n}.{e}" not in broken
    )
    assert all(row["image"].size == (32, 64) for row in kept["train"])
    alone, skipped = check_images(data["train"], decode=decode, skip_unreadable=True)
    assert len(alone) == 7 and len(skipped) == 5


def test_images_that_are_empty(damaged):
    folder, _ = damaged
    train = load_reid(folder)["train"]
    with pytest.raises(ValueError, match=r"image \S*own/1/0.jpg cannot be read: "):
        train[train["path"][:].index("1/0.jpg")]
    (folder / "1/3.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"1 of 12 images cannot be read: \S*3.jpg \(empty file\)"):
        load_reid(folder)
    data = load_reid(folder, skip_unreadable=True)
    assert len(data["train"]) == 6
    with pytest.raises(ValueError, match="no readable image is left in train"):
        for file in (folder / "1").iterdir():
            file.write_bytes(b"")
        load_reid(folder, skip_unreadable=True)


def test_damaged_images_inside_a_table(tmp_path):
    good = image_bytes((1, 2, 3))
    rows = {"image": [good, good[:45], b"", good], "pid": [1, 1, 2, 2], "camid": [0, 0, 0, 0]}
    pq.write_table(pa.table(rows), tmp_path / "t.parquet")
    kept, skipped = check_images(load_reid(tmp_path / "t.parquet"), skip_unreadable=True)
    assert kept["train"]["pid"][:] == [1, 2]
    assert [path for _, path, _ in skipped] == ["train/0000001", "train/0000002"]


def test_drawn_images_are_not_checked():
    data = load_reid("synthetic:num_ids=4")
    kept, skipped = check_images(data)
    assert len(kept["train"]) == len(data["train"]) and skipped == []


def test_lmdb(tmp_path, monkeypatch):
    lmdb = pytest.importorskip("lmdb")
    names = ["000001_0000123_00.jpg", "000001_0000124_00.jpg", "000002_0000001_01.jpg"]
    (tmp_path / "LUPerson-NL").mkdir()
    with (
        lmdb.open(str(tmp_path / "LUPerson-NL/lmdb"), map_size=1 << 20) as environment,
        environment.begin(write=True) as writer,
    ):
        for index, name in enumerate(names):
            writer.put(name.encode(), image_bytes(red(index)))
        writer.put(b"__len__", b"3")
    data = load_reid("luperson", tmp_path)
    assert data["train"]["pid"][:] == [1, 1, 2] and data["train"]["path"][:] == names
    assert data["train"][2]["image"].getpixel((0, 0)) == red(2)
    assert check_images(data)[1] == []
    save(data, tmp_path / "saved")
    assert load_reid(tmp_path / "saved")["train"][1]["image"].getpixel((0, 0)) == red(1)


def test_lmdb_without_the_package(tmp_path, monkeypatch):
    (tmp_path / "LUPerson/lmdb").mkdir(parents=True)
    (tmp_path / "LUPerson/lmdb/data.mdb").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(ValueError, match="pip install lmdb"):
        load_reid("luperson", tmp_path)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_worker_processes(start, tmp_path):
    """A freshly started worker has imported nothing; drawn and embedded images must come all the same."""
    drawn = load_reid("synthetic:num_ids=2,images_per_id=4")
    save(drawn, tmp_path / "saved")
    for data in (drawn, load_reid(tmp_path / "saved")):
        with multiprocessing.get_context(start).Pool(1) as pool:
            sums = pool.map(pixel_sum, [(data["train"], row) for row in range(3)])
        assert sums == [int(np.asarray(data["train"][row]["image"], dtype=np.int64).sum()) for row in range(3)]


def pixel_sum(task):
    dataset, row = task
    return int(np.asarray(dataset[row]["image"], dtype=np.int64).sum())


def test_command_line(folder, tmp_path, capsys):
    write_table(folder / "metadata.csv", ROWS, pid="label")
    main([str(folder), "--options", "pid_column=label", "--save_to", str(tmp_path / "copy")])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines if line.startswith(("train", "query", "gallery"))] == [
        ["train", "3", "2", "2"],
        ["query", "1", "1", "1"],
        ["gallery", "2", "2", "1"],
    ]
    assert contents(load_reid(tmp_path / "copy")) == expected()
    with pytest.raises(SystemExit, match="error: .*copy exists already"):
        main([str(folder), "--options", "pid_column=label", "--save_to", str(tmp_path / "copy")])


def test_command_line_copies_what_is_drawn(tmp_path):
    main(["synthetic:num_ids=4", "--save_to", str(tmp_path / "copy")])
    drawn, copied = load_reid("synthetic:num_ids=4"), load_reid(tmp_path / "copy")
    assert contents(drawn) == contents(copied)
    np.testing.assert_array_equal(np.asarray(drawn["query"][3]["image"]), np.asarray(copied["query"][3]["image"]))
    row = copied["query"].cast_column("image", datasets.Image(decode=False))[3]["image"]
    assert row["path"] == os.path.basename(drawn["query"][3]["path"])


def test_command_line_says_one_line_on_bad_input(tmp_path):
    command = [sys.executable, "-m", "utils.datasets", "markett1501", "--root", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: 'markett1501' is neither a known set nor an existing path")
    assert "Traceback" not in done.stderr
