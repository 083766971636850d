"""All that needs a GPU, in one call: kernels are checked, then retrieval, training and generation measured.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --json_dir out --limit 560 --parts kernels retrieval

Each part runs in a process of its own and writes a file of its own; `gpu.json` says how each ended. Parts that do not
fit into the time limit are named, and a second call with `--parts` runs them.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch

from benchmarks.common import RESULTS, TIME_LIMIT, command_line, run_script, write_result
from utils.reporting.report import text_table

# The words after `python -m`; {json} is the part's own file.
PARTS = {
    "kernels": "pytest -q -rf tests/kernels/test_kernels_triton.py tests/kernels/test_kernels.py",
    "retrieval": "benchmarks.speed.gpu_retrieval --json {json}",
    "dcac_step": "benchmarks.speed.dcac_step --json {json}",
    "dcac_long": "benchmarks.speed.dcac_step --modes lora --rounds 3 --steps 100 --json {json}",
    "pretraining": "benchmarks.speed.pretraining --json {json}",
    "generation": "benchmarks.speed.generation --sd15 --json {json}",
    "generation_xl": "benchmarks.speed.generation --sdxl --json {json}",
}
SMALL = {
    "kernels": "-k equal_rows",
    "retrieval": "--dtypes float32",
    "dcac_step": "--size tiny --modes lora --rounds 1 --steps 2 --warmup 1",
    "dcac_long": "--size tiny --rounds 1 --steps 4 --warmup 1",
    "pretraining": "--size tiny --models resnet50 --mixed_precision no --rounds 1 --steps 2 --warmup 1",
    "generation": "--steps 2 --ways paper",
    "generation_xl": "--steps 2 --ways lora",
}
# Parts that go through their configurations several times.
WITH_ROUNDS = ("retrieval", "dcac_step", "dcac_long", "pretraining")
LAST_LINES = 15
COLUMNS = ["part", "ended", "seconds"]


def run(command, limit):
    """(how a part ended, its last lines)"""
    ended = run_script("-m", *command, limit=limit)
    if ended.code == TIME_LIMIT:
        return "stopped by the time limit", []
    lines = (ended.output + ended.errors).strip().splitlines()[-LAST_LINES:]
    return "done" if ended.code == 0 else f"failed with {ended.code}", lines


def lost(found, name=""):
    """Names of the losses in a result that are not finite, which are null in JSON."""
    items = found.items() if isinstance(found, dict) else enumerate(found) if isinstance(found, list) else ()
    bad = [name] if name.endswith("loss") and found is None else []
    return bad + [one for key, value in items for one in lost(value, f"{name}/{key}")]


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default all, in this order")
    parser.add_argument("--limit", type=float, default=86400, help="seconds for all parts; default a day")
    parser.add_argument("--rounds", type=int, help="of each part, where a card is there for minutes; default its own")
    parser.add_argument("--json_dir", type=Path, default=RESULTS / "gpu", help="default benchmarks/results/gpu")
    parser.add_argument("--small", action="store_true", help="tiny sizes, also without a GPU, to check that all runs")
    args = parser.parse_args(input_args)
    if not args.small and not torch.cuda.is_available():
        parser.error("there is no GPU here; --small tries the parts at tiny sizes")
    args.json_dir = args.json_dir.absolute()
    return args


def main(input_args=None):
    args = parse_args(input_args)
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    end, parts, failed = time.monotonic() + args.limit, {}, []
    for name in args.parts:
        path, left = args.json_dir / f"{name}.json", end - time.monotonic()
        words = PARTS[name].format(json=path).split() + (SMALL.get(name, "").split() if args.small else [])
        words += ["--rounds", str(args.rounds)] if args.rounds and name in WITH_ROUNDS else []
        if args.small:
            words = [word for word in words if word not in ("--sd15", "--sdxl")]
        args.json_dir.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        start = time.monotonic()
        ended, said = run(words, left) if left > 0 else ("no time left", [])
        if path.exists() and (bad := lost(json.loads(path.read_text(encoding="utf-8")))):
            ended = f"not finite: {', '.join(bad[:5])}"
        seconds = round(time.monotonic() - start, 1)
        parts[name] = {"command": " ".join(["python -m", *PARTS[name].split()]), "ended": ended, "seconds": seconds}
        parts[name]["said"] = said
        failed += [name] if ended != "done" else []
        print(f"{name}: {ended}, {seconds} s", *(said if ended != "done" else []), sep="\n", flush=True)
        table = [[part, one["ended"], one["seconds"]] for part, one in parts.items()]
        raw = {"small": args.small, "parts": parts}
        write_result(
            args.json_dir / "gpu.json", command_line(__spec__.name, input_args), COLUMNS, table, raw, card=card
        )
    print(text_table(COLUMNS, table))
    if failed:
        sys.exit(f"benchmarks.gpu: {', '.join(failed)} did not end well, see above")


if __name__ == "__main__":
    main()
