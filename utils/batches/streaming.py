"""Training images that are read when they are needed, from a Hub repository or a folder of many large files.

Names and identities of all images are read first, without the images, so that classes, fractions and steps are known.
Then every process and worker reads its own files, if there are enough, in an order drawn from (seed, epoch), and
shuffles rows in a buffer. The batches depend on the number of processes and workers.
"""

import itertools
import random

import datasets
import torch

from utils.datasets.images import PersonImage
from utils.launch import leave_interrupts

COLUMNS = ("pid", "domain", "path")
ROWS_AT_ONCE = 100


def open_stream(name):
    """The train split of a data set: (its rows with pid, domain and path, the stream of the same rows)."""
    stream = load(name)
    names = stream.column_names or []
    absent = [column for column in ("image", "pid", "path") if column not in names]
    if absent:
        raise ValueError(
            f"--streaming needs a column {absent[0]!r} in {name}; its columns are {list(names)}. "
            "Leave out --streaming, or make a copy with `python -m utils.datasets`"
        )
    people = light(name, stream).select_columns([column for column in COLUMNS if column in names])
    domain = str(name).rstrip("/").split("/")[-1]
    table = {column: [] for column in COLUMNS}
    for batch in people.iter(batch_size=10_000):
        for column in COLUMNS:
            table[column] += batch.get(column) or [domain] * len(batch["pid"])
    if not table["pid"]:
        raise ValueError(f"{name} has no images in its train split")
    odd = [pid for pid in table["pid"] if type(pid) is not int or pid < 0]
    if odd:
        raise ValueError(f"{name}: column 'pid' must hold integers from 0 on, it has {odd[0]!r}")
    for column in ("domain", "path"):
        if None in table[column]:
            raise ValueError(f"{name}: column {column!r} is empty in row {table[column].index(None)}")
    rows = datasets.Dataset.from_dict(table)
    if len(set(zip(table["domain"], table["path"], strict=True))) < len(rows):
        raise ValueError(f"{name} lists a path twice; --streaming tells images apart by domain and path")
    return rows, stream.cast_column("image", datasets.Image(decode=False))


def load(name, **options):
    try:
        return datasets.load_dataset(str(name), split="train", streaming=True, **options)
    # The Hub, the readers and the HTTP library raise their own error classes.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"{name} cannot be streamed: {reason}. Give a Hub id or a folder that `datasets.load_dataset` reads"
        ) from error


def light(name, stream):
    """The stream without its images; in parquet files, image columns are not read at all."""
    try:
        columns = [column for column in COLUMNS if column in stream.column_names]
        return load(name, columns=columns)
    except ValueError:
        return stream.cast_column("image", datasets.Image(decode=False))


class StreamLoader:
    """Loads `steps_an_epoch` batches per epoch, with workers that start anew for each epoch.

    It is sampler and loader in one: `set_epoch(epoch, done)` sets the place to continue from.
    """

    def __init__(self, images, steps_an_epoch, *, num_workers=0, pin_memory=False):
        self.images, self.steps = images, steps_an_epoch
        self.loader = torch.utils.data.DataLoader(
            images,
            batch_size=None,
            num_workers=num_workers,
            pin_memory=pin_memory,
            worker_init_fn=leave_interrupts,
        )

    def set_epoch(self, epoch, done=0):
        self.images.epoch, self.images.done = epoch, done

    def steps_of(self, epochs):
        return epochs * self.steps

    def __iter__(self):
        return itertools.islice(self.loader, self.steps - self.images.done)


class StreamedImages(torch.utils.data.IterableDataset):
    """Batches of the chosen `rows` of a stream, in the form of `ReIDImages`: the share of one process and worker.

    It never ends: a worker that has read all its files starts again, so that all processes take the same number of
    steps. The first `done` batches of an epoch are skipped without decoding their images.
    """

    def __init__(self, stream, rows, labels, transform, *, batch_size, seed=0, share=(0, 1), buffer=10_000):
        self.stream, self.transform, self.buffer = stream, transform, buffer
        self.labels = list(labels)
        self.numbers = {key: number for number, key in enumerate(zip(rows["domain"], rows["path"], strict=True))}
        self.domain = rows["domain"][0]
        self.batch_size, self.seed = batch_size, seed
        # This process, and the number of processes.
        self.rank, self.num_processes = share
        self.epoch, self.done = 0, 0
        self.decoder = PersonImage(mode="RGB")

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        workers = worker.num_workers if worker else 1
        # The loader takes batches from its workers in turns and always starts with the first worker.
        number = ((worker.id if worker else 0) + self.done) % workers
        part, parts = self.rank * workers + number, self.num_processes * workers
        passed = len(range(number, self.done, workers)) * self.batch_size
        batch = []
        for place, (row, image) in enumerate(self.chosen(part, parts)):
            if place < passed:
                continue
            rng = random.Random(f"{self.seed}/{self.epoch}/{part}/{place}")
            picture = self.decoder.decode_example(image)
            batch.append({"images": self.transform(picture, rng), "labels": self.labels[row], "indices": row})
            if len(batch) == self.batch_size:
                yield torch.utils.data.default_collate(batch)
                batch = []

    def chosen(self, part, parts):
        """(row number, image as stored) of this part, repeated without end, each time in another order."""
        for turn in range(1_000_000):
            rng = random.Random(f"stream/{self.seed}/{self.epoch}/{part}/{turn}")
            buffered, empty = [], True
            for entry in self.rows(part, parts, rng):
                empty = False
                if len(buffered) < self.buffer:
                    buffered.append(entry)
                    continue
                place = rng.randrange(self.buffer)
                yield buffered[place]
                buffered[place] = entry
            if empty:
                raise ValueError(f"part {part} of {parts} has none of the images; use fewer --dataloader_num_workers")
            rng.shuffle(buffered)
            yield from buffered

    def rows(self, part, parts, rng):
        """Chosen rows of this part's files, files in random order; with fewer files than parts, every n-th row."""
        files = self.stream.num_shards
        by_file = files >= parts
        mine = range(part, files, parts) if by_file else range(files)
        # `datasets` would shuffle with threads and wait seconds for them to end.
        for number in rng.sample(mine, len(mine)):
            for place, (image, key) in enumerate(self.pairs(self.stream.shard(num_shards=files, index=number))):
                row = self.numbers.get(key)
                if row is not None and (by_file or place % parts == part):
                    image = image or {"bytes": None, "path": None}
                    # An image inside a table may have no name, but the error for a damaged image needs one.
                    yield row, image | {"path": image["path"] or key[1]}

    def pairs(self, stream):
        # Iterating row by row, `datasets` would divide the rows among the workers a second time.
        for rows in stream.iter(batch_size=ROWS_AT_ONCE):
            domains = rows.get("domain") or [self.domain] * len(rows["path"])
            yield from zip(rows["image"], zip(domains, rows["path"], strict=True), strict=True)
