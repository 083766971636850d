"""Reads a generated set piece by piece, so that its labels and images are never all in memory."""

import hashlib
import json
import os
from array import array
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from utils.datasets.images import read_bytes
from utils.datasets.load import known_names, load_reid, parse_spec
from utils.datasets.schema import check_listed

METADATA = "metadata.parquet"
PIECE = 1024
# Columns that filtering adds to the metadata; it replaces those of an earlier filtering.
SCORED = pa.schema(
    [
        ("clip_score", pa.float32()),
        ("cctf_score", pa.float32()),
        ("reid_score", pa.float32()),
        ("reid_match", pa.bool_()),
        ("reid_lead", pa.float32()),
        ("nearest", pa.string()),
        ("perceptual_hash", pa.uint64()),
        ("error", pa.string()),
    ]
)
# Beside these where a question answerer looks at the images.
ANSWERED = pa.schema([("attribute_score", pa.float32()), ("attribute_answers", pa.string())])
CHOSEN = [("kept", pa.bool_()), ("rejected", pa.string())]
WHOLE = {"pid", "camid", "seed", "steps", "index"}
TEXT = {"path", "file_name", "domain"}


def check_generated(name):
    """ValueError for a folder of train_dreambooth_reid.py that has no finished set of images."""
    path = Path(name)
    if not (path / "identities").is_dir() or (path / METADATA).is_file():
        return
    if any(path.glob("images/*/*")):
        raise ValueError(
            f"--generated {name} has images of some identities and no {METADATA} yet: run train_dreambooth_reid.py "
            "there to its end, or with --merge for what is there"
        )
    raise ValueError(
        f"--generated {name} holds captions and no images; run train_dreambooth_reid.py there again, without "
        "--captions_only"
    )


def sources_named_by(name):
    """The specs of the data sets that a generated folder was made from; ValueError if it does not say."""
    path = Path(name)
    if not path.exists() and parse_spec(name)[0] not in known_names():
        raise ValueError(
            f"--generated {name}: there is no such folder; give one that train_dreambooth_reid.py wrote, or any data "
            "set together with --source"
        )
    folder = path.parent if path.is_file() else path
    try:
        specs = json.loads((folder / "args.json").read_text(encoding="utf-8"))["arguments"]["source"]
    except (OSError, ValueError, KeyError, TypeError):
        specs = None
    if not (isinstance(specs, list) and specs and all(isinstance(spec, str) for spec in specs)):
        raise ValueError(f"{name} does not say what it was made from; give --source")
    return specs


def open_generated(name, data_root=None, domains=()):
    """The set of a folder with metadata.parquet, or the train split of any data set spec.

    If the set does not name the source of an image, `domains` must hold exactly one.
    """
    path = Path(name)
    file = path / METADATA if path.is_dir() else path
    if file.name == METADATA and file.is_file():
        return TableImages(file, domains)
    data = load_reid(name, data_root)
    if "train" not in data:
        raise ValueError(f"--generated {name} has no train split, only {', '.join(data)}")
    return DatasetImages(name, data["train"], domains)


class Generated:
    """Base of both kinds of sets. `counts` is {(domain, pid): images}; `digest` changes with any row of the table."""

    def __len__(self):
        return self.size

    def look(self):
        """Count the images, reject repeated paths and compute the digest, in one pass over the labels."""
        self.counts, self.size = {}, 0
        digest, hashes = hashlib.sha256(), array("Q")
        labels = ("domain", "pid", "path")
        # Another seed or model makes another image under the same path.
        names = (*labels, *sorted(set(self.schema.names) - set(labels)))
        for table in self.tables():
            rows = zip(*(table[name].to_pylist() for name in names), strict=True)
            for domain, pid, path, *others in rows:
                digest.update(f"{domain}\t{pid}\t{path}\t{others}\n".encode())
                hashes.append(int.from_bytes(hashlib.blake2b(f"{domain}\t{path}".encode(), digest_size=8).digest()))
                self.counts[domain, pid] = self.counts.get((domain, pid), 0) + 1
            self.size += len(table)
        if not self.size:
            raise ValueError(f"{self.name} holds no images")
        if len(np.unique(np.frombuffer(hashes, dtype=np.uint64))) < self.size:
            raise ValueError(f"{self.name} names an image twice; every row needs a path of its own")
        self.digest = digest.hexdigest()

    def pieces(self, wanted=None):
        """Yield (first row, table, readers) of each piece of `PIECE` rows; (first row, None, None) unless wanted."""
        start = 0
        for table in self.tables():
            is_wanted = wanted is None or start in wanted
            yield (start, table, self.readers(start, table)) if is_wanted else (start, None, None)
            start += len(table)


class TableImages(Generated):
    """A set of image files, listed in the metadata.parquet of their folder."""

    def __init__(self, file, domains=()):
        self.name, self.file, self.folder = str(file), file, file.parent
        try:
            schema = pq.read_schema(file)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{file} cannot be read as a table: {error}") from None
        names = schema.names
        self.located_by = "file_name" if "file_name" in names else "path"
        if self.located_by not in names or "pid" not in names:
            raise ValueError(f"{file} needs the columns path (or file_name) and pid; it has {', '.join(names)}")
        for name in WHOLE & set(names):
            if not pa.types.is_integer(schema.field(name).type):
                raise ValueError(f"{file}: column {name!r} must hold whole numbers, it is {schema.field(name).type}")
        for name in TEXT & set(names):
            kind = schema.field(name).type
            if pa.types.is_nested(kind) or "string" not in str(kind):
                raise ValueError(f"{file}: column {name!r} must hold text, it is {kind}")
        self.domain = None
        if "domain" not in names:
            if len(domains) != 1:
                raise ValueError(f"{file} has no column domain, and there are {len(domains)} sources; add the column")
            self.domain = domains[0]
        dropped = {*SCORED.names, *ANSWERED.names, "image", "kept", "rejected"}
        fields = [field for field in schema if field.name not in dropped]
        for name, kind in (("path", pa.string()), ("domain", pa.string()), ("camid", pa.int64())):
            if name not in names:
                fields.append(pa.field(name, kind))
        if "synthetic" not in names:
            fields.append(pa.field("synthetic", pa.bool_()))
        self.schema = pa.schema([pa.field(field.name, field.type) for field in fields])
        self.look()

    def tables(self):
        """Yield the metadata in tables of `PIECE` rows, whatever the row groups of the file; the last is shorter."""
        with pq.ParquetFile(self.file, buffer_size=1 << 20, pre_buffer=False) as file:
            names = [name for name in self.schema.names if name in file.schema_arrow.names]
            waiting = []
            for batch in file.iter_batches(PIECE, columns=names):
                waiting.append(batch)
                while sum(map(len, waiting)) >= PIECE:
                    table = pa.Table.from_batches(waiting)
                    yield self.complete(table.slice(0, PIECE))
                    waiting = table.slice(PIECE).to_batches()
            if waiting:
                yield self.complete(pa.Table.from_batches(waiting))

    def complete(self, table):
        defaults = {"camid": -1, "synthetic": True, "domain": self.domain}
        columns = []
        for field in self.schema:
            if field.name in table.column_names:
                columns.append(table[field.name])
            elif field.name == "path":
                columns.append(table[self.located_by])
            else:
                columns.append(pa.array([defaults[field.name]] * len(table), field.type))
        table = pa.table(columns, schema=self.schema)
        for name in ("pid", "path", "domain", "camid"):
            if table[name].null_count:
                raise ValueError(f"{self.file}: column {name!r} is empty in {table[name].null_count} rows")
        return table

    def readers(self, start, table):
        names = [os.path.normpath(name) for name in table[self.located_by].to_pylist()]
        check_listed(str(self.folder), names, self.file)
        return [(self.folder / name).read_bytes for name in names]


class DatasetImages(Generated):
    """The train split of a data set that `load_reid` opened."""

    def __init__(self, name, dataset, domains=()):
        self.name, self.dataset, self.domain = str(name), dataset, None
        # Without a domain column, `load_reid` takes the domain from the name of the set.
        path, own_domains = Path(name).resolve(), set(dataset.unique("domain"))
        if own_domains <= {path.name, path.stem, path.parent.name} - set(domains) and len(domains) == 1:
            self.domain = domains[0]
        kinds = {"path": pa.string(), "pid": pa.int64(), "domain": pa.string(), "camid": pa.int64()}
        self.schema = pa.schema([*kinds.items(), ("synthetic", pa.bool_())])
        self.look()

    def tables(self):
        labels = self.dataset.remove_columns("image").with_format("arrow")
        for start in range(0, len(labels), PIECE):
            table = labels[start : start + PIECE]
            table = table.append_column("synthetic", pa.array([True] * len(table)))
            if self.domain is not None:
                index, domains = table.column_names.index("domain"), pa.array([self.domain] * len(table))
                table = table.set_column(index, "domain", domains)
            yield table.select(self.schema.names).cast(self.schema)

    def readers(self, start, table):
        images = self.dataset.select_columns(["image"]).with_format("arrow")[start : start + len(table)]["image"]
        return [Held(row) for row in images.to_pylist()]


class Held:
    """Reads the bytes of an image from a row of a table, or from the file at the row's path."""

    def __init__(self, row):
        self.row = row

    def __call__(self):
        return self.row["bytes"] if self.row["bytes"] is not None else read_bytes(self.row["path"])
