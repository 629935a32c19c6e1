"""Metrics of scores and rankings. One file a kind."""

from twotower.evaluation.metrics.arp import Arp
from twotower.evaluation.metrics.auc import Auc
from twotower.evaluation.metrics.coverage import Coverage
from twotower.evaluation.metrics.diversity import Diversity
from twotower.evaluation.metrics.gauc import Gauc
from twotower.evaluation.metrics.gini import Gini
from twotower.evaluation.metrics.hit_rate import HitRate
from twotower.evaluation.metrics.log_loss import LogLoss
from twotower.evaluation.metrics.metric import CatalogueMetric, Metric, PairMetric, RankingMetric
from twotower.evaluation.metrics.mrr import Mrr
from twotower.evaluation.metrics.ndcg import Ndcg
from twotower.evaluation.metrics.novelty import Novelty
from twotower.evaluation.metrics.recall import Recall
from twotower.kinds import Kinds

__all__ = [
    "METRICS", "Arp", "Auc", "CatalogueMetric", "Coverage", "Diversity", "Gauc", "Gini", "HitRate", "LogLoss", "Metric",
    "Mrr", "Ndcg", "Novelty", "PairMetric", "RankingMetric", "Recall",
]  # fmt: skip

METRICS = Kinds(
    "metric", Metric, Auc, Gauc, LogLoss, Recall, Ndcg, Mrr, HitRate, Novelty, Diversity, Arp, Coverage, Gini,
    families=(PairMetric, RankingMetric, CatalogueMetric),
)  # fmt: skip
"""Kinds of metrics, by their names in a config, in the order of tables."""
