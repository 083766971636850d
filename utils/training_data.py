"""The training side of a data set: rows with labels, and batches that can go on in the middle of an epoch."""

import hashlib
import json

import torch

from utils.datasets import labels_of, load_sources
from utils.images import check_images

SINGLE_IMAGE_IDS = ("error", "repeat", "drop")


def open_source(specs, root=None, *, single_image_ids="error", skip_unreadable=False):
    """Training rows of one or several sets, their labels 0..N-1, and the whole of the sets.

    An identity with one image has nothing to be compared with in its batch: `single_image_ids` says what to do.
    """
    name = " + ".join(specs)
    data = load_sources(specs, root, skip_unreadable=skip_unreadable)
    if "train" not in data:
        raise ValueError(f"--source {name} has no train split, only {', '.join(data)}; give a training set")
    train = data["train"]
    if not skip_unreadable:
        train, _ = check_images(train, where=name)
    labels = torch.from_numpy(labels_of(train))
    alone = labels.bincount()[labels] == 1
    if alone.any() and single_image_ids != "repeat":
        if single_image_ids == "error":
            paths = [train["path"][row] for row in alone.nonzero().flatten()[:3].tolist()]
            more = ", ..." if alone.sum() > 3 else ""
            raise ValueError(
                f"{name}: {int(alone.sum())} identities have one image only ({', '.join(paths)}{more}); give more, or "
                "choose --single_image_ids repeat or drop"
            )
        train = train.select((~alone).nonzero().flatten().tolist())
        labels = torch.from_numpy(labels_of(train))
    return train, labels, data


def digest_of(train, labels):
    """Changes with any image's name, label or place."""
    return hashlib.sha256(json.dumps([train["path"][:], labels.tolist()]).encode()).hexdigest()


class RemainingBatches:
    """A batch sampler without the first `done` batches of its epoch, for a loader that lives through all epochs."""

    def __init__(self, sampler):
        self.sampler, self.done = sampler, 0

    def set_epoch(self, epoch, done=0):
        self.sampler.set_epoch(epoch)
        self.done = done

    def __iter__(self):
        for number, batch in enumerate(self.sampler):
            if number >= self.done:
                yield batch

    def __len__(self):
        return len(self.sampler) - self.done

    def steps_of(self, epochs):
        """Batches of the first epochs; their number may differ from one to the next."""
        return sum(sum(1 for _ in self.sampler.global_batches(epoch)) for epoch in range(1, epochs + 1))
