"""Transforms, the P x K sampler and the data set of tensors."""
