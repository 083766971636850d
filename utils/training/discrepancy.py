"""How far two sets of features are from one distribution: the maximum mean discrepancy."""

import torch

# Bandwidths of the Gaussian kernels, times the median distance.
SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)


@torch.no_grad()
def mean_discrepancy(features, others):
    """MMD^2 = mean k(x, x') + mean k(y, y') - 2 mean k(x, y) over all pairs of rows, a float.

    k is the sum over the bandwidths s of exp(-d^2 / 2 s^2), d the distance; the median is that of all different pairs.
    """
    # In float64 a matrix product loses nothing that counts here.
    count, both = len(features), torch.cat([features, others]).double()
    lengths = both.square().sum(1)
    squares = (lengths[:, None] + lengths[None, :] - 2 * both @ both.t()).clamp(min=0)
    above = torch.ones_like(squares, dtype=torch.bool).triu(1)
    median = squares[above].median().clamp(min=1e-24)
    kernel = sum((squares / (-2 * scale**2 * median)).exp_() for scale in SCALES)
    own, other, between = kernel[:count, :count], kernel[count:, count:], kernel[:count, count:]
    return float(own.mean() + other.mean() - 2 * between.mean())
