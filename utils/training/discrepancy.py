"""How far two sets of features are from one distribution: the maximum mean discrepancy."""

import torch

from utils.modeling.losses import distances

# Bandwidths of the Gaussian kernels, times the median distance.
SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)


@torch.no_grad()
def mean_discrepancy(features, others):
    """MMD^2 = mean k(x, x') + mean k(y, y') - 2 mean k(x, y) over all pairs of rows, a float.

    k is the sum over the bandwidths s of exp(-d^2 / 2 s^2), d the distance; the median is that of all different pairs.
    """
    count, both = len(features), torch.cat([features, others]).double()
    apart = distances(both).double()
    above = torch.ones_like(apart, dtype=torch.bool).triu(1)
    median = apart[above].median().clamp(min=1e-12)
    kernel = sum((-apart.square() / (2 * (scale * median) ** 2)).exp() for scale in SCALES)
    own, other, between = kernel[:count, :count], kernel[count:, count:], kernel[:count, count:]
    return float(own.mean() + other.mean() - 2 * between.mean())
