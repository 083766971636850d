"""Retrieval by several processes of one thread beside one process of as many threads: medians of runs in turns.

    python -m benchmarks.speed.ring_threads

The default size is that of MSMT17. Memory is the peak of a process beyond the features it was given, which are its
share.
"""

import argparse
import os
import statistics
from pathlib import Path

from benchmarks.common import GIB, RESULTS, command_line, write_result
from benchmarks.speed.ring import WORKS, count_here
from utils.reporting.report import text_table

KEYS = "seconds", "memory"
COLUMNS = [
    "work", "processes", "seconds", "GiB a process", "one process: seconds", "GiB", "times its seconds",
]  # fmt: skip


def table_of(raw):
    rows = []
    for work, runs in raw["runs"].items():
        (seconds, memory), (seconds_of_one, memory_of_one) = (
            [statistics.median(max(process[key] for process in run) for run in runs[name]) for key in KEYS]
            for name in ("several", "one")
        )
        cells = [f"{seconds:.1f}", f"{memory / GIB:.2f}", f"{seconds_of_one:.1f}", f"{memory_of_one / GIB:.2f}"]
        rows.append([work, str(raw["processes"]), *cells, f"{seconds / seconds_of_one:.2f}"])
    return COLUMNS, rows


def main(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs=3, type=int, default=(11_659, 82_161, 512), help="queries, gallery, width")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="default: the number of cores")
    parser.add_argument("--runs", type=int, default=3, help="of each of the two; default 3")
    parser.add_argument("--works", nargs="+", choices=WORKS, default=WORKS, help="default all")
    parser.add_argument("--json", type=Path, default=RESULTS / "ring_threads.json", help="result file")
    args = parser.parse_args(input_args)
    raw = {"sizes": list(args.sizes), "processes": args.processes, "runs": {}}
    for work in args.works:
        found = raw["runs"].setdefault(work, {"one": [], "several": []})
        for _ in range(args.runs):
            found["one"].append(count_here(work, args.sizes, 1, threads=args.processes))
            found["several"].append(count_here(work, args.sizes, args.processes))
    columns, table = table_of(raw)
    print(text_table(columns, table))
    write_result(args.json, command_line(__spec__.name, input_args), columns, table, raw)


if __name__ == "__main__":
    main()
