"""Names and specs, several sources, labels, parts of a set, portable copies, the command line."""

import os
import platform
import subprocess
import sys

import datasets
import numpy as np
import pytest

from tests.runs import ROOT
from tests.tables import COLUMNS, ROWS, contents, expected, red, write_images, write_table
from utils.datasets.__main__ import main
from utils.datasets.load import labels_of, load_reid, load_sources, parse_spec, subset
from utils.datasets.portable import save


@pytest.fixture
def folder(tmp_path):
    return write_images(tmp_path / "mine")


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


def test_save_that_fails_leaves_nothing(folder, tmp_path):
    write_table(folder / "metadata.csv", ROWS)
    data = load_reid(folder)
    (folder / "gallery/e.png").unlink()
    with pytest.raises(FileNotFoundError):
        save(data, tmp_path / "saved")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_save_clears_what_a_killed_one_left(folder, tmp_path):
    write_table(folder / "metadata.csv", ROWS)
    with subprocess.Popen(["true"]) as ended:
        pass
    dead, alive = (f".saved.part-{platform.node()}-{pid}" for pid in (ended.pid, os.getppid()))
    elsewhere = f".saved.part-elsewhere-{ended.pid}"
    for name in (dead, alive, elsewhere):
        (tmp_path / name / "written").mkdir(parents=True)
    save(load_reid(folder), tmp_path / "saved")
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "saved", alive, elsewhere}


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
        ("/data/a:b=c,pid_column=d", ("/data/a:b=c,pid_column=d", {})),
        ("./a:b:pid_column=who, camid_column=none", ("./a:b", {"pid_column": "who", "camid_column": "none"})),
        ("someone/people:revision=v2", ("someone/people", {"revision": "v2"})),
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


def test_an_option_that_is_misspelt_is_named(tmp_path):
    """Where only the part before the colon exists."""
    (tmp_path / "people" / "anna").mkdir(parents=True)
    spec = f"{tmp_path / 'people'}:pid=label"
    assert parse_spec(spec) == (str(tmp_path / "people"), {"pid": "label"})
    with pytest.raises(ValueError, match="people does not know the option 'pid'; it accepts image_column, pid_column"):
        load_reid(spec)
    (tmp_path / "people:pid=label").mkdir()
    assert parse_spec(spec) == (spec, {})


def test_synthetic():
    data = load_reid("synthetic:num_ids=4", images_per_id=6, domain="b")
    assert data["train"].column_names == COLUMNS
    assert len(load_reid("synthetic:num_ids=2", num_ids=5, images_per_id=4)["train"]) == 8
    assert len(data["train"]) == 24 and set(data["train"]["domain"][:]) == {"synthetic-b"}
    image = data["query"][0]["image"]
    assert image.mode == "RGB" and np.asarray(image).std() > 5
    with pytest.raises(ValueError, match=r"'people'.*num_ids=32"):
        load_reid("synthetic", people=3)
    with pytest.raises(ValueError, match="skip_unreadable must be true or false, not 'no'"):
        load_reid("synthetic:domain=a,num_ids=4,skip_unreadable=no")
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


def test_push(folder, tmp_path, monkeypatch, capsys):
    write_table(folder / "metadata.csv", ROWS)
    asked, pushed = [], {}
    monkeypatch.setattr(
        "utils.datasets.portable.HfApi.create_repo", lambda self, name, **options: asked.append((name, options))
    )
    monkeypatch.setattr(
        datasets.DatasetDict,
        "push_to_hub",
        lambda self, name, private: pushed.update(
            {
                name: (
                    private,
                    {
                        split: part.cast_column("image", datasets.Image(decode=False))[:]
                        for split, part in self.items()
                    },
                )
            }
        ),
    )
    main([str(folder), "--push_to_hub", "someone/people"])
    assert asked == [("someone/people", {"repo_type": "dataset", "private": True, "exist_ok": True})]
    private, splits = pushed["someone/people"]
    assert private and splits["gallery"]["path"] == ["gallery/e.png", "gallery/f.png"]
    assert [image["path"] for image in splits["gallery"]["image"]] == ["e.png", "f.png"]
    assert splits["query"]["image"][0]["bytes"] == (folder / "query/d.png").read_bytes()

    def refuse(self, name, **options):
        raise OSError("no token\nsecond line")

    monkeypatch.setattr("utils.datasets.portable.HfApi.create_repo", refuse)
    with pytest.raises(SystemExit, match="^error: the Hub did not take someone/people: no token$"):
        main([str(folder), "--push_to_hub", "someone/people"])


def test_command_line_says_one_line_on_bad_input(tmp_path):
    command = [sys.executable, "-m", "utils.datasets", "markett1501", "--root", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: 'markett1501' is neither a known set nor an existing path")
    assert "Traceback" not in done.stderr
