"""The Re-ID model and what it is made of: backbones, heads, norms, memories, losses, its folder on disk.

`ReIDModel` is for others.
"""

from utils import opened_when_used

__getattr__ = opened_when_used(
    __name__,
    {"reid_model": "ReIDModel", "heads": "build_head"},
)
