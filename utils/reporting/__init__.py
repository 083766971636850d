"""Reports as one HTML file each, charts as SVG, cards in Markdown. For others: `Report`, `line_chart`, `histogram`."""

from utils import opened_when_used

__getattr__ = opened_when_used(
    __name__,
    {
        "report": "Report Tile",
        "charts": "line_chart histogram",
    },
)
