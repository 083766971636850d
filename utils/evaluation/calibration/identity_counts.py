"""Counts of scores for each identity, in one pass over the tiles of query and gallery.

A score is the cosine of two features. The scores are counted on a grid, once for the identity of the query and once
for that of the gallery image, so that memory grows with the identities and images, never with their pairs.
"""

from dataclasses import dataclass

import torch

from utils.datasets.schema import UNKNOWN
from utils.evaluation.thresholds import count, distance_tiles

# Steps of the grid, and the most numbers in a table of counts: with very many identities the grid is coarser.
NUM_STEPS, FEWEST_STEPS, TABLE_SIZE = 512, 64, 2**24
# An identity that no query shows is background if it has so many times the images of any identity of the queries.
BACKGROUND_TIMES, BACKGROUND_GROUPS = 10, 2000


@dataclass(frozen=True)
class Grid:
    """Equal steps of the score from `low` to 1; column 0 counts what lies below `low`."""

    low: float
    num_steps: int

    @property
    def edges(self):
        return torch.linspace(self.low, 1, self.num_steps + 1, dtype=torch.float64)

    def columns(self, scores):
        """The column of each score: j + 1 for the last edge j that it reaches."""
        places = (scores - self.low) * (self.num_steps / (1 - self.low))
        return places.floor_().add_(1).clamp_(0, self.num_steps + 1).long()

    def reaching(self, counts):
        """(..., columns) -> (..., edges): how many scores reach each edge."""
        return counts[..., 1:].flip(-1).cumsum(-1).flip(-1)


@dataclass
class PairCounts:
    """Counts of the kept pairs by identity (rows) and score (columns of the grid), float64.

    `strangers` counts each pair of two identities twice, once for either; `matches` each pair of one identity once.
    `num_query_ids` and `num_gallery_ids` are the identities that were compared, `num_shared_ids` those on both sides.
    """

    strangers: torch.Tensor
    matches: torch.Tensor
    num_query_ids: int = 0
    num_gallery_ids: int = 0
    num_shared_ids: int = 0

    def add(self, other):
        self.strangers += other.strangers
        self.matches += other.matches


@dataclass
class Searches:
    """The best scores of each query: of other identities, of yet another than that one, and of its own identity.

    -inf where there is none. `stranger` is the number of the identity that has the best score of others.
    """

    ids: torch.Tensor
    best: torch.Tensor
    stranger: torch.Tensor
    second: torch.Tensor
    right: torch.Tensor
    num_others: torch.Tensor

    def update(self, rows, scores, gallery_ids):
        """`scores` (m, n) of the queries `rows`, -inf for their own identity; they are overwritten."""
        best, places = scores.max(1)
        stranger = gallery_ids[places]
        scores[gallery_ids[None] == stranger[:, None]] = -torch.inf
        second = scores.max(1).values
        old_best, old_stranger, old_second = self.best[rows], self.stranger[rows], self.second[rows]
        is_same = stranger == old_stranger
        is_better = best > old_best
        self.second[rows] = torch.where(
            is_better,
            torch.maximum(second, torch.where(is_same, old_second, old_best)),
            torch.maximum(old_second, torch.where(is_same, second, best)),
        )
        self.best[rows] = torch.where(is_better, best, old_best)
        self.stranger[rows] = torch.where(is_better, stranger, old_stranger)


class IdentityCounts:
    """Counts of all pairs (`total`), of each pair of cameras, and the best scores of each query (`searches`).

    Queries of unknown identity are left out. A gallery image of unknown identity counts as an identity of its own, and
    so does each image of a background identity (Market-1501 files all background under 0).
    """

    def __init__(self, queries, gallery, low, protocol="market"):
        self.queries = queries.take((queries.pids != UNKNOWN).nonzero().flatten())
        self.gallery = gallery.take(gallery.pids.argsort(stable=True))
        self.protocol = protocol
        self.query_ids, self.gallery_ids, self.num_ids = number_identities(self.queries.pids, self.gallery.pids)
        self.grid = Grid(low, max(FEWEST_STEPS, min(NUM_STEPS, TABLE_SIZE // max(self.num_ids, 1))))
        self.total = self.with_sizes(self.empty(), self.query_ids, self.gallery_ids)
        device = self.queries.features.device
        nothing = torch.full((len(self.queries),), -torch.inf, device=device)
        no_one = torch.full_like(self.query_ids, -1)
        own = torch.bincount(self.gallery_ids, minlength=self.num_ids)[self.query_ids]
        self.searches = Searches(
            self.query_ids, nothing, no_one, nothing.clone(), nothing.clone(), len(self.gallery) - own
        )

    def empty(self):
        shape = self.num_ids, self.grid.num_steps + 2
        return PairCounts(*(torch.zeros(shape, dtype=torch.float64) for _ in range(2)))

    def with_sizes(self, counts, query_ids, gallery_ids):
        query_ids, gallery_ids = query_ids.unique(), gallery_ids.unique()
        counts.num_query_ids, counts.num_gallery_ids = len(query_ids), len(gallery_ids)
        counts.num_shared_ids = int(torch.isin(query_ids, gallery_ids).sum())
        return counts

    def camera_pairs(self):
        """Count everything: yield (query camera, gallery camera, PairCounts) for each pair of cameras."""
        for query_camera in self.queries.camids.unique().tolist():
            rows = (self.queries.camids == query_camera).nonzero().flatten()
            for gallery_camera in self.gallery.camids.unique().tolist():
                columns = (self.gallery.camids == gallery_camera).nonzero().flatten()
                counts = self.count(rows, columns)
                self.total.add(counts)
                yield query_camera, gallery_camera, counts

    def all_pairs(self):
        """Count everything at once, without the pairs of cameras: yields nothing."""
        sides = self.queries, self.gallery
        self.total.add(self.count(*(torch.arange(len(side), device=side.features.device) for side in sides)))
        return ()

    def count(self, rows, columns):
        counts = self.with_sizes(self.empty(), self.query_ids[rows], self.gallery_ids[columns])
        query_ids, gallery_ids = self.query_ids[rows], self.gallery_ids[columns]
        sides = self.queries.take(rows), self.gallery.take(columns)
        width = self.grid.num_steps + 2
        for top, left, distances, own_rows, own_columns, kept in distance_tiles(*sides, self.protocol):
            # In place: the tile is not needed again.
            scores = distances.div_(-2).add_(1)
            own = scores[own_rows, own_columns]
            here = rows[top : top + len(scores)]
            ids = query_ids[top : top + len(scores)], gallery_ids[left : left + scores.shape[1]]
            scores[own_rows, own_columns] = -torch.inf
            places = self.grid.columns(scores)
            # A column behind the table for the pairs that are no strangers.
            places[own_rows, own_columns] = width
            for axis, owners in enumerate(ids):
                distinct, local = owners.unique(return_inverse=True)
                shift = (local * (width + 1))[:, None] if axis == 0 else (local * (width + 1))[None]
                table = count((places + shift).flatten(), len(distinct) * (width + 1))
                counts.strangers[distinct.cpu()] += table.view(len(distinct), width + 1)[:, :width].cpu()

            matches, owners = self.grid.columns(own[kept]), ids[0][own_rows[kept]]
            counts.matches.view(-1).index_add_(
                0, (owners * width + matches).cpu(), torch.ones(len(matches), dtype=torch.float64)
            )
            self.searches.right.scatter_reduce_(0, here[own_rows[kept]], own[kept], "amax")
            self.searches.update(here, scores, ids[1])
        return counts


def number_identities(query_pids, gallery_pids):
    """(numbers of the queries, numbers of the gallery, how many): the same number for the same identity."""
    known = query_pids.unique()
    others, sizes = gallery_pids.unique(return_counts=True)
    is_known = torch.isin(others, known)
    largest = int(sizes[is_known].max()) if is_known.any() else 1
    is_background = (others == UNKNOWN) | (~is_known & (sizes >= BACKGROUND_TIMES * largest))
    pids = torch.cat([known, others[~is_background]]).unique()
    image_is_background = torch.isin(gallery_pids, others[is_background])
    numbers = torch.searchsorted(pids, gallery_pids)
    # Groups of background images vary like the images themselves, and keep the table of counts small.
    groups = torch.arange(int(image_is_background.sum()), device=gallery_pids.device) % BACKGROUND_GROUPS
    numbers[image_is_background] = len(pids) + groups
    num_groups = min(len(groups), BACKGROUND_GROUPS)
    return torch.searchsorted(pids, query_pids), numbers, len(pids) + num_groups
