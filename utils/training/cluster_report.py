"""Clusters in a report: their numbers by epoch, distances between images, and pictures of clusters."""

import torch
import torch.nn.functional as F

from utils.evaluation.groups.clusters import NOISE
from utils.reporting.charts import line_chart
from utils.reporting.histograms import histogram
from utils.reporting.report import Tile, data_uri, percent

BINS = 40
SHOWN, PICTURES = 3, 8
CURVES = {
    "clusters": ("Clusters", "Clusters that were found."),
    "noise": ("Noise", "Share of the images that are in no cluster."),
    "ari": ("ARI", "Adjusted Rand index with the true identities; an image in no cluster counts as one of its own."),
    "nmi": ("NMI", "Normalised mutual information with the true identities."),
}


def describe_clusters(record):
    """One line of text about a clustering's record."""
    parts = [f"{record['clusters']} clusters", f"{100 * record['noise']:.1f} % in none"]
    if record.get("ari") is not None:
        parts.append(f"ARI {record['ari']:.3f}, NMI {record['nmi']:.3f}")
    return ", ".join(parts)


def add_clusters(report, records, clusters=None):
    """Add curves of `records` and, of the last clustering (a `Clusters`), a histogram of distances.

    `records` are dicts with epoch, clusters, noise, and with ari and nmi where true identities are known.
    """
    report.section(
        "Clusters",
        "By epoch, as they were after it; the point at 0 is of the model before training. True identities, where a "
        "data set has them, are used for this report only.",
    )
    epochs = [record["epoch"] for record in records]
    charts = []
    for key, (name, words) in CURVES.items():
        if records[-1].get(key) is not None:
            series = [(name, epochs, [record[key] for record in records])]
            percent = key == "noise"
            chart = line_chart(series, title=name, x_label="epoch", y_label=name, percent=percent, dots=True)
            charts.append((chart, words))
    if clusters is not None and clusters.reach is not None:
        counts = torch.histc(clusters.reach.float(), BINS, 0, 1).tolist()
        chart = histogram(
            [("images", counts)],
            [place / BINS for place in range(BINS + 1)],
            title="Distance to the nearest others",
            x_label=f"Jaccard distance within which an image has {clusters.min_samples - 1} others",
            markers=[(clusters.eps, f"eps {clusters.eps:g}")],
        )
        charts.append((chart, "Images left of eps are cores of clusters."))
    report.charts(charts)


def add_contact_sheet(report, dataset, labels, features, truth=None):
    """Add pictures of good clusters, of mixed ones if any, and of images in no cluster.

    Without true identities, the closest and the loosest clusters are shown.
    """
    labels = labels.cpu()
    if labels.max() < 0:
        return
    members = [(labels == label).nonzero().flatten() for label in range(int(labels.max()) + 1)]
    unit = F.normalize(features.float().cpu(), dim=1)
    if truth is None:
        quality = [float((unit[rows] @ F.normalize(unit[rows].mean(0), dim=0)).mean()) for rows in members]
        words = [f"mean cosine to their centre {value:.2f}" for value in quality]
    else:
        truth = torch.as_tensor(truth)
        quality = [float((truth[rows] == truth[rows].mode().values).double().mean()) for rows in members]
        words = [f"{percent(value)} of one identity" for value in quality]
    order = sorted(range(len(members)), key=lambda number: (-quality[number], -len(members[number]), number))
    others = [number for number in reversed(order) if number not in order[:SHOWN]][:SHOWN]
    kinds = ("Close", order[:SHOWN]), ("Loose", others)
    if truth is not None:
        kinds = ("Good", order[:SHOWN]), ("Mixed", [number for number in others if quality[number] < 1])
    cards = []
    for kind, chosen in kinds:
        for number in chosen:
            rows = members[number]
            note = f"{len(rows)} images, {words[number]}"
            cards.append({"title": f"{kind}: cluster {number}", "note": note, "tiles": tiles(dataset, rows, truth)})
    noise = (labels == NOISE).nonzero().flatten()
    if len(noise):
        cards.append({"title": "In no cluster", "note": f"{len(noise)} images", "tiles": tiles(dataset, noise)})
    words = "Clusters of the trained model."
    if truth is not None:
        words += " In a solid green frame a cluster's most frequent identity, in a dashed red one others."
    report.section("What the clusters hold", words)
    report.cards(cards)


def tiles(dataset, rows, truth=None):
    """Pictures of evenly chosen rows; those of the most frequent identity are marked as matches."""
    chosen = rows[torch.linspace(0, len(rows) - 1, min(PICTURES, len(rows))).long()].tolist()
    main = None if truth is None else int(truth[rows].mode().values)
    pictures = []
    for row in chosen:
        image = dataset[row]["image"]
        match = None if truth is None else bool(truth[row] == main)
        pictures.append(Tile(data_uri(image, height=120), dataset[row]["path"].split("/")[-1], match=match))
    return pictures
