"""Line charts as inline SVG, without a plotting library; `histograms` has the others.

Lines differ by colour and by dash, so that they differ in print too. Shapes have class names only; the colours, light
and dark, are in `templates/report.css`.
"""

import math

from markupsafe import Markup, escape

WIDTH, HEIGHT = 460, 280
LEFT, RIGHT, TOP, BOTTOM = 66, 16, 34, 44
# Of lines, in report.css.
STYLES = 8
LEGEND_LINE = 18
MAX_POINTS = 400
# Of a vertical axis, as a share of its largest value: a narrower one would magnify rounding.
LEAST_RANGE = 2e-3


def line_chart(
    series, *, title, x_label, y_label, x_log=False, y_log=False, x_range=None, y_range=None, percent=False, dots=False
):
    """The SVG of `series`, a list of (name, xs, ys). More than 400 points are averaged in groups of neighbours.

    Values that are not finite, or not positive on a log axis, leave a gap. `percent` writes y values 0..1 as 0..100 %.
    """
    drawable = [(name, _points(xs, ys, x_log, y_log)) for name, xs, ys in series]
    finite = [point for _, points in drawable for point in points if point is not None]
    if not finite:
        return empty_chart(title)
    x_scale = Scale([x for x, _ in finite], x_range, x_log, LEFT, WIDTH - RIGHT)
    y_scale = Scale([y for _, y in finite], y_range, y_log, HEIGHT - BOTTOM, TOP, least=LEAST_RANGE)
    if all(x == int(x) for x, _ in finite):
        # There is no epoch 1.2.
        x_scale.ticks = [tick for tick in x_scale.ticks if abs(tick - round(tick)) < 1e-9]
    parts = [axes_of(x_scale, y_scale, x_label, y_label, percent)]
    for number, (name, points) in enumerate(drawable):
        path = path_of(points, x_scale, y_scale)
        parts.append(Markup('<path class="line s{}" d="{}"/>').format(number % STYLES, path))
        for x, y in (point for point in points if dots and point is not None):
            value = f"{100 * y:.1f} %" if percent else _number(y)
            dot = Markup('<circle class="dot s{}" cx="{:.1f}" cy="{:.1f}" r="2.6"><title>{}: {}</title></circle>')
            parts.append(dot.format(number % STYLES, x_scale(x), y_scale(y), f"{name}, {_number(x)}", value))
    legend, lines = legend_of([name for name, _ in drawable])
    return svg_of(title, [*parts, legend], lines)


class Scale:
    """Maps values to coordinates, on a linear or logarithmic axis with round ticks."""

    def __init__(self, values, limits, log, start, end, least=0.0):
        low, high = limits or (min(values), max(values))
        # Means of equal values may differ in their last digits.
        if high - low <= 1e-9 * max(abs(low), abs(high)):
            low, high = around(low, log)
        more = 0.0 if limits or log else max(0.0, least * max(abs(low), abs(high)) - (high - low)) / 2
        low, high = low - more, high + more
        self.low, self.high, self.log, self.start, self.end = low, high, log, start, end
        self.ticks = _log_ticks(low, high) if log else _ticks(low, high)

    def __call__(self, value):
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        share = (value - low) / (high - low)
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)


def around(value, log):
    """The limits of an axis for a single value: the value is in the middle; a linear axis contains zero."""
    if log:
        return value / 2, value * 2
    return (-0.5, 0.5) if value == 0 else (min(0.0, 2 * value), max(0.0, 2 * value))


def _ticks(low, high, wanted=5):
    step = 10 ** math.floor(math.log10((high - low) / wanted))
    step *= min((factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= wanted), default=10)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low, high):
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    stride = max(1, (last - first) // 6)
    decades = [10.0**power for power in range(first, last + 1, stride)]
    return decades if len(decades) > 1 else sorted({low, high})


def _number(value, ticks=()):
    """A value as short text; all `ticks` of a linear axis have one format, and the digits that tell them apart."""
    if value == 0:
        return "0"
    size = max(map(abs, ticks or [value]))
    apart = math.ceil(math.log10(size / (ticks[1] - ticks[0]))) if len(ticks) > 1 else 0
    if size >= 1e5 or size < 1e-3:
        mantissa, power = f"{value:.{max(0, apart - 1)}e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(power)}"
    return f"{value:.{max(4, apart + 1)}g}"


def _points(xs, ys, x_log, y_log):
    pairs = [(float(x), float(y)) for x, y in zip(xs, ys, strict=True)]
    group = math.ceil(len(pairs) / MAX_POINTS)
    if group > 1:
        chunks = [pairs[start : start + group] for start in range(0, len(pairs), group)]
        pairs = [tuple(sum(values) / len(values) for values in zip(*chunk, strict=True)) for chunk in chunks]

    def can_be_drawn(x, y):
        return math.isfinite(x) and math.isfinite(y) and not (x_log and x <= 0) and not (y_log and y <= 0)

    return [(x, y) if can_be_drawn(x, y) else None for x, y in pairs]


def path_of(points, x_scale, y_scale):
    steps, pen = [], "M"
    for point in points:
        if point is None:
            pen = "M"
            continue
        steps.append(f"{pen}{x_scale(point[0]):.1f} {y_scale(point[1]):.1f}")
        pen = "L"
    return "".join(steps)


def axes_of(x_scale, y_scale, x_label, y_label, percent):
    parts = []
    linear = {scale: () if scale.log else scale.ticks for scale in (x_scale, y_scale)}
    for tick in y_scale.ticks:
        label = f"{100 * tick:.4g} %" if percent else _number(tick, linear[y_scale])
        parts.append(
            Markup(
                '<line class="grid" x1="{}" x2="{}" y1="{y:.1f}" y2="{y:.1f}"/>'
                '<text class="tick" x="{}" y="{ty:.1f}" text-anchor="end">{}</text>'
            ).format(LEFT, WIDTH - RIGHT, LEFT - 7, label, y=y_scale(tick), ty=y_scale(tick) + 4)
        )
    for tick in x_scale.ticks:
        label = Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{}</text>')
        parts.append(label.format(x_scale(tick), HEIGHT - BOTTOM + 17, _number(tick, linear[x_scale])))
    parts.append(
        Markup(
            '<line class="axis" x1="{0}" x2="{1}" y1="{2}" y2="{2}"/>'
            '<text class="label" x="{3}" y="{4}" text-anchor="middle">{5}</text>'
            '<text class="label" transform="translate(12 {6}) rotate(-90)" text-anchor="middle">{7}</text>'
        ).format(
            LEFT,
            WIDTH - RIGHT,
            HEIGHT - BOTTOM,
            (LEFT + WIDTH - RIGHT) / 2,
            HEIGHT - 7,
            x_label,
            (TOP + HEIGHT - BOTTOM) / 2,
            y_label,
        )
    )
    return Markup("").join(parts)


def legend_of(names):
    """The names above the chart, in as many lines as they need: (SVG, number of lines)."""
    if len(names) < 2:
        return Markup(""), 1
    room = WIDTH - RIGHT - LEFT - 28
    entries, x, line = [], LEFT, 0
    for name in map(str, names):
        short = name if 7 * len(name) <= room else name[: room // 7 - 1] + "…"
        if x > LEFT and x + 28 + 7 * len(short) > WIDTH - RIGHT:
            x, line = LEFT, line + 1
        entries.append((short, name, x, line))
        x += 44 + 7 * len(short)
    parts = []
    for number, (short, name, x, row) in enumerate(entries):
        # The last line is at the place of a single line; earlier lines extend above the chart.
        y = 14 - LEGEND_LINE * (line - row)
        parts.append(
            Markup(
                '<line class="line s{}" x1="{}" x2="{}" y1="{y}" y2="{y}"/>'
                '<text class="label" x="{}" y="{}">{}<title>{}</title></text>'
            ).format(number % STYLES, x, x + 22, x + 28, y + 4, short, name, y=y)
        )
    return Markup("").join(parts), line + 1


def empty_chart(title):
    text = Markup('<text class="label" x="{}" y="{}" text-anchor="middle">nothing to draw</text>')
    return svg_of(title, [text.format(WIDTH / 2, HEIGHT / 2)])


def svg_of(title, parts, legend_lines=1):
    above = LEGEND_LINE * (legend_lines - 1)
    return Markup('<svg class="chart" viewBox="0 {} {} {}" role="img" aria-label="{}">{}</svg>').format(
        -above, WIDTH, HEIGHT + above, escape(title), Markup("").join(parts)
    )
