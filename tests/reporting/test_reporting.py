"""Pages, charts, cards and files: what a reader, a browser or a spreadsheet gets."""

import base64
import csv
import io
import json
import math
import os
import re
import resource
import shutil
import subprocess
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image, ImageDraw

from utils.files import portable, run_record, to_json, versions, write_csv, write_together
from utils.reporting import charts
from utils.reporting.charts import line_chart
from utils.reporting.histograms import histogram
from utils.reporting.report import Report, Tile, data_card, data_uri, model_card

LONG = "folder/" + 300 * "x" + ".jpg"
NASTY = "<script>alert(1)</script>\"'&{{ 7*7 }}/a\x1b_b.jpg"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
VOID = {"meta", "img", "wbr", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """A strict reading of a page: every element is closed in turn; text, attributes and pictures are kept."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.images, self.text, self.attributes = [], [], [], "", []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag == "img":
            self.images.append(dict(attributes))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def picture(colour="navy", size=(64, 128)):
    image = Image.new("RGB", size, colour)
    ImageDraw.Draw(image).ellipse((10, 10, 40, 40), fill="white")
    return image


def full_page(name=NASTY):
    report = Report(name, subtitle=name, facts=[(name, name)])
    for title in ("One", "Two", name):
        report.section(title, name)
    report.text(name)
    report.tiles([("mAP", "81.2 %", name), ("Rank-1", "92.0 %", "")])
    line = line_chart(
        [(name, [1, 2, 3], [0.1, 0.5, 0.9]), ("b", [1, 3], [1, 0])], title=name, x_label=name, y_label=name
    )
    bars = histogram([("a", [1, 2]), (name, [3, 0])], [0, 1, 2], title=name, x_label=name, markers=[(0.5, name)])
    report.charts([(line, name), (bars, name)])
    report.table([name, "0"], [[name, "5"], ["x", "–"]], caption=name, shades=[[0.5], [None]])
    tiles = [Tile(data_uri(picture()), name, "0.123", match) for match in (True, False, None)]
    report.pictures([*tiles, Tile(None, name)], caption=name)
    report.cards([{"title": name, "note": name, "tiles": tiles}])
    report.ranked(
        name, tiles[2], [("", tiles * 3), ("re-ranked", tiles)], attention=data_uri(picture("red")), note=name
    )
    return report


def test_page_is_well_formed_and_self_contained_and_escapes_everything():
    html = full_page().html()
    page = Page(html)
    assert "script" not in page.tags and "link" not in page.tags and "49" not in page.text.split()
    assert page.text.count("<script>alert(1)</script>") > 15
    for image in page.images:
        data = base64.b64decode(image["src"].removeprefix("data:image/jpeg;base64,"), validate=True)
        assert Image.open(io.BytesIO(data)).convert("RGB").size == (64, 128)
    assert len(page.images) == 3 + 3 + 1 + 1 + 9 + 3
    references = [value for key, value in page.attributes if key in ("src", "href", "xlink:href", "action", "srcset")]
    assert all(value.startswith(("data:image/jpeg", "#s")) for value in references)
    assert not re.search(r"url\(|@import|https?://", html)
    assert not any(key.startswith("on") for key, _ in page.attributes)


def test_matches_differ_without_colour():
    page = Page(full_page("plain").html())
    labels = [value for key, value in page.attributes if key == "aria-label"]
    assert labels.count("same person") == labels.count("someone else") == 1 + 1 + 3 + 1
    assert page.text.count("✓") == page.text.count("✕") == 6


def test_file_names_that_are_not_utf8_do_not_stop_a_page(tmp_path):
    report = full_page(os.fsdecode(b"caf\xe9.jpg"))
    report.write(tmp_path / "report.html")
    assert "caf?.jpg" in (tmp_path / "report.html").read_text(encoding="utf-8")


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


@needs_chromium
@pytest.mark.parametrize("width", [1200, 390])
def test_page_in_chromium(tmp_path, width):
    assert seen_in_chromium(tmp_path, full_page(NASTY + LONG).html(), width) == f"loaded 20 of 20, width {width}"


def test_no_line_of_a_marker_crosses_a_label():
    markers = [(0.19, "0.01"), (0.1, "0.001"), (0.09, "0.0001"), (1.62, "upper"), (1.7, "threshold 1.70")]
    chart = histogram([("a", [1] * 4)], [0, 0.5, 1, 1.5, 2], title="t", x_label="x", markers=markers)
    lines = [float(x) for x in re.findall(r'class="marker" x1="([\d.]+)" x2="\1"', chart)]
    found = re.findall(r'class="marked" x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)">([^<]+)', chart)
    assert len(lines) == len(found) == len(markers)
    assert len({y for _, y, *_ in found}) == len(markers)
    for x, _, anchor, label in found:
        # Letters of 12 px are at most 7 wide.
        end = float(x) + 7 * len(label) * (1 if anchor == "start" else -1)
        left, right = sorted((float(x), end))
        assert not [line for line in lines if left - 2 < line < right + 2], label
    # A label that had to move is led to by a line from its marker.
    leaders = re.findall(r'class="marker" x1="([\d.]+)" x2="([\d.]+)"', chart)
    assert sum(start != end for start, end in leaders) == 3


def test_long_text_in_a_table_is_wrapped():
    css = full_page("x").html()
    rule = re.search(r"tbody th\.words:not\(:first-child\)[^{]*{([^}]*)}", css)
    assert rule and "white-space: normal" in rule[1]


def seen_in_chromium(folder, html, width):
    """Which pictures a browser loads and how wide the page gets; asserts that it has nothing to say on its console."""
    (folder / "page.html").write_text(html, encoding="utf-8")
    shot = folder / "page.png"
    log = chromium(folder, folder / "page.html", width, f"--screenshot={shot}", "--enable-logging=stderr")
    assert "CONSOLE" not in log
    image = Image.open(shot).convert("RGB")
    assert image.width == width and len(image.getcolors(maxcolors=1 << 24)) > 100

    # The page forbids scripts, so the same page without that line answers the questions. It is in a frame because a
    # window has a least width.
    probe = """<script>addEventListener("load", () => {
        const images = [...document.images];
        const loaded = images.filter(image => image.complete && image.naturalWidth > 0).length;
        const width = document.documentElement.scrollWidth;
        parent.document.title = `loaded ${loaded} of ${images.length}, width ${width}`;
    })</script>"""
    open_page, found = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html)
    assert found == 1
    inner = escape(open_page.replace("</body>", probe + "</body>"), quote=True)
    frame = f'<title></title><iframe width="{width}" style="border: 0" srcdoc="{inner}"></iframe>'
    (folder / "probe.html").write_text(f"<!doctype html>{frame}", encoding="utf-8")
    return re.search("<title>(.*?)</title>", chromium(folder, folder / "probe.html", width, "--dump-dom"))[1]


def chromium(folder, page, width, *arguments):
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += f" --disable-component-update --disable-sync --hide-scrollbars --window-size={width},900"
    data = folder / f"browser-{page.stem}-{width}"
    command = [CHROMIUM, *flags.split(), f"--user-data-dir={data}", *arguments, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def coordinates(svg, kind="line"):
    paths = re.findall(rf'<path class="{kind} s\d" d="([^"]*)"', svg)
    return [[tuple(map(float, pair)) for pair in re.findall(r"[ML]([\d.]+) ([\d.]+)", path)] for path in paths]


def test_line_chart_places_values_on_linear_and_logarithmic_axes():
    left, right, top, bottom = charts.LEFT, charts.WIDTH - charts.RIGHT, charts.TOP, charts.HEIGHT - charts.BOTTOM
    labels = {"title": "t", "x_label": "x", "y_label": "y"}
    [line] = coordinates(line_chart([("a", [0, 5, 10], [0, 1, 2])], **labels))
    assert line == [(left, bottom), ((left + right) / 2, (top + bottom) / 2), (right, top)]
    [line] = coordinates(line_chart([("a", [1e-4, 1e-2, 1], [1, 10, 100])], x_log=True, y_log=True, **labels))
    assert line == [(left, bottom), ((left + right) / 2, (top + bottom) / 2), (right, top)]


def test_each_of_eight_lines_has_a_style_of_its_own():
    chart = line_chart([(f"{one}", [0, 1], [one, one]) for one in range(8)], title="t", x_label="x", y_label="y")
    css = (Path(charts.__file__).parent / "templates/report.css").read_text(encoding="utf-8")
    styles = [
        re.search(rf"\.chart \.line\.{name} {{ ([^}}]*) }}", css)[1] for name in re.findall(r'"line (\w+)" d=', chart)
    ]
    assert len(set(styles)) == 8


def test_line_chart_leaves_gaps_and_averages_long_series():
    labels = {"title": "t", "x_label": "x", "y_label": "y"}
    svg = line_chart([("a", range(5), [1, math.nan, 3, math.inf, 5])], **labels)
    assert re.search(r'class="line s0" d="([^"]*)"', svg)[1].count("M") == 3
    [line] = coordinates(line_chart([("a", range(4000), [0.0, 1.0] * 2000)], **labels))
    assert len(line) == 400 and len({y for _, y in line}) == 1
    assert "nothing to draw" in line_chart([("a", [], [])], **labels)
    assert "nothing to draw" in histogram([("a", [0, 0])], [0, 1, 2], title="t", x_label="x")


@pytest.mark.parametrize(
    "xs, ticks", [([1, 2], ["1", "2"]), ([0, 1.5], ["0", "0.5", "1", "1.5"]), ([0, 4], list("01234"))]
)
def test_there_is_no_tick_between_two_epochs(xs, ticks):
    chart = line_chart([("a", xs, [0, 1])], title="t", x_label="epoch", y_label="y")
    assert re.findall(r'text-anchor="middle">([^<]+)</text>', chart)[: len(ticks)] == ticks


def test_ticks_of_an_axis_are_written_alike():
    chart = charts.line_chart([("lr", [0, 10], [0.0002, 0.0012])], title="lr", x_label="step", y_label="lr")
    assert re.findall(r'text-anchor="end">([^<]+)<', chart) == [
        "0.0002",
        "0.0004",
        "0.0006",
        "0.0008",
        "0.001",
        "0.0012",
    ]
    small = charts.line_chart([("lr", [0, 10], [1e-6, 5e-6])], title="lr", x_label="step", y_label="lr")
    assert ">2e-6<" in small and ">5e-6<" in small


@pytest.mark.parametrize(
    "values", [[2.77215, 2.77225], [3.0e-5, 3.01e-5], [1e6, 1e6 + 3000], [-41.0, -41.01], [5, 90]]
)
def test_ticks_are_told_apart_and_fit(values):
    """No two labels of an axis are equal, each is its value, and no label reaches the axis title."""
    chart = charts.line_chart([("loss", [0, 10], values)], title="l", x_label="step", y_label="loss")
    labels = re.findall(r'text-anchor="end">([^<]+)<', chart)
    ticks = charts.Scale(values, None, False, 0, 1, least=charts.LEAST_RANGE).ticks
    assert len(set(labels)) == len(labels) == len(ticks) > 1 and max(map(len, labels)) <= 8
    step = ticks[1] - ticks[0]
    assert all(abs(float(label) - tick) < 0.01 * step for label, tick in zip(labels, ticks, strict=True))


@pytest.mark.parametrize("count, lines", [(2, 1), (3, 2), (6, 3)])
def test_a_long_legend_takes_as_many_lines_as_it_needs(count, lines):
    names = [f"synthetic:domain={letter}" for letter in "abcdef"[:count]]
    chart = charts.line_chart([(name, [0, 1], [0, 1]) for name in names], title="t", x_label="x", y_label="y")
    top, height = (int(value) for value in re.search(r'viewBox="0 (-?\d+) 460 (\d+)"', chart).groups())
    assert (top, height) == (-18 * (lines - 1), 280 + 18 * (lines - 1))
    found = re.findall(r'class="label" x="(\d+)" y="(-?\d+)">([^<]+)<title>', chart)
    assert [name for _, _, name in found] == names
    for x, y, name in found:
        assert int(x) + 7 * len(name) <= 460 - 16 and int(y) - 12 >= top
    assert len({(x, y) for x, y, _ in found}) == count


def test_a_name_longer_than_the_chart_is_cut_and_whole_on_hover():
    chart = charts.line_chart(
        [("n" * 200, [0, 1], [0, 1]), ("b", [0, 1], [1, 0])], title="t", x_label="x", y_label="y"
    )
    assert f"…<title>{'n' * 200}</title>" in chart and chart.count("n" * 60) == 3


@pytest.mark.parametrize("low, high, expected", [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0, 50, [0, 10, 20, 30, 40, 50])])
def test_ticks_are_round(low, high, expected):
    assert charts._ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize("low, high", [(0, 1e-9), (-7.3, 12.9), (1e6, 1e6 + 3), (0.1, 0.1000001), (0, 3e12)])
def test_ticks_lie_within_and_are_few(low, high):
    ticks = charts._ticks(low, high)
    assert 2 <= len(ticks) <= 6
    assert low - (high - low) * 1e-6 <= ticks[0] and ticks[-1] <= high + (high - low) * 1e-6


def test_histogram_draws_shares_of_each_group():
    svg = histogram([("a", [1, 3]), ("b", [40, 0])], [0, 1, 2], title="t", x_label="x")
    bottom = charts.HEIGHT - charts.BOTTOM
    a, b = coordinates(svg)
    heights = [bottom - y for _, y in a], [bottom - y for _, y in b]
    # The largest share, all of b in its first bar, is 4 times the first of a.
    assert heights[1][1] == pytest.approx(4 * heights[0][1], abs=0.5)
    assert heights[0][3] == pytest.approx(3 * heights[0][1], abs=0.5)


def test_files_appear_together_or_not_at_all(tmp_path):
    with write_together(tmp_path / "new") as aside:
        aside("a.txt").write_text("old a")
        aside("b.txt").write_text("old b")
        assert not (tmp_path / "new" / "a.txt").exists()
    assert {path.name: path.read_text() for path in (tmp_path / "new").iterdir()} == {
        "a.txt": "old a",
        "b.txt": "old b",
    }
    with pytest.raises(RuntimeError, match="stop"):
        with write_together(tmp_path / "new") as aside:
            aside("a.txt").write_text("new a")
            raise RuntimeError("stop")
    assert {path.name: path.read_text() for path in (tmp_path / "new").iterdir()} == {
        "a.txt": "old a",
        "b.txt": "old b",
    }


def test_full_disk_leaves_what_was_there(tmp_path):
    (tmp_path / "metrics.json").write_text("old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError):
            with write_together(tmp_path) as aside:
                aside("metrics.json").write_text("new")
                aside("report.html").write_text("x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("metrics.json", "old")]


def test_json_has_no_nan_and_reads_back():
    value = {
        "a": float("nan"),
        "b": [1, float("inf"), torch.tensor([1.5, 2.0])],
        3: {"c": None, "d": True, "e": {}},
        "p": NASTY,
    }
    text = to_json(value)
    expected = {"a": None, "b": [1, None, [1.5, 2.0]], "3": {"c": None, "d": True, "e": {}}, "p": NASTY}
    assert json.loads(text, parse_constant=pytest.fail) == expected
    assert '"b": [\n    1,' in text and "[1.5, 2.0]" in text


def test_csv_holds_no_formula(tmp_path):
    cells = ["=1+1", "+1", "-1_c1.jpg", "@x", "\tx", "plain, with comma", 'quote"d', "line\nbreak", -0.5, 3]
    write_csv(tmp_path / "a.csv", ["name"], [[cell] for cell in cells])
    with open(tmp_path / "a.csv", newline="", encoding="utf-8") as file:
        rows = [row[0] for row in csv.reader(file)]
    assert rows[0] == "name" and rows[-2:] == ["-0.5", "3"]
    assert rows[1:6] == ["'=1+1", "'+1", "'-1_c1.jpg", "'@x", "'\tx"]
    assert rows[6:9] == ["plain, with comma", 'quote"d', "line\nbreak"]


def test_settings_are_written_without_the_folders_of_a_machine(tmp_path):
    assert portable([tmp_path, str(tmp_path), 3, "no such file"]) == [tmp_path.name, tmp_path.name, 3, "no such file"]
    assert portable([f"--output_dir={tmp_path}", "--seed=3"]) == [f"--output_dir={tmp_path.name}", "--seed=3"]
    assert portable(f"{tmp_path}:holdout=0.3,domain=x") == f"{tmp_path.name}:holdout=0.3,domain=x"
    assert portable("synthetic:domain=a,num_ids=4") == "synthetic:domain=a,num_ids=4"
    # A sentence may be longer than any name of a file.
    assert portable("x" * 5000) == "x" * 5000


def test_record_of_a_run_names_versions_and_revision():
    import argparse

    record = json.loads(to_json(run_record(argparse.Namespace(model="m", k1=20))))
    assert record["arguments"] == {"model": "m", "k1": 20}
    assert record["versions"]["torch"] == torch.__version__.split("+")[0] == versions()["torch"]
    assert record["versions"]["git"] is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", record["versions"]["git"])


def front_matter(card):
    _, header, body = card.split("---\n", 2)
    return yaml.safe_load(header), body


def test_cards_have_front_matter_that_the_hub_reads():
    metrics = {"market1501: a | b": {"mAP": 0.8123, "rank1": 0.92, "num_valid": 3368}}
    options = {
        "license": "apache-2.0",
        "base_model": "openai/clip-vit-base-patch16",
        "tags": ["person-re-identification"],
    }
    details = {"learning rate": 3e-4, "a|b": "c\nd"}
    card = model_card("My: model", text="Text.", command="python x.py", metrics=metrics, details=details, **options)
    header, body = front_matter(card)
    assert header["license"] == "apache-2.0" and header["base_model"] == "openai/clip-vit-base-patch16"
    result = header["model-index"][0]
    assert result["name"] == "My: model"
    assert {one["type"]: one["value"] for one in result["results"][0]["metrics"]} == {"mAP": 0.8123, "rank1": 0.92}
    assert "| mAP | 81.23 % |" in body and "| num_valid | 3368 |" in body and "| a\\|b | c d |" in body
    header, body = front_matter(data_card("People", text="Text.", command="python y.py", license="mit", tags=["x: y"]))
    assert header["tags"] == ["x: y"] and body.strip().startswith("# People")


def test_pictures_are_scaled_down_and_never_up():
    def size(image):
        return Image.open(io.BytesIO(base64.b64decode(data_uri(image).split(",")[1]))).size

    assert size(picture(size=(100, 400))) == (40, 160)
    assert size(picture(size=(50, 100))) == (50, 100)
    assert size(Image.new("L", (3, 2000))) == (1, 160)
    assert size(Image.new("L", (3200, 400))) == (320, 40)
    original = picture(size=(100, 400))
    assert data_uri(original) and original.size == (100, 400)


@pytest.mark.parametrize("value", [1e-4, -3.0, 0.0])
def test_a_constant_is_drawn_at_its_value(value):
    """In the middle of an axis that starts at zero; also where means differ in their last digits."""
    values = [value, value * (1 + 1e-15), value]
    svg = str(charts.line_chart([("lr", [1, 2, 3], values)], title="lr", x_label="step", y_label="rate"))
    heights = {float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", re.search(r'class="line s0" d="([^"]+)"', svg)[1])}
    middle = (charts.TOP + charts.HEIGHT - charts.BOTTOM) / 2
    assert heights and all(abs(height - middle) < 0.2 for height in heights)
    scale = charts.Scale(values, None, False, 0.0, 1.0)
    assert scale(value) == pytest.approx(0.5) and scale.low <= 0 <= scale.high and len(scale.ticks) > 1
