"""Sets of one's own in forms that nobody prepared: text labels, tables of any name, archives, odd file names."""

import io
import json
import logging
import re
import tarfile
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.tables import contents, image_bytes, paint, red
from utils.batches.chunks import image_identities
from utils.datasets.images import check_images
from utils.datasets.load import load_reid, load_sources
from utils.datasets.portable import save
from utils.datasets.schema import camera_in, features, names_of, warn_once
from utils.datasets.search_folders import counts_images, read_folders
from utils.datasets.unlabelled import open_unlabelled

# (file, identity, camera)
PEOPLE = [("a.png", "Zoë", "yard"), ("b.png", "Anna", "yard"), ("c.png", "Zoë", "door")]
NUMBERED = [(1, 1, "a.png"), (0, 1, "b.png"), (1, 0, "c.png")]


def write(folder, rows=PEOPLE, name="labels.csv", mark=",", header=("file_name", "pid", "camid")):
    for number, (file, *_) in enumerate(rows):
        paint(folder / file, red(number))
    lines = [header, *rows]
    (folder / name).write_text("".join(mark.join(map(str, line)) + "\n" for line in lines))
    return folder


def add(tar, name, content, **more):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in more.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize("name, mark", [("labels.csv", ","), ("Leute.CSV", ";"), ("people.tsv", "\t")])
def test_text_labels_in_a_table_of_any_name(tmp_path, name, mark):
    data = load_reid(write(tmp_path / "own", name=name, mark=mark))
    assert contents(data) == {"train": NUMBERED}
    assert (names_of(data["train"], "pid"), names_of(data["train"], "camid")) == (["Anna", "Zoë"], ["door", "yard"])
    assert contents(load_reid(tmp_path / "own" / name)) == {"train": NUMBERED}


def test_names_in_copies_and_in_merged_sets(tmp_path):
    data = load_reid(write(tmp_path / "own"))
    save(data, tmp_path / "copy")
    assert names_of(load_reid(tmp_path / "copy")["train"], "pid") == ["Anna", "Zoë"]
    # Of two sets with other names the numbers remain.
    write(tmp_path / "two", [("d.png", "Max", "roof")])
    merged = load_sources([str(tmp_path / "copy"), str(tmp_path / "two")])["train"]
    assert merged["pid"][:] == [1, 0, 1, 2] and names_of(merged, "pid") is None


def test_text_is_numbered_over_all_splits(tmp_path):
    rows = [("a.png", "b", 0, "train"), ("b.png", "c", 0, "query"), ("c.png", "c", 1, "gallery"),
            ("d.png", "a", 1, "gallery")]  # fmt: skip
    data = load_reid(write(tmp_path / "own", rows, header=("file_name", "pid", "camid", "split")))
    assert contents(data) == {
        "train": [(1, 0, "a.png")],
        "query": [(2, 0, "b.png")],
        "gallery": [(2, 1, "c.png"), (0, 1, "d.png")],
    }


@pytest.mark.parametrize(
    "labels, pids, names",
    [
        (["0007", "12"], [7, 12], None),
        (["7", "0007"], [1, 0], ["0007", "7"]),
        ([3.0, 5.0], [3, 5], None),
        (["p10", "p9"], [0, 1], ["p10", "p9"]),
        (pa.array(["x", "y"]).dictionary_encode(), [0, 1], ["x", "y"]),
    ],
)
def test_labels_of_many_kinds(tmp_path, labels, pids, names):
    table = {"picture": [{"bytes": image_bytes(red(i)), "path": None} for i in (1, 2)], "pid": labels, "camid": [0, 1]}
    # No Hugging Face metadata: a struct of bytes and path is an image, whatever its name.
    pq.write_table(pa.table(table), tmp_path / "any.parquet")
    data = load_reid(tmp_path / "any.parquet")["train"]
    assert (data["pid"][:], names_of(data, "pid")) == (pids, names)
    assert data[1]["image"].getpixel((0, 0)) == red(2)


@pytest.mark.parametrize(
    "pid, words",
    [
        ("", "'pid' is empty in 1 of 3 rows, first in row 2"),
        ("  ", "'pid' is empty in 1 of 3 rows"),
        ("nan", "'pid' is empty in 1 of 3 rows, first in row 2; fill it in, or remove"),
    ],
)
def test_labels_that_are_empty(tmp_path, pid, words):
    with pytest.raises(ValueError, match=words):
        load_reid(write(tmp_path / "own", [*PEOPLE[:2], ("c.png", pid, "door")]))


def test_labels_that_are_nan(tmp_path):
    table = {"image": [{"bytes": image_bytes(red(1)), "path": None}] * 2, "pid": [1.0, float("nan")], "camid": [0, 0]}
    pq.write_table(pa.table(table), tmp_path / "any.parquet")
    with pytest.raises(ValueError, match="'pid' is empty in 1 of 2 rows, first in row 1"):
        load_reid(tmp_path / "any.parquet")


@pytest.mark.parametrize(
    "names, warned", [(("Anna", "anna "), True), (("Anna", "Anne"), False), (("P1", "P01"), True)]
)
def test_one_identity_in_two_spellings(tmp_path, caplog, names, warned):
    warn_once.cache_clear()
    rows = [(f"{number}.png", name, 0) for number, name in enumerate(names)]
    with caplog.at_level(logging.WARNING):
        data = load_reid(write(tmp_path / "own", rows))
    assert len(set(data["train"]["pid"][:])) == 2
    assert ("look like one identity but count as several" in caplog.text) == warned


def test_absolute_paths(tmp_path):
    """`Dataset.to_parquet` of images by path: fine inside the folder of the table, refused outside of it."""
    files = [str(paint(tmp_path / "own/images" / f"{number}.png", red(number))) for number in range(2)]
    table = datasets.Dataset.from_dict({"image": files, "pid": [1, 2], "camid": [0, 0]})
    table = table.cast_column("image", datasets.Image())
    table.to_parquet(str(tmp_path / "own/people.parquet"))
    data = load_reid(tmp_path / "own")
    assert contents(data) == {"train": [(1, 0, "images/0.png"), (2, 0, "images/1.png")]}
    assert data["train"][1]["image"].getpixel((0, 0)) == red(1)
    (tmp_path / "far").mkdir()
    table.to_parquet(str(tmp_path / "far/people.parquet"))
    with pytest.raises(
        ValueError, match="leaves.*move the table to a folder above its images, or put the images insi"
    ):
        load_reid(tmp_path / "far")
    # The second remedy, as it is written.
    embedded = table.with_format("arrow").map(datasets.table.embed_table_storage, batched=True)
    embedded.to_parquet(str(tmp_path / "far/people.parquet"))
    assert load_reid(tmp_path / "far")["train"][1]["image"].getpixel((0, 0)) == red(1)


def test_archives_with_classes(tmp_path):
    for shard, numbers in (("00", (0, 1)), ("01", (2,))):
        (tmp_path / "own").mkdir(exist_ok=True)
        with tarfile.open(tmp_path / f"own/s-{shard}.tar", "w") as tar:
            for number in numbers:
                add(tar, f"{number:03d}.PNG", image_bytes(red(number)))
                add(tar, f"{number:03d}.cls", str(number % 2).encode())
    data = load_reid(tmp_path / "own")
    assert contents(data) == {
        "train": [(0, 0, "s-00.tar/000.PNG"), (1, 0, "s-00.tar/001.PNG"), (0, 0, "s-01.tar/002.PNG")]
    }
    assert data["train"][2]["image"].getpixel((0, 0)) == red(2)
    save(data, tmp_path / "copy")
    assert load_reid(tmp_path / "copy")["train"][1]["image"].getpixel((0, 0)) == red(1)
    # An archive that was packed anew has other images, wherever they lie in it.
    before = image_identities(data["train"])
    (tmp_path / "own/s-01.tar").touch()
    assert [old == new for old, new in zip(before, image_identities(data["train"]), strict=True)] == [
        True,
        True,
        False,
    ]


def test_archives_with_json(tmp_path):
    with tarfile.open(tmp_path / "people.tar", "w") as tar:
        for number, (_, pid, camid) in enumerate(PEOPLE):
            add(tar, f"./x/{number}.rgb.png", image_bytes(red(number)))
            add(tar, f"./x/{number}.json", json.dumps({"pid": pid, "camid": camid, "split": "train"}).encode())
    data = load_reid(tmp_path / "people.tar")
    assert [row[:2] for row in contents(data)["train"]] == [row[:2] for row in NUMBERED]
    assert names_of(data["train"], "camid") == ["door", "yard"]
    assert data["train"][0]["image"].getpixel((0, 0)) == red(0)
    with pytest.raises(
        ValueError, match=r"no label has 'who' for the pid; the labels have \['camid', 'pid', 'split'\]"
    ):
        load_reid(f"{tmp_path / 'people.tar'}:pid_column=who")


@pytest.mark.parametrize(
    "members, words",
    [
        ([("../0.png", {}), ("../0.cls", {})], r"holds '\.\./0.png', which leaves the archive"),
        ([("/etc/0.png", {})], "leaves the archive"),
        ([("0.png", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"})], "0.png is a link or a device"),
        ([("0.a.png", {}), ("0.b.png", {}), ("0.cls", {})], "0.a.png and 0.b.png share one label"),
        ([("0.png", {}), ("0.mask.png", {}), ("0.cls", {})], "0.png and 0.mask.png share one label"),
        ([("0.png", {}), ("0.cls", {}), ("1.png", {})], "1.png has no label"),
        ([("0.png", {}), ("0.json", {})], "0.json cannot be read as a label"),
        ([("notes.txt", {})], "holds no images"),
    ],
)
def test_archives_that_are_wrong(tmp_path, members, words):
    with tarfile.open(tmp_path / "own.tar", "w") as tar:
        for name, more in members:
            content = image_bytes(red(1)) if name.endswith(".png") else b"7" if name.endswith(".cls") else b"{"
            add(tar, name, b"" if "type" in more else content, **more)
    with pytest.raises(ValueError, match=words):
        load_reid(tmp_path / "own.tar")


def test_archive_that_is_none(tmp_path):
    (tmp_path / "own.tar").write_bytes(b"\x1f\x8bnot a tar")
    with pytest.raises(ValueError, match="own.tar cannot be read as a .tar.*unpacked"):
        load_reid(tmp_path / "own.tar")


@pytest.mark.parametrize(
    "name, camera",
    [
        ("0001_c2_x.jpg", 2), ("a-cam10.PNG", 10), ("0002_c1s1_000451_03.jpg", 1), ("0001_c3_f0046182.jpg", 3),
        ("0001_C4f0012.jpg", 4), ("c5.png", 5), ("3f2c1a9e-0c12-c123-8a41-0123456789ab.jpg", None),
        ("3f2c1a9e-0c12-c123-8a41-0123456789ab_c2.jpg", 2), ("x_c4ca4238a0b923820dcc509a6f75849b.jpg", None),
        ("c4ca4238.jpg", None), ("cat_1.jpg", None), ("0001C2T0003F004.jpg", 2), ("00-1C6T0003F004.jpg", 6),
        ("abC2T1F1.jpg", None),
    ],
)  # fmt: skip
def test_cameras_in_file_names(name, camera):
    assert camera_in(name) == camera


def test_folders_without_their_cameras(tmp_path):
    for path in ("query/1/x_c1.png", "gallery/1/x_c1.png", "gallery/2/x_c3.png"):
        paint(tmp_path / "own" / path)
    data = load_reid(f"{tmp_path / 'own'}:camid_column=none")
    assert {split: set(part["camid"][:]) for split, part in data.items()} == {"query": {0}, "gallery": {1}}
    paint(tmp_path / "own/gallery/1/x.png")
    with pytest.raises(ValueError, match=r"1/x.png has no camera.*camid_column=none"):
        load_reid(tmp_path / "own")


@pytest.mark.parametrize("names", [("cam1", "cam02", "cam10"), ("cam_a", "cam_b", "cam_c"), ("C1", "C2", "Camera 10")])
@pytest.mark.parametrize("camera_first", [True, False])
def test_folders_of_cameras(tmp_path, names, camera_first):
    """Cameras are numbered as people count: 2 before 10."""
    rows = [("anna", 0, "x.png"), ("anna", 1, "x.png"), ("bert", 1, "y.png"), ("bert", 2, "z_c9.png")]
    paths = []
    for identity, camera, file in rows:
        folders = (names[camera], identity) if camera_first else (identity, names[camera])
        paths.append("/".join((*folders, file)))
        paint(tmp_path / "own" / paths[-1])
    wanted = [(int(row[0] == "bert"), row[1], path) for row, path in zip(rows, paths, strict=True)]
    data = load_reid(tmp_path / "own")
    assert sorted(contents(data)["train"], key=str) == sorted(wanted, key=str)
    # It has labels, so it is no folder of images without them; cameras can be left out here too.
    assert sorted(open_unlabelled([str(tmp_path / "own")])[0]["camid"][:]) == [0, 1, 1, 2]
    assert set(load_reid(f"{tmp_path / 'own'}:camid_column=none")["train"]["camid"][:]) == {0}


def test_folders_of_cameras_with_images_of_anybody(tmp_path):
    for path in ("cam1/a.png", "cam1/b.png", "cam2/c.png"):
        paint(tmp_path / "own" / path)
    with pytest.raises(ValueError, match="folders of cameras, cam1, cam2, and none of identities.*names={pid}"):
        load_reid(tmp_path / "own")
    assert len(set(load_reid(f"{tmp_path / 'own'}:names={{pid}}/*")["train"]["pid"])) == 2
    train, truth, _ = open_unlabelled([str(tmp_path / "own")])
    assert train["camid"][:] == [1, 1, 2] and truth is None


def test_a_camera_may_be_number_0(tmp_path):
    for path in ("own/cam0/a.png", "own/cam1/c.png", "named/anna/cam0/1.png", "named/bert/cam0/1.png"):
        paint(tmp_path / path)
    train, truth, _ = open_unlabelled([str(tmp_path / "own")])
    assert train["camid"][:] == [0, 1] and truth is None
    _, truth, _ = open_unlabelled([str(tmp_path / "named")])
    assert truth.tolist() == [0, 1]


def test_cameras_of_two_folders_of_one_name_are_apart(tmp_path):
    for path in ("north/images/cam1/a.png", "south/images/cam1/a.png"):
        paint(tmp_path / path)
    train, *_ = open_unlabelled([str(tmp_path / "north/images"), str(tmp_path / "south/images")])
    assert train["domain"][:] == ["images", "south/images"] and train["camid"][:] == [1, 1]


def test_cameras_in_the_names_of_a_flat_folder(tmp_path):
    for name in ("0001_c2_a.png", "0001_c3_b.png", "0002_c2_c.png"):
        paint(tmp_path / "flat" / name)
    train, truth, _ = open_unlabelled([str(tmp_path / "flat")])
    assert train["camid"][:] == [2, 3, 2] and truth is None


def test_identities_of_two_domains_are_two_where_they_are_measured(tmp_path):
    """By --data of a table, and of what is held out; names say which is which."""
    lines = ["file_name,pid,camid,domain,split"]
    for domain in ("north", "south"):
        for pid in range(3):
            for camid, split in enumerate(("query", "gallery")):
                paint(tmp_path / f"own/{domain}/{pid}_{camid}.png")
                lines.append(f"{domain}/{pid}_{camid}.png,{pid},{camid},{domain},{split}")
    (tmp_path / "own/metadata.csv").write_text("\n".join(lines))
    data = load_reid(tmp_path / "own")
    names = names_of(data["query"], "pid")
    assert names == names_of(data["gallery"], "pid") and names[:4] == ["north/0", "north/1", "north/2", "south/0"]
    for side in ("query", "gallery"):
        shown = zip(data[side]["pid"], data[side]["domain"], data[side]["path"], strict=True)
        assert all(names[pid] == f"{domain}/{path.split('/')[1][0]}" for pid, domain, path in shown)
    (tmp_path / "own/metadata.csv").write_text("\n".join(line.rpartition(",")[0] for line in lines))
    data = load_reid(f"{tmp_path / 'own'}:holdout=1")
    assert sorted(data["query"]["pid"]) == sorted(data["gallery"]["pid"]) == [0, 1, 2, 3, 4, 5]


def test_junk_beside_identities_is_left_out(tmp_path):
    for split in ("query", "gallery"):
        for path in (f"{split}/0001/{split}_c{len(split)}.png", f"{split}/-1/x_c1.png"):
            paint(tmp_path / "own" / path)
    data = load_reid(tmp_path / "own")
    assert {split: part["pid"][:] for split, part in data.items()} == {"query": [1], "gallery": [1]}
    # An image that no split has is not lost without a word.
    paint(tmp_path / "own/loose.png")
    with pytest.raises(ValueError, match="loose.png lies beside query, gallery; expected all images in these"):
        load_reid(tmp_path / "own")


def test_half_filled_domains_take_the_sets_name(tmp_path):
    for name in ("a.png", "b.png"):
        paint(tmp_path / "own" / name)
    (tmp_path / "own/metadata.csv").write_text("file_name,pid,camid,domain\na.png,1,0,north\nb.png,2,0,\n")
    assert load_reid(tmp_path / "own")["train"]["domain"][:] == ["north", "own"]


def test_a_row_with_several_images_is_refused(tmp_path):
    features = datasets.Features({"image": datasets.List(datasets.Image()), "pid": datasets.Value("int64")})
    content = {"bytes": image_bytes(red(1)), "path": None}
    made = datasets.Dataset.from_dict({"image": [[content, content]], "pid": [1]}, features=features)
    made.save_to_disk(tmp_path / "made")
    with pytest.raises(ValueError, match="the column image holds lists; a row is to have one image"):
        load_reid(f"{tmp_path / 'made'}:camid_column=none")


def test_labels_in_an_archive_are_those_of_their_images(tmp_path):
    with tarfile.open(tmp_path / "own.tar", "w") as tar:
        for name, pid in (("f.001", 1), ("g.001", 2), ("wow!1*", 3)):
            add(tar, f"{name}.png", image_bytes(red(pid)))
            add(tar, f"{name}.cls", str(pid).encode())
    data = load_reid(tmp_path / "own.tar")
    assert dict(zip(data["train"]["path"], data["train"]["pid"], strict=True)) == {
        "own.tar/f.001.png": 1, "own.tar/g.001.png": 2, "own.tar/wow!1*.png": 3,
    }  # fmt: skip
    assert [data["train"][row]["image"].getpixel((0, 0)) for row in range(3)] == [red(1), red(2), red(3)]
    assert check_images(data)[1] == []
    with tarfile.open(tmp_path / "own.tar", "a") as tar:
        add(tar, "f.002.png", image_bytes(red(4)))
    # The label of its neighbour is not its own.
    with pytest.raises(ValueError, match="f.002.png has no label"):
        load_reid(tmp_path / "own.tar")


def test_addresses_that_readers_take_apart_are_refused(tmp_path):
    paint(tmp_path / "data::v2/anna/1.png")
    with pytest.raises(ValueError, match="rename the folder, as `::` in a path is read as a chain"):
        load_reid(tmp_path / "data::v2")
    paint(tmp_path / "own/1_c1.png")
    with pytest.raises(ValueError, match="a pattern of names has no colon"):
        load_reid(f"{tmp_path / 'own'}:names={{pid}}:{{camid}}_*")


def test_a_camera_may_be_written_out(tmp_path):
    for name in ("x_camera1_3.png", "x_camera2_3.png", "x-cam3.png"):
        paint(tmp_path / "own/anna" / name)
    assert sorted(load_reid(tmp_path / "own")["train"]["camid"]) == [0, 1, 2]


def test_one_name_for_all_is_no_label(tmp_path):
    """Folders of the same name on both sides would make every pair a match."""
    for path in ("wanted/images/a.png", "camera7/images/b.png", "camera7/images/c.png"):
        paint(tmp_path / path)
    query, gallery = read_folders(tmp_path / "wanted", tmp_path / "camera7")
    assert set(query["pid"]) | set(gallery["pid"]) == {-1}


def test_one_identity_among_unknown_images_is_a_label(tmp_path):
    for path in ("wanted/0001_c1_a.png", "gallery/0001_c2_b.png", "gallery/IMG0.png"):
        paint(tmp_path / path)
    query, gallery = read_folders(tmp_path / "wanted", tmp_path / "gallery")
    assert (query["pid"][:], gallery["pid"][:]) == ([1], [1, -1])


PEOPLES = [f"{name}/{number}_c{number % 3 + 1}.png" for name in ("anna", "bert") for number in range(3)]


@pytest.mark.parametrize(
    "paths, names",
    [
        # The number counts the images of a folder each.
        (PEOPLES, ["anna", "bert"]),
        ([f"gallery/{path}" for path in PEOPLES], ["anna", "bert"]),
        ([path.replace("/", "/cam1/") for path in PEOPLES], ["anna", "bert"]),
        # It counts people: of a day, of a camera, of the folder itself.
        (["monday/1_c1_a.png", "monday/1_c1_b.png", "tuesday/1_c2.png", "tuesday/2_c1.png"], ["1", "2"]),
        (["cam1/0001_c1.png", "cam1/0002_c1.png", "cam2/0001_c2.png"], ["1", "2"]),
        (["query/0001_c1.png", "query/0002_c1.png", "gallery/0001_c2.png"], ["1", "2"]),
        (["0001/0001_c1.png", "0001/0001_c2.png", "0002/0002_c1.png"], ["1", "2"]),
        (["0001_c1.png", "0002_c1.png", "more/0001_c2.png"], ["1", "2"]),
        (["monday/0001_c1.png", "monday/0002_c1.png", "tuesday/0001_c2.png"], ["1", "2"]),
    ],
)
def test_numbers_of_images_are_no_identities(tmp_path, paths, names):
    for path in paths:
        paint(tmp_path / "all" / path)
    query, _ = read_folders(tmp_path / "all", tmp_path / "all")
    known = names_of(query, "pid") or [str(pid) for pid in range(3)]
    assert sorted({known[pid] for pid in query["pid"]}) == names
    # The camera is that of the name all the same.
    shown = {int(re.search(r"_c(\d)", path)[1]) - 1 for path in paths}
    assert {*query["camid"]} == shown


def test_numbers_of_images_on_two_sides(tmp_path):
    """Each side has an image of one number; one person alone, added to a kept gallery, follows the others."""
    for path in ("q/anna/1_c1.png", "q/bob/1_c1.png", "g/anna/1_c2.png", "g/anna/2_c2.png", "g/bob/1_c2.png"):
        paint(tmp_path / path)
    query, gallery = read_folders(tmp_path / "q", tmp_path / "g")
    names = names_of(query, "pid")
    assert [names[pid] for pid in query["pid"]] == ["anna", "bob"]
    assert [names[pid] for pid in gallery["pid"]] == ["anna", "anna", "bob"]
    carl, kept = [Path("carl/1_c1.png")], [(Path("anna/1_c2.png"), "anna"), (Path("bob/1_c2.png"), "bob")]
    assert counts_images(carl, kept=kept) and not counts_images(carl)
    assert not counts_images(carl, kept=[(Path("monday/1_c2.png"), "1")])


def test_a_link_to_nothing_is_named(tmp_path):
    paint(tmp_path / "own/anna/1.png")
    paint(tmp_path / "own/bert/1.png")
    (tmp_path / "own/anna/2.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(ValueError, match="anna/2.png is a link to a file that is not there"):
        load_reid(tmp_path / "own")


def test_searched_folders_with_folders_of_cameras(tmp_path):
    for path in (
        "gallery/anna/cam1/x.png",
        "gallery/cam2/bert/x_c9.png",
        "gallery/cam_c/y.png",
        "gallery/0007_c4.png",
    ):
        paint(tmp_path / path)
    paint(tmp_path / "query/bert/x_c2.png")
    query, gallery = read_folders(tmp_path / "query", tmp_path / "gallery")
    names = names_of(gallery, "pid")
    found = [
        (path, None if pid < 0 else names[pid], camid)
        for path, pid, camid in zip(gallery["path"], gallery["pid"], gallery["camid"], strict=True)
    ]
    assert found == [
        ("0007_c4.png", "7", 3), ("anna/cam1/x.png", "anna", 0), ("cam2/bert/x_c9.png", "bert", 1),
        ("cam_c/y.png", None, 2),
    ]  # fmt: skip
    assert query["pid"][:] == [names.index("bert")] and query["camid"][:] == [1]


@pytest.mark.parametrize("name", ["labels.json", "metadata.json"])
def test_a_list_of_objects(tmp_path, name):
    for number, (file, *_) in enumerate(PEOPLE):
        paint(tmp_path / "own" / file, red(number))
    rows = [dict(zip(("file_name", "pid", "camid"), row, strict=True)) for row in PEOPLE]
    rows[1]["note"] = "x"
    (tmp_path / "own" / name).write_text(json.dumps(rows), encoding="utf-8")
    assert contents(load_reid(tmp_path / "own")) == contents(load_reid(tmp_path / "own" / name)) == {"train": NUMBERED}
    # Beside a table of another kind it says nothing.
    write(tmp_path / "own")
    (tmp_path / "own" / name).write_text("{}")
    assert contents(load_reid(tmp_path / "own")) == {"train": NUMBERED}


@pytest.mark.parametrize(
    "text, words",
    [("{]", "labels.json is no JSON"), ('{"images": []}', "is no table; expected a list"), ("[]", "no table"),
     ('[{"file_name": "a.png", "pid": 1, "camid": 0}, 3]', "no table"),
     ('[{"file_name": "a.png", "pid": 1, "camid": 0}, {"file_name": 3}]', "cannot be read as a table")],
)  # fmt: skip
def test_json_that_is_no_table(tmp_path, text, words):
    paint(tmp_path / "own/a.png")
    (tmp_path / "own/labels.json").write_text(text)
    with pytest.raises(ValueError, match=words):
        load_reid(tmp_path / "own")


def test_folders_of_tables_that_are_no_splits(tmp_path, caplog):
    for split in ("train", "test"):
        write(tmp_path / "own" / split, name="metadata.csv")
    with caplog.at_level(logging.WARNING):
        assert len(load_reid(tmp_path / "own")["train"]) == 3
    assert "own: test is left out, only train, query, gallery are read" in caplog.text


def test_a_folder_of_labelled_files(tmp_path):
    for name in ("0007_c2_a.png", "7_c1_b.png", "0011_c2_c.png"):
        paint(tmp_path / "own" / name)
    expected = {"train": [(7, 1, "0007_c2_a.png"), (11, 1, "0011_c2_c.png"), (7, 0, "7_c1_b.png")]}
    assert contents(load_reid(tmp_path / "own")) == expected
    paint(tmp_path / "own/x.png")
    with pytest.raises(ValueError, match="x.png is not named as the others are"):
        load_reid(tmp_path / "own")
    assert contents(load_reid(tmp_path / "own", skip_unreadable=True)) == expected


def test_files_whose_names_do_not_parse(tmp_path, caplog):
    warn_once.cache_clear()
    for path in ("bounding_box_train/0001_c1s1_000001_00.jpg", "query/0002_c1s1_000001_00.jpg",
                 "bounding_box_test/0002_c2s1_000001_00.jpg", "bounding_box_train/IMG_1.jpg"):  # fmt: skip
        paint(tmp_path / "market" / path)
    (tmp_path / "market/query/notes.txt").write_text("x")
    with pytest.raises(
        ValueError, match="'IMG_1.jpg' is not named as expected.*skip_unreadable leaves such files out"
    ):
        load_reid("market1501", tmp_path / "market")
    with caplog.at_level(logging.WARNING):
        data = load_reid("market1501", tmp_path / "market", skip_unreadable=True)
    assert {split: len(part) for split, part in data.items()} == {"train": 1, "query": 1, "gallery": 1}
    assert "left out 2 files" in caplog.text and "IMG_1.jpg" in caplog.text and "notes.txt" in caplog.text


@pytest.mark.parametrize(
    "pattern, paths, train",
    [
        ("person_{pid}_camera_{camid}_*", ["person_007_camera_2_x.png"], [(7, 2, "person_007_camera_2_x.png")]),
        ("{camid}/{pid}/*.png", ["A/9/a.png", "B/9/a.png"], [(9, 0, "A/9/a.png"), (9, 1, "B/9/a.png")]),
        ("./*/{pid}.{camid}", ["x/3.1.png", "y/3.2.png"], [(3, 1, "x/3.1.png"), (3, 2, "y/3.2.png")]),
        ("{pid}/{pid}-{camid}-*", ["4/4-1-2.png"], [(4, 1, "4/4-1-2.png")]),
        ("*/{pid}_*", ["query/a b_1.png", "train/c_1.png"], [(0, 0, "query/a b_1.png"), (1, 0, "train/c_1.png")]),
    ],
)
def test_names_by_a_pattern(tmp_path, pattern, paths, train):
    for number, path in enumerate(paths):
        paint(tmp_path / "own" / path, red(number))
    data = load_reid(f"{tmp_path / 'own'}:names={pattern}")
    assert contents(data) == {"train": train} and data["train"][0]["image"].size
    # A pattern of other files leaves none.
    with pytest.raises(ValueError, match=r"has no image that is named like z/\{pid\}"):
        load_reid(f"{tmp_path / 'own'}:names=z/{{pid}}", skip_unreadable=True)


def test_splits_by_a_pattern(tmp_path, caplog):
    for name in ("train-1-1", "query-2-1", "gallery-2-2", "gallery-2", "test-3-1"):
        paint(tmp_path / f"{name}.png")
    spec = f"{tmp_path}:names={{split}}-{{pid}}-{{camid}}"
    with pytest.raises(ValueError, match=r"gallery-2.png is not named like \{split\}-\{pid\}-\{camid\}; skip_unread"):
        load_reid(spec)
    with pytest.raises(ValueError, match=r"knows \['test'\] as splits"):
        load_reid(spec, skip_unreadable=True)
    (tmp_path / "test-3-1.png").unlink()
    found = contents(load_reid(spec, skip_unreadable=True))
    assert {split: rows[0][:2] for split, rows in found.items()} == {
        "train": (1, 1),
        "query": (2, 1),
        "gallery": (2, 2),
    }
    without = contents(load_reid(f"{spec},camid_column=none,skip_unreadable=true"))
    assert {rows[0][1] for rows in without.values()} == {0, 1}


@pytest.mark.parametrize(
    "options, words",
    [
        ("names={person}_*", r"has \{person\}; expected \{pid\}, \{camid\}, \{split\} and \*"),
        ("names={pid_*", r"has \{; expected"),
        ("names={pid}{camid}_*", r"has nothing between \{pid\} and \{camid\}"),
        ("names={pid}*", r"has nothing between \{pid\} and \*"),
        ("names=*{pid}_*", r"has nothing between \* and \{pid\}"),
        ("names={camid}_*", r"has no \{pid\}"),
        ("names={pid}_*,pid_column=who", r"pid_column=who has no effect beside names"),
    ],
)
def test_patterns_that_are_wrong(tmp_path, options, words):
    paint(tmp_path / "own/1_2.png")
    with pytest.raises(ValueError, match=words):
        load_reid(f"{tmp_path / 'own'}:{options}")


def test_a_pattern_is_for_folders(tmp_path):
    write(tmp_path / "own")
    with pytest.raises(ValueError, match=r"labels.csv: names=\{pid\}_\* has no effect, it is no folder"):
        load_reid(f"{tmp_path / 'own/labels.csv'}:names={{pid}}_*")
    with pytest.raises(ValueError, match=r"somebody/people does not know the option 'names'"):
        load_reid("somebody/people:names={pid}_*")


def test_addresses_are_no_files(tmp_path):
    (tmp_path / "metadata.csv").write_text("file_name,pid,camid\nhttps://example.org/1.jpg,1,1\n")
    with pytest.raises(ValueError, match=r"has the address https://example.org/1.jpg; download the images"):
        load_reid(tmp_path)


def test_options_without_effect_are_refused(tmp_path):
    folder = tmp_path / "folders"
    for path in ("anna/1.png", "bert/1.png"):
        paint(folder / path)
    table = write(tmp_path / "table", [("a.png", 1, 0, "x")], header=("file_name", "pid", "camid", "domain"))
    for spec, words in (
        (f"{folder}:pid_column=label", "pid_column=label has no effect"),
        (f"{folder}:camid_column=view", "camid_column=view has no effect.*camid_column=none"),
        (f"{folder}:split_column=part", "split_column=part has no effect"),
        (f"{folder}:fraction_seed=3", "fraction_seed has no effect without image_fraction or identity_fraction"),
        (f"{folder}:holdout_seed=3", "holdout_seed has no effect without holdout"),
        (f"{table}:domain=street", "domain=street has no effect"),
        ("synthetic:num_ids=3,holdout=0.5", "has train, query, gallery already: holdout=0.5 has no effect"),
    ):
        with pytest.raises(ValueError, match=words):
            load_reid(spec)


def test_a_table_from_windows(tmp_path):
    paint(tmp_path / "own/door/a.png", red(2))
    (tmp_path / "own/list.csv").write_bytes("\ufefffile_name;pid;camid\r\ndoor\\a.png;Zoë;1\r\n".encode())
    data = load_reid(tmp_path / "own")
    assert contents(data) == {"train": [(0, 1, "door/a.png")]}
    assert data["train"][0]["image"].getpixel((0, 0)) == red(2)
    (tmp_path / "own/list.csv").write_bytes(b"file_name;pid;camid\r\n..\\a.png;Zoe;1\r\n")
    with pytest.raises(ValueError, match="leaves"):
        load_reid(tmp_path / "own")


def test_compressed_archives(tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own/a.tar.gz").write_bytes(b"x")
    for name in ("own", "own/a.tar.gz"):
        with pytest.raises(ValueError, match="a.tar.gz is compressed; unpack it to a plain .tar"):
            load_reid(tmp_path / name)


def test_several_tables_and_none_of_them_named(tmp_path):
    write(tmp_path / "own")
    write(tmp_path / "own", name="other.csv")
    with pytest.raises(ValueError, match=r"has labels.csv and other.csv; name the one|has other.csv and labels.csv"):
        load_reid(tmp_path / "own")
    assert contents(load_reid(tmp_path / "own/other.csv")) == {"train": NUMBERED}


def test_images_without_labels_at_any_depth(tmp_path):
    for path in ("door/monday/1.png", "door/tuesday/2.png", "yard/monday/3.PNG"):
        paint(tmp_path / "deep" / path)
    train, truth, _ = open_unlabelled([str(tmp_path / "deep")])
    assert train["path"][:] == ["door/monday/1.png", "door/tuesday/2.png", "yard/monday/3.PNG"] and truth is None
    # One folder an identity is a labelled set, as before.
    for path in ("anna/1.png", "bert/2.png"):
        paint(tmp_path / "people" / path)
    train, truth, _ = open_unlabelled([str(tmp_path / "people"), "synthetic:num_ids=3"])
    assert len(set(truth.tolist())) == 5


def test_images_of_a_phone_are_named_where_they_would_be_missed(tmp_path, caplog):
    """A search and a training without labels take what Pillow opens; what it does not is said, in one line."""
    for name in ("a.jpg", "b.JFIF"):
        paint(tmp_path / "own/deep" / name, format="JPEG")
    for name in ("IMG_2.HEIC", "IMG_1.heic", ".hidden.heic"):
        (tmp_path / "own/deep" / name).write_bytes(b"x")
    warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        query, gallery = read_folders(tmp_path / "own", tmp_path / "own/deep")
    assert query["path"][:] == ["deep/a.jpg", "deep/b.JFIF"] and len(gallery) == 2
    words = [record.getMessage() for record in caplog.records]
    assert len(words) == 2 and all("not read, 2 of them, such as" in word and "IMG_1.heic" in word for word in words)
    warn_once.cache_clear()
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        images, *_ = open_unlabelled([str(tmp_path / "own/deep")])
    assert (
        len(images) == 2
        and "not read, 2 of them, such as" in caplog.text
        and "IMG_1.heic; convert to .jpg" in caplog.text
    )


@pytest.mark.parametrize(
    "words, numbers, names",
    [
        (["007", "7", "12"], [0, 2, 1], ["007", "12", "7"]),
        (["1E2", "2E1", "true"], [0, 1, 2], ["1E2", "2E1", "true"]),
        (["2024-01-01", "2024-01-02", "x"], [0, 1, 2], ["2024-01-01", "2024-01-02", "x"]),
        (["3.0", "5.0", "3.0"], [3, 5, 3], None),
        (["0001", "0002", "0001"], [1, 2, 1], None),
    ],
)
@pytest.mark.parametrize("column", [1, 2])
def test_labels_of_a_csv_are_what_stands_there(tmp_path, column, words, numbers, names):
    """Text that looks like a number, a date or a truth value is text; numbers in several spellings are several."""
    rows = [(f"{place}.png", *((word, 0) if column == 1 else (place, word))) for place, word in enumerate(words)]
    train = load_reid(write(tmp_path / "own", rows))["train"]
    name = ("pid", "camid")[column - 1]
    assert (train[name][:], names_of(train, name)) == (numbers, names)


def test_a_column_whose_name_is_a_number(tmp_path):
    write(tmp_path / "own", [("a.png", "anna", 3)], header=("file_name", "1", "2"))
    data = load_reid(f"{tmp_path / 'own'}:pid_column=1,camid_column=2,domain=007")["train"]
    assert (names_of(data, "pid"), data["camid"][:], data["domain"][:]) == (["anna"], [3], ["007"])


def test_an_unknown_camera_among_cameras_with_names(tmp_path):
    """A class of -1 gets a camera of its own, with a name of its own, also where not all names are used."""
    schema = features(["x", "y"], ["door", "yard", "roof"])
    table = {"pid": [0, 1], "camid": [0, -1], "domain": ["d"] * 2, "path": ["a.png", "b.png"]}
    table["image"] = [{"bytes": image_bytes(red(number)), "path": None} for number in (1, 2)]
    datasets.Dataset.from_dict(table, features=schema).save_to_disk(tmp_path / "own")
    train = load_reid(tmp_path / "own")["train"]
    assert train["camid"][:] == [0, 3] and names_of(train, "camid") == ["door", "yard", "roof", "unknown"]


def test_cameras_of_folders_keep_their_numbers_as_names(tmp_path):
    for path in ("anna/x_c5.png", "anna/y_c2.png", "bert/z_c10.png"):
        paint(tmp_path / "gaps" / path)
        paint(tmp_path / "usual" / path.replace("c5", "c1").replace("c10", "c3"))
    train = load_reid(tmp_path / "gaps")["train"]
    assert (train["camid"][:], names_of(train, "camid")) == ([1, 0, 2], ["2", "5", "10"])
    assert names_of(load_reid(tmp_path / "usual")["train"], "camid") is None


def test_folders_that_are_links(tmp_path):
    """Links are followed, in a search and in a training without labels; those that lead back are not."""
    for path in ("site/day1/1.png", "far/day2/2.png", "a/3.png", "b/4.png"):
        paint(tmp_path / path)
    (tmp_path / "site/day2").symlink_to(tmp_path / "far/day2", target_is_directory=True)
    images, *_ = open_unlabelled([str(tmp_path / "site")])
    assert images["path"][:] == ["day1/1.png", "day2/2.png"]
    for here, there in ("ab", "ba"):
        (tmp_path / here / "other").symlink_to(tmp_path / there, target_is_directory=True)
    assert read_folders(tmp_path / "a", tmp_path / "b")[0]["path"][:] == ["3.png", "other/4.png"]
