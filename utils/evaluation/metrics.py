"""Ranking metrics of query and gallery features.

`kernels/` computes the ranking. A distance is `2 - 2 cos`, from 0 to 4. The protocol decides which pairs count:
`market` and `cuhk03` drop gallery images of the query's own identity and camera; `all` drops nothing. Where a `Side`
says which files are the same, these pairs are dropped too.
"""

import statistics
from dataclasses import dataclass, field, replace

import torch

from kernels import rank_metrics
from kernels.disk.rows import RowsOnDisk
from kernels.ring.processes import shares_of

PROTOCOLS = ("market", "cuhk03", "all")
RANKS = (1, 5, 10, 20)
MAX_RANK = 50


@dataclass
class Side:
    """The query or the gallery side: features (N, D), identities (N,), cameras (N,), and a name for each row.

    Identity -1 is unknown and never a match. Camera -1 is unknown. `contents` (N,), where given, is equal for the same
    file on both sides, and -1 for a file of one side: the same file is never a match of its own. `names` has the names
    of identities (`pid`) and cameras (`camid`) by number, where they have names.
    """

    features: torch.Tensor
    pids: torch.Tensor
    camids: torch.Tensor
    paths: list
    contents: torch.Tensor | None = None
    names: dict = field(default_factory=dict)

    def __len__(self):
        return len(self.features)

    def take(self, rows):
        rows = torch.as_tensor(rows)
        tensors = {name: tensor[rows] for name, tensor in self.tensors().items()}
        return replace(self, **tensors, paths=[self.paths[row] for row in rows.tolist()])

    def to(self, device):
        return replace(self, **{name: tensor.to(device) for name, tensor in self.tensors().items()})

    def tensors(self):
        tensors = {"features": self.features, "pids": self.pids, "camids": self.camids, "contents": self.contents}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def identity_name(self, pid):
        names = self.names.get("pid")
        return names[pid] if names and pid >= 0 else str(pid)

    def camera_name(self, camid):
        """File names count cameras from 1, `camid` counts from 0."""
        if camid < 0:
            return "unknown"
        names = self.names.get("camid")
        return names[camid] if names else str(camid + 1)


def check_sides(queries, gallery):
    """ValueError for features that cannot be ranked; it names the side, the row and the file."""
    for side, name in ((queries, "query"), (gallery, "gallery")):
        if side.features.ndim != 2 or not len(side.features):
            raise ValueError(
                f"{name} features have shape {tuple(side.features.shape)}; expected (rows, width), at least one row"
            )
        for ids, kind in ((side.pids, "identities"), (side.camids, "cameras"), (side.paths, "paths")):
            if len(ids) != len(side):
                raise ValueError(f"{len(side)} {name} features come with {len(ids)} {kind}; give one for each feature")
        if isinstance(side.features, RowsOnDisk):
            # Its rows are checked when they are read.
            continue
        bad = ~side.features.isfinite().all(1)
        if bad.any():
            raise ValueError(f"{_rows(name, side, bad)} hold NaN or infinity; extract again, without mixed precision")
        bad = ~(side.features != 0).any(1)
        if bad.any():
            raise ValueError(f"{_rows(name, side, bad)} are zero and have no direction; remove them or extract again")
    widths = queries.features.shape[1], gallery.features.shape[1]
    if widths[0] != widths[1]:
        raise ValueError(
            f"query features are {widths[0]} wide, gallery features {widths[1]}; extract both with one model"
        )


def _rows(name, side, bad):
    rows = bad.nonzero().flatten().tolist()
    shown = ", ".join(f"{row} ({side.paths[row]})" for row in rows[:3])
    return f"{len(rows)} {name} feature rows, {shown}{', ...' if len(rows) > 3 else ''},"


def kept_labels(queries, gallery, protocol):
    """((pids, pids, camids, camids), protocol) for the kernels, so that the same file is no match of its own.

    The market protocol drops images of one identity and camera. Where cameras drop nothing, under `all` or with no
    camera on both sides, each file is given a camera number of its own: then that protocol drops copies of a query's
    own file, and nothing else. An unknown camera equals no other one.
    """
    camids, files = (queries.camids, gallery.camids), (queries.contents, gallery.contents)
    if queries.contents is not None and (protocol == "all" or not (torch.isin(*camids) & (camids[0] >= 0)).any()):
        camids, protocol = files, "market" if protocol == "all" else protocol
    elif queries.contents is not None:
        first = 1 + int(torch.cat(camids).max())
        camids = [cams.where((cams >= 0) | (file < 0), first + file) for cams, file in zip(camids, files, strict=True)]
    # What is unknown of a query is not what is unknown of the gallery.
    camids = camids[0].masked_fill(camids[0] < 0, -2), camids[1]
    return (queries.pids, gallery.pids, *camids), protocol


def rank(queries, gallery, *, protocol="market", max_rank=MAX_RANK, backend="auto", group=None):
    """`kernels.rank_metrics` of two sides; a query of unknown identity is skipped and counted.

    With a `group` of processes that all have both sides, each ranks its share: the same result in less time.
    """
    labels, protocol = kept_labels(queries, gallery, protocol)
    sides = shares_of(group, queries.features, gallery.features, *labels)
    return rank_metrics(*sides, max_rank=max_rank, protocol=protocol, backend=backend, group=group)


def summary(result):
    """The headline numbers of a `RankMetrics`, as fractions."""
    ranks = {f"rank{k}": float(result.cmc[min(k, len(result.cmc)) - 1]) for k in RANKS}
    return {"mAP": float(result.mAP), "mINP": float(result.mINP), **ranks} | {
        "num_valid": int(result.num_valid),
        "num_skipped": int(result.num_skipped),
    }


def mean_and_deviation(summaries):
    """The mean of each number over several splits, and the sample standard deviation (n - 1), 0 for one value.

    A split without the number (None) is skipped; if no split has it, the mean is None.
    """
    mean, deviation = {}, {}
    for key in summaries[0]:
        values = [numbers[key] for numbers in summaries if numbers[key] is not None]
        mean[key] = statistics.fmean(values) if values else None
        deviation[key] = statistics.stdev(values) if len(values) > 1 else 0.0
    return mean, deviation
