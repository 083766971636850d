"""Weights of other projects, in the names of our model. Nothing is unpickled but tensors."""
