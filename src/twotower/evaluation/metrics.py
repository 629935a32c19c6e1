"""Metrics of scores and rankings, and the registry that says of each its name, function, direction and prominence."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import KW_ONLY, dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from twotower.arrays.types import Bools, Doubles, Ints, Shaped

Metrics = dict[str, float]
Scores = npt.NDArray[np.floating | np.integer]
Groups = npt.NDArray[np.integer]


class Prominence(IntEnum):
    """The tables that show a metric; a table shows all metrics down to its own level."""

    EPOCH = 1
    """The line of an epoch, and the learning curves."""
    SERVED = 2
    """The table of a bundle's metrics by way of search."""
    REPORT = 3
    """The table of a run's metrics beside the baselines."""
    FILE = 4
    """metrics.json only."""


@dataclass(frozen=True)
class Metric:
    """An entry of the registry, of any family."""

    name: str
    prominence: Prominence
    _: KW_ONLY
    higher_is_better: bool = True


@dataclass(frozen=True)
class PairMetric(Metric):
    """A metric of scores (n,), labels (n,) and users (n,) of pairs."""

    function: Callable[[Scores, Bools, Groups], float]


@dataclass(frozen=True)
class RankingMetric(Metric):
    """A metric (Q,) of hits (Q, k) in rank order and numbers of targets (Q,); its mean over users is reported."""

    function: Callable[[Bools, Ints], Doubles]


@dataclass(frozen=True)
class CatalogueMetric(Metric):
    """A metric of best item rows (Q, k), -1 for none, and the number of items."""

    function: Callable[[Ints, int], float]


def metric_names(k: Iterable[int], prominence: Prominence = Prominence.FILE) -> list[str]:
    """Return the names of the metrics down to a level of prominence, without the part's name: auc, …, recall@10, …"""
    of_pairs = [m.name for m in PAIR_METRICS if m.prominence <= prominence]
    of_rankings = [m.name for m in (*RANKING_METRICS, *CATALOGUE_METRICS) if m.prominence <= prominence]
    return of_pairs + [f"{name}@{n}" for n in k for name in of_rankings]


def find_metric(name: str) -> Metric:
    """Return the entry of a metric by a name such as recall@10 or validation.recall@10. Raises KeyError if unknown."""
    return _BY_NAME[name.rpartition(".")[2].partition("@")[0]]


def is_pair_metric(name: str) -> bool:
    """Return True for a metric of scored pairs, such as validation.auc; False for one of rankings."""
    return isinstance(find_metric(name), PairMetric)


def auc(scores: Scores, positive: Bools) -> float:
    """Return the probability that a positive outranks a negative, ties counting half; NaN if a class is missing."""
    _, value, _ = auc_by_group(scores, positive, np.zeros(len(scores), np.int32))
    return float(value[0]) if len(value) else float("nan")


def auc_by_group(scores: Scores, positive: Bools, group: Groups) -> tuple[Ints, Doubles, Ints]:
    """Return the groups with both classes (G,), rising, their AUC (G,) and their number of rows (G,)."""
    if not len(scores):
        return np.zeros(0, np.int64), np.zeros(0), np.zeros(0, np.int64)
    # Group, score and label in one uint64: sorting such keys is ten times as fast as an argsort.
    keys = (group.astype(np.uint64) << 33) | (ordered_codes(scores).astype(np.uint64) << 1) | positive
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


def ordered_codes(scores: Scores) -> npt.NDArray[np.uint32]:
    """Map scores to uint32 codes with the same order and the same ties."""
    if scores.dtype != np.float32:
        return np.unique(scores, return_inverse=True)[1].astype(np.uint32)
    bits = (scores + np.float32(0)).view(np.int32)  # -0 becomes 0
    return (bits ^ ((bits >> 31) | np.int32(-(2**31)))).view(np.uint32)


def _run_edges(values: npt.NDArray[np.integer]) -> Ints:
    """Return the starts of the runs of equal values, and the end of the last run."""
    return np.flatnonzero(np.r_[True, values[1:] != values[:-1], True])


def gauc(scores: Scores, positive: Bools, group: Groups) -> float:
    """Return the mean AUC of the groups (users), weighted by their rows; groups of one class are left out
    (Zhu et al. 2017, "Optimized Cost per Click in Taobao Display Advertising", section 4). NaN without a group."""
    _, values, sizes = auc_by_group(scores, positive, group)
    return float(np.average(values, weights=sizes)) if len(values) else float("nan")


def log_loss(logits: Scores, positive: Bools) -> float:
    """Return the mean of -log p(label), p = sigmoid(logit); NaN without rows."""
    x = np.where(positive, -logits, logits).astype(np.float64)
    return float(np.logaddexp(0.0, x).mean()) if len(x) else float("nan")


def recall(hit: Shaped[Bools, "Q k"], n_targets: Shaped[Ints, Q]) -> Shaped[Doubles, Q]:
    """Return hits / targets (Q,)."""
    n_hits: Ints = hit.sum(1)
    return n_hits / n_targets


def ndcg(hit: Bools, n_targets: Ints) -> Doubles:
    """Return the discounted gain (Q,) with gain 1 and discount log2(rank + 1), divided by that of the ideal ranking
    (Järvelin and Kekäläinen 2002)."""
    discount = 1 / np.log2(np.arange(2, hit.shape[1] + 2))
    ideal = np.cumsum(discount)[np.minimum(n_targets, hit.shape[1]) - 1]
    gain: Doubles = (hit * discount).sum(1) / ideal
    return gain


def mrr(hit: Bools, n_targets: Ints) -> Doubles:
    """Return 1 / rank of the first hit (Q,), 0 without one."""
    rank: Ints = np.where(hit.any(1), hit.argmax(1) + 1, 1)
    return hit_rate(hit, n_targets) / rank


def hit_rate(hit: Bools, n_targets: Ints) -> Doubles:
    """Return 1 with a hit, else 0 (Q,)."""
    found: Doubles = hit.max(1, initial=False).astype(np.float64)
    return found


def coverage(best: Ints, n_items: int) -> float:
    """Return the share of the catalogue that is in a ranking of `best` (Q, k); -1 stands for no item."""
    covered = np.zeros(n_items + 1, bool)
    covered[best] = True  # -1 is the last entry
    return float(covered[:-1].sum() / n_items)


PAIR_METRICS = (
    PairMetric("auc", Prominence.EPOCH, lambda scores, positive, _: auc(scores, positive)),
    PairMetric("gauc", Prominence.EPOCH, gauc),
    PairMetric(
        "log_loss", Prominence.FILE, lambda logits, positive, _: log_loss(logits, positive), higher_is_better=False
    ),
)
RANKING_METRICS = (
    RankingMetric("recall", Prominence.EPOCH, recall),
    RankingMetric("ndcg", Prominence.EPOCH, ndcg),
    RankingMetric("mrr", Prominence.REPORT, mrr),
    RankingMetric("hit_rate", Prominence.SERVED, hit_rate),
)
CATALOGUE_METRICS = (CatalogueMetric("coverage", Prominence.REPORT, coverage),)
_BY_NAME: dict[str, Metric] = {m.name: m for m in (*PAIR_METRICS, *RANKING_METRICS, *CATALOGUE_METRICS)}


def ranking_metrics(hit: Bools, n_targets: Ints, k: int) -> dict[str, Doubles]:
    """Return the ranking metrics (Q,) by name, from hits (Q, >= k) in rank order and the number of targets (Q,). Only the
    first `k` ranks count."""
    return {m.name: m.function(hit[:, :k], n_targets) for m in RANKING_METRICS}
