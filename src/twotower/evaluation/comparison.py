"""Comparison of two models on the same queries by a paired bootstrap."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from twotower.arrays.pieces import gathered, selected
from twotower.arrays.types import Doubles, Ints, Shaped
from twotower.data.pairs import GroupedPairs, Pairs, counts
from twotower.evaluation.bootstrap import bootstrap_counts, paired_bootstrap, percentile_interval
from twotower.evaluation.config import MetricSet, Repeats
from twotower.evaluation.factors import Factors
from twotower.evaluation.metrics.measured import RankedItems, ScoredPairs
from twotower.evaluation.metrics.metric import PairMetric
from twotower.evaluation.ranking import EvaluationQueries
from twotower.evaluation.table_slices import TableSlice

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
    scores = [f.scores(data.pairs) for f in (a, b)]
    scored = [ScoredPairs.of(s, data.pairs, data.weighted) for s in scores]
    out = [c for m in metrics.of_pairs if (c := compare_resampled(m, scored[0], scored[1], data.n_users, resamples))]
    best = [data.queries.top_k(f, max(k)) if k else None for f in (a, b)]
    first, second = (_per_user(s, found, data, k, metrics) for s, found in zip(scored, best, strict=True))
    out += _compare_per_user(first, second, data.n_users, metrics, resamples)
    for of in slices:
        keep = gathered(of.rows, data.pairs.user if of.side == "user" else data.pairs.item)
        pairs = data.pairs.take(keep)
        parts = [ScoredPairs.of(selected(s, keep), pairs, data.weighted) for s in scores]
        n_users = len(np.unique(parts[0].users))
        found = [
            replace(c, users=n_users)
            for m in metrics.of_pairs
            if of.side in m.slices and (c := compare_resampled(m, parts[0], parts[1], data.n_users, resamples))
        ]
        by_user = [_per_user(s, b, data, k[:1], metrics, of) for s, b in zip(parts, best, strict=True)]
        found += _compare_per_user(by_user[0], by_user[1], data.n_users, metrics, resamples)
        few = [c.users < slice_min_users for c in found]
        found = [replace(c, low=np.nan, high=np.nan, p=np.nan) if f else c for c, f in zip(found, few, strict=True)]
        out += [replace(c, of=of.name) for c in found]
    return out


def _compare_per_user(a: ByUser, b: ByUser, n_users: int, metrics: MetricSet, resamples: int) -> list[Comparison]:
    """Compare the values over users of every metric of A, which B has too, with the weights of A."""
    names, n = list(a), n_users
    weights = np.stack([a[m][1] for m in names], 1) if names else np.zeros((n, 0))
    values = [np.stack([v[m][0] for m in names], 1) if names else np.zeros((n, 0)) for v in (a, b)]
    means = [(values[i] * weights).sum(0) / weights.sum(0) for i in (0, 1)]
    low, high, p = paired_bootstrap(values[0], values[1], weights, resamples)
    return [
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
    values = metric.value(a), metric.value(b)
    return Comparison(metric.name, *values, values[1] - values[0], low, high, p, n_users, metric.higher_is_better)


def _per_user(
    scored: ScoredPairs,
    best: Shaped[Ints, "Q K"] | None,
    data: ComparisonData,
    k: Sequence[int],
    metrics: MetricSet,
    of: TableSlice | None = None,
) -> ByUser:
    """Return the values and weights of every metric over users: of scored pairs and of rankings, None without; of those
    in a slice."""
    by_user = {m.name: m.by_user(scored) for m in metrics.of_pairs if of is None or of.side in m.slices}
    out = {name: _scatter(data.n_users, *found) for name, found in by_user.items() if found and len(found.users)}
    return out if best is None else out | _of_rankings(best, data, k, metrics, of)


def _of_rankings(
    best: Shaped[Ints, "Q K"], data: ComparisonData, k: Sequence[int], metrics: MetricSet, of: TableSlice | None = None
) -> ByUser:
    """Return the values and weights of every metric of rankings over users; of the users in a slice, or with its items
    as the only targets."""
    queries, out = data.queries, ByUser()
    if of and of.side == "user":
        kept = of.rows[queries.users]
        queries, best = queries.take(kept), best[kept]
    users = queries.users
    rankings = queries.rankings(best, data.items, data.weighted)
    if of and of.side == "item":
        rankings = queries.among(rankings, of.rows, data.weighted)
        defined = rankings.n_targets > 0
        rankings, users = rankings.of_users(defined), users[defined]
    for cut in k if len(users) else ():
        for m in metrics.of_users:
            if of is not None and of.side not in m.slices:
                continue
            out[f"{m.name}@{cut}"] = _scatter(data.n_users, users, m.values(rankings.at(cut)), np.ones(len(users)))
    return out


def _scatter(
    n: int, users: Shaped[Ints, "n"], values: Shaped[Doubles, "n"], weights: Shaped[Doubles, "n"]
) -> tuple[Shaped[Doubles, "U"], Shaped[Doubles, "U"]]:
    value, weight = np.zeros(n), np.zeros(n)
    value[users], weight[users] = values, weights
    return value, weight
