"""Metrics of scores and rankings. One file a kind."""

from twotower.evaluation.metrics.auc import Auc
from twotower.evaluation.metrics.coverage import Coverage
from twotower.evaluation.metrics.gauc import Gauc
from twotower.evaluation.metrics.hit_rate import HitRate
from twotower.evaluation.metrics.log_loss import LogLoss
from twotower.evaluation.metrics.metric import CatalogueMetric, Metric, PairMetric, RankingMetric
from twotower.evaluation.metrics.mrr import Mrr
from twotower.evaluation.metrics.ndcg import Ndcg
from twotower.evaluation.metrics.recall import Recall
from twotower.kinds import Kinds

__all__ = [
    "METRICS", "Auc", "CatalogueMetric", "Coverage", "Gauc", "HitRate", "LogLoss", "Metric",
    "Mrr", "Ndcg", "PairMetric", "RankingMetric", "Recall",
]  # fmt: skip

METRICS = Kinds(
    "metric", Metric, Auc, Gauc, LogLoss, Recall, Ndcg, Mrr, HitRate, Coverage,
    families=(PairMetric, RankingMetric, CatalogueMetric),
)  # fmt: skip
"""Kinds of metrics, by their names in a config, in the order of tables."""
