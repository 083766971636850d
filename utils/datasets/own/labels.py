"""Identities and cameras of a table, whether they are numbers or text."""

import re
import unicodedata

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from utils.datasets.images import storage_of
from utils.datasets.schema import dense, warn_once

# What other programs write for a missing value. `Nan` is a name.
MISSING = ("", "nan", "NaN", "<NA>", "None", "null", "NULL")
WHOLE = re.compile(r"-?[0-9]{1,18}")


class MissingColumn(ValueError):
    """A table lacks the `column` that should hold its pids or cameras."""

    def __init__(self, column, message):
        super().__init__(message)
        self.column = column


def labels_in(splits, column, meaning, where):
    """({split: int64 labels}, their names or None) of a column; `meaning` is pid or camid.

    Whole numbers stay as they are, also as text ("0007") if no two texts are one number. Other text is numbered from 0
    in sorted order, over all splits.
    """
    values = {split: cleaned(dataset, column, meaning, where) for split, dataset in splits.items()}
    features = [dataset.features[column] for dataset in splits.values()]
    if all(isinstance(feature, datasets.ClassLabel) and feature == features[0] for feature in features):
        return {split: numbers(part) for split, part in values.items()}, features[0].names
    # Classes that each split numbers in its own way are compared by their names.
    for split, feature in zip(splits, features, strict=True):
        if isinstance(feature, datasets.ClassLabel):
            words = [feature.int2str(value) if value >= 0 else str(value) for value in values[split].to_pylist()]
            values[split] = pa.array(words, pa.string())
    if not any(pa.types.is_string(part.type) for part in values.values()):
        return {split: numbers(part) for split, part in values.items()}, None
    texts = {split: part.cast(pa.string()).to_pylist() for split, part in values.items()}
    names = {text for part in texts.values() for text in part}
    warn_of_spellings(names, {"pid": "identity", "camid": "camera"}[meaning], where)
    whole = all(WHOLE.fullmatch(name) for name in names)
    if whole and len({int(name) for name in names}) == len(names):
        return {split: np.array([int(text) for text in part], np.int64) for split, part in texts.items()}, None
    number_of = dense(names)
    return {split: np.array([number_of[text] for text in part], np.int64) for split, part in texts.items()}, sorted(
        names
    )


def cleaned(dataset, column, meaning, where):
    """The values of a column as int64 or text; ValueError, with what to do, for anything else."""
    if column not in dataset.column_names:
        none = f", or {where}:{meaning}_column=none if there are no cameras" if meaning == "camid" else ""
        raise MissingColumn(
            column,
            f"{where} has no column {column!r} for the {meaning}; its columns are {dataset.column_names}. "
            f"Name the right one: {where}:{meaning}_column=...{none}",
        )
    values = storage_of(dataset, column).combine_chunks()
    is_text = pa.types.is_string(values.type) or pa.types.is_large_string(values.type)
    if pa.types.is_float16(values.type):
        # Arrow cannot round it.
        values = values.cast(pa.float32())
    if is_text:
        values = values.cast(pa.string())
        empty = pc.is_in(pc.utf8_trim_whitespace(values), pa.array(MISSING))
    elif pa.types.is_floating(values.type):
        empty = pc.is_nan(values)
    else:
        empty = pc.is_null(values)
    rows = np.flatnonzero(pc.or_(pc.fill_null(empty, True), pc.is_null(values)).to_numpy(zero_copy_only=False))
    if len(rows):
        raise ValueError(
            f"{where}: column {column!r} is empty in {len(rows)} of {len(values)} rows, first in row {rows[0]}; fill "
            "it in, or remove these rows"
        )
    if pa.types.is_floating(values.type) and bool(pc.all(pc.equal(values, pc.floor(values))).as_py()):
        # Numbers that pandas had to keep as floats.
        return as_int64(values, column, where)
    if not is_text and not pa.types.is_integer(values.type):
        example = values[0].as_py() if len(values) else None
        raise ValueError(
            f"{where}: column {column!r} must hold integers, it is {values.type} ({example!r}); text works too"
        )
    return values if is_text else as_int64(values, column, where)


def as_int64(values, column, where):
    try:
        return values.cast(pa.int64())
    except pa.ArrowInvalid:
        largest = pc.max(pc.abs(values.cast(pa.float64(), safe=False))).as_py()
        raise ValueError(
            f"{where}: column {column!r} holds numbers as large as {largest:g}; labels are whole numbers below 2^63, "
            "or text"
        ) from None


def numbers(values):
    return values.to_numpy(zero_copy_only=False)


def plainly(name):
    """A name without differences in case, width, space and leading zeros."""
    words = " ".join(unicodedata.normalize("NFKC", name).casefold().split())
    return re.sub(r"(?<![0-9])0+(?=[0-9])", "", words)


def warn_of_spellings(names, meaning, where):
    """A warning if names differ in case, spaces or leading zeros only, such as "Anna" and "anna "."""
    groups = {}
    for name in sorted(names):
        groups.setdefault(plainly(name), []).append(name)
    alike = [group for group in groups.values() if len(group) > 1]
    if alike:
        shown = "; ".join(" and ".join(map(repr, group)) for group in alike[:3]) + ("; ..." if len(alike) > 3 else "")
        warn_once(f"{where}: {shown} look like one {meaning} but count as several; write each in one way")
