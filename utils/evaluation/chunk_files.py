"""Chunks of features on disk while an extraction runs, so that a killed one goes on.

A chunk is written to a temporary file and renamed: those of a killed run are complete and are not computed again.
"""

import hashlib
import json
import shutil
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from utils.batches.chunks import weights_digest
from utils.files import write_together


def extraction_key(model, identities, accelerator, batch_size, **settings):
    """The key of these features: another one for other weights, `identities` of the images, precision, `settings`."""
    settings |= {"image": [model.image_size, model.image_mean, model.image_std, model.resample]}
    settings |= {"precision": accelerator.mixed_precision, "device": accelerator.device.type, "batch_size": batch_size}
    text = json.dumps([weights_digest(model), settings, identities])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class ChunkFiles:
    """The chunks in `FOLDER/chunks-KEY`, for `extract(..., store=...)`; all processes must see the folder.

    The key is that of the features (`extraction_key`): chunks of others are not looked at.
    """

    def __init__(self, folder, key):
        self.place, self.key = Path(folder), key
        self.folder = self.place / f"chunks-{key}"

    def part(self, name):
        """Those of a part of the images."""
        return ChunkFiles(self.place, f"{self.key}-{name}")

    def missing(self, chunks):
        """The chunks (sequences of rows) that are not there yet, on every process the same."""
        self.folder.mkdir(parents=True, exist_ok=True)
        missing = [[rows for rows in chunks if not is_whole(self.file(rows), len(rows))]]
        # One process lists the chunks for all: a chunk written in between would shift the shares of the others.
        return broadcast_object_list(missing)[0]

    def keep(self, rows, features, dataset):
        if not features.isfinite().all():
            row = rows[int((~features.isfinite().all(1)).nonzero()[0])]
            raise ValueError(f"the features of {dataset[row]['path']} are not finite; run without --mixed_precision")
        with write_together(self.folder) as part:
            save_file({"features": features}, part(self.file(rows).name))

    def whole(self, chunks, accelerator):
        """The features of all chunks, on every process."""
        accelerator.wait_for_everyone()
        try:
            features = [load_file(self.file(rows))["features"] for rows in chunks]
        except OSError as error:
            raise ValueError(
                f"{error}; with several machines, --output_dir must lie on a disk that all of them see"
            ) from None
        # No process may remove the chunks (forget_chunks) while another still reads them.
        accelerator.wait_for_everyone()
        return torch.cat(features)

    def file(self, rows):
        return self.folder / f"{rows.start:08d}.safetensors"


def forget_chunks(folder):
    """Remove the chunks of this and of abandoned extractions, after the features are saved elsewhere."""
    for chunks in Path(folder).glob("chunks-*"):
        shutil.rmtree(chunks, ignore_errors=True)


def is_whole(path, size):
    try:
        with safe_open(path, "pt") as file:
            return file.get_slice("features").get_shape()[0] == size
    except (OSError, SafetensorError):
        return False
