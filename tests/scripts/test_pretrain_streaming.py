"""Pre-training on images that are read as they are needed: which come when, and whole runs."""

import functools
import json
from itertools import pairwise
from pathlib import Path
from statistics import median

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import pretrain_backbone
from tests.runs import run
from utils.batches.streaming import StreamedImages, StreamLoader, light, load, open_stream
from utils.datasets.load import load_reid
from utils.datasets.portable import embedded

train = functools.partial(run, pretrain_backbone)


@pytest.fixture(scope="session")
def parquet(tmp_path_factory):
    """24 images of 6 people in four files, as `filter_generated.py` and `push` write them."""
    folder = tmp_path_factory.mktemp("parquet")
    train = load_reid("synthetic:domain=a,num_ids=6,images_per_id=4")["train"]
    stored = embedded({"train": train}, folder / "read")["train"]
    (folder / "set" / "data").mkdir(parents=True)
    for number in range(4):
        file = folder / "set" / "data" / f"train-{number:05d}-of-00004.parquet"
        stored.shard(4, number, contiguous=True).to_parquet(file)
    return folder / "set"


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """The same as files beside a table, as `train_dreambooth_reid.py` writes them."""
    folder = tmp_path_factory.mktemp("files")
    rows = []
    for row in load_reid("synthetic:domain=a,num_ids=6,images_per_id=4")["train"]:
        name = f"images/{Path(row['path']).name}"
        (folder / "images").mkdir(exist_ok=True)
        row["image"].save(folder / name)
        rows.append({"file_name": name, "path": name, "pid": row["pid"], "domain": row["domain"]})
    pq.write_table(pa.Table.from_pylist(rows), folder / "metadata.parquet")
    return folder


opened = functools.cache(open_stream)


def batches(folder, *, epoch=1, done=0, steps=6, batch_size=4, workers=0, share=(0, 1), **more):
    rows, stream = opened(folder)
    images = StreamedImages(
        stream, rows, rows["pid"], lambda picture, rng: torch.rand(1), batch_size=batch_size, share=share, **more
    )
    loader = StreamLoader(images, steps, num_workers=workers)
    loader.set_epoch(epoch, done)
    return [batch["indices"].tolist() for batch in loader]


@pytest.mark.parametrize("kind", ["parquet", "files"])
def test_an_epoch_has_every_image_once(kind, request):
    folder = request.getfixturevalue(kind)
    first, second = batches(folder, epoch=1), batches(folder, epoch=2)
    for found in (first, second):
        assert sorted(sum(found, [])) == list(range(24))
    assert first != second and first == batches(folder, epoch=1) and first != batches(folder, epoch=1, seed=1)
    assert batches(folder, epoch=1, done=4) == first[4:]


def test_a_buffer_mixes_a_set_that_is_sorted_by_identity(parquet, tmp_path, monkeypatch):
    # Neighbours in the set are one identity's.
    apart = {
        size: [
            abs(left - right) for batch in batches(parquet, buffer=size, steps=5) for left, right in pairwise(batch)
        ]
        for size in (1, 24)
    }
    assert median(apart[1]) == 1 and median(apart[24]) > 3
    seen, plain = [], pretrain_backbone.StreamedImages
    monkeypatch.setattr(pretrain_backbone, "StreamedImages", lambda *a, **more: seen.append(more) or plain(*a, **more))
    few = ["--resolution", "64", "32", "--train_batch_size", "4", "--max_train_steps", "1", "--output_dir", tmp_path]
    train("--source", parquet, "--streaming", "--streaming_buffer", "7", *few)
    assert seen[0]["buffer"] == 7 and pretrain_backbone.parse_args([]).streaming_buffer == 10_000


def test_processes_and_workers_share_the_files(parquet):
    shares = [sum(batches(parquet, share=(rank, 2), batch_size=2), []) for rank in (0, 1)]
    assert sorted(shares[0] + shares[1]) == list(range(24))
    alone = batches(parquet, workers=2)
    assert sorted(sum(alone, [])) == list(range(24))
    assert batches(parquet, workers=2, done=3) == alone[3:]
    # More parts than files: rows are dealt out instead.
    many = [sum(batches(parquet, share=(rank, 6), batch_size=1, steps=4), []) for rank in range(6)]
    assert sorted(sum(many, [])) == list(range(24))


def test_a_part_that_is_through_begins_anew(parquet):
    found = sum(batches(parquet, steps=12), [])
    assert sorted(found) == sorted(2 * list(range(24))) and found[:24] != found[24:]


def test_only_the_rows_that_are_chosen_come(parquet):
    rows, stream = opened(parquet)
    chosen = rows.select([3, 8, 20])
    images = StreamedImages(stream, chosen, [7, 8, 9], lambda picture, rng: torch.rand(1), batch_size=3)
    loader = StreamLoader(images, 2)
    loader.set_epoch(1)
    for batch in loader:
        assert sorted(zip(batch["indices"].tolist(), batch["labels"].tolist(), strict=True)) == [
            (0, 7),
            (1, 8),
            (2, 9),
        ]


def test_images_and_labels_belong_together(parquet):
    """Against the same set opened whole."""
    whole = load_reid(str(parquet))["train"]
    rows, stream = opened(parquet)
    pictures = {}

    def keep(picture, rng):
        pictures[len(pictures)] = picture
        return torch.zeros(1)

    images = StreamedImages(stream, rows, rows["pid"], keep, batch_size=24)
    (batch,) = StreamLoader(images, 1)
    wanted = {path: row for row, path in enumerate(whole["path"])}
    for place, (number, label) in enumerate(zip(batch["indices"].tolist(), batch["labels"].tolist(), strict=True)):
        row = whole[wanted[rows[number]["path"]]]
        assert row["pid"] == label and row["image"].tobytes() == pictures[place].tobytes()


def test_labels_are_read_without_the_images(parquet):
    assert set(next(iter(light(parquet, load(parquet))))) == {"pid", "domain", "path"}


SMALL = [
    *("--streaming", "--resolution", "64", "32", "--train_batch_size", "8", "--num_train_epochs", "2"),
    *("--mixup", "0.8", "--checkpointing_steps", "9"),
]


def test_a_streamed_training_goes_on_to_the_same_numbers(parquet, tmp_path):
    common = [*SMALL, "--source", parquet, "--image_fraction", "0.8", "--augment_on", "device"]
    train(*common, "--output_dir", tmp_path / "whole")
    train(*common, "--output_dir", tmp_path / "cut", "--max_train_steps", "1")
    train(*common, "--output_dir", tmp_path / "cut", "--resume_from_checkpoint", "latest")
    logs = [(tmp_path / name / "log.jsonl").read_text() for name in ("cut", "whole")]
    # 19 images of 24 make two batches an epoch.
    assert logs[0] == logs[1] and logs[0].count("\n") == 4
    assert (tmp_path / "cut" / "backbone" / "model.safetensors").is_file()
    with pytest.raises(ValueError, match="dataloader_num_workers was 0, is 1"):
        train(
            *common,
            "--output_dir",
            tmp_path / "cut",
            "--resume_from_checkpoint",
            "latest",
            "--dataloader_num_workers",
            "1",
        )


def test_crops_of_a_stream(files, tmp_path):
    dino = ["--objective", "dino", "--prototypes", "16", "--head_width", "16", "--local_crops", "1", "--mixup", "0"]
    train(*SMALL, *dino, "--source", files, "--max_train_steps", "1", "--output_dir", tmp_path)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 1
    assert json.loads((tmp_path / "args.json").read_text())["arguments"]["streaming"] is True


def test_what_cannot_be_streamed(parquet, tmp_path):
    with pytest.raises(ValueError, match="cannot be streamed"):
        open_stream(tmp_path / "absent")
    table = pq.read_table(next((parquet / "data").iterdir()))
    for name, change, words in (
        ("nameless", table.drop_columns(["path"]), "needs a column 'path'"),
        ("text", table.set_column(1, "pid", pa.array(["x"] * len(table))), "must hold integers"),
        ("hole", table.set_column(1, "pid", pa.array([0, None] + [0] * (len(table) - 2))), "from 0 on, it has None"),
        ("unknown", table.set_column(1, "pid", pa.array([-1] * len(table))), "from 0 on, it has -1"),
        ("no_domain", table.set_column(3, "domain", pa.array(["x"] + [None] * (len(table) - 1))), "'domain' is empty"),
        ("twice", pa.concat_tables([table, table]), "lists a path twice"),
    ):
        (tmp_path / name).mkdir()
        pq.write_table(change, tmp_path / name / "train.parquet")
        with pytest.raises(ValueError, match=words):
            open_stream(tmp_path / name)
    held = [{"bytes": b"damaged", "path": None}] * len(table)
    (tmp_path / "damaged").mkdir()
    pq.write_table(table.set_column(0, "image", pa.array(held)), tmp_path / "damaged" / "train.parquet")
    with pytest.raises(ValueError, match=r"image synthetic-a/s0/\S+.png cannot be read: not an image"):
        batches(tmp_path / "damaged")
