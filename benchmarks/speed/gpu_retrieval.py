"""All Triton kernels on this machine's GPU: checked against references, then timed at the sizes of public sets.

    python -m benchmarks.speed.gpu_retrieval
    python -m benchmarks.speed.gpu_retrieval --sizes M --dtypes float32 --rounds 10

Both paths take turns. A time is the median of the rounds, beside its share of the card's GEMM rate, which is measured
in between; peak memory is that above the features. Without a GPU, Triton interprets the kernels at a small size:
values are checked, nothing is timed or written. `kernels.measured` chooses between the paths, on a sample.
"""

import argparse
import os
import statistics
import time
from pathlib import Path

import torch

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import triton

from benchmarks.common import GIB, RESULTS, command_line, write_result
from benchmarks.speed.reid_features import SIZES, reid_features
from kernels import cosine_topk, k_reciprocal_rerank, rank_metrics
from kernels.dispatch import full_precision
from kernels.reranking import k_reciprocal_rerank_reference
from kernels.tiles import cosine_reference
from kernels.topk_triton import launch_topk
from utils.reporting.report import text_table

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
COLUMNS = ["size", "dtype", "work", "path", "seconds", "TFLOP/s", "of GEMM", "GiB"]


def load(size, device, dtype, part=None):
    """Features and ids of one size; `part` (queries, gallery) takes the first of them only."""
    data = reid_features(size)
    num_queries, num_gallery = part or (len(data["queries"]), len(data["gallery"]))
    data = {
        name: torch.from_numpy(array[: num_queries if "quer" in name else num_gallery]).to(device)
        for name, array in data.items()
    }
    ids = [data[name] for name in ("query_pids", "gallery_pids", "query_cams", "gallery_cams")]
    return data["queries"].to(dtype), data["gallery"].to(dtype), ids


def check(device, dtype, part):
    """Largest differences of the Triton path from float64 references; SystemExit where they are too large."""
    queries, gallery, ids = load("S", device, dtype, part)
    exact = cosine_reference(queries.double(), gallery.double())
    found = {}
    for k in (1, 20, 64):
        result = cosine_topk(queries, gallery, k, backend="triton")
        want = exact.sort(dim=1, descending=True).values[:, :k]
        found[f"topk {k}: scores"] = (result.scores - want).abs().max()
        found[f"topk {k}: scores of the indices"] = (exact.gather(1, result.indices) - want).abs().max()
        assert result.backend == "triton"
    for precision in ("ieee", "tf32x3"):
        scores, _, lowest = launch_topk(queries, gallery, 20, precision=precision)
        found[f"{precision}: scores"] = (scores - exact.sort(dim=1, descending=True).values[:, :20]).abs().max()
        found[f"{precision}: row minimum"] = (lowest - exact.amin(1)).abs().max()
    repeated = queries[:1].expand(300, -1)
    ties = cosine_topk(queries[:2], repeated, 50, backend="triton").indices
    found["ties out of order"] = (ties != torch.arange(50, device=device)).sum()
    ours = rank_metrics(queries, gallery, *ids, backend="triton")
    want = rank_metrics(queries.double(), gallery.double(), *ids, backend="torch")
    # A rank may move by one where two similarities are within the rounding of float32.
    found["AP"] = (ours.ap - want.ap).abs().nan_to_num().max()
    ours = k_reciprocal_rerank(queries, gallery, backend="triton")
    want = k_reciprocal_rerank_reference(queries.double().cpu(), gallery.double().cpu())
    found["re-ranked distance"] = (ours.dense() - want).abs().max()
    found = {name: float(value) for name, value in found.items()}
    for name, value in found.items():
        print(f"  {name:<34}{value:.1e}", flush=True)
        if value > (1e-3 if name == "AP" else 1e-5):
            raise SystemExit(f"{name} differs by {value}: no timing")
    return found


def works(queries, gallery, ids):
    """Name -> (call taking the backend, number of multiply-adds)."""
    num_queries, depth = queries.shape
    num_rows = num_queries + gallery.shape[0]
    ranking = num_queries * gallery.shape[0] * depth
    return {
        "cosine_topk": (lambda path: cosine_topk(queries, gallery, 50, backend=path), ranking),
        "rank_metrics": (lambda path: rank_metrics(queries, gallery, *ids, backend=path), ranking),
        "k_reciprocal_rerank": (
            lambda path: k_reciprocal_rerank(queries, gallery, backend=path).metrics(*ids),
            ranking + num_rows * num_rows * depth,
        ),
    }


def seconds_of(call):
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def gemm_call(queries, gallery):
    """A product of the same shape, at most 4,096 rows of it, with `out=`, and its multiply-adds."""
    left = queries[:4096]
    out = torch.empty(left.shape[0], gallery.shape[0], dtype=left.dtype, device=left.device)
    return lambda: torch.mm(left, gallery.t(), out=out), out.numel() * left.shape[1]


def measure(size, name, device, rounds):
    """Rows of time, TFLOP/s, share of the GEMM rate and peak memory for both paths."""
    queries, gallery, ids = load(size, device, DTYPES[name])
    rows = []
    for work, (call, operations) in works(queries, gallery, ids).items():
        peaks, times, gemm_times = {}, {"torch": [], "triton": []}, []
        for path in times:
            call(path)
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
            call(path)
            peaks[path] = (torch.cuda.max_memory_allocated() - held) / GIB
        product, product_operations = gemm_call(queries, gallery)
        with full_precision():
            seconds_of(product)
            for _ in range(rounds):
                for path in times:
                    gemm_times.append(seconds_of(product))
                    times[path].append(seconds_of(lambda call=call, path=path: call(path)))
        rate = 2 * product_operations / statistics.median(gemm_times) / 1e12
        for path, taken in times.items():
            seconds = statistics.median(taken)
            flops = 2 * operations / seconds / 1e12
            row = {"size": size, "dtype": name, "work": work, "path": path, "seconds": seconds, "runs": taken}
            row.update(tflops=flops, gemm_tflops=rate, share=flops / rate, gib=peaks[path])
            rows.append(row)
            print(*table_of([row])[0], flush=True)
        del product
    return rows


def table_of(rows):
    return [
        [row["size"], row["dtype"], row["work"], row["path"], f"{row['seconds']:.4f}"]
        + [f"{row['tflops']:.1f}", f"{row['share']:.2f}", f"{row['gib']:.2f}"]
        for row in rows
    ]


def main(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["M", "L"], choices=SIZES, help="default M L")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES, help="default all")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each path; the median counts; default 5")
    parser.add_argument("--json", type=Path, default=RESULTS / "retrieval_gpu.json", help="default benchmarks/results")
    args = parser.parse_args(input_args)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    card = torch.cuda.get_device_name() if on_gpu else "none: Triton's interpreter at a small size"
    print(f"card: {card}; torch {torch.__version__}, triton {triton.__version__}")
    raw = {"differences": {}, "rows": []}
    for name in args.dtypes:
        print(f"largest differences, {name}")
        raw["differences"][name] = check(device, DTYPES[name], (100, 1000) if on_gpu else (20, 300))
    if not on_gpu:
        print("no GPU: nothing was timed and nothing written")
        return
    command = command_line(__spec__.name, input_args)
    for size in args.sizes:
        for name in args.dtypes:
            raw["rows"] += measure(size, name, device, args.rounds)
            table = table_of(raw["rows"])
            write_result(args.json, command, COLUMNS, table, raw, card=card, triton=triton.__version__)
    print(text_table(COLUMNS, table_of(raw["rows"])))


if __name__ == "__main__":
    main()
