"""Percentile bootstrap over users (Efron and Tibshirani 1993, section 13.3)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from twotower.arrays.types import Doubles, Shaped

COUNTS_PER_BLOCK = 2**20
"""Counts (resamples x users) that one block of the bootstrap holds."""


def bootstrap(
    values: Shaped[Doubles, "n *M"], weights: Shaped[Doubles, "n"], resamples: int, seed: int = 0
) -> tuple[Shaped[Doubles, "*M"], Shaped[Doubles, "*M"]]:
    """Return the bounds of the 95 % percentile bootstrap interval (Efron and Tibshirani 1993, section 13.3) of the
    weighted mean of the values of n users, resampling users. NaN without resamples.
    """
    if not resamples or not len(values):
        nothing = np.full(values.shape[1:], np.nan)
        return nothing, nothing
    weighted, draws = (values.T * weights).T, bootstrap_counts(len(values), resamples, seed)
    means = [counts @ weighted / (counts @ weights) for block in draws for counts in block]
    bounds = np.quantile(means, [0.025, 0.975], axis=0)
    return bounds[0, ...], bounds[1, ...]


def paired_bootstrap(
    a: Shaped[Doubles, "n M"],
    b: Shaped[Doubles, "n M"],
    weights: Shaped[Doubles, "n M"],
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[Shaped[Doubles, "M"], Shaped[Doubles, "M"], Shaped[Doubles, "M"]]:
    """Return low, high and p: the 95 % percentile interval of mean(b) - mean(a) over resampled users, and the
    two-sided p-value, twice the share of resamples at or beyond zero.

    Of n users and M metrics. The means are weighted; a user with weight 0 has no value.
    """
    difference = (b - a) * weights
    out = []
    for counts in bootstrap_counts(len(a), resamples, seed):
        total = counts @ weights
        with np.errstate(invalid="ignore", divide="ignore"):
            out.append(np.where(total > 0, (counts @ difference) / total, 0.0))
    return percentile_interval(np.concatenate(out))


def bootstrap_counts(n: int, resamples: int, seed: int) -> Iterator[Shaped[Doubles, "r U"]]:
    """Yield blocks of how often each resample draws each of n users, `resamples` rows in all."""
    rng = np.random.default_rng(seed)
    step = max(1, COUNTS_PER_BLOCK // n)
    for start in range(0, resamples, step):
        r = min(step, resamples - start)
        drawn = rng.integers(0, n, (r, n)) + np.arange(r)[:, None] * n
        yield np.bincount(drawn.ravel(), minlength=r * n).reshape(r, n).astype(np.float64)


def percentile_interval(
    differences: Shaped[Doubles, "R M"],
) -> tuple[Shaped[Doubles, "M"], Shaped[Doubles, "M"], Shaped[Doubles, "M"]]:
    """Return low, high and p of the differences in R resamples."""
    low, high = np.quantile(differences, [0.025, 0.975], axis=0)
    # The observed difference counts as one resample, so that no p-value is 0 (Davison and Hinkley 1997, section 4.2.3).
    p = 2 * (np.minimum((differences <= 0).sum(0), (differences >= 0).sum(0)) + 1) / (len(differences) + 1)
    return low, high, np.minimum(p, 1.0)
