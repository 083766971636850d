"""Features of a set of images, extracted once and kept: in chunks, on any number of processes, with the same bits.

Rows go through the model in batches that depend on nothing but the row numbers and the batch size: a matrix
product's rounding may change with its shape, so the last batch is filled up with copies of its last row. Each
process takes every n-th chunk of batches. A chunk is written aside and renamed; what a killed run leaves is whole
and is not computed again.
"""

import hashlib
import json
import os
import shutil
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from utils.evaluation import Side
from utils.images import DRAWN, storage_of

CHUNK_BATCHES = 8
DRAWING = ("synthetic", "domains", "drawing", "scenery")
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


class Pictures(torch.utils.data.Dataset):
    """Rows of a data set as the model's input, by `transform`: PIL image -> (3, height, width)."""

    def __init__(self, dataset, transform):
        self.dataset, self.transform = dataset, transform

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, row):
        return self.transform(self.dataset[row]["image"])


def image_identities(dataset):
    """What tells each image from any other: its name with the file's size and time, or a digest of its bytes.

    Of a drawn image it is the name and the code that draws.
    """
    found, drawing = [], drawing_digest()
    for path, stored in zip(dataset["path"], storage_of(dataset, "image").to_pylist(), strict=True):
        if stored["bytes"] is not None:
            found.append([path, hashlib.sha256(stored["bytes"]).hexdigest()])
        elif os.path.isfile(stored["path"]):
            status = os.stat(stored["path"])
            found.append([path, status.st_size, status.st_mtime_ns])
        elif stored["path"].startswith(DRAWN):
            found.append([path, drawing])
        else:
            found.append([path, stored["path"]])
    return found


def drawing_digest():
    folder = Path(__file__).parent
    return hashlib.sha256(b"".join((folder / f"{name}.py").read_bytes() for name in DRAWING)).hexdigest()


def weights_digest(model, skip=()):
    """SHA-256 of the names, types, shapes and values of a model's tensors, but of those whose name starts so."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        if not name.startswith(tuple(skip)):
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def extraction_key(model, identities, **settings):
    """A name for these features: it changes with the weights, the images' `identities` and any of the `settings`."""
    text = json.dumps([weights_digest(model), settings, identities])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@torch.inference_mode()
def extract_features(model, pictures, names, *, accelerator, folder, key, batch_size=64, num_workers=0):
    """Features (N, D), float32 on the CPU, of every row of `pictures`, equal on every process. Errors use `names`.

    Finished chunks lie in `folder/chunks-KEY`; another run with the same key goes on from there. All processes must
    see `folder`.
    """
    batch_size = min(batch_size, len(pictures))
    rows_per_chunk = batch_size * CHUNK_BATCHES
    starts = range(0, len(pictures), rows_per_chunk)
    chunks = Path(folder) / f"chunks-{key}"
    chunks.mkdir(parents=True, exist_ok=True)
    sizes = {start: min(rows_per_chunk, len(pictures) - start) for start in starts}
    missing = [[start for start in starts if not _is_whole(chunks / _name(start), sizes[start])]]
    # One process looks for all: a fast neighbour's new chunk must not shift the shares of the others.
    missing = broadcast_object_list(missing)[0]
    model = model.to(accelerator.device).eval()

    def compute(images):
        with accelerator.autocast():
            return model(images)

    for rows, features in computed_in_chunks(
        pictures,
        [range(start, start + sizes[start]) for start in missing],
        compute,
        accelerator=accelerator,
        batch_size=batch_size,
        num_workers=num_workers,
        total=len(pictures),
        desc="extracting",
    ):
        if not features.isfinite().all():
            row = rows[int((~features.isfinite().all(1)).nonzero()[0])]
            raise ValueError(f"the features of {names[row]} are not finite; run without --mixed_precision")
        name = _name(rows[0])
        save_file({"features": features}, chunks / f"{name}.part")
        os.replace(chunks / f"{name}.part", chunks / name)
    accelerator.wait_for_everyone()
    try:
        found = [load_file(chunks / _name(start))["features"] for start in starts]
    except OSError as error:
        raise ValueError(
            f"{error}; with several machines, --output_dir must lie on a disk that all of them see"
        ) from None
    # Nobody may remove the chunks (forget_chunks) while another process still reads them.
    accelerator.wait_for_everyone()
    return torch.cat(found)


def computed_in_chunks(pictures, chunks, compute, *, accelerator, batch_size, num_workers, total, desc):
    """This process's share of `chunks` (sequences of rows): yields the rows and what `compute` makes of them.

    `compute` gets images (B, 3, H, W) on the device and returns (B, ...); yielded is float32 on the CPU. The bar
    counts the images of all processes, `total` with those that are in none of the chunks.
    """
    share = chunks[accelerator.process_index :: accelerator.num_processes]
    batches = [rows[start : start + batch_size] for rows in share for start in range(0, len(rows), batch_size)]
    loader = torch.utils.data.DataLoader(
        pictures,
        batch_sampler=[[*rows, *rows[-1:] * (batch_size - len(rows))] for rows in map(list, batches)],
        num_workers=num_workers if batches else 0,
        pin_memory=accelerator.device.type == "cuda",
    )
    stream = iter(loader)
    with tqdm(
        total=total,
        initial=total - sum(map(len, chunks)),
        desc=desc,
        unit="image",
        disable=None if accelerator.is_main_process else True,
    ) as bar:
        for rows in share:
            parts = []
            for start in range(0, len(rows), batch_size):
                images = next(stream).to(accelerator.device, non_blocking=True)
                parts.append(compute(images)[: len(rows) - start].float().cpu())
                bar.update(min(len(parts[-1]) * accelerator.num_processes, bar.total - bar.n))
            yield rows, torch.cat(parts)


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
