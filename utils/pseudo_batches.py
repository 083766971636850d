"""Batches that follow pseudo labels: P clusters with K images each, beside as many of a labelled source.

An epoch has a fixed number of steps: the images are gone through again, in another order, until they are taken. Rows
are numbers in one data set, the source's first. Every process takes its share of each domain.
"""

import itertools
import random

import torch

from utils.loading import IdentitySampler


class PseudoBatches:
    """A batch sampler; yields lists of (row, key of the draw), this process's share: source, then target.

    `take` the target's labels of an epoch before its batches.
    """

    def __init__(self, batch_size, images_per_id, steps, *, source_labels=(), seed=0, rank=0, num_processes=1):
        self.batch_size, self.images_per_id, self.steps, self.seed = batch_size, images_per_id, steps, seed
        self.share = slice(rank * batch_size // num_processes, (rank + 1) * batch_size // num_processes)
        self.num_source = len(source_labels)
        if batch_size % images_per_id or batch_size % num_processes:
            raise ValueError(
                f"a batch of {batch_size} cannot be split into identities with {images_per_id} images each and shared "
                f"evenly by {num_processes} processes"
            )
        self.source, self.target = None, None
        if self.num_source:
            self.source = IdentitySampler(source_labels, batch_size, images_per_id, f"{seed}/source")
        self.epoch = self.done = 0

    def set_epoch(self, epoch, done=0):
        """`done` batches of the epoch have been taken before."""
        self.epoch, self.done = epoch, done

    def take(self, labels):
        """Labels (N,) of the target's images; those with -1 are left out."""
        rows = (labels >= 0).nonzero().flatten()
        self.target = rows + self.num_source, with_enough(labels[rows], self.batch_size, self.images_per_id)

    def global_batches(self):
        """The rows of every batch of the epoch: target, and before it source where there is one."""
        rows, labels = self.target
        sampler = IdentitySampler(labels.tolist(), self.batch_size, self.images_per_id, f"{self.seed}/target")
        target = ([int(rows[number]) for number in batch] for batch in self.passes(sampler))
        source = self.passes(self.source) if self.source else itertools.repeat([])
        yield from itertools.islice(zip(source, target, strict=False), self.steps)

    def passes(self, sampler):
        for number in itertools.count():
            yield from sampler.global_batches(f"{self.epoch}/{number}")

    def __iter__(self):
        for number, batch in enumerate(self.global_batches()):
            if number < self.done:
                continue
            keyed = []
            for name, rows in zip(("source", "target"), batch, strict=True):
                first = number * self.batch_size
                keys = [(row, f"{self.seed}/{self.epoch}/{name}/{first + place}") for place, row in enumerate(rows)]
                keyed += keys[self.share]
            yield keyed

    def __len__(self):
        return self.steps - self.done


def with_enough(labels, batch_size, images_per_id):
    """Labels of at least P = batch_size / images_per_id groups: where there are fewer clusters, they are cut."""
    wanted = batch_size // images_per_id
    if len(labels.unique()) >= wanted:
        return labels
    order = labels.argsort(stable=True)
    counts = labels.bincount()
    place = torch.empty_like(labels)
    place[order] = torch.arange(len(labels)) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    groups = torch.stack([labels, place // images_per_id], 1).unique(dim=0, return_inverse=True)[1]
    if int(groups.max()) + 1 < wanted:
        raise ValueError(
            f"only {len(labels)} images are in clusters, too few for a batch of {batch_size}: lower "
            "--train_batch_size, or raise --eps so that fewer images are noise"
        )
    return groups


def in_groups(labels, size, seed):
    """Labels whose noise is drawn into random groups of `size`, each with a label of its own after the clusters."""
    noise = (labels < 0).nonzero().flatten().tolist()
    random.Random(f"groups/{seed}").shuffle(noise)
    grouped = labels.clone()
    first = int(labels.max()) + 1
    for place, row in enumerate(noise):
        grouped[row] = first + place // size
    return grouped
