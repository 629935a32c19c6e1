"""Metric `auc`: the order of positives and negatives."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from twotower.arrays.types import Bools, Doubles, Ints, Numbers, Shaped, WholeNumbers
from twotower.evaluation.metrics.measured import ScoredPairs
from twotower.evaluation.metrics.metric import PairMetric, Prominence


class Auc(PairMetric):
    """Area under the ROC curve: the probability that a positive pair of any user outranks a negative one, ties counting half.
    Undefined for one class.

    Use it where dislikes are observed, to see if a score tells them from likes.
    """

    kind = "auc"
    prominence = Prominence.EPOCH
    slices = ("user", "item")

    def value(self, pairs: ScoredPairs) -> float:
        """Return the area; NaN if a class is missing."""
        return auc(pairs.scores, pairs.positive)

    def resampled(self, pairs: ScoredPairs, draws: Iterable[Shaped[Doubles, "_ U"]]) -> Shaped[Doubles, "R"] | None:
        """Return the area over the pairs of the drawn users; 0.5 where a class is missing."""
        scores, positive, users = pairs.scores, pairs.positive, pairs.users
        if not positive.any() or positive.all():
            return None
        # Sorted once: a resample only changes the weights of the pairs.
        order = np.argsort(scores, kind="stable")
        lower, upper = order[~positive[order]], order[positive[order]]
        negative_user, positive_user = users[lower], users[upper]
        below = np.searchsorted(scores[lower], scores[upper], side="left")
        not_above = np.searchsorted(scores[lower], scores[upper], side="right")
        out = []
        for row in (row for block in draws for row in block):
            under = np.concatenate([[0.0], np.cumsum(row[negative_user])])
            weight = row[positive_user]
            total = float(weight.sum() * under[-1])
            out.append(float(weight @ (under[below] + under[not_above])) / 2 / total if total else 0.5)
        return np.array(out)


def auc(scores: Shaped[Numbers, "n"], positive: Shaped[Bools, "n"]) -> float:
    """Return the probability that a positive outranks a negative, ties counting half; NaN if a class is missing."""
    _, value, _ = auc_by_group(scores, positive, np.zeros(len(scores), np.int32))
    return float(value[0]) if len(value) else float("nan")


def auc_by_group(
    scores: Shaped[Numbers, "n"], positive: Shaped[Bools, "n"], group: Shaped[WholeNumbers, "n"]
) -> tuple[Shaped[Ints, "G"], Shaped[Doubles, "G"], Shaped[Ints, "G"]]:
    """Return the groups with both classes, rising, their AUC and their number of rows."""
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


def ordered_codes(scores: Shaped[Numbers, "*n"]) -> Shaped[WholeNumbers, "*n"]:
    """Map scores to uint32 codes with the same order and the same ties."""
    if scores.dtype != np.float32:
        return np.unique(scores, return_inverse=True)[1].astype(np.uint32)
    bits = (scores + np.float32(0)).view(np.int32)  # -0 becomes 0
    return (bits ^ ((bits >> 31) | np.int32(-(2**31)))).view(np.uint32)


def _run_edges(values: Shaped[WholeNumbers, "n"]) -> Shaped[Ints, "e"]:
    """Return the starts of the runs of equal values, and the end of the last run."""
    return np.flatnonzero(np.r_[True, values[1:] != values[:-1], True])
