"""Scoring and choosing among many generated images: images a second, peak memory, seconds to choose again.

    python -m benchmarks.speed.filtering --sizes 10000 100000

The images are small and drawn: hard links of 160 files, as many as --sizes says. All three filters score them with the
stand-in models at the images' own size, in one process. Each size is a run of its own, so the peak memory is that of
the size. With --work, sizes that were measured are kept in that folder and not measured again.
"""

import argparse
import os
import shutil
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.common import RESULTS, checked, command_line, kept, run_script, write_result
from utils.generated.drawn_set import World, write_drawn
from utils.reporting.report import text_table

WORLD = World(num_ids=16, images_per_id=10)
SIZE = (64, 32)
SOURCE = f"synthetic:domain={WORLD.domain},num_ids={WORLD.num_ids},images_per_id=6"


def write_links(drawn, folder, count):
    """Write a set of `count` images whose files are hard links to those of `drawn`, in turn."""
    rows = pq.read_table(drawn / "metadata.parquet").drop_columns(["truth"]).to_pylist()
    links = []
    for number in range(count):
        row = rows[number % len(rows)]
        path = Path("images", f"{number // 1000:04d}", f"{number:08d}.jpg")
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        os.link(drawn / row["path"], folder / path)
        links.append(row | {"path": str(path), "file_name": str(path)})
    pq.write_table(pa.Table.from_pylist(links), folder / "metadata.parquet")


def measured(*flags):
    """Seconds by the clock, processor seconds and peak memory in MiB of one run."""
    words = ["--source", SOURCE, "--resolution", *SIZE, "--clip_resolution", *SIZE, *flags]
    run = checked(run_script("filter_generated.py", *words), "filter_generated.py")
    return run.seconds, run.cpu_seconds, 1024 * run.peak_gib


def given_models(place):
    models = place / "first" / "models"
    return ["--reid_model", models / "reid-synthetic-a", "--classifier_model", models / "classifier-synthetic-a"]


def smallest(place, precision):
    """Train the models, then measure a run that scores very few images."""
    for name in ("drawn", "first", "again"):
        shutil.rmtree(place / name, ignore_errors=True)
    write_drawn(place / "drawn", WORLD, size=SIZE, num_damaged=0)
    flags = ["--generated", place / "drawn", "--dataloader_num_workers", 0, "--keep_fraction", 0.5]
    measured("--output_dir", place / "first", *flags, "--num_train_epochs", 1, "--classifier_epochs", 1)
    more = ["--output_dir", place / "again", *given_models(place), "--mixed_precision", precision]
    clock, processor, peak = measured(*flags, *more)
    count = WORLD.num_ids * WORLD.images_per_id
    return {"images": count, "seconds": clock, "processor_seconds": processor, "peak_mib": peak}


def one_size(place, count, args, base):
    folder, out = place / f"set{count}", place / f"out{count}"
    for left in (folder, out):
        shutil.rmtree(left, ignore_errors=True)
    write_links(place / "drawn", folder, count)
    flags = ["--generated", folder, "--output_dir", out, *given_models(place), "--dataloader_num_workers", 1]
    flags += ["--mixed_precision", args.mixed_precision, "--eval_batch_size", 128]
    clock, processor, peak = measured(*flags, "--target_per_id", 10)
    again = measured(*flags, "--keep_fraction", 0.01)
    scoring = processor - base["processor_seconds"]
    return {
        "images": count,
        "seconds": clock,
        "processor_seconds": processor,
        "images_a_second": (count - base["images"]) / max(clock - base["seconds"], 1e-9),
        "images_a_cpu_second": (count - base["images"]) / max(scoring, 1e-9),
        "peak_mib": peak,
        "choose_again_seconds": again[0],
        "choose_again_processor_seconds": again[1],
        "choose_again_peak_mib": again[2],
        "load_average": os.getloadavg(),
    }


def main(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000], help="default 10000 100000")
    parser.add_argument("--mixed_precision", default="bf16", choices=["no", "bf16"], help="default bf16")
    parser.add_argument("--work", type=Path, help="folder to keep, to resume from after a stop")
    parser.add_argument("--json", type=Path, default=RESULTS / "filtering.json", help="default benchmarks/results")
    args = parser.parse_args(input_args)
    if min(args.sizes) < 1:
        parser.error(f"--sizes must be 1 or more, got {min(args.sizes)}")
    with tempfile.TemporaryDirectory() as place:
        place = args.work or Path(place)
        settings = {"mixed_precision": args.mixed_precision}
        rows, base = [], kept(place / "smallest.json", settings, lambda: smallest(place, args.mixed_precision))
        for count in args.sizes:
            file = place / f"{count}.json"
            rows.append(kept(file, settings, lambda count=count: one_size(place, count, args, base)))
    raw = {"image": [3, *SIZE], "mixed_precision": args.mixed_precision, "smallest_run": base, "rows": rows}
    print(text_table(*table_of(rows)))
    write_result(args.json, command_line(__spec__.name, input_args), *table_of(rows), raw)


def table_of(rows):
    table = [
        [f"{row['images']:,}", f"{row['images_a_second']:.0f}", f"{row['peak_mib'] / 1024:.2f}"]
        + [f"{row['choose_again_seconds']:.0f} s"]
        for row in rows
    ]
    return ["images", "scored a second", "GiB", "choosing again"], table


if __name__ == "__main__":
    main()
