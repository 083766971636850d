"""Training images a second of one worker process: decoded, augmented and collated into batches of 256 x 128.

    python -m benchmarks.speed.loading
    python -m benchmarks.speed.loading --json FILE

The same people from four sources: drawn on access, a portable copy that contains the images, and folders of JPEG files
of two sizes, which the system keeps in memory. The sources take turns, and medians count: by the clock, and by the
worker's processor time, which other work on the machine hardly changes.
"""

import argparse
import resource
import statistics
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image, features
from torch.utils.data import DataLoader
from tqdm import tqdm

from benchmarks.common import RESULTS, command_line, write_result
from utils.batches.samplers import IdentitySampler
from utils.batches.transforms import ReIDImages, train_transform
from utils.datasets.load import load_reid
from utils.datasets.portable import save
from utils.reporting.report import text_table

BATCH_SIZE, IMAGES_PER_ID = 64, 4
WARM_UP = 2
IMAGE_SIZE = (256, 128)


def write_jpegs(data, folder, size):
    """A folder an identity, cameras in the names."""
    for row in tqdm(data, desc=f"writing {folder.name}", disable=None):
        name = Path(row["path"])
        path = folder / name.name[:4] / name.with_suffix(".jpg").name
        path.parent.mkdir(parents=True, exist_ok=True)
        row["image"].resize((size[1], size[0]), Image.Resampling.BICUBIC).save(path, "JPEG", quality=90)


def sources(folder, num_ids):
    """{description: training images}"""
    drawn = load_reid("synthetic", num_ids=num_ids)
    save(drawn, folder / "copy")
    copy = load_reid(folder / "copy")
    found = {"drawn on access, 128 x 64": drawn["train"], "portable copy, 128 x 64": copy["train"]}
    for size in ((128, 64), IMAGE_SIZE):
        height, width = size
        write_jpegs(drawn["train"], folder / f"jpeg{height}" / "train", size)
        found[f"JPEG files, {height} x {width}"] = load_reid(folder / f"jpeg{height}")["train"]
    return found


def check(images, sampler):
    """A worker's batch is the one that this process makes."""
    loader = DataLoader(images, batch_sampler=sampler, num_workers=1)
    batch, items = next(iter(loader)), next(iter(sampler))
    here = torch.stack([images[item]["images"] for item in items])
    assert here.shape == (BATCH_SIZE, 3, *IMAGE_SIZE) and torch.equal(batch["images"], here)


def rates(images, sampler, epoch):
    """(images a second, images a second of the worker's processor time) of one epoch.

    The first rate leaves out the first batches: the worker never gets ahead, so none is made before the clock runs.
    """
    sampler.set_epoch(epoch)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    times = [time.perf_counter() for _ in DataLoader(images, batch_sampler=sampler, num_workers=1)]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    timed = times[WARM_UP:]
    return BATCH_SIZE * (len(timed) - 1) / (timed[-1] - timed[0]), BATCH_SIZE * len(times) / busy


def main(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_ids", type=int, default=128, help="identities, of 8 images each; default 128")
    parser.add_argument("--rounds", type=int, default=5, help="turns of every source; default 5")
    parser.add_argument("--json", type=Path, default=RESULTS / "loading.json", help="file to write")
    args = parser.parse_args(input_args)
    if args.num_ids < 64 or args.rounds < 1:
        parser.error(f"--num_ids must be 64 or more and --rounds 1 or more, got {args.num_ids} and {args.rounds}")
    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        loaders = {}
        for name, rows in sources(Path(folder), args.num_ids).items():
            sampler = IdentitySampler(rows["pid"][:], BATCH_SIZE, IMAGES_PER_ID)
            loaders[name] = ReIDImages(rows, train_transform(IMAGE_SIZE)), sampler
            check(*loaders[name])
        for epoch in tqdm(range(args.rounds), desc="rounds", disable=None):
            for name, (images, sampler) in loaders.items():
                runs.setdefault(name, []).append(rates(images, sampler, epoch))
    raw = {"batch": [BATCH_SIZE, 3, *IMAGE_SIZE], "workers": 1}
    raw["rows"] = [summary(name, found) for name, found in runs.items()]
    print(text_table(*table_of(raw["rows"])))
    packages = {"pillow": Image.__version__, "jpeg": f"libjpeg-turbo {features.version('libjpeg_turbo')}"}
    write_result(args.json, command_line(__spec__.name, input_args), *table_of(raw["rows"]), raw, **packages)


def table_of(rows):
    table = [[row["source"], f"{row['images_a_second']:.0f}", f"{row['images_a_cpu_second']:.0f}"] for row in rows]
    return ["images", "a second", "a second of the processor"], table


def summary(name, found):
    by_clock, by_processor = map(list, zip(*found, strict=True))
    return {
        "source": name,
        "images_a_second": statistics.median(by_clock),
        "images_a_cpu_second": statistics.median(by_processor),
        "rounds": {"images_a_second": by_clock, "images_a_cpu_second": by_processor},
    }


if __name__ == "__main__":
    main()
