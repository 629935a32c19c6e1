"""Comparison of two models on the same queries by a paired bootstrap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from twotower.arrays.sets import places_of_rows
from twotower.arrays.types import Doubles, Ints
from twotower.data.dataset import Dataset
from twotower.data.pairs import Pairs
from twotower.evaluation.bootstrap import bootstrap_counts, paired_bootstrap, percentile_interval
from twotower.evaluation.factors import Factors
from twotower.evaluation.metrics import auc, auc_by_group, ranking_metrics
from twotower.evaluation.ranking import rank_catalogue


@dataclass(frozen=True)
class Comparison:
    """One metric of two runs A and B."""

    metric: str
    a: float
    b: float
    difference: float  # b - a
    low: float  # 95 % interval of the difference
    high: float
    p: float  # two-sided bootstrap p-value
    users: int  # test users on whom the metric is defined

    @property
    def verdict(self) -> str:
        """State which run is better; "no significant difference" if the interval contains zero."""
        if self.low > 0:
            return "B is better"
        return "A is better" if self.high < 0 else "no significant difference"


@dataclass(frozen=True)
class ComparisonData:
    """Evaluation data of both runs: user rows are 0..n_users-1, each with a test pair."""

    pairs: Pairs
    """Test pairs."""
    seen: Pairs
    """Pairs whose items are excluded from the rankings."""
    n_users: int


def compare_factors(
    a: Factors, b: Factors, data: ComparisonData, k: Sequence[int], resamples: int = 1000, seed: int = 0
) -> list[Comparison]:
    """Compare the vectors of A and B, whose rows are the users and items of `data`."""
    scores = [f.scores(data.pairs) for f in (a, b)]
    per_user = [_per_user(f, s, data, k) for f, s in zip((a, b), scores, strict=True)]
    names = list(per_user[0])
    n, positive = data.n_users, data.pairs.positive
    weights = np.stack([per_user[0][m][1] for m in names], 1) if names else np.zeros((n, 0))
    values = [np.stack([v[m][0] for m in names], 1) if names else np.zeros((n, 0)) for v in per_user]
    means = [(values[i] * weights).sum(0) / weights.sum(0) for i in (0, 1)]
    low, high, p = paired_bootstrap(values[0], values[1], weights, resamples, seed)
    out = [
        Comparison(
            m, float(means[0][i]), float(means[1][i]), float(means[1][i] - means[0][i]), float(low[i]), float(high[i]),
            float(p[i]), int((weights[:, i] > 0).sum()),
        )
        for i, m in enumerate(names)
    ]  # fmt: skip
    if positive.any() and not positive.all():
        first, second = (_bootstrap_auc(s, data, resamples, seed) for s in scores)
        bounds = [float(x[0]) for x in percentile_interval((second - first)[:, None])]
        aucs = [auc(s, positive) for s in scores]
        out.insert(0, Comparison("auc", aucs[0], aucs[1], aucs[1] - aucs[0], bounds[0], bounds[1], bounds[2], n))
    return out


def comparison_data(dataset: Dataset, users: Ints) -> ComparisonData:
    """Return the test data of some user rows, which become rows 0, 1, … in the given order."""
    user, item = places_of_rows(users, len(dataset.users)), np.arange(len(dataset.items))
    test, *seen = (p.renumbered(user, item) for p in (dataset.test, dataset.train, dataset.validation))
    return ComparisonData(test, Pairs.concatenated(seen), len(users))


def _per_user(
    factors: Factors, scores: npt.NDArray[np.float32], data: ComparisonData, k: Sequence[int]
) -> dict[str, tuple[Doubles, Doubles]]:
    """Return (values (n,), weights (n,)) of every metric over users; the weight is 0 where the metric is undefined."""
    n, pairs = data.n_users, data.pairs

    def scatter(users: Ints, values: Doubles, weights: npt.NDArray[np.number]) -> tuple[Doubles, Doubles]:
        value, weight = np.zeros(n), np.zeros(n)
        value[users], weight[users] = values, weights
        return value, weight

    out: dict[str, tuple[Doubles, Doubles]] = {}
    users, values, sizes = auc_by_group(scores, pairs.positive, pairs.user)
    if len(users):
        out["gauc"] = scatter(users, values, sizes)
    if not k:
        return out
    users, _, hit = rank_catalogue(factors.users, factors.items, pairs, [data.seen], max(k))
    n_targets = np.bincount(pairs.user[pairs.positive], minlength=n)[users]
    for cut in k if len(users) else ():
        for name, values in ranking_metrics(hit, n_targets, cut).items():
            out[f"{name}@{cut}"] = scatter(users, values, np.ones(len(users)))
    return out


def _bootstrap_auc(scores: npt.NDArray[np.float32], data: ComparisonData, resamples: int, seed: int) -> Doubles:
    """Return the AUC (resamples,) over the pairs of the drawn users; 0.5 where a class is missing."""
    positive = data.pairs.positive
    # Sorted once: a resample only changes the weights of the pairs.
    order = np.argsort(scores, kind="stable")
    lower, upper = order[~positive[order]], order[positive[order]]
    negative_user, positive_user = data.pairs.user[lower], data.pairs.user[upper]
    below = np.searchsorted(scores[lower], scores[upper], side="left")
    not_above = np.searchsorted(scores[lower], scores[upper], side="right")
    out = []
    for counts in bootstrap_counts(data.n_users, resamples, seed):
        for row in counts:
            under = np.concatenate([[0.0], np.cumsum(row[negative_user])])
            weight = row[positive_user]
            total = float(weight.sum() * under[-1])
            out.append(float(weight @ (under[below] + under[not_above])) / 2 / total if total else 0.5)
    return np.array(out)
