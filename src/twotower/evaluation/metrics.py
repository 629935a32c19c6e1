"""Metrics of scores and rankings, and their intervals."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from twotower.arrays.types import Bools, Doubles, Ints


def metric_names(k: Iterable[int]) -> list[str]:
    """Return the names of the metrics of one part, without the part's name."""
    ranked = [f"{m}@{n}" for n in k for m in ("recall", "ndcg", "mrr", "hit_rate", "coverage")]
    return ["auc", "gauc", "log_loss", *ranked]


Metrics = dict[str, float]


def auc(scores: npt.NDArray[Any], positive: Bools) -> float:
    """Return the probability that a positive outranks a negative, ties counting half; NaN if a class is missing."""
    _, value, _ = auc_by_group(scores, positive, np.zeros(len(scores), np.int32))
    return float(value[0]) if len(value) else float("nan")


def auc_by_group(scores: npt.NDArray[Any], positive: Bools, group: npt.NDArray[Any]) -> tuple[Ints, Doubles, Ints]:
    """Return the groups with both classes (G,), rising, their AUC (G,) and their number of rows (G,)."""
    if not len(scores):
        return np.zeros(0, np.int64), np.zeros(0), np.zeros(0, np.int64)
    # Group, score and label in one uint64: sorting such keys is ten times as fast as an argsort.
    keys = (group.astype(np.uint64) << 33) | (_ordered_codes(scores).astype(np.uint64) << 1) | positive
    keys.sort()
    edges, ties = _run_edges(keys >> 33), _run_edges(keys >> 1)
    first, sizes = edges[:-1], np.diff(edges)
    positives = np.r_[0, np.cumsum(keys & 1, dtype=np.int64)]  # before each position
    n_pos = np.diff(positives[edges])
    # Twice the sum of the positives' mid-ranks, first over all rows, then within their group.
    ranks = (ties[:-1] + ties[1:] + 1) * np.diff(positives[ties])
    twice = np.add.reduceat(ranks, np.searchsorted(ties, first)) - n_pos * (2 * first + n_pos + 1)
    pairs = n_pos * (sizes - n_pos)
    both = pairs > 0
    return (keys[first[both]] >> 33).astype(np.int64), twice[both] / (2 * pairs[both]), sizes[both]


def _ordered_codes(scores: npt.NDArray[Any]) -> npt.NDArray[np.uint32]:
    """Map scores to uint32 codes with the same order and the same ties."""
    if scores.dtype != np.float32:
        return np.unique(scores, return_inverse=True)[1].astype(np.uint32)
    bits = (scores + np.float32(0)).view(np.int32)  # -0 becomes 0
    return (bits ^ ((bits >> 31) | np.int32(-(2**31)))).view(np.uint32)


def _run_edges(values: npt.NDArray[Any]) -> Ints:
    """Return the starts of the runs of equal values, and the end of the last run."""
    return np.flatnonzero(np.r_[True, values[1:] != values[:-1], True])


def gauc(scores: npt.NDArray[Any], positive: Bools, group: npt.NDArray[Any]) -> float:
    """Return the mean AUC of the groups (users), weighted by their rows; groups of one class are left out
    (Zhu et al. 2017, "Optimized Cost per Click in Taobao Display Advertising", section 4). NaN without a group."""
    _, values, sizes = auc_by_group(scores, positive, group)
    return float(np.average(values, weights=sizes)) if len(values) else float("nan")


def log_loss(logits: npt.NDArray[Any], positive: Bools) -> float:
    """Return the mean of -log p(label), p = sigmoid(logit); NaN without rows."""
    x = np.where(positive, -logits, logits).astype(np.float64)
    return float(np.logaddexp(0.0, x).mean()) if len(x) else float("nan")


def ranking_metrics(hit: Bools, n_targets: Ints, k: int) -> dict[str, Doubles]:
    """Return ranking metrics per user (Q,), from hits (Q, >= k) in rank order and the number of targets (Q,).

    recall = hits / targets; ndcg with gain 1 and discount log2(rank + 1), divided by that of the ideal ranking
    (Järvelin and Kekäläinen 2002); mrr = 1 / rank of the first hit, 0 without one; hit_rate = 1 with a hit. Only the
    first `k` ranks count.
    """
    top = hit[:, :k].astype(np.float64)
    discount = 1 / np.log2(np.arange(2, top.shape[1] + 2))
    ideal = np.cumsum(discount)[np.minimum(n_targets, top.shape[1]) - 1]
    any_hit = top.any(1)
    first = np.where(any_hit, top.argmax(1) + 1, 1)
    return {
        "recall": top.sum(1) / n_targets,
        "ndcg": (top * discount).sum(1) / ideal,
        "mrr": any_hit / first,
        "hit_rate": any_hit.astype(np.float64),
    }


def bootstrap(values: Doubles, weights: Doubles, resamples: int, seed: int = 0) -> tuple[Any, Any]:
    """Return the bounds of the 95 % percentile bootstrap interval (Efron and Tibshirani 1993, section 13.3) of the
    weighted mean of per-user values (n,) or (n, M), resampling users: two scalars, or two (M,). NaN without resamples.
    """
    if not resamples or not len(values):
        nothing = np.full(values.shape[1:], np.nan)
        return nothing, nothing
    rng = np.random.default_rng(seed)
    n, weighted = len(values), (values.T * weights).T
    means = []
    for _ in range(resamples):
        counts = np.bincount(rng.integers(0, n, n), minlength=n).astype(np.float64)
        means.append(counts @ weighted / (counts @ weights))
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    return low, high
