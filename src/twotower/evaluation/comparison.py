"""Comparison of two models on the same queries by a paired bootstrap."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from twotower.arrays.types import Doubles, Ints, Shaped
from twotower.data.pairs import GroupedPairs, Pairs, counts
from twotower.evaluation.bootstrap import bootstrap_counts, paired_bootstrap, percentile_interval
from twotower.evaluation.config import MetricSet, Repeats
from twotower.evaluation.factors import Factors
from twotower.evaluation.metrics.measured import RankedItems, Rankings, ScoredPairs
from twotower.evaluation.metrics.metric import PairMetric
from twotower.evaluation.ranking import EvaluationQueries
from twotower.evaluation.slices import TableSlice

ByUser = dict[str, tuple[Shaped[Doubles, "U"], Shaped[Doubles, "U"]]]
"""Values and weights over users of metrics by name; the weight is 0 where a metric is undefined."""


@dataclass(frozen=True)
class Comparison:
    """One metric of two runs, which `names` name: A and B."""

    metric: str
    a: float
    b: float
    difference: float  # b - a
    low: float  # 95 % interval of the difference
    high: float
    p: float  # two-sided bootstrap p-value
    users: int  # test users on whom the metric is defined
    higher_is_better: bool = True
    names: tuple[str, str] = ("A", "B")
    of: str = ""
    """Slice of the test part, as new_user; empty of all. A slice of few users has a difference, and NaN for its
    interval and p-value."""

    @property
    def has_interval(self) -> bool:
        """True if the difference has an interval."""
        return self.low == self.low

    @property
    def better(self) -> str:
        """Name of the better run; empty if the interval contains zero, or there is none."""
        if not (self.low > 0 or self.high < 0):
            return ""
        return self.names[(self.low > 0) == self.higher_is_better]

    @property
    def verdict(self) -> str:
        """State which run is better; "no significant difference" if the interval contains zero."""
        return f"{self.better} is better" if self.better else "no significant difference"


@dataclass(frozen=True)
class ComparisonData:
    """Evaluation data of both runs: user rows are 0..n_users-1, each with a test pair."""

    pairs: Pairs
    """Test pairs."""
    grouped: GroupedPairs
    """Test pairs by user."""
    seen: Sequence[GroupedPairs]
    """Pairs whose items are excluded from the rankings, or treated as `repeats` says."""
    items: RankedItems
    weighted: bool = False
    """True if rows are weighed in metrics."""
    repeats: Repeats = "exclude"

    @property
    def n_users(self) -> int:
        return len(self.grouped.lengths)

    @cached_property
    def queries(self) -> EvaluationQueries:
        """Queries of the test pairs."""
        positives = counts(self.pairs.user, self.n_users, self.pairs.target)
        return EvaluationQueries.build(self.grouped, self.seen, positives, self.items.n_items, repeats=self.repeats)


def compare_factors(
    a: Factors,
    b: Factors,
    data: ComparisonData,
    k: Sequence[int],
    resamples: int = 1000,
    metrics: MetricSet | None = None,
    slices: Iterable[TableSlice] = (),
    slice_min_users: int = 1,
) -> list[Comparison]:
    """Compare the vectors of A and B, whose rows are the users and items of `data`, by `metrics`, by default the
    registered ones. `slices` of these users and items follow, by the metrics that have slices, at the first cut-off; a
    slice of fewer than `slice_min_users` users has no interval."""
    metrics = metrics or MetricSet()
    models = [_Measured.of(factors, data, max(k, default=0)) for factors in (a, b)]
    out = _compare(models, data.n_users, k, metrics, resamples)
    for of in slices:
        parts = [m.sliced(of, data) for m in models]
        for c in _compare(parts, data.n_users, k[:1], metrics.of_slices(of.side), resamples):
            few = c.users < slice_min_users
            out.append(replace(c, of=of.name, low=np.nan, high=np.nan, p=np.nan) if few else replace(c, of=of.name))
    return out


@dataclass(frozen=True)
class _Measured:
    """Scored pairs and rankings of a model: of all users and items, or of a slice."""

    scored: ScoredPairs
    users: Shaped[Ints, "Q"]
    rankings: Rankings | None
    """Rankings of the users; None without a cut-off."""

    @classmethod
    def of(cls, factors: Factors, data: ComparisonData, k: int) -> _Measured:
        """Measure a model by its vectors, with rankings of `k` items."""
        scored, queries = ScoredPairs.of(factors.scores(data.pairs), data.pairs, data.weighted), data.queries
        rankings = queries.rankings(queries.top_k(factors, k), data.items, data.weighted) if k else None
        return cls(scored, queries.users, rankings)

    def sliced(self, of: TableSlice, data: ComparisonData) -> _Measured:
        """Return what is measured of a slice."""
        scored = self.scored.where(of.of_pairs(data.pairs.counted))
        if self.rankings is None:
            return replace(self, scored=scored)
        return _Measured(scored, *data.queries.sliced(self.rankings, of, data.weighted))

    def by_user(self, n: int, k: Sequence[int], metrics: MetricSet) -> ByUser:
        """Return the values and weights of every metric over the `n` users."""
        found = {m.name: m.by_user(self.scored) for m in metrics.of_pairs}
        out = {name: _scatter(n, *of) for name, of in found.items() if of and len(of.users)}
        if self.rankings is None or not len(self.users):
            return out
        for cut in k:
            rankings = self.rankings.at(cut)
            for m in metrics.of_users:
                out[f"{m.name}@{cut}"] = _scatter(n, self.users, m.values(rankings), np.ones(len(self.users)))
        return out


def _compare(
    models: Sequence[_Measured], n_users: int, k: Sequence[int], metrics: MetricSet, resamples: int
) -> list[Comparison]:
    """Compare two models by the metrics that resample themselves, then by every metric over users of the first, which
    the second has too, with the weights of the first."""
    resampled = (compare_resampled(m, models[0].scored, models[1].scored, n_users, resamples) for m in metrics.of_pairs)
    out = [c for c in resampled if c]
    a, b = (m.by_user(n_users, k, metrics) for m in models)
    if not a:
        return out
    names, weights = list(a), np.stack([weight for _, weight in a.values()], 1)
    values = [np.stack([of[m][0] for m in names], 1) for of in (a, b)]
    means = [(v * weights).sum(0) / weights.sum(0) for v in values]
    low, high, p = paired_bootstrap(values[0], values[1], weights, resamples)
    return out + [
        Comparison(
            m, float(means[0][i]), float(means[1][i]), float(means[1][i] - means[0][i]), float(low[i]), float(high[i]),
            float(p[i]), int((weights[:, i] > 0).sum()), metrics.find(m).higher_is_better,
        )
        for i, m in enumerate(names)
    ]  # fmt: skip


def compare_resampled(
    metric: PairMetric, a: ScoredPairs, b: ScoredPairs, n_users: int, resamples: int
) -> Comparison | None:
    """Compare by a metric that resamples itself; None for another, or where it is undefined."""
    first, second = (metric.resampled(s, bootstrap_counts(n_users, resamples, 0)) for s in (a, b))
    if first is None or second is None:
        return None
    low, high, p = (float(x[0]) for x in percentile_interval((second - first)[:, None]))
    values, n = (metric.value(a), metric.value(b)), np.count_nonzero(counts(a.users, n_users))
    return Comparison(metric.name, *values, values[1] - values[0], low, high, p, int(n), metric.higher_is_better)


def _scatter(
    n: int, users: Shaped[Ints, "n"], values: Shaped[Doubles, "n"], weights: Shaped[Doubles, "n"]
) -> tuple[Shaped[Doubles, "U"], Shaped[Doubles, "U"]]:
    value, weight = np.zeros(n), np.zeros(n)
    value[users], weight[users] = values, weights
    return value, weight
