"""Metrics of a model on a part of a dataset.

Pair metrics (AUC, GAUC, log loss) measure whether a user likes an item that was shown. Ranking metrics rank the whole
catalogue by exact search, without the items that the user has seen; no negatives are sampled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from twotower.arrays.types import Bools, Ints
from twotower.data.dataset import Dataset
from twotower.data.pairs import Pairs, counts
from twotower.data.splits import TEST, VALIDATION
from twotower.evaluation.baselines import bias_baseline, popularity_baseline
from twotower.evaluation.bootstrap import bootstrap
from twotower.evaluation.factors import Factors
from twotower.evaluation.metrics import CATALOGUE_METRICS, PAIR_METRICS, Metrics, auc, auc_by_group, ranking_metrics
from twotower.evaluation.ranking import EvaluationConfig, EvaluationQueries, evaluation_queries, pairs_of_part


def evaluate_part(factors: Factors, dataset: Dataset, part: int, config: EvaluationConfig) -> Metrics:
    """Return every metric of one part by name: `auc`, `gauc`, `log_loss`, `recall@10`, `coverage@10`, …"""
    return PartEvaluation.from_factors(factors, dataset, part, config).metrics()


@dataclass(frozen=True)
class PartEvaluation:
    """Scores and rankings of one part, from which metrics, slices and intervals are computed."""

    dataset: Dataset
    config: EvaluationConfig
    pairs: Pairs
    scores: npt.NDArray[np.float32]
    users: Ints  # (Q,) user rows
    best: Ints  # (Q, max k) item rows, -1: none
    hit: Bools
    n_targets: Ints

    @classmethod
    def from_factors(
        cls,
        factors: Factors,
        dataset: Dataset,
        part: int,
        config: EvaluationConfig,
        queries: EvaluationQueries | None = None,
    ) -> PartEvaluation:
        """Evaluate vectors by exact search. `queries` are those of the part, if they are computed already."""
        queries = queries or evaluation_queries(dataset, part, config)
        best = queries.top_k(factors.users, factors.items, max(config.k))
        return cls._of(queries, best, factors.scores(pairs_of_part(dataset, part)), dataset, part, config)

    @classmethod
    def from_search(
        cls, search: Callable[[Ints, int], Ints], scores: npt.NDArray[np.float32], dataset: Dataset, part: int,
        config: EvaluationConfig,
    ) -> PartEvaluation:  # fmt: skip
        """Evaluate any search: `search(users (Q,), k)` returns item rows (Q, k); `scores` are those of the part's
        pairs."""
        queries = evaluation_queries(dataset, part, config)
        best = search(queries.users, min(max(config.k), queries.n_items))
        return cls._of(queries, best, scores, dataset, part, config)

    @classmethod
    def _of(
        cls, queries: EvaluationQueries, best: Ints, scores: npt.NDArray[np.float32], dataset: Dataset, part: int,
        config: EvaluationConfig,
    ) -> PartEvaluation:  # fmt: skip
        pairs = pairs_of_part(dataset, part)
        n = np.bincount(pairs.user[pairs.positive], minlength=len(dataset.users))
        return cls(dataset, config, pairs, scores, queries.users, best, queries.hits(best), n[queries.users])

    def metrics(self) -> Metrics:
        """Return pair metrics over all rows, ranking metrics as means over users, and coverage of the catalogue."""
        out = {m.name: m.function(self.scores, self.pairs.positive, self.pairs.user) for m in PAIR_METRICS}
        for k in self.config.k:
            for name, values in ranking_metrics(self.hit, self.n_targets, k).items():
                out[f"{name}@{k}"] = float(values.mean()) if len(values) else float("nan")
            for m in CATALOGUE_METRICS:
                out[f"{m.name}@{k}"] = m.function(self.best[:, :k], len(self.dataset.items))
        return out

    def intervals(self) -> dict[str, tuple[float, float]]:
        """Return 95 % bootstrap intervals over users of GAUC and of the ranking metrics."""
        _, values, sizes = auc_by_group(self.scores, self.pairs.positive, self.pairs.user)
        low, high = bootstrap(values, sizes.astype(float), self.config.bootstrap)
        out = {"gauc": (float(low), float(high))}
        per_user = {
            f"{name}@{k}": values
            for k in self.config.k
            for name, values in ranking_metrics(self.hit, self.n_targets, k).items()
        }
        bounds = bootstrap(np.stack([*per_user.values()], 1), np.ones(len(self.users)), self.config.bootstrap)
        out |= {name: (float(low), float(high)) for name, low, high in zip(per_user, *bounds, strict=True)}
        return {name: interval for name, interval in out.items() if np.isfinite(interval).all()}

    def slices(self) -> Metrics:
        """Return `auc.new_user`, `recall@10.tail`, … for the slices on which the metric is defined."""
        data, config = self.dataset, self.config
        user_n, item_n = counts(data.train.user, len(data.users)), counts(data.train.item, len(data.items))
        head = np.zeros(len(data.items), bool)
        head[np.argsort(-item_n, kind="stable")[: max(1, int(config.head_share * len(data.items)))]] = True
        k = config.k[0]
        out: Metrics = {}
        by_user = {"new_user": user_n < config.new_user_below}
        by_item = {"new_item": item_n < config.new_item_below, "head": head, "tail": ~head}
        per_user = ranking_metrics(self.hit, self.n_targets, k)
        for name, rows in by_user.items():
            keep = rows[self.pairs.user]
            out[f"rows.{name}"] = int(keep.sum())
            out[f"auc.{name}"] = auc(self.scores[keep], self.pairs.positive[keep])
            selected = rows[self.users]
            if selected.any():
                out |= {f"{m}@{k}.{name}": float(per_user[m][selected].mean()) for m in ("recall", "ndcg")}
        for name, rows in by_item.items():
            keep = rows[self.pairs.item]
            out[f"rows.{name}"] = int(keep.sum())
            out[f"auc.{name}"] = auc(self.scores[keep], self.pairs.positive[keep])
            targets = np.bincount(self.pairs.user[keep & self.pairs.positive], minlength=len(data.users))[self.users]
            hits = (self.hit[:, :k] & rows[self.best[:, :k]]).sum(1)
            defined = targets > 0
            if defined.any():
                out[f"recall@{k}.{name}"] = float((hits[defined] / targets[defined]).mean())
        return {name: value for name, value in out.items() if value == value}


def evaluate_model(factors_of: Callable[[int], Factors], dataset: Dataset, config: EvaluationConfig) -> Metrics:
    """Return the metrics of a run by name: validation and test, intervals and slices of test, baselines on test.

    `factors_of(part)` returns the vectors from the data before that part.
    """
    out: Metrics = {}
    queries = evaluation_queries(dataset, TEST, config)
    factors = factors_of(VALIDATION)
    for name, part in (("validation", VALIDATION), ("test", TEST)):
        if part == TEST and dataset.time_ordered:  # otherwise both parts have the same vectors
            factors = factors_of(TEST)
        evaluation = PartEvaluation.from_factors(factors, dataset, part, config, queries if part == TEST else None)
        out |= {f"{name}.{m}": v for m, v in evaluation.metrics().items()}
        if part == TEST:
            for m, (low, high) in evaluation.intervals().items():
                out[f"test.{m}.low"], out[f"test.{m}.high"] = low, high
            out |= {f"test.{m}": v for m, v in evaluation.slices().items()}
    n_users, n_items = len(dataset.users), len(dataset.items)
    for name, baseline in (
        ("popularity", popularity_baseline(dataset.train, n_users, n_items)),
        ("bias", bias_baseline(dataset.train, n_users, n_items)),
    ):
        metrics = PartEvaluation.from_factors(baseline, dataset, TEST, config, queries).metrics()
        del metrics["log_loss"]  # the scores of the baselines are no logits
        out |= {f"baseline.{name}.{m}": v for m, v in metrics.items()}
    return {m: v for m, v in out.items() if v == v}
