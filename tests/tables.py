"""A tiny set of one's own: six images, each of its own red, and the tables that describe them."""

import csv
import json
from io import BytesIO

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

COLUMNS = ["image", "pid", "camid", "domain", "path"]
# (split, pid, camid, file)
ROWS = [
    ("train", 7, 0, "train/a.png"),
    ("train", 7, 2, "train/b.png"),
    ("train", 3, 0, "train/c.png"),
    ("query", 11, 0, "query/d.png"),
    ("gallery", 11, 1, "gallery/e.png"),
    ("gallery", 12, 1, "gallery/f.png"),
]


def paint(path, colour=(200, 30, 60), size=(4, 8), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)
    return path


def contents(data):
    return {
        split: list(zip(*(part[key][:] for key in ("pid", "camid", "path")), strict=True))
        for split, part in data.items()
    }


def expected(rows=ROWS):
    out = {}
    for split, pid, camid, path in rows:
        out.setdefault(split, []).append((pid, camid, path))
    return out


def image_bytes(colour):
    buffer = BytesIO()
    Image.new("RGB", (4, 8), colour).save(buffer, format="PNG")
    return buffer.getvalue()


def red(index):
    return (20 * index, 0, 0)


def write_table(path, rows, file_column="file_name", **renamed):
    """metadata.csv, .jsonl or .parquet of `rows`."""
    pid, camid = renamed.get("pid", "pid"), renamed.get("camid", "camid")
    records = [{file_column: file, pid: number, camid: camera} for _, number, camera, file in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(records[0]))
            writer.writeheader()
            writer.writerows(records)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        pq.write_table(pa.Table.from_pylist(records), path)


def write_images(folder):
    for index, (_, _, _, path) in enumerate(ROWS):
        paint(folder / path, red(index))
    return folder
