"""HTML reports, SVG charts and Markdown cards. The public API: `Report`, `Tile`, `line_chart`, `histogram`."""

from utils import opened_when_used

__getattr__ = opened_when_used(
    __name__,
    {
        "report": "Report Tile",
        "charts": "line_chart histogram",
    },
)
