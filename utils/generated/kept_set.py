"""The output of filtering: scores.parquet, the data set of the kept images, and its card.

dataset/README.md                       the card
dataset/data/train-00000-of-00003.parquet   with the images, for `load_reid` and `datasets.load_dataset`
dataset/metadata.parquet, dataset/PATH      or the same as files, each at its `path`
"""

import io
import math
import os
import shutil
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from utils.datasets.images import as_rgb
from utils.datasets.portable import push_folder
from utils.datasets.schema import ENDINGS, check_listed
from utils.generated import choosing
from utils.generated.images import CHOSEN
from utils.reporting.report import data_card, percent

IMAGES_A_FILE = 5000
IMAGES_A_GROUP = 100
QUALITY = 95
# Columns of scores.parquet that the data set leaves out: they do not describe a kept image, or would split the set.
UNSAVED = ("file_name", "error", "kept", "rejected", "perceptual_hash", "split")
LIMITS = (10, 30, 50, 70, 90, 110, 130, 150, 170, 190, 210, 250, 300)
# The type of an image column in `datasets`.
TABLE_COLUMNS = ("images", "scene", "person IDs", "labeled", "environment", "crop size")
CARD = """{kept:,} images of {identities:,} identities, {made_by}. {marked}
They are what {filter} left of {images:,} generated images.

```python
from datasets import load_dataset
from utils.datasets import load_reid

data = load_dataset("this folder or repository")
data = load_reid("this folder or repository")  # the schema of all Re-ID sets; camera -1 becomes one of its own
```

A class is a pair of `domain` and `pid`: sources lie side by side, and the same number in two of them is two people.

## Counts

{counts}

## Why images were left out

{reasons}

## Identities

{distribution}

## As a row of the usual table

{row}

## Sources and terms

{sources}

The people of the source images did not agree to these images one by one: the terms of each source hold for this set
too. Finding people again across cameras is surveillance: use it only where the law and the people concerned allow
it."""
DRAWN, DIFFUSED, GENERATED = "drawn by code", "made by a diffusion model", "generated"
NAMES = {"clip": "the CLIP filter", "cctf": "CCTF", "reid": "Re-ID CTF", "attributes": "the attribute filter"}


def write_scores(path, tables, choice=None):
    """Write tables of scored rows to one file; the columns of the choice are null without a `Choice`."""
    writer, start = None, 0
    try:
        for table in tables:
            table = table.select([name for name in table.column_names if name not in dict(CHOSEN)])
            if choice is None:
                columns = [pa.nulls(len(table), kind) for _, kind in CHOSEN]
            else:
                part = slice(start, start + len(table))
                why = [choosing.REASONS[number] or None for number in choice.reason[part]]
                columns = [pa.array(choice.kept[part]), pa.array(why, pa.string())]
            for (name, _), column in zip(CHOSEN, columns, strict=True):
                table = table.append_column(name, column)
            writer = writer or pq.ParquetWriter(path, table.schema)
            writer.write_table(table)
            start += len(table)
    finally:
        if writer:
            writer.close()


def summary_of(name, settings, sources, scores, choice):
    """The contents of the card, as plain values. `name`: the filter; `settings`: the flags of the choice."""
    person_source = np.array([scores.domains.index(domain) for domain, _ in scores.people], np.int64)
    counts = choosing.images_per_person(scores, choice.kept)
    by_source = {}
    for number, domain in enumerate(scores.domains):
        rows, people = scores.source == number, person_source == number
        by_source[domain] = {
            "generated": int(rows.sum()),
            "kept": int(choice.kept[rows].sum()),
            "identities": int((counts[people] > 0).sum()),
            "identities_without": int((counts[people] == 0).sum()),
            "source_images": len(sources[domain].train),
            "threshold": choice.thresholds[domain],
        }
    reasons = np.bincount(choice.reason, minlength=len(choosing.REASONS))
    source_counts = np.concatenate([source.labels.bincount().numpy() for source in sources.values()])
    present = counts[counts > 0]
    top = max(present.max(), source_counts.max())
    limits = LIMITS if top > 30 else range(1, int(top) + 2)
    limits = [limit for limit in limits if limit <= top + 20]
    return {
        "filter": name,
        "choice": settings,
        "images": len(scores),
        "kept": int(choice.kept.sum()),
        "identities": int((counts > 0).sum()),
        "sources": by_source,
        "rejected": {why: int(reasons[index]) for index, why in enumerate(choosing.REASONS) if why},
        "images_per_identity": {"mean": float(present.mean()), "min": int(present.min()), "max": int(present.max())},
        "distribution": {
            "limits": limits,
            "kept": choosing.share_below(present, limits),
            "source": choosing.share_below(source_counts, limits),
        },
        "row": None,
    }


def write_set(folder, generated, scores_path, summary, *, kind, size, title, license, command, models):
    """Write the kept images to `folder`, replacing it once the new set is complete. Adds to `summary`.

    `kind`: parquet or folder. `size`: (height, width) of the written images, or None to keep theirs. `models`: names
    of the scoring models, by flag.
    """
    folder = Path(folder)
    part = folder.with_name(f".{folder.name}.part")
    old = folder.with_name(f".{folder.name}.old")
    for leftover in (part, old):
        shutil.rmtree(leftover, ignore_errors=True)
    part.mkdir(parents=True)
    write = write_parquet if kind == "parquet" else write_files
    origin = Origin()
    rows = origin.noted(kept_rows(generated, scores_path, size))
    try:
        sizes = write(part, rows, summary["kept"], schema_of(scores_path))
        summary |= {"made_by": origin.words(), "models": sorted(origin.models), "synthetic": origin.synthetic}
        crop = " x ".join(map(str, sizes.pop())) if len(sizes) == 1 else "vary"
        summary["row"] = [f"{summary['kept']:,}", "vary", f"{summary['identities']:,}", "yes", "vary", crop]
        text = card(summary, kind=kind, title=title, license=license, command=command, models=models)
        (part / "README.md").write_text(text, encoding="utf-8")
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    if folder.exists():
        os.replace(folder, old)
    os.replace(part, folder)
    shutil.rmtree(old, ignore_errors=True)


def upload_set(folder, name):
    """Upload the data set to a repository, a private one where it is new; returns an address."""
    # Files of an earlier choice would be loaded together with the new ones.
    return push_folder(folder, name, ["*.parquet", *(f"*{ending}" for ending in ENDINGS)])


class Origin:
    """Collects, from rows as they are written, how their images were made."""

    def __init__(self):
        self.models, self.synthetic, self.sampled, self.count = set(), 0, 0, 0

    def noted(self, rows):
        for row, encoded in rows:
            self.count += 1
            self.synthetic += bool(row.get("synthetic"))
            self.sampled += bool(row.get("steps"))
            if row.get("model"):
                self.models.add(row["model"])
            yield row, encoded

    def words(self):
        if self.models == {"drawn"}:
            return DRAWN
        return DIFFUSED if self.sampled == self.count else GENERATED


def kept_rows(generated, scores_path, size=None):
    """Yield (row as a dict, bytes of the image) for every kept image."""
    with pq.ParquetFile(scores_path, pre_buffer=False) as file:
        for (_, _, readers), batch in zip(generated.pieces(), pieces_of(file), strict=True):
            for row, read in zip(batch.to_pylist(), readers, strict=True):
                if row["kept"]:
                    encoded = read()
                    yield row, resized(encoded, size) if size else encoded


def pieces_of(file):
    """Yield one table for each row group; `write_scores` writes one row group for each piece."""
    for number in range(file.num_row_groups):
        yield file.read_row_group(number)


def resized(encoded, size):
    """The image as a JPEG of another size, with its EXIF data."""
    buffer = io.BytesIO()
    # Pillow reads the pixels on first use: only inside this block.
    with Image.open(io.BytesIO(encoded)) as image:
        ImageOps.exif_transpose(image, in_place=True)
        exif, small = image.getexif(), as_rgb(image)
        if small.size != tuple(size[::-1]):
            small = small.resize(tuple(size[::-1]), Image.Resampling.BICUBIC)
        small.save(buffer, "JPEG", quality=QUALITY, subsampling=0, exif=exif)
    return buffer.getvalue()


def schema_of(scores_path):
    """`datasets.Features` of the kept rows: the image and its columns."""
    fields = [field for field in pq.read_schema(scores_path) if field.name not in UNSAVED]
    return datasets.Features({"image": datasets.Image()} | datasets.Features.from_arrow_schema(pa.schema(fields)))


def write_parquet(folder, rows, count, features):
    """Write parquet files of up to `IMAGES_A_FILE` images, one row group at a time. Returns the set of image sizes."""
    (folder / "data").mkdir()
    files = math.ceil(count / IMAGES_A_FILE)
    sizes, schema, writer, waiting = set(), features.arrow_schema, None, []
    for number, (row, encoded) in enumerate(tqdm(rows, total=count, desc="writing", disable=None)):
        if number % IMAGES_A_FILE == 0:
            if writer:
                writer.close()
            name = f"train-{number // IMAGES_A_FILE:05d}-of-{files:05d}.parquet"
            writer = pq.ParquetWriter(folder / "data" / name, schema)
        waiting.append({"image": {"bytes": encoded, "path": os.path.basename(row["path"])}} | row)
        sizes.add(size_of(encoded))
        if len(waiting) == IMAGES_A_GROUP or number == count - 1 or (number + 1) % IMAGES_A_FILE == 0:
            writer.write_table(pa.Table.from_pylist(waiting, schema=schema))
            waiting = []
    writer.close()
    return sizes


def write_files(folder, rows, count, features):
    """Write image files at their own paths, and metadata.parquet. Returns the set of image sizes."""
    other_columns = {name: kind for name, kind in features.items() if name != "image"}
    # Without a column `split`, `load_reid` would take folders named train, query and gallery for splits.
    text_columns = {name: datasets.Value("string") for name in ("file_name", "split")}
    schema = datasets.Features(text_columns | other_columns).arrow_schema.remove_metadata()
    sizes, writer, waiting = set(), pq.ParquetWriter(folder / "metadata.parquet", schema), []
    for number, (row, encoded) in enumerate(tqdm(rows, total=count, desc="writing", disable=None)):
        name = os.path.normpath(row["path"])
        check_listed(str(folder), [name], "the metadata")
        if not name.lower().endswith(ENDINGS):
            # `datasets` recognizes images by their file ending.
            name += ending_of(encoded)
        path = folder / name
        if path.exists():
            raise ValueError(f"two of the images have the path {name}, which is one file; use --format parquet")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded)
        sizes.add(size_of(encoded))
        waiting.append(row | {"file_name": name, "split": "train"})
        if len(waiting) == IMAGES_A_FILE or number == count - 1:
            writer.write_table(pa.Table.from_pylist(waiting, schema=schema))
            waiting = []
    writer.close()
    return sizes


def size_of(encoded):
    """(height, width), read from the header of the image."""
    with Image.open(io.BytesIO(encoded)) as image:
        return image.size[::-1]


def ending_of(encoded):
    with Image.open(io.BytesIO(encoded)) as image:
        return f".{image.format.lower()}"


def card(summary, *, kind, title, license, command, models):
    files = "data/train-*" if kind == "parquet" else "**"
    per_source = [
        [
            domain,
            source["generated"],
            source["kept"],
            source["identities"],
            source["source_images"],
            number(source["threshold"]),
        ]
        for domain, source in summary["sources"].items()
    ]
    distribution = summary["distribution"]
    shares = zip(distribution["limits"], distribution["kept"], distribution["source"], strict=True)
    header = ["source", "generated", "kept", "identities", "source images", "threshold"]
    notes = []
    for domain, source in summary["sources"].items():
        count, without = source["identities"] + source["identities_without"], source["identities_without"]
        notes.append(
            f"- {as_cell(domain)}: images made from {count:,} of its identities, {without:,} of them with none kept; "
            "licence and terms are those of its publishers."
        )
    text = CARD.format(
        kept=summary["kept"],
        identities=summary["identities"],
        images=summary["images"],
        made_by=summary["made_by"],
        marked=marked(summary),
        filter=NAMES[summary["filter"]],
        counts=markdown(header, per_source),
        reasons=markdown(["reason", "images"], [[why, count] for why, count in summary["rejected"].items() if count]),
        distribution="Share of identities with fewer than X images, of those that have any.\n\n"
        + markdown(
            ["X", "here", "source"],
            [[limit, percent(kept_share), percent(source_share)] for limit, kept_share, source_share in shares],
        ),
        row=markdown(["data set", *TABLE_COLUMNS], [[title, *summary["row"]]]),
        sources="\n".join(notes),
    )
    names = {}
    for flag, value in models.items():
        values = value if isinstance(value, list) else [value or "trained on the source"]
        names[flag] = " ".join(os.path.basename(str(name).rstrip("/")) for name in values)
    return data_card(
        title,
        text=text,
        command=command,
        details={name: plain(value) for name, value in summary["choice"].items() if value is not None}
        | {"filter": summary["filter"]}
        | ({"generated by": " ".join(summary["models"][:5])} if summary["models"] else {})
        | names,
        license=license,
        tags=["person-re-identification", "synthetic"],
        task_categories=["image-feature-extraction"],
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": files}]}],
    )


def plain(value):
    """{domain or None: number}, in the form of the command line."""
    if not isinstance(value, dict):
        return value
    return " ".join(f"{number}" if domain is None else f"{domain}={number}" for domain, number in value.items())


def marked(summary):
    """A sentence on how many images are no photographs."""
    if summary["synthetic"] == summary["kept"]:
        return "None is a photograph, and the column `synthetic` says so of every row."
    return f"The column `synthetic` marks {summary['synthetic']:,} of them as no photographs."


def markdown(columns, rows):
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)]]
    cells = [[f"{cell:,}" if isinstance(cell, int) else as_cell(cell) for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in [*lines, *cells])


def as_cell(text):
    """The text as a table cell, without line ends, bars and markup."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")


def number(value):
    return f"{value:.4f}" if math.isfinite(value) else "none"
