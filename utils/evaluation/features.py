"""Features of a set of images, extracted once and kept: in chunks, on any number of processes, with the same bits.

Rows go through the model in batches that depend on nothing but the row numbers and the batch size: a matrix
product's rounding may change with its shape, so the last batch is filled up with copies of its last row. Each
process takes every n-th chunk of batches. A chunk is written aside and renamed; what a killed run leaves is whole
and is not computed again.
"""

import hashlib
import json
import shutil
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from utils.batches.chunks import CHUNK_BATCHES, computed_in_chunks, weights_digest
from utils.batches.images import TransformedImages
from utils.evaluation.metrics import Side
from utils.files import write_together

NAMES = {
    "qf": ("qf", "query_features"),
    "gf": ("gf", "gallery_features"),
    "q_pid": ("q_pid", "query_pids"),
    "g_pid": ("g_pid", "gallery_pids"),
    "q_cam": ("q_cam", "query_cams", "query_camids"),
    "g_cam": ("g_cam", "gallery_cams", "gallery_camids"),
    "q_path": ("q_path", "query_paths"),
    "g_path": ("g_path", "gallery_paths"),
}


def extraction_key(model, identities, **settings):
    """A name for these features: it changes with the weights, the images' `identities` and any of the `settings`."""
    text = json.dumps([weights_digest(model), settings, identities])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@torch.no_grad()
def extract(
    model, dataset, transform, *, accelerator, batch_size=64, num_workers=0, desc="extracting", keep_in=None, key=None
):
    """Test features (N, D) float32 on the CPU, the same on every process, by the model in eval mode.

    With a folder `keep_in`, finished chunks lie in `keep_in/chunks-KEY`, and another run with the same key goes on
    from there; all processes must see the folder.
    """
    was_training = model.training
    model.to(accelerator.device).eval()
    batch_size = min(batch_size, len(dataset))
    size = batch_size * (CHUNK_BATCHES if keep_in else 1)
    chunks = [range(start, min(start + size, len(dataset))) for start in range(0, len(dataset), size)]
    folder = keep_in and Path(keep_in) / f"chunks-{key}"

    def compute(images):
        with accelerator.autocast():
            return model(images)

    parts = []
    for rows, features in computed_in_chunks(
        TransformedImages(dataset, transform),
        missing_chunks(folder, chunks) if keep_in else chunks,
        compute,
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
    """The batches of all processes, each of which took every n-th, in order."""
    if accelerator.num_processes == 1:
        return torch.cat(parts)
    # [most batches, B, D]; a process that has fewer, or a shorter one, fills up with zeros.
    most = -(-count // (batch_size * accelerator.num_processes))
    filled = torch.zeros(most, batch_size, width, device=accelerator.device)
    for number, part in enumerate(parts):
        filled[number, : len(part)] = part.to(accelerator.device)
    features = accelerator.gather(filled).unflatten(0, (accelerator.num_processes, most))
    return features.transpose(0, 1).flatten(0, 2)[:count].cpu()


def missing_chunks(folder, chunks):
    folder.mkdir(parents=True, exist_ok=True)
    missing = [[rows for rows in chunks if not _is_whole(folder / _name(rows.start), len(rows))]]
    # One process looks for all: a fast neighbour's new chunk must not shift the shares of the others.
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
        found = [load_file(folder / _name(rows.start))["features"] for rows in chunks]
    except OSError as error:
        raise ValueError(
            f"{error}; with several machines, --output_dir must lie on a disk that all of them see"
        ) from None
    # Nobody may remove the chunks (forget_chunks) while another process still reads them.
    accelerator.wait_for_everyone()
    return torch.cat(found)


def forget_chunks(folder):
    """Remove the chunks of this and of earlier, abandoned extractions, once the features are kept elsewhere."""
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


def save_features(path, features, splits, **metadata):
    """Keep `features` (N, D) and what each split takes, a list of (query rows, query Side, gallery rows, its Side).

    One split is written as anyone would read it: qf, gf, q_pid, g_pid, q_cam, g_cam. Several share `features` and
    have their rows beside the ids, `0.q_row`, `0.q_pid` and so on. Paths and `metadata` are JSON in the file's
    header.
    """
    tensors, header = {}, {name: json.dumps(value) for name, value in metadata.items()}
    for number, (query_rows, queries, gallery_rows, gallery) in enumerate(splits):
        mark = f"{number}." if len(splits) > 1 else ""
        for side, rows, letter in ((queries, query_rows, "q"), (gallery, gallery_rows, "g")):
            tensors[f"{mark}{letter}_pid"], tensors[f"{mark}{letter}_cam"] = side.pids, side.camids
            header[f"{mark}{letter}_path"] = json.dumps(side.paths)
            if len(splits) > 1:
                tensors[f"{mark}{letter}_row"] = torch.as_tensor(rows)
            else:
                tensors[f"{letter}f"] = side.features
    if len(splits) > 1:
        tensors["features"] = features
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=header)


def load_features(path):
    """A list of (queries, gallery) from a safetensors or npz file, and the file's metadata.

    Names: qf, gf, q_pid, g_pid, q_cam, g_cam, or query_features, gallery_features, query_pids, gallery_pids,
    query_camids, gallery_camids; query_paths and gallery_paths where there are any. Identities and cameras may be
    absent: -1. Nothing is unpickled.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", ".npz"):
        raise ValueError(
            f"{path} is neither .safetensors nor .npz; save qf, gf, q_pid, g_pid, q_cam, g_cam as one of them"
        )
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    try:
        if path.suffix == ".npz":
            file = np.load(path, allow_pickle=False)
            if isinstance(file, np.ndarray):
                raise ValueError("it holds one array, without a name")
            with file:
                arrays, header = dict(file), {}
        else:
            with safe_open(path, "pt") as file:
                arrays, header = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read as features: {error}") from None
    header = {name: _from_json(value) for name, value in header.items()}
    numbers = sorted({int(name.split(".")[0]) for name in arrays if name.split(".")[0].isdigit()})
    marks = [f"{number}." for number in numbers] or [""]
    return [tuple(_side(path, arrays, header, mark, letter) for letter in "qg") for mark in marks], header


def _side(path, arrays, header, mark, letter):
    def find(kind):
        values = (arrays.get(mark + name, header.get(mark + name)) for name in NAMES[letter + kind])
        return next((value for value in values if value is not None), None)

    features = find("f")
    if features is None and mark and f"{mark}{letter}_row" in arrays:
        features = arrays["features"][arrays[f"{mark}{letter}_row"]]
    if features is None:
        raise ValueError(
            f"{path} has no {' or '.join(NAMES[letter + 'f'])}, only {', '.join(sorted(arrays)) or 'nothing'}"
        )
    features = _tensor(path, letter + "f", features)
    if not features.is_floating_point():
        raise ValueError(f"{letter}f in {path} holds {features.dtype}; features must be floating-point numbers")
    ids = []
    for kind in ("_pid", "_cam"):
        values = find(kind)
        values = torch.full((len(features),), -1) if values is None else _tensor(path, letter + kind, values)
        if values.is_floating_point() and (values != values.round()).any():
            raise ValueError(f"{letter}{kind} in {path} holds fractions; identities and cameras are whole numbers")
        ids.append(values.flatten().long())
    paths = find("_path")
    if paths is not None and not (isinstance(paths, list) or np.ndim(paths)):
        raise ValueError(f"{letter}_path in {path} is no list of names")
    side = "query" if letter == "q" else "gallery"
    paths = [f"{side} {row}" for row in range(len(features))] if paths is None else [str(one) for one in paths]
    return Side(features.float(), *ids, paths)


def _tensor(path, name, values):
    if isinstance(values, torch.Tensor):
        return values
    if values.dtype.kind not in "fiub" or values.dtype.itemsize > 8:
        raise ValueError(f"{name} in {path} holds {values.dtype}; expected numbers")
    return torch.from_numpy(np.ascontiguousarray(values.astype(values.dtype.newbyteorder("="))))


def _from_json(text):
    try:
        return json.loads(text)
    except ValueError:
        return text
