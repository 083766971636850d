"""Batch samplers: P identities with K images each; `shuffled.py` has all images in a new order."""

import random

import torch


class KeyedBatches(torch.utils.data.Sampler):
    """Batches as lists of (number, key of the draw): one rank's equal share of every global batch, in order.

    `set_epoch(epoch, done)` skips the first `done` batches of the epoch, for a run that resumes in it. Subclasses
    have `global_batches(epoch)`, the numbers of every batch.
    """

    def __init__(self, batch_size, seed, rank, num_processes):
        if batch_size < 1 or batch_size % num_processes:
            raise ValueError(f"a batch of {batch_size} cannot be shared evenly by {num_processes} processes")
        self.batch_size, self.seed = batch_size, seed
        share = batch_size // num_processes
        self.mine = slice(rank * share, (rank + 1) * share)
        self.epoch = self.done = 0

    def set_epoch(self, epoch, done=0):
        self.epoch, self.done = epoch, done

    def __iter__(self):
        for number, batch in enumerate(self.global_batches(self.epoch)):
            if number >= self.done:
                first = number * self.batch_size
                yield [(image, f"{self.seed}/{self.epoch}/{first + place}") for place, image in enumerate(batch)][
                    self.mine
                ]

    def __len__(self):
        """Remaining batches of the epoch. With identities of different sizes the number differs between epochs."""
        return self.steps_of(1, first=self.epoch) - self.done

    def steps_of(self, epochs, first=1):
        """Number of batches in `epochs` epochs, starting with epoch `first`."""
        return sum(1 for epoch in range(first, first + epochs) for _ in self.global_batches(epoch))


class IdentitySampler(KeyedBatches):
    """Batches of P identities with K images each, one rank's share of every global batch.

    In an epoch, each identity's images are shuffled into groups of K. An identity with fewer than K images gives one
    group, drawn with replacement; a last group of fewer than K is left out of this epoch. A batch has one group of
    each of P random identities that still have groups; the epoch ends when fewer than P have. `batch_size` is the
    global P x K: with several processes, each gets its equal share, in order, of the batches that a single process
    would get. Yields lists of (number, key of the draw).
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
        super().__init__(batch_size, seed, rank, num_processes)
        self.ids_per_batch, self.images_per_id = batch_size // images_per_id, images_per_id
        if len(numbers) < self.ids_per_batch:
            raise ValueError(
                f"a batch needs {self.ids_per_batch} identities ({batch_size} images, {images_per_id} of each), "
                f"but there are only {len(numbers)}: lower --train_batch_size, to at most "
                f"{len(numbers) * images_per_id} images in all processes and accumulated batches together, or raise "
                "--images_per_id"
            )
        self.numbers = [numbers[label] for label in sorted(numbers)]

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
        owners = [owner for owner, owner_groups in enumerate(groups) if owner_groups]
        while len(owners) >= self.ids_per_batch:
            batch = []
            for owner in rng.sample(owners, self.ids_per_batch):
                batch += groups[owner].pop()
            owners = [owner for owner in owners if groups[owner]]
            yield batch
