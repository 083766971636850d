"""Training images with the masks of their parts, mirrored together."""

import random

import torch


class WithMasks(torch.utils.data.Dataset):
    """Items of a training data set, each with `masks` (parts, patches), mirrored where its image is.

    A crop moves an image by less than a patch, and its mask stays.
    """

    def __init__(self, images, masks, grid, flip):
        self.images, self.masks, self.grid, self.flip = images, masks, grid, flip

    def __len__(self):
        return len(self.images)

    def __getitem__(self, item):
        number, key = item if isinstance(item, tuple) else (item, item)
        masks = self.masks[number]
        # The first number that a training transform draws.
        if random.Random(str(key)).random() < self.flip:
            masks = masks.unflatten(1, self.grid).flip(2).flatten(1)
        return self.images[item] | {"masks": masks}


def loader_with_masks(loader, masks, grid, flip):
    """The same batches with masks."""
    images = WithMasks(loader.dataset, masks, tuple(grid), flip)
    return torch.utils.data.DataLoader(
        images,
        batch_sampler=loader.batch_sampler,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        persistent_workers=loader.persistent_workers,
    )
