"""Pairs of rows within a Jaccard distance, of the rows of all ranks: each rank has the pairs of its own rows."""

import torch

from kernels.dispatch import check_count, check_in_memory
from kernels.jaccard import ONE, SparseRows, check_compat, offsets_of
from kernels.jaccard_graph import JaccardGraph, distance_of, jaccard_graph, overlap_strips
from kernels.ring.neighbours import AllRows, Overlaps, ring_vectors
from kernels.ring.processes import Processes, Ring, shares_of
from kernels.ring.ranking import refuse_triton
from kernels.tiles import hits


def ring_graph(features, *, k1, k2, max_distance, nearest, compat, backend, group):
    """`jaccard_graph` under a group: the JaccardGraph of this rank's rows, whose columns count through all rows."""
    ring = Ring(group, features, features)

    def checked():
        check_in_memory(features)
        check_compat(compat)
        refuse_triton(backend)
        hint = " (the number of rows of all ranks)"
        counts = check_count("k1", k1, 0), check_count("k2", k2, 0)
        return *counts, check_count("nearest", nearest, 1, ring.total, hint=hint)

    k1, k2, nearest = ring.agree(checked)
    vectors, _ = ring_vectors(AllRows(ring, ("features", features)), k1, k2, compat)
    overlaps = Overlaps(vectors)
    num_rows, device = len(features), ring.device
    reach = torch.zeros(num_rows, nearest, dtype=torch.int32, device=device)
    parts = []
    for rank, (counts, columns, values) in ring.rounds(vectors.counts, vectors.columns, vectors.values):
        if not len(counts) or not num_rows:
            continue
        offset, offsets = ring.offsets[rank], torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        inverted = overlaps.inverted(SparseRows(offsets, columns, values))
        own = rank == ring.rank
        for begin, shared, mask in overlap_strips(overlaps.vectors, inverted, len(counts)):
            if own:
                # The values of a row may add up to slightly less than one.
                shared.diagonal(begin).fill_(ONE)
            mine = slice(begin, begin + len(shared))
            nearer = torch.cat([reach[mine], shared.topk(min(nearest, len(counts)), dim=1).values], dim=1)
            reach[mine] = nearer.topk(nearest, dim=1).values
            row, column, place = hits(torch.ne(shared, 0, out=mask))
            distance = distance_of(shared.view(-1)[place])
            near = distance <= max_distance
            parts.append((row[near] + begin, column[near] + offset, distance[near]))
    empty = torch.zeros(0, dtype=torch.int64, device=device)
    parts = parts or [(empty, empty, empty.float())]
    rows, columns, distances = (torch.cat(values) for values in zip(*parts, strict=True))
    order = (rows * ring.total + columns).argsort()
    near = SparseRows(offsets_of(rows[order], num_rows), columns[order], distances[order])
    return JaccardGraph(near, distance_of(reach), "torch")


def shared_graph(features, *, group, **options):
    """`jaccard_graph` of features that all processes of a `group` have, or this one alone if it is None.

    Each computes its share of the rows, and all get the whole graph.
    """
    graph = jaccard_graph(*shares_of(group, features), **options, group=group)
    return graph if group is None else whole_graph(graph, group)


def whole_graph(graph, group):
    """The JaccardGraph of the rows of all ranks, on every rank, from those that `ring_graph` gave them."""
    processes = Processes(group, graph.reach.device)
    counts, columns, values, reach = map(
        processes.gather_all, (graph.near.counts, graph.near.columns, graph.near.values, graph.reach)
    )
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return JaccardGraph(SparseRows(offsets, columns, values), reach, graph.backend)
