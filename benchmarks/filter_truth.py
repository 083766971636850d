"""The three filters against drawn people of whom the truth is known: AUC, and what each keeps of every kind.

    python -m benchmarks.filter_truth

The demo of `filter_generated.py`, with the people of each seed: right ones in the source's scenes and in others, wrong
ones, broken images and empty scenes. Its settings were chosen on the people of seed 1. With --work, seeds that are
scored are kept there and not scored again.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.retrieval import RESULTS, environment
from utils.drawn_generated import World, write_drawn
from utils.filter_page import truth_table
from utils.reporting import text_table, to_json, write_together

ROOT = Path(__file__).parent.parent


def scored(place, world, flags):
    """`against_truth` of a run's summary."""
    write_drawn(place / "drawn", world)
    source = f"synthetic:domain={world.domain},num_ids={world.num_ids},images_per_id=12,seed={world.seed}"
    command = [sys.executable, "filter_generated.py", "--generated", place / "drawn", "--source", source]
    command += ["--output_dir", place, *flags]
    subprocess.run(list(map(str, command)), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return json.loads((place / "summary.json").read_text())["against_truth"]


def main(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="default 0")
    parser.add_argument("--num_ids", type=int, default=32, help="people; default 32")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="for filter_generated.py; the last flag")
    parser.add_argument("--work", type=Path, help="folder that is kept, to go on after a stop")
    parser.add_argument("--json", type=Path, default=RESULTS / "filter_truth.json", help="file to write")
    args = parser.parse_args(input_args)
    with tempfile.TemporaryDirectory() as place:
        place = args.work or Path(place)
        seeds = {
            seed: scored(place / f"seed{seed}", World(num_ids=args.num_ids, seed=seed), args.flags)
            for seed in args.seeds
        }
    names = list(seeds[args.seeds[0]])
    report = environment() | {
        "command": f"python -m benchmarks.filter_truth --seeds {' '.join(map(str, args.seeds))}",
        "num_ids": args.num_ids,
        "flags": args.flags,
        "auc": {name: statistics.fmean(found[name]["auc"] for found in seeds.values()) for name in names},
        "seeds": seeds,
    }
    for seed, found in seeds.items():
        print(f"people of seed {seed}\n{text_table(*truth_table(found))}")
    with write_together(args.json.parent) as aside:
        aside(args.json.name).write_text(to_json(report))


if __name__ == "__main__":
    main()
