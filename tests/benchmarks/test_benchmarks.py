"""The published layouts: true names and counts in, the table of the literature out."""

import json
import os
import shutil
import time

import pytest

from tests import trees
from utils.datasets.load import load_reid
from utils.datasets.published import BENCHMARKS, find_folder
from utils.evaluation.targets import open_sets

# split -> (images, identities)
MSMT = {"train": (32_621, 1_041), "query": (11_659, 3_060), "gallery": (82_161, 3_060)}
# set, builder, folder under the root people point to, options, counts, cameras
LAYOUTS = {
    "market1501": (
        "market1501",
        trees.market1501,
        "Market-1501-v15.09.15",
        {},
        {"train": (12_936, 751), "query": (3_368, 750), "gallery": (15_913, 751)},
        6,
    ),
    "dukemtmcreid": (
        "dukemtmcreid",
        trees.dukemtmcreid,
        "DukeMTMC-reID",
        {},
        {"train": (16_522, 702), "query": (2_228, 702), "gallery": (17_661, 1_110)},
        8,
    ),
    "occludedduke": (
        "occludedduke",
        trees.occludedduke,
        "Occluded_Duke",
        {},
        {"train": (15_618, 702), "query": (2_210, 519), "gallery": (17_661, 1_110)},
        8,
    ),
    "msmt17": ("msmt17", trees.msmt17, "MSMT17_V1", {}, MSMT, 15),
    "msmt17-converted": ("msmt17", trees.msmt17_converted, "msmt17", {}, MSMT, 15),
    "cuhk03np": (
        "cuhk03np",
        trees.cuhk03np,
        "cuhk03-np",
        {},
        {"train": (7_365, 767), "query": (1_400, 700), "gallery": (5_332, 700)},
        2,
    ),
    "cuhk02": (
        "cuhk02",
        trees.cuhk02,
        "cuhk02/Dataset",
        {},
        {"train": (6_308, 1_577), "query": (478, 239), "gallery": (478, 239)},
        10,
    ),
    "personx": (
        "personx",
        trees.personx,
        "PersonX",
        {},
        {"train": (9_840, 410), "query": (5_136, 856), "gallery": (30_816, 856)},
        6,
    ),
    "cuhksysu-images": (
        "cuhksysu",
        lambda root: trees.cuhksysu(root, "cropped_images"),
        "CUHK-SYSU",
        {},
        {"train": (34_574, 11_934)},
        1,
    ),
    "cuhksysu-image": (
        "cuhksysu",
        lambda root: trees.cuhksysu(root, "cropped_image"),
        "cuhk_sysu",
        {},
        {"train": (34_574, 11_934)},
        3,
    ),
    "cuhksysu-4reid": (
        "cuhksysu",
        lambda root: trees.cuhksysu(root, "cuhksysu4reid"),
        "cuhksysu",
        {},
        {"train": (34_574, 11_934)},
        1,
    ),
    "viper": (
        "viper",
        trees.viper,
        "viper/VIPeR.v1.0",
        {},
        {"train": (632, 316), "query": (316, 316), "gallery": (316, 316)},
        2,
    ),
    "grid": (
        "grid",
        trees.grid,
        "grid/underground_reid",
        {},
        {"train": (250, 125), "query": (125, 125), "gallery": (900, 126)},
        8,
    ),
    "prid": (
        "prid",
        trees.prid,
        "prid_2011",
        {},
        {"train": (200, 100), "query": (100, 100), "gallery": (649, 649)},
        2,
    ),
    "ilids": (
        "ilids",
        trees.ilids,
        "i-LIDS_Pedestrian",
        {},
        {"train": (236, 59), "query": (60, 60), "gallery": (60, 60)},
        4,
    ),
    "airport": ("airport", trees.airport, "AirportALERT", {}, {"train": (18, 3)}, 3),
    "luperson": ("luperson", trees.luperson, "LUPerson-NL", {}, {"train": (15, 5)}, 1),
}
ALL_FOR_TRAINING = {
    "market1501": (29_419, 1_501),
    "dukemtmcreid": (36_411, 1_812),
    # 1,870 queries lie in the gallery too and count once
    "occludedduke": (33_619, 1_812),
    "msmt17": (126_441, 4_101),
    "msmt17-converted": (126_441, 4_101),
    "cuhk03np": (14_097, 1_467),
    "cuhk02": (7_264, 1_816),
    "personx": (45_792, 1_266),
    "viper": (1_264, 632),
    "grid": (500, 250),
    "prid": (1_134, 934),
    "ilids": (476, 119),
    "cuhksysu-images": (34_574, 11_934),
    "airport": (18, 3),
    "luperson": (15, 5),
}
SMALL = ("viper", "grid", "prid", "ilids")
# where the images lie in a folder of the set's folder, and paths start
INNER = {"personx": "PersonX_v1"}


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    """Builds each tree once, in a parent folder of its own; gives (parent, the set's folder)."""
    made = {}

    def get(key):
        if key not in made:
            parent = tmp_path_factory.mktemp(key, numbered=False) / "some_c3-7_data"
            made[key] = (parent, LAYOUTS[key][1](parent / LAYOUTS[key][2]))
        return made[key]

    yield get
    for parent, _ in made.values():
        shutil.rmtree(parent.parent)


def counts(data):
    return {split: (len(dataset), len(set(dataset["pid"][:]))) for split, dataset in data.items()}


def paths(dataset):
    return set(dataset["path"][:])


@pytest.mark.parametrize("key", LAYOUTS)
def test_counts_and_schema(tree, key):
    name, _, _, options, want, num_cameras = LAYOUTS[key]
    parent, folder = tree(key)
    data = load_reid(name, parent, **options)
    assert counts(data) == want
    cameras = {camid for dataset in data.values() for camid in dataset["camid"][:]}
    assert cameras == set(range(num_cameras))
    for dataset in data.values():
        assert dataset.column_names == ["image", "pid", "camid", "domain", "path"]
        assert {key: dataset.features[key].dtype for key in ("pid", "camid", "domain", "path")} == {
            "pid": "int64",
            "camid": "int64",
            "domain": "string",
            "path": "string",
        }
        assert set(dataset["domain"][:]) == {name}
        row = dataset[len(dataset) // 2]
        assert row["image"].mode == "RGB" and row["image"].size == (2, 4)
        assert (folder / INNER.get(key, "") / row["path"]).is_file()
        assert not any("DS_Store" in path or "/._" in path for path in dataset["path"][:])


@pytest.mark.parametrize("key", ["market1501", "cuhk03np", "cuhk02", "cuhksysu-4reid", *SMALL, "airport", "luperson"])
def test_paths_do_not_depend_on_how_the_root_is_given(tree, key):
    parent, folder = tree(key)
    data = [load_reid(LAYOUTS[key][0], root) for root in (parent, str(folder), folder.parent)]
    first = [{split: dataset["path"][:] for split, dataset in one.items()} for one in data]
    assert first[0] == first[1] == first[2]


@pytest.mark.parametrize("key", ALL_FOR_TRAINING)
def test_all_for_training(tree, key):
    data = load_reid(LAYOUTS[key][0], tree(key)[0], all_for_training=True)
    assert counts(data) == {"train": ALL_FOR_TRAINING[key]}


def test_every_set_has_a_tree():
    assert {layout[0] for layout in LAYOUTS.values()} == set(BENCHMARKS)


def test_names_are_read_as_their_grammar_says(tree):
    rows = {row["path"]: row for row in load_reid("msmt17", tree("msmt17-converted")[0])["gallery"].select(range(200))}
    for path, row in rows.items():
        pid, camera, _ = os.path.basename(path).removesuffix(".jpg").split("_")
        assert (row["pid"], row["camid"]) == (int(pid), int(camera[1:]) - 1)
    query = load_reid("market1501", tree("market1501")[0])["query"]
    doubled = [row for row in query if row["path"].endswith(".jpg.jpg")]
    assert len(doubled) == 6
    assert (doubled[0]["path"], doubled[0]["pid"], doubled[0]["camid"]) == ("query/0001_c1s1_001000_00.jpg.jpg", 1, 0)


def test_market_gallery_keeps_background_and_drops_junk(tree):
    gallery = load_reid("market1501", tree("market1501")[0])["gallery"]
    assert sum(pid == 0 for pid in gallery["pid"][:]) == 2_798
    assert min(gallery["pid"][:]) == 0
    assert sum(path.endswith(".jpg.jpg") for path in gallery["path"][:]) == 18


def test_occluded_duke_queries_lie_in_the_gallery_too(tree):
    data = load_reid("occludedduke", tree("occludedduke")[0])
    names = [{os.path.basename(path) for path in data[split]["path"][:]} for split in ("query", "gallery")]
    assert len(names[0] & names[1]) == 1_870


def test_msmt17_loads_in_seconds_and_validation_trains(tree):
    folder = tree("msmt17")[1]
    start = time.perf_counter()
    data = load_reid("msmt17", folder)
    assert time.perf_counter() - start < 20
    assert {path.split("/")[0] for path in data["train"]["path"][:]} == {"train"}
    assert {path.split("/")[0] for path in data["gallery"]["path"][:]} == {"test"}
    # the set's own numbers start again in the test half, so together they are told apart
    assert min(data["query"]["pid"][:]) == 0
    together = load_reid("msmt17", folder, all_for_training=True)["train"]
    assert sorted(set(together["pid"][:])) == list(range(4_101))
    halves = {half: set() for half in ("train", "test")}
    for pid, path in zip(together["pid"][:], together["path"][:], strict=True):
        halves[path.split("/")[0]].add(pid)
    assert not halves["train"] & halves["test"]


@pytest.mark.slow
def test_msmt17_version_2_is_detected(tree):
    parent, folder = tree("msmt17")
    one = load_reid("msmt17", parent)
    trees.msmt17_as_version_2(folder)
    try:
        two = load_reid("msmt17", parent)
        assert counts(two) == MSMT
        assert paths(two["train"]) == {path.replace("train/", "mask_train_v2/", 1) for path in paths(one["train"])}
        with pytest.raises(ValueError, match="V1|looked for train"):
            load_reid("msmt17", parent, version="V1")
    finally:
        os.rename(folder / "mask_train_v2", folder / "train")
        os.rename(folder / "mask_test_v2", folder / "test")


def test_cuhk03_labeled_and_original_names(tree, tmp_path):
    data = load_reid("cuhk03np", tree("cuhk03np")[0], variant="labeled")
    assert counts(data) == {"train": (7_368, 767), "query": (1_400, 700), "gallery": (5_328, 700)}
    small = trees.Tree(tmp_path / "cuhk03")
    for folder, name in (
        ("bounding_box_train", "1_001_1_01.png"),
        ("bounding_box_train", "2_001_2_01.png"),
        ("query", "1_002_1_01.png"),
        ("bounding_box_test", "1_002_2_06.png"),
    ):
        small.add(f"detected/{folder}/{name}")
    data = load_reid("cuhk03np", tmp_path)
    assert data["train"]["pid"][:] == [1_001, 2_001]
    assert data["train"]["camid"][:] == [0, 1]


def test_cuhk02_identities_restart_in_every_pair(tree):
    data = load_reid("cuhk02", tree("cuhk02")[0])
    assert {pid // 10_000 for pid in data["train"]["pid"][:]} == {1, 2, 3, 4}
    assert (set(data["query"]["camid"][:]), set(data["gallery"]["camid"][:])) == ({8}, {9})


def test_cuhksysu_without_combine(tmp_path):
    small = trees.Tree(tmp_path / "cuhksysu4reid")
    small.add("train/00001_s3_0000001_0.jpg")
    small.add("gallery/00002_s4_0000002_1.jpg")
    data = load_reid("cuhksysu", tmp_path / "cuhksysu4reid")
    assert data["train"]["pid"][:] == [1, 2] and data["train"]["camid"][:] == [0, 0]
    assert load_reid("cuhksysu", tmp_path)["train"]["pid"][:] == [1, 2]
    small.add("combine/00007_s3_0000001_0.jpg")
    assert load_reid("cuhksysu", tmp_path)["train"]["pid"][:] == [7]
    with pytest.raises(ValueError, match=r"holds no cropped_image; CUHK-SYSU's crops there: \['cuhksysu4reid'\]"):
        load_reid("cuhksysu", tmp_path, version="cropped_image")


def test_airport_and_luperson_labels(tree):
    train = load_reid("airport", tree("airport")[0])["train"]
    assert set(train["pid"][:]) == {11001, 11002, 40001}
    assert train[0]["path"] == "c1/11001/0001.jpg"
    train = load_reid("luperson", tree("luperson")[0])["train"]
    assert train[0]["path"] == "000000_0000000_00.jpg" and set(train["camid"][:]) == {0}


@pytest.mark.parametrize("name", SMALL)
def test_ten_splits(tree, name):
    parent = tree(name)[0]
    tested = []
    for split in range(10):
        data = load_reid(name, parent, split=split)
        assert counts(data) == LAYOUTS[name][4]
        people = {part: set(dataset["pid"][:]) for part, dataset in data.items()}
        assert not people["train"] & (people["query"] | people["gallery"])
        assert people["query"] <= people["gallery"]
        assert not paths(data["query"]) & paths(data["gallery"])
        assert f"split {split}" in data["query"].info.description
        again = load_reid(name, parent, split=split)
        assert data["query"]["path"][:] == again["query"]["path"][:]
        tested.append(frozenset(people["query"]))
    assert len(set(tested)) == 10
    for split in (10, -1):
        with pytest.raises(ValueError, match="split must be 0 to 9"):
            load_reid(name, parent, split=split)


def test_drawn_splits_do_not_change(tree):
    """Published numbers rest on these; a change here changes them."""
    first = {name: sorted(set(load_reid(name, tree(name)[0])["query"]["pid"][:]))[:6] for name in SMALL}
    assert first == {
        "viper": [1, 3, 4, 6, 8, 9],
        "grid": [2, 6, 8, 9, 10, 11],
        "prid": [5, 6, 7, 9, 10, 12],
        "ilids": [5, 6, 7, 8, 10, 15],
    }


def test_viper_in_both_directions(tree):
    parent = tree("viper")[0]
    there, back = load_reid("viper", parent), load_reid("viper", parent, reverse=True)
    assert there["query"]["path"][:] == back["gallery"]["path"][:]
    assert {path.split("/")[0] for path in there["query"]["path"][:]} == {"cam_a"}
    assert {path.split("/")[0] for path in back["query"]["path"][:]} == {"cam_b"}
    assert paths(there["train"]) == paths(back["train"])


def test_prid_tells_the_people_of_its_cameras_apart(tree):
    together = load_reid("prid", tree("prid")[0], all_for_training=True)["train"]
    cameras = {}
    for pid, camid in zip(together["pid"][:], together["camid"][:], strict=True):
        cameras.setdefault(pid, set()).add(camid)
    assert {pid for pid, seen in cameras.items() if len(seen) == 2} == set(range(1, 201))
    assert {pid for pid, seen in cameras.items() if seen == {0}} == set(range(1_201, 1_386))


def test_ilids_never_loses_a_match_to_the_camera_rule(tree):
    data = load_reid("ilids", tree("ilids")[0], split=4)
    gallery = dict(zip(data["gallery"]["pid"][:], data["gallery"]["camid"][:], strict=True))
    assert all(gallery[row["pid"]] != row["camid"] for row in data["query"].remove_columns("image"))


def test_grid_whose_digits_do_not_tell_the_views_apart(tmp_path):
    small = trees.Tree(tmp_path)
    for pid in (1, 2, 3, 4):
        small.add(f"probe/{pid:04d}_1_00001_1_1_1_1.jpeg")
        small.add(f"gallery/{pid:04d}_1_00002_1_1_1_1.jpeg")
    data = load_reid("grid", tmp_path)
    assert set(data["query"]["camid"][:]) == {0} and set(data["gallery"]["camid"][:]) == {1}


@pytest.mark.parametrize("form", ["text", "list", "lists", "test", "torchreid"])
def test_split_file(tree, tmp_path, form):
    chosen = [3, 5, 7, 700]
    file = tmp_path / ("split.txt" if form == "text" else "splits.json")
    content = {
        "text": "3\n5\n7\n700\n",
        "list": json.dumps(chosen),
        "lists": json.dumps([[1], chosen]),
        "test": json.dumps([{"test": [1]}, {"test": chosen}]),
        "torchreid": json.dumps([{}, {"query": [[f"viper/cam_a/{pid:03d}_0.bmp", pid, 0] for pid in chosen]}]),
    }
    file.write_text(content[form])
    data = load_reid("viper", tree("viper")[0], split=1, split_file=str(file))
    assert sorted(data["query"]["pid"][:]) == chosen
    assert len(data["train"]) == 2 * (632 - 4)
    assert str(file) in data["query"].info.description


def test_files_of_a_split_are_its_sides(tree, tmp_path):
    """As torchreid writes them: VIPeR's second entry has the same identities, and camera b queries a."""
    root = tree("viper")[0]
    whole = load_reid("viper", root)
    chosen = sorted({*whole["query"]["pid"]})[:5]
    of = {side: dict(zip(whole[side]["pid"], whole[side]["path"], strict=True)) for side in ("query", "gallery")}
    sides = [
        [[f"/data/VIPeR/{of[side][pid]}", number, view] for number, pid in enumerate(chosen)]
        for view, side in enumerate(of)
    ]
    splits = [{"query": sides[0], "gallery": sides[1]}, {"query": sides[1], "gallery": sides[0]}]
    file = tmp_path / "splits.json"
    file.write_text(json.dumps(splits))
    for number, (query, camera) in enumerate((("query", 0), ("gallery", 1))):
        data = load_reid("viper", root, split=number, split_file=str(file))
        assert data["query"]["path"][:] == sorted(of[query][pid] for pid in chosen)
        assert {*data["query"]["camid"]} == {camera} and {*data["gallery"]["camid"]} == {1 - camera}
        assert not {*data["train"]["pid"]} & {*chosen}
    # Of iLIDS, which images of a person are the two sides.
    root = tree("ilids")[0]
    entries = {
        side: [[f"x/Persons/{pid:04d}{image}.jpg", pid, 0] for pid in (1, 2)]
        for side, image in (("query", "003"), ("gallery", "001"))
    }
    file.write_text(json.dumps([entries]))
    data = load_reid("ilids", root, split_file=str(file))
    assert data["query"]["path"][:] == ["Persons/0001003.jpg", "Persons/0002003.jpg"]
    assert data["gallery"]["path"][:] == ["Persons/0001001.jpg", "Persons/0002001.jpg"]


def test_a_small_set_that_is_trained_on_is_measured_in_its_own_split_alone(tree):
    """Its other splits test people that this one trains on."""
    few = "synthetic:domain=a,num_ids=4"
    options = {"holdout": 0.3, "least_left": 2, "single_image_ids": "repeat", "say": print, "all_splits": True}
    options |= {"root": tree("viper")[0]}
    for source, target in (([few, "viper"], None), ([few, "viper"], ["viper"]), ([few], ["viper"])):
        _, train, _, targets = open_sets(source, target, **options)
        (measured,) = (one for one in targets if one.spec == "viper")
        assert len(measured.more) == (9 if "viper" not in source else 0)
        trained = {path for path, domain in zip(train["path"], train["domain"], strict=True) if domain == "viper"}
        assert not trained & {*measured.query["path"], *measured.gallery["path"]}


def test_split_file_that_is_wrong(tree, tmp_path):
    file = tmp_path / "split.txt"
    for content, words in (("3 5000", "5000"), ("three", "three"), ("", "nobody")):
        file.write_text(content)
        with pytest.raises(ValueError, match=words):
            load_reid("viper", tree("viper")[0], split_file=str(file))
    with pytest.raises(ValueError, match="cannot be read"):
        load_reid("viper", tree("viper")[0], split_file=str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match="split_file 3 cannot be read"):
        load_reid("viper:split_file=3", tree("viper")[0])
    (tmp_path / "two.json").write_text("[[1], [3]]")
    with pytest.raises(ValueError, match="has no split -1"):
        load_reid("viper", tree("viper")[0], split_file=str(tmp_path / "two.json"), split=-1)


@pytest.mark.parametrize(
    "name, place, mark",
    [
        ("market1501", "market1501/Market-1501-v15.09.15", "bounding_box_train"),
        ("market1501", "Market-1501", "bounding_box_train"),
        ("dukemtmcreid", "dukemtmc-reid/DukeMTMC-reID", "bounding_box_train"),
        ("occludedduke", "Occluded-DukeMTMC-reID", "bounding_box_train"),
        ("msmt17", "msmt17/MSMT17_V2", "mask_train_v2"),
        ("cuhk03np", "CUHK03-NP", "labeled"),
        ("cuhk02", "cuhk02/Dataset", "P1"),
        ("cuhksysu", "CUHK-SYSU/cuhksysu4reid", "combine"),
        ("viper", "viper/VIPeR", "cam_a"),
        ("grid", "grid/underground_reid", "probe"),
        ("prid", "prid2011/prid_2011", "single_shot"),
        ("ilids", "ilids/i-LIDS_Pedestrian", "Persons"),
        ("airport", "AirportALERT", "filepath.txt"),
        ("personx", "PersonX/PersonX_v1", "1/bounding_box_train"),
    ],
)
def test_folders_under_the_names_of_peoples_copies(tmp_path, name, place, mark):
    for other in ("Market-1501-v15.09.15", "DukeMTMC-reID", "VIPeR", "zzz"):
        (tmp_path / other).mkdir(parents=True)
    folder = tmp_path / place
    (folder / mark).mkdir(parents=True)
    if name == "cuhksysu":
        # the folder above already tells the layout
        folder = folder.parent
    assert find_folder(name, tmp_path) == str(folder)
    assert find_folder(name, folder) == str(folder)
    with pytest.raises(ValueError, match=f"holds no {name}"):
        find_folder(name, tmp_path / "zzz")


MARKET = {
    "bounding_box_train": "0002_c1s1_000451_03.jpg",
    "query": "0001_c1s1_001051_00.jpg",
    "bounding_box_test": "0001_c2s1_001051_00.jpg",
}


@pytest.fixture
def market(tmp_path):
    """One image a split."""
    small = trees.Tree(tmp_path / "market")
    for folder, name in MARKET.items():
        small.add(f"{folder}/{name}")
    return small


@pytest.mark.parametrize("name", ["0001_c9s1_001051_00.jpg", "notes.txt", "0001_c2s1_001051_00.jpg\n", "1.jpg"])
def test_name_that_does_not_parse(market, name):
    (market.root / "bounding_box_test" / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=r"bounding_box_test.*0002_c1s1_000451_03\.jpg") as caught:
        load_reid("market1501", market.root)
    assert repr(name) in str(caught.value)


def test_missing_and_empty_folders(market, tmp_path):
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        load_reid("market1501", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no market1501: looked for bounding_box_train"):
        load_reid("market1501", tmp_path / "empty")
    with pytest.raises(ValueError, match="needs a root"):
        load_reid("market1501")
    (market.root / "query" / MARKET["query"]).unlink()
    (market.root / "query" / ".DS_Store").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"market.query holds no images; expected names like"):
        load_reid("market1501", market.root)
    (market.root / "query" / ".DS_Store").unlink()
    (market.root / "query").rmdir()
    with pytest.raises(ValueError, match=r"market.query is missing"):
        load_reid("market1501", market.root)


def test_split_with_nothing_but_junk(market):
    (market.root / "query" / MARKET["query"]).rename(market.root / "query" / "-1_c1s1_001051_00.jpg")
    with pytest.raises(ValueError, match="no images for query"):
        load_reid("market1501", market.root)


def test_options_are_checked(market):
    with pytest.raises(ValueError, match=r"'spilt'.*all_for_training=False"):
        load_reid("market1501", market.root, spilt=3)
    with pytest.raises(ValueError, match="all_for_training must be of type bool"):
        load_reid("market1501", market.root, all_for_training=1)
    with pytest.raises(ValueError, match="detected, labeled, not 'labelled'"):
        load_reid("cuhk03np", trees.Tree(market.root / "cuhk03/detected").root.parent, variant="labelled")


@pytest.fixture
def small_msmt(tmp_path):
    tree = trees.Tree(tmp_path / "MSMT17_V1")
    for part, folder, camera in (
        ("train", "train", 1),
        ("val", "train", 12),
        ("query", "test", 3),
        ("gallery", "test", 4),
    ):
        name = trees.msmt_name(0, camera, 11, extra=True)
        tree.add(f"{folder}/{name}")
        (tree.root / f"list_{part}.txt").write_text(f"{name} 0\r\n\n")
    return tree.root


def test_small_msmt_is_sound(small_msmt):
    data = load_reid("msmt17", small_msmt)
    assert sorted(data["train"]["camid"][:]) == [0, 11]


@pytest.mark.parametrize(
    "line, words",
    [
        ("../../secret.jpg 0", "list_query.txt, line 2"),
        ("/etc/passwd 0", "list_query.txt, line 2"),
        ("0000/0000_011_16_0303afternoon_0011_11.jpg 0", "line 2"),
        ("0000/0000_011_03_0303afternoon_0012_11.jpg 0", "0000_011_03_0303afternoon_0012_11.jpg .no such file"),
        ("0000/0000_011_03_0303afternoon_0011_11_ex.jpg zero", "line 2"),
        ("0000/0000_011_03_0303afternoon_0011_11_ex.jpg 0", "twice"),
    ],
)
def test_msmt_lists_that_are_wrong(small_msmt, line, words):
    file = small_msmt / "list_query.txt"
    file.write_text(file.read_text().split("\n")[0] + "\n" + line + "\n")
    with pytest.raises(ValueError, match=words):
        load_reid("msmt17", small_msmt)


def test_listed_link_that_leaves_the_root(small_msmt, tmp_path):
    outside = trees.Tree(tmp_path / "elsewhere")
    outside.add("secret.jpg")
    name = trees.msmt_name(0, 3, 12, extra=False)
    (small_msmt / "test" / name).symlink_to(tmp_path / "elsewhere" / "secret.jpg")
    (small_msmt / "list_query.txt").write_text(f"{name} 0\n")
    with pytest.raises(ValueError, match="leaves"):
        load_reid("msmt17", small_msmt)


def test_missing_list(small_msmt):
    (small_msmt / "list_val.txt").unlink()
    with pytest.raises(ValueError, match="list_val.txt is missing"):
        load_reid("msmt17", small_msmt)


def test_airport_lines_that_are_wrong(tree):
    folder = tree("airport")[1]
    file = folder / "filepath.txt"
    kept = file.read_text()
    try:
        for line, words in (("c1\\11001", "line 31"), ("..\\11001\\a.jpg", "leaves"), ("c1\\x1\\a.jpg", "line 31")):
            file.write_text(kept + line + "\n")
            with pytest.raises(ValueError, match=words):
                load_reid("airport", folder)
    finally:
        file.write_text(kept)
