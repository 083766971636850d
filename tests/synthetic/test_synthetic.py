"""The synthetic world: same pixels everywhere, true words, and a task that colours alone do not solve."""

import hashlib
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.runs import ROOT
from utils import synthetic
from utils.datasets.load import load_reid
from utils.datasets.search_folders import read_folders
from utils.datasets.tracklets import read_tracklets
from utils.synthetic import folders
from utils.synthetic.world import rows

PIXELS = """
import hashlib
from utils import synthetic
print(hashlib.sha256(b"".join(synthetic.render(*row).tobytes() for row in {rows})).hexdigest())
"""
ROWS = [(domain, 3, 1, 2, seed) for domain in synthetic.DOMAINS for seed in (0, 7)]


def digest(rows):
    return hashlib.sha256(b"".join(synthetic.render(*row).tobytes() for row in rows)).hexdigest()


def test_pixels_do_not_depend_on_process_order_or_hash_seed():
    here = digest(ROWS)
    assert digest(ROWS[::-1]) != here and digest(ROWS) == here
    run = subprocess.run(
        [sys.executable, "-c", PIXELS.format(rows=ROWS)],
        cwd=ROOT,
        env={"PYTHONHASHSEED": "5", "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == here


def test_every_argument_matters():
    base = ("a", 3, 1, 2, 0)
    pictures = {digest([base])}
    for changed in (("b", 3, 1, 2, 0), ("a", 4, 1, 2, 0), ("a", 3, 2, 2, 0), ("a", 3, 1, 3, 0), ("a", 3, 1, 2, 1)):
        pictures.add(digest([changed]))
    assert len(pictures) == 6


def test_splits_cameras_and_names():
    data = load_reid("synthetic", domain="c", num_ids=6, images_per_id=8, seed=4)
    assert {split: len(rows) for split, rows in data.items()} == {"train": 48, "query": 24, "gallery": 24}
    train, test = set(data["train"]["pid"]), set(data["query"]["pid"])
    assert len(train) == len(test) == 6 and not train & test and test == set(data["gallery"]["pid"])
    pairs = list(zip(data["query"]["pid"], data["query"]["camid"], strict=True))
    assert len(pairs) == len(set(pairs)) == 24
    for split in data.values():
        for row in range(len(split)):
            name = synthetic.parse_name(split["path"][row])
            assert (name["pid"], name["camid"], name["seed"]) == (split["pid"][row], split["camid"][row], 4)
            assert split["domain"][row] == "synthetic-c"


@pytest.mark.parametrize("more", [{"num_ids": 9}, {"images_per_id": 12}, {"num_ids": 7, "images_per_id": 9}])
def test_larger_numbers_only_add_rows(more):
    small = load_reid("synthetic", domain="a", num_ids=5, images_per_id=6)
    large = load_reid("synthetic", domain="a", **({"num_ids": 5, "images_per_id": 6} | more))
    for split in small:
        assert set(small[split]["path"]) <= set(large[split]["path"])
    assert len(large["train"]) > len(small["train"])


@pytest.mark.parametrize("share, at_home", [(0.9, 7), (0.5, 4), (1, 8), (0.01, 0)])
def test_a_shortcut_gives_training_identities_a_place_of_their_own(share, at_home):
    plain, short = (load_reid(f"synthetic:domain=a,num_ids=4,shortcut={number}") for number in (0, share))
    for split in ("query", "gallery"):
        assert short[split]["path"][:] == plain[split]["path"][:]
    assert plain["train"]["path"][:] == load_reid("synthetic", domain="a", num_ids=4)["train"]["path"][:]
    homes = {}
    for pid, camid, path in zip(*(short["train"][name][:] for name in ("pid", "camid", "path")), strict=True):
        assert synthetic.parse_name(path)["camid"] == camid
        if camid >= len(synthetic.DOMAINS["a"]["cameras"]):
            homes.setdefault(pid, []).append(camid)
    assert [len(cameras) for cameras in homes.values()] == [at_home] * (4 if at_home else 0)
    assert len({camid for cameras in homes.values() for camid in cameras}) == len(homes)
    more = load_reid("synthetic", domain="a", num_ids=5, images_per_id=11, shortcut=share)
    assert set(short["train"]["path"]) <= set(more["train"]["path"])


def test_a_place_of_ones_own_is_seen_in_the_corner_of_the_picture():
    """Two pictures of one identity share it, others do not: the mean colour of the upper corners says who it is."""

    def corner(pid, index):
        picture = np.asarray(synthetic.render("a", pid, 4 + pid, index), dtype=float)
        return picture[:32, [*range(12), *range(52, 64)]].mean((0, 1))

    for pid in (0, 2, 4, 6):
        own = np.linalg.norm(corner(pid, 0) - corner(pid, 1))
        others = [np.linalg.norm(corner(pid, 0) - corner(other, 1)) for other in (0, 2, 4, 6) if other != pid]
        assert own < min(others)


def test_pictures_are_drawn_when_they_are_opened():
    rows = load_reid("synthetic:domain=e,num_ids=3,images_per_id=4")["gallery"]
    for row in range(len(rows)):
        name = synthetic.parse_name(rows["path"][row])
        assert np.array_equal(np.asarray(rows[row]["image"]), np.asarray(synthetic.render(**name)))
        assert rows[row]["image"].size == (64, 128)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"domain": "z"}, "'z' does not exist"),
        ({"num_ids": 0}, "num_ids .* at least 1, got 0"),
        ({"images_per_id": 2}, "images_per_id .* at least 3, got 2"),
        ({"num_ids": True}, "num_ids must be of type int, not True"),
        ({"seed": -1}, "seed .* at least 0"),
        ({"shortcut": 1.5}, "shortcut .* between 0 and 1, got 1.5"),
    ],
)
def test_impossible_worlds_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        load_reid("synthetic", **options)


def test_a_world_of_true_identities_is_refused():
    with pytest.raises(ValueError, match="num_ids .* at least 1, got True"):
        rows(num_ids=True)


@pytest.mark.parametrize(
    "name",
    ["x.png", "synthetic-a/s0/0001_c9_0000.png", "synthetic-a/s0/0001_c5_0000.png", "synthetic-z/s0/0001_c1_0000.png"],
)
def test_foreign_names_are_refused(name):
    with pytest.raises(ValueError, match="synthetic world"):
        synthetic.parse_name(name)


def test_words_are_what_is_drawn():
    """The garment's mean colour is nearest to its own word, for plain clothes in the plainest camera."""
    names = list(synthetic.COLOURS)
    palette = np.array([synthetic.COLOURS[name] for name in names], dtype=float)
    right = total = 0
    for pid in range(240):
        words = synthetic.attributes("g", pid)
        if words["pattern"] != "plain" or words["carried"] != "nothing":
            continue
        pixels = np.asarray(synthetic.render("g", pid, 0, 0), dtype=float)[38:56, 26:38].reshape(-1, 3)
        middle = np.median(pixels, axis=0)
        order = np.argsort(((palette - middle) ** 2).sum(1))
        right += words["upper_colour"] in [names[place] for place in order[:2]]
        total += 1
    assert total >= 20 and right / total > 0.7


def test_captions_name_everything_in_a_fixed_order():
    words = synthetic.describe("a", 3, 0, 0)
    text = synthetic.caption(words, noun="<iir-0003> person")
    parts = [words["upper"], words["lower"], words["shoes"], words["hair"], words["action"], words["view"]]
    places = [text.index(part) for part in [*parts, words["place"]]]
    assert text.startswith("a photo of a <iir-0003> person, wearing a ") and places == sorted(places)


def test_domains_differ_and_identities_share_colours():
    means = np.array(
        [
            np.mean([np.asarray(synthetic.render(domain, pid, pid % 4, 0)) for pid in range(24)], axis=(0, 1, 2))
            for domain in synthetic.DOMAINS
        ]
    )
    gaps = np.linalg.norm(means[:, None] - means[None], axis=-1)[np.triu_indices(len(means), 1)]
    assert len(synthetic.DOMAINS) >= 8 and gaps.min() > 4
    for domain in synthetic.DOMAINS:
        colours = [synthetic.attributes(domain, pid)["upper_colour"] for pid in range(1, 64, 2)]
        assert max(map(colours.count, colours)) >= 4 and len(set(colours)) >= 5


def histograms(rows):
    pixels = np.stack([np.asarray(row["image"])[10:118, 14:50] // 32 for row in rows]).astype(int)
    features = []
    for picture in pixels:
        stripes = [stripe.reshape(-1, 3) @ (64, 8, 1) for stripe in np.array_split(picture, 6)]
        features.append(np.concatenate([np.bincount(stripe, minlength=512) / len(stripe) for stripe in stripes]))
    return np.sqrt(features)


@pytest.mark.parametrize("domain", "abcde")
def test_colour_histograms_are_far_from_solving_it(domain):
    data = load_reid("synthetic", domain=domain)
    scores = histograms(data["query"]) @ histograms(data["gallery"]).T
    pids, cams = (np.array(data["query"][key])[:, None] for key in ("pid", "camid"))
    their_pids, their_cams = (np.array(data["gallery"][key])[None] for key in ("pid", "camid"))
    scores[(pids == their_pids) & (cams == their_cams)] = -np.inf
    hits = their_pids[0][scores.argmax(1)] == pids[:, 0]
    assert hits.mean() < 0.6


def test_drawing_is_fast_enough():
    synthetic.contact_sheet("a", 2)
    best = 0.0
    for _ in range(3):
        start = time.process_time()
        for pid in range(50):
            synthetic.render("d", pid, pid % 4, 0)
        best = max(best, 50 / (time.process_time() - start))
    assert best >= 300


def test_contact_sheet_command(tmp_path):
    out = tmp_path / "sheet.png"
    synthetic.main(["--domain", "b", "--num_ids", "3", "--images_per_id", "4", "--out", str(out)])
    assert Image.open(out).size == (4 * 68 + 4, 3 * 132 + 18)
    for arguments in (["--num_ids", "0", "--out", str(out)], ["--out", str(tmp_path / "no" / "folder.png")]):
        with pytest.raises(SystemExit):
            synthetic.main(["--num_ids", "1", *arguments])


def test_plain_folders_as_people_have_them(tmp_path, capsys):
    words = ["--domain", "d", "--num_ids", "28", "--images_per_id", "4", "--seed", "3", "--folders"]
    synthetic.main([*words, str(tmp_path / "own")])
    root = tmp_path / "own"
    assert capsys.readouterr().out.startswith(f"wrote 112 images in {root}/people, 7 images in {root}/wanted, ")
    names = sorted(path.name for path in (root / "people").iterdir())
    assert len(names) == 28 and {"anna", "bert", "zoe", "anna2", "bert2"} <= set(names)
    data = load_reid(f"{root / 'people'}")["train"]
    assert len(set(data["pid"][:])) == 28 and len(data) == 112
    for row in data.select(range(8)):
        index, camera = Path(row["path"]).stem.split("_c")
        pid = {"anna": 0, "anna2": 26}[Path(row["path"]).parent.name]
        assert int(camera) == row["camid"] + 1 == synthetic.camera_of("d", pid, int(index), 3) + 1
        assert row["image"].tobytes() == synthetic.render("d", pid, row["camid"], int(index), 3).tobytes()
    query, gallery = read_folders(root / "wanted", root / "camera2")
    wanted, there = set(query["pid"]), set(gallery["pid"])
    # Nobody who is searched for was trained on; each third is not there, and others are.
    assert min(wanted | there) == 28 and len(wanted) == 7 and wanted - there == {30, 33} and len(there) == 12
    assert set(query["camid"]) == {0} and set(gallery["camid"]) == {1}
    tracklets = read_tracklets(root / "tracklets")
    assert set(tracklets.pids) == there and set(tracklets.camids) == {0, 1, 2, 3}
    assert len(tracklets.items) == 48 and {len(item.rows) for item in tracklets.items} == {3}
    assert [path.name for path in tmp_path.iterdir()] == ["own"]
    with pytest.raises(SystemExit):
        synthetic.main([*words, str(root)])
    assert "is not empty; give a new folder" in capsys.readouterr().err


def test_a_stopped_run_leaves_no_half_of_the_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "render", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        folders.write_folders(tmp_path / "own", "a", 2, 4)
    assert list(tmp_path.iterdir()) == []
