"""Which path is faster on a card: measured once for each operation, type and size, and remembered.

    path = faster("cosine_topk", features, num_columns=82_161, k=50)

Both paths run on a sample and must agree; the faster one is written to `kernels.json` in the cache folder,
`~/.cache/diffreid` or DIFFREID_CACHE. Another card, driver, torch or triton is measured again, and everything is where
the file cannot be read. Where the Triton kernels disagree, the choice is torch, with a warning; and so it is where a
measurement fails, for as long as the process lives: the card's memory may have been full. Small work is torch's.
"""

import functools
import json
import logging
import os
import statistics
import time
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

# The sample: as large as the work, at most so many rows of queries and gallery.
MOST_ROWS = {"cosine_topk": (4096, 32768), "rank_metrics": (4096, 32768), "k_reciprocal_rerank": (2048, 16384)}
# Products of numbers below which nothing is measured: torch takes milliseconds for them.
LEAST_PRODUCTS = 1 << 30
ROUNDS = 3
# The largest difference of scores and AP, beside one rank that moved where two similarities are within rounding.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-3, torch.bfloat16: 1e-3}
KNOWN = {}


def faster(operation, features, num_columns, k=1, *, clock=None, path=None):
    """`torch` or `triton`: the faster one for such work. `clock` runs a call and gives its seconds."""
    if features.shape[0] * features.shape[1] * num_columns < LEAST_PRODUCTS:
        return "torch"
    sizes = size_class(operation, features.shape, num_columns, k)
    key = " | ".join([*machine(features.device), operation, str(features.dtype).removeprefix("torch."), *sizes])
    path = path or remembered_in()
    if (path, key) not in KNOWN:
        entry = read(path).get(key)
        if entry is None:
            on_card = functools.partial(seconds_on_card, device=features.device)
            entry = measure(operation, features.device, features.dtype, sizes, clock or on_card)
            if "error" not in entry:
                remember(path, key, entry)
        KNOWN[path, key] = entry["path"]
    return KNOWN[path, key]


def size_class(operation, shape, num_columns, k):
    """Rows of queries and gallery, width, neighbours, each up to the next power of two."""
    most = MOST_ROWS[operation]
    rows, columns, width = (1 << max(4, int(count - 1).bit_length()) for count in (shape[0], num_columns, shape[1]))
    # Triton's kernel has registers for 16, 32 or 64 neighbours.
    width_of_lists = 1 << max(4, int(k - 1).bit_length())
    return [str(value) for value in (min(rows, most[0]), min(columns, most[1]), width, width_of_lists)]


def machine(device):
    """The card and the versions that decide which path is faster."""
    if device.type == "cuda":
        name, driver = torch.cuda.get_device_name(device), driver_version()
    else:
        name, driver = device.type, "no driver"
    # Its distribution has other names on some platforms.
    import triton

    return name, driver, f"torch {torch.__version__}", f"triton {triton.__version__}"


def driver_version():
    """Of the NVIDIA driver, as the kernel module says it; else the version of CUDA or HIP."""
    try:
        first = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").splitlines()[0]
        return next(word for word in first.split() if word[0].isdigit() and "." in word)
    except (OSError, IndexError, StopIteration):
        return f"cuda {torch.version.cuda or torch.version.hip}"


def remembered_in():
    return Path(os.environ.get("DIFFREID_CACHE") or "~/.cache/diffreid").expanduser() / "kernels.json"


def read(path):
    """The choices in a file; none where there is no file, or a damaged one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {key: entry for key, entry in content.items() if entry["path"] in ("torch", "triton")}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def remember(path, key, entry):
    """Add a choice to the file; a folder that cannot be written to is no error, then every process measures."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(read(path) | {key: entry}, indent=1) + "\n", encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        logger.warning("the faster path cannot be remembered in %s: %s", path, error)


def measure(operation, device, dtype, sizes, clock):
    """{path, seconds of both, reason or error}: both paths on a sample, first compared, then in turns."""
    seconds, at = {"torch": [], "triton": []}, "the sample"
    try:
        call, results = sample_of(operation, device, dtype, *map(int, sizes)), []
        for at in seconds:
            results.append(call(at))
        difference = max(
            float((one.double() - other.double()).abs().max()) for one, other in zip(*results, strict=True)
        )
        if difference > TOLERANCE[dtype]:
            reason = f"results differ by {difference:.1e}"
            logger.warning("%s takes torch on %s: the Triton kernel is not used (%s)", operation, device, reason)
            return {"path": "torch", "reason": reason}
        for _ in range(ROUNDS):
            for at, taken in seconds.items():
                taken.append(clock(lambda path=at: call(path)))
    except Exception as error:
        # Whatever a compiler or driver raises: torch does the work, which may be smaller than the sample.
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        logger.warning("%s takes torch on %s: no measurement, %s failed (%s)", operation, device, at, reason)
        return {"path": "torch", "error": reason}
    seconds = {path: statistics.median(taken) for path, taken in seconds.items()}
    return {"path": min(seconds, key=seconds.get), "seconds": seconds}


def sample_of(operation, device, dtype, num_queries, num_gallery, width, k):
    """A call that takes a path and gives tensors to compare."""
    from . import cosine_topk, k_reciprocal_rerank, rank_metrics

    draw = torch.Generator().manual_seed(0)
    # Identities of about eight images, as in Re-ID sets, with noise as large as the distance between them.
    centres = torch.randn(max(2, num_gallery // 8), width, generator=draw)
    pids = [torch.randint(len(centres), (count,), generator=draw) for count in (num_queries, num_gallery)]
    sides = [(centres[ids] + torch.randn(len(ids), width, generator=draw)).to(device, dtype) for ids in pids]
    if operation == "cosine_topk":
        return lambda path: [cosine_topk(*sides, min(k, num_gallery), backend=path).scores]
    labels = [ids.to(device) for ids in pids]
    cameras = [torch.zeros_like(labels[0]), torch.ones_like(labels[1])]
    if operation == "rank_metrics":
        return lambda path: [mean_of(rank_metrics(*sides, *labels, *cameras, backend=path))]
    options = {"k1": min(k - 1, num_gallery // 2), "k2": 6}
    return lambda path: [
        mean_of(k_reciprocal_rerank(*sides, **options, backend=path).metrics(*labels, *cameras))
    ]  # fmt: skip


def mean_of(metrics):
    return torch.tensor([metrics.mAP, metrics.mINP])


def seconds_on_card(call, device=None):
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start
