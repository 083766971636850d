"""Right RGB from every mode, damaged images found and named, images from an lmdb and in other processes."""

import logging
import multiprocessing
import os
import pickle
import sys

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.tables import image_bytes, paint, red
from utils.datasets.images import check_images
from utils.datasets.load import load_reid
from utils.datasets.portable import save


def gradient():
    """(8, 4, 3) bytes, every pixel its own."""
    return (np.arange(8 * 4 * 3, dtype=np.uint8) * 2 + 5).reshape(8, 4, 3)


def grey16(pixels):
    return Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 257)


def palette(pixels):
    image = Image.fromarray(np.arange(32, dtype=np.uint8).reshape(8, 4), "L").convert("P")
    image.putpalette(pixels.reshape(32, 3).tobytes())
    return image


def turned(pixels):
    return Image.fromarray(np.rot90(pixels).copy())


def cmyk(pixels):
    return Image.fromarray(np.dstack([255 - pixels, np.zeros((8, 4), np.uint8)]), "CMYK")


def grey(pixels):
    return np.repeat(pixels[:, :, :1], 3, axis=2)


def bits(pixels):
    return np.repeat((pixels[:, :, :1] > 50) * np.uint8(255), 3, axis=2)


MODES = {
    "rgb.png": (Image.fromarray, lambda pixels: pixels),
    "grey.png": (lambda pixels: Image.fromarray(pixels[:, :, 0].copy()), grey),
    "grey16.png": (grey16, grey),
    "grey16.tif": (grey16, grey),
    "grey32.tif": (lambda pixels: Image.fromarray(pixels[:, :, 0].astype(np.int32)), grey),
    "shares.tif": (lambda pixels: Image.fromarray(pixels[:, :, 0].astype(np.float32) / 255), grey),
    "floats.tif": (lambda pixels: Image.fromarray(pixels[:, :, 0].astype(np.float32)), grey),
    "grey_alpha.png": (lambda pixels: Image.fromarray(pixels[:, :, :2].copy(), "LA"), grey),
    "rgba.png": (lambda pixels: Image.fromarray(np.dstack([pixels, pixels[:, :, 0]])), lambda pixels: pixels),
    "palette.png": (palette, lambda pixels: pixels),
    "bits.png": (lambda pixels: Image.fromarray(pixels[:, :, 0] > 50), bits),
    "cmyk.tif": (cmyk, lambda pixels: pixels),
    "turned.png": (turned, lambda pixels: pixels),
    "turned_grey16.png": (lambda pixels: grey16(np.rot90(pixels)), grey),
    "rgb.bmp": (Image.fromarray, lambda pixels: pixels),
    "rgb.webp": (Image.fromarray, lambda pixels: pixels),
}


def test_pixels_of_every_mode(tmp_path):
    pixels = gradient()
    for name, (make, _) in MODES.items():
        options = {"lossless": True} if name.endswith("webp") else {}
        if name.startswith("turned"):
            exif = Image.Exif()
            # shown after a turn to the right, which undoes np.rot90
            exif[0x0112] = 6
            options["exif"] = exif
        (tmp_path / "own/0001").mkdir(parents=True, exist_ok=True)
        make(pixels).save(tmp_path / "own/0001" / name, **options)
    data = load_reid(tmp_path / "own")
    save(data, tmp_path / "saved")
    plain = datasets.load_from_disk(str(tmp_path / "saved"))
    for source in (
        data["train"],
        load_reid(tmp_path / "saved")["train"],
        plain["train"],
        pickle.loads(pickle.dumps(data))["train"],
    ):
        assert len(source) == len(MODES)
        for row in source:
            want = MODES[os.path.basename(row["path"])][1](pixels)
            np.testing.assert_array_equal(np.asarray(row["image"]), want, err_msg=row["path"])
    assert check_images(data)[1] == []


def test_cmyk_jpeg(tmp_path):
    """JPEG stores CMYK inverted, and loses a little."""
    (tmp_path / "own/1").mkdir(parents=True)
    Image.new("CMYK", (16, 16), (0, 200, 255, 30)).save(tmp_path / "own/1/a.jpg", quality=95)
    red, green, blue = load_reid(tmp_path / "own")["train"][0]["image"].getpixel((8, 8))
    assert abs(red - 225) < 6 and abs(green - 49) < 6 and abs(blue) < 6


@pytest.fixture
def damaged(tmp_path):
    """Twelve noisy images in three formats, of which several are broken; (folder, broken names with reasons)."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 32, 3), dtype=np.uint8)
    for number in range(4):
        for ending in ("jpg", "png", "bmp"):
            file = tmp_path / f"own/1/{number}.{ending}"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noise).save(file)
    broken = {}
    for name, keep in (("0.jpg", 0.5), ("0.png", 0.7), ("0.bmp", 0.9), ("1.jpg", 0.99)):
        file = tmp_path / "own/1" / name
        file.write_bytes(file.read_bytes()[: int(keep * file.stat().st_size)])
        broken[name] = "truncated|trunc|broken|not enough"
    (tmp_path / "own/1/1.png").write_bytes(b"this is no picture")
    broken["1.png"] = "not an image"
    return tmp_path / "own", broken


@pytest.mark.parametrize("decode", [None, True, False])
def test_damaged_images(damaged, decode, caplog):
    folder, broken = damaged
    data = load_reid(folder)
    with pytest.raises(ValueError, match=r"own: 5 of 12 images cannot be read: \S*0.bmp \(.*skip_unreadable"):
        check_images(data, decode=decode, where="own")
    with caplog.at_level(logging.WARNING):
        kept, skipped = check_images(data, decode=decode, skip_unreadable=True)
    assert {os.path.basename(path) for _, path, _ in skipped} == set(broken)
    assert {split for split, _, _ in skipped} == {"train"}
    assert "left out 5 of 12" in caplog.text and all(name in caplog.text for name in broken)
    assert sorted(kept["train"]["path"][:]) == sorted(
        f"1/{n}.{e}" for n in range(4) for e in ("jpg", "png", "bmp") if f"{n}.{e}" not in broken
    )
    assert all(row["image"].size == (32, 64) for row in kept["train"])
    alone, skipped = check_images(data["train"], decode=decode, skip_unreadable=True)
    assert len(alone) == 7 and len(skipped) == 5


def test_images_that_are_empty(damaged):
    folder, _ = damaged
    train = load_reid(folder)["train"]
    with pytest.raises(ValueError, match=r"image \S*own/1/0.jpg cannot be read: "):
        train[train["path"][:].index("1/0.jpg")]
    (folder / "1/3.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"1 of 12 images cannot be read: \S*3.jpg \(empty file\)"):
        load_reid(folder)
    data = load_reid(folder, skip_unreadable=True)
    assert len(data["train"]) == 6
    with pytest.raises(ValueError, match="no readable image is left in train"):
        for file in (folder / "1").iterdir():
            file.write_bytes(b"")
        load_reid(folder, skip_unreadable=True)


def test_damaged_images_inside_a_table(tmp_path):
    good = image_bytes((1, 2, 3))
    rows = {"image": [good, good[:45], b"", good], "pid": [1, 1, 2, 2], "camid": [0, 0, 0, 0]}
    pq.write_table(pa.table(rows), tmp_path / "t.parquet")
    kept, skipped = check_images(load_reid(tmp_path / "t.parquet"), skip_unreadable=True)
    assert kept["train"]["pid"][:] == [1, 2]
    assert [path for _, path, _ in skipped] == ["train/0000001", "train/0000002"]


def test_drawn_images_are_not_checked():
    data = load_reid("synthetic:num_ids=4")
    kept, skipped = check_images(data)
    assert len(kept["train"]) == len(data["train"]) and skipped == []


def test_lmdb(tmp_path, monkeypatch):
    lmdb = pytest.importorskip("lmdb")
    # The second as LUPerson-NL's own writer names it: with the video, without an ending.
    names = ["000001_0000123_00.jpg", "00001_000001_0000124_00", "00002_000002_0000001_01"]
    (tmp_path / "LUPerson-NL").mkdir()
    with (
        lmdb.open(str(tmp_path / "LUPerson-NL/lmdb"), map_size=1 << 20) as environment,
        environment.begin(write=True) as writer,
    ):
        for index, name in enumerate(names):
            writer.put(name.encode(), image_bytes(red(index)))
        writer.put(b"__len__", b"3")
    data = load_reid("luperson", tmp_path)
    assert data["train"]["pid"][:] == [1, 1, 2] and data["train"]["path"][:] == names
    assert data["train"][2]["image"].getpixel((0, 0)) == red(2)
    assert check_images(data)[1] == []
    save(data, tmp_path / "saved")
    assert load_reid(tmp_path / "saved")["train"][1]["image"].getpixel((0, 0)) == red(1)


def test_images_of_luperson_have_no_identities(tmp_path):
    for path in ("us/boston/00000000_0001.jpg", "us/00000012_0003.jpg"):
        paint(tmp_path / "LUPerson" / path)
    data = load_reid("luperson", tmp_path)
    assert data["train"]["pid"][:] == [0, 0] and len(data["train"]["path"]) == 2


def test_lmdb_without_the_package(tmp_path, monkeypatch):
    (tmp_path / "LUPerson/lmdb").mkdir(parents=True)
    (tmp_path / "LUPerson/lmdb/data.mdb").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(ValueError, match="pip install lmdb"):
        load_reid("luperson", tmp_path)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_worker_processes(start, tmp_path):
    """A freshly started worker has imported nothing; drawn and embedded images must come all the same."""
    drawn = load_reid("synthetic:num_ids=2,images_per_id=4")
    save(drawn, tmp_path / "saved")
    for data in (drawn, load_reid(tmp_path / "saved")):
        with multiprocessing.get_context(start).Pool(1) as pool:
            sums = pool.map(pixel_sum, [(data["train"], row) for row in range(3)])
        assert sums == [int(np.asarray(data["train"][row]["image"], dtype=np.int64).sum()) for row in range(3)]


def pixel_sum(task):
    dataset, row = task
    return int(np.asarray(dataset[row]["image"], dtype=np.int64).sum())
