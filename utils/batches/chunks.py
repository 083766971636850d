"""Computes something for every image of a data set, in chunks: the same bits on any number of processes.

Rows go through a model in batches that depend only on the row numbers and the batch size. The rounding of a matrix
product may change with its shape, so the last batch is filled up with copies of its last row. Each process takes
every n-th chunk of batches.
"""

import hashlib
import os
from pathlib import Path

import torch
from tqdm.auto import tqdm

from utils import synthetic
from utils.datasets.images import DRAWN, TARRED, storage_of
from utils.launch import leave_interrupts

CHUNK_BATCHES = 8
DRAWING = Path(synthetic.__file__).parent


def image_identities(dataset):
    """What identifies each image: its name with the file's size and time, or with a digest of its bytes.

    For a drawn image it is the name and a digest of the code that draws.
    """
    descriptions, drawing = [], drawing_digest()
    for path, stored in zip(dataset["path"], storage_of(dataset, "image").to_pylist(), strict=True):
        if stored["bytes"] is not None:
            descriptions.append([path, hashlib.sha256(stored["bytes"]).hexdigest()])
        elif os.path.isfile(stored["path"]):
            status = os.stat(stored["path"])
            descriptions.append([path, status.st_size, status.st_mtime_ns])
        elif stored["path"].startswith(DRAWN):
            descriptions.append([path, drawing])
        elif stored["path"].startswith(TARRED):
            status = os.stat(stored["path"].removeprefix(TARRED).rsplit("!", 2)[0])
            descriptions.append([path, stored["path"], status.st_size, status.st_mtime_ns])
        else:
            descriptions.append([path, stored["path"]])
    return descriptions


def drawing_digest():
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(DRAWING.glob("*.py")))).hexdigest()


def weights_digest(model, skip=()):
    """SHA-256 of the names, types, shapes and values of a model's tensors, without names that start with `skip`."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        if not name.startswith(tuple(skip)):
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def computed_in_chunks(pictures, chunks, compute, *, accelerator, batch_size, num_workers, total, desc, leave=True):
    """Computes this process's share of `chunks` (sequences of rows): yields each chunk's rows and their results.

    `compute` gets images (B, 3, H, W) on the device and returns (B, ...). Results are float32 on the CPU. The progress
    bar counts the images of all processes; `total` includes images that are in no chunk.
    """
    share = chunks[accelerator.process_index :: accelerator.num_processes]
    batches = [rows[start : start + batch_size] for rows in share for start in range(0, len(rows), batch_size)]
    loader = torch.utils.data.DataLoader(
        pictures,
        batch_sampler=[[*rows, *rows[-1:] * (batch_size - len(rows))] for rows in map(list, batches)],
        num_workers=num_workers if batches else 0,
        worker_init_fn=leave_interrupts,
        pin_memory=accelerator.device.type == "cuda",
    )
    stream = iter(loader)
    with tqdm(
        total=total,
        initial=total - sum(map(len, chunks)),
        desc=desc,
        unit="image",
        leave=leave,
        disable=None if accelerator.is_main_process else True,
    ) as bar:
        for rows in share:
            parts = []
            for start in range(0, len(rows), batch_size):
                images = next(stream).to(accelerator.device, non_blocking=True)
                parts.append(compute(images)[: len(rows) - start].float().cpu())
                bar.update(min(len(parts[-1]) * accelerator.num_processes, bar.total - bar.n))
            yield rows, torch.cat(parts)
