"""Your own tables: reads csv, jsonl and parquet files, finds their images and divides them into splits.

In a folder with several tables, metadata.csv, .jsonl or .parquet is the one that counts (the `imagefolder` convention,
and that of generated data sets).
"""

import json
import os
import re
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from utils.datasets.images import IMAGE_TYPE
from utils.datasets.schema import SPLITS, check_listed, listing, warn_once

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
TABLES = (".csv", ".tsv", ".jsonl", ".parquet", ".json")
IMAGE_COLUMNS = ("image", "file_name", "path")
# Columns of .csv files that stay text.
TEXTS = ("file_name", "path", "domain", "split")
NUMBERS = r"^-?[0-9]{1,18}(?:\.0+)?$"


class Columns(NamedTuple):
    """The names of the columns in a user's table."""

    image: str | None = None
    pid: str = "pid"
    camid: str = "camid"
    domain: str = "domain"
    split: str = "split"


def is_table(name):
    return name.lower().endswith(TABLES)


def read_table(file):
    """A table from any of `TABLES`. Of .csv and .tsv, columns are text, but whole numbers of one spelling each."""
    kind = file.suffix.lower()
    try:
        if kind in (".csv", ".tsv"):
            table = read_csv(file)
        elif kind == ".jsonl":
            table = pyarrow.json.read_json(file)
        elif kind == ".json":
            table = rows_of_json(file)
        else:
            table = pq.read_table(file)
        names = table.column_names
    # The names of columns are decoded when they are asked for.
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read as a table: {error}") from error
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"{file} has more than one column {twice[0]!r}; its columns are {names}")
    for number, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type):
            # Categories of pandas.
            table = table.set_column(number, field.name, table[field.name].cast(field.type.value_type))
        if pa.types.is_string_view(field.type):
            # Arrow cannot filter it.
            table = table.set_column(number, field.name, table[field.name].cast(pa.string()))
    return table


def read_csv(file):
    options = {"parse_options": pyarrow.csv.ParseOptions(delimiter=delimiter_of(file))}
    names = pyarrow.csv.open_csv(file, **options).schema.names
    convert = pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()))
    table = pyarrow.csv.read_csv(file, convert_options=convert, **options)
    for number, name in enumerate(table.column_names):
        texts = table.column(number)
        if name in TEXTS or not len(texts) or not pc.all(pc.match_substring_regex(texts, NUMBERS)).as_py():
            continue
        # Numbers that pandas had to keep as floats end in .0.
        values = texts.cast(pa.float64()) if pc.any(pc.match_substring(texts, ".")).as_py() else texts.cast(pa.int64())
        # 007 and 7 are two names.
        if len(values.unique()) == len(texts.unique()):
            table = table.set_column(number, name, values)
    return table


def rows_of_json(file):
    """The table of a list of objects; ValueError for other JSON, such as the annotations of a labelling tool."""
    try:
        rows = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(
            f"{file} is no table; expected a list with an object an image, "
            'such as [{"file_name": "1.jpg", "pid": "anna", "camid": 1}]'
        )
    return pa.table(
        {name: [row.get(name) for row in rows] for name in dict.fromkeys(key for row in rows for key in row)}
    )


def delimiter_of(file):
    """Comma, semicolon or tab, whichever is most frequent in the first line."""
    with open(file, "rb") as lines:
        head = lines.readline(100_000)
    return max(",;\t", key=lambda mark: head.count(mark.encode()))


def is_image_struct(kind):
    if not (pa.types.is_struct(kind) and {"bytes", "path"} <= {field.name for field in kind}):
        return False
    content, path = kind.field("bytes").type, kind.field("path").type
    # A column without a single value has the type null.
    return content in (pa.binary(), pa.large_binary(), pa.null()) and path in (
        pa.string(),
        pa.large_string(),
        pa.null(),
    )


def image_column_of(table, file, asked_for=None):
    """The column of the images: the named one, `image`, a column of structs (bytes, path), or one of file names."""
    structs = [field.name for field in table.schema if is_image_struct(field.type)]
    candidates = [asked_for] if asked_for else [IMAGE_COLUMNS[0], *structs[:1], *IMAGE_COLUMNS[1:]]
    column = next((name for name in candidates if name in table.column_names), None)
    if column is None:
        raise ValueError(
            f"{file} has no column {' or '.join(candidates)}; its columns are {table.column_names}. Name the one of "
            f"the images: {file}:image_column=..."
        )
    if column in structs and len(structs) > 1 and not asked_for and column != IMAGE_COLUMNS[0]:
        raise ValueError(f"{file} has images in {' and '.join(structs)}; name one: {file}:image_column=...")
    return column


def as_storage(array, file, column):
    """(bytes, paths) of an image column: structs, bytes or file names."""
    kind = array.type
    if is_image_struct(kind):
        return pc.struct_field(array, "bytes").cast(pa.binary()), pc.struct_field(array, "path").to_pylist()
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return array.cast(pa.binary()), [None] * len(array)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return pa.nulls(len(array), pa.binary()), array.to_pylist()
    raise ValueError(f"{file}: column {column!r} must hold images or file names, it is {kind}")


def locate_images(table, file, image_column):
    """The table with an image column: embedded images as they are, file names relative to the table's folder."""
    column = image_column_of(table, file, image_column)
    if not len(table):
        raise ValueError(f"{file} has no rows")
    chunks, paths = [], []
    for chunk in table[column].chunks:
        content, names = as_storage(chunk, file, column)
        outside = pc.is_null(content).to_pylist()
        for row, (out, name) in enumerate(zip(outside, names, strict=True), len(paths)):
            if out and not name:
                raise ValueError(f"{file}: column {column!r} is empty in row {row}")
            if out and "://" in name:
                raise ValueError(
                    f"{file}: column {column!r} has the address {name}; download the images and name the files"
                )
        names = [below(file.parent, name) if out else name for out, name in zip(outside, names, strict=True)]
        paths += [os.path.normpath(name) if out else None for out, name in zip(outside, names, strict=True)]
        check_listed(file.parent, [name for out, name in zip(outside, names, strict=True) if out], file)
        files = [os.path.join(file.parent, name) if out else name for out, name in zip(outside, names, strict=True)]
        chunks.append(pa.StructArray.from_arrays([content, pa.array(files, pa.string())], ["bytes", "path"]))
    result = table.select([name for name in table.column_names if name not in (column, "image")])
    if all(paths) and ("path" not in result.column_names or column == "file_name"):
        result = result.select([name for name in result.column_names if name != "path"])
        result = result.append_column("path", pa.array(paths, pa.string()))
    # The schema's metadata, written by another library, no longer describes the columns.
    return result.append_column("image", pa.chunked_array(chunks, IMAGE_TYPE)).replace_schema_metadata()


def below(folder, name):
    """A name as one below the folder, if it is absolute and lies there, or was written on Windows."""
    if "\\" in name and not os.path.exists(os.path.join(folder, name)):
        name = name.replace("\\", "/")
    if os.path.isabs(name):
        for root in (os.path.abspath(folder), os.path.realpath(folder)):
            if name.startswith(os.path.join(root, "")):
                return os.path.relpath(name, root)
    return name


def split_of_file(file):
    """train-00000-of-00003.parquet, query.parquet: the split is the first word of the name."""
    word = re.split(r"[-_.]", file.name)[0]
    return word if word in SPLITS else None


def check_asked_for(columns, kind, names, where):
    """ValueError if a column that the user named is absent; a column with the default name may be absent."""
    name = getattr(columns, kind)
    if name != Columns._field_defaults[kind] and name not in names:
        raise ValueError(f"{where} has no column {name!r} for the {kind}; its columns are {names}")


def check_words(words, source):
    odd = sorted({str(word) for word in words} - set(SPLITS))
    if odd:
        raise ValueError(f"{source} knows {odd[:3]} as splits; they must be {', '.join(SPLITS)}")


def cut(table, columns, source):
    """A table's splits: by its split column, else by the first folder of its files, else all rows are `train`."""
    check_asked_for(columns, "split", table.column_names, source)
    if columns.split in table.column_names:
        words = table[columns.split].to_pylist()
    elif pc.struct_field(table["image"], "bytes").null_count < len(table):
        # The paths of images inside the table come from another place and say nothing about splits.
        return {"train": table}
    else:
        paths = table["path"].to_pylist() if "path" in table.column_names else []
        words = [path.split("/")[0] for path in paths if isinstance(path, str)]
        if len(words) < len(table) or not set(words) & set(SPLITS):
            return {"train": table}
    check_words(words, source)
    words = pa.array(words)
    return {split: table.filter(pc.equal(words, split)) for split in SPLITS if split in set(words.to_pylist())}


def read_folder_tables(folder, columns):
    """Tables of a folder: metadata files of the folder or its splits, else tables of any name; None without any."""
    for name in METADATA:
        if (folder / name).is_file():
            table = locate_images(read_table(folder / name), folder / name, columns.image)
            return cut(table, columns, folder / name)
    splits = {}
    for split in SPLITS:
        files = tables_of_split(folder / split)
        if files:
            table = joined([locate_images(read_table(file), file, columns.image) for file in files], folder / split)
            if "path" in table.column_names:
                paths = [
                    os.path.join(split, path) if isinstance(path, str) else path for path in table["path"].to_pylist()
                ]
                table = table.drop_columns(["path"]).append_column("path", pa.array(paths))
            splits[split] = table
    missing = [split for split in SPLITS if split not in splits and (folder / split).is_dir()]
    if splits and missing:
        raise ValueError(f"{folder / missing[0]} has no {' or '.join(METADATA)}, {', '.join(splits)} have one")
    if splits:
        refuse_split_column(columns, folder)
        warn_of_others(folder)
        return splits
    files = tables_in(folder) or (tables_in(folder / "data") if (folder / "data").is_dir() else [])
    if not files:
        return None
    groups = {}
    for file in files:
        groups.setdefault(split_of_file(file), []).append(file)
    loose = groups.get(None, [])
    if len(loose) > 1 and any(file.suffix.lower() != ".parquet" for file in loose):
        names = " and ".join(file.name for file in loose[:3])
        raise ValueError(f"{folder} has {names}; name the one that describes the images, such as {loose[0]}")
    tables = {
        split: joined([locate_images(read_table(file), file, columns.image) for file in group], folder)
        for split, group in groups.items()
    }
    if None not in tables:
        refuse_split_column(columns, folder)
        return {split: tables[split] for split in SPLITS if split in tables}
    table = joined(list(tables.values()), folder)
    if len(tables) > 1 and columns.split not in table.column_names:
        odd = loose[0].name
        raise ValueError(
            f"{folder} has {odd} beside the files of {', '.join(split for split in SPLITS if split in tables)}; "
            f"it belongs to none of {', '.join(SPLITS)}: move it away, or rename it"
        )
    return cut(table, columns, folder)


def warn_of_others(folder):
    """A warning for folders with a metadata file that are no splits, such as `test`."""
    others = [entry.name for entry in listing(folder) if entry.is_dir() and entry.name not in SPLITS]
    others = [name for name in others if any((folder / name / table).is_file() for table in METADATA)]
    if others:
        warn_once(f"{folder}: {', '.join(others)} is left out, only {', '.join(SPLITS)} are read")


def tables_in(folder):
    """The tables of a folder: all of its parquet files, or else those of other kinds; .json only without others."""
    files = [Path(entry.path) for entry in listing(folder) if is_table(entry.name) and entry.is_file()]
    plain = [file for file in files if file.suffix.lower() != ".json"]
    return [file for file in plain if file.suffix.lower() == ".parquet"] or plain or files


def tables_of_split(folder):
    """The metadata file of a split's folder, or its parquet files, or its only table of another kind."""
    for name in METADATA:
        if (folder / name).is_file():
            return [folder / name]
    files = tables_in(folder) if folder.is_dir() else []
    if len(files) > 1 and files[0].suffix.lower() != ".parquet":
        raise ValueError(f"{folder} has {' and '.join(file.name for file in files[:3])}; rename one to metadata.csv")
    return files


def refuse_split_column(columns, folder):
    if columns.split != Columns._field_defaults["split"]:
        raise ValueError(
            f"{folder}: split_column={columns.split} has no effect, the splits are files or folders; leave it out"
        )


def joined(tables, folder):
    """Tables concatenated by rows; integers and text may have different widths."""
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise ValueError(f"the tables in {folder} do not go together: {error}") from error
