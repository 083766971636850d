"""Registers, spills and shared memory of each Triton kernel on each architecture, compiled without a GPU.

    python -m benchmarks.speed.kernel_builds

`kernels.build_table` compiles and lists them too, and fails where a kernel spills; CI runs that.
"""

import argparse
from pathlib import Path

from benchmarks.common import RESULTS, command_line, write_result
from kernels.build_table import build_table
from utils.reporting.report import text_table

COLUMNS = ["kernel", "arch", "registers", "spill_bytes", "shared_bytes"]


def table_of(rows):
    return COLUMNS, [[row[key] for key in COLUMNS] for row in rows]


def main(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=RESULTS / "kernel_builds.json", help="default benchmarks/results")
    args = parser.parse_args(input_args)
    rows = build_table()
    print(text_table(*table_of(rows)))
    write_result(args.json, command_line(__spec__.name, input_args), *table_of(rows), {"rows": rows})


if __name__ == "__main__":
    main()
