"""What an evaluation finds in each split of a data set, by one or several processes; metrics.json made from it."""

from dataclasses import dataclass, field

import torch

from kernels import RankMetrics, k_reciprocal_rerank
from kernels.disk.rows import RowsOnDisk
from kernels.ring.processes import shares_of
from utils.evaluation.calibration.rates import FALSE_MATCH_RATES as CALIBRATED_RATES
from utils.evaluation.calibration.rates import MOST_CAMERAS
from utils.evaluation.lists import camera_pairs, can_match, confusions, ranked_lists
from utils.evaluation.metrics import (
    MAX_RANK,
    RANKS,
    Side,
    check_sides,
    kept_labels,
    mean_and_deviation,
    rank,
    summary,
)
from utils.evaluation.thresholds import FALSE_MATCH_RATES, PairStatistics, pair_statistics


@dataclass
class Findings:
    """The results of one split. Without labels, only the ranked lists are filled."""

    queries: Side
    gallery: Side
    protocol: str
    lists: tuple | None = None
    reranked_lists: tuple | None = None
    result: RankMetrics | None = None
    reranked: RankMetrics | None = None
    pairs: PairStatistics | None = None
    cameras: tuple = ()
    confusions: list = field(default_factory=list)
    calibration: dict | None = None
    decisions: list = field(default_factory=list)


def measured(
    queries, gallery, *, protocol=None, topk=None, rerank=None, may_lack_matches=False, backend="auto", group=None,
    details=True,
):  # fmt: skip
    """The `Findings` of one split; `rerank` is None or the options of `kernels.k_reciprocal_rerank`.

    Without a `protocol` it is `market`, or `all` where a side has no cameras. `may_lack_matches`: a search without
    labels has lists but no metrics. All processes of a `group` have both sides, each ranks its share, and all get the
    same findings. `details` are confusions and, of features in memory, thresholds and camera pairs; each process
    computes them for itself.
    """
    check_sides(queries, gallery)
    if topk and topk > len(gallery):
        raise ValueError(f"--topk {topk} is more than the gallery's {len(gallery)} images; ask for fewer")
    has_cameras = bool((queries.camids >= 0).any() and (gallery.camids >= 0).any())
    protocol = protocol or ("market" if has_cameras else "all")
    k = min(topk or MAX_RANK, len(gallery))
    options = {"protocol": protocol, "backend": backend}
    lists = ranked_lists(queries, gallery, k, **options, group=group)
    reranked_lists = reranked = None
    if rerank is not None:
        reranking = reranked_by(queries, gallery, rerank, backend, group)
        reranked_lists = ranked_lists(queries, gallery, k, reranking=reranking, **options, group=group)
    if may_lack_matches and not can_match(queries, gallery, protocol):
        return Findings(queries, gallery, protocol, lists, reranked_lists)
    result = rank(queries, gallery, **options, group=group)
    if rerank is not None:
        reranked = reranked_metrics(queries, gallery, reranking, protocol, group)
    findings = Findings(queries, gallery, protocol, lists, reranked_lists, result=result, reranked=reranked)
    if details and not isinstance(gallery.features, RowsOnDisk):
        # More rates than metrics.json shows: those of a calibration.
        findings.pairs = pair_statistics(queries, gallery, protocol=protocol, rates=CALIBRATED_RATES)
        # A table of more would be read by nobody, and takes a ranking for each pair.
        if max(len(side.camids.unique()) for side in (queries, gallery)) <= MOST_CAMERAS:
            findings.cameras = camera_pairs(queries, gallery, **options)
    if details:
        findings.confusions = confusions(queries, gallery, *lists)
    return findings


def reranked_by(queries, gallery, options, backend="auto", group=None):
    """The `kernels.ReRanking` of two sides; under a `group`, that of this process's share of the queries."""
    # Features on disk are read: each process holds its share.
    sides = [features[:] for features in shares_of(group, queries.features, gallery.features)]
    return k_reciprocal_rerank(*sides, **options, backend=backend, group=group)


def reranked_metrics(queries, gallery, reranking, protocol, group=None):
    labels, kept_protocol = kept_labels(queries, gallery, protocol)
    return reranking.metrics(*shares_of(group, *labels), max_rank=MAX_RANK, protocol=kept_protocol)


def combined(splits, reranking=None, *, each=False):
    """The content of metrics.json: means over the splits; other details are those of the first split.

    `reranking`: the options of the re-ranking, if there was one. `each`: list the numbers of each split.
    """
    first = splits[0]
    metrics = averaged([summary(split.result) for split in splits])
    rates = [f"{rate:g}" for rate in FALSE_MATCH_RATES] if first.pairs else []
    thresholds = [{rate: split.pairs.thresholds[rate] for rate in rates} for split in splits]
    metrics["thresholds"] = {rate: averaged([split[rate] for split in thresholds]) for rate in thresholds[0]}
    metrics |= described(first) | {"backend": first.result.backend}
    metrics["cmc"] = torch.stack([split.result.cmc for split in splits]).mean(0)
    if reranking is not None:
        reranked = [split.reranked for split in splits]
        metrics["reranked"] = averaged([summary(split) for split in reranked]) | reranking
        metrics["reranked"]["backend"] = reranked[0].backend
        metrics["reranked"]["cmc"] = torch.stack([split.cmc for split in reranked]).mean(0)
    if first.pairs:
        metrics |= described_pairs(first)
    if each or len(splits) > 1:
        metrics["splits"] = [
            {"split": number, **summary(split.result), "thresholds": thresholds[number]}
            for number, split in enumerate(splits)
        ]
    return metrics


def described_pairs(findings):
    names = findings.gallery.names.get("camid")
    names_of_cameras = "query_cameras", "gallery_cameras", "mAP"
    cameras = dict(zip(names_of_cameras, findings.cameras or ([], [], []), strict=True))
    return {
        "num_match_pairs": findings.pairs.num_matches,
        "num_non_match_pairs": findings.pairs.num_non_matches,
        "threshold_curve": findings.pairs.curve,
        "camera_pairs": cameras | ({"names": names} if names else {}),
    }


def averaged(parts):
    """The numbers of a single split, or the means of several with the sample standard deviations under `std`."""
    if len(parts) == 1:
        return dict(parts[0])
    mean, deviation = mean_and_deviation(parts)
    return {**mean, "std": deviation}


def described(findings):
    return {"protocol": findings.protocol, "num_queries": len(findings.queries), "num_gallery": len(findings.gallery)}


def nothing_measured(findings):
    """The content of metrics.json for a search without labels."""
    names = ("mAP", "mINP", *(f"rank{rank}" for rank in RANKS), "num_valid", "num_skipped", "thresholds", "backend")
    return dict.fromkeys(names) | described(findings)
