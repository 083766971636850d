"""The files of a kept gallery: `manifest.json`, and a safetensors file for each addition.

    index = Index.open(folder)                            # None where there is no manifest
    index = Index(folder)
    index.check_model(about_model(name, model, "no"))     # ValueError for another one; that of an empty gallery
    index.add(features, rows)                             # a new file, then the manifest
    index.features()                                      # RowsOnDisk, nothing is read yet

The manifest names the model (`about`) and the files with their rows and bytes. It is replaced last: what a killed
addition leaves behind is in no manifest and belongs to no gallery.
"""

import json
import os
import re
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from kernels.disk.rows import RowsOnDisk, mapped
from utils.batches.chunks import weights_digest
from utils.files import one_line, to_json, write_together

MANIFEST = "manifest.json"
FORMAT = 1


@dataclass(frozen=True)
class Rows:
    """What is known of the images, each a list: names below their folder, identities as names or None, cameras as
    numbers in file names or -1, sizes, times of change, SHA-256 of the contents."""

    paths: list
    identities: list
    cameras: list
    sizes: list
    times: list
    digests: list

    def __len__(self):
        return len(self.paths)

    def take(self, places):
        return Rows(**{name: [values[place] for place in places] for name, values in vars(self).items()})

    def __add__(self, other):
        return Rows(**{name: values + getattr(other, name) for name, values in vars(self).items()})


NO_ROWS = Rows([], [], [], [], [], [])
AGAIN = "remove the folder, or name another by --gallery_features, and run again with --gallery_dir"


# The types of the values of each list.
KINDS = Rows({str}, {str, type(None)}, {int}, {int}, {int}, {str})


def read_rows(path, count):
    """The `Rows` of a file; ValueError unless they are whole and as many as the manifest says."""
    content = mapped(path, "rows")
    try:
        rows = Rows(**json.loads(bytes(content.numpy())))
        columns = list(zip(vars(rows).values(), vars(KINDS).values(), strict=True))
        whole = all(
            isinstance(values, list) and len(values) == count and {*map(type, values)} <= kinds
            for values, kinds in columns
        )
        whole = whole and max(map(abs, rows.cameras)) < 2**63
    except (TypeError, ValueError):
        whole = False
    if not whole:
        raise ValueError(f"{path} does not tell the names of {count} images; {AGAIN}")
    return rows


def damage_of(content):
    """What is wrong with the content of a manifest, or None."""
    if not isinstance(content, dict) or not {"format", "about", "files"} <= set(content):
        return "format, about or files is missing"
    if content["format"] != FORMAT:
        return f"it has format {content['format']}, this version reads {FORMAT}"
    about, files = content["about"], content["files"]
    kinds = {"model": str, "weights": str, "transform": list, "width": int}
    if not (isinstance(about, dict) and all(isinstance(about.get(name), kind) for name, kind in kinds.items())):
        return f"it does not name the model of its features: {about}"
    kinds = {"file": str, "rows": int, "bytes": int}
    if not isinstance(files, list):
        return f"its files are {files}"
    for record in files:
        whole = isinstance(record, dict) and all(isinstance(record.get(name), kind) for name, kind in kinds.items())
        if not (
            whole and re.fullmatch(r"[0-9]{1,9}\.safetensors", record["file"]) and 0 < record["rows"] < record["bytes"]
        ):
            return f"it has the record {record}"
    return None


def about_model(name, model, precision):
    """What the features depend on, for the manifest."""
    transform = [list(model.image_size), list(model.image_mean), list(model.image_std), model.resample, precision]
    return {"model": str(name), "weights": weights_digest(model), "transform": transform, "width": model.num_features}


@contextmanager
def alone(folder):
    """No other command of this machine writes to the gallery meanwhile; ValueError where one does."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    descriptor = None
    try:
        try:
            import fcntl

            descriptor = os.open(folder, os.O_RDONLY)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another command writes to the gallery in {folder}: wait for its end") from None
        # Windows, and file systems that have no locks.
        except (ImportError, OSError):
            pass
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


class Index:
    """The kept gallery in a folder; `about` is that of `about_model`, `files` are the manifest's records."""

    def __init__(self, folder, about=None, files=()):
        self.folder, self.about, self.files = Path(folder), about, list(files)

    @classmethod
    def open(cls, folder):
        """The gallery of a folder, or None where there is none; ValueError for a damaged one."""
        path = Path(folder) / MANIFEST
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            problem = damage_of(content)
        except (OSError, ValueError) as error:
            problem = one_line(error)
        if problem:
            raise ValueError(f"{path} is no manifest of a gallery: {problem}; {AGAIN}")
        index = cls(folder, content["about"], content["files"])
        index.check_files()
        return index

    def check_unchanged(self):
        """ValueError if another command has written to the folder since it was opened."""
        path = self.folder / MANIFEST
        files = json.loads(path.read_text(encoding="utf-8"))["files"] if path.is_file() else []
        if files != self.files:
            raise ValueError(f"{self.folder} was changed by another command meanwhile; run this one again")

    def check_files(self):
        for record in self.files:
            path = self.folder / record["file"]
            size = path.stat().st_size if path.is_file() else None
            if size != record["bytes"]:
                found = "is missing" if size is None else f"has {size:,} bytes"
                raise ValueError(
                    f"{path} {found}, the manifest says {record['bytes']:,} bytes: it was cut short or replaced; "
                    f"restore it, or {AGAIN}"
                )

    def check_model(self, about):
        """ValueError unless the features are of this model and transform; a gallery without any takes them."""
        kept = self.about = self.about or about
        # The size changes a model's weights for positions, too.
        if kept["transform"] != about["transform"]:
            raise ValueError(
                f"{self.folder} was extracted with size, mean, deviation, filter and precision {kept['transform']}, "
                f"this run has {about['transform']}; use the same, or another folder by --gallery_features"
            )
        if kept["weights"] != about["weights"]:
            raise ValueError(
                f"{self.folder} holds features of {kept['model']}, {about['model']} has other weights; give its model "
                "by --model, or another folder by --gallery_features"
            )

    def __len__(self):
        return sum(record["rows"] for record in self.files)

    def paths(self):
        return [self.folder / record["file"] for record in self.files]

    def features(self):
        tensors = [mapped(path, "features") for path in self.paths()]
        for record, path, tensor in zip(self.files, self.paths(), tensors, strict=True):
            size = record["rows"], (self.about or {}).get("width", tensor.shape[-1])
            if tuple(tensor.shape) != size or tensor.dtype != torch.float32:
                raise ValueError(
                    f"{path} holds {tensor.dtype} of shape {tuple(tensor.shape)}, the manifest says float32 of "
                    f"{size}; {AGAIN}"
                )
        return RowsOnDisk(tensors)

    def rows(self):
        """The `Rows` of all images."""
        rows = NO_ROWS
        for record, path in zip(self.files, self.paths(), strict=True):
            rows += read_rows(path, record["rows"])
        return rows

    def add(self, features, rows):
        """Write these rows as a new file, then the manifest that names it."""
        self.replace({None: (features, rows)})

    def replace(self, parts):
        """Write (features, Rows) for each of the files in `parts`, None for a new one, then the manifest.

        A file that is replaced gets a new name, and the old one is removed after the manifest is written.
        """
        numbers = [int(Path(record["file"]).stem) for record in self.files]
        number, old = max(numbers, default=-1) + 1, [name for name in parts if name]
        files = [record for record in self.files if record["file"] not in parts]
        with write_together(self.folder) as part:
            for features, rows in parts.values():
                if not len(rows):
                    continue
                name = f"{number:05d}.safetensors"
                number += 1
                text = torch.frombuffer(bytearray(json.dumps(asdict(rows)).encode()), dtype=torch.uint8)
                save_file({"features": features.contiguous(), "rows": text}, part(name))
                size = os.path.getsize(self.folder / f"{name}.part")
                files.append({"file": name, "rows": len(rows), "bytes": size})
            self.check_unchanged()
            content = {"format": FORMAT, "about": self.about, "files": files}
            part(MANIFEST).write_text(to_json(content), encoding="utf-8")
        self.files = files
        for name in old:
            (self.folder / name).unlink(missing_ok=True)

    def pids(self):
        return {name for name in self.rows().identities if name is not None}

    def images_of(self, pid):
        """{side: names of images} of an identity."""
        rows = self.rows()
        named = zip(rows.paths, rows.identities, strict=True)
        return {"gallery": {path for path, name in named if is_identity(name, pid)}}

    def without(self, pid, images, dry_run):
        """Remove the identity and these images of a side: one line that says so, or none."""
        parts, removed, images = {}, 0, images["gallery"]
        # Those that a killed removal left.
        named = {path.name for path in self.paths()}
        left = [path for path in self.folder.glob("[0-9]*.safetensors") if path.name not in named]
        for record, path in zip(self.files, self.paths(), strict=True):
            rows = read_rows(path, record["rows"])
            names = enumerate(zip(rows.paths, rows.identities, strict=True))
            kept = [place for place, (name, identity) in names if not (name in images or is_identity(identity, pid))]
            if len(kept) < len(rows):
                removed += len(rows) - len(kept)
                parts[record["file"]] = (
                    mapped(path, "features")[torch.tensor(kept, dtype=torch.int64)],
                    rows.take(kept),
                )
        lines = [f"{path}: deleted, as {MANIFEST} does not name it" for path in left]
        if removed:
            lines.append(f"{self.folder / MANIFEST}: {removed} row{'s' if removed > 1 else ''} removed")
        if not dry_run:
            with alone(self.folder):
                if removed:
                    self.replace(parts)
                for path in left:
                    path.unlink(missing_ok=True)
        return lines


def is_identity(name, wanted):
    """Whether a name, or a number with or without leading zeros, is the wanted one; None is nobody."""
    if name is None or wanted is None:
        return False
    name, wanted = (str(int(word)) if word.isdecimal() else word for word in (name, str(wanted)))
    return name == wanted
