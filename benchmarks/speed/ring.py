"""Retrieval over several processes: what a model of its cost says, what was counted, and time and memory on disk.

    python -m benchmarks.speed.ring
    python -m benchmarks.speed.ring --on_disk 1000000 10000

The first command counts bytes, products and the peak memory of 1, 2 and 4 processes here, beside the model's, and
prints the model up to 100 million rows on 64 GPUs. The second ranks so many gallery rows, from a memory-mapped file,
for so many queries, and adds time and peak memory; it writes the file first.

The model, for each of P processes with N / P rows of D numbers of 4 bytes, Q queries, G gallery rows, k neighbours:

    a pass of rows R around the ring    sends (P - 1) / P R D 4 bytes
    cosine_topk                         one pass of G; Q G / P products of two rows
    rank_metrics                        two passes of G: scores of the matches, then counts; Q G / P products, and at
                                        most as many again for the scores: the model leaves them out
    k_reciprocal_rerank + metrics       N = Q + G: half a pass of N and keys back, N^2 / (2 P) products; one pass of N
                                        for the products within sets; all neighbour lists; V' of neighbours; two passes
                                        of G and V', Q G / P products

On a GPU, and with more than 64 neighbours, re-ranking computes N^2 / P products, with a whole pass of N.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.common import GIB, RESULTS, command_line, write_result
from kernels.tiles import STRIP_BYTES, STRIP_ROWS
from utils.reporting.report import text_table

COLUMNS = ["work", "queries", "gallery", "width", "processes", "sent GB", "10^9 products", "GiB", "counted", "where"]
WORKS = ("topk", "metrics", "rerank")
# Queries, gallery, width, and numbers of processes that are counted here.
COUNTED, COUNTED_PROCESSES = (2_000, 14_000, 256), (1, 2, 4)
# The largest: 100 million rows on 64 GPUs.
PAPER = [
    (11_659, 82_161, 512, 1), (11_659, 82_161, 512, 8), (10_000, 1_000_000, 512, 8),
    (100_000, 10_000_000, 512, 16), (1_000_000, 100_000_000, 512, 64),
]  # fmt: skip
K, K1, K2 = 50, 20, 6
# Entries of a row of V and V' at the size of MSMT17, and the bytes of an entry: column and value.
ENTRIES, MEAN_ENTRIES = 14, 44
WEIGHT_BYTES, VECTOR_BYTES = 16, 12


def model(work, num_queries, num_gallery, width, processes, symmetric=True):
    """{sent: bytes, products: of two rows, memory: bytes beyond the own features} of one process."""
    share, row = 1 / processes, 4 * width
    others = (processes - 1) / processes
    num_rows = num_queries + num_gallery
    # The own unit rows, and those of the shard at hand, beside two shards on their way.
    sides = num_queries if work != "rerank" else num_rows
    shards = num_gallery if work != "rerank" else num_rows
    memory = share * row * (sides + shards + 2 * shards * (processes > 1))
    # A strip of similarities and its mask; re-ranking has one of overlaps too.
    strip = min(STRIP_BYTES["cpu"], STRIP_ROWS * 4 * share * num_gallery)
    memory += strip * (1.25 if work != "rerank" else 2.25)
    ranking = num_queries * num_gallery * share
    if work == "topk":
        return {
            "sent": others * num_gallery * row,
            "products": ranking,
            "memory": memory + share * num_queries * K * 48,
        }
    if work == "metrics":
        return {"sent": 2 * others * num_gallery * row, "products": ranking, "memory": memory}
    # Steps of the pass that computes each product once, of `processes` - 1.
    steps = processes // 2 if symmetric else processes - 1
    lists = 8 * (K1 + 1)
    sent = share * num_rows * (steps * row + steps * (lists + 4) * symmetric)
    sent += others * num_rows * row
    sent += others * num_rows * lists / 2
    # The rows of V that are averaged over, other than the own one, and the numbers asked for.
    sent += others * min(share * num_rows * (K2 - 1), num_rows) * (ENTRIES * WEIGHT_BYTES + 16)
    sent += 2 * others * num_gallery * (row + 8 + MEAN_ENTRIES * VECTOR_BYTES)
    products = num_rows * num_rows * share / (2 if symmetric else 1) + ranking
    memory += num_rows * lists / 2 * 3 + share * num_rows * (MEAN_ENTRIES * VECTOR_BYTES * 3 + lists * 4)
    return {"sent": sent, "products": products, "memory": memory}


class Counter:
    """Counts what this process sends in the ring and gathers, and the products of two rows in large tiles."""

    def __init__(self):
        from kernels.ring.processes import Processes, Ring

        self.sent, self.products = 0, 0
        exchange, gather, product = Ring.exchange, Processes.gather, torch.mm

        def counted_exchange(ring, tensors, *more):
            self.sent += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            return exchange(ring, tensors, *more)

        def counted_gather(processes, tensor):
            self.sent += (processes.size - 1) * tensor.numel() * tensor.element_size()
            return gather(processes, tensor)

        def counted_product(one, other, **options):
            self.products += one.shape[0] * other.shape[1]
            return product(one, other, **options)

        Ring.exchange, Processes.gather, torch.mm = counted_exchange, counted_gather, counted_product


def call_of(work, sides, labels, group):
    from kernels import cosine_topk, k_reciprocal_rerank, rank_metrics

    if work == "topk":
        return lambda: cosine_topk(*sides, K, group=group)
    if work == "metrics":
        return lambda: rank_metrics(*sides, *labels, group=group)
    return lambda: k_reciprocal_rerank(*sides, k1=K1, k2=K2, group=group).metrics(*labels)


def features(num_queries, num_gallery, width):
    draw = torch.Generator().manual_seed(0)
    centres = torch.randn(max(2, num_gallery // 20), width, generator=draw)
    pids = [torch.randint(len(centres), (count,), generator=draw) for count in (num_queries, num_gallery)]
    sides = [centres[ids] + torch.randn(len(ids), width, generator=draw) for ids in pids]
    cameras = [torch.zeros_like(pids[0]), torch.ones_like(pids[1])]
    return sides, [*pids, *cameras]


def count_here(work, sizes, processes, threads=1):
    """Sent bytes, products and peak memory of every process, and the seconds, in processes of their own."""
    with tempfile.TemporaryDirectory() as folder:
        common = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        words = [sys.executable, "-m", __spec__.name, "--worker", work, *map(str, sizes), "--folder", folder]
        children = []
        for rank in range(processes):
            environment = os.environ | common | {"RANK": str(rank), "OMP_NUM_THREADS": str(threads)}
            children.append(os.spawnvpe(os.P_NOWAIT, words[0], words, environment))
        for child in children:
            if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
                raise ValueError(f"a process of {work} with {processes} processes failed; see above")
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(processes)]


def free_port():
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def worker(work, sizes, folder):
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    group = None
    if size > 1:
        dist.init_process_group("gloo")
        group = dist.group.WORLD
    from kernels.ring.processes import shares_of

    sides, labels = features(*sizes)
    given = [part.clone() for part in shares_of(group, *sides, *labels)]
    del sides, labels
    counter, begun = Counter(), memory("VmRSS")
    # From here on the peak is that of the call: what came before may have been more.
    Path("/proc/self/clear_refs").write_text("5")
    start = time.perf_counter()
    call_of(work, given[:2], given[2:], group)()
    seconds = time.perf_counter() - start
    numbers = {"sent": counter.sent, "products": counter.products, "seconds": seconds}
    numbers["memory"] = memory("VmHWM") - begun
    Path(folder, f"{rank}.json").write_text(json.dumps(numbers))
    if size > 1:
        dist.destroy_process_group()


def memory(name):
    """Bytes of this process: `VmRSS` now, `VmHWM` at most, `RssAnon` without the pages of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def on_disk(num_gallery, num_queries, width, folder):
    """Time and peak memory of the 50 nearest rows in a memory-mapped gallery, and of metrics."""
    from safetensors.torch import save_file

    from kernels import cosine_topk, rank_metrics
    from kernels.disk.rows import RowsOnDisk

    draw, paths, pids = torch.Generator().manual_seed(0), [], []
    centres = torch.randn(5000, width, generator=draw)
    for start in range(0, num_gallery, 100_000):
        ids = torch.randint(len(centres), (min(100_000, num_gallery - start),), generator=draw)
        paths.append(Path(folder) / f"{start}.safetensors")
        save_file({"features": centres[ids] + torch.randn(len(ids), width, generator=draw)}, paths[-1])
        pids.append(ids)
    gallery, gallery_pids = RowsOnDisk.open(paths), torch.cat(pids)
    query_pids = torch.randint(len(centres), (num_queries,), generator=draw)
    queries = centres[query_pids] + torch.randn(num_queries, width, generator=draw)
    labels = query_pids, gallery_pids, torch.zeros_like(query_pids), torch.ones_like(gallery_pids)
    rows = []
    for work, call in (
        ("topk", lambda: cosine_topk(queries, gallery, K)),
        ("metrics", lambda: rank_metrics(queries, gallery, *labels)),
    ):
        anonymous, start = Watched(), time.perf_counter()
        call()
        seconds = time.perf_counter() - start
        rows.append({"work": work, "seconds": seconds, "memory": anonymous.end(), "file": len(gallery) * width * 4})
    return rows


class Watched:
    """The peak of this process's memory without the pages of files, which the system can drop."""

    def __init__(self):
        import threading

        self.first, self.most, self.done = memory("RssAnon"), 0, threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()

    def watch(self):
        while not self.done.wait(0.05):
            self.most = max(self.most, memory("RssAnon"))

    def end(self):
        self.done.set()
        self.thread.join()
        return self.most - self.first


def table_of(raw):
    """Rows of the table: the model's numbers; `counted` are those of the largest process, where it was run."""
    rows = []
    for entry in raw["rows"]:
        said, found = entry["model"], entry.get("counted")
        numbers = [f"{said['sent'] / 1e9:.3g}", f"{said['products'] / 1e9:.3g}", f"{said['memory'] / GIB:.2f}"]
        counted = ""
        if found:
            largest = [max(process[name] for process in found) for name in ("sent", "products", "memory")]
            counted = f"{largest[0] / 1e9:.3g} / {largest[1] / 1e9:.3g} / {largest[2] / GIB:.2f}"
            counted += f", {max(process['seconds'] for process in found):.1f} s"
        sizes = [f"{size:,}" for size in entry["sizes"]]
        rows.append([entry["work"], *sizes, str(entry["processes"]), *numbers, counted, entry["where"]])
    for entry in raw["on_disk"]:
        sizes = [f"{size:,}" for size in entry["sizes"]]
        counted = f"- / - / {entry['memory'] / GIB:.2f}, {entry['seconds']:.1f} s"
        size = f"a file of {entry['file'] / GIB:.1f} GiB"
        rows.append([f"{entry['work']}, on disk", *sizes, "1", "0", "", "", counted, size])
    return COLUMNS, rows


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--on_disk", nargs=2, type=int, metavar=("GALLERY", "QUERIES"), help="rank from the disk too")
    parser.add_argument("--sizes", nargs=3, type=int, default=COUNTED, help="queries, gallery, width counted here")
    parser.add_argument("--processes", nargs="+", type=int, default=COUNTED_PROCESSES)
    parser.add_argument("--json", type=Path, default=RESULTS / "ring.json", help="default: benchmarks/results")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args(input_args)


def main(input_args=None):
    args = parse_args(input_args)
    if args.worker:
        return worker(args.worker[0], list(map(int, args.worker[1:])), args.folder)
    torch.set_num_threads(1)
    raw = {"rows": [], "on_disk": []}
    for work in WORKS:
        for processes in args.processes:
            sizes = list(args.sizes)
            entry = {"work": work, "sizes": sizes, "processes": processes, "where": "here"}
            entry |= {"model": model(work, *sizes, processes), "counted": count_here(work, sizes, processes)}
            raw["rows"].append(entry)
    for work in WORKS:
        for *sizes, processes in PAPER:
            entry = {"work": work, "sizes": sizes, "processes": processes, "where": "on paper, GPUs"}
            raw["rows"].append(entry | {"model": model(work, *sizes, processes, symmetric=False)})
    if args.on_disk:
        with tempfile.TemporaryDirectory() as folder:
            rows = on_disk(*args.on_disk, 512, folder)
        sizes = [args.on_disk[1], args.on_disk[0], 512]
        raw["on_disk"] = [row | {"sizes": sizes} for row in rows]
    columns, table = table_of(raw)
    print(text_table(columns, table))
    write_result(args.json, command_line(__spec__.name, input_args), columns, table, raw)
    return raw


if __name__ == "__main__":
    main()
