"""One's own data in every form it can have, and what is said where it is wrong."""

import os

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.tables import COLUMNS, ROWS, contents, expected, image_bytes, paint, red, write_images, write_table
from utils.datasets.images import PersonImage
from utils.datasets.load import labels_of, load_reid
from utils.datasets.own import data as own_data


@pytest.fixture
def folder(tmp_path):
    return write_images(tmp_path / "mine")


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
    assert contents(load_reid(f"{folder}:image_column=picture,pid_column=label,camid_column=view")) == expected()
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
    write_table(folder / "metadata.csv", ROWS)
    data = load_reid(folder, camid_column="none")
    assert {split: set(data[split]["camid"][:]) for split in data} == {"train": {0}, "query": {0}, "gallery": {1}}


@pytest.mark.parametrize("saved", [False, True])
def test_columns_that_were_asked_for_must_be_there(folder, tmp_path, saved):
    write_table(folder / "metadata.csv", [row for row in ROWS if row[0] == "train"])
    if saved:
        load_reid(folder)["train"].save_to_disk(str(tmp_path / "saved"))
    for kind in ("image", "split", "domain"):
        with pytest.raises(ValueError, match="no column '?misspelt"):
            load_reid(tmp_path / "saved" if saved else folder, **{f"{kind}_column": "misspelt"})


def test_domain_that_looks_like_a_number(folder):
    write_table(folder / "metadata.csv", ROWS)
    assert set(load_reid(folder, domain=2024)["train"]["domain"][:]) == {"2024"}


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
        write(folder / "mixed.parquet", ROWS)
        assert len(load_reid(folder / "mixed.parquet")["train"]) == len(ROWS)
        (folder / "mixed.parquet").unlink()
        for split in ("train", "query", "gallery"):
            write(folder / "data" / f"{split}-00000-of-00001.parquet", [row for row in ROWS if row[0] == split])
        data = load_reid(folder)
        assert contents(data) == expected()
        assert data["gallery"][0]["image"].getpixel((0, 0)) == red(4)


def one_image(file, camid=0, /, **columns):
    """A parquet file of one row, its image inside."""
    file.parent.mkdir(parents=True, exist_ok=True)
    row = {"image": [image_bytes(red(1))], "pid": [7], "camid": [camid]}
    pq.write_table(pa.table(row | columns), file)


@pytest.mark.parametrize("paths", [None, "x.png", "/elsewhere/x.png"])
def test_metadata_file_a_split_with_the_images_inside(tmp_path, paths):
    for split in ("train", "query", "gallery"):
        one_image(
            tmp_path / split / "metadata.parquet", int(split == "gallery"), **({"path": [paths]} if paths else {})
        )
    data = load_reid(tmp_path)
    assert {split: dataset["pid"][:] for split, dataset in data.items()} == {
        "train": [7],
        "query": [7],
        "gallery": [7],
    }
    assert data["gallery"]["path"][:] == ["gallery/x.png" if paths == "x.png" else "gallery/0000000"]
    assert data["gallery"][0]["image"].getpixel((0, 0)) == red(1)


def test_parquet_files_of_different_widths(tmp_path):
    one_image(tmp_path / "train-0.parquet", pid=pa.array([3], pa.int32()), path=pa.array(["a"], pa.string()))
    one_image(tmp_path / "train-1.parquet", pid=pa.array([4], pa.int64()), path=pa.array(["b"], pa.large_string()))
    assert contents(load_reid(tmp_path)) == {"train": [(3, 0, "a"), (4, 0, "b")]}
    one_image(tmp_path / "train-2.parquet", pid=["five"], path=["c"])
    with pytest.raises(ValueError, match=r"do not go together: .*pid"):
        load_reid(tmp_path)


def test_parquet_file_of_no_split_beside_those_of_splits(tmp_path):
    """Otherwise queries and gallery would become training images."""
    for split in ("train", "query", "gallery"):
        one_image(tmp_path / f"{split}.parquet", int(split == "gallery"))
    one_image(tmp_path / "test.parquet")
    with pytest.raises(ValueError, match=r"has test.parquet beside the files of train, query, gallery"):
        load_reid(tmp_path)
    for split in ("train", "query", "gallery"):
        one_image(tmp_path / f"{split}.parquet", int(split == "gallery"), split=[split], path=[split])
    one_image(tmp_path / "test.parquet", 1, split=["gallery"], path=["more"])
    assert {split: len(dataset) for split, dataset in load_reid(tmp_path).items()} == {
        "train": 1,
        "query": 1,
        "gallery": 2,
    }


def test_folder_an_identity(tmp_path):
    for path in ("train/0007/x_c3_1.jpg", "train/0009/x_c1_1.jpg", "query/11/cam1_0.png", "gallery/11/a-cam10.PNG"):
        paint(tmp_path / "own" / path)
    for junk in (".DS_Store", "train/._x", "train/0007/Thumbs.db", "train/0007/._x_c3_1.jpg"):
        (tmp_path / "own" / junk).write_bytes(b"junk")
    for document in ("README.txt", "LICENSE", "train/readme.md", "train/0007/Citation.cff"):
        (tmp_path / "own" / document).write_text("about the images")
    (tmp_path / "own/train/__MACOSX").mkdir()
    data = load_reid(tmp_path / "own")
    assert contents(data) == {
        "train": [(7, 1, "train/0007/x_c3_1.jpg"), (9, 0, "train/0009/x_c1_1.jpg")],
        "query": [(11, 0, "query/11/cam1_0.png")],
        "gallery": [(11, 2, "gallery/11/a-cam10.PNG")],
    }


def test_folders_of_market_1501_with_images_of_ones_own(tmp_path):
    """As the benchmark's own reader has them; with more cameras, other endings and longer names too."""
    files = ["bounding_box_train/0002_c1s1_000451_03.jpg", "bounding_box_train/0002_c3s1_000551_01.jpg"]
    files += ["query/0007_c1s1_000001_00.jpg", "bounding_box_test/0007_c2s1_000001_01.jpg.jpg"]
    files += ["bounding_box_test/0000_c1s1_000009_00.jpg", "bounding_box_test/-1_c6s2_000008_02.jpg"]
    for path in [*files, "gt_bbox/0007_c1s1_000001_00.jpg"]:
        paint(tmp_path / "own" / path)
    published = contents(load_reid("market1501", root=tmp_path / "own"))
    assert [len(rows) for rows in published.values()] == [2, 1, 2]
    assert contents(load_reid(tmp_path / "own")) == published
    paint(tmp_path / "own/query/12345_c17_evening.png")
    paint(tmp_path / "own/bounding_box_test/12345_c2_morning.webp")
    own = contents(load_reid(tmp_path / "own"))
    assert (12345, 3, "query/12345_c17_evening.png") in own["query"] and len(own["gallery"]) == 3
    with pytest.raises(ValueError, match="12345_c17_evening.png"):
        load_reid("market1501", root=tmp_path / "own")


def test_folders_of_person_reid_baseline_pytorch(tmp_path):
    """One folder an identity in train_all, gallery and query; train and val are parts of train_all."""
    for path in ("train_all/0002/0002_c1s1_1.jpg", "train_all/0002/0002_c2s1_2.jpg", "train_all/0007/0007_c1s1_1.jpg"):
        paint(tmp_path / "own" / path)
        paint(tmp_path / "own" / path.replace("train_all", "val" if path.endswith("_2.jpg") else "train"))
    for path in ("query/0001/0001_c1s1_1.jpg", "gallery/0001/0001_c3s1_1.jpg", "gallery/0000/0000_c1s1_1.jpg"):
        paint(tmp_path / "own" / path)
    for path in ("gallery/-1/-1_c1s1_1.jpg", "multi-query/0001/0001_c1s1_1.jpg"):
        paint(tmp_path / "own" / path)
    assert contents(load_reid(tmp_path / "own")) == {
        "train": [
            (2, 0, "train_all/0002/0002_c1s1_1.jpg"),
            (2, 1, "train_all/0002/0002_c2s1_2.jpg"),
            (7, 0, "train_all/0007/0007_c1s1_1.jpg"),
        ],
        "query": [(1, 0, "query/0001/0001_c1s1_1.jpg")],
        "gallery": [(0, 0, "gallery/0000/0000_c1s1_1.jpg"), (1, 2, "gallery/0001/0001_c3s1_1.jpg")],
    }


def test_a_text_that_is_no_document_stops_and_a_folder_may_have_its_name(tmp_path):
    paint(tmp_path / "own/readme/1.jpg")
    paint(tmp_path / "own/zoe/1.jpg")
    assert len(load_reid(tmp_path / "own")["train"].unique("pid")) == 2
    (tmp_path / "own/readme_first_labels.txt").write_text("1.jpg 7")
    with pytest.raises(ValueError, match="readme_first_labels.txt: expected one folder an identity"):
        load_reid(tmp_path / "own")


def test_folder_an_identity_by_name_and_without_cameras(tmp_path):
    for path in ("zoe/2.jpg", "zoe/1.jpg", "adam/1.jpg"):
        paint(tmp_path / "own" / path)
    data = load_reid(tmp_path / "own")
    assert contents(data) == {"train": [(0, 0, "adam/1.jpg"), (1, 0, "zoe/1.jpg"), (1, 0, "zoe/2.jpg")]}
    # a number too long for a pid is a name
    paint(tmp_path / "stamps/20231122334455667788/1.jpg")
    paint(tmp_path / "stamps/7/1.jpg")
    assert load_reid(tmp_path / "stamps")["train"]["pid"][:] == [0, 1]
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
        (["a/x/1.jpg", "b/1.jpg"], r"a/x is a folder; expected images directly in .*a, the .*cam1/anna/1.jpg"),
        (["cam1/cam2/1.jpg", "c1/c2/1.jpg"], r"is a folder; expected images directly in"),
        (["a/cam1/1.jpg", "a/2.jpg"], r"a/2.jpg lies beside folders"),
        (["a/cam1/x/1.jpg"], r"a/cam1/x is a folder; expected images there"),
        (["train/a/1.jpg", "test/a/1.jpg"], r"has test beside train"),
        (["bounding_box_train/1_c1.jpg", "query/1_c1.jpg"], "query and gallery go together"),
        (["list_train.txt"], "name it: msmt17 instead of the folder, and --data_root"),
        (["train/a/1.jpg", "query/a/1.jpg"], "query and gallery go together"),
    ],
)
def test_folders_that_are_not_understood(tmp_path, paths, words):
    for path in paths:
        paint(tmp_path / "own" / path, format="JPEG")
    with pytest.raises(ValueError, match=words):
        load_reid(tmp_path / "own")


def test_file_name_that_is_no_text(tmp_path):
    paint(tmp_path / "own/1/a.png")
    odd = os.path.join(os.fsencode(tmp_path), b"own/1/b\xff.png")
    try:
        os.link(os.fsencode(tmp_path / "own/1/a.png"), odd)
    except OSError:
        pytest.skip("this file system takes no such names")
    with pytest.raises(ValueError, match=r"own/1/b\\udcff.png' is no UTF-8.*rename it"):
        load_reid(tmp_path / "own")


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
        (("test", 7, 0, "test/g.png"), r"knows \['test'\] as splits"),
    ],
)
def test_rows_that_are_wrong(folder, row, words):
    paint(folder / "train/g.png")
    paint(folder.parent / "secret.png")
    with pytest.raises(ValueError, match=words):
        load_reid(with_rows(folder, row))


def test_tables_with_nothing_in_them(folder):
    for content, words in (
        ("file_name,pid,camid\n", "metadata.csv has no rows"),
        ("", "metadata.csv cannot be read"),
        ("file_name,pid,camid,pid\ntrain/a.png,1,0,2\n", "more than one column 'pid'"),
    ):
        (folder / "metadata.csv").write_text(content)
        with pytest.raises(ValueError, match=words):
            load_reid(folder)


def test_columns_of_a_wrong_type(folder):
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
    with pytest.raises(ValueError, match=r"only under the query's own camera.*11 \(camera 0\).*:camid_column=none"):
        load_reid(with_rows(folder, ("gallery", 11, 0, "gallery/g.png"), drop=[4]))


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


@pytest.mark.parametrize("options", [{"type": "torch"}, {"type": "numpy", "columns": ["pid"]}])
def test_saved_set_that_remembers_a_format(folder, tmp_path, options):
    write_table(folder / "metadata.csv", ROWS)
    load_reid(folder).with_format(**options).save_to_disk(str(tmp_path / "theirs"))
    data = load_reid(tmp_path / "theirs")
    assert contents(data) == expected()
    assert labels_of(data["train"]).tolist() == labels_of(load_reid(folder)["train"]).tolist()
    assert data["gallery"][0]["image"].getpixel((0, 0)) == red(4)


def test_saved_set_in_one_piece_with_a_split_column(folder, tmp_path):
    write_table(folder / "metadata.csv", ROWS)
    parts = load_reid(folder)
    whole = datasets.concatenate_datasets(list(parts.values()))
    words = [split for split in parts for _ in range(len(parts[split]))]
    whole.add_column("part", words).save_to_disk(str(tmp_path / "one"))
    assert contents(load_reid(tmp_path / "one", split_column="part")) == expected()
    labels = datasets.ClassLabel(names=list(parts))
    whole = whole.add_column("site", words).cast_column("site", labels).add_column("split", words)
    whole.cast_column("split", labels).save_to_disk(str(tmp_path / "labels"))
    data = load_reid(tmp_path / "labels", domain_column="site")
    assert contents(data) == expected() and set(data["query"]["domain"][:]) == {"query"}
    whole.remove_columns("split").add_column("split", ["test"] * len(words)).save_to_disk(str(tmp_path / "two"))
    with pytest.raises(ValueError, match=r"knows \['test'\] as splits"):
        load_reid(tmp_path / "two")


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
