"""Trees of files with the benchmarks' true names and counts; every image is a hard link to one of a few tiny files."""

import os
from pathlib import Path

from PIL import Image

# File systems cap the links of one file, commonly at 65,000.
LINKS_PER_FILE = 60_000
HIDDEN = (".DS_Store", "._0001_c1.jpg", "Thumbs.db", ".hidden.jpg")
MSMT_TIMES = ("morning", "noon", "afternoon")
CUHK02_IDS = (971, 306, 107, 193, 239)
PERSONX_CAMERAS = (3, 4, 8, 10, 11, 12)


class Tree:
    """A folder to fill with images that cost a link each."""

    def __init__(self, root):
        self.root = Path(root)
        self.root.mkdir(parents=True, exist_ok=True)
        self.sources = {}
        self.made = set()

    def source(self, ending):
        path, links = self.sources.get(ending, (None, LINKS_PER_FILE))
        if links >= LINKS_PER_FILE:
            stock = self.root.with_name(f".{self.root.name}.stock")
            stock.mkdir(exist_ok=True)
            path = str(stock / f"{len(list(stock.iterdir()))}{ending}")
            Image.new("RGB", (2, 4), (200, 30, 60)).save(path)
            links = 0
        self.sources[ending] = (path, links + 1)
        return path

    def add(self, path):
        folder, name = os.path.split(path)
        folder = os.path.join(self.root, folder)
        if folder not in self.made:
            os.makedirs(folder, exist_ok=True)
            self.made.add(folder)
        os.link(self.source(os.path.splitext(name)[1]), os.path.join(folder, name))
        return path

    def litter(self):
        """What operating systems leave behind, in every folder of images."""
        for folder in self.made:
            for name in HIDDEN:
                Path(folder, name).write_bytes(b"")
            Path(folder, "__MACOSX").mkdir(exist_ok=True)
        return self.root


def spread(pids, total, cameras):
    """(pid, camera from 1, index) of `total` images: every identity in turn, then the next camera."""
    pids = list(pids)
    for number in range(total):
        turn = number // len(pids)
        yield pids[number % len(pids)], turn % cameras + 1, turn


def market1501(root):
    tree = Tree(root)
    train, test = range(2, 1502, 2), range(1, 1500, 2)
    train = [*train, 1501]

    def add(folder, pid, camera, index, double=False):
        number = f"{pid:04d}" if pid >= 0 else "-1"
        name = f"{number}_c{camera}s{index % 6 + 1}_{1000 + index:06d}_{index % 100:02d}.jpg"
        tree.add(f"{folder}/{name}{'.jpg' if double else ''}")

    for pid, camera, index in spread(train, 12_936, 6):
        add("bounding_box_train", pid, camera, index)
    for number, (pid, camera, index) in enumerate(spread(test, 3_368, 6)):
        add("query", pid, camera, index, double=number < 6)
    for number, (pid, camera, index) in enumerate(spread(test, 13_115, 6)):
        add("bounding_box_test", pid, camera, index, double=number < 18)
    for _, camera, index in spread([0], 2_798, 6):
        add("bounding_box_test", 0, camera, index)
    for _, camera, index in spread([-1], 3_819, 6):
        add("bounding_box_test", -1, camera, index)
    return tree.litter()


def duke_gallery(tree, test, alone):
    """17,661 images of 702 searched identities and 408 that appear in the gallery alone, in one camera each."""
    names = []
    for number, pid in enumerate(alone):
        camera = number % 8 + 1
        names += [f"{pid:04d}_c{camera}_f{index:07d}.jpg" for index in range(3)]
    for pid, camera, index in spread(test, 17_661 - len(names), 8):
        names.append(f"{pid:04d}_c{camera}_f{index:07d}.jpg")
    for name in names:
        tree.add(f"bounding_box_test/{name}")
    return names


def dukemtmcreid(root):
    tree = Tree(root)
    train, test, alone = range(1, 703), range(2001, 2703), range(4001, 4409)
    for pid, camera, index in spread(train, 16_522, 8):
        tree.add(f"bounding_box_train/{pid:04d}_c{camera}_f{index:07d}.jpg")
    for pid, camera, index in spread(test, 2_228, 8):
        tree.add(f"query/{pid:04d}_c{camera}_f{9000000 + index:07d}.jpg")
    duke_gallery(tree, test, alone)
    return tree.litter()


def occludedduke(root):
    tree = Tree(root)
    train, test, alone = range(1, 703), range(2001, 2703), range(4001, 4409)
    for pid, camera, index in spread(train, 15_618, 8):
        tree.add(f"bounding_box_train/{pid:04d}_c{camera}_f{index:07d}.jpg")
    gallery = duke_gallery(tree, test, alone)
    asked = set(range(2001, 2520))
    twice = [name for name in gallery if int(name[:4]) in asked][:1_870]
    for name in twice:
        tree.add(f"query/{name}")
    for pid, camera, index in spread(sorted(asked), 2_210 - len(twice), 8):
        tree.add(f"query/{pid:04d}_c{camera}_f{9000000 + index:07d}.jpg")
    return tree.litter()


def msmt_name(pid, camera, index, extra):
    time = MSMT_TIMES[index % 3]
    return f"{pid:04d}/{pid:04d}_{index:03d}_{camera:02d}_0303{time}_{index:04d}_{index % 13}{'_ex' * extra}.jpg"


def msmt17(root):
    """Version 1; test identities are numbered from 0 again, validation shares those of training."""
    tree = Tree(root)
    parts = {
        "train": ("train", range(1_041), 30_248, 0),
        "val": ("train", range(1_041), 2_373, 100),
        "query": ("test", range(3_060), 11_659, 0),
        "gallery": ("test", range(3_060), 82_161, 100),
    }
    for part, (folder, pids, total, first) in parts.items():
        lines = []
        for pid, camera, index in spread(pids, total, 15):
            name = msmt_name(pid, camera, first + index, extra=pid % 5 == 0)
            tree.add(f"{folder}/{name}")
            lines.append(f"{name} {pid}\n")
        Path(root, f"list_{part}.txt").write_text("".join(reversed(lines)))
    for folder in ("train/0000", "test/0000"):
        Path(root, folder, ".DS_Store").write_bytes(b"")
    return tree.root


def msmt17_as_version_2(root):
    """The same tree under the names of version 2."""
    os.rename(root / "train", root / "mask_train_v2")
    os.rename(root / "test", root / "mask_test_v2")
    return root


def msmt17_converted(root):
    tree = Tree(root)
    parts = {
        "bounding_box_train": (range(1_041), 32_621, 0),
        "query": (range(3_060), 11_659, 0),
        "bounding_box_test": (range(3_060), 82_161, 100),
    }
    for folder, (pids, total, first) in parts.items():
        for pid, camera, index in spread(pids, total, 15):
            tree.add(f"{folder}/{pid:04d}_c{camera}_{first + index:04d}.jpg")
    return tree.litter()


def cuhk03np(root):
    tree = Tree(root)
    train, test = range(1, 768), range(768, 1468)
    for variant, counts in {"detected": (7_365, 1_400, 5_332), "labeled": (7_368, 1_400, 5_328)}.items():
        for folder, pids, total in zip(
            ("bounding_box_train", "query", "bounding_box_test"), (train, test, test), counts, strict=True
        ):
            for pid, camera, index in spread(pids, total, 2):
                tree.add(f"{variant}/{folder}/{pid:04d}_c{camera}_{index + 1}.png")
    return tree.litter()


def cuhk02(root):
    tree = Tree(root)
    for pair, number in enumerate(CUHK02_IDS, 1):
        for camera in (1, 2):
            for pid in range(1, number + 1):
                for index in (1, 2):
                    tree.add(f"P{pair}/cam{camera}/{pid:03d}_{index}.png")
    return tree.litter()


def cuhksysu(root, version):
    tree = Tree(root)
    for number, (pid, scene, index) in enumerate(spread(range(1, 11_935), 34_574, 12)):
        if version == "cropped_images":
            tree.add(f"cropped_images/p{pid}_s{scene}_{index}.jpg")
        elif version == "cropped_image":
            tree.add(f"cropped_image/p{pid}_n{index + 1}_s{scene}_hard{number % 2}.png")
        else:
            name = f"{pid:05d}_s{scene}_{number:07d}_{number % 2}.jpg"
            part = "train" if pid <= 5_532 else ("query" if pid <= 8_432 and index == 0 else "gallery")
            tree.add(f"cuhksysu4reid/{part}/{name}")
            tree.add(f"cuhksysu4reid/combine/{name}")
    return tree.litter()


def viper(root):
    tree = Tree(root)
    for pid in [*range(400), *range(642, 874)]:
        tree.add(f"cam_a/{pid:03d}_{pid % 3 * 45}.bmp")
        tree.add(f"cam_b/{pid:03d}_{90 + pid % 3 * 45}.bmp")
    return tree.litter()


def grid(root):
    tree = Tree(root)
    for pid in range(1, 251):
        tree.add(f"probe/{pid:04d}_{pid % 8 + 1}_{pid:05d}_107_32_106_221.jpeg")
        tree.add(f"gallery/{pid:04d}_{(pid + 3) % 8 + 1}_{pid:05d}_17_3_10_22.jpeg")
    for number in range(775):
        tree.add(f"gallery/0000_{number % 8 + 1}_{number:05d}_1_2_3_4.jpeg")
    return tree.litter()


def prid(root):
    tree = Tree(root)
    for camera, last in (("a", 385), ("b", 749)):
        for pid in range(1, last + 1):
            tree.add(f"single_shot/cam_{camera}/person_{pid:04d}.png")
    return tree.litter()


def ilids(root):
    tree = Tree(root)
    for pid, _, index in spread(range(1, 120), 476, 1):
        tree.add(f"Persons/{pid:04d}{index + 1:03d}.jpg")
    return tree.litter()


def personx(root):
    tree = Tree(root)
    train, test = range(1, 411), range(411, 1267)
    for folder, camera in enumerate(PERSONX_CAMERAS, 1):
        place = f"PersonX_v1/{folder}"
        for split, pids, number in (
            ("bounding_box_train", train, 4),
            ("query", test, 1),
            ("bounding_box_test", test, 6),
        ):
            for pid in pids:
                for index in range(number):
                    tree.add(f"{place}/{split}/{pid:04d}_c{camera}s1_{index:02d}.jpg")
    return tree.litter()


def airport(root):
    tree = Tree(root)
    lines = []
    for camera in (1, 2, 3):
        for pid in (9, 11000, 11001, 11002, 40001):
            for index in (1, 2):
                tree.add(f"c{camera}/{pid:05d}/{index:04d}.jpg")
                lines.append(f"c{camera}\\{pid:05d}\\{index:04d}.jpg\n")
    Path(root, "filepath.txt").write_text("".join(lines))
    return tree.root


def luperson(root):
    tree = Tree(root)
    for pid in range(5):
        for frame in range(3):
            tree.add(f"{pid:06d}_{frame:07d}_{frame % 2:02d}.jpg")
    return tree.litter()
