"""Removes an identity, or single images, from the results of evaluate.py: consent can be withdrawn.

    python -m utils.evaluation.forget output/evaluate --pid 17
    python -m utils.evaluation.forget output/search --pid anna
    python -m utils.evaluation.forget output/search --path 0017_c2_0003.jpg --dry_run

In the folder and all folders below it:

- Their rows leave the files of features, those of `--gallery_features` too, and every CSV that names the images.
- Their names leave the files of features, `metrics.json` and `args.json`.
- The reports of evaluations, which show pictures, and what killed runs left are deleted.
- The report of a training stays, as nothing makes it again, and is named.

The images themselves and models that were trained on them are not touched.
"""

import argparse
import csv
import json
import re
import shutil
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from utils.datasets.search_folders import identity_of
from utils.evaluation.index.store import MANIFEST, Index, is_identity
from utils.files import to_json, write_together

# Also the columns of CSV files that name their images.
SIDES = ("query", "gallery")
# What a killed run leaves of its files.
UNFINISHED = ("chunks-*", "*features.safetensors.part", "[0-9]*.safetensors.part", "*.csv.part", "report.html.part")
# Scripts that make their report once, at the end: the same command makes those of the others again.
MADE_ONCE = ("train_dcac.py", "finetune_reid.py", "adapt_reid.py", "pretrain_backbone.py")


def forget(folder, *, pid=None, paths=(), dry_run=False):
    """Remove the identity `pid` and the images `paths`; lines that say what was removed, ValueError where nothing is.

    `pid` is a name where identities have names, else a number. The images of an identity are those that a file of
    features in the folder names.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; give the --output_dir of evaluate.py")
    stored = [read(path) for path in sorted(folder.rglob("*.safetensors")) if holds_features(path)]
    stored += [Index.open(path.parent) for path in sorted(folder.rglob(MANIFEST))]
    left = [path for pattern in UNFINISHED for path in folder.rglob(pattern)]
    # The same name may be another image on the other side.
    images = {side: set(paths) for side in SIDES}
    for file in stored:
        for side, names in file.images_of(pid).items():
            images[side] |= names
    changes = [line for file in stored for line in file.without(pid, images, dry_run)]
    for path in sorted(folder.rglob("*.csv")):
        changes += without_rows(path, images, dry_run)
    for path in sorted(folder.rglob("metrics.json")):
        changes += without_skipped(path, pid, paths, dry_run)
    for path in sorted([*folder.rglob("metrics.json"), *folder.rglob("args.json")]):
        changes += without_mention(path, images["query"] | images["gallery"], dry_run)
    if not changes:
        raise ValueError(f"{folder} holds nothing of {wanted(pid, paths)}{known_identities(stored, pid)}")
    reports = sorted(folder.rglob("report.html"))
    for path in sorted([*filter(is_made_again, reports), *left]):
        changes.append(f"{path}: deleted; the same command makes it again")
        if not dry_run:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    changes += [
        f"{path}: stays, as nothing makes it again; if it shows the person, delete it by hand"
        for path in reports
        if not is_made_again(path)
    ]
    return changes


def is_made_again(report):
    """Whether the same command writes the report again: not that of a training."""
    try:
        command = json.loads((report.parent / "args.json").read_text(encoding="utf-8"))["command"]
    except (OSError, ValueError, LookupError, TypeError):
        return True
    # Generation's is one text.
    script = command if isinstance(command, str) else str(command[:1])
    return not any(name in script for name in MADE_ONCE)


def wanted(pid, paths):
    return " and ".join([*([] if pid is None else [f"identity {pid}"]), *map(str, paths)])


def known_identities(stored, pid):
    """The end of the error: the identities that are there."""
    if pid is None or not stored:
        return "; there is no file of features, so name images by --path" if pid is not None else ""
    pids = {name for file in stored for name in file.pids()}
    pids = sorted(pids, key=lambda name: (not name.isdecimal(), int(name) if name.isdecimal() else 0, name))
    return f"; it has {', '.join(pids[:10])}{' ...' if len(pids) > 10 else ''}"


def holds_features(path):
    try:
        with safe_open(path, "pt") as file:
            return any(name.endswith(("q_pid", "g_pid")) for name in file.keys())  # noqa: SIM118
    except (OSError, SafetensorError):
        return False


def read(path):
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return StoredFeatures(path, tensors, file.metadata() or {})


class StoredFeatures:
    """A file that `utils.evaluation.kept_features.save_features` wrote."""

    def __init__(self, path, tensors, header):
        self.path, self.tensors, self.header = path, tensors, header
        # "q_", "g_", or with several splits "0.q_", "0.g_", "1.q_" and so on.
        self.sides = sorted(name.removesuffix("pid") for name in tensors if name.endswith(("q_pid", "g_pid")))

    def names(self, side):
        return json.loads(self.header.get(f"{side}path", "[]"))

    def identities(self, side):
        """The identity of each row by name, its number where it has none."""
        names = json.loads(self.header.get(f"{side}names", "{}")).get("pid")
        return [names[pid] if names and pid >= 0 else str(pid) for pid in self.tensors[f"{side}pid"].tolist()]

    def pids(self):
        return {name for side in self.sides for name in self.identities(side)}

    def images_of(self, pid):
        """{side: names of images} of an identity."""
        found = {}
        for side in self.sides:
            rows = zip(self.names(side), self.identities(side), strict=False)
            found.setdefault(side_of(side), set()).update(name for name, known in rows if is_identity(known, pid))
        return found

    def without(self, pid, images, dry_run):
        """Write the file again without these rows: one line that says so, or none."""
        removed, tensors, header = 0, dict(self.tensors), self.without_name(pid)
        lost_rows = set()
        for side in self.sides:
            pids, names = self.identities(side), self.names(side)
            names = names or [None] * len(pids)
            kept = [
                row
                for row, (known, name) in enumerate(zip(pids, names, strict=True))
                if not is_identity(known, pid) and name not in images[side_of(side)]
            ]
            removed += len(pids) - len(kept)
            for name in (f"{side}pid", f"{side}cam", f"{side}row", side.replace("_", "f")):
                if name in tensors:
                    tensors[name] = tensors[name][kept]
            if f"{side}row" in tensors:
                lost_rows |= set(self.tensors[f"{side}row"].tolist()) - set(tensors[f"{side}row"].tolist())
            if names[0:1] != [None]:
                header[f"{side}path"] = json.dumps([names[row] for row in kept])
        if not removed and header == self.header:
            return []
        if "features" in tensors:
            # Rows that another split still uses stay.
            lost_rows -= {row for side in self.sides for row in tensors[f"{side}row"].tolist()}
            rows = [row for row in range(len(tensors["features"])) if row not in lost_rows]
            place = torch.full((len(tensors["features"]),), -1)
            place[rows] = torch.arange(len(rows))
            tensors["features"] = tensors["features"][rows]
            for side in self.sides:
                tensors[f"{side}row"] = place[tensors[f"{side}row"]]
        header = {
            name: text if name.endswith(("path", "names")) else unnamed(text, images["query"] | images["gallery"])
            for name, text in header.items()
        }
        # Without its key, the file is not taken for the features of the whole data set: some are gone.
        header.pop("key", None)
        if not dry_run:
            with write_together(self.path.parent) as part:
                tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
                save_file(tensors, part(self.path.name), metadata=header)
        return [f"{self.path}: {rows_removed(removed) if removed else 'the name removed'}"]

    def without_name(self, pid):
        """The header without the name of an identity; the others keep their numbers."""
        header = dict(self.header)
        for side in self.sides:
            names = json.loads(header.get(f"{side}names", "{}"))
            if any(is_identity(name, pid) for name in names.get("pid") or ()):
                names["pid"] = ["" if is_identity(name, pid) else name for name in names["pid"]]
                header[f"{side}names"] = json.dumps(names)
        return header


def rows_removed(count):
    return f"{count} row{'s' if count > 1 else ''} removed"


def side_of(prefix):
    """The side of the names that start so in a file of features."""
    return "query" if prefix.endswith("q_") else "gallery"


def without_skipped(path, pid, paths, dry_run):
    """Write a metrics.json again without the unreadable images of the identity, or of these names."""
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        skipped = metrics["skipped_images"]
    except (OSError, ValueError, LookupError, TypeError):
        return []

    def is_theirs(line):
        name = Path(line.split(": ")[0])
        # Lines hold whole paths, of folders of the search.
        return any(f"/{name.as_posix()}".endswith(f"/{path}") for path in paths) or any(
            is_identity(identity_of(name, by_folder), pid) for by_folder in (False, True)
        )

    kept = [line for line in skipped if not is_theirs(line)]
    if len(kept) == len(skipped):
        return []
    if not dry_run:
        with write_together(path.parent) as part:
            part(path.name).write_text(to_json(metrics | {"skipped_images": kept}), encoding="utf-8")
    return [f"{path}: {len(skipped) - len(kept)} unreadable images removed"]


def without_mention(path, names, dry_run):
    """Write a file of JSON again where it names one of the images, as the query of a search: a line, or none."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return []
    made = unnamed(text, [json.dumps(name)[1:-1] for name in names])
    if made == text:
        return []
    if not dry_run:
        with write_together(path.parent) as part:
            part(path.name).write_text(made, encoding="utf-8")
    return [f"{path}: the name of an image removed"]


def unnamed(text, names):
    """The text with `removed` where a path in it ends with one of the names."""
    for name in names:
        text = re.sub(rf"(?:^|(?<=[/\s\"]))({re.escape(name)})(?=$|[\s\",:])", "removed", text)
    return text


def without_rows(path, images, dry_run):
    """Write a CSV again without the rows that name one of the images: one line that says so, or none."""
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        columns, *rows = list(csv.reader(file)) or [[]]
    named = images | {"path": images["query"] | images["gallery"]}
    places = [(place, named[column]) for place, column in enumerate(columns) if column in named]

    def is_named(row):
        # `write_csv` puts a quote before what a spreadsheet would compute; a row may be cut short.
        return any({row[place], row[place].removeprefix("'")} & names for place, names in places if place < len(row))

    kept = [row for row in rows if not is_named(row)]
    removed = len(rows) - len(kept)
    if not removed:
        return []
    if not dry_run:
        with write_together(path.parent) as part:
            # Cells are as `write_csv` left them.
            with open(part(path.name), "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
                csv.writer(file).writerows([columns, *kept])
    return [f"{path}: {rows_removed(removed)}"]


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(
        prog="python -m utils.evaluation.forget",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", help="--output_dir of evaluate.py, or a folder above several")
    parser.add_argument("--pid", help="identity to remove: its name, or its number where identities have no names")
    parser.add_argument(
        "--path", nargs="+", action="extend", default=[], help="images to remove, as rankings.csv names them"
    )
    parser.add_argument("--dry_run", action="store_true", help="only list what would be removed")
    args = parser.parse_args(input_args)
    if args.pid is None and not args.path:
        parser.error("give --pid, or --path, or both")
    if args.pid == "-1":
        parser.error(f"--pid {args.pid}: images of unknown identity are named by --path")
    return args


def main(input_args=None):
    args = parse_args(input_args)
    try:
        changes = forget(args.folder, pid=args.pid, paths=args.path, dry_run=args.dry_run)
    except ValueError as error:
        sys.exit(f"forget: {error}")
    print(*changes, sep="\n")
    print("Nothing was changed: --dry_run" if args.dry_run else "The images and trained models were not touched.")


if __name__ == "__main__":
    main()
