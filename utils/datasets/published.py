"""The public benchmarks on disk: their folders, the meaning of their file names, their splits.

Every reader takes the data set's own folder and returns rows by split; its keyword arguments are the options of the
data set. Labels are read from the base name of a file only. With `all_for_training` every usable image goes into
`train`, and there is no query or gallery.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from utils.datasets.schema import (
    Form,
    Reading,
    Row,
    check_listed,
    dense,
    listing,
    number_and_camera,
    parsed,
    read_names,
)
from utils.datasets.ten_splits import grid, ilids, prid, viper

SPLIT_FOLDERS = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}
MSMT_FOLDERS = {
    "V1": ("train", "test"),
    "V2": ("mask_train_v2", "mask_test_v2"),
    "converted": tuple(SPLIT_FOLDERS.values()),
}
AIRPORT_FIRST_PID = 11001
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
# Of LUPerson-NL, also with the video before it; LUPerson knows no identities. Keys of an lmdb have no ending.
LUPERSON = Form(
    re.compile(r"(?:(?:\d{5}_)?(\d{6})_\d{7}_\d{2}|\d{2}_\d{2}_\d{4}_\d{8}|\d{8}_\d{4})(?:\.jpg)?"),
    "000001_0000123_00.jpg",
)
SYSU = {
    "cropped_images": Form(re.compile(r"p(\d+)_s(\d+)_(\d+)\.jpg"), "p1_s3_1.jpg"),
    "cropped_image": Form(re.compile(r"p(\d+)_n(\d+)_s(\d+)_hard([01])\.png"), "p1_n1_s3_hard0.png"),
    "cuhksysu4reid": Form(re.compile(r"(\d{5})_s(\d+)_(\d{7})_([01])\.jpg"), "00001_s3_0000123_0.jpg"),
}
CROP_LABELS = {
    "cropped_images": lambda match: (int(match[1]), 0),
    "cropped_image": lambda match: (int(match[1]), int(match[3])),
    "cuhksysu4reid": lambda match: (int(match[1]), 0),
}


def read_market_folders(root, form, label, prefix=""):
    return {split: read_names(root, prefix + folder, form, label) for split, folder in SPLIT_FOLDERS.items()}


def for_training(splits, skip_pid=None, same_images=False):
    """All splits as one, without `skip_pid`; test identities are renumbered if training has the same numbers."""
    train = list(splits["train"])
    test = [row for split in ("query", "gallery") for row in splits[split] if row.pid != skip_pid]
    if same_images:
        test = list({os.path.basename(row.path): row for row in test}.values())
    if {row.pid for row in train} & {row.pid for row in test}:
        first = 1 + max(row.pid for row in train)
        test = [row._replace(pid=row.pid + first) for row in test]
    return {"train": train + test}


def market1501(root, *, all_for_training=False):
    """Drops junk images (-1); background images (0000) stay in the gallery as negatives."""
    splits = read_market_folders(root, MARKET, number_and_camera)
    splits = {split: [row for row in rows if row.pid >= 0] for split, rows in splits.items()}
    return for_training(splits, skip_pid=0) if all_for_training else splits


def dukemtmcreid(root, *, all_for_training=False):
    splits = read_market_folders(root, DUKE, number_and_camera)
    return for_training(splits) if all_for_training else splits


def occludedduke(root, *, all_for_training=False):
    """Most queries are also in the gallery under the same name; for training they count once."""
    splits = read_market_folders(root, DUKE, number_and_camera)
    return for_training(splits, same_images=True) if all_for_training else splits


def msmt17(root, *, version=None, all_for_training=False):
    """`version` is V1, V2 or converted; default: the first one present. Validation images are training images."""
    check_option("msmt17: version", version, tuple(MSMT_FOLDERS), allow_none=True)
    present = [key for key, names in MSMT_FOLDERS.items() if os.path.isdir(os.path.join(root, names[0]))]
    if version is None and not present:
        layouts = "; ".join(f"{key}: {', '.join(names)}" for key, names in MSMT_FOLDERS.items())
        raise ValueError(f"{root} holds none of MSMT17's layouts ({layouts})")
    version = version or present[0]
    if version == "converted":
        splits = read_market_folders(root, MSMT_CONVERTED, number_and_camera)
    else:
        train, test = MSMT_FOLDERS[version]
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
    for number, line in enumerate(lines_of(file), 1):
        if not line.strip():
            continue
        name, *label = line.split()
        match = MSMT_LISTED.pattern.fullmatch(name)
        if match is None or len(label) > 1 or not all(word.isdecimal() for word in label):
            raise ValueError(f"{file}, line {number}: {line!r} is not as expected, like {MSMT_LISTED.example}")
        pid = int(label[0] if label else match[1])
        rows.append(Row(f"{folder}/{name}", pid, int(match[4]) - 1))
    if not rows:
        raise ValueError(f"{file} is empty; expected lines like {MSMT_LISTED.example}")
    check_listed(root, [row.path for row in rows], file)
    return sorted(rows)


def lines_of(file):
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read as a list of images: {error}") from None


def cuhk03np(root, *, variant="detected", all_for_training=False):
    """`variant` is detected or labeled. With the original file names, pair and number together are the identity."""
    check_option("cuhk03np: variant", variant, ("detected", "labeled"))
    splits = read_market_folders(root, CUHK03, label_cuhk03, prefix=f"{variant}/")
    return for_training(splits) if all_for_training else splits


def label_cuhk03(match):
    if match[1]:
        return int(match[1]), int(match[2]) - 1
    return 1000 * int(match[4]) + int(match[5]), int(match[6]) - 1


def cuhk02(root, *, all_for_training=False):
    """Pairs 1 to 4 train, pair 5 tests, camera 1 against 2; pid is 10000 x pair + number (each pair counts from 1)."""
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

    A scene of cropped_image is a camera. The other two have no cameras: all their images get one camera.
    """
    check_option("cuhksysu: version", version, tuple(SYSU), allow_none=True)
    base = "cuhksysu4reid/" if os.path.isdir(os.path.join(root, "cuhksysu4reid")) else ""
    parts = [base + name for name in ("combine", "train", "query", "gallery")]
    folders = {"cropped_images": ["cropped_images"], "cropped_image": ["cropped_image"], "cuhksysu4reid": parts}
    folders = {
        crop: [name for name in names if os.path.isdir(os.path.join(root, name))] for crop, names in folders.items()
    }
    present = [crop for crop, names in folders.items() if names]
    if not present or (version or present[0]) not in present:
        raise ValueError(
            f"{root} holds no {version or ' or '.join(SYSU)}; CUHK-SYSU's crops there: {present or 'none'}"
        )
    version = version or present[0]
    rows = []
    for folder in folders[version]:
        rows += read_names(root, folder, SYSU[version], CROP_LABELS[version])
        if folder == f"{base}combine":
            # This folder holds the images of the other three.
            break
    scenes = dense(row.camid for row in rows)
    return {"train": [row._replace(camid=scenes[row.camid]) for row in rows]}


def personx(root, *, all_for_training=False):
    """The subset of six cameras: one folder per camera (PersonX_v1/1 to 6), or all in Market's folders."""
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
    """Lines of filepath.txt are camera\\pid\\file; pids below 11001 are not identities. Training only."""
    file, rows, example = Path(root) / "filepath.txt", [], r"1\11001\0001.jpg"
    for number, line in enumerate(lines_of(file), 1):
        fields = line.strip().replace("\\", "/").split("/")
        if fields == [""]:
            continue
        if len(fields) != 3 or not all(fields) or not fields[1].isdecimal():
            raise ValueError(f"{file}, line {number}: {line!r} is not as expected, like {example}")
        if int(fields[1]) >= AIRPORT_FIRST_PID:
            # Sorted by length before name, so that camera 10 comes after camera 9.
            rows.append(Row("/".join(fields), int(fields[1]), (len(fields[0]), fields[0])))
    if not rows:
        raise ValueError(f"{file} lists no image with an identity of {AIRPORT_FIRST_PID} or more, like {example}")
    check_listed(root, [row.path for row in rows], file)
    cameras = dense(row.camid for row in rows)
    return {"train": sorted(row._replace(camid=cameras[row.camid]) for row in rows)}


def luperson(root, *, all_for_training=True):
    """Files in one or many folders, or an lmdb of them. Cameras are unknown: all images get one. Training only."""
    from utils.datasets import is_lmdb, lmdb_names

    database = next((place for place in (root, os.path.join(root, "lmdb")) if is_lmdb(place)), None)
    if database:
        names = lmdb_names(database)
    else:
        names, folders = [], [""]
        while folders:
            folder = folders.pop()
            for entry in listing(os.path.join(root, folder)):
                (folders if entry.is_dir() else names).append(f"{folder}/{entry.name}".lstrip("/"))
    rows = [Row(name, int(match[1] or 0), 0) for name, match in parsed(LUPERSON, sorted(names), root)]
    if not rows:
        raise ValueError(f"{root} holds no images; expected names like {LUPERSON.example}")
    return Reading({"train": rows}, root=f"lmdb://{os.path.realpath(database)}" if database else None)


class Benchmark(NamedTuple):
    """The reader of a data set, beginnings of names of its folder, and entries that identify the folder."""

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
    "cuhksysu": Benchmark(
        cuhksysu, ("cuhksysu",), ("cropped_images", "cropped_image", "cuhksysu4reid", "combine", "gallery")
    ),
    "viper": Benchmark(viper, ("viper",), ("cam_a",)),
    "grid": Benchmark(grid, ("grid", "undergroundreid", "qmulgrid"), ("probe",)),
    "prid": Benchmark(prid, ("prid2011", "prid"), ("single_shot",)),
    "ilids": Benchmark(ilids, ("ilids",), ("Persons",)),
    "airport": Benchmark(airport, ("airport",), ("filepath.txt",)),
    "personx": Benchmark(personx, ("personx",), ("1/bounding_box_train", "bounding_box_train")),
    "luperson": Benchmark(luperson, ("luperson", "lupnl"), ()),
}


def plain(name):
    """The lower-case letters and digits of a name: Market-1501-v15.09.15 then starts with market1501."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def find_folder(name, root, version=None):
    """The data set's own folder: the root, or a folder with a usual name up to two levels below it."""
    names, marks = BENCHMARKS[name].names, BENCHMARKS[name].marks
    if name == "msmt17" and version in MSMT_FOLDERS:
        marks = MSMT_FOLDERS[version][:1]
    level, searched = [os.fspath(root)], []
    for _ in range(3):
        for folder in level:
            if any(os.path.exists(os.path.join(folder, mark)) for mark in marks):
                return folder
        searched += level
        children = [entry for folder in level for entry in listing(folder) if entry.is_dir()]
        level = [entry.path for word in names for entry in children if plain(entry.name).startswith(word)]
        if not marks:
            # The folder of a data set of loose files can be identified by its name only.
            return level[0] if level else os.fspath(root)
    raise ValueError(f"{root} holds no {name}: looked for {' or '.join(marks)} in {', '.join(searched[:5])}")


def check_option(option, value, choices, allow_none=False):
    if value not in choices and not (allow_none and value is None):
        raise ValueError(f"{option} must be one of {', '.join(choices)}, not {value!r}")


def read_benchmark(name, root, options):
    """The data set's rows by split, a note on the split, and the folder of the files."""
    folder = find_folder(name, root, options.get("version"))
    reading = BENCHMARKS[name].read(folder, **options)
    reading = reading if isinstance(reading, Reading) else Reading(reading)
    empty = [split for split, rows in reading.splits.items() if not rows]
    if empty:
        raise ValueError(f"{folder}: {name} has no images for {', '.join(empty)}")
    return reading._replace(note=reading.note or f"{name}, the published split", root=reading.root or folder)
