"""Scoring and choosing among many generated images: images a second, peak memory, seconds to choose again.

    python -m benchmarks.filtering --sizes 10000 100000

Small drawn images, as many hard links of some hundred files as are asked for, scored by all three filters with the
stand-in models in one process. Every size is a run of its own, so its peak memory is its own.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.retrieval import RESULTS, environment
from utils.drawn_generated import World, write_drawn
from utils.reporting import to_json, write_together

ROOT = Path(__file__).parent.parent
WORLD = World(num_ids=16, images_per_id=10)
SIZE = (64, 32)
SOURCE = f"synthetic:domain={WORLD.domain},num_ids={WORLD.num_ids},images_per_id=6"


def write_links(drawn, folder, count):
    """A set of `count` images whose files are those of `drawn`, again and again."""
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
    """Seconds by the clock, seconds of the processor, and the peak of the memory in MiB, of one run."""
    command = [sys.executable, "filter_generated.py", "--source", SOURCE, "--resolution", *SIZE, *flags]
    start = time.perf_counter()
    child = subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    errors = child.stderr.read()
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(map(str, command))} failed: {errors.decode()[-2000:]}")
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def main(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000], help="default 10000 100000")
    parser.add_argument("--json", type=Path, default=RESULTS / "filtering.json", help="file to write")
    args = parser.parse_args(input_args)
    if min(args.sizes) < 1:
        parser.error(f"--sizes must be 1 or more, got {min(args.sizes)}")
    rows = []
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        write_drawn(place / "drawn", WORLD, size=SIZE, num_damaged=0)
        flags = ["--num_train_epochs", 1, "--dataloader_num_workers", 0, "--keep_fraction", 0.5]
        measured("--generated", place / "drawn", "--output_dir", place / "first", *flags)
        models = place / "first" / "models"
        given = ["--reid_model", models / "reid-synthetic-a", "--classifier_model", models / "classifier-synthetic-a"]
        base = measured("--generated", place / "drawn", "--output_dir", place / "again", *given, *flags)
        for count in args.sizes:
            folder, out = place / f"set{count}", place / f"out{count}"
            write_links(place / "drawn", folder, count)
            flags = ["--generated", folder, "--output_dir", out, *given, "--dataloader_num_workers", 2]
            clock, processor, peak = measured(*flags, "--target_per_id", 10)
            again = measured(*flags, "--keep_fraction", 0.01)
            rows.append(
                {
                    "images": count,
                    "seconds": clock,
                    "processor_seconds": processor,
                    "images_a_second": count / clock,
                    "images_a_cpu_second": count / max(processor - base[1], 1e-9),
                    "peak_mib": peak,
                    "choose_again_seconds": again[0],
                    "choose_again_processor_seconds": again[1],
                }
            )
    report = environment() | {
        "command": f"python -m benchmarks.filtering --sizes {' '.join(map(str, args.sizes))}",
        "image": [3, *SIZE],
        "smallest_run": {"images": WORLD.num_ids * WORLD.images_per_id, "seconds": base[0], "peak_mib": base[2]},
        "rows": rows,
    }
    print(f"{'images':>8}{'images/s':>10}{'images/CPU s':>14}{'peak MiB':>10}{'again s':>9}   {report['machine']}")
    for row in rows:
        print(
            f"{row['images']:>8}{row['images_a_second']:>10.0f}{row['images_a_cpu_second']:>14.0f}"
            f"{row['peak_mib']:>10.0f}{row['choose_again_seconds']:>9.1f}"
        )
    with write_together(args.json.parent) as aside:
        aside(args.json.name).write_text(to_json(report))


if __name__ == "__main__":
    main()
