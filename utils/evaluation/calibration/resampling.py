"""Intervals by resampling identities: what the numbers would be if other people had been photographed.

Pairs are not independent, since each identity is part of many. So each replicate draws weights for identities, from
the exponential distribution (the Bayesian bootstrap), and counts a pair of one identity with its weight w. A pair of
the identities k and l would count w_k w_l, for which a table of all pairs of identities is needed. Counted here is
w_k + w_l - 1, the linear part of that product:

    count(w) = count + sum_k (w_k - 1) influence_k

where influence_k is the count of the pairs that identity k is part of. So is a count that depends on the identities of
the gallery in another way: influence_k is then the change of the count without identity k, with its sign reversed.

A share of which no or few identities are exceptions has a distribution that weights alone do not show. Half an
identity of either kind is added to shares (Jeffreys' prior). The ends of an interval are the percentiles of the
replicates, a little further out for few identities, as those of Student's t are beyond the normal ones.
"""

import math
from statistics import NormalDist

import torch
from scipy.special import stdtrit

LEVEL = 0.95
REPLICATES = 1000


class Resampling:
    """Weights (replicates, identities) and the priors' weights, drawn from a seed."""

    def __init__(self, num_ids, *, replicates=REPLICATES, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.weights = -torch.rand(replicates, num_ids, dtype=torch.float64, generator=generator).clamp_(1e-12).log_()
        # The square of a normal number, halved, has the gamma distribution of shape 1/2.
        self.halves = torch.randn(replicates, 4, 1, dtype=torch.float64, generator=generator).square_().div_(2)

    def counts(self, count, influences):
        """(..., ), (identities, ...) -> the count of each replicate, never below 0."""
        present = influences.flatten(1).any(1).nonzero().flatten()
        changes = (self.weights[:, present] - 1) @ influences[present]
        return (count + changes).clamp_(min=0)

    def share(self, reaching, influences, total, total_influences, *, prior=None, size=0.0):
        """Replicates (R, edges) of the share of scores that reach each edge.

        `prior`: 0 or 1, which of two independent priors of shares; `size` is the count of an identity.
        """
        numerator = self.counts(reaching, influences)
        denominator = self.counts(total, total_influences[:, None])
        if prior is not None:
            hits, misses = self.halves[:, 2 * prior], self.halves[:, 2 * prior + 1]
            numerator, denominator = numerator + size * hits, denominator + size * (hits + misses)
        # The linear part of a product is not monotone, shares that reach an edge are.
        numerator = numerator.flip(1).cummax(1).values.flip(1)
        return (numerator / denominator.clamp(min=1e-12)).clamp_(max=1)


def crossings(shares, edges, rate):
    """The score at which each replicate's share (R, edges) falls to `rate`, and its place between the edges."""
    too_many = (shares > rate).sum(1)
    upper = too_many.clamp(1, shares.shape[1] - 1)
    above, below = (shares.gather(1, (upper - shift)[:, None])[:, 0] for shift in (1, 0))
    part = ((above - rate) / (above - below).clamp(min=1e-12)).clamp(0, 1)
    places = upper - 1 + part
    return at_places(edges.expand(len(shares), -1), places), places


def at_places(values, places):
    """Values (R, edges) between the edges, linearly."""
    lower = places.long().clamp(0, values.shape[1] - 2)
    left, right = (values.gather(1, (lower + shift)[:, None])[:, 0] for shift in (0, 1))
    return left + (places - lower) * (right - left)


def interval(replicates, num_ids, estimate=None, level=LEVEL):
    """The ends of the interval of these replicates (R, ...) with so many identities behind them: (2, ...).

    It includes the estimate, which at the end of its range may lie outside of the percentiles.
    """
    spread = math.sqrt(num_ids / (num_ids - 1)) * stdtrit(num_ids - 1, (1 + level) / 2)
    outside = NormalDist().cdf(-spread)
    ends = torch.quantile(replicates, torch.tensor([outside, 1 - outside], dtype=replicates.dtype), dim=0)
    if estimate is not None:
        estimate = torch.as_tensor(estimate, dtype=ends.dtype)
        ends = torch.stack([torch.minimum(ends[0], estimate), torch.maximum(ends[1], estimate)])
    return ends
