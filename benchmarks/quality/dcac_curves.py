"""The loss curves of `train_dcac.py` with what makes it faster beside those without: how far they part.

    python -m benchmarks.quality.dcac_curves --json benchmarks/results/dcac_curves.json

Runs of the demo that differ by one flag: latents from the cache (kept in half precision) or the VAE in every step,
compiled or not. Twice the same run is there for scale.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.common import ROOT, environment
from utils.files import to_json, write_together

VARIANTS = {
    "again": [],
    "vae in every step": ["--cache_dir", "none"],
    "compiled": ["--torch_compile"],
    "recomputed": ["--gradient_checkpointing"],
}


def losses_of(flags, args, folder):
    """The lines of log.jsonl of one run."""
    command = [sys.executable, ROOT / "train_dcac.py", "--source", args.source, "--learning_rate", args.learning_rate]
    command += ["--max_train_steps", args.steps, "--validation_ids", 0, "--eval_every", 1000, "--output_dir", folder]
    run = subprocess.run(
        [*map(str, command), *map(str, flags)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    if run.returncode:
        raise RuntimeError(f"train_dcac.py {' '.join(map(str, flags))} failed: {run.stderr.strip()[-2000:]}")
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def largest_differences(wanted, found):
    """{loss: {"absolute", "relative", "step"}}; all lines must be there."""
    rows = {}
    for name in (name for name in wanted[0] if name.startswith("loss")):
        apart = [abs(line[name] - other[name]) for line, other in zip(wanted, found, strict=True)]
        place = max(range(len(apart)), key=apart.__getitem__)
        relative = apart[place] / max(abs(wanted[place][name]), 1e-12)
        rows[name] = {"absolute": apart[place], "relative": relative, "step": wanted[place]["step"]}
    return rows


def main(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50, help="default 50")
    parser.add_argument("--source", default="synthetic:domain=a,num_ids=128", help="default: 128 people of domain a")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="default 1e-3, the demo's")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="default all")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    args = parser.parse_args(input_args)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        cache = ["--cache_dir", folder / "cache"]
        wanted = losses_of(cache, args, folder / "plain")
        print(f"{'':<20}{'loss':<12}{'largest difference':>20}{'of the value':>14}{'at step':>9}")
        for number, name in enumerate(args.variants):
            lines = losses_of([*cache, *VARIANTS[name]], args, folder / str(number))
            found[name] = largest_differences(wanted, lines)
            for loss, row in found[name].items():
                print(
                    f"{name:<20}{loss:<12}{row['absolute']:>20.3g}{row['relative']:>14.3g}{row['step']:>9}", flush=True
                )
    if args.json:
        record = {**environment(), "steps": len(wanted), "plain": [line["loss"] for line in wanted], "largest": found}
        with write_together(args.json.parent) as part:
            part(args.json.name).write_text(to_json(record), encoding="utf-8")


if __name__ == "__main__":
    main()
