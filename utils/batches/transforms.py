"""From a picture to a tensor: resizing, mirroring, padding, erasing.

Augmentations are drawn from (seed, epoch, place in the epoch), not from the state of a worker or process: the same
seed gives the same batches with any number of workers and processes, and after a resume.
"""

import random

import numpy as np
import torch
from PIL import Image

from utils.launch import leave_interrupts

RESAMPLE = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
HALF = (0.5, 0.5, 0.5)


def to_tensor(image, mean, std):
    """An RGB picture as a float tensor (3, H, W), normalised."""
    mean, std = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)
    return to_bytes(image).float().div_(255.0).sub_(mean).div_(std)


def to_bytes(image):
    """An RGB picture as bytes (3, H, W)."""
    # Channels are moved while values are bytes: a quarter of the memory traffic of floats.
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def resized(image, image_size, resample):
    height, width = image_size
    if image.mode != "RGB":
        image = image.convert("RGB")
    return image if image.size == (width, height) else image.resize((width, height), RESAMPLE[resample])


class TestTransform:
    """Resize and normalise: PIL image -> (3, H, W)."""

    # pytest collects classes whose names start with Test; this is not a test.
    __test__ = False

    def __init__(self, image_size=(256, 128), mean=HALF, std=HALF, resample="bilinear"):
        if resample not in RESAMPLE:
            raise ValueError(f"resample must be one of {', '.join(RESAMPLE)}, got {resample!r}")
        self.image_size, self.mean, self.std, self.resample = tuple(image_size), tuple(mean), tuple(std), resample

    def __call__(self, image, rng=None):
        return to_tensor(resized(image, self.image_size, self.resample), self.mean, self.std)


class TrainTransform:
    """Resize, mirror, pad and crop, normalise, erase: PIL image and `random.Random` -> (3, H, W).

    `erasing_value` is a number, or one for each channel; `after_crop` a change of the cropped picture, such as
    `augmentation.Blur`: (picture, rng) -> picture.
    """

    def __init__(
        self,
        image_size=(256, 128),
        mean=HALF,
        std=HALF,
        resample="bicubic",
        flip=0.5,
        padding=10,
        erasing=0.5,
        erasing_area=(0.02, 0.4),
        erasing_aspect=(0.3, 3.3),
        erasing_value=0.5,
        after_crop=None,
    ):
        if resample not in RESAMPLE:
            raise ValueError(f"resample must be one of {', '.join(RESAMPLE)}, got {resample!r}")
        self.image_size, self.mean, self.std, self.resample = tuple(image_size), tuple(mean), tuple(std), resample
        self.flip, self.padding = flip, padding
        self.erasing, self.erasing_area, self.erasing_aspect = erasing, erasing_area, erasing_aspect
        # The value is filled in after normalisation: with mean and std 0.5, a value of 0.5 is a light grey of 0.75.
        self.erasing_value = torch.as_tensor(erasing_value, dtype=torch.float32).view(-1, 1, 1)
        self.after_crop = after_crop

    def __call__(self, image, rng):
        height, width = self.image_size
        image = resized(image, self.image_size, self.resample)
        if rng.random() < self.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.padding:
            left, top = rng.randint(0, 2 * self.padding), rng.randint(0, 2 * self.padding)
            moved = Image.new("RGB", (width, height))
            moved.paste(image, (self.padding - left, self.padding - top))
            image = moved
        if self.after_crop is not None:
            image = self.after_crop(image, rng)
        tensor = to_tensor(image, self.mean, self.std)
        if rng.random() < self.erasing:
            self.erase(tensor, rng)
        return tensor

    def erase(self, tensor, rng):
        """Fills one rectangle in place."""
        if box := self.rectangle(rng):
            top, left, tall, wide = box
            tensor[:, top : top + tall, left : left + wide] = self.erasing_value

    def rectangle(self, rng):
        """(top, left, height, width), drawn again until it fits; None if a hundred do not."""
        height, width = self.image_size
        for _ in range(100):
            area = rng.uniform(*self.erasing_area) * height * width
            aspect = rng.uniform(*self.erasing_aspect)
            tall, wide = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
            if 0 < tall < height and 0 < wide < width:
                top, left = rng.randint(0, height - tall), rng.randint(0, width - wide)
                return top, left, tall, wide
        return None


train_transform, test_transform = TrainTransform, TestTransform


class ReIDImages(torch.utils.data.Dataset):
    """Rows of a data set as tensors with labels; the index of an item is a number or (number, key of its draw)."""

    def __init__(self, dataset, transform, labels=None):
        self.dataset, self.transform = dataset, transform
        self.labels = dataset["pid"][:] if labels is None else list(labels)
        self.camids = dataset["camid"][:]
        if len(self.labels) != len(dataset):
            raise ValueError(f"{len(self.labels)} labels for {len(dataset)} images")

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, item):
        number, key = item if isinstance(item, tuple) else (item, item)
        image = self.dataset[number]["image"]
        return {
            "images": self.transform(image, random.Random(str(key))),
            "labels": self.labels[number],
            "camids": self.camids[number],
            "indices": number,
        }


class TransformedImages(torch.utils.data.Dataset):
    """Rows of a data set as input for a model; `transform`: PIL image -> (3, height, width)."""

    def __init__(self, dataset, transform):
        self.dataset, self.transform = dataset, transform

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, row):
        return self.transform(self.dataset[row]["image"])


def loader_of(images, sampler, num_workers=0, pin_memory=False, **options):
    """A loader whose processes stay from epoch to epoch."""
    options |= {"num_workers": num_workers, "pin_memory": pin_memory, "persistent_workers": num_workers > 0}
    options["worker_init_fn"] = leave_interrupts
    return torch.utils.data.DataLoader(images, batch_sampler=sampler, **options)
