"""The k most similar gallery rows of each query, exact, without the query x gallery matrix.

score_ij = <q_i, g_j> / (|q_i| |g_j|);  best first, equal scores by lower gallery index
"""

from dataclasses import dataclass

import torch

from .disk.rows import RowsOnDisk
from .dispatch import check_count, check_features, choose_backend
from .tiles import cosine_reference, count_set, descending_key, hits, similarity_strips, unit_pair

GROUP = 32


@dataclass(frozen=True)
class TopK:
    """Unpacks as `scores, indices`, both (queries, k), best first; `.backend` is the path that ran."""

    scores: torch.Tensor
    indices: torch.Tensor
    backend: str

    def __iter__(self):
        return iter((self.scores, self.indices))

    def __len__(self):
        return 2

    def __getitem__(self, position):
        return (self.scores, self.indices)[position]


@torch.no_grad()
def cosine_topk(queries, gallery, k, *, backend="auto", group=None):
    """Cosine similarity and index of the k nearest gallery rows of each query.

    (Q, D), (G, D) -> TopK with float32 scores (Q, k) and int64 indices (Q, k). Rows need not be normalised.
    With a `group` of processes each gives its own rows, any number; indices count through the gallery of all ranks.
    Queries and gallery may be `kernels.disk.rows.RowsOnDisk`, larger than memory.
    """
    if group is not None or any(isinstance(features, RowsOnDisk) for features in (queries, gallery)):
        from .ring.topk import ring_topk

        return ring_topk(queries, gallery, k, backend, group)
    check_features(queries, gallery)
    k = check_count("k", k, 1, gallery.shape[0], hint=" (the number of gallery rows)")
    path = choose_backend(backend, queries, "cosine_topk", k, gallery=gallery)
    if path == "triton":
        from .topk_triton import launch_topk

        return TopK(*launch_topk(queries, gallery, k)[:2], path)
    units, gallery_units = unit_pair(queries, gallery)
    num_queries, num_gallery = queries.shape[0], gallery.shape[0]
    scores = torch.empty(num_queries, k, dtype=units.dtype, device=units.device)
    indices = torch.empty(num_queries, k, dtype=torch.int64, device=units.device)
    for start, strip in similarity_strips(units, num_queries, gallery_units, num_gallery):
        stop = start + strip.shape[0]
        scores[start:stop], indices[start:stop] = strip_topk(strip, k)
    return TopK(scores, indices, path)


def cosine_topk_reference(queries, gallery, k):
    """The definition, dense; as precise as the dtype of its inputs."""
    scores, indices = cosine_reference(queries, gallery).sort(dim=1, descending=True, stable=True)
    return scores[:, :k], indices[:, :k]


def strip_topk(strip, k):
    """Largest k entries of each row, ties by lower column; the row length is a multiple of 64, -inf marks no item."""
    num_rows, num_columns = strip.shape
    if strip.dtype == torch.float64 or k * 2 * GROUP > num_columns:
        values, columns = strip.sort(dim=1, descending=True, stable=True)
        return values[:, :k], columns[:, :k]
    # The k-th largest of the maxima of small groups is a lower bound: at least k entries of the row reach it.
    floor = strip.view(num_rows, -1, GROUP).amax(-1).topk(k, dim=1).values[:, -1:]
    mask = strip >= floor
    counts = count_set(mask)
    values = torch.empty(num_rows, k, dtype=strip.dtype, device=strip.device)
    columns = torch.empty(num_rows, k, dtype=torch.int64, device=strip.device)
    crowded = counts > 8 * k + 1024
    if bool(crowded.any()):
        # Rows with many equal entries are sorted whole, a few at a time.
        rows = crowded.nonzero().flatten()
        mask[rows] = False
        for some in rows.split(max(1, (1 << 22) // num_columns)):
            ordered, order = strip[some].sort(dim=1, descending=True, stable=True)
            values[some], columns[some] = ordered[:, :k], order[:, :k]
    rows, cols, places = hits(mask)
    hit_values = strip.view(-1)[places]
    order = ((rows << 32) + descending_key(hit_values)).sort(stable=True).indices
    counts = torch.where(crowded, 0, counts)
    place = torch.arange(rows.shape[0], device=rows.device) - (counts.cumsum(0) - counts)[rows]
    rows, keep = rows[order], place < k
    values[rows[keep], place[keep]] = hit_values[order][keep]
    columns[rows[keep], place[keep]] = cols[order][keep]
    return values, columns
