"""From features to numbers: extraction, exact ranking, thresholds, and the report of an evaluation.

For others: `rank`, `summary`, `ranked_lists`, and `extract` for the features of a data set.
"""

from utils import opened_when_used

__getattr__ = opened_when_used(
    __name__,
    {
        "metrics": (
            "MAX_RANK RANKS Side camera_pairs can_match check_sides confusions is_match "
            "mean_and_deviation rank ranked_lists summary"
        ),
        "features": "extract",
    },
)
