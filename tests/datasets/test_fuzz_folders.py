"""Drawn layouts of folders: each is read with all of its files, or refused in one line; nothing is written."""

import os
from pathlib import Path

import pytest
from hypothesis import strategies as st

from tests.hostile import CASES, NOT_TEXT, case_folder, fuzz, outcome, snapshot, write_tree
from utils.datasets.images import check_images
from utils.datasets.load import load_reid
from utils.datasets.schema import ENDINGS, hidden
from utils.datasets.search_folders import read_folders
from utils.datasets.tracklets import read_tracklets
from utils.datasets.unlabelled import open_unlabelled

IDENTITIES = ["0001", "1", "7", "12", "Anna", "anna ", "-1", "cam2", "9" * 19, "人", "a b", ".dot", "__MACOSX", "²"]
PLACES = ["", "train", "query", "gallery", "val", "data", "bounding_box_train", "img1", "gt", "det"]
LABELLED = ["0001_c2_x.jpg", "0001_c1.png", "2_c2s1_000123_00.jpg", "7_c3_1.bmp", f"1_c{'9' * 25}.jpg"]
LABELLED += [f"{'8' * 25}_c1.jpg", "-1_c1_0.jpg", "٣_c٤.png"]
IMAGES = [*LABELLED, "a.png", "b.JPG", "x_cam2.png", "x_c1_f7.png", "y_c2_f9.png", "000001.jpg", "1.gif", NOT_TEXT]
IMAGES += ["0b1c2d3e-1111-4222-8333-c2c2c2c2c2c2.png", f"x_c1_f{'9' * 30}.png", f"2_c1s1_{'9' * 30}_00.jpg"]
OTHERS = ["notes.txt", ".DS_Store", "Thumbs.db", "all.zip", "gt.txt", "metadata.csv", "x.jsonl", "state.json"]
OTHERS += ["people.parquet", "shard.tar", "dataset_dict.json", "list_train.txt", "0001_c1.jpg.jpg", "noname"]
CONTENT = st.sampled_from(["image"] * 12 + ["empty", "cut", "text", "bytes", "folder"])


@st.composite
def layouts(draw):
    """Files of one kind of layout, and a few that may not fit."""
    split = st.sampled_from(draw(st.sampled_from([[""], ["train"], ["train", "query", "gallery"], PLACES])))
    depth = draw(st.sampled_from([0, 1, 1, 1, 2]))
    names = draw(st.sampled_from([IMAGES[:3], LABELLED, IMAGES]))
    folder = st.lists(st.sampled_from(IDENTITIES[: draw(st.sampled_from([4, 14]))]), min_size=depth, max_size=depth)
    orderly = st.tuples(split, folder, st.sampled_from(names), st.just("image"))
    odd = st.tuples(
        st.sampled_from(PLACES), st.lists(st.sampled_from(IDENTITIES), max_size=3),
        st.sampled_from(IMAGES + OTHERS), CONTENT,
    )  # fmt: skip
    files = draw(st.lists(orderly, max_size=8)) + draw(st.lists(odd, max_size=draw(st.sampled_from([0, 0, 1, 3]))))
    return [("/".join(part for part in (place, *inner, name) if part), word) for place, inner, name, word in files]


def visible(root):
    """Paths below the root that no part hides."""
    for level, inner, names in os.walk(root):
        inner[:] = [name for name in inner if not hidden(name)]
        yield from (os.path.relpath(os.path.join(level, name), root) for name in names if not hidden(name))


def check_own(folder, layout, options, skip):
    root = write_tree(folder / "people", layout)
    before = snapshot(folder)
    spec = f"{root}:{options}" if options else str(root)
    data, _ = outcome(lambda: load_reid(spec, skip_unreadable=skip), root)
    files = list(visible(root))
    described = [name for name in files if name.endswith((".csv", ".jsonl", ".parquet", ".tar", "t.json", "e.json"))]
    if data is not None and not described:
        rows = sum(map(len, data.values()))
        # Without leave to skip, every file is a row.
        assert rows == len(files) if not skip else rows <= len(files)
        if not skip and not options.startswith("holdout"):
            assert sum(len(set(part["pid"][:])) for part in data.values()) == len(identities_of(files))
        outcome(lambda: check_images(data, where=str(root)), root)
    outcome(lambda: open_unlabelled([spec], skip_unreadable=skip), root)
    assert snapshot(folder) == before


def identities_of(files):
    """(split, identity) of each file: its folder, or the number that the name begins with."""
    pairs = set()
    for *above, name in (path.split("/") for path in files):
        split = above[0] if above and above[0] in ("train", "query", "gallery") else ""
        inner = above[1:] if split else above
        pairs.add((split, inner[0] if inner else int(name.partition("_c")[0])))
    return pairs


@pytest.mark.parametrize("cases", CASES)
def test_own_folders(cases):
    def check(layout, options, skip):
        with case_folder() as folder:
            check_own(Path(folder), layout, options, skip)

    options = st.sampled_from(["", "", "", "camid_column=none", "holdout=1", "holdout=0.5,holdout_seed=3", "domain=x"])
    fuzz(check, layouts(), options, st.sampled_from([False, False, True]), cases=cases)


PATTERN_PARTS = ["{pid}"] * 4 + ["{camid}", "{split}", "*", "*", "/", "/", "_", "_c", "-", "{", "}", "{who}", ".png"]


@pytest.mark.parametrize("cases", CASES)
def test_names_by_patterns(cases):
    def check(layout, parts, skip):
        with case_folder() as folder:
            root = write_tree(Path(folder) / "people", layout)
            before = snapshot(folder)
            data, _ = outcome(lambda: load_reid(f"{root}:names={''.join(parts)}", skip_unreadable=skip), root)
            if data is not None and not skip:
                assert sum(map(len, data.values())) == sum(name.lower().endswith(ENDINGS) for name in visible(root))
            assert snapshot(folder) == before

    patterns = st.lists(st.sampled_from(PATTERN_PARTS), min_size=1, max_size=6)
    orderly = st.sampled_from([["*/{pid}/*"], ["*_c{camid}_{pid}"], ["{split}/{pid}/*"], ["{pid}_c{camid}_*"]])
    fuzz(check, layouts(), patterns | orderly, st.sampled_from([False, True, True]), cases=cases)


@pytest.mark.parametrize("cases", CASES)
def test_search_folders(cases):
    def check(layout, gallery):
        with case_folder() as folder:
            root = write_tree(Path(folder) / "people", layout)
            before = snapshot(folder)
            sides = [root] if gallery is None else [root, root / gallery]
            result, _ = outcome(lambda: read_folders(*sides), root)
            if result is not None:
                images = [name for name in visible(root) if name.lower().endswith(ENDINGS)]
                assert sorted(result[0]["path"][:]) == sorted(images)
                outcome(lambda: check_images(result[0], where=str(root)), root)
            assert snapshot(folder) == before

    fuzz(check, layouts(), st.sampled_from([None, "", "train", "a.png", "0001"]), cases=cases)


LINES = ["1,1,0,0,2,4,1", "1,2,0,0,3,5,1", "2,1,1,1,2,4,1,1,1", "1,-1,0,0,2,2,0.5", "3,1,0,0,9,9,1", "1 1 0 0 2 4 1"]
LINES += ["1,1,50,50,2,4,1", "1,1,nan,0,2,4,1", "x", "1,1,0,0,inf,4", "1.5,1,0,0,1,1", "1,1,0,0,2,4,0", ""]
LINES += ["1,1,1e308,0,1e308,4,1", "1e30,1,0,0,2,4,1", "1,1e30,0,0,2,4,1", "1,1,-1e300,0,2e300,4,1", "1,1,0,0,-2,4,1"]


@st.composite
def sequences(draw):
    """A MOT sequence, whole or half, in the folder or below it."""
    place = draw(st.sampled_from(["", "cam1/", "cam2/deep/"]))
    frames = draw(st.lists(st.sampled_from(["000001.jpg", "000002.png", "3.jpg", "x.jpg", "1.png"]), max_size=4))
    lines = "\n".join(draw(st.lists(st.sampled_from(LINES[:6] * 3 + LINES), max_size=5))).encode()
    name = draw(st.sampled_from(["gt/gt.txt", "gt/gt.txt", "det/det.txt", "cam1.txt"]))
    content = draw(st.sampled_from([lines] * 6 + [b"\xff\xfe", b"\xef\xbb\xbf" + lines]))
    layout = [(f"{place}img1/{frame}", draw(CONTENT)) for frame in frames]
    return layout + [(place + name, content)] + draw(st.sampled_from([[], [(f"{place}other.txt", lines)]]))


@pytest.mark.parametrize("cases", CASES)
def test_tracklets(cases):
    def check(layout, skip):
        with case_folder() as folder:
            root = write_tree(Path(folder) / "people", layout)
            before = snapshot(folder)
            found, _ = outcome(lambda: read_tracklets(root, skip_unreadable=skip), root)
            if found is not None:
                # Boxes that are equal, of two tracks, are one image.
                rows = {row for item in found.items for row in item.rows}
                assert rows == set(range(len(found.images)))
                assert len(found.pids) == len(found.camids) == len(found.items) and found.described()
                images = [name for name in visible(root) if name.lower().endswith(ENDINGS)]
                if not skip and not any("img1/" in name for name in images):
                    assert len(images) == len(found.images)
            assert snapshot(folder) == before

    fuzz(check, st.one_of(layouts(), sequences(), sequences()), st.booleans(), cases=cases)


# Found by drawing


def test_a_camera_with_too_many_digits(tmp_path):
    root = write_tree(tmp_path / "people", [(f"1_c{'9' * 25}.jpg", "image")])
    with pytest.raises(ValueError, match="1_c9+.jpg: -1 or 9+8 is too large a number"):
        read_folders(root)


def test_a_box_that_ends_at_infinity(tmp_path):
    root = write_tree(tmp_path / "cam1", [("img1/1.jpg", "image"), ("gt/gt.txt", b"1,1,1e308,0,1e308,4,1")])
    with pytest.raises(ValueError, match=r"gt.txt, line 1: expected frame"):
        read_tracklets(root)
