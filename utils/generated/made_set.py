"""A generated set on disk: the files of its images, its tables, its card, and how the identities' parts become one.

images/DOMAIN/PID/INDEX.jpg     marked as synthetic inside the file
identities/DOMAIN/PID/*.json    what is known of each: captions, images (the mark of being done), or a failure
metadata.parquet                a row an image, for `load_reid` and `datasets.load_dataset`
captions.parquet, measures.csv, README.md, report.html
"""

import json

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from utils.files import portable, to_json, write_csv
from utils.generated.captions import captions_table
from utils.reporting.report import data_card
from utils.worklist import differences

CAPTIONS, IMAGES, FAILED = "captions", "images", "failed"
SETTINGS = "args.json"
COMMAND = "accelerate launch train_dreambooth_reid.py"
METADATA = pa.schema(
    [
        ("file_name", pa.string()),
        ("path", pa.string()),
        ("pid", pa.int64()),
        ("domain", pa.string()),
        ("camid", pa.int64()),
        ("prompt", pa.string()),
        ("seed", pa.int64()),
        ("steps", pa.int64()),
        ("guidance", pa.float64()),
        ("model", pa.string()),
        ("synthetic", pa.bool_()),
    ]
)
DESCRIPTION, SOFTWARE = 0x010E, 0x0131
# The images and the table beside them; references and records are not part of the set.
CARD_FILES = ["images/**", "metadata.parquet"]
CARD = """{count:,} images of {people:,} identities, all of them made by a diffusion model that was fine-tuned to each
identity of {sources}; none is a photograph. Every file says so in its EXIF data. `metadata.parquet` has, for each
image, the identity, the data set it comes from, the prompt, seed, steps, guidance and a hash of the model.

```python
from datasets import load_dataset
from utils.datasets import load_reid

data = load_dataset("this folder or repository")
data = load_reid("this folder or repository")  # the schema of all Re-ID sets; camera -1 becomes one of its own
```

The people who were the models of these images did not agree to it one by one: the terms of the source data hold for
this set too. Finding people again across cameras is surveillance: use it only where the law and the people
concerned allow it."""


def image_path(name, index, ending):
    return f"images/{name}/{index:04d}.{ending}"


def save_image(image, path, *, quality, prompt, seed, model):
    """JPEG, or PNG by the path's ending, with the mark that no camera took it."""
    exif = Image.Exif()
    exif[DESCRIPTION] = json.dumps({"synthetic": True, "prompt": prompt, "seed": seed, "model": model})
    exif[SOFTWARE] = "diffreid"
    options = {"quality": quality, "subsampling": 0} if path.suffix == ".jpg" else {}
    image.save(path, exif=exif, **options)


def read_settings(work):
    """What args.json says, or None; ValueError where another script wrote it."""
    try:
        found = json.loads((work.folder / SETTINGS).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    if not (isinstance(found, dict) and str(found.get("command")).startswith(COMMAND)):
        raise ValueError(f"{work.folder} holds what another script wrote; give another --output_dir")
    return found


def keep_settings(work, arguments, command, versions):
    """Write down what decides the images; ValueError where images made with other settings lie there."""
    arguments = json.loads(to_json(arguments))
    before = (read_settings(work) or {}).get("arguments")
    if before == arguments:
        return
    if before is not None and work.recorded(IMAGES):
        changed = "; ".join(f"--{one}" for one in differences(before, arguments))
        raise ValueError(
            f"{work.folder} holds images of a run with other settings: {changed}. Give the same settings, or another "
            "--output_dir"
        )
    work.write(SETTINGS, to_json({"command": command, "arguments": arguments, "versions": versions}))


def command_of(args, apart):
    """What to type for the same images, without what concerns this machine alone."""
    words = [COMMAND]
    for name, origin in args.origin.items():
        if origin == "flag" and (name not in apart or name == "recipe"):
            value = portable(getattr(args, name))
            words += [f"--{name}", *(value if isinstance(value, list) else [] if value is True else [value])]
    return " ".join(map(str, words))


def merge(work, identities, validation_ids=0):
    """All tables and pages, from what lies in the folder. Returns (identities with images, images, failed ones)."""
    settings = read_settings(work)
    if settings is None:
        raise ValueError(f"{work.folder} holds no run, as it has no {SETTINGS}; give the --output_dir of one")
    arguments, command = settings["arguments"], settings["command"]
    records = [work.read(name, IMAGES) for name in work.recorded(IMAGES)]
    records = sorted(filter(None, records), key=lambda one: (one["domain"], one["pid"]))
    described = [work.read(name, CAPTIONS) for name in work.recorded(CAPTIONS)]
    described = sorted(filter(None, described), key=lambda one: (one["domain"], one["pid"]))
    failures = {name: work.read(name, FAILED)["error"] for name in work.recorded(FAILED)}
    rows = [metadata_row(record, image) for record in records for image in record["images"]]
    with work.scratch() as aside:
        if described:
            pq.write_table(captions_table(described), aside / "captions.parquet")
        if rows:
            pq.write_table(pa.Table.from_pylist(rows, schema=METADATA), aside / "metadata.parquet")
            (aside / "README.md").write_text(card(records, arguments, command), encoding="utf-8")
            names = list(records[0]["measures"])
            lines = [[one["domain"], one["pid"], *(one["measures"].get(name) for name in names)] for one in records]
            write_csv(aside / "measures.csv", ("domain", "pid", *names), lines)
        page = build_page(work, identities, records, described, failures, arguments, validation_ids)
        page.write(aside / "report.html")
        for path in sorted(aside.iterdir()):
            work.move(path, work.folder / path.name)
    return len(records), len(rows), failures


def metadata_row(record, image):
    fixed = {"camid": -1, "synthetic": True, "file_name": image["path"]}
    return {name: fixed.get(name, image.get(name, record.get(name))) for name in METADATA.names}


def card(records, arguments, command):
    sources = ", ".join(sorted({one["domain"] for one in records}))
    count = sum(len(one["images"]) for one in records)
    return data_card(
        "People made by Diffusion-ReID",
        text=CARD.format(count=count, people=len(records), sources=sources),
        command=command,
        details={name: value for name, value in arguments.items() if name != "attribute_lists"},
        tags=["person-re-identification", "synthetic"],
        task_categories=["image-feature-extraction"],
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": CARD_FILES}]}],
    )
