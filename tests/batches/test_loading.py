"""Transforms, the P x K sampler and the data set of tensors."""

import collections
import json
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from benchmarks.speed import loading as benchmark
from tests.runs import launch, places
from utils.batches.samplers import IdentitySampler
from utils.batches.transforms import (
    ReIDImages,
    TestTransform,
    TrainTransform,
    test_transform,
    to_tensor,
    train_transform,
)
from utils.datasets.load import load_reid


def picture(height=128, width=64, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def labels_of(sizes):
    return [label for label, size in enumerate(sizes) for _ in range(size)]


@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
def test_test_transform_is_resize_and_normalise(resample):
    image = picture(90, 41)
    got = test_transform((256, 128), mean=(0.1, 0.5, 0.9), std=(0.2, 0.5, 0.7), resample=resample)(image)
    modes = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    want = np.asarray(image.resize((128, 256), modes[resample]), dtype=np.float64) / 255
    want = (want - (0.1, 0.5, 0.9)) / (0.2, 0.5, 0.7)
    assert got.shape == (3, 256, 128) and got.dtype == torch.float32
    np.testing.assert_allclose(got.permute(1, 2, 0), want, atol=1e-5)


def test_tensors_have_the_very_bits_of_the_formula():
    image, mean, std = picture(), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32)).permute(2, 0, 1) / 255.0
    want = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    got = to_tensor(image, mean, std)
    assert torch.equal(got, want) and got.is_contiguous()


def test_grey_pictures_become_rgb():
    got = TestTransform((128, 64))(picture().convert("L"))
    assert torch.equal(got[0], got[1]) and torch.equal(got[1], got[2])


def test_unknown_resampling_is_refused():
    for transform in (TestTransform, TrainTransform):
        with pytest.raises(ValueError, match="bilinear, bicubic"):
            transform(resample="nearest")


def test_train_transform_without_chance_is_the_test_transform():
    image = picture(200, 70)
    plain = TrainTransform((128, 64), flip=0.0, padding=0, erasing=0.0)(image, random.Random(0))
    assert torch.equal(plain, TestTransform((128, 64), resample="bicubic")(image))


def test_mirror_half_of_the_time():
    image = picture(16, 8)
    plain = TestTransform((16, 8))(image)
    transform = TrainTransform((16, 8), padding=0, erasing=0.0)
    mirrored = 0
    for seed in range(400):
        got = transform(image, random.Random(seed))
        assert torch.equal(got, plain) or torch.equal(got, plain.flip(-1))
        mirrored += not torch.equal(got, plain)
    assert 160 < mirrored < 240


def test_crop_moves_at_most_the_padding_and_fills_with_black():
    image = Image.new("RGB", (64, 128), (255, 255, 255))
    transform = TrainTransform((128, 64), flip=0.0, erasing=0.0)
    seen = set()
    for seed in range(300):
        got = transform(image, random.Random(seed))
        white = (got[0] == 1).nonzero()
        top, left = white.min(0).values.tolist()
        bottom, right = (white.max(0).values + 1).tolist()
        assert (got[:, top:bottom, left:right] == 1).all()
        assert int((got[0] == -1).sum()) == 128 * 64 - (bottom - top) * (right - left)
        seen.add((top if top else bottom - 128, left if left else right - 64))
    down, across = zip(*seen, strict=True)
    assert (min(down), max(down), min(across), max(across)) == (-10, 10, -10, 10)


def test_erasing_follows_its_area_aspect_value_and_chance():
    transform = TrainTransform((256, 128), flip=0.0, padding=0)
    image = Image.new("RGB", (128, 256))
    erased, areas, aspects = 0, [], []
    for seed in range(600):
        got = transform(image, random.Random(seed))
        hit = (got[0] == 0.5).nonzero()
        if not len(hit):
            assert (got == -1).all()
            continue
        erased += 1
        tall, wide = (hit.max(0).values - hit.min(0).values + 1).tolist()
        assert len(hit) == tall * wide and ((got == 0.5) | (got == -1)).all()
        areas.append(tall * wide / (256 * 128))
        aspects.append(tall / wide)
    assert 250 < erased < 350
    assert 0.018 < min(areas) < 0.05 and 0.33 < max(areas) < 0.405
    assert 0.28 < min(aspects) < 0.45 and 2.8 < max(aspects) < 3.4


def test_same_key_same_tensor_other_key_other_tensor():
    rows = load_reid("synthetic", domain="a", num_ids=2)["train"]
    images = ReIDImages(rows, train_transform((128, 64)))
    assert torch.equal(images[3, "0/1/7"]["images"], images[3, "0/1/7"]["images"])
    assert not torch.equal(images[3, "0/1/7"]["images"], images[3, "0/2/7"]["images"])
    assert images[3]["labels"] == rows["pid"][3] and images[3]["indices"] == 3


def test_a_freshly_started_worker_reads_drawn_pictures():
    images = ReIDImages(load_reid("synthetic")["query"].select(range(3)), test_transform((32, 16)))
    loader = DataLoader(images, batch_size=3, num_workers=1, multiprocessing_context="spawn")
    assert torch.equal(next(iter(loader))["images"], torch.stack([images[row]["images"] for row in range(3)]))


def test_labels_must_fit_the_images():
    with pytest.raises(ValueError, match="3 labels for 16 images"):
        ReIDImages(load_reid("synthetic", domain="a", num_ids=2)["train"], test_transform(), labels=[0, 1, 2])


def test_an_epoch_follows_its_definition():
    sizes = [1, 3, 4, 9, 10, 12, 5, 4]
    labels = labels_of(sizes)
    sampler = IdentitySampler(labels, batch_size=12, images_per_id=4, seed=5)
    used = collections.Counter()
    batches = list(sampler)
    for batch in batches:
        numbers = [number for number, _ in batch]
        owners = [labels[number] for number in numbers]
        groups = [owners[start : start + 4] for start in range(0, 12, 4)]
        assert all(len(set(group)) == 1 for group in groups) and len({group[0] for group in groups}) == 3
        for start in range(0, 12, 4):
            used[owners[start]] += 1
            if sizes[owners[start]] >= 4:
                assert len(set(numbers[start : start + 4])) == 4
    groups_of = {label: max(1, size // 4) for label, size in enumerate(sizes)}
    assert all(used[label] <= groups_of[label] for label in used)
    left = sum(groups_of[label] > used[label] for label in groups_of)
    assert left < 3 and len(batches) == len(sampler)
    keys = [key for batch in batches for _, key in batch]
    assert len(set(keys)) == len(keys)


def test_no_image_twice_in_an_epoch_and_other_epochs_differ():
    labels = labels_of([8] * 16)
    sampler = IdentitySampler(labels, batch_size=16, seed=1)
    first = [number for batch in sampler for number, _ in batch]
    assert len(first) == len(set(first))
    sampler.set_epoch(1)
    second = [number for batch in sampler for number, _ in batch]
    assert first != second
    sampler.set_epoch(0)
    assert first == [number for batch in sampler for number, _ in batch]


@pytest.mark.parametrize("num_processes", [2, 3, 4])
def test_ranks_share_the_global_batches(num_processes):
    labels = labels_of([5, 8, 9, 4, 4, 7, 12, 3, 8])
    alone = list(IdentitySampler(labels, batch_size=24, seed=3))
    shares = [
        list(IdentitySampler(labels, 24, seed=3, rank=rank, num_processes=num_processes))
        for rank in range(num_processes)
    ]
    together = [sum(parts, []) for parts in zip(*shares, strict=True)]
    assert alone == together and alone


def test_impossible_batches_are_refused():
    labels = labels_of([4] * 6)
    with pytest.raises(ValueError, match="needs 8 identities .* only 6"):
        IdentitySampler(labels, batch_size=32)
    with pytest.raises(ValueError, match="cannot be split"):
        IdentitySampler(labels, batch_size=10)
    with pytest.raises(ValueError, match="evenly by 3"):
        IdentitySampler(labels, batch_size=8, num_processes=3)


TWO_RANKS = """
import hashlib, sys
import torch.distributed as dist
from utils.datasets.load import load_reid
from utils.batches import IdentitySampler, ReIDImages, train_transform
from torch.utils.data import DataLoader

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
rows = load_reid("synthetic", domain="a", num_ids=8)["train"]
sampler = IdentitySampler(rows["pid"][:], 16, seed=2, rank=rank, num_processes=world)
loader = DataLoader(ReIDImages(rows, train_transform((64, 32))), batch_sampler=sampler, num_workers=world - 1)
mine = [hashlib.sha256(image.numpy().tobytes()).hexdigest() for batch in loader for image in batch["images"]]
shares = [None] * world
dist.all_gather_object(shares, mine)
if rank == 0:
    step = 16 // world
    for start in range(0, len(mine), step):
        for share in shares:
            print("\\n".join(share[start : start + step]))
dist.destroy_process_group()
"""


def test_two_real_processes_get_the_pixels_of_one(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(TWO_RANKS)
    (alone,) = places(1)
    printed = launch(script, **alone).stdout, launch(script, processes=2).stdout
    one, two = ([line for line in text.splitlines() if len(line) == 64] for text in printed)
    assert len(one) >= 32 and one == two


@pytest.mark.slow
def test_throughput_is_measured(tmp_path, capsys):
    benchmark.main(["--num_ids", "64", "--rounds", "1", "--json", str(tmp_path / "loading.json")])
    rows = json.loads((tmp_path / "loading.json").read_text())["raw"]["rows"]
    assert len(rows) == 4 and all(row["images_a_second"] > 20 for row in rows)
    assert all(row["source"] in capsys.readouterr().out for row in rows[:1])
    with pytest.raises(SystemExit):
        benchmark.main(["--rounds", "0"])
