"""The public benchmarks as they lie on disk: where their folders are, what their file names say, how they are split.

Every reader takes the set's own folder and returns rows by split; its keyword arguments are the options the set
accepts. Names are read from the basename only. With `all_for_training` every usable image goes into `train`, and
there is nothing left to test on.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from utils.images import is_lmdb, lmdb_names
from utils.sources import Reading, Row, check_listed, dense, listing

SPLIT_FOLDERS = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}
NUM_SPLITS = 10
AIRPORT_FIRST_PID = 11001


class Form(NamedTuple):
    """What a file name looks like, and one to show."""

    pattern: re.Pattern
    example: str


MARKET = Form(re.compile(r"(-1|\d{4})_c([1-6])s([1-6])_(\d{6})_(\d{2})\.jpg(?:\.jpg)?"), "0002_c1s1_000451_03.jpg")
DUKE = Form(re.compile(r"(\d{4})_c([1-8])_f(\d{7})\.jpg"), "0001_c2_f0046182.jpg")
MSMT_LISTED = Form(
    re.compile(
        r"(\d{4})/(\d{4})_(\d{3})_(0[1-9]|1[0-5])_(\d{4})(morning|noon|afternoon)_(\d{4})_(\d{1,2})(_ex)?\.jpg"
    ),
    "0000/0000_000_01_0303morning_0008_1.jpg 0",
)
MSMT_CONVERTED = Form(re.compile(r"(\d{4})_c([1-9]|0[1-9]|1[0-5])_(\d{4})\.jpg"), "0000_c14_0021.jpg")
CUHK03 = Form(re.compile(r"(\d{4})_c([12])_(\d+)\.png|([1-5])_(\d{3})_([12])_(\d{2})\.png"), "0003_c1_21.png")
CUHK02 = Form(re.compile(r"(\d+)_.*\.(?:png|jpg|jpeg|bmp)"), "004_1.png")
PERSONX = Form(re.compile(r"(\d{4})_c(\d+)s(\d)_(\d{2})\.jpg"), "0001_c3s1_02.jpg")
VIPER = Form(re.compile(r"(\d{3})_(\d{1,3})\.bmp"), "001_45.bmp")
GRID = Form(re.compile(r"(\d{4})_(\d)_(\d{5})_.*\.jpeg"), "0001_1_25004_107_32_106_221.jpeg")
PRID = Form(re.compile(r"person_(\d{4})\.png"), "person_0001.png")
ILIDS = Form(re.compile(r"(\d{4})(\d{3})\.jpg"), "0001001.jpg")
LUPERSON = Form(re.compile(r"(\d{6})_(\d{7})_(\d{2})\.jpg"), "000001_0000123_00.jpg")
SYSU = {
    "cropped_images": Form(re.compile(r"p(\d+)_s(\d+)_(\d+)\.jpg"), "p1_s3_1.jpg"),
    "cropped_image": Form(re.compile(r"p(\d+)_n(\d+)_s(\d+)_hard([01])\.png"), "p1_n1_s3_hard0.png"),
    "cuhksysu4reid": Form(re.compile(r"(\d{5})_s(\d+)_(\d{7})_([01])\.jpg"), "00001_s3_0000123_0.jpg"),
}


def parse(form, name, place):
    match = form.pattern.fullmatch(name)
    if match is None:
        raise ValueError(f"{os.path.join(place, name)} is not named as expected, like {form.example}")
    return match


def read_names(root, folder, form, label):
    """Rows of one folder; `label` makes (pid, camid) of a parsed name."""
    place = os.path.join(root, folder)
    rows = [Row(f"{folder}/{entry.name}", *label(parse(form, entry.name, place))) for entry in listing(place)]
    if not rows:
        raise ValueError(f"{place} holds no images; expected names like {form.example}")
    return rows


def read_market_folders(root, form, label, prefix=""):
    return {split: read_names(root, prefix + folder, form, label) for split, folder in SPLIT_FOLDERS.items()}


def number_and_camera(match):
    return int(match[1]), int(match[2]) - 1


def for_training(splits, skip_pid=None, same_images=False):
    """All splits as one: without background, each image once, and test identities after those of training
    where the set numbers both from the start."""
    train = list(splits["train"])
    test = [row for split in ("query", "gallery") for row in splits[split] if row.pid != skip_pid]
    if same_images:
        test = list({os.path.basename(row.path): row for row in test}.values())
    if {row.pid for row in train} & {row.pid for row in test}:
        first = 1 + max(row.pid for row in train)
        test = [row._replace(pid=row.pid + first) for row in test]
    return {"train": train + test}


def market1501(root, *, all_for_training=False):
    """Junk (-1) is dropped; background (0000) stays in the gallery as negatives."""
    splits = read_market_folders(root, MARKET, number_and_camera)
    splits = {split: [row for row in rows if row.pid >= 0] for split, rows in splits.items()}
    return for_training(splits, skip_pid=0) if all_for_training else splits


def dukemtmcreid(root, *, all_for_training=False):
    splits = read_market_folders(root, DUKE, number_and_camera)
    return for_training(splits) if all_for_training else splits


def occludedduke(root, *, all_for_training=False):
    """Most queries also lie in the gallery under the same name; for training they count once."""
    splits = read_market_folders(root, DUKE, number_and_camera)
    return for_training(splits, same_images=True) if all_for_training else splits


def msmt17(root, *, version=None, all_for_training=False):
    """`version` is V1, V2 or converted; without it the first that is there. Validation belongs to training."""
    folders = {"V1": ("train", "test"), "V2": ("mask_train_v2", "mask_test_v2"), "converted": SPLIT_FOLDERS.values()}
    there = [key for key, names in folders.items() if all(os.path.isdir(os.path.join(root, name)) for name in names)]
    choose("version", version, tuple(folders), allow_none=True)
    if version is None and not there:
        wanted = "; ".join(f"{key}: {', '.join(names)}" for key, names in folders.items())
        raise ValueError(f"{root} holds none of MSMT17's layouts ({wanted})")
    version = version or there[0]
    if version == "converted":
        splits = read_market_folders(root, MSMT_CONVERTED, number_and_camera)
    else:
        train, test = folders[version]
        splits = {
            "train": read_msmt_list(root, "train", train) + read_msmt_list(root, "val", train),
            "query": read_msmt_list(root, "query", test),
            "gallery": read_msmt_list(root, "gallery", test),
        }
    return for_training(splits) if all_for_training else splits


def read_msmt_list(root, split, folder):
    file = Path(root) / f"list_{split}.txt"
    if not file.is_file():
        raise ValueError(f"{file} is missing; MSMT17's four lists lie beside its image folders")
    rows = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        fields = line.split()
        if not fields:
            continue
        match = MSMT_LISTED.pattern.fullmatch(fields[0])
        if match is None or len(fields) > 2 or not fields[-1 if len(fields) == 2 else 0][:4].isdigit():
            raise ValueError(f"{file}, line {number}: {line!r} is not as expected, like {MSMT_LISTED.example}")
        pid = int(fields[1]) if len(fields) == 2 else int(match[1])
        rows.append(Row(f"{folder}/{fields[0]}", pid, int(match[4]) - 1))
    if not rows:
        raise ValueError(f"{file} is empty; expected lines like {MSMT_LISTED.example}")
    check_listed(root, [row.path for row in rows], file)
    return sorted(rows)


def cuhk03np(root, *, variant="detected", all_for_training=False):
    """`variant` is detected or labeled. Under the set's original names the identity is pair and number together."""
    choose("variant", variant, ("detected", "labeled"))
    splits = read_market_folders(root, CUHK03, label_cuhk03, prefix=f"{variant}/")
    return for_training(splits) if all_for_training else splits


def label_cuhk03(match):
    if match[1]:
        return int(match[1]), int(match[2]) - 1
    return 1000 * int(match[4]) + int(match[5]), int(match[6]) - 1


def cuhk02(root, *, all_for_training=False):
    """Pairs 1 to 4 train, pair 5 tests, camera 1 against 2; pid is 10000 x pair + number, which restarts in a pair."""
    views = {}
    for pair in range(1, 6):
        for camera in (1, 2):

            def label(match, pair=pair, camera=camera):
                return 10_000 * pair + int(match[1]), 2 * (pair - 1) + camera - 1

            views[pair, camera] = read_names(root, f"P{pair}/cam{camera}", CUHK02, label)
    train = [row for (pair, _), rows in views.items() if pair < 5 for row in rows]
    splits = {"train": train, "query": views[5, 1], "gallery": views[5, 2]}
    return for_training(splits) if all_for_training else splits


def cuhksysu(root, *, version=None, all_for_training=True):
    """`version` is the crop: cropped_images, cropped_image or cuhksysu4reid. Training only.

    A scene of cropped_image is a camera; the other two know none, so all their images are of one.
    """
    there = [name for name in list(SYSU)[:2] if os.path.isdir(os.path.join(root, name))]
    parts = [name for name in ("train", "query", "gallery", "combine") if os.path.isdir(os.path.join(root, name))]
    nested = os.path.join(root, "cuhksysu4reid")
    if parts or os.path.isdir(nested):
        there.append("cuhksysu4reid")
    choose("version", version, tuple(SYSU), allow_none=True)
    if version or there:
        version = version or there[0]
    else:
        raise ValueError(f"{root} holds none of CUHK-SYSU's crops ({', '.join(SYSU)})")
    if version == "cropped_image":
        rows = read_names(root, version, SYSU[version], lambda match: (int(match[1]), int(match[3])))
        scenes = dense(row.camid for row in rows)
        return {"train": [row._replace(camid=scenes[row.camid]) for row in rows]}
    if version == "cropped_images":
        return {"train": read_names(root, version, SYSU[version], lambda match: (int(match[1]), 0))}
    prefix = "" if parts else "cuhksysu4reid/"
    parts = parts or [name for name in ("train", "query", "gallery", "combine") if os.path.isdir(f"{nested}/{name}")]
    # combine holds what the other three hold together
    parts = ["combine"] if "combine" in parts else parts
    rows = []
    for part in parts:
        rows += read_names(root, prefix + part, SYSU[version], lambda match: (int(match[1]), 0))
    return {"train": list({os.path.basename(row.path): row for row in rows}.values())}


def personx(root, *, all_for_training=False):
    """The subset of six cameras, a folder a camera (PersonX_v1/1 to 6), or all in Market's folders."""
    folders = [str(camera) for camera in range(1, 7) if os.path.isdir(os.path.join(root, str(camera)))]
    splits = {split: [] for split in SPLIT_FOLDERS}
    for folder in folders or [""]:
        for split, rows in read_market_folders(
            root, PERSONX, lambda match: (int(match[1]), int(match[2])), prefix=f"{folder}/" if folder else ""
        ).items():
            splits[split] += rows
    cameras = dense(row.camid for rows in splits.values() for row in rows)
    splits = {split: [row._replace(camid=cameras[row.camid]) for row in rows] for split, rows in splits.items()}
    return for_training(splits) if all_for_training else splits


def airport(root, *, all_for_training=True):
    """Lines of filepath.txt are camera\\pid\\file; numbers below 11001 are no identities. Training only."""
    file = Path(root) / "filepath.txt"
    example = r"1\11001\0001.jpg"
    rows = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        fields = line.strip().replace("\\", "/").split("/")
        if fields == [""]:
            continue
        camera = re.search(r"(\d+)$", fields[0])
        if len(fields) != 3 or camera is None or not fields[1].isdecimal() or not fields[2]:
            raise ValueError(f"{file}, line {number}: {line!r} is not as expected, like {example}")
        if int(fields[1]) >= AIRPORT_FIRST_PID:
            rows.append(Row("/".join(fields), int(fields[1]), int(camera[1])))
    if not rows:
        raise ValueError(f"{file} lists no image with an identity of {AIRPORT_FIRST_PID} or more, like {example}")
    check_listed(root, [row.path for row in rows], file)
    cameras = dense(row.camid for row in rows)
    return {"train": sorted(row._replace(camid=cameras[row.camid]) for row in rows)}


def luperson(root, *, all_for_training=True):
    """Files in one folder or in many, or an lmdb of them; no camera is known, so all are of one. Training only."""
    database = next((place for place in (root, os.path.join(root, "lmdb")) if is_lmdb(place)), None)
    if database:
        names = lmdb_names(database)
    else:
        names, folders = [], [""]
        while folders:
            folder = folders.pop()
            for entry in listing(os.path.join(root, folder)):
                (folders if entry.is_dir() else names).append(f"{folder}/{entry.name}".lstrip("/"))
    rows = [Row(name, int(parse(LUPERSON, os.path.basename(name), root)[1]), 0) for name in sorted(names)]
    if not rows:
        raise ValueError(f"{root} holds no images; expected names like {LUPERSON.example}")
    return Reading({"train": rows}, root=f"lmdb://{os.path.realpath(database)}" if database else None)


def test_identities(name, identities, number, split, split_file, form):
    """The identities a split tests on: read from a file, else the first in an order drawn by hashing.

    A hash gives the same order on every machine and under every version of everything.
    """
    if split_file is not None:
        chosen = read_split_file(split_file, split, form)
        unknown = sorted(chosen - set(identities))
        if unknown or not chosen:
            raise ValueError(
                f"{split_file}: split {split} tests on {unknown[:5] or 'nobody'}, not identities of {name}"
            )
        return chosen, f"{name}: split {split} of {split_file}"
    if isinstance(split, bool) or split not in range(NUM_SPLITS):
        raise ValueError(f"split must be 0 to {NUM_SPLITS - 1}, not {split!r}")
    note = f"{name}: split {split} of {NUM_SPLITS}, drawn from the seed '{name} split {split}'"
    return set(in_drawn_order(identities, f"{name} split {split}")[:number]), note


def in_drawn_order(items, seed):
    return sorted(items, key=lambda item: hashlib.sha256(f"{seed} {item}".encode()).digest())


def read_split_file(file, split, form):
    """Identities to test on: a text file (one a line), or JSON: one list, or a list of splits, each a list or a
    dict with `test` (identities) or `query` (entries that start with a path, as torchreid writes them)."""
    try:
        text = Path(file).read_text()
        content = json.loads(text) if str(file).endswith(".json") else [int(word) for word in text.split()]
    except (OSError, ValueError) as error:
        raise ValueError(f"split_file {file} cannot be read as identities: {error}") from error
    try:
        if isinstance(content, list) and content and not isinstance(content[0], int):
            content = content[split]
        if isinstance(content, dict):
            if "test" in content:
                content = content["test"]
            else:
                content = [int(form.pattern.fullmatch(os.path.basename(entry[0]))[1]) for entry in content["query"]]
        return {int(pid) for pid in content}
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"split_file {file} has no split {split} in a form this set knows") from error


def two_views(name, first, second, split, split_file, form, negatives=()):
    """Half of the identities both views share train, the others test: the first view's against the second's."""
    shared = {row.pid for row in first} & {row.pid for row in second}
    chosen, note = test_identities(name, shared, len(shared) // 2, split, split_file, form)
    splits = {
        "train": [row for row in [*first, *second] if row.pid in shared - chosen],
        "query": [row for row in first if row.pid in chosen],
        "gallery": [row for row in second if row.pid in chosen] + list(negatives),
    }
    return Reading(splits, note)


def viper(root, *, split=0, split_file=None, reverse=False, all_for_training=False):
    """316 of 632 identities train. Camera a queries b, with `reverse` b queries a."""
    views = [
        read_names(root, folder, VIPER, lambda match, camera=camera: (int(match[1]), camera))
        for camera, folder in enumerate(("cam_a", "cam_b"))
    ]
    if all_for_training:
        return {"train": views[0] + views[1]}
    return two_views("viper", *(views[::-1] if reverse else views), split, split_file, VIPER)


def grid(root, *, split=0, split_file=None, all_for_training=False):
    """125 of 250 pairs train; the 775 distractors (pid 0) are in every gallery."""
    probe = read_names(root, "probe", GRID, number_and_camera)
    gallery = read_names(root, "gallery", GRID, number_and_camera)
    pairs = [row for row in gallery if row.pid != 0]
    distractors = [row for row in gallery if row.pid == 0]
    cameras = {row.pid: row.camid for row in probe}
    if any(cameras.get(row.pid) == row.camid for row in pairs):
        # a copy whose digit does not tell the two views of a pair apart: the folders do
        probe = [row._replace(camid=0) for row in probe]
        pairs, distractors = ([row._replace(camid=1) for row in rows] for rows in (pairs, distractors))
    if all_for_training:
        return {"train": probe + pairs}
    return two_views("grid", probe, pairs, split, split_file, GRID, distractors)


def prid(root, *, split=0, split_file=None, all_for_training=False):
    """Identities 1 to 200 are in both cameras: 100 train, 100 of camera a are searched among 649 of camera b.

    From 201 on the two cameras number different people; camera a's become 1000 + number.
    """

    def label_first(match):
        number = int(match[1])
        return (number if number <= 200 else 1000 + number), 0

    first = read_names(root, "single_shot/cam_a", PRID, label_first)
    second = read_names(root, "single_shot/cam_b", PRID, lambda match: (int(match[1]), 1))
    if all_for_training:
        return {"train": first + second}
    known = {row.pid for row in first}
    alone = [row for row in second if row.pid not in known]
    return two_views("prid", first, second, split, split_file, PRID, alone)


def ilids(root, *, split=0, split_file=None, all_for_training=False):
    """60 of 119 identities test, one query and one gallery image each. The index stands for the camera it lacks."""
    rows = read_names(root, "Persons", ILIDS, lambda match: (int(match[1]), int(match[2])))
    people = {}
    for row in rows:
        people.setdefault(row.pid, []).append(row._replace(camid=len(people.get(row.pid, []))))
    if all_for_training:
        return {"train": [row for group in people.values() for row in group]}
    several = {pid for pid, group in people.items() if len(group) > 1}
    chosen, note = test_identities("ilids", several, (len(people) + 1) // 2, split, split_file, ILIDS)
    drawn = {pid: in_drawn_order(people[pid], f"ilids split {split}") for pid in sorted(chosen)}
    splits = {
        "train": [row for pid, group in people.items() if pid not in chosen for row in group],
        "query": [images[0] for images in drawn.values()],
        "gallery": [images[1] for images in drawn.values()],
    }
    return Reading(splits, note)


class Benchmark(NamedTuple):
    """How to read a set, the beginnings of the names its folder goes by, and what tells the folder."""

    read: Callable
    names: tuple
    marks: tuple


BENCHMARKS = {
    "market1501": Benchmark(market1501, ("market1501", "market"), tuple(SPLIT_FOLDERS.values())),
    "dukemtmcreid": Benchmark(dukemtmcreid, ("dukemtmcreid", "dukemtmc", "duke"), tuple(SPLIT_FOLDERS.values())),
    "occludedduke": Benchmark(occludedduke, ("occludedduke",), tuple(SPLIT_FOLDERS.values())),
    "msmt17": Benchmark(msmt17, ("msmt17",), ("list_train.txt", "mask_train_v2", "bounding_box_train")),
    "cuhk03np": Benchmark(cuhk03np, ("cuhk03np", "cuhk03"), ("detected", "labeled")),
    "cuhk02": Benchmark(cuhk02, ("cuhk02", "dataset"), ("P1",)),
    "cuhksysu": Benchmark(cuhksysu, ("cuhksysu",), ("cropped_images", "cropped_image", "cuhksysu4reid", "combine")),
    "viper": Benchmark(viper, ("viper",), ("cam_a",)),
    "grid": Benchmark(grid, ("grid", "undergroundreid", "qmulgrid"), ("probe",)),
    "prid": Benchmark(prid, ("prid2011", "prid"), ("single_shot",)),
    "ilids": Benchmark(ilids, ("ilids",), ("Persons",)),
    "airport": Benchmark(airport, ("airport",), ("filepath.txt",)),
    "personx": Benchmark(personx, ("personx",), ("1/bounding_box_train", "bounding_box_train")),
    "luperson": Benchmark(luperson, ("luperson", "lupnl"), ()),
}


def plain(name):
    """Market-1501-v15.09.15 and market1501 begin alike once only letters and digits are left."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def find_folder(name, root):
    """The set's own folder: the root, or up to two folders deeper under the names people's copies have."""
    names, marks = BENCHMARKS[name].names, BENCHMARKS[name].marks
    level, seen = [os.fspath(root)], []
    for _ in range(3):
        for folder in level:
            if any(os.path.exists(os.path.join(folder, mark)) for mark in marks):
                return folder
        seen += level
        children = [entry for folder in level for entry in listing(folder) if entry.is_dir()]
        level = [entry.path for word in names for entry in children if plain(entry.name).startswith(word)]
    if not marks:
        # nothing tells the folder of a set of loose files but its name
        return seen[-1]
    raise ValueError(f"{root} holds no {name}: looked for {' or '.join(marks)} in {', '.join(seen[:5])}")


def choose(option, value, choices, allow_none=False):
    if value not in choices and not (allow_none and value is None):
        raise ValueError(f"{option} must be one of {', '.join(choices)}, not {value!r}")


def read_benchmark(name, root, options):
    """The set's rows by split, a word on the split, and where the files lie."""
    folder = find_folder(name, root)
    reading = BENCHMARKS[name].read(folder, **options)
    reading = reading if isinstance(reading, Reading) else Reading(reading)
    empty = [split for split, rows in reading.splits.items() if not rows]
    if empty:
        raise ValueError(f"{folder}: {name} has no images for {', '.join(empty)}")
    return reading._replace(note=reading.note or f"{name}, the published split", root=reading.root or folder)
