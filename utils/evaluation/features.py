"""Extracts the features of a data set in chunks; any number of processes gives the same bits.

Batches depend only on the row numbers and the batch size. The rounding of a matrix product may change with its shape,
so the last batch is padded with copies of its last row. Each process takes every n-th chunk of batches.
"""

from contextlib import nullcontext

import torch

from utils.batches.chunks import CHUNK_BATCHES, computed_in_chunks
from utils.batches.transforms import TransformedImages


@torch.no_grad()
def extract(
    model, dataset, transform, *, accelerator, batch_size=64, num_workers=0, desc="extracting", store=None,
    in_float32=False, pictures=TransformedImages, compute=None,
):  # fmt: skip
    """Features (N, D) float32 on the CPU, equal on every process, extracted in eval mode.

    `pictures` gives the rows of a batch from data set and transform, `compute` their features; default: the images
    and the model. `in_float32` ignores the accelerator's precision. `store`: a `chunk_files.ChunkFiles` that keeps
    finished chunks, so that a killed run goes on from them.
    """
    was_training = model.training
    model.to(accelerator.device).eval()
    batch_size = min(batch_size, len(dataset))
    size = batch_size * (CHUNK_BATCHES if store else 1)
    chunks = [range(start, min(start + size, len(dataset))) for start in range(0, len(dataset), size)]

    def computed(batch):
        with nullcontext() if in_float32 else accelerator.autocast():
            return (compute or model)(batch)

    parts = []
    for rows, features in computed_in_chunks(
        pictures(dataset, transform),
        store.missing(chunks) if store else chunks,
        computed,
        accelerator=accelerator,
        batch_size=batch_size,
        num_workers=num_workers,
        total=len(dataset),
        desc=desc,
        leave=store is not None,
    ):
        if store:
            store.keep(rows, features, dataset)
        else:
            parts.append(features)
    model.train(was_training)
    if store:
        return store.whole(chunks, accelerator)
    return gathered(parts, len(dataset), batch_size, model.num_features, accelerator)


def gathered(parts, count, batch_size, width, accelerator):
    """Join the batches of all processes in order; each process has every n-th batch."""
    if accelerator.num_processes == 1:
        return torch.cat(parts)
    # (most batches, B, D); zeros pad missing batches and short ones.
    most = -(-count // (batch_size * accelerator.num_processes))
    padded = torch.zeros(most, batch_size, width, device=accelerator.device)
    for number, part in enumerate(parts):
        padded[number, : len(part)] = part.to(accelerator.device)
    features = accelerator.gather(padded).unflatten(0, (accelerator.num_processes, most))
    return features.transpose(0, 1).flatten(0, 2)[:count].cpu()
