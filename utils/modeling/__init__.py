"""The Re-ID model and its parts: backbones, heads, norms, memories, losses, its folder on disk.

`ReIDModel` is for use in other projects.
"""

from utils import opened_when_used

__getattr__ = opened_when_used(
    __name__,
    {
        "reid_model": "ReIDModel",
        "heads": "add_gem build_head",
        "importers.heads": "build_imported_head",
        "experts": "ExpertsHead",
        "extraction": "extract_features features_of",
    },
)
