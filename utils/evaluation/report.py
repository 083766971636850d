"""The report of an evaluation: metrics, curves, thresholds, cameras, confusions, and ranked lists with images."""

import random
from pathlib import Path

import torch
from PIL import Image, ImageOps

from utils.batches.transforms import test_transform
from utils.datasets.schema import UNKNOWN
from utils.evaluation.decisions import add_decisions
from utils.evaluation.lists import is_match
from utils.evaluation.metrics import RANKS
from utils.evaluation.results import last_words
from utils.files import portable
from utils.modeling.attention import attention_maps
from utils.reporting.charts import line_chart
from utils.reporting.histograms import histogram
from utils.reporting.report import Report, Tile, data_uri, percent

SHOWN_RANKS = 10
SHOWN_SEARCHES = 40
HEADLINES = {"mAP": "mAP", "mINP": "mINP"} | {f"rank{k}": f"Rank-{k}" for k in RANKS}
NOTES = {
    "mAP": "mean average precision",
    "mINP": "how early the last match comes",
    "rank1": "the first image is right",
}


class ResultPictures:
    """The images of the query and gallery rows as data URIs, and the attention of `model`."""

    def __init__(self, images, query_rows, gallery_rows, model=None):
        self.images, self.query_rows, self.gallery_rows, self.model = images, query_rows, gallery_rows, model

    def query(self, row):
        return data_uri(self.images[self.query_rows[row]]["image"])

    def gallery(self, row):
        return data_uri(self.images[self.gallery_rows[row]]["image"])

    def attention(self, row):
        """The attention map over a query, bright where the model attends, or None without a model."""
        if self.model is None:
            return None
        model, image = self.model, self.images[self.query_rows[row]]["image"]
        transform = test_transform(model.image_size, model.image_mean, model.image_std, model.resample)
        batch = transform(image)[None].to(next(model.parameters()).device)
        heat = attention_maps(model, batch)[0].cpu()
        heat = (heat - heat.min()) / (heat.max() - heat.min()).clamp(min=1e-6)
        heat = Image.fromarray((255 * heat).to(torch.uint8).numpy()).resize(image.size, Image.Resampling.BICUBIC)
        colours = ImageOps.colorize(heat, black="#10243f", mid="#b8457a", white="#ffe08a")
        return data_uri(Image.blend(image.convert("RGB"), colours, 0.55))


class NoPictures:
    """In the place of `ResultPictures` where there are no images: lists show names."""

    def query(self, row):
        return None

    gallery = attention = query


def model_name(name):
    """Of an absolute path only the last part: reports are shared."""
    return Path(name).name if name and Path(name).is_absolute() else name


def evaluation_report(metrics, findings, pictures=None, *, num_random=4, seed=0):
    """A `Report` of the metrics and their `Findings`; without `pictures` the lists show names only."""
    is_search = metrics["mAP"] is None
    cameras = torch.cat([findings.queries.camids, findings.gallery.camids]).unique()
    facts = [
        ("Data", " in ".join(portable(metrics["data"].split(" in ")))),
        ("Model", model_name(metrics["model"]) or "features from a file"),
        ("Queries", f"{len(findings.queries):,} images"),
        ("Gallery", f"{len(findings.gallery):,} images"),
        ("Cameras", len(cameras[cameras >= 0]) or "unknown"),
        ("Protocol", findings.protocol),
    ]
    if metrics.get("num_same_files"):
        facts.append(("The same file", f"{metrics['num_same_files']:,} pairs of query and gallery, dropped"))
    if is_search:
        report = Report("Search", subtitle="The nearest gallery images of each query, closest first.", facts=facts)
        if findings.decisions:
            add_decisions(report, metrics["decisions"])
        add_searches(report, findings, pictures)
    else:
        asked = "the queries that have a match" if metrics["num_skipped"] else "the queries"
        lead = f"For {percent(metrics['rank1'])} of {asked} the nearest image shows the right person."
        if "splits" in metrics:
            lead += f" Numbers are means over {len(metrics['splits'])} splits; curves and pictures show the first."
        report = Report("Re-identification", subtitle=lead, facts=facts)
        if findings.decisions:
            add_decisions(report, metrics["decisions"])
        add_numbers(report, metrics, findings.result)
        if findings.pairs:
            add_distances(report, findings.pairs)
        add_calibration(report, findings.calibration)
        if findings.cameras:
            add_cameras(report, findings.gallery.camera_name, *findings.cameras)
        add_confusions(report, findings, pictures)
        add_queries(report, findings, pictures, num_random, seed)
    if metrics["skipped_images"]:
        report.section("Left out", f"{len(metrics['skipped_images'])} images that do not decode.")
        report.table(["file"], [[last_words(line)] for line in metrics["skipped_images"]])
    return report


def add_numbers(report, metrics, result):
    text = f"{metrics['num_valid']:,g} queries have a match to find"
    text += f"; {metrics['num_skipped']:,g} have none and are left out." if metrics["num_skipped"] else "."
    report.section("Ranking", text)
    deviation = metrics.get("std")
    notes = NOTES | {f"rank{k}": f"right within the first {k}" for k in RANKS if k > 1}
    notes = {key: f"± {100 * deviation[key]:.1f} over the splits" if deviation else notes[key] for key in HEADLINES}
    report.tiles([(name, percent(metrics[key]), notes[key]) for key, name in HEADLINES.items()])

    ranks = list(range(1, len(metrics["cmc"]) + 1))
    lines = [("plain", ranks, metrics["cmc"].tolist())]
    if "reranked" in metrics:
        lines.append(("re-ranked", ranks, metrics["reranked"]["cmc"].tolist()))
    bottom = min(0.9, *(int(10 * values[0]) / 10 for _, _, values in lines))
    curve = line_chart(
        lines,
        title="CMC curve",
        x_label="rank",
        y_label="queries",
        x_range=(1, len(ranks)),
        y_range=(bottom, 1),
        percent=True,
        dots=True,
    )
    precisions = result.ap[~result.ap.isnan()]
    counts = torch.histc(precisions.float(), bins=20, min=0, max=1).tolist()
    edges = torch.linspace(0, 1, 21).tolist()
    precision_bars = histogram(
        [("queries", counts)], edges, title="Average precision", x_label="average precision", y_label="queries"
    )
    report.charts(
        [
            (curve, "Cumulative match characteristic: queries with a right image at this rank or before."),
            (precision_bars, "Average precision of each query: 1 where all matches come before everyone else."),
        ]
    )
    if "reranked" in metrics:
        reranked = metrics["reranked"]
        rows = [
            [name, *(percent(values[key]) for key in HEADLINES)]
            for name, values in (("plain", metrics), ("re-ranked", reranked))
        ]
        caption = (
            f"k-reciprocal re-ranking with k1 = {reranked['k1']}, k2 = {reranked['k2']}, "
            f"lambda = {reranked['lambda_value']:g}"
        )
        caption += f", as {reranked['compat']} computes it." if reranked["compat"] else "."
        report.table(["", *HEADLINES.values()], rows, caption=caption)


def add_distances(report, pairs):
    text = (
        "The distance of two images is 2 − 2 cos of their features: 0 for the same direction, 4 for opposite ones. "
        f"The protocol keeps {pairs.num_matches:,} pairs of one person and {pairs.num_non_matches:,} of two people."
    )
    report.section("Distances and thresholds", text)
    reached = {rate: limit for rate, limit in pairs.thresholds.items() if limit["distance"] is not None}
    bars = histogram(
        [("same person", pairs.match_counts), ("two people", pairs.non_match_counts)],
        pairs.edges,
        title="Distances of matches and non-matches",
        x_label="distance",
        y_label="pairs",
        markers=[(limit["distance"], rate) for rate, limit in reached.items()],
    )
    curve = line_chart(
        [("true-match rate", pairs.curve["false_match_rate"], pairs.curve["true_match_rate"])],
        title="True-match rate over false-match rate",
        x_label="false-match rate",
        y_label="true-match rate",
        x_log=True,
        y_range=(0, 1),
        percent=True,
    )
    report.charts(
        [
            (
                bars,
                "Each kind of pair by its distance, as shares of its own number. Dotted: the thresholds of the table.",
            ),
            (curve, "How many true pairs are accepted when so many false ones may be."),
        ]
    )
    rows = [
        [rate, f"{limit['distance']:.4f}", percent(limit["true_match_rate"]), f"{limit['false_match_rate']:.2g}"]
        for rate, limit in reached.items()
    ]
    caption = (
        "Two images are called one person if their distance is at most the threshold: the largest within the rate."
    )
    report.table(["false-match rate", "threshold", "true-match rate", "rate reached"], rows, caption=caption)


def add_calibration(report, calibration):
    if calibration is None:
        return
    text = (
        "A score is the cosine of two images, 1 for the same direction. In brackets: 95 % intervals, for other "
        "identities photographed by the same cameras. calibration.json has the numbers of each pair of cameras too."
    )
    report.section("Same person or not", text)
    limits = [(f"two images: false-match rate {rate}", one) for rate, one in calibration["rates"].items()]
    searches = calibration["open_set"]["rates"].items()
    limits += [(f"search for somebody not there: false alarms {rate}", one) for rate, one in searches]
    rows = [[name, *calibrated_cells(one, "TPIR" if "TPIR" in one else "right_match_rate")] for name, one in limits]
    caption = (
        "Right results: pairs of one identity that match, or searches for somebody who is there that end with the "
        f"right identity. A search goes through {calibration['open_set']['gallery_images']:,.0f} gallery images."
    )
    report.table(["accepted", "threshold", "right results"], rows, caption=caption)
    # In a cell they would be wider than the page.
    for name, one in limits:
        if one.get("reason"):
            report.text(f"{name[0].upper()}{name[1:]}: {one['reason']}.")


def calibrated_cells(entry, name):
    if entry["threshold"] is None:
        return "not measurable", "–"
    low, high = map(float, entry["threshold_interval"])
    cells = [f"{entry['threshold']:.4f} ({low:.4f} to {high:.4f})"]
    if entry[name] is None:
        return *cells, "not measurable"
    low, high = map(float, entry[f"{name}_interval"])
    return *cells, f"{percent(entry[name])} ({percent(low)} to {percent(high)})"


def add_cameras(report, camera_name, query_cameras, gallery_cameras, table):
    if len(query_cameras) * len(gallery_cameras) < 2:
        return
    report.section("Cameras", "mAP in % of each query camera against each gallery camera alone.")
    columns = ["query \\ gallery", *map(camera_name, gallery_cameras)]
    rows = [
        [camera_name(camera), *("–" if value is None else f"{100 * value:.1f}" for value in row)]
        for camera, row in zip(query_cameras, table, strict=True)
    ]
    values = [value for row in table for value in row if value is not None]
    low, spread = min(values, default=0), max(values, default=0) - min(values, default=0)
    shades = [[None if value is None else (value - low) / (spread or 1) for value in row] for row in table]
    caption = (
        "Cameras count from 1, as in names such as 0002_c1; the stronger the colour, the better. A dash: no query of "
        "that camera has a match there."
    )
    report.table(columns, rows, shades=shades, caption=caption)


def add_confusions(report, findings, pictures):
    if not findings.confusions:
        return
    text = "Identities ranked first when another was asked for, the most frequent first."
    if pictures is not None:
        text += " From the left: the query, the wrong identity, and the nearest right image if the list has one."
    report.section("Hardest confusions", text)
    gallery = findings.gallery
    if pictures is None:
        rows = [
            [*map(gallery.identity_name, confusion.pids), confusion.count, f"{confusion.distance:.3f}"]
            for confusion in findings.confusions
        ]
        report.table(["identity", "identity", "queries", "closest distance"], rows, text_columns=2)
        return
    cards = []
    for confusion in findings.confusions:
        wrong = Tile(
            pictures.gallery(confusion.gallery),
            gallery.paths[confusion.gallery],
            describe(gallery, confusion.gallery),
            False,
        )
        tiles = [query_tile(findings, pictures, confusion.query), wrong]
        match = nearest_match(findings, confusion.query)
        if match is not None:
            tiles.append(Tile(pictures.gallery(match), gallery.paths[match], describe(gallery, match), True))
        queries = "query" if confusion.count == 1 else "queries"
        note = f"{confusion.count} {queries}, closest distance {confusion.distance:.3f}"
        title = " and ".join(map(gallery.identity_name, confusion.pids))
        cards.append({"title": title, "note": note, "tiles": tiles})
    report.cards(cards)


def nearest_match(findings, row):
    """The gallery row of the first right image in a query's ranked list, or None."""
    columns = findings.lists[0][row].tolist()
    return next((c for c in columns if c >= 0 and is_match(findings.queries, findings.gallery, row, c)), None)


def add_queries(report, findings, pictures, number, seed):
    """Sections of the queries with the highest and the lowest average precision, and of random ones."""
    precisions = findings.result.ap
    valid = (~precisions.isnan()).nonzero().flatten()
    order = valid[precisions[valid].argsort(stable=True)].tolist()
    worst, best = order[:number], order[::-1][:number]
    others = sorted(set(order) - set(worst) - set(best))
    drawn = random.Random(seed).sample(others, min(number, len(others)))
    kinds = (("Best queries", best), ("Worst queries", worst), ("Random queries", drawn))
    for title, rows in kinds:
        if not rows:
            continue
        legend = (
            "A green frame with ✓ is the person asked for, a dashed red one with ✕ another; numbers are distances."
        )
        report.section(title, legend if pictures else "")
        if pictures is None:
            report.table(
                ["query", "average precision", "first match at rank"],
                [
                    [
                        findings.queries.paths[row],
                        f"{float(precisions[row]):.3f}",
                        int(findings.result.first_match[row]),
                    ]
                    for row in rows
                ],
            )
            continue
        for row in rows:
            first = int(findings.result.first_match[row])
            note = f"average precision {float(precisions[row]):.2f}, first match at rank {first}"
            if findings.decisions:
                note += f"; {findings.decisions[row].describe()}"
            add_ranked(report, findings, pictures, row, note)


def add_searches(report, findings, pictures):
    shown = min(len(findings.queries), SHOWN_SEARCHES)
    more = (
        f" Shown are the first {shown} of {len(findings.queries):,} queries; rankings.csv has all."
        if shown < len(findings.queries)
        else ""
    )
    report.section("Results", f"Below each image its distance: 0 for equal features, 4 for opposite ones.{more}")
    for row in range(shown):
        note = findings.decisions[row].describe() if findings.decisions else ""
        add_ranked(report, findings, pictures or NoPictures(), row, note)


def add_ranked(report, findings, pictures, row, note):
    query = query_tile(findings, pictures, row)
    lists = [("", result_tiles(findings, pictures, row, findings.lists))]
    if findings.reranked_lists is not None:
        lists.append(("re-ranked", result_tiles(findings, pictures, row, findings.reranked_lists)))
    report.ranked(query.name, query, lists, attention=pictures.attention(row), note=note)


def result_tiles(findings, pictures, row, lists):
    columns, distances = (values[row, :SHOWN_RANKS].tolist() for values in lists)
    return [
        Tile(
            pictures.gallery(column),
            findings.gallery.paths[column],
            f"{distance:.3f}",
            is_match(findings.queries, findings.gallery, row, column),
        )
        for column, distance in zip(columns, distances, strict=True)
        if column >= 0
    ]


def query_tile(findings, pictures, row):
    return Tile(pictures.query(row), findings.queries.paths[row], describe(findings.queries, row))


def describe(side, row):
    pid, camera = int(side.pids[row]), int(side.camids[row])
    words = [
        f"identity {side.identity_name(pid)}" if pid != UNKNOWN else "",
        f"camera {side.camera_name(camera)}" if camera >= 0 else "",
    ]
    return ", ".join(filter(None, words))
