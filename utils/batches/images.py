"""Rows of a data set as tensors, with labels for training or without for evaluation."""

import random

import torch

from utils.batches.transforms import train_transform


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


class TransformedImages(torch.utils.data.Dataset):
    """Rows of a data set as the model's input, by `transform`: PIL image -> (3, height, width)."""

    def __init__(self, dataset, transform):
        self.dataset, self.transform = dataset, transform

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, row):
        return self.transform(self.dataset[row]["image"])


def training_loader(model, dataset, labels, sampler, *, padding, erasing, num_workers=0, pin_memory=False):
    """Augmented batches, sized and normalised for a model, of a sampler that gives keyed rows."""
    transform = train_transform(model.image_size, model.image_mean, model.image_std, padding=padding, erasing=erasing)
    return torch.utils.data.DataLoader(
        ReIDImages(dataset, transform, labels),
        batch_sampler=sampler,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
    )
