"""Pseudo labels at the sizes of public training sets: correctness first, then seconds and peak memory on one core.

    python -m benchmarks.speed.clustering
    python -m benchmarks.speed.clustering --sizes market msmt --dense market msmt
    python -m benchmarks.speed.clustering --dense market msmt --published FOLDER   # SpCL's faiss_rerank.py and faiss

Ours is `utils.training.clustering.cluster`: sparse k-reciprocal Jaccard distances, DBSCAN on the sparse graph. `dense`
has the shape of published pseudo-label code: k1 nearest neighbours, V and the distances as N x N arrays, a loop over
rows, then scikit-learn's DBSCAN on the matrix. `published` is the code of SpCL (github.com/yxgeee/SpCL) itself, and
replaces `dense`. Their distances differ a little by design: k1 neighbours instead of k1 + 1, and no division by the
largest distance. Every measurement runs in a process of its own with one thread; memory is the peak above that of the
process with its features.
"""

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
import time
import types
from pathlib import Path

import numpy as np
import torch
from sklearn.cluster import DBSCAN
from sklearn.metrics import adjusted_rand_score

from benchmarks.common import GIB, RESULTS, command_line, run_worker, write_result
from benchmarks.speed.reid_features import reid_features
from benchmarks.speed.retrieval import status
from kernels.jaccard_graph import jaccard_graph
from kernels.reranking import k_reciprocal_rerank_reference
from utils.evaluation.groups.clusters import agreement
from utils.reporting.report import text_table
from utils.training.clustering import cluster

# In the order of `reid_features`; the gallery is clustered.
SIZES = {"small": (1, 4000, 250, 6, 0.0), "market": (1, 12936, 751, 6, 0.0), "msmt": (1, 32621, 1041, 15, 0.0)}
SETTINGS = {"eps": 0.5, "min_samples": 4, "k1": 30, "k2": 6}


def ours(features):
    return cluster(torch.from_numpy(features), **SETTINGS).labels.numpy()


def dense(features):
    return DBSCAN(eps=SETTINGS["eps"], min_samples=SETTINGS["min_samples"], metric="precomputed").fit_predict(
        dense_distances(features, SETTINGS["k1"], SETTINGS["k2"])
    )


def dense_distances(features, k1, k2):
    """N x N float32, as the public implementations hold it."""
    rows, count = torch.from_numpy(features), len(features)
    near = torch.cat([(block @ rows.t()).topk(k1, dim=1).indices for block in rows.split(1024)]).numpy()
    half = near[:, : int(np.around(k1 / 2)) + 1]
    sets = [row[(near[row] == i).any(1)] for i, row in enumerate(near)]
    inner = [row[(half[row] == i).any(1)] for i, row in enumerate(half)]
    vectors = np.zeros((count, count), dtype=np.float32)
    for i, own in enumerate(sets):
        members = own
        for candidate in own:
            if len(np.intersect1d(inner[candidate], own)) > 2 / 3 * len(inner[candidate]):
                members = np.append(members, inner[candidate])
        members = np.unique(members)
        weights = np.exp(-(2 - 2 * features[members] @ features[i]))
        vectors[i, members] = weights / weights.sum()
    averaged = np.zeros_like(vectors)
    for i, row in enumerate(near):
        averaged[i] = vectors[row[:k2]].mean(0)
    vectors = averaged
    del averaged
    inverted = [np.flatnonzero(vectors[:, column]) for column in range(count)]
    distance = np.zeros((count, count), dtype=np.float32)
    for i in range(count):
        overlap = np.zeros(count, dtype=np.float32)
        for column in np.flatnonzero(vectors[i]):
            overlap[inverted[column]] += np.minimum(vectors[i, column], vectors[inverted[column], column])
        distance[i] = 1 - overlap / (2 - overlap)
    return np.maximum(distance, 0)


def published(features, folder):
    """SpCL's own file, searching on the CPU, which needs only the index of its helpers."""
    sys.path.insert(0, str(folder))
    import faiss

    helpers = types.ModuleType("published.faiss_utils")
    helpers.index_init_cpu = faiss.IndexFlatL2
    helpers.index_init_gpu = helpers.search_index_pytorch = helpers.search_raw_array_pytorch = None
    sys.modules |= {"published": types.ModuleType("published"), helpers.__name__: helpers}
    spec = importlib.util.spec_from_file_location("published.faiss_rerank", folder / "faiss_rerank.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    faiss.omp_set_num_threads(1)
    k1, k2 = SETTINGS["k1"], SETTINGS["k2"]
    distance = module.compute_jaccard_distance(torch.from_numpy(features), k1, k2, print_flag=False, search_option=3)
    return DBSCAN(eps=SETTINGS["eps"], min_samples=SETTINGS["min_samples"], metric="precomputed").fit_predict(distance)


CONTENDERS = {"ours": ours, "dense": dense, "published": published}


def check():
    """Against the definition in float64, and against DBSCAN on the whole matrix."""
    features = torch.from_numpy(reid_features(SIZES["small"])["gallery"])
    part, half = features[:600], 300
    found = matrix_of(part)[:half, half:]
    want = k_reciprocal_rerank_reference(
        part[:half].double(), part[half:].double(), SETTINGS["k1"], SETTINGS["k2"], 0.0
    )
    difference = float((found.double() - want).abs().max())
    whole = matrix_of(features).numpy()
    eps, least = SETTINGS["eps"], SETTINGS["min_samples"]
    labels = DBSCAN(eps=eps, min_samples=least, metric="precomputed").fit_predict(whole)
    equal = bool((cluster(features, **SETTINGS).labels.numpy() == labels).all())
    print(f"largest difference of a distance from the definition in float64, 600 rows: {difference:.1e}")
    print(f"labels of 4,000 rows are those of scikit-learn's DBSCAN on the whole matrix: {equal}", flush=True)
    if difference > 1e-5 or not equal:
        raise SystemExit("the results are wrong: no timing")
    return {"distance_against_float64": difference, "labels_equal_dense_dbscan": equal}


def matrix_of(features):
    graph = jaccard_graph(features, k1=SETTINGS["k1"], k2=SETTINGS["k2"])
    rows = torch.repeat_interleave(torch.arange(len(features)), graph.near.counts)
    return torch.ones(len(features), len(features)).index_put_((rows, graph.near.columns), graph.near.values)


def measure(args):
    """Run one contender once and print what it took: the child process."""
    torch.set_num_threads(1)
    features = np.load(args.features)["gallery"]
    # The peak is reset, so that it is the contender's own.
    Path("/proc/self/clear_refs").write_text("5")
    resident = status("VmRSS")
    start, spent = time.perf_counter(), time.process_time()
    labels = CONTENDERS[args.worker](features, *([args.published] if args.worker == "published" else []))
    found = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - spent}
    np.save(args.labels, labels)
    print(json.dumps(found | {"gib": (status("VmHWM") - resident) / GIB}))


def table_of(rows):
    """(columns, rows): ours beside the other code, a row for each number of images."""
    by_images = {}
    for row in rows:
        by_images.setdefault(row["images"], {})["ours" if row["who"] == "ours" else "other"] = row
    table = [
        [
            f"{images:,}",
            *(
                text
                for name in ("ours", "other")
                for text in (
                    (f"{who[name]['cpu_seconds']:.0f} s", f"{who[name]['gib']:.1f}") if name in who else ("-", "-")
                )
            ),
        ]
        for images, who in by_images.items()
    ]
    other = "SpCL's code" if any(row["who"] == "published" for row in rows) else "dense code"
    return ["images", "ours, one core", "GiB", other, "GiB"], table


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["market", "msmt"], choices=SIZES, help="default market msmt")
    parser.add_argument(
        "--dense", nargs="*", default=["market"], choices=SIZES, help="sizes at which N x N arrays fit; default market"
    )
    parser.add_argument(
        "--published", type=Path, help="folder with faiss_rerank.py and faiss, measured at the sizes of --dense"
    )
    parser.add_argument("--rounds", type=int, default=1, help="runs of each contender; the median counts; default 1")
    parser.add_argument("--json", type=Path, default=RESULTS / "clustering.json", help="default benchmarks/results")
    parser.add_argument("--worker", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--features", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--labels", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(input_args)


def main(input_args=None):
    args = parse_args(input_args)
    if args.worker:
        measure(args)
        return
    raw = {"settings": SETTINGS, "checked": check(), "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for size in args.sizes:
            data = reid_features(SIZES[size])
            np.savez(folder / f"{size}.npz", gallery=data["gallery"])
            peer = "published" if args.published else "dense"
            labels = {}
            for who in ["ours", *([peer] if size in args.dense else [])]:
                row = {"size": size, "images": len(data["gallery"]), "who": who}
                row |= measured(who, folder / f"{size}.npz", folder / f"{who}.npy", args)
                labels[who] = np.load(folder / f"{who}.npy")
                row |= {"clusters": int(labels[who].max()) + 1, "noise": float((labels[who] < 0).mean())}
                row |= agreement(labels[who], data["gallery_pids"])
                if who != "ours":
                    row["ari_with_ours"] = float(adjusted_rand_score(labels["ours"], labels[who]))
                raw["rows"].append(row)
                print(f"{size}, {who}: {row['seconds']:.1f} s, {row['clusters']:,} clusters", end=", ", flush=True)
                print(f"noise {row['noise']:.3f}, ARI {row['ari']:.3f}", flush=True)
                write_result(args.json, command_line(__spec__.name, input_args), *table_of(raw["rows"]), raw)
    print(text_table(*table_of(raw["rows"])))


def measured(who, features, labels, args):
    """All runs of a contender and their medians; its labels go into a file."""
    words = ["--worker", who, "--features", features, "--labels", labels]
    words += ["--published", args.published] if args.published else []
    one_thread = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
    runs = [run_worker(__spec__.name, *words, environment=one_thread) for _ in range(args.rounds)]
    return {"runs": runs} | {key: statistics.median(run[key] for run in runs) for key in runs[0]}


if __name__ == "__main__":
    main()
