"""Weights of other projects, renamed for our model. Only tensors are unpickled.

For others: `open_weights`; one file a family of layouts, `layouts` lists them.
"""

from utils import opened_when_used

__getattr__ = opened_when_used(__name__, {"dcac": "read_dcac_checkpoint", "layouts": "check_weights open_weights"})
