"""Sparse k-reciprocal neighbour vectors and the Jaccard distance between them.

    F(i, k)  = the first k + 1 rows of i's order, i included        R(i, k) = {j in F(i, k) : i in F(j, k)}
    R*(i)    = R(i, k1) and every R(c, h), c in R(i, k1), with |R(c, h) n R(i, k1)| > 2/3 |R(c, h)|
    V_ij     = exp(-o_ij) / sum over R*(i) of exp(-o) on R*(i), else 0
    V'_i     = mean of V over the first k2 rows of i's order
    t        = sum_k min(V'_ik, V'_jk),  J = 1 - t / (2 - t)

with h = round(k1 / 2) and o_ij = d_ij / max_k d_ik, d_ij = 2 - 2 cos. compat="torchreid" takes o^2 for o.
compat="faiss" is the variant that clustering methods share: i itself is one of the k1, so that R(i, k1) comes from k1
rows and not k1 + 1 (R(c, h) stays), and o = d.

A row of V' has about 50 entries at any size of the data set, so V' is stored as sparse rows.
"""

import warnings
from dataclasses import dataclass

import torch

from .dispatch import check_count, check_features, choose_backend
from .neighbours import self_neighbours
from .tiles import expand_ranges, row_groups, unit_rows

# V' is stored in units of 2**-30. Sums of integers do not depend on the order of addition, so equal sets of
# neighbours give equal distances on a CPU, and on a GPU but for a unit where float64 sums before it rounded otherwise.
ONE = 1 << 30
COMPAT = (None, "torchreid", "faiss")
ENTRY_LIMIT = 1 << 22
GATHER_BYTES = 64 << 20


@dataclass(frozen=True)
class SparseRows:
    """Rows of a sparse matrix: row i has columns[offsets[i]:offsets[i + 1]], ascending, and that part of values."""

    offsets: torch.Tensor
    columns: torch.Tensor
    values: torch.Tensor

    @property
    def counts(self):
        return self.offsets[1:] - self.offsets[:-1]

    def entries(self, begin, end):
        """(row counted from `begin`, column, value) of the entries of these rows."""
        first, last = int(self.offsets[begin]), int(self.offsets[end])
        counts = self.counts[begin:end]
        rows = torch.repeat_interleave(torch.arange(end - begin, device=counts.device), counts)
        return rows, self.columns[first:last], self.values[first:last]

    def by_column(self, begin, end, num_columns):
        """The rows begin:end as columns: SparseRows of (num_columns, end - begin)."""
        rows, columns, values = self.entries(begin, end)
        columns, order = columns.sort(stable=True)
        return SparseRows(offsets_of(columns, num_columns), rows[order], values[order])

    def take(self, rows):
        """SparseRows of these rows, in the order given."""
        counts = self.counts[rows]
        _, places = expand_ranges(self.offsets[rows], counts)
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return SparseRows(offsets, self.columns[places], self.values[places])

    def to_dense(self, num_columns):
        dense = torch.zeros(self.offsets.shape[0] - 1, num_columns, dtype=self.values.dtype, device=self.values.device)
        rows, columns, values = self.entries(0, dense.shape[0])
        dense[rows, columns] = values
        return dense


def offsets_of(rows, num_rows):
    """Offsets of sparse rows from the ascending row numbers of their entries."""
    return torch.searchsorted(rows, torch.arange(num_rows + 1, device=rows.device))


@torch.no_grad()
def k_reciprocal_vectors(features, *, k1=20, k2=6, compat=None, backend="auto"):
    """V' of every row of (N, D) features against all of them: SparseRows with float32 values, rows summing to 1."""
    check_features(features, features)
    k1, k2 = check_count("k1", k1, 0), check_count("k2", k2, 0)
    check_compat(compat)
    path = choose_backend(backend, features, "k_reciprocal_rerank", min(max(k1 + 1, k2), features.shape[0]))
    units = unit_rows(("features", features))
    vectors, _ = neighbour_vectors(units, features.shape[0], k1, k2, compat, path)
    return SparseRows(vectors.offsets, vectors.columns, vectors.values.double().div_(ONE).float())


def check_compat(compat, known=COMPAT):
    if compat not in known:
        raise ValueError(f"compat must be {' or '.join(map(repr, known))}, got {compat!r}")


def neighbour_vectors(units, num_rows, k1, k2, compat=None, path="torch"):
    """V' in units of 1 / ONE (int32) and the inverse of each row's largest distance (0 where all rows are equal)."""
    neighbours = self_neighbours(units, num_rows, max(k1 + 1, k2), path)
    inverse = inverse_largest(neighbours.lowest)
    by_faiss = compat == "faiss"
    members = expanded_sets(neighbours.indices, max(k1 - 1, 0) if by_faiss else k1, round(k1 / 2))
    scale = torch.ones_like(inverse) if by_faiss else inverse
    products = sampled_products(units[:num_rows], units[:num_rows], members)
    weights = neighbour_weights(products, members, scale, compat == "torchreid")
    if k2 > 1:
        return mean_rows(weights, neighbours.indices[:, :k2], num_rows), inverse
    return SparseRows(weights.offsets, weights.columns, fixed_point(weights.values)), inverse


def inverse_largest(lowest):
    """1 / max_k d_ik from the lowest similarities; 0 where the largest distance is only a rounding error."""
    largest = 2 - 2 * lowest
    return torch.where(largest > 32 * torch.finfo(lowest.dtype).eps, 1 / largest, 0)


def fixed_point(values):
    return (values.double() * ONE).round_().to(torch.int32)


def reciprocal_sets(indices, k, rows):
    """R(i, k) of these rows, as sorted keys p * N + j for the p-th of them, and offsets."""
    num_rows = indices.shape[0]
    near = indices[:, : k + 1].contiguous()
    width = near.shape[1]
    keys = []
    for places in torch.arange(len(rows), device=near.device).split(max(1, ENTRY_LIMIT // (width * width))):
        some = near[rows[places]]
        mutual = (near[some] == rows[places][:, None, None]).any(-1)
        keys.append((places[:, None] * num_rows + some)[mutual].sort().values)
    keys = torch.cat(keys) if keys else rows
    return keys, torch.searchsorted(keys, torch.arange(len(rows) + 1, device=keys.device) * num_rows)


def expanded_sets(indices, k, half, rows=None):
    """R*(i) of these rows, by default all, from R(i, k) and R(c, half): SparseRows without values."""
    num_rows = indices.shape[0]
    every_row = torch.arange(num_rows, device=indices.device)
    keys, offsets = reciprocal_sets(indices, k, every_row if rows is None else rows)
    if rows is None:
        needed, candidates = every_row, keys % num_rows
    else:
        needed, candidates = (keys % num_rows).unique(return_inverse=True)
    # Callers round k / 2 with Python, halves to even, as the definition does.
    half_keys, half_offsets = reciprocal_sets(indices, half, needed)
    half_counts = half_offsets[1:] - half_offsets[:-1]
    running = torch.cat([half_counts.new_zeros(1), half_counts[candidates].cumsum(0)])[offsets]
    merged = [keys[:0]]
    for begin, end in row_groups((running[1:] - running[:-1]).cpu(), ENTRY_LIMIT):
        row_keys, candidate = (values[offsets[begin] : offsets[end]] for values in (keys, candidates))
        pair, place = expand_ranges(half_offsets[:-1][candidate], half_counts[candidate])
        member = (row_keys - row_keys % num_rows)[pair] + half_keys[place] % num_rows
        inside = row_keys[torch.searchsorted(row_keys, member).clamp(max=row_keys.shape[0] - 1)] == member
        shared = torch.bincount(pair[inside], minlength=row_keys.shape[0])
        accepted = 3 * shared > 2 * half_counts[candidate]
        merged.append(torch.cat([row_keys, member[accepted[pair]]]).unique())
    merged = torch.cat(merged)
    offsets = torch.searchsorted(merged, torch.arange(len(offsets), device=keys.device) * num_rows)
    return SparseRows(offsets, merged % num_rows, merged)


def neighbour_weights(products, members, scale, fourth_power):
    """The values of V at the entries of `members`, from the similarities of these pairs."""
    num_rows = scale.shape[0]
    rows = torch.repeat_interleave(torch.arange(num_rows, device=products.device), members.counts)
    distance = (2 - 2 * products).clamp_(min=0) * scale[rows]
    weights = torch.exp(-distance.square() if fourth_power else -distance)
    totals = torch.zeros(num_rows, dtype=torch.float64, device=products.device).index_add_(0, rows, weights.double())
    return SparseRows(members.offsets, members.columns, weights / totals[rows])


def sampled_products(units, others, members):
    """<x_i, y_j> for the entries (i, j) of `members`, with the rows of both sides."""
    if units.device.type == "cpu":
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
            zeros = torch.zeros(members.columns.shape[0], dtype=units.dtype)
            pattern = torch.sparse_csr_tensor(
                members.offsets, members.columns, zeros, size=(len(units), len(others)), check_invariants=False
            )
        return torch.sparse.sampled_addmm(pattern, units, others.t(), beta=0.0).values()
    products = torch.empty(members.columns.shape[0], dtype=units.dtype, device=units.device)
    limit = max(1, GATHER_BYTES // (units.shape[1] * units.element_size()))
    for begin, end in row_groups(members.counts.cpu(), limit):
        rows, columns, _ = members.entries(begin, end)
        some = slice(int(members.offsets[begin]), int(members.offsets[end]))
        products[some] = (units[rows + begin] * others[columns]).sum(1)
    return products


def mean_rows(weights, neighbours, num_columns):
    """Mean of the sparse rows with the numbers in `neighbours` (N, k2), in units of 1 / ONE."""
    width = neighbours.shape[1]
    counts = weights.counts
    costs = counts[neighbours].sum(1).cpu()
    columns, values, lengths = [weights.columns[:0]], [fixed_point(weights.values[:0])], [counts[:0]]
    for begin, end in row_groups(costs, ENTRY_LIMIT):
        source = neighbours[begin:end].flatten()
        owner, place = expand_ranges(weights.offsets[:-1][source], counts[source])
        keys = torch.div(owner, width, rounding_mode="floor") * num_columns + weights.columns[place]
        keys, position = keys.unique(return_inverse=True)
        sums = torch.zeros(keys.shape[0], dtype=torch.float64, device=keys.device)
        sums.index_add_(0, position, weights.values[place].double())
        columns.append(keys % num_columns)
        values.append(fixed_point(sums / width))
        lengths.append(torch.bincount(torch.div(keys, num_columns, rounding_mode="floor"), minlength=end - begin))
    lengths = torch.cat(lengths)
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return SparseRows(offsets, torch.cat(columns), torch.cat(values))


def add_overlaps(shared, rows, columns, values, inverted, path="torch"):
    """Add sum_k min(V'_row,k, V'_g,k) to the int32 matrix `shared` (rows, others).

    (rows, columns, values) are entries of V' of some rows; `inverted` is V' of the others by column.
    """
    if path == "triton":
        from .jaccard_triton import add_overlaps_triton

        add_overlaps_triton(shared, rows, columns, values, inverted)
        return
    entry, place = expand_ranges(inverted.offsets[columns], inverted.counts[columns])
    # On the CPU index_select is several times as fast as indexing.
    flat = (rows * shared.shape[1]).index_select(0, entry).add_(inverted.columns.index_select(0, place))
    shared.view(-1).index_add_(
        0, flat, torch.minimum(values.index_select(0, entry), inverted.values.index_select(0, place))
    )
