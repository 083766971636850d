"""Drawn tables, saved sets and archives: each is read with all of its rows, or refused in one line."""

import csv
import io
import json
import tarfile
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st

from tests.hostile import (
    CASES,
    PICTURE,
    SCALARS,
    VALUES,
    case_folder,
    changed_json,
    damaged,
    fuzz,
    outcome,
    snapshot,
    write_tree,
)
from utils.datasets.images import check_images
from utils.datasets.load import load_reid, load_sources
from utils.datasets.unlabelled import open_unlabelled

FILES = ["a.png", "b.png", "train/a.png", "query/b.png", "gallery/c.png"]
ODD_FILES = ["zz.png", "../x.png", "/etc/hostname", "", "train\\a.png", ".", "train", "a.png\x00", None, 7, "人.png"]
COLUMNS = ["file_name", "pid", "camid", "image", "path", "domain", "split", "label", "", "é"]
OPTIONS = ["pid_column=label", "pid_column=none", "camid_column=none", "image_column=path", "split_column=domain"]
OPTIONS += ["domain_column=label", "domain=x", "holdout=0.5", "image_fraction=0.5", "pid_column=pid", "camid_column=é"]
GOOD = {
    "file_name": st.sampled_from(FILES),
    "path": st.sampled_from(FILES),
    "image": st.sampled_from(FILES),
    "pid": st.sampled_from([1, 2, 3]),
    "camid": st.sampled_from([0, 1]),
    "label": st.sampled_from(["Anna", "Zoë", "7"]),
    "domain": st.sampled_from(["here", "there"]),
    "split": st.sampled_from(["train", "query", "gallery"]),
}
NAMES = ["metadata.{}", "labels.{}", "train.{}", "train/metadata.{}", "data/train-0.{}", "Leute.{}"]


@st.composite
def tables(draw, kinds=("csv", "tsv", "jsonl", "parquet")):
    """(name, rows as dicts of equal keys, bytes, whether they are whole)."""
    kind = draw(st.sampled_from(kinds))
    columns = ["file_name", "pid", "camid"] if draw(st.booleans()) else []
    columns += draw(st.lists(st.sampled_from(COLUMNS), max_size=3, unique=True))
    columns = list(dict.fromkeys(columns))
    odd = draw(st.sampled_from([None, None, *columns]))
    count = draw(st.integers(0, 5))
    values = {}
    for column in columns:
        kinds_of_column = GOOD.get(column, SCALARS)
        if column == odd:
            kinds_of_column = st.sampled_from(ODD_FILES) if column in ("file_name", "path", "image") else VALUES
        values[column] = draw(st.lists(kinds_of_column, min_size=count, max_size=count))
    if "file_name" in values and odd != "file_name" and count:
        # No image twice.
        values["file_name"] = FILES[:count]
    rows = [{column: values[column][row] for column in columns} for row in range(count)]
    content = {"csv": csv_bytes, "tsv": csv_bytes, "jsonl": json_lines, "parquet": parquet_bytes}[kind](columns, rows)
    changed = damaged(draw, content)
    return draw(st.sampled_from(NAMES)).format(kind), rows, changed, changed == content


def csv_bytes(columns, rows):
    file = io.StringIO()
    writer = csv.DictWriter(file, columns)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


def json_lines(columns, rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet_bytes(columns, rows):
    """Values of several kinds in a column become text, as pandas cannot write them either."""
    arrays = {}
    for column in columns:
        values = [row[column] for row in rows]
        try:
            arrays[column] = pa.array(values)
            pq.write_table(pa.table({"column": arrays[column]}), io.BytesIO())
        except (pa.ArrowException, OverflowError):
            arrays[column] = pa.array([repr(value) for value in values])
    file = io.BytesIO()
    pq.write_table(pa.table(arrays), file)
    return file.getvalue()


def check_set(folder, spec, rows=None):
    """Every way a set is opened; `rows` is how many it should have."""
    before = snapshot(folder)
    root = folder / "own"
    data, _ = outcome(lambda: load_reid(spec), root)
    if data is not None:
        assert rows is None or "fraction" in spec or "holdout" in spec or sum(map(len, data.values())) == rows
        for part in data.values():
            assert min(part["pid"][:]) >= 0 and min(part["camid"][:]) >= 0 and all(part["path"][:])
        outcome(lambda: check_images(data, where=str(root)), root)
        outcome(lambda: load_sources([spec, "synthetic:num_ids=2,images_per_id=3"]), root)
    outcome(lambda: open_unlabelled([spec], skip_unreadable=True), root)
    assert snapshot(folder) == before


@pytest.mark.parametrize("cases", CASES)
def test_tables(cases):
    def check(table, option, alone):
        name, rows, content, whole = table
        with case_folder() as folder:
            folder = Path(folder)
            layout = [(file, "image") for file in FILES]
            if name.startswith(("train/", "data/")):
                layout = [(f"{name.rpartition('/')[0]}/{file}", word) for file, word in layout]
            root = write_tree(folder / "own", [*layout, (name, content)])
            spec = f"{root / name if alone else root}{option and f':{option}'}"
            check_set(folder, spec, len(rows) if whole else None)

    option = st.sampled_from(["", "", "", *OPTIONS])
    fuzz(check, tables(), option, st.booleans(), cases=cases)


COLUMN_TYPES = [
    pa.array([1, 2, 3], pa.uint8()),
    pa.array([1, 2, 2**64 - 1], pa.uint64()),
    pa.array([1.0, 2.0, float("inf")]),
    pa.array([1.0, 2.0, 1e30]),
    pa.array([1.0, 2.0, 3.0], pa.float32()),
    pa.array([1.0, 2.0, 3.0], pa.float16()),
    pa.array(["a", "b", None]),
    pa.array(["a", "b", "c"], pa.large_string()),
    pa.array(["a", "b", "c"], pa.string_view()),
    pa.array([b"a", b"b", b"\xff"]),
    pa.array([b"a", b"b", b"c"], pa.large_binary()),
    pa.array(["a", "b", "a"]).dictionary_encode(),
    pa.array([1, 2, 1]).dictionary_encode(),
    pa.array([True, False, True]),
    pa.array([[1], [2], []]),
    pa.array([{"bytes": PICTURE, "path": "a.png"}, {"bytes": PICTURE, "path": "b"}, {"bytes": None, "path": "a.png"}]),
    pa.array([{"bytes": PICTURE, "path": None}] * 3),
    pa.array([{"bytes": "x", "path": 1}] * 3),
    pa.array([{"bytes": None, "path": None}] * 3),
    pa.array([PICTURE, PICTURE, b""]),
    pa.nulls(3),
    pa.array([1, 2, 3], pa.timestamp("ms")),
    pa.array([1, 2, 3], pa.int64()).cast(pa.decimal128(20, 0)),
    pa.array([1, 2, 3], pa.date32()),
    pa.array([0, 1, 0], pa.int8()),
    pa.array(["train", "query", "gallery"]),
    pa.array(["a.png", "b.png", "c.png"]),
]


@pytest.mark.parametrize("cases", CASES)
def test_columns_of_any_type(cases):
    def check(columns, option, split):
        with case_folder() as folder:
            folder = Path(folder)
            root = write_tree(folder / "own", [(f"{name}.png", "image") for name in "abc"])
            pq.write_table(pa.table(columns), root / f"{split}.parquet")
            check_set(folder, f"{root}{option and f':{option}'}", 3)

    typed = st.sampled_from(COLUMN_TYPES)
    files = st.sampled_from([*COLUMN_TYPES, *COLUMN_TYPES[-1:] * 20])
    others = {name: typed for name in COLUMNS if name not in ("file_name", "pid", "camid")}
    columns = st.fixed_dictionaries({"file_name": files, "pid": typed, "camid": typed}, optional=others)
    columns = st.one_of(columns, st.fixed_dictionaries({"image": typed, "pid": typed, "camid": typed}))
    fuzz(check, columns, st.sampled_from(["", "", *OPTIONS]), st.sampled_from(["any", "train"]), cases=cases)


def saved_set(folder):
    labels = datasets.Features({"image": datasets.Image(), "pid": datasets.ClassLabel(names=["a", "b"]),
                                "camid": datasets.Value("int64"), "split": datasets.Value("string")})  # fmt: skip
    rows = {"image": [{"bytes": PICTURE, "path": None}] * 3, "pid": [0, 1, 0], "camid": [0, 1, 2]}
    part = datasets.Dataset.from_dict({**rows, "split": ["train"] * 3}, features=labels)
    datasets.DatasetDict({"train": part}).save_to_disk(folder)
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("cases", [2000])
def test_saved_sets(cases, tmp_path):
    whole = saved_set(tmp_path / "whole")

    def check(data):
        content = dict(whole)
        name = data.draw(st.sampled_from(sorted(whole)))
        if name.suffix == ".json" and data.draw(st.booleans()):
            content[name] = json.dumps(changed_json(data.draw, json.loads(content[name]))).encode()
        else:
            content[name] = damaged(data.draw, content[name])
        if data.draw(st.sampled_from([False, False, False, True])):
            del content[name]
        with case_folder() as folder:
            folder = Path(folder)
            root = write_tree(folder / "own", [(str(path), part) for path, part in content.items()])
            root = root / data.draw(st.sampled_from(["", "", "train"]))
            if root.exists():
                check_set(folder, str(root), 3 if content == whole else None)

    fuzz(check, st.data(), cases=cases)


MEMBERS = ["a.png", "a.cls", "a.json", "b.jpg", "b.cls", "b.json", "dir/a.png", "dir/a.cls", "../x.png", "/x.png"]
MEMBERS += [".hidden.png", "a.seg.png", "a.txt", "c.PNG", "c.CLS"]
LABELS = ["3", "Anna", "", "\n", "9" * 30, "½", '{"pid": 1, "camid": 0}', '{"pid": [1]}', "[1]", "{", '{"pid": 1e400}']
LABELS += ['{"pid": null, "camid": true}', '{"pid": "x", "camid": 1.5, "split": "train"}', '{"pid": NaN, "camid": 1}']


@pytest.mark.parametrize("cases", CASES)
def test_archives(cases):
    def check(data):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as archive:
            chosen = data.draw(st.lists(st.sampled_from(MEMBERS[:6] * 2 + MEMBERS), max_size=6))
            for name in chosen:
                content = PICTURE if name.lower().endswith(("png", "jpg")) else data.draw(texts)
                info = tarfile.TarInfo(name)
                info.size = len(content)
                if data.draw(st.sampled_from([False] * 9 + [True])):
                    info.type, info.size, info.linkname = tarfile.SYMTYPE, 0, "a.png"
                archive.addfile(info, io.BytesIO(content))
        content = damaged(data.draw, file.getvalue())
        with case_folder() as folder:
            folder = Path(folder)
            name = data.draw(st.sampled_from(["train-0.tar", "shard.tar", "train/0.tar"]))
            root = write_tree(folder / "own", [(name, content)])
            images = [one for one in chosen if one.lower().endswith(("png", "jpg")) and not one.startswith(".")]
            whole = content == file.getvalue()
            option = data.draw(st.sampled_from(["", "", ":camid_column=none", ":pid_column=none", ":pid_column=x"]))
            place = root / name if data.draw(st.booleans()) else root
            check_set(folder, f"{place}{option}", len(images) if whole else None)

    texts = st.one_of(st.sampled_from(LABELS).map(str.encode), st.just(b"\xff\xfe"))
    fuzz(check, st.data(), cases=cases)


# Found by drawing


@pytest.mark.parametrize(
    "columns, words",
    [
        ({"pid": pa.array([1, 2, 2**64 - 1], pa.uint64())}, "'pid' holds numbers as large as 1.84467e.19"),
        ({"camid": pa.array([1.0, 2.0, 1e30])}, "'camid' holds numbers as large as 1e.30"),
        ({"file_name": pa.array([{"bytes": "x", "path": 1}] * 3)}, "must hold images or file names"),
        ({"file_name": pa.array(["a.png", "b.png", "c\0.png"])}, "null byte|1 of 3 images cannot be read"),
    ],
)
def test_columns_that_hold_something_else(tmp_path, columns, words):
    root = write_tree(tmp_path / "own", [(f"{name}.png", "image") for name in "abc"])
    whole = {"file_name": pa.array(["a.png", "b.png", "c.png"]), "pid": COLUMN_TYPES[0], "camid": COLUMN_TYPES[0]}
    pq.write_table(pa.table(whole | columns), root / "x.parquet")
    with pytest.raises(ValueError, match=words):
        load_reid(root)


@pytest.mark.parametrize(
    "columns",
    [
        {"pid": pa.array([1.0, 2.0, 3.0], pa.float16())},
        {"camid": pa.array([1, 2, 3], pa.uint64())},
        {"split": pa.array(["train"] * 3, pa.string_view())},
        {"domain": pa.array(["x", "y", "z"], pa.string_view()), "image": pa.array([PICTURE] * 3),
         "path": pa.array([1.0, 2.0, 3.0])},
    ],
)  # fmt: skip
def test_columns_of_rare_types_are_read(tmp_path, columns):
    root = write_tree(tmp_path / "own", [(f"{name}.png", "image") for name in "abc"])
    whole = {"file_name": pa.array(["a.png", "b.png", "c.png"]), "pid": COLUMN_TYPES[0], "camid": COLUMN_TYPES[0]}
    pq.write_table(pa.table(whole | columns), root / "x.parquet")
    assert load_reid(root)["train"]["pid"][:] == [1, 2, 3]


@pytest.mark.parametrize("content", [b"\xff\x00\r\n", b"file_name,p\x00id,pid,camid\na.png,1,1,1\n"])
def test_names_of_columns_that_are_no_text(tmp_path, content):
    root = write_tree(tmp_path / "own", [("a.png", "image"), ("metadata.csv", content)])
    with pytest.raises(ValueError, match="cannot be read"):
        load_reid(root)


@pytest.mark.parametrize("change", [{"description": 7}, {"features": []}, {"features": 3}])
def test_a_saved_set_with_other_json(tmp_path, change):
    saved_set(tmp_path / "own")
    path = tmp_path / "own" / "train" / "dataset_info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match="own is a damaged save_to_disk folder"):
        load_reid(tmp_path / "own")
