"""Batches by pseudo label: P clusters with K images each, and the same number of images of a labelled source."""

import copy
import itertools
import random

from utils.launch import gather_with_gradient


class PseudoBatches:
    """A batch sampler; yields lists of (row, key of the draw), this process's share: source, then target.

    `camids`: the cameras of all rows, source and target. Before an epoch's batches, `take` sets the target's labels.
    `draw(rng, rows, size, camids)` draws the images of a cluster; those of the source are always drawn by
    `of_other_cameras`.
    """

    def __init__(
        self,
        batch_size,
        images_per_id,
        steps,
        camids,
        *,
        source_labels=(),
        draw=None,
        seed=0,
        rank=0,
        num_processes=1,
    ):
        self.draw = draw or of_other_cameras
        self.batch_size, self.images_per_id, self.steps, self.seed = batch_size, images_per_id, steps, seed
        self.camids = camids
        self.share = slice(rank * batch_size // num_processes, (rank + 1) * batch_size // num_processes)
        self.num_source = len(source_labels)
        if batch_size % images_per_id or batch_size % num_processes:
            raise ValueError(
                f"a batch of {batch_size} cannot be split into identities with {images_per_id} images each and shared "
                f"evenly by {num_processes} processes"
            )
        self.source, self.target = rows_of(source_labels), None
        if self.source and len(self.source) < batch_size // images_per_id:
            raise ValueError(
                f"a batch needs {batch_size // images_per_id} identities of the source ({batch_size} images, "
                f"{images_per_id} of each), but there are only {len(self.source)}: lower --train_batch_size, to at "
                f"most {len(self.source) * images_per_id}, or raise --images_per_id"
            )
        self.epoch = self.done = 0

    def set_epoch(self, epoch, done=0):
        """`done` batches of the epoch have been trained on before."""
        self.epoch, self.done = epoch, done

    def take(self, labels, steps=None, draw=None):
        """Set the labels (N,) of the target's images, those with -1 are left out, and an epoch's steps and draw."""
        self.steps, self.draw = steps or self.steps, draw or self.draw
        self.target = rows_of(labels.tolist(), first=self.num_source)
        if not self.target:
            raise ValueError(f"all {len(labels)} images are in no cluster: there is nothing to make batches of")

    def global_batches(self):
        """(source rows, target rows) of every batch of the epoch; source rows are empty without a source."""
        source = self.batches_of(self.source, "source") if self.source else itertools.repeat([])
        yield from itertools.islice(zip(source, self.batches_of(self.target, "target"), strict=False), self.steps)

    def batches_of(self, owners, name):
        """Batches without end, each of P of `owners` (the rows of each). With fewer than P, owners are repeated."""
        rng = random.Random(f"{name}/{self.seed}/{self.epoch}")
        num_owners = self.batch_size // self.images_per_id
        # A draw that counts begins every pass alike.
        draw = copy.deepcopy(self.draw) if name == "target" else of_other_cameras
        while True:
            order = rng.sample(owners, len(owners))
            if len(order) < num_owners:
                order = list(itertools.islice(itertools.cycle(order), num_owners))
            for start in range(0, len(order) - num_owners + 1, num_owners):
                groups = [draw(rng, rows, self.images_per_id, self.camids) for rows in order[start:][:num_owners]]
                yield [row for rows in groups for row in rows]

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

    def steps_of(self, epochs):
        return epochs * self.steps


def of_other_cameras(rng, rows, size, camids):
    """`size` of `rows`: all and some again if there are no more; else one row and others, of other cameras if any."""
    if len(rows) <= size:
        return rows + rng.choices(rows, k=size - len(rows))
    first = rng.choice(rows)
    others = [row for row in rows if camids[row] != camids[first]]
    others = others or [row for row in rows if row != first]
    enough = len(others) >= size - 1
    return [first, *(rng.sample(others, size - 1) if enough else rng.choices(others, k=size - 1))]


def of_every_camera(rng, rows, size, camids):
    """`size` of `rows`, of as many cameras as there are; the rest are other rows, and rows again where they end."""
    by_camera = {}
    for row in rows:
        by_camera.setdefault(camids[row], []).append(row)
    chosen = [rng.choice(by_camera[camera]) for camera in sorted(by_camera)]
    missing = size - len(chosen)
    if missing <= 0:
        return rng.sample(chosen, size)
    others = [row for row in rows if row not in chosen]
    if not others:
        return rng.choices(chosen, k=size)
    return chosen + (rng.sample(others, missing) if len(others) >= missing else rng.choices(others, k=missing))


class LeastDrawn:
    """A draw that prefers the images that were drawn least often: one row, then others of other cameras.

    Where all rows are of one camera, the others are of different parts of the cluster, if enough parts have rows that
    were drawn least often. Fewer others than `size` are drawn with replacement. From row `first` on, `counts` is how
    often each row was drawn before, `parts` its part.
    """

    def __init__(self, counts, parts, first=0):
        self.counts, self.parts, self.first = list(counts), list(parts), first

    def __call__(self, rng, rows, size, camids):
        start = rng.choice(self.least(rows))
        others = [row for row in rows if camids[row] != camids[start]]
        one_camera = not others
        others = others or [row for row in rows if row != start] or [start]
        least = self.least(others)
        if len(others) < size:
            chosen = rng.choices(others, k=size - 1)
        elif len(least) < size:
            rest = [row for row in others if row not in least]
            chosen = least + rng.sample(rest, size - 1 - len(least))
        else:
            chosen = self.of_different_parts(rng, least, size - 1) if one_camera else []
            chosen = chosen or rng.sample(least, size - 1)
        for row in (start, *chosen):
            self.counts[row - self.first] += 1
        return [start, *chosen]

    def least(self, rows):
        """Those that were drawn least often."""
        counts = [self.counts[row - self.first] for row in rows]
        return [row for row, count in zip(rows, counts, strict=True) if count == min(counts)]

    def of_different_parts(self, rng, rows, size):
        """Rows of so many parts, one of each; none where there are fewer parts."""
        parts = {}
        for row in rows:
            parts.setdefault(self.parts[row - self.first], []).append(row)
        return [rng.choice(parts[part]) for part in rng.sample(sorted(parts), size)] if len(parts) >= size else []


def rows_of(labels, first=0):
    """[rows of a label, ...], numbered from `first`; rows with a negative label are left out."""
    rows = {}
    for row, label in enumerate(labels, first):
        if label >= 0:
            rows.setdefault(label, []).append(row)
    return [rows[label] for label in sorted(rows)]


def in_groups(labels, size, seed):
    """Labels in which noise is divided into random groups of `size`, with new labels after those of the clusters."""
    noise = (labels < 0).nonzero().flatten().tolist()
    random.Random(f"groups/{seed}").shuffle(noise)
    grouped = labels.clone()
    first = int(labels.max()) + 1
    for place, row in enumerate(noise):
        grouped[row] = first + place // size
    return grouped


def gather_by_domain(tensor, num_domains):
    """The whole batch from all processes' shares of [domain, domain, ...], one domain after the other."""
    size = len(tensor)
    whole = gather_with_gradient(tensor)
    return whole.unflatten(0, (len(whole) // size, num_domains, size // num_domains)).transpose(0, 1).flatten(0, 2)
