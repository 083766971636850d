"""The report of a training: numbers before and after, curves, samples."""

import json
from pathlib import Path

from PIL import Image

from utils.files import write_together
from utils.reporting.charts import line_chart
from utils.reporting.report import Report, data_uri, percent, sheet

SHEETS = 3
SHEET_WIDTH = 400
NUMBERS = {"mAP": "mAP", "rank1": "Rank-1", "rank5": "Rank-5", "rank10": "Rank-10", "mINP": "mINP"}
WORDS = {
    "loss": "The sum of all losses.",
    "loss_id": "Identity classification.",
    "loss_pcl": "Comparison with the prototypes.",
    "loss_triplet": "Images of one identity nearer than those of others.",
    "loss_centre": "Distance of images to the centre of their identity.",
    "loss_ldm": "Noise prediction of the diffusion model.",
    "feedback_scale": "Factor on the gradient of the noise prediction where it reaches the features.",
    "feedback_ratio": "That gradient, scaled, beside that of the other losses.",
    "loss_source": "Comparison of source images with the memory.",
    "loss_target": "Comparison of target images with the memory.",
    "loss_mixed": "Classification of the mixed domain, by the shares of both.",
    "loss_bridge": "Distance of mixed features to both they come from.",
    "loss_diversity": "The more the ratios of mixtures differ, the lower.",
    "loss_earlier": "Images of one identity nearer than those of others, among earlier batches.",
    "loss_whole": "Classification of the whole body, by pseudo labels and the parts' predictions.",
    "loss_parts": "Classification of the parts, as far as they agree with the whole.",
    "loss_cameras": "Comparison with the proxies of clusters in cameras.",
    "loss_centres": "Comparison with the centres of the clusters.",
    "loss_views": "The least similar image of a cluster by the teacher, against images of other clusters.",
    "loss_same": "Likenesses in a batch, equal to those that the teacher sees.",
    "loss_scatter": "Cosine of features to the centre of their domain, on the domains used as known ones.",
    "loss_shuffle": "Other domains nearer than other people of the same domain, on the known domains.",
    "loss_inner_triplet": "Images of one identity nearer than those of others, on the known domains.",
    "loss_meta_test": "The same on the other domains, after a trial update of the norms by the three losses above.",
    "rho": "Mean share of batch normalisation in the norms; the rest is instance normalisation.",
    "accuracy": "Share of images whose identity is right; of mixed images, by the shares of both.",
    "teacher_entropy": "Of the teacher's answers; near 0 or near the logarithm of their number it has collapsed.",
    "grad_norm": "Length of the gradient, before any clipping.",
    "lr": "Learning rate.",
}
# The entries that every line of the log has, beside losses and measures of the method.
PLACE = ("step", "epoch", "lr", "grad_norm")


def before_and_after(history):
    """Rows of text: target, number, before, after, difference in points; also for re-ranking if it was measured."""
    rows = []
    for spec in dict.fromkeys(entry["target"] for entry in history):
        entries = [entry for entry in history if entry["target"] == spec]
        first, last = entries[0], entries[-1]
        kinds = [("", first, last)]
        if "reranked" in last:
            kinds.append((" (re-ranked)", first["reranked"], last["reranked"]))
        for word, old, new in kinds:
            for key in ("mAP", "rank1"):
                shown = [with_deviation(numbers, key) for numbers in (old, new)]
                rows.append([spec + word, NUMBERS[key], *shown, f"{100 * (new[key] - old[key]):+.1f}"])
    return rows


def with_deviation(numbers, key):
    """A share in percent, with its standard deviation over the splits of a data set that has several."""
    if "std" not in numbers:
        return percent(numbers[key])
    return f"{100 * numbers[key]:.1f} ± {100 * numbers['std'][key]:.1f} %"


def training_report(title, output_dir, history, *, lead="", whom="", facts=(), samples=(), sample_words=""):
    """A `Report` made from the history of measurements of `whom`, log.jsonl, and pictures (name, file) of samples."""
    measured = f", measured before and after training{whom and ', on '}{whom}" if history else "; nothing was measured"
    report = Report(title, subtitle=f"{lead}{measured}." if lead else "", facts=facts)
    if history:
        add_numbers(report, history)
    add_losses(report, read_log(Path(output_dir) / "log.jsonl"))
    if samples:
        report.section("Samples", sample_words)
        sheets = []
        for name, path in spread(samples, SHEETS):
            with Image.open(path) as picture:
                times = max(1, round(SHEET_WIDTH / picture.width))
                larger = picture.resize((times * picture.width, times * picture.height))
            sheets.append((data_uri(larger, height=larger.height, width=larger.width), name, ""))
        report.sheets(sheets)
    return report


def add_notes(report, notes, title, words):
    """A table of a method's numbers by epoch, as `Training.note` keeps them."""
    if notes:
        report.section(title, words)
        names = [name for name in notes[0] if name != "epoch"]
        report.table(
            ["number", *(f"epoch {entry['epoch']}" for entry in spread(notes, SHEETS))],
            [[name, *(f"{entry[name]:.4g}" for entry in spread(notes, SHEETS))] for name in names],
        )


def write_sample(output_dir, epoch, rows):
    """Rows of pictures as a file of `samples/`."""
    path = sample_path(output_dir, epoch)
    with write_together(path.parent) as part:
        sheet(rows).save(part(path.name), "PNG")


def samples_of(output_dir, names):
    """(name, file) of the pictures that a training wrote, of {epoch: name}."""
    paths = [(name, sample_path(output_dir, epoch)) for epoch, name in names.items()]
    return [(name, path) for name, path in paths if path.exists()]


def sample_path(output_dir, epoch):
    return Path(output_dir, "samples", f"epoch-{epoch:04d}.png")


def spread(items, limit):
    """At most `limit` items, evenly chosen, with the first and the last."""
    if len(items) <= limit:
        return list(items)
    return [items[round(place * (len(items) - 1) / (limit - 1))] for place in range(limit)]


def add_numbers(report, history):
    report.section("Before and after", "Epoch 0 is the model before any training.")
    targets = list(dict.fromkeys(entry["target"] for entry in history))
    for spec in targets:
        entries = [entry for entry in history if entry["target"] == spec]
        report.tiles(
            [
                (NUMBERS[key], percent(entries[-1][key]), f"was {percent(entries[0][key])}, {spec}")
                for key in ("mAP", "rank1")
            ]
        )
    report.table(["target", "number", "before", "after", "points"], before_and_after(history), text_columns=2)
    charts = []
    for key in ("mAP", "rank1"):
        series = []
        for spec in targets:
            entries = [entry for entry in history if entry["target"] == spec]
            series.append((spec, [entry["epoch"] for entry in entries], [entry[key] for entry in entries]))
        chart = line_chart(
            series, title=f"{NUMBERS[key]} by epoch", x_label="epoch", y_label=NUMBERS[key], percent=True, dots=True
        )
        charts.append((chart, f"{NUMBERS[key]} of each target; more is better."))
    report.charts(charts)


def add_losses(report, lines):
    if not lines:
        return
    names = [name for name in lines[0] if name.startswith("loss") and any(line[name] for line in lines)]
    names += [name for name in lines[0] if name not in (*names, *PLACE) and not name.startswith("loss")]
    steps = [line["step"] for line in lines]
    report.section("Training", f"{len(lines):,} steps; long curves show means of neighbouring steps.")
    charts = []
    for name in (*names, "grad_norm", "lr"):
        values = [line[name] if line[name] is not None else float("nan") for line in lines]
        chart = line_chart([(name, steps, values)], title=name, x_label="step", y_label=name)
        charts.append((chart, WORDS.get(name, "A part of the loss.")))
    report.charts(charts)


def read_log(path):
    if not path.exists():
        return []
    with open(path) as file:
        return [json.loads(line) for line in file if line.endswith("\n")]
