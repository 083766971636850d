"""Training images with the masks of their parts, mirrored and moved together."""

import random

import torch
import torch.nn.functional as F

from utils.batches.transforms import loader_of


class WithMasks(torch.utils.data.Dataset):
    """Items of a training data set, each with `masks` (parts, patches), which follow their image.

    `transform` is the `TrainTransform` of the images: what it mirrors is mirrored, and what it moves is moved by as
    many whole patches as come nearest. Of patches that come in from the edge no part is seen.
    """

    def __init__(self, images, masks, grid, transform):
        self.images, self.masks, self.grid, self.transform = images, masks, grid, transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, item):
        number, key = item if isinstance(item, tuple) else (item, item)
        masks, most = self.masks[number].unflatten(1, self.grid), self.transform.padding
        # The first numbers that the transform draws.
        draw = random.Random(str(key))
        if draw.random() < self.transform.flip:
            masks = masks.flip(2)
        if most:
            left, top = draw.randint(0, 2 * most), draw.randint(0, 2 * most)
            (height, width), (rows, columns) = self.transform.image_size, self.grid
            right, down = round((most - left) * columns / width), round((most - top) * rows / height)
            masks = F.pad(masks, (right, -right, down, -down))
        return self.images[item] | {"masks": masks.flatten(1)}


def loader_with_masks(loader, masks, grid, transform):
    """The same batches with masks."""
    images, options = WithMasks(loader.dataset, masks, tuple(grid), transform), {"collate_fn": loader.collate_fn}
    return loader_of(images, loader.batch_sampler, loader.num_workers, loader.pin_memory, **options)
