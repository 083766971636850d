"""The training side of a data set: identities with one image, labels, batches that resume within an epoch."""

import math

import pytest
import torch
from torch.utils.data import DataLoader

from tests.tables import paint, red, write_table
from utils.batches import augmentation
from utils.batches.samplers import IdentitySampler
from utils.batches.transforms import ReIDImages
from utils.batches.transforms import test_transform as make_transform
from utils.datasets.load import digest_of, labels_of, load_reid, open_source

# Identities 3 and 8 have one image each.
PIDS = [7, 7, 3, 5, 5, 5, 8]


@pytest.fixture
def own(tmp_path):
    rows = [("train", pid, number % 2, f"{number}.png") for number, pid in enumerate(PIDS)]
    for number, (*_, name) in enumerate(rows):
        paint(tmp_path / name, red(number))
    write_table(tmp_path / "metadata.csv", rows)
    return tmp_path


def test_identities_with_one_image_stop_a_training(own):
    with pytest.raises(ValueError, match=r"2 identities have one image only \(2\.png, 6\.png\); .* repeat or drop"):
        open_source([str(own)])


def test_the_error_shows_three_of_many(tmp_path):
    for number in range(5):
        paint(tmp_path / f"{number}.png", red(number))
    write_table(tmp_path / "metadata.csv", [("train", number, 0, f"{number}.png") for number in range(5)])
    with pytest.raises(ValueError, match=r"5 identities .*\(0\.png, 1\.png, 2\.png, \.\.\.\)"):
        open_source([str(tmp_path)])


def test_identities_with_one_image_repeat_it(own):
    train, labels, _ = open_source([str(own)], single_image_ids="repeat")
    assert train["pid"][:] == PIDS and labels.tolist() == [2, 2, 0, 1, 1, 1, 3] and labels.dtype == torch.int64
    batches = IdentitySampler(labels.tolist(), 8, 2).global_batches(1)
    assert all(batch.count(2) in (0, 2) and batch.count(6) in (0, 2) for batch in batches)


def test_identities_with_one_image_are_left_out(own):
    train, labels, data = open_source([str(own)], single_image_ids="drop")
    assert train["path"][:] == ["0.png", "1.png", "3.png", "4.png", "5.png"]
    assert labels.tolist() == [1, 1, 0, 0, 0]
    # The whole of the set stays as it is.
    assert len(data["train"]) == len(PIDS)
    assert [image.getpixel((0, 0)) for image in train["image"]] == [red(number) for number in (0, 1, 3, 4, 5)]


@pytest.mark.parametrize("single_image_ids", ["error", "repeat", "drop"])
def test_a_set_without_such_identities_is_the_same_under_all_choices(single_image_ids):
    train, labels, data = open_source(["synthetic:num_ids=3"], single_image_ids=single_image_ids)
    assert train["path"][:] == data["train"]["path"][:] and labels.tolist() == labels_of(train).tolist()
    assert sorted(set(labels.tolist())) == [0, 1, 2] and {"train", "query", "gallery"} == set(data)


def test_labels_of_several_sets_follow_each_other():
    train, labels, _ = open_source(["synthetic:domain=a,num_ids=3", "synthetic:domain=c,num_ids=2"])
    by_domain = {}
    for domain, label in zip(train["domain"], labels.tolist(), strict=True):
        by_domain.setdefault(domain, set()).add(label)
    assert by_domain == {"synthetic-a": {0, 1, 2}, "synthetic-c": {3, 4}}


def test_a_source_without_training_images_is_refused(tmp_path):
    for split, camid in (("query", 0), ("gallery", 1)):
        paint(tmp_path / split / "a.png")
        write_table(tmp_path / split / "metadata.csv", [(split, 1, camid, "a.png")])
    with pytest.raises(ValueError, match=f"--source {tmp_path} has no train split, only query, gallery"):
        open_source([str(tmp_path)])


def test_a_damaged_training_image_is_found_first(own):
    (own / "4.png").write_bytes((own / "4.png").read_bytes()[:40])
    with pytest.raises(ValueError, match=r"1 of 7 images cannot be read: .*4\.png"):
        open_source([str(own)], single_image_ids="drop")
    train, _, _ = open_source([str(own)], single_image_ids="drop", skip_unreadable=True)
    assert train["path"][:] == ["0.png", "1.png", "3.png", "5.png"]


def test_the_digest_changes_with_names_labels_and_places():
    train = load_reid("synthetic", domain="a", num_ids=3)["train"]
    labels = torch.from_numpy(labels_of(train))
    digest = digest_of(train, labels)
    assert (
        digest == digest_of(load_reid("synthetic", domain="a", num_ids=3)["train"], labels.clone())
        and len(digest) == 64
    )
    order = [1, 0, *range(2, len(train))]
    other = labels.clone()
    other[0] = 2
    changed = {
        digest_of(train.select(order), labels),
        digest_of(train, other),
        digest_of(train.select(range(len(train) - 1)), labels[:-1]),
        digest_of(load_reid("synthetic", domain="c", num_ids=3)["train"], labels),
    }
    assert len(changed) == 4 and digest not in changed


def sampler_of(**options):
    labels = [label for label, size in enumerate([5, 24, 20, 4, 4, 7, 12, 3, 30, 8]) for _ in range(size)]
    return IdentitySampler(labels, batch_size=12, images_per_id=4, seed=3, **options)


@pytest.mark.parametrize("rank, num_processes", [(0, 1), (1, 3)])
def test_the_remaining_batches_are_exactly_the_rest(rank, num_processes):
    plain = sampler_of(rank=rank, num_processes=num_processes)
    remaining = sampler_of(rank=rank, num_processes=num_processes)
    lengths = []
    for epoch in (1, 2, 5):
        plain.set_epoch(epoch)
        whole = list(plain)
        for done in range(len(whole) + 1):
            remaining.set_epoch(epoch, done)
            assert list(remaining) == whole[done:] and len(remaining) == len(whole) - done
        remaining.set_epoch(epoch)
        assert list(remaining) == whole
        lengths.append(len(whole))
    assert min(lengths) > 2


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_that_lives_through_all_epochs_goes_on_in_the_middle(workers):
    rows = load_reid("synthetic", domain="a", num_ids=6, images_per_id=4)["train"]
    labels = labels_of(rows).tolist()
    remaining = IdentitySampler(labels, 8, 4, seed=1)
    images = ReIDImages(rows, make_transform((16, 8)), labels)
    loader = DataLoader(images, batch_sampler=remaining, num_workers=workers, persistent_workers=workers > 0)
    for epoch, done in ((1, 0), (1, 2), (2, 1)):
        plain = IdentitySampler(labels, 8, 4, seed=1)
        plain.set_epoch(epoch)
        remaining.set_epoch(epoch, done)
        want = [[number for number, _ in batch] for batch in plain][done:]
        assert [batch["indices"].tolist() for batch in loader] == want and want


def test_steps_of_epochs_of_different_length():
    remaining = sampler_of()
    counted = []
    for epoch in range(1, 7):
        remaining.set_epoch(epoch)
        counted.append(len(list(remaining)))
    assert len(set(counted)) > 1
    assert [remaining.steps_of(epochs) for epochs in (0, 1, 3, 6)] == [0, counted[0], sum(counted[:3]), sum(counted)]
    # Counting neither moves the epoch nor the place in it.
    remaining.set_epoch(2, done=1)
    remaining.steps_of(6)
    assert len(list(remaining)) == counted[1] - 1


def test_another_place_replaces_margins_and_keeps_the_middle(monkeypatch):
    """Image i has the value i everywhere, so that each pixel says whose it is."""
    monkeypatch.setattr(augmentation, "other_light", lambda images, generator: images)
    count, height, width = 40, 50, 25
    images = torch.arange(count).float().view(-1, 1, 1, 1).expand(-1, 3, height, width)
    moved = augmentation.other_place(images, torch.Generator().manual_seed(0))
    assert moved.shape == images.shape
    is_own = moved == images
    side, top, bottom = (
        math.ceil(share * size)
        for share, size in ((augmentation.SIDE, width), (augmentation.TOP, height), (augmentation.BOTTOM, height))
    )
    assert is_own[:, :, top : height - bottom, side : width - side].all()
    changed = ~is_own.flatten(1).all(1)
    assert 0.4 * count < changed.sum() < 0.8 * count
    for image, own in zip(moved, is_own, strict=True):
        # One other image, around a rectangle.
        assert len(image[~own].unique()) <= 1
        across, down = own[0].any(0), own[0].any(1)
        assert own.equal((down[:, None] & across[None]).expand_as(own))
    left, right = (~is_own[changed])[:, 0, height // 2, : width // 2], (~is_own[changed])[:, 0, height // 2, -side:]
    assert left.any() and right.any()
