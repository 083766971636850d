"""Extracts the features of a data set in chunks; any number of processes gives the same bits.

Batches depend only on the row numbers and the batch size. The rounding of a matrix product may change with its shape,
so the last batch is padded with copies of its last row. Each process takes every n-th chunk of batches. A chunk is
written to a temporary file and renamed, so that the chunks of a killed run are complete and are not computed again.
"""

import hashlib
import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from utils.batches.chunks import CHUNK_BATCHES, computed_in_chunks, weights_digest
from utils.batches.transforms import TransformedImages
from utils.files import write_together


def extraction_key(model, identities, accelerator, batch_size, **settings):
    """The key of these features: another one for other weights, `identities` of the images, precision, `settings`."""
    settings |= {"image": [model.image_size, model.image_mean, model.image_std, model.resample]}
    settings |= {"precision": accelerator.mixed_precision, "device": accelerator.device.type, "batch_size": batch_size}
    text = json.dumps([weights_digest(model), settings, identities])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@torch.no_grad()
def extract(
    model, dataset, transform, *, accelerator, batch_size=64, num_workers=0, desc="extracting", keep_in=None, key=None,
    in_float32=False, pictures=TransformedImages, compute=None,
):  # fmt: skip
    """Features (N, D) float32 on the CPU, equal on every process, extracted in eval mode.

    `pictures` gives the rows of a batch from data set and transform, `compute` their features; default: the images
    and the model. `in_float32` ignores the accelerator's precision. With a folder `keep_in`, finished chunks are
    stored in `keep_in/chunks-KEY`, and a run with the same key resumes from them; all processes must see the folder.
    """
    was_training = model.training
    model.to(accelerator.device).eval()
    batch_size = min(batch_size, len(dataset))
    size = batch_size * (CHUNK_BATCHES if keep_in else 1)
    chunks = [range(start, min(start + size, len(dataset))) for start in range(0, len(dataset), size)]
    folder = keep_in and Path(keep_in) / f"chunks-{key}"

    def computed(batch):
        with nullcontext() if in_float32 else accelerator.autocast():
            return (compute or model)(batch)

    parts = []
    for rows, features in computed_in_chunks(
        pictures(dataset, transform),
        missing_chunks(folder, chunks) if keep_in else chunks,
        computed,
        accelerator=accelerator,
        batch_size=batch_size,
        num_workers=num_workers,
        total=len(dataset),
        desc=desc,
        leave=keep_in is not None,
    ):
        if keep_in:
            keep_chunk(folder, rows, features, dataset)
        else:
            parts.append(features)
    model.train(was_training)
    if keep_in:
        return kept_chunks(folder, chunks, accelerator)
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


def missing_chunks(folder, chunks):
    folder.mkdir(parents=True, exist_ok=True)
    missing = [[rows for rows in chunks if not _is_whole(folder / _name(rows.start), len(rows))]]
    # One process lists the chunks for all: a chunk written in between would shift the shares of the others.
    return broadcast_object_list(missing)[0]


def keep_chunk(folder, rows, features, dataset):
    if not features.isfinite().all():
        row = rows[int((~features.isfinite().all(1)).nonzero()[0])]
        raise ValueError(f"the features of {dataset[row]['path']} are not finite; run without --mixed_precision")
    with write_together(folder) as part:
        save_file({"features": features}, part(_name(rows.start)))


def kept_chunks(folder, chunks, accelerator):
    accelerator.wait_for_everyone()
    try:
        features = [load_file(folder / _name(rows.start))["features"] for rows in chunks]
    except OSError as error:
        raise ValueError(
            f"{error}; with several machines, --output_dir must lie on a disk that all of them see"
        ) from None
    # No process may remove the chunks (forget_chunks) while another still reads them.
    accelerator.wait_for_everyone()
    return torch.cat(features)


def forget_chunks(folder):
    """Remove the chunks of this and of abandoned extractions, after the features are saved elsewhere."""
    for chunks in Path(folder).glob("chunks-*"):
        shutil.rmtree(chunks, ignore_errors=True)


def _name(start):
    return f"{start:08d}.safetensors"


def _is_whole(path, size):
    try:
        with safe_open(path, "pt") as file:
            return file.get_slice("features").get_shape()[0] == size
    except (OSError, SafetensorError):
        return False
