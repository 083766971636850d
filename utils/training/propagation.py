"""Labels that spread over a graph of mutual neighbours, and peaks of density at which a cluster is split."""

import torch


def mutual(cosines, nearest):
    """Where each of two nodes is among the `nearest` of the other, itself included: bool, of cosines (..., n, n)."""
    places = cosines.topk(min(nearest, cosines.shape[-1]), dim=-1).indices
    near = torch.zeros_like(cosines, dtype=torch.bool).scatter_(-1, places, True)
    return near & near.transpose(-1, -2)


def graph_of(cosines, kept, *, itself=True):
    """D^-1/2 W D^-1/2 with a diagonal of 0, float64, from cosines (..., n, n), where they are `kept`.

    W = exp(2 cos - 2). `itself`: whether a node's own weight, 1, counts in D.
    """
    weights = (2 * cosines.double() - 2).exp() * kept
    own = weights.new_full(weights.shape[-1:], float(itself)) * kept.diagonal(dim1=-2, dim2=-1)
    weights = weights - torch.diag_embed(weights.diagonal(dim1=-2, dim2=-1))
    # A node without neighbours, not even itself, has only zeros.
    scale = (weights.sum(-1) + own).clamp(min=1e-30).rsqrt()
    return scale[..., :, None] * weights * scale[..., None, :]


def propagated(graph, alpha, seeds):
    """(I - alpha graph)^-1 seeds: what spreads from `seeds` (..., n, k) over a graph (..., n, n)."""
    identity = torch.eye(graph.shape[-1], dtype=graph.dtype, device=graph.device)
    return torch.linalg.solve(identity - alpha * graph, seeds.to(graph.dtype))


def scores_of_first(graph, alpha):
    """How strongly each node is tied to node 0, over all paths: (..., n), 0 for itself."""
    # The graph is symmetric: row 0 of the inverse is its column 0.
    seeds = torch.zeros_like(graph[..., :1])
    seeds[..., 0, :] = 1
    scores = propagated(graph, alpha, seeds)[..., 0]
    scores[..., 0] = 0
    return scores


def parts_of(features, nearest, between, most, alpha):
    """The part of each row of a cluster, from 0, around peaks of density; all 0 where there is one peak.

    The density of a row is the sum of its cosines. Peaks are the densest row, and rows whose cosine to the most
    similar denser row is `between` two values: at most `most` of all, those most similar to a denser row first.
    """
    cosines = (features @ features.t()).double()
    count = len(cosines)
    order = cosines.sum(1).argsort(descending=True, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(count, device=order.device)
    denser = rank[None, :] < rank[:, None]
    reach = cosines.masked_fill(~denser, -torch.inf).amax(1)
    others = ((reach > between[0]) & (reach < between[1])).nonzero().flatten()
    peaks = torch.cat([order[:1], others[reach[others].argsort(descending=True, stable=True)][: most - 1]])
    if len(peaks) < 2:
        return torch.zeros(count, dtype=torch.int64, device=features.device)
    seeds = torch.zeros(count, len(peaks), dtype=torch.float64, device=features.device)
    seeds[peaks, torch.arange(len(peaks), device=features.device)] = 1
    return propagated(graph_of(cosines, mutual(cosines, nearest), itself=False), alpha, seeds).argmax(1)


class Joined:
    """Labels that are joined, also by way of others: the name of a set is its smallest label."""

    def __init__(self):
        self.parents = {}

    def name(self, label):
        while label in self.parents:
            label = self.parents[label]
        return label

    def join(self, labels):
        names = {self.name(label) for label in labels}
        for other in names - {min(names)}:
            self.parents[other] = min(names)
