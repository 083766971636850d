"""From features to numbers: extraction, exact ranking, thresholds, grouping, and the reports of evaluate.py.

The public API: `rank`, `summary`, `ranked_lists`, and `extract` for the features of a data set.
"""

from utils import opened_when_used

__getattr__ = opened_when_used(
    __name__,
    {
        "features": "extract",
        "metrics": "MAX_RANK RANKS Side check_sides mean_and_deviation rank summary",
        "lists": "camera_pairs can_match confusions is_match ranked_lists ranking_rows",
    },
)
