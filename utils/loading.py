"""From a data set to batches: transforms, the P x K sampler, and a data set of tensors.

Every draw of an augmentation belongs to (seed, epoch, place in the epoch), not to a worker or a process: the same seed
gives the same batches with any number of workers and processes, and after a resume.
"""

import random

import numpy as np
import torch
from PIL import Image

RESAMPLE = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
HALF = (0.5, 0.5, 0.5)


def to_tensor(image, mean, std):
    """An RGB picture as a float tensor (3, H, W), normalised."""
    # The planes are sorted out as bytes: four times less to move.
    planes = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    mean, std = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)
    return planes.float().div_(255.0).sub_(mean).div_(std)


def resized(image, image_size, resample):
    height, width = image_size
    if image.mode != "RGB":
        image = image.convert("RGB")
    return image if image.size == (width, height) else image.resize((width, height), RESAMPLE[resample])


class TestTransform:
    """Resize and normalise: PIL image -> (3, H, W)."""

    # pytest collects classes by their name; this is none of its.
    __test__ = False

    def __init__(self, image_size=(256, 128), mean=HALF, std=HALF, resample="bilinear"):
        if resample not in RESAMPLE:
            raise ValueError(f"resample must be one of {', '.join(RESAMPLE)}, got {resample!r}")
        self.image_size, self.mean, self.std, self.resample = tuple(image_size), tuple(mean), tuple(std), resample

    def __call__(self, image, rng=None):
        return to_tensor(resized(image, self.image_size, self.resample), self.mean, self.std)


class TrainTransform:
    """Resize, mirror, pad and crop, normalise, erase: PIL image and `random.Random` -> (3, H, W)."""

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
    ):
        if resample not in RESAMPLE:
            raise ValueError(f"resample must be one of {', '.join(RESAMPLE)}, got {resample!r}")
        self.image_size, self.mean, self.std, self.resample = tuple(image_size), tuple(mean), tuple(std), resample
        self.flip, self.padding = flip, padding
        self.erasing, self.erasing_area, self.erasing_aspect = erasing, erasing_area, erasing_aspect
        # The value stands after normalisation: 0.5 is a light grey of 0.75 for mean and std of a half.
        self.erasing_value = erasing_value

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
        tensor = to_tensor(image, self.mean, self.std)
        if rng.random() < self.erasing:
            self.erase(tensor, rng)
        return tensor

    def erase(self, tensor, rng):
        """Fills one rectangle in place; a shape that does not fit is drawn again."""
        height, width = self.image_size
        for _ in range(100):
            area = rng.uniform(*self.erasing_area) * height * width
            aspect = rng.uniform(*self.erasing_aspect)
            tall, wide = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
            if 0 < tall < height and 0 < wide < width:
                top, left = rng.randint(0, height - tall), rng.randint(0, width - wide)
                tensor[:, top : top + tall, left : left + wide] = self.erasing_value
                return


def train_transform(image_size=(256, 128), mean=HALF, std=HALF, **options):
    return TrainTransform(image_size, mean, std, **options)


def test_transform(image_size=(256, 128), mean=HALF, std=HALF, resample="bilinear"):
    return TestTransform(image_size, mean, std, resample)


test_transform.__test__ = False


class ReIDImages(torch.utils.data.Dataset):
    """Rows of a data set as tensors with labels; an item is asked for as a number, or as (number, key of its draw)."""

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


class IdentitySampler(torch.utils.data.Sampler):
    """Batches of P identities with K images each, one rank's share of every global batch.

    An epoch: each identity's images are shuffled into groups of K (fewer than K: drawn with replacement; a rest of
    less than K is left out this time); a batch is one group of each of P random identities that still have one; the
    epoch ends when fewer than P have. `batch_size` is the global P x K: with more processes each gets its even share,
    in order, of the very batches one process would get. Yields lists of (number, key of the draw).
    """

    def __init__(self, labels, batch_size, images_per_id=4, seed=0, rank=0, num_processes=1):
        numbers = {}
        for number, label in enumerate(labels):
            numbers.setdefault(int(label), []).append(number)
        if images_per_id < 1 or batch_size < 1 or batch_size % images_per_id:
            raise ValueError(
                f"a batch of {batch_size} cannot be split into identities with {images_per_id} images each: make it a "
                f"multiple of {images_per_id}"
            )
        if batch_size % num_processes:
            raise ValueError(f"a batch of {batch_size} cannot be shared evenly by {num_processes} processes")
        self.ids_per_batch = batch_size // images_per_id
        if len(numbers) < self.ids_per_batch:
            raise ValueError(
                f"a batch needs {self.ids_per_batch} identities ({batch_size} images, {images_per_id} of each), "
                f"but there are only {len(numbers)}: use a smaller batch or more images of each"
            )
        self.numbers = [numbers[label] for label in sorted(numbers)]
        self.batch_size, self.images_per_id, self.seed = batch_size, images_per_id, seed
        self.rank, self.num_processes = rank, num_processes
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def global_batches(self, epoch):
        """All batches of an epoch, as lists of numbers."""
        rng = random.Random(f"batches/{self.seed}/{epoch}")
        size = self.images_per_id
        groups = []
        for numbers in self.numbers:
            if len(numbers) < size:
                groups.append([rng.choices(numbers, k=size)])
                continue
            shuffled = rng.sample(numbers, len(numbers))
            groups.append([shuffled[start : start + size] for start in range(0, len(numbers) - size + 1, size)])
        left = [owner for owner, its in enumerate(groups) if its]
        while len(left) >= self.ids_per_batch:
            batch = []
            for owner in rng.sample(left, self.ids_per_batch):
                batch += groups[owner].pop()
            left = [owner for owner in left if groups[owner]]
            yield batch

    def __iter__(self):
        share = self.batch_size // self.num_processes
        mine = slice(self.rank * share, (self.rank + 1) * share)
        for number, batch in enumerate(self.global_batches(self.epoch)):
            keyed = [
                (image, f"{self.seed}/{self.epoch}/{number * self.batch_size + place}")
                for place, image in enumerate(batch)
            ]
            yield keyed[mine]

    def __len__(self):
        """Batches of the current epoch; with identities of different sizes it may differ between epochs."""
        return sum(1 for _ in self.global_batches(self.epoch))


class ShuffleSampler(torch.utils.data.Sampler):
    """Batches of all images in a new order each epoch, one rank's share of every global batch; a rest is left out.

    Yields lists of (number, key of the draw), as `IdentitySampler` does.
    """

    def __init__(self, num_images, batch_size, seed=0, rank=0, num_processes=1):
        if batch_size < 1 or batch_size % num_processes:
            raise ValueError(f"a batch of {batch_size} cannot be shared evenly by {num_processes} processes")
        if num_images < batch_size:
            raise ValueError(f"a batch of {batch_size} images cannot be made of {num_images}: use a smaller batch")
        self.num_images, self.batch_size, self.seed = num_images, batch_size, seed
        self.rank, self.num_processes = rank, num_processes
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def global_batches(self, epoch):
        """All batches of an epoch, as lists of numbers."""
        order = random.Random(f"batches/{self.seed}/{epoch}").sample(range(self.num_images), self.num_images)
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            yield order[start : start + self.batch_size]

    def __iter__(self):
        share = self.batch_size // self.num_processes
        mine = slice(self.rank * share, (self.rank + 1) * share)
        for number, batch in enumerate(self.global_batches(self.epoch)):
            keyed = [
                (image, f"{self.seed}/{self.epoch}/{number * self.batch_size + place}")
                for place, image in enumerate(batch)
            ]
            yield keyed[mine]

    def __len__(self):
        return self.num_images // self.batch_size
