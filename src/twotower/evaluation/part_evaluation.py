"""Metrics of a model on a part of a dataset.

Metrics of pairs measure whether a user likes an item that was shown. Metrics of rankings rank the whole catalogue
by exact search, with the items that the user has seen as `evaluation.repeats` says; no negatives are sampled.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from twotower.arrays.types import Bools, Doubles, Float, Floats, Ints, Shaped
from twotower.data.dataset import Dataset
from twotower.data.pairs import Pairs
from twotower.data.splits import TEST, VALIDATION
from twotower.evaluation.added_scores import AddedScores
from twotower.evaluation.baselines import BASELINES, baseline_of
from twotower.evaluation.bootstrap import bootstrap
from twotower.evaluation.comparison import compare_resampled
from twotower.evaluation.config import WIDTH, EvaluationConfig, Metrics
from twotower.evaluation.factors import CatalogueScorer, Scorer
from twotower.evaluation.metrics.measured import RankedItems, Rankings, ScoredPairs
from twotower.evaluation.metrics.metric import PairMetric, RankingMetric, UserValues
from twotower.evaluation.ranking import EvaluationQueries, evaluation_queries
from twotower.evaluation.slices import COLD, COLD_ALONE, TableSlice, slices_of

log = logging.getLogger(__name__)


Alone = Callable[[Dataset, int, EvaluationConfig, Sequence[AddedScores]], Iterable[tuple[str, CatalogueScorer]]]
"""Function from a dataset, a part, a config and what a model adds to its vectors to baselines by name."""
MODEL = "model"
"""Name of the model, added to the names of BASELINES."""
MAX_RESAMPLED_PAIRS = 2**20
"""Pairs up to which a metric that is no mean over users, such as `auc`, has an interval of a difference."""


@dataclass(frozen=True)
class Ranked:
    """The queries of a part, and the best items of each as `EvaluationQueries.top_k` returns them, by the name of what
    scores: MODEL, or one of BASELINES."""

    queries: EvaluationQueries
    best: Mapping[str, Shaped[Ints, "Q K"]]


def evaluate_part(factors: Scorer, dataset: Dataset, part: int, config: EvaluationConfig) -> Metrics:
    """Return every metric of one part by name: `auc`, `gauc`, `log_loss`, `recall@10`, `coverage@10`, …"""
    return PartEvaluation.from_factors(factors, dataset, part, config).metrics()


@dataclass(frozen=True)
class PartEvaluation:
    """Scored pairs and rankings of one part, from which metrics, slices and intervals are computed."""

    dataset: Dataset
    config: EvaluationConfig
    pairs: Pairs
    """Pairs of a weight above 0."""
    scored: ScoredPairs
    queries: EvaluationQueries
    rankings: Rankings
    part: int

    @property
    def users(self) -> Shaped[Ints, "Q"]:
        """User rows of the rankings."""
        return self.queries.users

    @classmethod
    def from_factors(
        cls,
        factors: Scorer,
        dataset: Dataset,
        part: int,
        config: EvaluationConfig,
        queries: EvaluationQueries | None = None,
        best: Shaped[Ints, "Q K"] | None = None,
    ) -> PartEvaluation:
        """Evaluate vectors by exact search. `queries` are those of the part, if they are computed already, and `best`
        what they find."""
        queries = queries or evaluation_queries(dataset, part, config)
        best = queries.top_k(factors, max(config.k)) if best is None else best
        return cls.of(queries, best, factors.part_scores(dataset, part), dataset, part, config)

    @classmethod
    def of(
        cls, queries: EvaluationQueries, best: Shaped[Ints, "Q K"], scores: Shaped[Floats, "n"], dataset: Dataset,
        part: int, config: EvaluationConfig,
    ) -> PartEvaluation:  # fmt: skip
        """Evaluate any search: `best` are the items that it finds for the queries of a part, `scores` those of the
        part's pairs."""
        pairs = dataset.pairs_of(part)
        items = RankedItems.of(dataset, weighted=config.weighted, part=part)
        rankings = queries.rankings(best, items, config.weighted)
        scored = ScoredPairs.of(scores, pairs, config.weighted)
        return cls(dataset, config, pairs.counted, scored, queries, rankings, part)

    def metrics(self) -> Metrics:
        """Return all metrics of the config: of pairs over all rows, of rankings as means over users, of the
        catalogue."""
        measured = self.config.metric_set
        out = {m.name: m.value(self.scored) for m in measured.of_pairs}
        for k in self.config.k:
            rankings = self.rankings.at(k)
            for m in measured.of_users:
                values = m.values(rankings)
                out[f"{m.name}@{k}"] = float(values.mean()) if len(values) else float("nan")
            out |= {f"{m.name}@{k}": m.value(rankings) for m in measured.of_catalogue}
        return out

    def by_user(self, name: str) -> UserValues | None:
        """Return a metric such as `gauc` or `ndcg@10` by user; None if it is no mean over users."""
        metric = self.config.metric_set.find(name)
        if isinstance(metric, PairMetric):
            return metric.by_user(self.scored)
        if not isinstance(metric, RankingMetric):
            return None
        values = metric.values(self.rankings.at(int(name.rpartition("@")[2])))
        means, n_queries = _by_user(self.users, values[:, None])
        return UserValues(np.unique(self.users), means[:, 0], n_queries)

    def intervals(self) -> dict[str, tuple[float, float]]:
        """Return 95 % bootstrap intervals over users of every metric that is a mean over users."""
        measured, resamples = self.config.metric_set, self.config.bootstrap
        out = {}
        for m in measured.of_pairs:
            if by_user := m.by_user(self.scored):
                low, high = bootstrap(by_user.values, by_user.weights, resamples)
                out[m.name] = (float(low), float(high))
        per_user = {f"{m.name}@{k}": m.values(self.rankings.at(k)) for k in self.config.k for m in measured.of_users}
        means, n_queries = _by_user(self.users, np.stack([*per_user.values()], 1))
        bounds = bootstrap(means, n_queries, resamples)
        out |= {name: (float(low), float(high)) for name, low, high in zip(per_user, *bounds, strict=True)}
        return {name: interval for name, interval in out.items() if np.isfinite(interval).all()}

    def interval_of_difference(self, other: PartEvaluation, name: str) -> tuple[float, float]:
        """Return the 95 % paired bootstrap interval, over users, of a metric of this evaluation minus that metric of
        another one of the part. NaN without resamples, users or an interval, or for `auc` above MAX_RESAMPLED_PAIRS."""
        metric, resamples = self.config.metric_set.find(name), self.config.bootstrap
        one, two = self.by_user(name), other.by_user(name)
        if one and two and len(one.users) and resamples:
            low, high = bootstrap(one.values - two.values, one.weights, resamples)
            return float(low), float(high)
        if isinstance(metric, PairMetric) and resamples and 0 < len(self.pairs) <= MAX_RESAMPLED_PAIRS:
            users, place = np.unique(self.scored.users, return_inverse=True)
            first, second = (replace(e.scored, users=place) for e in (other, self))
            if found := compare_resampled(metric, first, second, len(users), resamples):
                return found.low, found.high
        return float("nan"), float("nan")

    def slices(self) -> Metrics:
        """Return `auc.new_user`, `recall@10.tail`, `recall@10.cold_item`, `recall@10.gender=F`, … for the slices on
        which the metric is defined, with the number of their pairs, `rows.tail`.

        Of a column of the users also `users.gender=F`, the number of ranked users, `users.gender.left_out`, those of
        the values with too few, and `recall@10.gender.gap`, the largest value minus the smallest."""
        config, k, out = self.config, self.config.k[0], Metrics()
        rankings, users = self.rankings.at(k), np.unique(self.users)
        values: dict[str, list[str]] = {column: [] for column in config.slices}
        for of in slices_of(self.dataset, config, self.part, self.pairs.item, users):
            metrics, kept = config.metric_set.of_slices(of.side), of.of_pairs(self.pairs)
            out[f"rows.{of.name}"] = int(np.count_nonzero(kept))
            if of.column:
                values[of.column].append(of.name)
                out[f"users.{of.name}"] = int(np.count_nonzero(of.rows[users]))
            scored = self.scored.where(kept)
            out |= {f"{m.name}.{of.name}": m.value(scored) for m in metrics.of_pairs}
            ranked, sliced = self.queries.sliced(rankings, of, config.weighted)
            if len(ranked):
                out |= {f"{m.name}@{k}.{of.name}": float(m.values(sliced).mean()) for m in metrics.of_users}
        for column, names in values.items():
            out[f"users.{column}.left_out"] = len(users) - sum(out[f"users.{name}"] for name in names)
            for metric in config.metric_set.of_slices("user").names((k,)):
                found = [v for name in names if (v := out[f"{metric}.{name}"]) == v]
                if len(found) > 1:
                    out[f"{metric}.{column}.gap"] = max(found) - min(found)
        return {name: value for name, value in out.items() if value == value}

    def among_cold_items(self, factors: CatalogueScorer) -> Metrics:
        """Return `recall@10.cold_item_alone`, … at the first cut-off: the metrics sliced by users, of rankings of the
        cold items alone, those without a training interaction, for the users with a target among them. Empty without
        such a user."""
        config, k = self.config, self.config.k[0]
        of = TableSlice(COLD, "item", self.dataset.item_counts == 0)
        queries = self.queries.take(self.queries.count_targets(of.rows) > 0)
        if not len(queries.users):
            return {}
        best = queries.top_k(_SomeItems(factors, of.rows), k)
        _, rankings = queries.sliced(queries.rankings(best, self.rankings.items, config.weighted), of, config.weighted)
        metrics = config.metric_set.of_slices("user").of_users
        return {f"{m.name}@{k}.{COLD_ALONE}": float(m.values(rankings).mean()) for m in metrics}


@dataclass(frozen=True)
class _SomeItems(CatalogueScorer):
    """Scores of some items, -inf for all others."""

    every: CatalogueScorer
    rows: Shaped[Bools, "I"]

    def catalogue_scores(
        self, users: Shaped[Ints, "B"], interactions: Shaped[Ints, "B"] | None = None
    ) -> Float[Tensor, "B I"]:
        scores = self.every.catalogue_scores(users, interactions)
        return scores.masked_fill(~torch.from_numpy(self.rows).to(scores.device), -torch.inf)


def _by_user(
    users: Shaped[Ints, "Q"], values: Shaped[Doubles, "Q M"]
) -> tuple[Shaped[Doubles, "U M"], Shaped[Doubles, "U"]]:
    """Return the means of the values of each user's queries, and the numbers of these, whose weighted mean is that of
    all queries."""
    _, place, n = np.unique(users, return_inverse=True, return_counts=True)
    sums = np.stack([np.bincount(place, column, len(n)) for column in values.T], 1)
    return sums / n[:, None], n.astype(np.float64)


def part_of_vectors(dataset: Dataset, part: int) -> int:
    """Return the part before whose data the vectors are that evaluate a part: validation and test have the same ones,
    unless the parts follow one another in time or rows have versions."""
    return part if dataset.time_ordered or dataset.has_versions else VALIDATION


def evaluate_model(
    factors_of: Callable[[int], Scorer],
    dataset: Dataset,
    config: EvaluationConfig,
    validated: Metrics | None = None,
    ranked: Mapping[int, Ranked] | None = None,
    monitor: str = "",
    alone: Alone = lambda *_: (),
) -> Metrics:
    """Return the metrics of a run by name: validation, if it has rows, and test, intervals and slices of test, the
    width of an item's vector, baselines on test. With `monitor`, such as validation.ndcg@10, also the interval of the
    difference to the best baseline by it. `alone` yields further baselines of rankings.

    `factors_of(part)` returns the vectors from the data before that part, by which it is evaluated. `validated` are the
    metrics of validation, if they are known; `ranked` are rankings by part, if other processes have made them.
    """
    out = {m: v for m, v in (validated or {}).items() if m.startswith("validation.") and m != "validation.seconds"}
    ranked = dict(ranked or {})
    if TEST not in ranked:
        ranked[TEST] = Ranked(evaluation_queries(dataset, TEST, config), {})
    queries, best_of = ranked[TEST].queries, ranked[TEST].best
    log.info(f"test {queries.summary}")
    factors = None
    for name, part in (("validation", VALIDATION), ("test", TEST)):
        if part == VALIDATION and (out or not len(dataset.validation)):
            continue
        if factors is None or factors.moves or part_of_vectors(dataset, part) == TEST:
            factors = factors_of(part)
        given = ranked.get(part) or Ranked(evaluation_queries(dataset, part, config), {})
        evaluation = PartEvaluation.from_factors(factors, dataset, part, config, given.queries, given.best.get(MODEL))
        out |= {f"{name}.{m}": v for m, v in evaluation.metrics().items()}
        if part == TEST:
            for m, (low, high) in evaluation.intervals().items():
                out[f"test.{m}.low"], out[f"test.{m}.high"] = low, high
            found = evaluation.slices() | evaluation.among_cold_items(factors)
            out |= {f"test.{m}": v for m, v in found.items()} | {f"test.{WIDTH}": factors.width}
    judged = config.metric_set.judged_by(monitor) if monitor else ""
    sign = 1 if not judged or config.metric_set.find(judged).higher_is_better else -1
    leader: tuple[float, str, PartEvaluation] | None = None
    further = alone(dataset, TEST, config, factors.added if factors else ())
    for name, baseline, left_out in _baselines(dataset, queries, best_of, config, further):
        metrics = {m: v for m, v in baseline.metrics().items() if m not in left_out}
        out |= {f"baseline.{name}.{m}": v for m, v in metrics.items()}
        value = sign * metrics.get(judged, float("nan"))
        if value == value and (leader is None or value > leader[0]):
            leader = value, name, baseline
    if leader:
        low, high = evaluation.interval_of_difference(leader[2], judged)
        out |= {f"difference.{leader[1]}.{judged}.low": low, f"difference.{leader[1]}.{judged}.high": high}
    return {m: v for m, v in out.items() if v == v}


def _baselines(
    dataset: Dataset, queries: EvaluationQueries, ranked: Mapping[str, Shaped[Ints, "Q K"]], config: EvaluationConfig,
    alone: Iterable[tuple[str, CatalogueScorer]],
) -> Iterator[tuple[str, PartEvaluation, set[str]]]:  # fmt: skip
    """Yield the name of each baseline, its evaluation on the test part, and the metrics that it does not have. `ranked`
    has known rankings by baseline."""
    of_logits = {m.name for m in config.metric_set.of_pairs if m.of_logits}
    for name in BASELINES:
        scorer = baseline_of(name, dataset)
        yield name, PartEvaluation.from_factors(scorer, dataset, TEST, config, queries, ranked.get(name)), of_logits
    of_pairs = {m.name for m in config.metric_set.of_pairs}
    for name, scores in alone:
        best, nothing = queries.top_k(scores, max(config.k)), np.zeros(len(dataset.test), np.float32)
        yield name, PartEvaluation.of(queries, best, nothing, dataset, TEST, config), of_pairs
