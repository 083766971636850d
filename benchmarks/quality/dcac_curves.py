"""Loss curves of `train_dcac.py` with and without what makes it faster: the largest difference.

    python -m benchmarks.quality.dcac_curves --json benchmarks/results/dcac_curves.json

The runs are those of the demo and differ by one flag: latents from the cache (kept in half precision) or the VAE in
every step, compiled or not. The same run twice shows the difference that means nothing.
"""

import argparse
import json
import tempfile
from pathlib import Path

from benchmarks.common import checked, command_line, run_script, write_result
from utils.reporting.report import text_table

VARIANTS = {
    "again": [],
    "vae in every step": ["--cache_dir", "none"],
    "compiled": ["--torch_compile"],
    "recomputed": ["--gradient_checkpointing"],
}


def losses_of(flags, args, folder):
    """The lines of a run's log.jsonl."""
    words = ["--source", args.source, "--learning_rate", args.learning_rate, "--max_train_steps", args.steps]
    words += ["--validation_ids", 0, "--eval_every", 1000, "--output_dir", folder, *flags]
    checked(run_script("train_dcac.py", *words), f"train_dcac.py {' '.join(map(str, flags))}")
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def largest_differences(wanted, found):
    """{loss: {"absolute", "relative", "step"}}; both runs must have the same steps."""
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
    parser.add_argument("--json", type=Path, help="result file")
    args = parser.parse_args(input_args)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        cache = ["--cache_dir", folder / "cache"]
        wanted = losses_of(cache, args, folder / "plain")
        for number, name in enumerate(args.variants):
            lines = losses_of([*cache, *VARIANTS[name]], args, folder / str(number))
            found[name] = largest_differences(wanted, lines)
            print(text_table(*table_of({name: found[name]})), flush=True)
    if args.json:
        raw = {"steps": len(wanted), "plain": [line["loss"] for line in wanted], "largest": found}
        write_result(args.json, command_line(__spec__.name, input_args), *table_of(found), raw)


def table_of(largest):
    rows = [
        [variant, loss, f"{row['absolute']:.0e}", f"{row['relative']:.0e}", row["step"]]
        for variant, losses in largest.items()
        for loss, row in losses.items()
    ]
    return ["compared with the plain run", "loss", "largest difference", "of its value", "at step"], rows


if __name__ == "__main__":
    main()
