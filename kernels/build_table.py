"""Compile every Triton kernel ahead of time, without a GPU, and list registers, spills and shared memory.

python -m kernels.build_table
python -m kernels.build_table --arch 89 90 --json table.json
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ARCHITECTURES = (80, 86, 89, 90, 120)
SHARED_LIMIT = 96 << 10


def variants():
    """(name, kernel, pointer and number types, constants, warps, stages) of all kernels in their default shapes."""
    from .jaccard_triton import BLOCK, overlap_kernel
    from .ranking_triton import count_kernel, match_scores_kernel
    from .tiles_triton import FLOAT_CONFIG, HALF_CONFIG
    from .topk_triton import topk_kernel

    sizes = {"num_rows": "i32", "num_columns": "i32", "depth": "i32"}
    for label, element, config in (("float32", "fp32", FLOAT_CONFIG), ("half", "fp16", HALF_CONFIG)):
        config = dict(config)
        options = {name: config.pop(name) for name in ("num_warps", "num_stages")}
        scaled = element == "fp16"
        tile = {"queries": f"*{element}", "gallery": f"*{element}", "query_scale": "*fp32", "gallery_scale": "*fp32"}
        constants = {**config, "SCALED": scaled, "PRECISION": "ieee"}
        for k in (32, 64):
            types = {**tile, "keys_out": "*i64", "lowest_out": "*fp32", **sizes, "per_split": "i32"}
            yield f"topk k={k} {label}", topk_kernel, types, {**constants, "K": k, "ITSELF": True}, options
        integers = dict.fromkeys(("starts", "counts", "slots"), "*i64")
        types = {**tile, **integers, "scores_out": "*fp32", **sizes}
        yield f"match_scores {label}", match_scores_kernel, types, constants, options
        names = ("query_pids", "gallery_pids", "order", "begins", "ends", "scores", "indices")
        types = {**tile, **dict.fromkeys(names, "*i64"), "counts_out": "*i32", **sizes, "per_split": "i32"}
        types["scores"] = "*fp32"
        yield f"count {label}", count_kernel, types, constants, options
    names = ("shared", "rows", "columns", "values", "offsets", "other_rows", "other_values")
    types = dict.fromkeys(names, "*i64")
    types.update(dict.fromkeys(("shared", "values", "other_values"), "*i32"), width="i32")
    yield "overlap", overlap_kernel, types, {"BLOCK": BLOCK}, {"num_warps": 4, "num_stages": 2}


def build(kernel, types, constants, options, arch):
    """Registers, spill bytes and shared memory of one kernel on one architecture."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas

    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    # The launcher specialises kernels on aligned rows, which features usually have: this common case is measured.
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or name in ("depth", "per_split")
    }
    source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder) / "kernel.cubin", Path(folder) / "kernel.ptx"
        cubin.write_bytes(built.asm["cubin"])
        usage = run(tools / "cuobjdump", "-res-usage", cubin)
        ptx.write_text(built.asm["ptx"])
        target = re.search(r"\.target\s+(\w+)", built.asm["ptx"]).group(1)
        report = run(get_ptxas(arch).path, "-v", f"-arch={target}", ptx, "-o", Path(folder) / "again.cubin")
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    return {
        "registers": int(re.search(r"REG:(\d+)", usage).group(1)),
        "spill_bytes": int(spills.group(1)) + int(spills.group(2)),
        "shared_bytes": int(built.metadata.shared),
    }


def run(*command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed: {done.stderr.strip()}")
    return done.stdout + done.stderr


def build_table(architectures=ARCHITECTURES):
    """A row for each kernel and architecture: kernel, arch, registers, spill_bytes, shared_bytes."""
    return [
        {"kernel": name, "arch": arch, **build(kernel, types, constants, options, arch)}
        for name, kernel, types, constants, options in variants()
        for arch in architectures
    ]


def main(args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, help="compute capabilities, 89 for 8.9")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    args = parser.parse_args(args)
    rows = build_table(args.arch)
    print(f"{'kernel':<22}{'arch':>6}{'registers':>11}{'spills B':>10}{'shared KiB':>12}")
    for row in rows:
        shared = row["shared_bytes"] / 1024
        print(f"{row['kernel']:<22}{row['arch']:>6}{row['registers']:>11}{row['spill_bytes']:>10}{shared:>12.1f}")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 1 if any(row["spill_bytes"] or row["shared_bytes"] > SHARED_LIMIT for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
