"""What an evaluation finds in each split of a data set, and the content of metrics.json made from it."""

from dataclasses import dataclass, field

import torch

from kernels import RankMetrics
from utils.evaluation.metrics import RANKS, Side, mean_and_deviation, summary
from utils.evaluation.thresholds import FALSE_MATCH_RATES, PairStatistics


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


def combined(splits, reranking=None, *, each=False):
    """The content of metrics.json: means over the splits; other details are those of the first split.

    `reranking`: the options of the re-ranking, if there was one. `each`: list the numbers of each split.
    """
    first = splits[0]
    metrics = averaged([summary(split.result) for split in splits])
    rates = [f"{rate:g}" for rate in FALSE_MATCH_RATES]
    thresholds = [{rate: split.pairs.thresholds[rate] for rate in rates} for split in splits]
    metrics["thresholds"] = {rate: averaged([split[rate] for split in thresholds]) for rate in thresholds[0]}
    metrics |= described(first) | {"backend": first.result.backend}
    metrics["cmc"] = torch.stack([split.result.cmc for split in splits]).mean(0)
    if reranking is not None:
        reranked = [split.reranked for split in splits]
        metrics["reranked"] = averaged([summary(split) for split in reranked]) | reranking
        metrics["reranked"]["backend"] = reranked[0].backend
        metrics["reranked"]["cmc"] = torch.stack([split.cmc for split in reranked]).mean(0)
    metrics["num_match_pairs"] = first.pairs.num_matches
    metrics["num_non_match_pairs"] = first.pairs.num_non_matches
    metrics["threshold_curve"] = first.pairs.curve
    metrics["camera_pairs"] = dict(zip(("query_cameras", "gallery_cameras", "mAP"), first.cameras, strict=True))
    if first.gallery.names.get("camid"):
        metrics["camera_pairs"]["names"] = first.gallery.names["camid"]
    if each or len(splits) > 1:
        metrics["splits"] = [
            {"split": number, **summary(split.result), "thresholds": thresholds[number]}
            for number, split in enumerate(splits)
        ]
    return metrics


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
