"""Histograms in SVG, beside the lines of `charts`."""

from itertools import pairwise

from markupsafe import Markup

from utils.reporting.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Scale,
    axes_of,
    empty_chart,
    legend_of,
    path_of,
    svg_of,
)

# The width of a letter, and the space between a marker and its label.
LETTER, GAP = 7, 5


def histogram(groups, edges, *, title, x_label, y_label="share", markers=()):
    """The SVG of histograms over the same `edges`: `groups` is a list of (name, counts), drawn as shares of their sum.

    `markers` is a list of (x, label): vertical lines, such as thresholds.
    """
    shares = [(name, _shares(counts)) for name, counts in groups]
    if not any(max(values, default=0) > 0 for _, values in shares):
        return empty_chart(title)
    x_scale = Scale([edges[0], edges[-1]], (edges[0], edges[-1]), False, LEFT, WIDTH - RIGHT)
    top = max(max(values) for _, values in shares)
    y_scale = Scale([0, top], (0, top * 1.08), False, HEIGHT - BOTTOM, TOP)

    parts = [axes_of(x_scale, y_scale, x_label, y_label, percent=True)]
    for number, (_, values) in enumerate(shares):
        outline = [(edges[0], 0.0)]
        for (left, right), value in zip(pairwise(edges), values, strict=True):
            outline += [(left, value), (right, value)]
        path = path_of([*outline, (edges[-1], 0.0)], x_scale, y_scale)
        parts.append(
            Markup('<path class="area s{0}" d="{1}Z"/><path class="line s{0}" d="{1}"/>').format(number, path)
        )
    parts.append(_markers([(x_scale(x), label) for x, label in markers]))
    legend, lines = legend_of([name for name, _ in shares])
    return svg_of(title, [*parts, legend], lines)


def _shares(counts):
    values = [float(count) for count in counts]
    total = sum(values)
    return [value / total for value in values] if total else values


def _markers(markers):
    """Vertical lines at the coordinates, each with a label that no other line crosses."""
    line = Markup('<line class="marker" x1="{:.1f}" x2="{:.1f}" y1="{}" y2="{}"/>')
    text = Markup('<text class="marked" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>')
    lines, labels = [], []
    for index, (x, label) in enumerate(markers):
        # The label goes to the side with more room, below the label before it, and past the lines nearby.
        side, anchor = (1, "start") if x < (LEFT + WIDTH) / 2 else (-1, "end")
        width, label_x = LETTER * len(str(label)), x
        for other in sorted((other for other, _ in markers), reverse=side < 0):
            if 0 < side * (other - label_x) < width + 2 * GAP:
                label_x = other
        y = TOP + 12 + 14 * index
        lines.append(line.format(x, x, TOP, HEIGHT - BOTTOM))
        if label_x != x:
            # A short line joins the marker to a label that was moved.
            lines.append(line.format(x, label_x + side * (GAP - 2), y - 4, y - 4))
        labels.append(text.format(label_x + side * GAP, y, anchor, label))
    # Labels are drawn after all lines, so that no line covers one.
    return Markup("").join(lines + labels)
