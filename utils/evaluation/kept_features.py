"""Reads and writes files of features and labels, those of `evaluate.py` and those of other tools."""

import json
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from utils.datasets.schema import names_of
from utils.evaluation.metrics import Side
from utils.files import one_line, write_together

FEATURES = "features.safetensors"

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


def save_features(path, features, splits, **metadata):
    """Save `features` (N, D) and `splits`, a list of (query rows, query Side, gallery rows, gallery Side).

    A single split is written under the common names qf, gf, q_pid, g_pid, q_cam, g_cam. Several splits share
    `features` and store their rows and ids as `0.q_row`, `0.q_pid` and so on. Paths, names of identities and cameras
    and `metadata` are JSON in the header of the file.
    """
    tensors, header = {}, {name: json.dumps(value) for name, value in metadata.items()}
    for number, (query_rows, queries, gallery_rows, gallery) in enumerate(splits):
        prefix = f"{number}." if len(splits) > 1 else ""
        for side, rows, letter in ((queries, query_rows, "q"), (gallery, gallery_rows, "g")):
            tensors[f"{prefix}{letter}_pid"], tensors[f"{prefix}{letter}_cam"] = side.pids, side.camids
            header[f"{prefix}{letter}_path"] = json.dumps(side.paths)
            if any(side.names.values()):
                header[f"{prefix}{letter}_names"] = json.dumps(side.names)
            if len(splits) > 1:
                tensors[f"{prefix}{letter}_row"] = torch.as_tensor(rows)
            else:
                tensors[f"{letter}f"] = side.features
    if len(splits) > 1:
        tensors["features"] = features
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=header)


def names_of_labels(images):
    """The names of a `Side` of these images."""
    return {column: names_of(images, column) for column in ("pid", "camid")}


def sides_of_splits(features, splits, paths, names):
    """Pairs of (queries, gallery) of features (N, D), their paths, and the names of a `Side`.

    A split is ((query rows, pids, camids), (gallery rows, pids, camids)).
    """
    return [
        tuple(
            Side(features[rows], torch.tensor(pids), torch.tensor(camids), [paths[row] for row in rows], names=names)
            for rows, pids, camids in split
        )
        for split in splits
    ]


def keep_features(folder, features, splits, sides, **metadata):
    """Write the features of these splits and their sides to FEATURES in a folder."""
    split_rows = [
        (split[0][0], queries, split[1][0], gallery) for split, (queries, gallery) in zip(splits, sides, strict=True)
    ]
    with write_together(folder) as part:
        save_features(part(FEATURES), features, split_rows, **metadata)


def load_features(path):
    """A list of (queries, gallery) from a safetensors or npz file, and the file's metadata.

    Names: qf, gf, q_pid, g_pid, q_cam, g_cam, or query_features, gallery_features, query_pids, gallery_pids,
    query_camids, gallery_camids; query_paths and gallery_paths are optional. Missing identities and cameras become -1.
    Nothing is unpickled.
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
    # zipfile raises a NotImplementedError for versions and a RuntimeError for passwords.
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read as features: {error}") from None
    header = {name: _from_json(value) for name, value in header.items()}
    numbers = sorted({int(name.split(".")[0]) for name in arrays if name.split(".")[0].isdigit()})
    prefixes = [f"{number}." for number in numbers] or [""]
    return [tuple(_side(path, arrays, header, prefix, letter) for letter in "qg") for prefix in prefixes], header


def features_of_key(path, key):
    """The pairs of sides in a file that was saved with this `key`; None if there is none, or it has another key."""
    try:
        sides, header = load_features(path)
    except ValueError:
        return None
    return sides if header.get("key") == key else None


def _side(path, arrays, header, prefix, letter):
    def find(kind):
        # Only names of files are in the header.
        more = header if kind == "_path" else {}
        values = (arrays.get(prefix + name, more.get(prefix + name)) for name in NAMES[letter + kind])
        return next((value for value in values if value is not None), None)

    features = find("f")
    if features is None and prefix and f"{prefix}{letter}_row" in arrays:
        features = rows_of_all(path, arrays, f"{prefix}{letter}_row")
    if features is None:
        raise ValueError(
            f"{path} has no {' or '.join(NAMES[letter + 'f'])}, only {', '.join(sorted(arrays)) or 'nothing'}"
        )
    features = _tensor(path, letter + "f", features)
    if not features.is_floating_point():
        raise ValueError(f"{letter}f in {path} holds {features.dtype}; features must be floating-point numbers")
    if features.ndim != 2:
        raise ValueError(f"{letter}f in {path} has shape {tuple(features.shape)}; expected (rows, width)")
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
    paths = (
        [f"{side} {row}" for row in range(len(features))] if paths is None else [str(file_name) for file_name in paths]
    )
    return Side(features.float(), *ids, paths, names=_names(header.get(f"{prefix}{letter}_names"), *ids))


def _names(names, pids, camids):
    """The names of a `Side` out of a header, without those that are not one for each number."""
    kept = {}
    for kind, numbers in (("pid", pids), ("camid", camids)):
        values = names.get(kind) if isinstance(names, dict) else None
        if isinstance(values, list) and (not len(numbers) or len(values) > int(numbers.max())):
            kept[kind] = values
    return kept


def rows_of_all(path, arrays, name):
    """The features of a split among those of all splits."""
    try:
        return arrays["features"][arrays[name]]
    # numpy and torch raise errors of several classes for numbers of rows that are none.
    except (KeyError, IndexError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path}: {name} does not give rows of features: {one_line(error)}") from None


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
