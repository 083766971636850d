"""The report of a grouping: numbers, and groups with pictures, the most doubtful first, single items last."""

from collections import Counter

import torch

from utils.datasets.schema import UNKNOWN
from utils.evaluation.groups.grouping import doubts
from utils.evaluation.report import model_name
from utils.evaluation.results import last_words
from utils.files import portable
from utils.reporting.histograms import histogram
from utils.reporting.report import Report, Tile, data_uri, percent

# Bounds of the report's size, whatever the number of items: about 4 MB of pictures.
SHOWN_GROUPS, SHOWN_ITEMS, SHOWN_SINGLES, SHOWN_SKIPPED = 60, 10, 40, 200
BINS = 20


def group_report(metrics, tracklets, groups, typical_rows):
    """A `Report` of `Groups`; `typical_rows[item]` is the row of the image that stands for an item."""
    cameras = len({item.camera for item in tracklets.items} - {None})
    facts = [
        ("Data", portable(metrics["data"])),
        ("Model", model_name(metrics["model"])),
        ("Items", f"{metrics['num_items']:,} of {metrics['num_images']:,} images"),
        ("Cameras", cameras or "unknown"),
        ("Times", f"known of {metrics['num_timed']:,} items" if metrics["num_timed"] else "unknown"),
        ("Settings", ", ".join(f"{name} {value:g}" for name, value in metrics["settings"].items())),
    ]
    lead = "Who may be one person across cameras. A group is a guess: look through it, the doubtful ones come first."
    report = Report("Identities", subtitle=lead, facts=facts)
    add_numbers(report, metrics, groups)
    shown = Shown(tracklets, groups, typical_rows)
    add_groups(report, shown)
    add_singles(report, shown)
    if tracklets.skipped:
        report.section("Left out", f"{len(tracklets.skipped):,} files, boxes or folders.")
        shown = [(last_words(name), reason) for name, reason in tracklets.skipped[:SHOWN_SKIPPED]]
        report.table(["what", "why"], shown, text_columns=2)
    return report


def add_numbers(report, metrics, groups):
    text = "Cohesion is the mean of 1 − J over the pairs of a group, with J the Jaccard distance: 1 where all "
    text += "neighbours are shared; pairs beyond eps count as 0. Doubt is the sum of J over the pairs."
    if metrics["num_refused_pairs"]:
        text += (
            f" {metrics['num_refused_pairs']:,} near pairs were kept apart because one camera saw both at one time."
        )
    report.section("Numbers", text)
    tiles = [
        ("Groups", f"{metrics['num_groups']:,}", "of two and more items"),
        ("Single items", f"{metrics['num_singles']:,}", "in no group"),
    ]
    truth = metrics["truth"]
    if truth:
        names = (("pairwise F1", truth["pairwise"]["f1"]), ("B-cubed F1", truth["bcubed"]["f1"]))
        tiles += [
            (name, percent(value), f"of {truth['num_known']:,} items with known identity") for name, value in names
        ]
        tiles.append(("ARI", f"{truth['ari']:.3f}", f"{truth['num_true_identities']:,} true identities"))
    report.tiles(tiles)
    in_groups = groups.identities <= groups.num_groups
    if in_groups.any():
        first = first_rows(groups)
        counts = torch.histc(groups.cohesion[first].float(), BINS, 0, 1).tolist()
        edges = [place / BINS for place in range(BINS + 1)]
        sizes = groups.identities[in_groups].bincount()[1:]
        largest = int(sizes.max())
        width = -(-(largest - 1) // BINS)
        size_edges = [2 + width * place for place in range(-(-(largest - 1) // width) + 1)]
        size_counts = [int(((sizes >= low) & (sizes < low + width)).sum()) for low in size_edges[:-1]]
        report.charts(
            [
                (
                    histogram([("groups", counts)], edges, title="Cohesion", x_label="cohesion", y_label="groups"),
                    "Groups by their cohesion.",
                ),
                (
                    histogram([("groups", size_counts)], size_edges, title="Sizes", x_label="items", y_label="groups"),
                    "Groups by their number of items.",
                ),
            ]
        )
    if truth:
        rows = [
            [name, *(percent(truth[key][part]) for part in ("precision", "recall", "f1"))]
            for name, key in (("pairwise", "pairwise"), ("B-cubed", "bcubed"))
        ]
        report.table(["", "precision", "recall", "F1"], rows, caption="Single items count as groups of one.")


def first_rows(groups):
    """The first row of every group, in order of identities."""
    first = torch.full((groups.num_groups + 1,), len(groups.identities))
    rows = (groups.identities <= groups.num_groups).nonzero().flatten()
    return first.scatter_reduce(0, groups.identities[rows], rows, "amin")[1:]


class Shown:
    """Items as tiles with pictures."""

    def __init__(self, tracklets, groups, typical_rows):
        self.items, self.images, self.pids = tracklets.items, tracklets.images, tracklets.pids
        self.groups, self.typical_rows = groups, typical_rows.tolist()

    def tile(self, row, *, pid=UNKNOWN):
        """`pid`: the identity that most of its group has, to mark items that have another."""
        item, own = self.items[row], self.pids[row]
        words = [f"camera {item.camera}" if item.camera is not None else ""]
        words += [f"{len(item.rows)} images" if len(item.rows) > 1 else ""]
        match = None if UNKNOWN in (pid, own) else own == pid
        uri = data_uri(self.images[self.typical_rows[row]]["image"])
        return Tile(uri, item.path, ", ".join(filter(None, words)), match)

    def members(self, identity):
        """The rows of a group, those that fit it least first."""
        rows = (self.groups.identities == identity).nonzero().flatten()
        return rows[self.groups.closeness[rows].argsort(stable=True)].tolist()


def add_groups(report, shown):
    groups = shown.groups
    doubt = doubts(groups)
    order = (doubt.argsort(descending=True, stable=True) + 1).tolist()
    if not order:
        report.section("Groups", "No two items are near enough. Raise --eps, or use a model trained on such images.")
        return
    text = "The most doubtful groups come first, and in a group the items that fit least."
    if len(order) > SHOWN_GROUPS:
        text += f" Shown are {SHOWN_GROUPS} of {len(order):,} groups; identities.csv has all."
    if any(pid != UNKNOWN for pid in shown.pids):
        text += " A green frame with ✓ has the identity of most of its group, a dashed red one with ✕ another."
    report.section("Groups", text)
    cards = []
    for identity in order[:SHOWN_GROUPS]:
        members = shown.members(identity)
        known = Counter(shown.pids[row] for row in members if shown.pids[row] != UNKNOWN)
        pid = max(known, key=lambda number: (known[number], -number)) if known else UNKNOWN
        cameras = {shown.items[row].camera for row in members} - {None}
        note = f"{len(members)} items, cohesion {float(groups.cohesion[members[0]]):.2f}, "
        note += f"doubt {float(doubt[identity - 1]):.1f}"
        note += f", {len(cameras)} camera{'s' * (len(cameras) != 1)}" if cameras else ""
        note += f", {len(members) - SHOWN_ITEMS} not shown" if len(members) > SHOWN_ITEMS else ""
        tiles = [shown.tile(row, pid=pid) for row in members[:SHOWN_ITEMS]]
        cards.append({"title": f"Identity {identity}", "note": note, "tiles": tiles})
    report.cards(cards)


def add_singles(report, shown):
    rows = (shown.groups.identities > shown.groups.num_groups).nonzero().flatten().tolist()
    if not rows:
        return
    text = "Near no other item, or kept apart by their times; each has an identity of its own."
    if len(rows) > SHOWN_SINGLES:
        text += f" Shown are {SHOWN_SINGLES} of {len(rows):,}; identities.csv has all."
    report.section("Single items", text)
    report.pictures([shown.tile(row) for row in rows[:SHOWN_SINGLES]])
