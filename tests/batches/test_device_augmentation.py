"""Augmentation of whole batches: equal to torchvision's operations and to the loader's transform, value by value."""

import random

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from utils.batches.augmentation import RandAugmentTransform, as_bytes, drawn_by
from utils.batches.device_augmentation import OPERATIONS, BatchAugmentation, OnDevice
from utils.batches.shuffled import ShuffleSampler
from utils.batches.transforms import ReIDImages, to_bytes
from utils.datasets.load import load_reid

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
SIZE = (64, 32)


def pictures(count, size=SIZE):
    rng = random.Random(7)
    whole = (size[1], size[0])
    small = [Image.frombytes("RGB", (4, 8), rng.randbytes(96)).resize(whole, Image.BICUBIC) for _ in range(count)]
    # Dark, flat, and noise up to both ends.
    return [Image.new("RGB", whole, (9, 9, 9)), Image.frombytes("RGB", whole, rng.randbytes(6144)), *small[2:]]


def batch_of(augment, images):
    drawn = [augment.draw(image, random.Random(f"0/1/{place}")) for place, image in enumerate(images)]
    return {name: torch.stack([one[name] for one in drawn]) for name in drawn[0]}


@pytest.mark.parametrize("magnitude", [0, 9, 30])
def test_operations_are_those_of_torchvision(magnitude):
    """Each in both directions, on a batch with ours and on single images with torchvision's own class."""
    augment = BatchAugmentation(SIZE, MEAN, STD, magnitude=magnitude)
    theirs = v2.RandAugment(2, magnitude, interpolation=v2.InterpolationMode.BILINEAR, fill=as_bytes(MEAN))
    assert list(theirs._AUGMENTATION_SPACE) == list(OPERATIONS)
    pixels = torch.stack([to_bytes(image) for image in pictures(5)])
    for number, (name, is_signed) in enumerate(OPERATIONS.items()):
        values, signed = theirs._AUGMENTATION_SPACE[name]
        assert signed == is_signed
        values = values(31, *SIZE)
        for other_way in range(1 + signed):
            strength = 0.0 if values is None else float(values[magnitude]) * (-1) ** other_way
            changed = augment.operate(pixels, 2 * number + other_way)
            for image, found in zip(pixels, changed, strict=True):
                want = theirs._apply_image_or_video_transform(
                    image, name, strength, interpolation=theirs.interpolation, fill=theirs._fill
                )
                assert torch.equal(found, want), (name, strength)


def test_draws_are_those_of_the_loaders_transform():
    """The same two operations of every image as torchvision draws them after the same seed."""
    augment = BatchAugmentation(SIZE, MEAN, STD, padding=3, erasing=0.5)
    theirs = v2.RandAugment(2, 9, interpolation=v2.InterpolationMode.BILINEAR, fill=as_bytes(MEAN))
    images = pictures(40)
    drawn = batch_of(augment, images)
    pixels = drawn["pixels"]
    for place in range(2):
        pixels = augment.changed(pixels, drawn["draws"][:, place])
    for place, image in enumerate(images):
        with drawn_by(random.Random(f"0/1/{place}")):
            assert torch.equal(pixels[place], theirs(to_bytes(image)))
    assert len(drawn["draws"][:, :2].unique()) > 15


@pytest.mark.parametrize("options", [{"padding": 3, "erasing": 0.7}, {"padding": 0, "erasing": 0.0, "flip": 1.0}])
@pytest.mark.parametrize("size", [SIZE, (50, 40)])
def test_without_randaugment_images_are_equal_to_the_loaders(options, size):
    images = pictures(24, size)
    augment = BatchAugmentation(SIZE, MEAN, STD, num_ops=0, **options)
    plain = RandAugmentTransform(SIZE, MEAN, STD, num_ops=0, **options)
    found = augment(batch_of(augment, images), torch.device("cpu"))
    want = torch.stack([plain(image, random.Random(f"0/1/{place}")) for place, image in enumerate(images)])
    assert torch.equal(found, want)


def test_with_randaugment_most_values_are_near_those_of_the_loader():
    """Pillow, which changes single pictures, and torchvision's tensors round differently, mostly at edges."""
    images = pictures(40)
    augment = BatchAugmentation(SIZE, MEAN, STD, padding=3, erasing=0.5)
    plain = RandAugmentTransform(SIZE, MEAN, STD, padding=3, erasing=0.5)
    found = augment(batch_of(augment, images), torch.device("cpu"))
    want = torch.stack([plain(image, random.Random(f"0/1/{place}")) for place, image in enumerate(images)])
    differences = (found - want).abs() * 255 * torch.tensor(STD).view(3, 1, 1)
    assert differences.median() <= 1 and (differences > 4).float().mean() < 0.05


def test_two_processes_and_a_resume_see_the_images_of_one():
    data = load_reid("synthetic", num_ids=2)["train"]
    augment = BatchAugmentation(SIZE, MEAN, STD, padding=3, erasing=0.5)

    def batches(rank=0, num_processes=1, done=0):
        sampler = ShuffleSampler(len(data), 8, 5, rank, num_processes)
        sampler.set_epoch(2, done)
        loader = DataLoader(ReIDImages(data, augment.draw), batch_sampler=sampler)
        return list(OnDevice(loader, augment, torch.device("cpu")))

    whole, halves = batches(), [batches(rank, 2) for rank in range(2)]
    assert len(whole) == 2
    for number, batch in enumerate(whole):
        parts = [half[number] for half in halves]
        for name in ("images", "labels", "indices"):
            assert torch.equal(batch[name], torch.cat([part[name] for part in parts]))
    (rest,) = batches(done=1)
    assert torch.equal(rest["images"], whole[1]["images"])


def test_nothing_stays_on_another_device():
    """On the meta device tensors have no values, and those of two devices do not mix, as on a GPU."""
    augment = BatchAugmentation(SIZE, MEAN, STD, padding=3, erasing=0.5)
    images = augment(batch_of(augment, pictures(60)), torch.device("meta"))
    assert images.device.type == "meta" and images.shape == (60, 3, *SIZE) and images.dtype == torch.float32
