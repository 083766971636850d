"""One epoch's labels of each method of adapt_reid.py at the size of a public training set: seconds, peak memory.

    python -m benchmarks.speed.labels
    python -m benchmarks.speed.labels --images 4000 --methods pplr ice

Clustering, and what a method derives from it: memories, classifiers, proxies, agreement of parts, distances between
cameras and source. Extracting the features is not counted. Every method runs in a process of its own with one thread;
memory is the peak above that of the process with its features. `N x N` is what one matrix of all pairs would take.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from transformers import ResNetConfig, ResNetModel

from benchmarks.common import GIB, RESULTS, command_line, run_worker, write_result
from benchmarks.speed.reid_features import DEPTH, reid_features
from benchmarks.speed.retrieval import status
from methods.settings import NAMES
from utils.modeling.reid_model import ReIDModel
from utils.reporting.report import text_table

# MSMT17's: images, identities, cameras.
IMAGES, IDENTITIES, CAMERAS = 32621, 1041, 15
SOURCE = (751, 12936)
# GLT's published ones.
GROUPS = (600, 700, 800)
SETTINGS = "--eps 0.5 --min_samples 4 --cluster_k1 30 --cluster_k2 6 --jaccard faiss"
COLUMNS = ["method", "images", "seconds", "of these clustering", "peak GiB", "N x N GiB"]


def small_encoder():
    """A small ResNet whose features are as wide as those that are labelled."""
    config = ResNetConfig(embedding_size=16, hidden_sizes=[32, DEPTH], depths=[1, 1], layer_type="basic")
    with tempfile.TemporaryDirectory() as folder:
        ResNetModel(config).save_pretrained(folder)
        return ReIDModel.for_training(folder, num_ids=0, image_size=(64, 32))


def measure(name, images):
    """{seconds, clustering, peak_gib} of one epoch's labels."""
    import adapt_reid

    torch.set_num_threads(1)
    identities = max(8, IDENTITIES * images // IMAGES)
    sets = reid_features((1, images, identities, CAMERAS, 0.0))
    features, cameras = (torch.from_numpy(sets[key]) for key in ("gallery", "gallery_cams"))
    adaptation = name in adapt_reid.METHODS["adaptation"] and name not in adapt_reid.METHODS["unsupervised"]
    words = ["--target", "x", "--method", name, *SETTINGS.split()]
    words += ["--group_counts", *map(str, GROUPS)] if name == "glt" else []
    args = adapt_reid.parse_args([*words, *(["--setting", "adaptation", "--source", "y"] if adaptation else [])])
    num_source, source_size = SOURCE if adaptation else (0, 0)
    method = adapt_reid.MODULES[name](small_encoder(), args, num_source, cameras, source_size=source_size)
    generator, seconds = torch.Generator().manual_seed(0), []

    def target(model=None):
        if model is None:
            return features
        parts = [features + 0.02 * torch.randn(features.shape, generator=generator) for _ in method.necks]
        return torch.cat([features, *parts], dim=1)

    def source(rows=None):
        count = num_source if rows is None else len(rows)
        return nn.functional.normalize(torch.randn(count, DEPTH, generator=generator), dim=1)

    def clustered(rows_of, rows=None):
        start = time.perf_counter()
        found = adapt_reid.of(method, "clusterings")(rows_of, args, None)
        seconds.append(time.perf_counter() - start)
        return adapt_reid.of(method, "labels_of")(found, None)[0]

    # The last epoch: CaCL has all cameras then; UNRN and GLT first train on the source.
    epoch = {"cacl": args.num_train_epochs, "unrn": args.source_epochs + 1, "glt": args.source_epochs + 1}.get(name, 1)
    whole = target(method) if name == "pplr" else features
    Path("/proc/self/clear_refs").write_text("5")
    before, start = status("VmRSS"), time.perf_counter()
    with torch.no_grad():
        labels = method.relabel(epoch, lambda model=None: whole, source, clustered)
    total = time.perf_counter() - start
    assert int(labels.max()) > 1
    return {"seconds": total, "clustering": sum(seconds), "peak_gib": (status("VmHWM") - before) / GIB}


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=NAMES, default=NAMES, help="default all")
    parser.add_argument("--images", type=int, default=IMAGES, help=f"default {IMAGES}, MSMT17's training images")
    parser.add_argument("--json", type=Path, default=RESULTS / "labels.json", help="default benchmarks/results")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args(input_args)


def main(input_args=None):
    args = parse_args(input_args)
    if args.worker:
        print(json.dumps(measure(args.worker, args.images)))
        return
    raw = {"images": args.images, "methods": {}}
    for name in args.methods:
        words = "--worker", name, "--images", args.images
        raw["methods"][name] = run_worker(__spec__.name, *words, environment={"OMP_NUM_THREADS": "1"})
        print(rows_of(raw)[-1], flush=True)
    write_result(args.json, command_line(__spec__.name, input_args), COLUMNS, rows_of(raw), raw)
    print(text_table(COLUMNS, rows_of(raw)))


def rows_of(raw):
    images = raw["images"]
    return [
        [
            name,
            f"{images:,}",
            f"{found['seconds']:.0f}",
            f"{found['clustering']:.0f}",
            f"{found['peak_gib']:.2f}",
            f"{4 * images**2 / GIB:.2f}",
        ]
        for name, found in raw["methods"].items()
    ]


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"benchmarks.speed.labels: {error}")
