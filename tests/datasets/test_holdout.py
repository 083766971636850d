"""Query and gallery from a labelled set without them: who is held out, and which images ask."""

import pytest

from tests.tables import paint
from utils.datasets.holdout import divide, hold_out_of
from utils.datasets.load import load_reid
from utils.evaluation.splits import readable_splits


def fill(folder, identities=6, cameras=3, images=2):
    for pid in range(identities):
        for camera in range(cameras):
            for image in range(images):
                name = f"c{camera}_{image}.png" if cameras > 1 else f"{image}.png"
                paint(folder / f"p{pid}" / name)
    return folder


def rows_of(part):
    return list(zip(part["pid"][:], part["camid"][:], part["path"][:], strict=True))


def test_held_out_identities(tmp_path):
    folder = fill(tmp_path / "own")
    whole = load_reid(folder)["train"]
    data = load_reid(f"{folder}:holdout=0.5,holdout_seed=4")
    rows = {split: rows_of(part) for split, part in data.items()}
    # Every image is in one split, nothing is lost, and nobody is trained on and measured.
    assert sorted(row for part in rows.values() for row in part) == sorted(rows_of(whole))
    people = {split: {pid for pid, *_ in part} for split, part in rows.items()}
    assert len(people["query"]) == 3 and people["query"] == people["gallery"] and not people["query"] & people["train"]
    assert sorted((pid, camid) for pid, camid, _ in rows["query"]) == [
        (pid, camid) for pid in sorted(people["query"]) for camid in range(3)
    ]
    # The same seed holds the same out, another one others; a larger share contains a smaller one.
    assert rows == {split: rows_of(part) for split, part in load_reid(folder, holdout=0.5, holdout_seed=4).items()}
    others = [set(load_reid(folder, holdout=0.5, holdout_seed=seed)["query"]["pid"][:]) for seed in range(6)]
    assert any(other != people["query"] for other in others)
    assert people["query"] > set(load_reid(folder, holdout=0.34, holdout_seed=4)["query"]["pid"][:])


def test_without_cameras_one_image_in_four_asks(tmp_path):
    folder = fill(tmp_path / "own", identities=3, cameras=1, images=9)
    paint(folder / "single" / "1.png")
    data = load_reid(folder, holdout=1)
    assert {split: len(part) for split, part in data.items()} == {"query": 6, "gallery": 22}
    # The gallery counts as another camera, so that nothing is dropped.
    assert (set(data["query"]["camid"][:]), set(data["gallery"]["camid"][:])) == ({0}, {1})
    assert "has no query and gallery: all 4 identities are measured" in data["query"].info.description
    # Nobody can look for the single image, so it stays in training.
    assert 3 in load_reid(folder, holdout=0.9)["train"]["pid"][:]


@pytest.mark.parametrize(
    "counts, own_camera, num_queries",
    [
        ([3, 2], False, 2),
        ([3, 1], False, 1),
        ([1, 1], False, 1),
        ([1, 1, 1], False, 2),
        ([2, 1, 1], False, 2),
        ([4], False, 0),
        ([4], True, 1),
    ],
)
def test_every_query_keeps_a_match(counts, own_camera, num_queries):
    cameras = {
        camid: [(bytes([image]), (camid, image)) for image in range(count)] for camid, count in enumerate(counts)
    }
    queries, gallery = divide(cameras, True, own_camera)
    assert sorted(queries + gallery) == sorted(row for part in cameras.values() for _, row in part)
    assert len(queries) == len({camid for camid, _ in queries}) == num_queries
    for camid, _ in queries:
        assert any(own_camera or other != camid for other, _ in gallery)


@pytest.mark.parametrize(
    "holdout, words",
    [(0, "above 0 and at most 1, not 0"), ("x", "not 'x'"), (0.99, "leaves none of 6"), (1.5, "not 1.5")],
)
def test_shares_that_are_wrong(tmp_path, holdout, words):
    with pytest.raises(ValueError, match=words):
        load_reid(f"{fill(tmp_path / 'own')}:holdout={holdout}")


def test_nobody_was_seen_twice(tmp_path):
    for pid in range(3):
        paint(tmp_path / "own" / f"p{pid}" / f"c{pid}_1.png")
    with pytest.raises(ValueError, match="no identity was seen by two cameras.*camid_column=none"):
        load_reid(tmp_path / "own", holdout=0.5)
    with pytest.raises(ValueError, match="no identity has two images"):
        load_reid(f"{tmp_path / 'own'}:camid_column=none,holdout=0.5")


def test_what_a_training_holds_out(tmp_path):
    folder, said = str(fill(tmp_path / "own", identities=10)), []

    def held(specs, least_left, fraction=0.3):
        said.clear()
        return hold_out_of(specs, None, fraction, least_left=least_left, say=said.append)

    assert held([folder], 2) == ([f"{folder}:holdout=0.3"], [f"{folder}:holdout=0.3"])
    assert said == [f"{folder}: 3 of 10 identities are held out of training and measured; --holdout 0 trains on all"]
    assert held([f"{folder}:camid_column=none"], 2)[1] == [f"{folder}:camid_column=none,holdout=0.3"]
    # A batch needs 8 identities: two are left for measuring, or none.
    assert held([folder], 8)[1] == [f"{folder}:holdout=0.2"]
    assert held([folder], 9) == ([folder], []) and "no identity is held out" in said[0]
    # Sets with a test set of their own stay as they are; of several sets all that have one are measured.
    several = ["synthetic:num_ids=4", f"{folder}:holdout=0.4"]
    assert held(several, 2) == (several, several)
    assert held(["synthetic:num_ids=4"], 2) == (["synthetic:num_ids=4"], [])
    assert held([*several, folder], 2)[1] == [*several, f"{folder}:holdout=0.3"] and len(said) == 1


def test_one_camera_that_has_a_name(tmp_path):
    """The gallery's other camera has none: query and gallery can be joined, as evaluate.py does."""
    for number in range(12):
        paint(tmp_path / "own" / f"{number}.png")
    lines = [f"{number}.png,{number // 4},door" for number in range(12)]
    (tmp_path / "own/labels.csv").write_text("\n".join(["file_name,pid,camid", *lines, ""]))
    parts = load_reid(f"{tmp_path / 'own'}:holdout=0.7")
    images, splits, _ = readable_splits([(parts["query"], parts["gallery"])], skip_unreadable=False, where="own")
    assert set(parts["query"]["camid"][:]) == {0} and set(parts["gallery"]["camid"][:]) == {1}
    assert len(images) == len(parts["query"]) + len(parts["gallery"])
