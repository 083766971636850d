"""The report of a generated set: measures, losses, captions, and source, reference and generated images."""

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open

from utils.files import portable
from utils.generated.measures import identity_auc
from utils.reporting.charts import line_chart
from utils.reporting.histograms import histogram
from utils.reporting.report import Report, Tile, data_uri

REFERENCES = "references"
SHOWN = {"source": 4, "reference": 4, "generated": 8}
SIDES = ("source", "generated")
MEASURES = {
    "text_similarity": ("like its prompt", "CLIP, image and its own prompt"),
    "image_similarity": ("like the source", "CLIP, generated and source images"),
    "diversity": ("diversity", "1 − cosine of two generated images in CLIP"),
    "identity_similarity": ("same person", "Re-ID features, generated and source images"),
}
WORDS = ("upper", "lower", "shoes", "hair", "carried", "hat", "action", "view", "scene")
MAX_ROWS = 200


def made_report(work, identities, records, described, failures, arguments, validation_ids):
    """A `Report` of all that a folder holds. `described`: the records of captions; `records`: those of images."""
    count = sum(len(record["images"]) for record in records)
    facts = [
        ("Source", ", ".join(map(str, portable(arguments["source"])))),
        ("Model", arguments["pretrained_model_name_or_path"]),
        ("Captions by", arguments["captioner_model_name_or_path"]),
        ("Fine-tuning", f"{arguments['finetune']}, {arguments['max_train_steps']} steps"),
        ("Size", f"{arguments['resolution'][0]} x {arguments['resolution'][1]}"),
    ]
    sets = {record["reference"] for record in records if record["reference"]}
    if sets:
        facts.append(("Reference sets", f"{len(sets):,} for {len(records):,} identities"))
    if any(record.get("nobody") is not None for record in records):
        nobody = sum(record.get("nobody") or 0 for record in records)
        facts.append(("Source images in which --mask_model finds nobody", f"{nobody:,}, used whole"))
    lead = f"{count:,} images of {len(records):,} identities, none of them a photograph."
    if failures:
        lead += f" {len(failures)} identities failed; they are listed below."
    report = Report("Generated people", subtitle=lead, facts=facts)
    if records:
        add_numbers(report, records)
        add_sheets(report, work, identities, records, validation_ids)
        add_tuning(report, records)
    if described:
        add_words(report, described)
    if failures:
        report.section("Failed", "The same command tries these again.")
        report.table(["identity", "why"], [[name, why] for name, why in sorted(failures.items())], text_columns=2)
    return report


def add_numbers(report, records):
    names = [name for name in MEASURES if name in records[0]["measures"]]
    if not names:
        return
    report.section("Measures", "Cosines of features, averaged within each identity.")
    tiles = []
    for name in names:
        values = [record["measures"][name] for record in records]
        label, note = MEASURES[name]
        tiles.append((label, f"{sum(values) / len(values):.3f}", note))
    auc = identity_auc(*(torch.tensor([record["features"][side] for record in records]) for side in SIDES))
    if auc is not None:
        kind = "Re-ID" if "identity_similarity" in names else "CLIP"
        tiles.append(("AUC", f"{auc:.3f}", f"own source against other identities', {kind} features"))
    report.tiles(tiles)
    charts = []
    for name in names:
        values = torch.tensor([record["measures"][name] for record in records])
        low, high = float(values.min()) - 0.01, float(values.max()) + 0.01
        counts = torch.histc(values, bins=20, min=low, max=high).tolist()
        edges = torch.linspace(low, high, 21).tolist()
        label, note = MEASURES[name]
        chart = histogram([("identities", counts)], edges, title=label, x_label="value", y_label="identities")
        charts.append((chart, f"{label.capitalize()}: {note}."))
    if len(records) > 3:
        report.charts(charts)
    rows = [
        [name_of(record), len(record["images"]), *(f"{record['measures'][name]:.3f}" for name in names)]
        for record in records[:MAX_ROWS]
    ]
    more = f" The first {MAX_ROWS}; all are in measures.csv." if len(records) > MAX_ROWS else ""
    columns = ["identity", "images", *(MEASURES[name][0] for name in names)]
    report.table(columns, rows, caption=f"Each identity by itself.{more}")


def name_of(record):
    return f"{record['domain']}/{record['pid']}"


def add_sheets(report, work, identities, records, number):
    by_name = {identity.name: identity for identity in identities}
    shown = [record for record in records if f"{record['domain']}/{record['pid']:04d}" in by_name][:number]
    if not shown:
        return
    report.section(
        "Pictures",
        "Of each identity its source images, reference images of the untouched model for the same words, and images "
        "of the model tuned to it.",
    )
    for record in shown:
        identity = by_name[f"{record['domain']}/{record['pid']:04d}"]
        source = [
            Tile(data_uri(identity.dataset[row]["image"]), path)
            for path, row in zip(identity.paths[: SHOWN["source"]], identity.rows, strict=False)
        ]
        reference = [Tile(data_uri(image), "reference") for image in previews(work, record["reference"])]
        made = [
            Tile(picture_of(work.folder / image["path"]), image["path"], ", ".join(image["drawn"]))
            for image in record["images"][: SHOWN["generated"]]
        ]
        lists = [("other source images", source[1:]), ("the untouched model", reference), ("the tuned model", made)]
        lists = [(label, tiles) for label, tiles in lists if tiles]
        report.ranked(identity.name, source[0], lists, note=record["prompt"])


def picture_of(path):
    """The image as a data URI, or None if the file is missing."""
    return data_uri(Image.open(path)) if path.is_file() else None


def previews(work, key):
    """The first reference images, read from the file of their latents."""
    if key is None:
        return []
    try:
        with safe_open(work.folder / REFERENCES / f"{key}.safetensors", "pt") as file:
            pictures = file.get_tensor("preview")
    except (OSError, SafetensorError):
        return []
    return [Image.fromarray(pixels.permute(1, 2, 0).numpy()) for pixels in pictures[: SHOWN["reference"]]]


def add_tuning(report, records):
    """A chart of the loss over the training, in tenths of its steps: the mean over the identities."""
    curves = {}
    for part in ("instance", "prior"):
        courses = [record["loss"][part] for record in records if record["loss"].get(part)]
        if courses:
            length = min(map(len, courses))
            curves[part] = [sum(losses[tenth] for losses in courses) / len(courses) for tenth in range(length)]
    if not curves:
        return
    series = [
        ({"instance": "own images", "prior": "reference"}[part], list(range(1, len(mean) + 1)), mean)
        for part, mean in curves.items()
    ]
    chart = line_chart(series, title="Loss", x_label="tenth of the steps", y_label="loss", dots=True)
    report.section("Fine-tuning", "The two halves of the loss, averaged over all identities.")
    report.charts([(chart, "Own images under the prompt with the token, reference images under the one without.")])


def add_words(report, described):
    report.section("Captions", "What the captioner saw, merged over each image sequence.")
    rows = [[name_of(record), record["prompt"]] for record in described[:MAX_ROWS]]
    more = f" The first {MAX_ROWS}; all are in captions.parquet." if len(described) > MAX_ROWS else ""
    report.table(["identity", "prompt"], rows, text_columns=2, caption=f"The prompt without identity.{more}")
