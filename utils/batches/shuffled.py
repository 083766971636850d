"""Batches of all images in a new order each epoch."""

import random

from utils.batches.samplers import KeyedBatches


class ShuffleSampler(KeyedBatches):
    """Batches of all images in a new order each epoch, one rank's share of every global batch; no smaller last batch.

    Yields lists of (number, key of the draw), as `IdentitySampler` does.
    """

    def __init__(self, num_images, batch_size, seed=0, rank=0, num_processes=1):
        super().__init__(batch_size, seed, rank, num_processes)
        if num_images < batch_size:
            raise ValueError(f"a batch of {batch_size} images cannot be made of {num_images}: use a smaller batch")
        self.num_images = num_images

    def global_batches(self, epoch):
        """All batches of an epoch, as lists of numbers."""
        order = random.Random(f"batches/{self.seed}/{epoch}").sample(range(self.num_images), self.num_images)
        for start in range(0, self.num_images - self.batch_size + 1, self.batch_size):
            yield order[start : start + self.batch_size]

    def steps_of(self, epochs, first=1):
        return epochs * (self.num_images // self.batch_size)
