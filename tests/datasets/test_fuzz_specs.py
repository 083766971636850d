"""Drawn specs, benchmark folders, files of splits and part masks: read rightly, or refused in one line."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import strategies as st
from safetensors.numpy import save

from tests.hostile import (
    CASES,
    case_folder,
    damaged,
    fuzz,
    outcome,
    snapshot,
    write_tree,
)
from tests.tables import paint
from utils.datasets.load import load_reid, load_sources, open_source
from utils.datasets.own import data as own_data
from utils.datasets.part_masks import FORMAT, PartMasks, fixed_rows, image_keys
from utils.datasets.published import BENCHMARKS
from utils.datasets.unlabelled import open_unlabelled
from utils.synthetic.parts import PARTS

KEYS = ["domain", "num_ids", "images_per_id", "seed", "holdout", "holdout_seed", "image_fraction", "fraction_seed"]
KEYS += ["identity_fraction", "skip_unreadable", "pid_column", "camid_column", "split_column", "split", "split_file"]
KEYS += [
    "variant",
    "version",
    "reverse",
    "all_for_training",
    "revision",
    "image_column",
    "domain_column",
    "nonsense",
    "",
]
TEXTS = [
    "a",
    "b",
    "none",
    "0",
    "1",
    "-1",
    "3",
    "4",
    "0.5",
    "1.5",
    "nan",
    "inf",
    "1e3",
    "true",
    "x",
    "",
    "detected",
    "7" * 30,
]
SOURCES = [
    "synthetic",
    "synthetic",
    "own",
    "own",
    "market1501",
    "viper",
    "cuhk03np",
    "msmt17",
    "marked1501",
    "a/b",
    "",
    ":",
]


@pytest.fixture
def no_hub(monkeypatch):
    """A Hub that nobody reaches."""

    def absent(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(own_data.HfApi, "dataset_info", absent)
    monkeypatch.setattr(own_data.datasets, "load_dataset", absent)


def own_folder(folder):
    for number in range(8):
        paint(folder / "own" / str(number % 4) / f"{number}_c{number // 4 + 1}.png", (20 * number, 0, 0))
    return folder / "own"


@pytest.mark.parametrize("cases", CASES)
def test_specs(cases, tmp_path, no_hub):
    own = own_folder(tmp_path)
    before = snapshot(tmp_path)

    def check(source, options, tail, rooted):
        text = source.replace("own", str(own))
        text += ":" + ",".join(f"{key}={value}" for key, value in options) + tail if options or tail else ""
        root = tmp_path if rooted else None
        names = [repr(text)[1:-1], source or repr(text), own, tmp_path, *(f"{key} must be" for key, _ in options)]
        data, _ = outcome(lambda: load_reid(text, root), *names)
        if data is not None:
            assert all(len(part) for part in data.values())
            if source == "synthetic" and not set(dict(options)) - {"domain", "num_ids", "images_per_id", "seed"}:
                wanted = int(dict(options).get("num_ids", 32)) * int(dict(options).get("images_per_id", 8))
                assert len(data["train"]) == len(data["query"]) + len(data["gallery"]) == wanted
        outcome(lambda: load_sources([text, "synthetic:num_ids=2,images_per_id=3"], root), *names)
        outcome(lambda: open_unlabelled([text], root), *names)
        outcome(lambda: open_source([text], root, single_image_ids="repeat"), *names)

    option = st.tuples(st.sampled_from(KEYS[:9] * 2 + KEYS), st.sampled_from(TEXTS))
    tail = st.sampled_from([""] * 6 + [",", "=", ":x", "\n"])
    fuzz(check, st.sampled_from(SOURCES), st.lists(option, max_size=3), tail, st.booleans(), cases=cases)
    assert snapshot(tmp_path) == before


# Folders and names of each benchmark: (folder, names that fit).
LAYOUTS = {
    "market1501": [
        (place, ["0001_c1s1_000001_00.jpg", "0001_c2s1_000002_00.jpg", "-1_c1s1_000001_00.jpg",
                 "0000_c3s1_000003_00.jpg"])
        for place in ("bounding_box_train", "query", "bounding_box_test")
    ],
    "dukemtmcreid": [
        (place, ["0001_c1_f0000001.jpg", "0001_c2_f0000002.jpg", "0002_c3_f0000003.jpg"])
        for place in ("bounding_box_train", "query", "bounding_box_test")
    ],
    "cuhk03np": [
        (f"detected/{place}", ["0001_c1_1.png", "0001_c2_2.png", "1_001_1_01.png"])
        for place in ("bounding_box_train", "query", "bounding_box_test")
    ],
    "msmt17": [("train/0000", ["0000_000_01_0303morning_0008_1.jpg"]),
               ("test/0000", ["0000_000_02_0303noon_0008_1.jpg"])],
    "cuhk02": [(f"P{pair}/cam{camera}", ["001_1.png", f"{'9' * 30}_1.png"])
               for pair in range(1, 6) for camera in (1, 2)],
    "cuhksysu": [("cropped_images", ["p1_s3_1.jpg", "p2_s4_1.jpg", f"p{'9' * 30}_s1_1.jpg"])],
    "viper": [("cam_a", [f"{pid:03d}_0.bmp" for pid in range(4)]),
              ("cam_b", [f"{pid:03d}_90.bmp" for pid in range(4)])],
    "grid": [("probe", ["0001_1_00001_1.jpeg", "0002_1_00002_1.jpeg"]),
             ("gallery", ["0001_2_00001_1.jpeg", "0002_2_00001_1.jpeg", "0000_3_00001_1.jpeg"])],
    "prid": [(f"single_shot/cam_{camera}", ["person_0001.png", "person_0002.png", "person_0300.png"])
             for camera in "ab"],
    "ilids": [("Persons", [f"{pid:04d}{index:03d}.jpg" for pid in (1, 2, 3) for index in (1, 2)])],
    "airport": [("c1/11001", ["0001.jpg", "0002.jpg"]), ("c2/11001", ["0001.jpg"])],
    "personx": [(place, ["0001_c3s1_02.jpg", "0001_c4s1_02.jpg", f"0001_c{'9' * 30}s1_02.jpg"])
                for place in ("bounding_box_train", "query", "bounding_box_test")],
    "luperson": [("a", ["000001_0000123_00.jpg", "000002_0000123_00.jpg"])],
}  # fmt: skip
LISTS = [
    "list_train.txt",
    "list_val.txt",
    "list_query.txt",
    "list_gallery.txt",
    "filepath.txt",
    "split.json",
    "split.txt",
]
LINES = ["0000/0000_000_01_0303morning_0008_1.jpg 0", "0000/0000_000_02_0303noon_0008_1.jpg 0"]
LINES += [
    f"0000/0000_000_01_0303morning_0008_1.jpg {'9' * 30}",
    "c1\\11001\\0001.jpg",
    "c2/11001/0001.jpg",
    "c1\\9\\x.jpg",
]
LINES += [
    f"c1/{'9' * 30}/0001.jpg",
    "../11001/x.jpg",
    "1",
    "2",
    "",
    "x",
    "²/²/²",
    "[1, 2]",
    '{"test": [1, 2]}',
    "[[1], [2]]",
]
LINES += [
    '[{"query": [["a/001_0.bmp"]]}]',
    "[Infinity]",
    '{"query": 3}',
    "[" * 2000,
    "[1.5]",
    "1 1",
    "null",
    '"1"',
    "[true]",
]
STRAY = ["notes.txt", "0001.jpg", ".DS_Store", "1_c1.jpg", "0001_c9s1_000001_00.jpg", "p1.jpg"]


@st.composite
def benchmarks(draw):
    """(name, layout, options): most files fit."""
    name = draw(st.sampled_from(sorted(LAYOUTS)))
    files = []
    for place, names in LAYOUTS[name]:
        chosen = draw(st.one_of(st.just(names[: 1 + len(names) // 2]), st.lists(st.sampled_from(names), max_size=4)))
        files += [(f"{place}/{one}", draw(st.sampled_from(["image"] * 15 + ["empty", "folder"]))) for one in chosen]
        if draw(st.sampled_from([False] * 8 + [True])):
            files.append((f"{place}/{draw(st.sampled_from(STRAY))}", "text"))
    for file in LISTS:
        part = {"msmt17": "list_", "airport": "file"}.get(name, "split")
        if file.startswith(part) and draw(st.sampled_from([True] * 6 + [False])):
            lines = LINES[:2] if part == "list_" else LINES[3:6] if part == "file" else LINES[8:]
            lines = draw(st.lists(st.sampled_from(lines * 4 + LINES), min_size=1, max_size=3))
            files.append((file, draw(st.sampled_from(["\n".join(lines).encode()] * 8 + [b"\xff\xfe", "folder"]))))
    options = {
        "viper": ["", "split=3", "split=10", "split=x", "split_file=ROOT/split.json", "split_file=ROOT/split.txt",
                  "split_file=ROOT/split.json,split=-1", "reverse=true", "reverse=3"],
        "msmt17": ["", "version=V1", "version=V3", "version=converted"],
        "cuhk03np": ["", "variant=labeled", "variant=1"],
    }  # fmt: skip
    options |= dict.fromkeys(("grid", "prid", "ilids"), options["viper"][:6])
    return name, files, draw(st.sampled_from([*options.get(name, [""]), "all_for_training=true", "nonsense=1"]))


@pytest.mark.parametrize("cases", CASES)
def test_benchmark_folders(cases):
    def check(benchmark, skip):
        name, layout, options = benchmark
        with case_folder() as folder:
            root = write_tree(Path(folder) / name, layout)
            before = snapshot(folder)
            spec = f"{name}{options and ':' + options.replace('ROOT', str(root))}"
            data, _ = outcome(lambda: load_reid(spec, root, skip_unreadable=skip), root, name)
            if data is not None:
                paths = [path for part in data.values() for path in part["path"][:]]
                assert len(set(paths)) == len(paths) and all((root / path).exists() for path in paths)
                files = [file for file, _ in {*layout} if file.endswith(("jpg", "png", "bmp", "jpeg"))]
                files = {file for file in files if not Path(file).name.startswith(("-1", "."))}
                everything = name in ("dukemtmcreid", "cuhk03np", "cuhk02", "cuhksysu", "personx", "luperson")
                if everything or name == "market1501" and "all_for" not in options:
                    assert skip or set(paths) == files
                assert set(paths) <= files
            assert snapshot(folder) == before

    fuzz(check, benchmarks(), st.sampled_from([False, False, True]), cases=cases)


def test_every_benchmark_has_a_layout():
    assert {*LAYOUTS, "occludedduke"} == set(BENCHMARKS)


@pytest.mark.parametrize("cases", CASES)
def test_part_masks(cases):
    people = load_reid("synthetic", num_ids=2, images_per_id=3)["train"]
    keys = image_keys(people)
    packed = np.packbits(fixed_rows((16, 8)).reshape(1, -1), axis=1).repeat(len(people), 0)
    about = {"format": FORMAT, "parts": json.dumps(list(PARTS)), "grid": "[16, 8]", "rule": "centre", "made_by": "x"}
    arrays = [
        keys,
        packed,
        packed[:3],
        packed[:, :7],
        keys[:, :4],
        packed.astype(np.float32),
        keys[0],
        np.zeros((0, 8)),
    ]
    texts = [
        "[16, 8]",
        "[8, 16]",
        "[16]",
        "16",
        "[]",
        "[[16], 8]",
        '["16", 8]',
        "[16, -8]",
        "[1e9, 1e9]",
        "{}",
        "null",
        "{",
    ]
    texts += ['["head"]', "7", '[["a"]]', f"[{10**9}, {10**9}]", "[0, 8]", "[16, true]", '"ab"']

    def check(data):
        metadata, tensors = dict(about), {"keys": keys, "masks": packed}
        for _ in range(data.draw(st.integers(0, 2))):
            name = data.draw(st.sampled_from(["keys", "masks", "grid", "parts", "format"]))
            gone = data.draw(st.sampled_from([False] * 5 + [True]))
            if name in tensors:
                tensors.pop(name) if gone else tensors.update({name: data.draw(st.sampled_from(arrays))})
            elif name in metadata:
                metadata.pop(name) if gone else metadata.update({name: data.draw(st.sampled_from(texts))})
        content = save({name: np.ascontiguousarray(array) for name, array in tensors.items()}, metadata)
        content = damaged(data.draw, content)
        with case_folder() as folder:
            root = Path(folder)
            (root / "masks.safetensors").write_bytes(content)
            (root / "rows.safetensors").write_bytes(save({"keys": keys, "masks": packed}, about))
            paths = [root / "masks.safetensors"] + data.draw(st.sampled_from([[], [root / "rows.safetensors"]]))
            before = snapshot(folder)

            def use():
                masks = PartMasks.read(paths)
                masks.check_grid((16, 8))
                return masks.of(people)

            result, _ = outcome(use, root)
            if result is not None:
                assert result[0].shape == (len(people), len(PARTS), 128)
                if tensors["masks"] is packed and tensors["keys"] is keys and len(paths) == 1:
                    assert (result[0].numpy() == fixed_rows((16, 8))).all() or content != save(tensors, metadata)
            assert snapshot(folder) == before

    fuzz(check, st.data(), cases=cases)


# Found by drawing


@pytest.mark.parametrize(
    "name, files, words",
    [
        ("airport", [("filepath.txt", b"\xff\xfe")], "filepath.txt cannot be read as a list"),
        ("airport", [("filepath.txt", "folder")], "filepath.txt cannot be read as a list"),
        ("airport", [("filepath.txt", f"c1/{'9' * 30}/1.jpg".encode())], "too large a number"),
        ("msmt17", [("list_train.txt", b"\xff\xfe"), ("train/0000/x.jpg", "image")], "list_train.txt cannot be read"),
        ("cuhksysu", [(f"cropped_images/p{'9' * 30}_s1_1.jpg", "image")], "too large a number"),
    ],
)
def test_lists_and_numbers_of_benchmarks(tmp_path, name, files, words):
    with pytest.raises(ValueError, match=words):
        load_reid(name, write_tree(tmp_path / name, files))


@pytest.mark.parametrize("content", ['{"test": [Infinity]}', "[" * 3000])
def test_a_split_file_of_odd_json(tmp_path, content):
    root = write_tree(
        tmp_path / "viper", [("cam_a/001_0.bmp", "image"), ("cam_b/001_90.bmp", "image"), ("s.json", content.encode())]
    )
    with pytest.raises(ValueError, match="split_file .*s.json"):
        load_reid("viper", root, split_file=str(root / "s.json"))


@pytest.mark.parametrize(
    "about, tensors",
    [
        ({"grid": "{"}, {}),
        ({"grid": "null"}, {}),
        ({"grid": "[[16], 8]"}, {}),
        ({"grid": "[16, 8, 1]"}, {}),
        ({"parts": "[1]"}, {}),
        ({}, {"masks": np.zeros((2, 48), np.uint8)}),
        ({}, {"masks": np.zeros((3, 7), np.uint8)}),
        ({}, {"masks": np.zeros((3, 48), np.float32)}),
        ({}, {"keys": np.zeros(3, np.uint8)}),
    ],
)
def test_part_masks_that_do_not_fit(tmp_path, about, tensors):
    whole = {"format": FORMAT, "parts": json.dumps(list(PARTS)), "grid": "[16, 8]"}
    arrays = {"keys": np.zeros((3, 8), np.uint8), "masks": np.zeros((3, 48), np.uint8)}
    (tmp_path / "x.safetensors").write_bytes(save(arrays | tensors, whole | about))
    with pytest.raises(ValueError, match=r"--part_masks .*x.safetensors cannot be read: .*; make it with python"):
        PartMasks.read([tmp_path / "x.safetensors"])
