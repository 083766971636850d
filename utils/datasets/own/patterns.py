"""Your own folders in which the names of files say who is shown, by a pattern such as `{camid}/{pid}_*`."""

import re

import pyarrow as pa

from utils.datasets.own.tables import Columns, cut, locate_images
from utils.datasets.schema import left_out, readable
from utils.datasets.search_folders import levels_of

FIELDS = ("pid", "camid", "split")
PART = re.compile(r"\{(\w*)\}|(\*)|([^{}*]+)|[{}]")


def read_named(folder, pattern, columns):
    """({split: table}, columns) of the images below a folder, which are named like a pattern.

    In a pattern, `{pid}`, `{camid}` and `{split}` are the labels and `*` is any text, each within one name; a label is
    as short as it can be, and one that comes twice is the same text twice. Endings such as .jpg may be left out.
    Without `{camid}` there are no cameras, without `{split}` all images are of `train`.
    """
    for kind, value in columns._asdict().items():
        if value != Columns._field_defaults[kind] and (kind, value) != ("camid", "none"):
            raise ValueError(f"{folder}: {kind}_column={value} has no effect beside names={pattern}; leave it out")
    form = compiled(str(pattern).removeprefix("./"), folder)
    labels = {field: [] for field in ("file_name", *form.groupindex)}
    for path in sorted(path.relative_to(folder).as_posix() for _, _, images in levels_of(folder) for path in images):
        if not readable(path):
            raise ValueError(f"{ascii(str(folder / path))} is no UTF-8, as names unpacked elsewhere may be: rename it")
        match = form.fullmatch(path)
        if match is None:
            left_out(folder / path, f"{folder / path} is not named like {pattern}")
            continue
        for field, value in {"file_name": path, **match.groupdict()}.items():
            labels[field].append(value)
    if not labels["file_name"]:
        raise ValueError(f"{folder} has no image that is named like {pattern}")
    table = locate_images(pa.table(labels), folder / "*", None)
    splits = cut(table, columns, folder) if "split" in labels else {"train": table}
    return splits, columns if "camid" in labels else columns._replace(camid="none")


def compiled(pattern, folder):
    """The regular expression of a pattern."""
    parts, seen, before = [], [], None
    for match in PART.finditer(pattern):
        field, star, text = match.groups()
        # Where a label ended, or began, would be a guess.
        if before and not text and (field or before != "*"):
            raise ValueError(f"{folder}: names={pattern} has nothing between {before} and {match[0]}")
        before = None if text else match[0]
        if text:
            parts.append(re.escape(text))
        elif star:
            parts.append("[^/]*")
        elif field not in FIELDS:
            raise ValueError(f"{folder}: names={pattern} has {match[0]}; expected {{pid}}, {{camid}}, {{split}} and *")
        else:
            parts.append(f"(?P={field})" if field in seen else f"(?P<{field}>[^/]+?)")
            seen.append(field)
    if "pid" not in seen:
        raise ValueError(f"{folder}: names={pattern} has no {{pid}}, as {{camid}}/{{pid}}_* has")
    return re.compile("".join(parts) + r"(?:\.\w+)?")
