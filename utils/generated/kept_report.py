"""The report of a filtered set: kept and rejected images of each filter, disagreements, scores, identities."""

import numpy as np
import pyarrow.parquet as pq

from utils.datasets.images import as_rgb
from utils.files import portable
from utils.generated import choosing
from utils.generated import images as generated_images
from utils.generated.kept_set import NAMES, TABLE_COLUMNS, number
from utils.generated.scoring import open_image
from utils.reporting.charts import line_chart
from utils.reporting.histograms import histogram
from utils.reporting.report import Report, Tile, data_uri

SHOWN, HALF = 6, 3
BARS = 40
TRUE_RATES = (0.99, 0.95, 0.9, 0.8)
RATES = (0.1, 0.03, 0.01, 0.003, 0.001, 0.0001)
SHORT = {"clip": "CLIP", "cctf": "CCTF", "reid": "Re-ID", "attributes": "attributes"}
LABELS = {"clip": "CLIP", "cctf": "CCTF", "reid": "Re-ID CTF", "attributes": "attributes"}
MAX_SOURCES = 6


def kept_report(generated, name, sources, scores_path, scores, choice, calibration, summary):
    """A `Report` of the scores and the choice; `name` is the value of --generated."""
    masks = masks_of(scores, choice, summary["filter"])
    facts = [
        ("Generated", portable(name)),
        ("Source", " + ".join(sources)),
        ("Filter", LABELS[summary["filter"]]),
        ("Threshold", ", ".join(f"{domain} {number(value)}" for domain, value in choice.thresholds.items())),
    ]
    if summary["choice"]["match_margin"]:
        facts.append(("Margin of the match", number(summary["choice"]["match_margin"])))
    if summary["choice"].get("min_agreement") is not None:
        facts.append(("Least agreement with the prompt", number(summary["choice"]["min_agreement"])))
    lead = f"{summary['kept']:,} of {summary['images']:,} generated images are kept; they are {summary['made_by']}."
    report = Report("Filtered people", subtitle=lead, facts=facts)
    add_counts(report, summary)
    if summary["against_truth"]:
        add_truth(report, summary["against_truth"])
    pictures = SamplePictures(generated, scores_path)
    add_examples(report, scores, masks, pictures)
    add_disagreements(report, scores, masks, pictures)
    pictures.load()
    add_histograms(report, scores, choice, summary["filter"])
    add_calibration(report, calibration)
    add_identities(report, scores, choice, sources, summary)
    return report


def masks_of(scores, choice, chosen):
    """{filter: mask of the rows it keeps}; all filters keep as many images as the threshold of the chosen one."""
    floor = np.array([choice.thresholds[domain] for domain in scores.domains], np.float64)[scores.source]
    chosen_mask = choosing.eligible(scores, chosen) & (scores.values[chosen] >= floor)
    names = [name for name in choosing.FILTERS if scores.has(name)]
    return {
        name: chosen_mask if name == chosen else choosing.equal_share(scores, name, int(chosen_mask.sum()))
        for name in names
    }


def add_counts(report, summary):
    spread = summary["images_per_identity"]
    report.section("Counts")
    report.tiles(
        [
            ("kept", f"{summary['kept']:,}", f"of {summary['images']:,} images"),
            ("identities", f"{summary['identities']:,}", f"in {count_of(len(summary['sources']), 'source')}"),
            ("images an identity", f"{spread['mean']:.1f}", f"{spread['min']} to {spread['max']}"),
        ]
    )
    names = ("generated", "kept", "identities", "identities_without")
    rows = [
        [domain, *(f"{source[name]:,}" for name in names), number(source["threshold"])]
        for domain, source in summary["sources"].items()
    ]
    columns = ["source", "generated", "kept", "identities", "identities without", "threshold"]
    report.table(columns, rows)
    rejected = [[why, f"{count:,}"] for why, count in summary["rejected"].items() if count]
    if rejected:
        report.table(["left out because", "images"], rejected)


def count_of(count, word):
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def read_truths(scores_path):
    """The column `truth` of drawn images, or None."""
    if "truth" not in pq.read_schema(scores_path).names:
        return None
    return np.array(pq.read_table(scores_path, columns=["truth"])["truth"].to_pylist(), dtype=object)


def against_truth(scores_path, scores, chosen=None, choice=None):
    """{filter: {"auc", "kept": {truth: share}}} of drawn images, each filter keeping as many as are right, or None.

    The filter `chosen` has "chosen", the shares of what the `Choice` keeps at its threshold.
    """
    truths = read_truths(scores_path)
    if truths is None:
        return None
    good = np.array([str(truth).startswith("right") for truth in truths])
    if not good.any():
        return None
    result = {}
    for name in [name for name in choosing.FILTERS if scores.has(name)]:
        values = choosing.ranking(scores, name)
        kept = np.zeros(len(scores), bool)
        kept[np.argsort(-values, kind="stable")[: good.sum()]] = True
        shares = {kind: float(kept[truths == kind].mean()) for kind in dict.fromkeys(truths)}
        result[name] = {"auc": choosing.area_under_curve(values, good), "kept": shares}
        if name == chosen:
            result[name]["chosen"] = {kind: float(choice.kept[truths == kind].mean()) for kind in shares}
    return result


def truth_table(result):
    """The result of `against_truth` as text: (columns, rows)."""
    kinds = list(next(iter(result.values()))["kept"])
    rows = []
    for name, values in result.items():
        # If no image is wrong, there is no AUC.
        auc = "" if values["auc"] is None else f"{values['auc']:.3f}"
        rows.append([LABELS[name], auc, *(f"{100 * values['kept'][kind]:.0f} %" for kind in kinds)])
        if "chosen" in values:
            shares = [f"{100 * values['chosen'][kind]:.0f} %" for kind in kinds]
            rows.append([f"{LABELS[name]}, as chosen", "", *shares])
    return ["filter", "AUC", *kinds], rows


def add_truth(report, result):
    report.section(
        "Against the truth",
        "These images are drawn, and what each shows is known. AUC: how often an image of the right person, whatever "
        "the scene, comes before one that is wrong, broken or empty, where those that do not decode come last and, "
        "for Re-ID CTF, those nearest to somebody else before them, by how much nearer. Then the share of every kind "
        "that each filter keeps, if it keeps as many images as are right; as chosen: at the threshold of this run.",
    )
    report.table(*truth_table(result))


class SamplePictures:
    """Tiles of the report: `tile` requests the image of a row, `load` fills all tiles in one pass over the set."""

    def __init__(self, generated, scores_path):
        self.generated, self.path, self.wanted = generated, scores_path, {}

    def tile(self, row, match=None):
        tile = Tile(None, "", "", match)
        self.wanted.setdefault(int(row), []).append(tile)
        return tile

    def load(self):
        for start, table, readers in self.generated.pieces(self.starts()):
            if table is None:
                continue
            scored = self.scored(start, len(table))
            for row in [row for row in self.wanted if start <= row < start + len(table)]:
                values = scored[row - start]
                for tile in self.wanted[row]:
                    tile.name = values["path"]
                    tile.note = note_of(values)
                    tile.uri = picture_of(readers[row - start])

    def starts(self):
        return {row - row % generated_images.PIECE for row in self.wanted}

    def scored(self, start, size):
        with pq.ParquetFile(self.path, pre_buffer=False) as file:
            return file.read_row_group(start // generated_images.PIECE).to_pylist()[:size]


def note_of(row):
    # Non-breaking spaces keep each name and its number on one line.
    notes = [f"identity\u00a0{row['pid']}", *([row["error"]] if row["error"] else [])]
    for name, column in choosing.FILTERS.items():
        if row.get(column) is not None:
            notes.append(f"{SHORT[name]}\u00a0{row[column]:.2f}")
    if row["reid_match"] is False:
        notes.append(f"nearer to another by {row['reid_lead']:.2f}")
    truth = f"{row['truth']}: " if row.get("truth") else ""
    return truth + ", ".join(notes)


def picture_of(read):
    try:
        return data_uri(as_rgb(open_image(read())))
    except Exception:
        return None


def spread_over(rows, count=SHOWN):
    """At most `count` of the rows, evenly spaced."""
    if len(rows) <= count:
        return list(rows)
    return [rows[index] for index in np.linspace(0, len(rows) - 1, count).round().astype(int)]


def add_examples(report, scores, masks, pictures):
    report.section(
        "Kept and rejected",
        "Of each filter a sample of what it keeps, the images next to its threshold, and a sample of what it rejects. "
        "All filters keep as many images. A mark says what this filter does.",
    )
    for name, mask in masks.items():
        values = scores.values[name]
        order = np.argsort(-np.where(np.isfinite(values), values, -np.inf), kind="stable")
        kept, dropped = order[mask[order]], order[~mask[order]]
        groups = [
            ("kept", "a sample", spread_over(kept)),
            ("at the threshold", "the least kept, the best rejected", [*kept[-HALF:], *dropped[:HALF]]),
            ("rejected", "a sample", spread_over(dropped)),
        ]
        cards = [
            {
                "title": f"{LABELS[name]}: {title}",
                "note": note,
                "tiles": [pictures.tile(row, bool(mask[row])) for row in rows],
            }
            for title, note, rows in groups
            if len(rows)
        ]
        report.cards(cards)


def add_disagreements(report, scores, masks, pictures):
    pairs = [(keeps, rejects) for keeps in masks for rejects in masks if keeps != rejects]
    cards, rows = [], []
    for keeps, rejects in pairs:
        title = f"{LABELS[keeps]} keeps, {LABELS[rejects]} rejects"
        differ = np.flatnonzero(masks[keeps] & ~masks[rejects])
        rows.append([title, f"{len(differ):,}"])
        tiles = [pictures.tile(row) for row in spread_over(differ)]
        if tiles:
            cards.append({"title": title, "note": count_of(len(differ), "image"), "tiles": tiles})
    if rows:
        report.section("Disagreements", "Where two filters differ, while both keep as many images.")
        report.table(["between", "images"], rows)
        report.cards(cards)


def add_histograms(report, scores, choice, chosen):
    report.section("Scores", "Of all images that decode, by source.")
    charts = []
    for name in choosing.FILTERS:
        values = scores.values[name]
        finite = values[np.isfinite(values)]
        if not len(finite):
            continue
        # Probabilities start at 0 and end at the highest one, rounded up to a tenth.
        low = 0.0 if name != "reid" else float(finite.min()) - 0.01
        high = (
            min(1.0, np.ceil(10 * float(finite.max()) + 1e-6) / 10) if name != "reid" else float(finite.max()) + 0.01
        )
        edges = np.linspace(low, high, BARS + 1)
        groups, markers = [], []
        for place, domain in enumerate(scores.domains[:MAX_SOURCES]):
            groups.append((domain, np.histogram(values[(scores.source == place) & np.isfinite(values)], edges)[0]))
            limit = choice.thresholds[domain]
            if name == chosen and low <= limit <= high:
                markers.append((limit, f"threshold {limit:.2f}"))
        chart = histogram(groups, edges.tolist(), title=LABELS[name], x_label="score", markers=markers)
        charts.append((chart, f"{NAMES[name][:1].upper()}{NAMES[name][1:]}."))
    report.charts(charts)


def add_calibration(report, calibration):
    rows = [
        [domain, f"{rate:g}", number(threshold), "" if genuine is None else f"{100 * genuine:.1f} %"]
        for domain, rate, threshold, genuine in choosing.calibration_rows(calibration, RATES)
        if len(calibration[domain]["impostor"])
    ]
    if rows:
        report.section(
            "Calibration",
            "Held-out source images against the others: at each threshold, the share of scores with other people's "
            "images that reach it, and of those with their own. Generated images are further from the source than "
            "these are. The second table: the threshold that a share of the held-out images reaches against their "
            "identity's images of other cameras, less twice the lead of a nearer stranger; it is the default.",
        )
        report.table(["source", "false-match rate", "threshold", "true-match rate"], rows)
        across = [
            [
                domain,
                f"{100 * rate:.0f} %",
                number(choosing.reached_by(pair["across"], rate)),
                f"{len(pair['across']):,}",
            ]
            for domain, pair in calibration.items()
            for rate in TRUE_RATES
            if len(pair["across"])
        ]
        report.table(["source", "true-match rate across cameras", "threshold", "images"], across)


def add_identities(report, scores, choice, sources, summary):
    counts = choosing.images_per_person(scores, choice.kept)
    counts = counts[counts > 0]
    source_counts = np.concatenate([source.labels.bincount().numpy() for source in sources.values()])
    top = int(max(counts.max(), source_counts.max())) + 1
    xs = np.unique(np.linspace(0, top, min(top + 1, 200)).round().astype(int)).tolist()
    chart = line_chart(
        [("kept", xs, choosing.share_below(counts, xs)), ("source", xs, choosing.share_below(source_counts, xs))],
        title="Images an identity",
        x_label="X images",
        y_label="identities with fewer",
        percent=True,
        y_range=(0, 1),
    )
    report.section("Identities", "The share of identities that have fewer than X images.")
    report.charts([(chart, "Identities with no kept image are not counted.")])
    shares = summary["distribution"]
    rows = [
        [str(limit), f"{100 * kept_share:.1f} %", f"{100 * source_share:.1f} %"]
        for limit, kept_share, source_share in zip(shares["limits"], shares["kept"], shares["source"], strict=True)
    ]
    report.table(["X", "kept", "source"], rows)
    report.table(["", *TABLE_COLUMNS], [["this set", *map(str, summary["row"])]], text_columns=1)
