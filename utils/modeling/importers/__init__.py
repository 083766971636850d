"""Weights of other projects, in the names of our model. Nothing is unpickled but tensors."""

from utils import opened_when_used

__getattr__ = opened_when_used(__name__, {"dcac": "read_dcac_checkpoint"})
