"""Metrics of scores on the validation part, and the difference of two scores that chance explains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from twotower.data.dataset import Dataset
from twotower.data.splits import VALIDATION
from twotower.distributed import DistributedContext
from twotower.evaluation.config import EvaluationConfig
from twotower.evaluation.factors import Factors, Scorer
from twotower.evaluation.metrics.metric import RankingMetric, UserValues
from twotower.evaluation.part_evaluation import PartEvaluation
from twotower.evaluation.version_factors import VersionFactors
from twotower.train.starts.search import CLOSE


@dataclass(frozen=True)
class Validation:
    """Metrics of scores on the validation part, for all ranks."""

    metrics: Callable[[Scorer, EvaluationConfig], Mapping[str, float]]
    """Metrics by name, under given options."""
    score_of: Callable[[Mapping[str, float]], float]
    """The monitored metric; higher is better."""
    by_user: Callable[[Scorer, EvaluationConfig], UserValues | None]
    """The monitored metric by user on rank 0; None on other ranks, and for a metric that is no mean over users."""
    context: DistributedContext

    def beside(self, added: Callable[[Factors], Scorer]) -> Validation:
        """Return the metrics of vectors whose scores a function adds terms to."""

        def of(scorer: Scorer) -> Scorer:
            return added(scorer) if isinstance(scorer, Factors) else scorer

        return replace(
            self,
            metrics=lambda scorer, config: self.metrics(of(scorer), config),
            by_user=lambda scorer, config: self.by_user(of(scorer), config),
        )

    def score(self, scorer: Scorer, config: EvaluationConfig) -> float:
        """Return the monitored metric under given options; higher is better."""
        return self.score_of(self.metrics(scorer, config))

    def scores(self, scorer: Scorer, config: EvaluationConfig, metric: str) -> tuple[float, float]:
        """Return a metric, the monitored one if `metric` is empty, and the monitored one; higher is better."""
        found = self.metrics(scorer, config)
        monitored = self.score_of(found)
        return found[metric] if metric else monitored, monitored

    def ordering(self, config: EvaluationConfig, monitor: str) -> str:
        """Return the metric that orders lists with equal monitored metrics by their order of items; empty if none
        does."""
        metric, (part, _, name) = config.metric_set.find(monitor), monitor.rpartition(".")
        other = metric.ordered_by if isinstance(metric, RankingMetric) else ""
        return f"{part}.{other}@{name.rpartition('@')[2]}" if other else ""

    def tolerance(self, best: Scorer, config: EvaluationConfig) -> Callable[[Scorer], float]:
        """Return the function from another scorer to the amount by which it may score below `best` by chance.

        This is one standard error of the difference, paired by user (Breiman et al. 1984, section 3.4.3), but at most
        the share CLOSE of the score. For a metric that is no mean over users it is that share.
        """
        of_best, share = self.by_user(best, config), CLOSE * abs(self.score(best, config))

        def allowed(other: Scorer) -> float:
            found = self.by_user(other, config) if of_best else None
            return self.context.broadcast(
                min(share, of_best.error_of_difference(found)) if of_best and found else share
            )

        return allowed


def monitored_by_user(
    scorer: Scorer, config: EvaluationConfig, dataset: Dataset, monitor: str, context: DistributedContext
) -> UserValues | None:
    """Return a metric such as `validation.ndcg@10` by user on rank 0; None on other ranks, and for no mean over
    users."""
    if not context.is_main:
        return None
    scorer = VersionFactors.of_part(scorer, dataset, VALIDATION)
    return PartEvaluation.from_factors(scorer, dataset, VALIDATION, config).by_user(monitor.rpartition(".")[2])
