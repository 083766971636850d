"""Ranking and re-ranking against public code: correctness first, then time, peak memory and the ratio to pure GEMM.

    python -m benchmarks.speed.retrieval --sizes S M L --peers torchreid fastreid graph --peer_dir PEERS

The peers are no dependency; `retrieval_peers.py` says how PEERS is made. Every measurement runs in a process of its
own, and the contenders take turns. Memory is the peak above that of the process with its features. GEMM is `torch.mm`
with `out=` of the same operations, timed before and after in the same process (on at most 8,192 rows, scaled).

The rank correlation is Spearman's, with the exact re-ranked distances, over the gallery, mean of 200 queries.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr

from benchmarks.common import GIB, RESULTS, command_line, run_worker, write_result
from benchmarks.speed.reid_features import SIZES, reid_features
from benchmarks.speed.retrieval_peers import GRAPH, PEERS
from kernels import k_reciprocal_rerank, rank_metrics
from kernels.ranking import rank_metrics_reference
from kernels.reranking import k_reciprocal_rerank_reference
from kernels.tiles import cosine_reference
from utils.reporting.report import text_table

GEMM_ROWS, GEMM_SAMPLE = 1024, 8192
# Re-ranking by most of them takes N x N matrices, which do not fit past these sizes.
PEER_SIZES = ("S", "M")
OURS = "ours"
COLUMNS = ["size", "work", "who", "seconds", "GEMM", "ratio", "GiB", "mAP", "Rank-1", "rank correlation"]


def ids_of(data):
    return [data[name] for name in ("query_pids", "gallery_pids", "query_cams", "gallery_cams")]


def ours(work, data):
    queries, gallery = torch.from_numpy(data["queries"]), torch.from_numpy(data["gallery"])
    if work == "metrics":
        result = rank_metrics(queries, gallery, *ids_of(data))
    else:
        result = k_reciprocal_rerank(queries, gallery).metrics(*ids_of(data))
    assert result.backend == "torch"
    return result.mAP, float(result.cmc[0])


def gemm_seconds(left, right):
    """Seconds of all products of left and right rows, `out=` given."""
    left, right = torch.from_numpy(left), torch.from_numpy(right)
    out = torch.empty(min(GEMM_ROWS, len(left)), len(right))
    sample = left[: max(GEMM_SAMPLE // GEMM_ROWS * GEMM_ROWS, 1)]
    torch.mm(sample[: out.shape[0]], right.t(), out=out)
    start = time.perf_counter()
    for block in sample.split(GEMM_ROWS):
        torch.mm(block, right.t(), out=out[: len(block)])
    return (time.perf_counter() - start) * len(left) / len(sample)


def same_operations(work, data):
    seconds = gemm_seconds(data["queries"], data["gallery"])
    if work == "rerank":
        rows = np.concatenate([data["queries"], data["gallery"]])
        seconds += gemm_seconds(rows, rows)
    return seconds


def status(field):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def measure(args):
    """Run one contender once and print what it took: the child process."""
    data = dict(np.load(args.features))
    # Of a few rows first: what is imported or built at first use counts for none.
    contend(args, {name: array[: 100 if name.startswith("quer") else 1000] for name, array in data.items()})
    before = same_operations(args.work, data)
    # The peak is reset, so that it is the contender's own.
    Path("/proc/self/clear_refs").write_text("5")
    resident = status("VmRSS")
    start = time.perf_counter()
    distances, (mean, first) = contend(args, data)
    seconds = time.perf_counter() - start
    peak = status("VmHWM") - resident
    gemm = (before + same_operations(args.work, data)) / 2
    found = {"seconds": seconds, "gemm": gemm, "gib": peak / GIB, "mAP": mean, "rank1": first}
    if args.worker != OURS and args.work == "rerank":
        found["correlation"] = correlation(distances, data)
    print(json.dumps(found))


def contend(args, data):
    """(distances of a peer, (mAP, rank-1)) of one contender."""
    if args.worker == OURS:
        return None, ours(args.work, data)
    peer = PEERS[args.worker]
    distances = peer.distances(args.work, data, args.peer_dir)
    return distances, peer.ranked(distances, ids_of(data), args.peer_dir)


def correlation(distances, data, most=200):
    """Mean of Spearman's rank correlations with the exact re-ranked distances."""
    exact = k_reciprocal_rerank(*(torch.from_numpy(data[name]) for name in ("queries", "gallery"))).dense()
    pairs = zip(exact[:most].numpy(), distances[:most], strict=True)
    return statistics.fmean(float(spearmanr(*pair).statistic) for pair in pairs)


def check(args):
    """Largest differences on a part of size S: against float64 references, and against torchreid where it is there."""
    data = reid_features("S", args.seed)
    # The references take a row at a time: a part of the set is enough for them.
    for name in data:
        data[name] = data[name][: 100 if name.startswith("query") or name == "queries" else 1000]
    queries, gallery = torch.from_numpy(data["queries"]), torch.from_numpy(data["gallery"])
    ids = [torch.from_numpy(array) for array in ids_of(data)]
    result = rank_metrics(queries, gallery, *ids)
    ranks = rank_metrics_reference(cosine_reference(queries.double(), gallery.double()), *ids)
    want = torch.tensor([float((torch.arange(1, len(r) + 1) / r.double()).mean()) for r in ranks], dtype=torch.float64)
    found = {"AP against float64": float((result.ap - want).abs().nan_to_num().max())}
    dense = k_reciprocal_rerank(queries, gallery).dense()
    want = k_reciprocal_rerank_reference(queries.double(), gallery.double())
    found["re-ranked distance against float64"] = float((dense - want).abs().max())
    for name in args.peers:
        peer = PEERS[name]
        if name != GRAPH:
            mean, first = peer.ranked(peer.distances("metrics", data, args.peer_dir), ids_of(data), args.peer_dir)
            found[f"mAP, rank-1 against {name}"] = max(abs(mean - result.mAP), abs(first - float(result.cmc[0])))
            other = torch.from_numpy(peer.distances("rerank", data, args.peer_dir))
            found[f"re-ranked distance against {name}"] = float((dense - other).abs().max())
    for name, value in found.items():
        print(f"largest difference, {name}: {value:.1e}", flush=True)
    for name, value in found.items():
        if "float64" in name and value > 1e-5:
            raise SystemExit(f"{name} differs by {value}: no timing")
    return found


def rows_of(measured):
    return [
        [row["size"], row["work"], row["who"]]
        + [f"{row[key]:.{digits}f}" for key, digits in (("seconds", 2), ("gemm", 2), ("ratio", 2), ("gib", 2))]
        + [f"{row[key]:.4f}" for key in ("mAP", "rank1")]
        + [f"{row['correlation']:.3f}" if "correlation" in row else ""]
        for row in measured
    ]


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["S", "M"], choices=SIZES, help="default S M")
    works = ["metrics", "rerank"]
    parser.add_argument("--works", nargs="+", default=works, choices=works, help="default both")
    parser.add_argument("--peers", nargs="*", default=[], choices=PEERS, help="default none")
    parser.add_argument("--peer_dir", type=Path, help="folder the peers were installed into")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each contender; the median counts (L: one run)")
    parser.add_argument("--seed", type=int, default=0, help="of the features; default 0")
    parser.add_argument("--json", type=Path, default=RESULTS / "retrieval.json", help="default benchmarks/results")
    parser.add_argument("--worker", choices=[OURS, *PEERS], help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--features", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(input_args)
    if args.peers and args.peer_dir is None:
        parser.error("--peers needs --peer_dir, the folder they were installed into")
    return args


def main(input_args=None):
    args = parse_args(input_args)
    if args.worker:
        measure(args)
        return
    raw = {"differences": check(args), "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        for size in args.sizes:
            features = Path(folder) / f"{size}.npz"
            np.savez(features, **reid_features(size, args.seed))
            for work in args.works:
                raw["rows"] += compare(args, size, work, features)
                command = command_line(__spec__.name, input_args)
                write_result(args.json, command, COLUMNS, rows_of(raw["rows"]), raw)
    print(text_table(COLUMNS, rows_of(raw["rows"])))


def compare(args, size, work, features):
    """Rows of all contenders for one work at one size."""
    names = [OURS] + [peer for peer in args.peers if size in PEER_SIZES]
    if work == "metrics" and GRAPH in names:
        names.remove(GRAPH)
    runs = {name: [] for name in names}
    peers = ["--peer_dir", args.peer_dir] if args.peer_dir else []
    for _ in range(1 if size == "L" else args.rounds):
        for name in names:
            words = ["--worker", name, "--work", work, "--features", features, *peers]
            runs[name].append(run_worker(__spec__.name, *words))
            print(f"size {size}, {work}, {name}: {runs[name][-1]['seconds']:.2f} s", flush=True)
    rows = []
    for name, measured in runs.items():
        row = {"size": size, "work": work, "who": name, "runs": measured}
        row.update({key: statistics.median(run[key] for run in measured) for key in measured[0]})
        row["ratio"] = statistics.median(run["seconds"] / run["gemm"] for run in measured)
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
