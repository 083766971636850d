"""Reports: one HTML file of sections, tables, charts and pictures.

    report = Report("Evaluation", facts=[("Model", "model/"), ("Data", "market1501")])
    report.section("Ranking", "How often the right person comes first.")
    report.tiles([("mAP", "81.2 %", "mean over 3,368 queries")])
    report.charts([(line_chart([("CMC", ranks, cmc)], title="CMC", x_label="rank", y_label="share"), "Caption.")])
    report.write("output/report.html")

A report is one HTML file without scripts or external references: pictures are data URIs, charts are inline SVG, and
jinja2 escapes all text. It follows the reader's light or dark setting and fits a phone.
"""

import base64
import io
from dataclasses import dataclass
from pathlib import Path

import jinja2
from huggingface_hub import DatasetCardData, EvalResult, ModelCardData
from markupsafe import Markup
from PIL import Image


def percent(value):
    return "–" if value is None else f"{100 * value:.1f} %"


def text_table(columns, rows):
    """A table as aligned lines for a terminal: two columns of text, then columns of numbers."""
    widths = [max(len(str(row[index])) for row in [columns, *rows]) for index in range(len(columns))]
    lines = []
    for row in [columns, ["-" * width for width in widths], *rows]:
        cells = [
            str(cell).ljust(width) if index < 2 else str(cell).rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def data_uri(image, height=160, width=None):
    """A PIL image as a JPEG data URI of at most `height` x `width` pixels; the default width is twice the height."""
    image = image.convert("RGB")
    image.thumbnail((width or 2 * height, height))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=82, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


@dataclass
class Tile:
    """A picture of a ranked list. `match` is True, False, or None if unknown."""

    uri: str | None
    name: str
    note: str = ""
    match: bool | None = None


class Report:
    """A report, built block by block from top to bottom."""

    def __init__(self, title, *, subtitle="", facts=()):
        self.title, self.subtitle, self.facts, self.blocks = title, subtitle, list(facts), []

    def section(self, title, text=""):
        self._add("section", title=title, text=text, anchor=f"s{len(self.blocks)}")

    def text(self, text):
        self._add("text", text=text)

    def tiles(self, tiles):
        """Add headline numbers: a list of (label, value, note)."""
        self._add("tiles", tiles=tiles)

    def charts(self, charts):
        """Add charts, side by side where there is room: a list of (SVG of `utils.reporting.charts`, caption)."""
        self._add("charts", charts=charts)

    def table(self, columns, rows, *, caption="", text_columns=1, shades=None):
        """Add a table. The first `text_columns` columns are text, the others numbers, with shades 0..1 or None."""
        self._add("table", columns=columns, rows=rows, caption=caption, text_columns=text_columns, shades=shades)

    def pictures(self, tiles, *, caption=""):
        """Add a grid of `Tile`s."""
        self._add("pictures", tiles=tiles, caption=caption)

    def sheets(self, sheets):
        """Add large pictures, side by side where there is room: a list of (data URI, title, caption)."""
        self._add("sheets", sheets=sheets)

    def cards(self, cards):
        """Add small groups of pictures, side by side: a list of {"title", "note", "tiles"}."""
        self._add("cards", cards=cards)

    def ranked(self, title, query, lists, *, attention=None, note=""):
        """Add a query `Tile` and its ranked lists (label, list of `Tile`); `attention` is a second picture of it."""
        self._add("ranked", title=title, query=query, lists=lists, attention=attention, note=note)

    def html(self):
        sections = [block for block in self.blocks if block["kind"] == "section"]
        css = Markup((TEMPLATES / "report.css").read_text(encoding="utf-8"))
        template = environment(autoescape=True).get_template("report.html.j2")
        return template.render(report=self, sections=sections, css=css)

    def write(self, path):
        # A file name may hold bytes that are not UTF-8; the report shows a replacement character for them.
        Path(path).write_bytes(self.html().encode("utf-8", "replace"))

    def _add(self, kind, **content):
        self.blocks.append({"kind": kind, **content})


TEMPLATES = Path(__file__).parent / "templates"


def environment(autoescape):
    loader = jinja2.FileSystemLoader(TEMPLATES)
    jinja = jinja2.Environment(
        loader=loader, autoescape=autoescape, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    jinja.filters["breakable"] = lambda text: Markup("_<wbr>").join(str(text).split("_"))
    jinja.filters["cell"] = lambda text: " ".join(str(text).split()).replace("|", "\\|")
    return jinja


def model_card(title, *, text, command=None, metrics=None, details=None, **metadata):
    """Markdown of a model card. `metrics`: {data set: {"mAP": 0..1, ...}}; `details`: a dict shown as a table;
    `command`: the command that made the model, if known.

    `metadata` goes to `huggingface_hub.ModelCardData`: license, base_model, tags, datasets, library_name,
    pipeline_tag.
    """
    metrics = {data: dict(plain_numbers(values)) for data, values in (metrics or {}).items()}
    results = [
        EvalResult(
            "image-feature-extraction", dataset_type=data, dataset_name=data, metric_type=name, metric_value=value
        )
        for data, values in metrics.items()
        for name, value in values.items()
        if isinstance(value, float)
    ]
    names = {"model_name": title, "eval_results": results} if results else {}
    header = ModelCardData(**metadata, **names).to_yaml()
    return _card(header, title=title, text=text, command=command, metrics=metrics, details=details or {})


def plain_numbers(values):
    """Yield (name, number) of metrics. Re-ranking and deviations have two-part names; the splits are skipped."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from ((f"{name} {key}", number) for key, number in value.items() if not isinstance(number, dict))
        elif not isinstance(value, list):
            yield name, value


def data_card(title, *, text, command, details=None, **metadata):
    """Markdown of a data card; `metadata` goes to huggingface_hub's `DatasetCardData`: license, tags and others."""
    header = DatasetCardData(**metadata).to_yaml()
    return _card(header, title=title, text=text, command=command, metrics={}, details=details or {})


def _card(header, **content):
    return environment(autoescape=False).get_template("card.md.j2").render(header=header, **content)


def sheet(rows, margin=4):
    """Paste rows of equally large pictures into one picture."""
    width, height = rows[0][0].size
    canvas = Image.new(
        "RGB", (len(rows[0]) * (width + margin) - margin, len(rows) * (height + margin) - margin), "white"
    )
    for row_index, row in enumerate(rows):
        for column_index, picture in enumerate(row):
            canvas.paste(picture, (column_index * (width + margin), row_index * (height + margin)))
    return canvas
