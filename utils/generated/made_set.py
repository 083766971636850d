"""A generated set on disk: its images, tables and card, and the merge of the identities' records.

images/DOMAIN/PID/INDEX.jpg     marked as synthetic inside the file
adapters/DOMAIN/PID/            LoRA and token of each identity, by flag
references/KEY.safetensors      reference sets, which identities with the same prompt share
identities/DOMAIN/PID/*.json    records of each identity: captions, images (written when it is done), or a failure
metadata.parquet                a row for each image, for `load_reid` and `datasets.load_dataset`
captions.parquet, measures.csv, README.md, report.html
"""

import hashlib
import json

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from utils.datasets.portable import push_folder
from utils.files import one_line, portable, to_json, versions, write_csv
from utils.generated.made_report import REFERENCES, SHOWN, made_report
from utils.generated.texts.captions import captions_table
from utils.reporting.report import data_card
from utils.worklist import differences, seed_of

CAPTIONS, IMAGES, FAILED = "captions", "images", "failed"
SETTINGS = "args.json"
ADAPTERS = "adapters"
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
        # The hash of the few-step LoRA that the image was drawn with, or null.
        ("fast_lora", pa.string()),
        # The garment that is not the identity's own, such as "upper", or null.
        ("changed", pa.string()),
        ("synthetic", pa.bool_()),
    ]
)
DESCRIPTION, SOFTWARE = 0x010E, 0x0131
# The files of the set: images and their table, without references and records.
CARD_FILES = ["images/**", "metadata.parquet"]
CARD = """{count:,} images of {people:,} identities, all of them made by a diffusion model that was fine-tuned to each
identity of {sources}; none is a photograph. Every file says so in its EXIF data. `metadata.parquet` has, for each
image, the identity, the data set it comes from, the prompt, seed, steps, guidance and a hash of the model; `changed`
names the garment of an image that is not the identity's own.

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
    """Save as JPEG or PNG, by the path's ending; the EXIF data marks the image as synthetic."""
    exif = Image.Exif()
    exif[DESCRIPTION] = json.dumps({"synthetic": True, "prompt": prompt, "seed": seed, "model": model})
    exif[SOFTWARE] = "diffreid"
    options = {"quality": quality, "subsampling": 0} if path.suffix == ".jpg" else {}
    image.save(path, exif=exif, **options)


def write_images(folder, name, numbers, pictures, texts, seeds, *, ending, quality, model):
    """Write an identity's images to a scratch folder. Returns {file: path in the set} and the rows of its record.

    texts: `ImagePrompt`s.
    """
    files, rows = {}, []
    for number, picture, text, seed in zip(numbers, pictures, texts, seeds, strict=True):
        path = image_path(name, number, ending)
        file = folder / path.rsplit("/", 1)[1]
        save_image(picture, file, quality=quality, prompt=text.with_token, seed=seed, model=model)
        files[file] = path
        row = {"path": path, "prompt": text.with_token, "seed": seed, "drawn": text.words, "changed": text.changed}
        rows.append(row)
    return files, rows


def open_pictures(folder, rows):
    """The images of the rows of a record, from their files."""
    pictures = []
    for row in rows:
        with Image.open(folder / row["path"]) as image:
            pictures.append(image.convert("RGB"))
    return pictures


def read_settings(work):
    """The contents of args.json, or None; ValueError if another script wrote it."""
    try:
        settings = json.loads((work.folder / SETTINGS).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    if not (isinstance(settings, dict) and str(settings.get("command")).startswith(COMMAND)):
        raise ValueError(f"{work.folder} holds what another script wrote; give another --output_dir")
    return settings


def keep_settings(work, arguments, command, may_change=()):
    """Write args.json; ValueError if the folder has images made with other settings than those that may change."""
    arguments = json.loads(to_json(arguments))
    before = (read_settings(work) or {}).get("arguments")
    if before == arguments:
        return
    fixed = [
        {name: value for name, value in one.items() if name not in may_change} for one in (before or {}, arguments)
    ]
    changes = differences(*fixed)
    if before is not None and work.recorded(IMAGES) and changes:
        changed = "; ".join(f"--{change}" for change in changes)
        flags = [f"--{name}" for name in may_change if name != "reference_drawing"]
        allowed = f"; --redraw may change {', '.join(flags)}" if flags else ""
        raise ValueError(
            f"{work.folder} holds images of a run with other settings: {changed}. Give the same settings, or another "
            f"--output_dir{allowed}"
        )
    made_by = {name: version for name, version in versions().items() if name != "device"}
    work.write(SETTINGS, to_json({"command": command, "arguments": arguments, "versions": made_by}))


def command_of(given):
    """The command that makes the same images. `given`: the flags of the command line, {name: value}."""
    words = [COMMAND]
    for name, value in given.items():
        value = portable(value)
        words += [f"--{name}", *(value if isinstance(value, list) else [] if value is True else [value])]
    return " ".join(map(str, words))


def attempt(work, progress, name, lean, function, *arguments):
    """Call the function for one identity. An error is recorded and returns None, so that the run continues.

    `lean`: the advice for an out-of-memory error.
    """
    try:
        return function(*arguments)
    except torch.OutOfMemoryError as error:
        reason = f"out of memory ({one_line(error)[:120]}); what saves how much: {lean}"
    except Exception as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
    work.commit(name, FAILED, {"error": reason})
    progress.finished(name, reason)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def is_missing(work, record, num_images=1, *, adds=False):
    """Whether the identity lacks images of the current prompts, or their files; with `adds` only the former counts."""
    made = work.read(f"{record['domain']}/{record['pid']:04d}", IMAGES)
    if made is not None and adds:
        return images_to_add(made, record, num_images) > 0
    if made is None or any(made[name] != record[name] for name in ("prompt", "identity_prompt")):
        return True
    if images_to_add(made, record, num_images):
        return True
    return bool(lost_files(work, made))


def lost_files(work, made):
    """The paths of an identity's images that are not there."""
    paths = [work.folder / image["path"] for image in made["images"]]
    there = {path for folder in {path.parent for path in paths} for path in folder.glob("*")}
    return [path for path in paths if path not in there]


def images_to_add(made, record, num_images):
    """How many of `num_images` images of the current prompt an identity does not have yet."""
    same = [prompt_of(made, image) == record["identity_prompt"] for image in made["images"]]
    return max(0, num_images - sum(same))


def prompt_of(made, image):
    """P_E of an image, before its own scene is drawn; images that were added later may have another."""
    return image.get("made_from", made["identity_prompt"])


def check_model(work, digest):
    """ValueError if the folder has images of another model."""
    made = next(filter(None, (work.read(name, IMAGES) for name in work.recorded(IMAGES))), None)
    if made and made["model"] != digest:
        raise ValueError(
            f"the images in {work.folder} were made by the model {made['model']}, this one is {digest}; give the same "
            "model, or another --output_dir"
        )


def open_references(model, work, prompt, count, *, seed, precision, sampling):
    """(`count` latents, key) of a prompt; drawn unless they are in `work`. `sampling`: arguments of `model.sample`.

    With a count of 0 both are None.
    """
    if not count:
        return None, None
    settings = [count, *(sampling[name] for name in ("resolution", "solver", "steps", "guidance"))]
    settings += [
        sampling[name] for name, usual in (("guidance_share", 1), ("negative", "")) if sampling[name] != usual
    ]
    inputs = [prompt, model.digest, str(model.dtype), precision, seed, *settings]
    key = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:32]
    path = work.folder / REFERENCES / f"{key}.safetensors"
    if not is_reference(path, count):
        seeds = [seed_of(seed, "reference", prompt, number) for number in range(count)]
        condition = model.encode_all([prompt]).expand(len(seeds), -1, -1)
        latents = model.sample(condition, seeds, **sampling)
        preview = model.decode(latents[: SHOWN["reference"]], sampling["batch_size"])
        with work.scratch() as part:
            save_file({"latents": latents.half().cpu(), "preview": preview}, part / path.name)
            work.move(part / path.name, path)
    with safe_open(path, "pt") as file:
        return file.get_tensor("latents").float().to(model.device), key


def is_reference(path, count):
    """Whether the file is complete and holds `count` reference images."""
    try:
        with safe_open(path, "pt") as file:
            return file.get_slice("latents").get_shape()[0] == count
    except (OSError, SafetensorError):
        return False


def check_losses(losses):
    """ValueError that names the first step whose loss is not finite."""
    bad = (~torch.stack(losses).isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"the loss is not finite at step {bad[0] + 1}; lower --learning_rate, or use --mixed_precision bf16 or no"
        )


def in_tenths(losses):
    """(steps, halves) -> {half: the means over each tenth of the steps}."""
    means = torch.stack([part.mean(0) for part in losses.tensor_split(min(10, len(losses)))])
    return {
        name: [round(value, 5) for value in means[:, column].tolist()]
        for column, name in enumerate(("instance", "prior")[: losses.shape[1]])
    }


def finish(work, identities, validation_ids, *, captions_only, wanted, push=False, repository=None):
    """Merge and report, if all identities are done. Returns the failures.

    The last process to finish sees all identities done. With `push` it uploads the set, where no identity failed.
    `wanted`: arguments of `is_missing`, or None to merge what is there.
    """

    def is_done(name):
        record = work.read(name, CAPTIONS)
        return record is not None and (captions_only or not is_missing(work, record, **wanted or {}))

    missing = [name for name in work.pieces if not (work.has(name, FAILED) or is_done(name))]
    if missing and wanted is not None:
        print(f"{len(missing)} of {len(work.pieces)} identities are still with other shards; the last one merges")
        return {}
    count, images, failures = merge(work, identities, validation_ids)
    if not captions_only and (words := said_of_nobody(work)):
        print(words)
    if not missing:
        work.tidy()
    summary = f"{images} images of {count} identities: {work.folder}"
    if captions_only:
        summary = f"Captions of {len(work.pieces)} identities: {work.folder / 'captions.parquet'}"
    print(f"{summary}; open {work.folder / 'report.html'}")
    if push and images and not failures:
        # The report and the records show photographs of people: only what was made leaves this machine.
        files = [*CARD_FILES, "README.md"]
        address = push_folder(work.folder, repository or work.folder.resolve().name, CARD_FILES, files)
        print(f"Uploaded: {address}")
    return failures


def said_of_nobody(work):
    """A line if the model of --mask_model saw nobody in some source images."""
    found = [(work.read(name, IMAGES) or {}).get("nobody") or 0 for name in work.recorded(IMAGES)]
    if not any(found):
        return None
    return (
        f"--mask_model finds nobody in {sum(found):,} source images of {sum(map(bool, found)):,} identities: they are "
        "used whole"
    )


def merge(work, identities, validation_ids=0):
    """Write the tables and the report of a folder. Returns (identities with images, images, failures)."""
    settings = read_settings(work)
    if settings is None:
        raise ValueError(f"{work.folder} holds no run, as it has no {SETTINGS}; give the --output_dir of one")
    arguments, command = settings["arguments"], settings["command"]
    records = [work.read(name, IMAGES) for name in work.recorded(IMAGES)]
    records = sorted(filter(None, records), key=by_identity)
    described = [work.read(name, CAPTIONS) for name in work.recorded(CAPTIONS)]
    described = sorted(filter(None, described), key=by_identity)
    failures = {name: work.read(name, FAILED)["error"] for name in work.recorded(FAILED)}
    rows = [metadata_row(record, image) for record in records for image in record["images"]]
    with work.scratch() as part:
        if described:
            pq.write_table(captions_table(described), part / "captions.parquet")
        if rows:
            pq.write_table(pa.Table.from_pylist(rows, schema=METADATA), part / "metadata.parquet")
            (part / "README.md").write_text(card(records, arguments, command), encoding="utf-8")
            names = list(records[0]["measures"])
            lines = [[*by_identity(record), *map(record["measures"].get, names)] for record in records]
            write_csv(part / "measures.csv", ("domain", "pid", *names), lines)
        report = made_report(work, identities, records, described, failures, arguments, validation_ids)
        report.write(part / "report.html")
        for path in sorted(part.iterdir()):
            work.move(path, work.folder / path.name)
    return len(records), len(rows), failures


def by_identity(record):
    return record["domain"], record["pid"]


def metadata_row(record, image):
    constants = {"camid": -1, "synthetic": True, "file_name": image["path"]}
    return {name: constants.get(name, image.get(name, record.get(name))) for name in METADATA.names}


def card(records, arguments, command):
    sources = ", ".join(sorted({record["domain"] for record in records}))
    count = sum(len(record["images"]) for record in records)
    return data_card(
        "People made by Diffusion-ReID",
        text=CARD.format(count=count, people=len(records), sources=sources),
        command=command,
        details={name: value for name, value in arguments.items() if name != "attribute_lists"},
        tags=["person-re-identification", "synthetic"],
        task_categories=["image-feature-extraction"],
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": CARD_FILES}]}],
    )
