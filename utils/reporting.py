"""What a run leaves behind: pages, cards, arguments with versions, and files that are whole or not there.

    report = Report("Evaluation", facts=[("Model", "model/"), ("Data", "market1501")])
    report.section("Ranking", "How often the right person comes first.")
    report.tiles([("mAP", "81.2 %", "mean over 3,368 queries")])
    report.charts([(line_chart([("CMC", ranks, cmc)], title="CMC", x_label="rank", y_label="share"), "Caption.")])
    report.write("output/report.html")

A page is one HTML file without scripts or outside references: pictures are data URIs, charts inline SVG, and all
text is escaped by jinja2. It follows the reader's light or dark setting and fits a phone.
"""

import base64
import csv
import importlib.metadata
import io
import json
import os
import platform
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import jinja2
from huggingface_hub import DatasetCardData, EvalResult, ModelCardData
from markupsafe import Markup

TEMPLATES = Path(__file__).parent / "templates"
PACKAGES = ("torch", "torchvision", "transformers", "diffusers", "accelerate", "peft", "datasets", "numpy")


@contextmanager
def write_together(folder):
    """Files that appear together: `with write_together(out) as aside: aside("metrics.json").write_text(...)`.

    `aside(name)` is where to write `name` for now. The files take their names when the block ends without an error;
    after an error, a full disk included, what was there before stays and nothing is left over.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = []

    def aside(name):
        names.append(name)
        return folder / f"{name}.part"

    try:
        yield aside
        for name in names:
            part = folder / f"{name}.part"
            # safetensors makes its files readable for the owner alone.
            os.chmod(part, 0o666 & ~_umask())
            with open(part, "rb+") as file:
                os.fsync(file.fileno())
    except BaseException:
        for name in names:
            (folder / f"{name}.part").unlink(missing_ok=True)
        raise
    for name in names:
        os.replace(folder / f"{name}.part", folder / name)


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def to_json(value):
    """Indented JSON that any reader takes: NaN and infinity become null, tensors lists, paths text.

    Lists of plain values stay on one line.
    """
    return _indented(_plain(value), "") + "\n"


def _indented(value, margin):
    inner = margin + "  "
    if isinstance(value, dict) and value:
        items = (f"{inner}{json.dumps(key)}: {_indented(item, inner)}" for key, item in value.items())
        return "{\n" + ",\n".join(items) + f"\n{margin}}}"
    if isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
        return "[\n" + ",\n".join(inner + _indented(item, inner) for item in value) + f"\n{margin}]"
    return json.dumps(value, allow_nan=False)


def _plain(value):
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and value not in (float("inf"), float("-inf")) and value == value:
        return value
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return None if isinstance(value, float) else str(value)


def write_csv(path, columns, rows):
    """CSV that no spreadsheet takes for formulas: text that starts with `= + - @`, tab or return gets a `'` first."""

    def safe(cell):
        return f"'{cell}" if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell

    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows([safe(cell) for cell in row] for row in rows)


def text_table(columns, rows):
    """Aligned lines for a terminal; two columns of text, then numbers."""
    widths = [max(len(str(row[place])) for row in [columns, *rows]) for place in range(len(columns))]
    lines = []
    for row in [columns, ["-" * width for width in widths], *rows]:
        cells = [
            str(cell).ljust(width) if place < 2 else str(cell).rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def versions():
    """Versions of Python and of the packages that decide the numbers, the device's name, the repository's revision."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    # A run that has not loaded torch used no GPU.
    torch = sys.modules.get("torch")
    with_gpu = torch is not None and torch.cuda.is_available()
    found["device"] = torch.cuda.get_device_name() if with_gpu else platform.processor() or "cpu"
    found["git"] = git_revision()
    return found


def git_revision():
    """Commit of the checkout this file lies in, with `-dirty` if tracked files were changed; None outside of git."""

    def git(*command):
        return subprocess.run(
            ("git", *command), cwd=TEMPLATES, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def run_record(args):
    """What `args.json` holds: the command, its arguments, versions."""
    return {"command": [Path(sys.argv[0]).name, *sys.argv[1:]], "arguments": vars(args), "versions": versions()}


def portable(value):
    """A setting as it may be written down: of a path of this machine only the last name."""
    if isinstance(value, (list, tuple)):
        return [portable(one) for one in value]
    if isinstance(value, str) and value.startswith("--") and "=" in value:
        flag, _, word = value.partition("=")
        return f"{flag}={portable(word)}"
    # Unlike a Path, os.path takes words that are too long for a name.
    if isinstance(value, (str, Path)) and os.path.exists(value):
        return Path(value).resolve().name
    return value


def data_uri(image, height=160, width=None):
    """A PIL image as a JPEG data URI, at most `height` pixels tall and `width`, or twice the height, wide."""
    image = image.convert("RGB")
    image.thumbnail((width or 2 * height, height))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=82, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


@dataclass
class Tile:
    """One picture of a ranked list. `match` is True, False, or None where nobody knows."""

    uri: str | None
    name: str
    note: str = ""
    match: bool | None = None


class Report:
    """A page put together block by block, from top to bottom."""

    def __init__(self, title, *, subtitle="", facts=()):
        self.title, self.subtitle, self.facts, self.blocks = title, subtitle, list(facts), []

    def section(self, title, text=""):
        self._add("section", title=title, text=text, anchor=f"s{len(self.blocks)}")

    def text(self, text):
        self._add("text", text=text)

    def tiles(self, tiles):
        """Headline numbers: a list of (label, value, note)."""
        self._add("tiles", tiles=tiles)

    def charts(self, charts):
        """Charts side by side where there is room: a list of (svg from utils.charts, caption)."""
        self._add("charts", charts=charts)

    def table(self, columns, rows, *, caption="", text_columns=1, shades=None):
        """A table whose first `text_columns` columns are text, the others numbers, each with a shade 0..1 or None."""
        self._add("table", columns=columns, rows=rows, caption=caption, text_columns=text_columns, shades=shades)

    def pictures(self, tiles, *, caption=""):
        """A grid of `Tile`."""
        self._add("pictures", tiles=tiles, caption=caption)

    def sheets(self, sheets):
        """Large pictures side by side where there is room: a list of (data URI, title, caption)."""
        self._add("sheets", sheets=sheets)

    def cards(self, cards):
        """Small groups of pictures side by side: a list of {"title", "note", "tiles"}."""
        self._add("cards", cards=cards)

    def ranked(self, title, query, lists, *, attention=None, note=""):
        """A query's `Tile` beside ranked lists, each (label, list of `Tile`); `attention` is a second picture."""
        self._add("ranked", title=title, query=query, lists=lists, attention=attention, note=note)

    def html(self):
        sections = [block for block in self.blocks if block["kind"] == "section"]
        css = Markup((TEMPLATES / "report.css").read_text(encoding="utf-8"))
        page = _environment(autoescape=True).get_template("report.html.j2")
        return page.render(report=self, sections=sections, css=css)

    def write(self, path):
        # A file name may hold bytes that are not UTF-8; the page shows a replacement character for them.
        Path(path).write_bytes(self.html().encode("utf-8", "replace"))

    def _add(self, kind, **content):
        self.blocks.append({"kind": kind, **content})


def model_card(title, *, text, command=None, metrics=None, details=None, **metadata):
    """Markdown of a model card. `metrics` is {data set: {"mAP": 0..1, ...}}, `details` a dict shown as a table,
    `command` what made the model where that is known.

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
    """(name, number) of a measurement; of re-ranking and deviations under two names, of each split not."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from ((f"{name} {key}", one) for key, one in value.items() if not isinstance(one, dict))
        elif not isinstance(value, list):
            yield name, value


def data_card(title, *, text, command, details=None, **metadata):
    """Markdown of a data card; `metadata` goes to huggingface_hub's `DatasetCardData`: license, tags and others."""
    header = DatasetCardData(**metadata).to_yaml()
    return _card(header, title=title, text=text, command=command, metrics={}, details=details or {})


def _card(header, **content):
    return _environment(autoescape=False).get_template("card.md.j2").render(header=header, **content)


def _environment(autoescape):
    loader = jinja2.FileSystemLoader(TEMPLATES)
    environment = jinja2.Environment(
        loader=loader, autoescape=autoescape, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["breakable"] = lambda text: Markup("_<wbr>").join(str(text).split("_"))
    environment.filters["cell"] = lambda text: " ".join(str(text).split()).replace("|", "\\|")
    return environment
