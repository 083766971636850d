"""Time and memory of DCAC's training step in all U-Net modes, beside the baseline and the paper's way of computing it.

    python -m benchmarks.speed.dcac_step --json STEP.json            # on a GPU: ms, ratios, peak GiB
    python -m benchmarks.speed.dcac_step --size block --modes lora   # the same on a CPU
    python -m benchmarks.speed.dcac_step --modes lora lora-captions --ways ours --rounds 1 --steps 200

`benchmarks.models` explains the ways and sizes, and the mode `lora-captions`. The gradient ratio is the norm of the
gradient of L_ldm at the features by that of L_id + L_pcl: with the weights as they are drawn, then after the steps.
"""

# isort: off
# First, so that bitsandbytes is quiet about our package of kernels.
import utils  # noqa: F401

# isort: on
import argparse
import gc
import time
from pathlib import Path

import torch

from benchmarks.common import GIB, cell, command_line, step_numbers, step_text, wait, write_result
from benchmarks.models import CAPTIONED, MODES, Step, configurations, sizes
from utils.reporting.report import text_table

TIMED = ("ours", "outer", "all", "paper")
COLUMNS = ["mode", "way", "batch", "ms", "x baseline", "x paper", "images/s", "peak GiB"]


def measure(size, configs, *, batch, dtype, device, rounds, steps, warmup, report=print):
    """{(mode, way): numbers}. Each round goes through all configurations: other load meets all of them."""
    times = {config: [] for config in configs}
    memory, losses, gradients, failed = {}, {}, {}, {}
    cuda = torch.device(device).type == "cuda"
    for number in range(rounds):
        for config in configs:
            if config in failed:
                continue
            gc.collect()
            try:
                step = Step(size, *config, batch=batch, dtype=dtype, device=device)
                step.prepare()
                if config[0] != "baseline":
                    gradients[config] = {"gradients_before": step.gradients()}
                if cuda:
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                for _ in range(warmup):
                    step.run()
                losses[config] = float(step.run())
                for _ in range(steps):
                    wait(cuda)
                    start = time.perf_counter()
                    step.run()
                    wait(cuda)
                    times[config].append(1000 * (time.perf_counter() - start))
                if cuda:
                    memory[config] = torch.cuda.max_memory_allocated() / GIB, torch.cuda.max_memory_reserved() / GIB
                if config in gradients:
                    gradients[config] |= {"gradients_after": step.gradients()}
                if step.model.balance is not None:
                    gradients[config] |= {name: float(value) for name, value in step.balanced.items()}
            except torch.OutOfMemoryError:
                failed[config] = "out of memory"
            step = None
            report(
                f"round {number + 1}/{rounds}, {' '.join(config)}: {failed.get(config) or step_text(times[config])}"
            )
    return {
        config: {"failed": failed[config]}
        if config in failed
        else step_numbers(times[config], batch, memory.get(config), losses[config]) | gradients.get(config, {})
        for config in configs
    }


def time_steps(args):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}[args.mixed_precision]
    size, found = sizes()[args.size], {}
    ways = args.ways or ([*TIMED, "compiled"] if args.compile else TIMED)
    for batch in args.batches:
        measured = measure(
            size,
            configurations(args.modes, ways),
            batch=batch,
            dtype=dtype,
            device=device,
            rounds=args.rounds,
            steps=args.steps,
            warmup=args.warmup,
        )
        base = measured["baseline", "ours"].get("ms")
        for (mode, way), row in measured.items():
            paper = measured.get((mode, "paper"), {}).get("ms")
            if "ms" in row and base:
                row["times_baseline"] = round(row["ms"] / base, 4)
            if "ms" in row and paper:
                row["times_paper"] = round(row["ms"] / paper, 4)
            found.setdefault(batch, {}).setdefault(mode, {})[way] = row
    return {"device": device, "size": args.size, "mixed_precision": args.mixed_precision, "batches": found}


def table_of(batches):
    """The gradient ratios have a column where they were measured."""
    keys = ("ms", "times_baseline", "times_paper", "images_per_second", "peak_gib")
    steps = [(mode, way, batch) for batch, modes in batches.items() for mode, ways in modes.items() for way in ways]
    found = [batches[batch][mode][way] for mode, way, batch in steps]
    rows = [
        [mode, way, int(batch), *(row.get("failed") or cell(row.get(key)) for key in keys)]
        for (mode, way, batch), row in zip(steps, found, strict=True)
    ]
    if not any("gradients_before" in row for row in found):
        return COLUMNS, rows
    return [*COLUMNS, "gradient ratio"], [[*cells, ratios_of(row)] for cells, row in zip(rows, found, strict=True)]


def ratios_of(row):
    measured = [row[name]["gradient_ratio"] for name in ("gradients_before", "gradients_after") if name in row]
    return " -> ".join(f"{ratio:.1e}" for ratio in measured) or "-"


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="result file")
    parser.add_argument("--size", choices=["paper", "block", "tiny"], default="paper", help="default paper")
    parser.add_argument(
        "--modes", nargs="+", choices=[*MODES, *CAPTIONED], default=list(MODES), help="default all of the U-Net"
    )
    parser.add_argument("--ways", nargs="+", choices=[*TIMED, "compiled"], help="default all but compiled")
    parser.add_argument("--batches", type=int, nargs="+", help="images a step; default: the batch of the size")
    parser.add_argument("--mixed_precision", choices=["bf16", "fp16", "no"], help="default bf16 on a GPU, else no")
    parser.add_argument("--rounds", type=int, default=3, help="through all configurations; default 3")
    parser.add_argument("--steps", type=int, default=10, help="timed in each round; default 10")
    parser.add_argument("--warmup", type=int, default=3, help="steps before the timed ones; default 3")
    parser.add_argument("--compile", action="store_true", help="measure --torch_compile too")
    args = parser.parse_args(input_args)
    args.mixed_precision = args.mixed_precision or ("bf16" if torch.cuda.is_available() else "no")
    args.batches = args.batches or [sizes()[args.size].batch]
    if args.rounds * args.steps < 2:
        parser.error("--rounds x --steps must be at least 2, for quartiles")
    return args


def main(input_args=None):
    args = parse_args(input_args)
    raw = time_steps(args)
    print(f"\n{text_table(*table_of(raw['batches']))}")
    if args.json:
        write_result(args.json, command_line(__spec__.name, input_args), *table_of(raw["batches"]), raw)


if __name__ == "__main__":
    main()
