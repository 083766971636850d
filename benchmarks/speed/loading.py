"""Training images a second of one worker process: decoded, augmented and collated into batches of 256 x 128.

    python -m benchmarks.speed.loading
    python -m benchmarks.speed.loading --json FILE
    python -m benchmarks.speed.loading --augmentation    # RandAugment of pre-training, in the loader and on the device

The same people from four sources: drawn on access, a portable copy that contains the images, and folders of JPEG files
of two sizes, which the system keeps in memory. The sources take turns, and medians count: by the clock, and by the
worker's processor time, which other work on the machine hardly changes.

With --augmentation JPEG files of 256 x 128 are augmented as in the published pre-training: by the loader, or drawn by
the loader and made by the device, whose own part is timed beside. First the batches of two processes are compared with
those of one.
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

from benchmarks.common import RESULTS, command_line, wait, write_result
from utils.batches.augmentation import RandAugmentTransform
from utils.batches.device_augmentation import BatchAugmentation
from utils.batches.samplers import IdentitySampler
from utils.batches.shuffled import ShuffleSampler
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


def check_processes(images):
    """The images of two processes are those of one."""
    first = [ShuffleSampler(len(images), BATCH_SIZE, 0, *share) for share in ((0, 1), (0, 2), (1, 2))]
    whole, *halves = (next(iter(DataLoader(images, batch_sampler=sampler)))["images"] for sampler in first)
    for name in whole if isinstance(whole, dict) else [...]:
        assert torch.equal(whole[name], torch.cat([half[name] for half in halves]))


def augmentations(folder, num_ids, rounds):
    """(rows of both ways to augment, seconds of the device an image)."""
    drawn = load_reid("synthetic", num_ids=num_ids)["train"]
    write_jpegs(drawn, folder / "jpeg" / "train", IMAGE_SIZE)
    data = load_reid(folder / "jpeg")["train"]
    options = {"num_ops": 2, "magnitude": 9, "padding": 10, "erasing": 0.25}
    augment = BatchAugmentation(IMAGE_SIZE, **options)
    ways = {"in the loader": RandAugmentTransform(IMAGE_SIZE, **options), "on the device": augment.draw}
    loaders, runs = {name: ReIDImages(data, way) for name, way in ways.items()}, {}
    sampler = ShuffleSampler(len(data), BATCH_SIZE)
    for images in loaders.values():
        check_processes(images)
    for epoch in tqdm(range(rounds), desc="rounds", disable=None):
        for name, images in loaders.items():
            runs.setdefault(name, []).append(rates(images, sampler, epoch))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch, seconds = next(iter(DataLoader(loaders["on the device"], batch_sampler=sampler)))["images"], []
    for _ in range(WARM_UP + rounds):
        wait(device.type == "cuda")
        start = clock_of(device)()
        augment(batch, device)
        wait(device.type == "cuda")
        seconds.append((clock_of(device)() - start) / BATCH_SIZE)
    rows = [summary(name, found) for name, found in runs.items()]
    rows[1] |= {"device": device.type, "device_seconds_an_image": statistics.median(seconds[WARM_UP:])}
    return rows


def clock_of(device):
    """The clock for a GPU, processor time for the CPU, which other programs use too."""
    return time.perf_counter if device.type == "cuda" else time.process_time


def augmentation_table(rows):
    table = [
        [
            row["source"],
            f"{row['images_a_second']:.0f}",
            f"{row['images_a_cpu_second']:.0f}",
            f"{1000 / row['images_a_cpu_second']:.2f}",
            f"{1000 * row['device_seconds_an_image']:.2f} ({row['device']})" if "device" in row else "",
        ]
        for row in rows
    ]
    columns = ["augmented", "a second", "a second of the processor", "ms of the processor", "ms of the device"]
    return columns, table


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
    parser.add_argument("--augmentation", action="store_true", help="compare the two ways to augment, see above")
    parser.add_argument("--json", type=Path, help="file to write; default benchmarks/results/loading*.json")
    args = parser.parse_args(input_args)
    if args.num_ids < 64 or args.rounds < 1:
        parser.error(f"--num_ids must be 64 or more and --rounds 1 or more, got {args.num_ids} and {args.rounds}")
    name = "loading_augmentation.json" if args.augmentation else "loading.json"
    args.json = args.json or RESULTS / name
    if args.augmentation:
        with tempfile.TemporaryDirectory() as folder:
            rows = augmentations(Path(folder), args.num_ids, args.rounds)
        print(text_table(*augmentation_table(rows)))
        raw = {"batch": [BATCH_SIZE, 3, *IMAGE_SIZE], "workers": 1, "rows": rows}
        return write_result(args.json, command_line(__spec__.name, input_args), *augmentation_table(rows), raw)
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
