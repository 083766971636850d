"""Exact retrieval without the distance matrix: nearest neighbours, ranking metrics, k-reciprocal re-ranking."""

from .namesake import attribute
from .ranking import RankMetrics, rank_metrics
from .reranking import ReRanking, k_reciprocal_rerank
from .topk import TopK, cosine_topk

__all__ = ["RankMetrics", "ReRanking", "TopK", "cosine_topk", "k_reciprocal_rerank", "rank_metrics"]


def __getattr__(name):
    return attribute(name)
