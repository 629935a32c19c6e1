"""Metric `auc`: the order of positives and negatives."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from twotower.arrays.pieces import PIECE_ROWS, pieces, selected, temporary_array
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
        if not pairs.positive.any() or pairs.positive.all():
            return None
        # Ordered once: a resample only changes the weights of the pairs.
        ordered = _OrderedPairs.of(pairs)
        return np.array([ordered.weighted_auc(row) for block in draws for row in block])


def auc(scores: Shaped[Numbers, "n"], positive: Shaped[Bools, "n"], piece: int = PIECE_ROWS) -> float:
    """Return the probability that a positive outranks a negative, ties counting half; NaN if a class is missing."""
    _, value, _ = auc_by_group(scores, positive, np.broadcast_to(np.int32(0), len(scores)), piece)
    return float(value[0]) if len(value) else float("nan")


def auc_by_group(
    scores: Shaped[Numbers, "n"],
    positive: Shaped[Bools, "n"],
    group: Shaped[WholeNumbers, "n"],
    piece: int = PIECE_ROWS,
) -> tuple[Shaped[Ints, "G"], Shaped[Doubles, "G"], Shaped[Ints, "G"]]:
    """Return the groups with both classes, rising, their AUC and their number of rows. Rows are read `piece` at a time;
    their sorted keys are a temporary array."""
    if not len(scores):
        return np.zeros(0, np.int64), np.zeros(0), np.zeros(0, np.int64)
    # Group, score and label in one uint64: sorting such keys is ten times as fast as an argsort.
    keys = temporary_array(len(scores), np.uint64)
    codes = None if scores.dtype == np.float32 else ordered_codes(scores)
    for part in pieces(len(scores), piece):
        code = ordered_codes(scores[part]) if codes is None else codes[part]
        keys[part] = (group[part].astype(np.uint64) << 33) | (code.astype(np.uint64) << 1) | positive[part]
    keys.sort()
    sums, start = [], 0
    for ties in _tied_runs(keys, piece):
        ends = start + np.cumsum(ties.rows)
        # Twice the mid-ranks of the positives over all rows.
        ranks = (2 * ends - ties.rows + 1) * ties.positives
        sums.append(_sums_by_run((ties.codes >> 32).astype(np.int64), ties.rows, ties.positives, ranks))
        start = int(ends[-1])
    groups, rows, positives, ranks = _sums_by_run(*(np.concatenate(column) for column in zip(*sums, strict=True)))
    # Within the group of the positives.
    ranks -= positives * (2 * (np.cumsum(rows) - rows) + positives + 1)
    n_pairs = positives * (rows - positives)
    both = n_pairs > 0
    return groups[both], ranks[both] / (2 * n_pairs[both]), rows[both]


def _sums_by_run(keys: Shaped[Ints, "n"], *columns: Shaped[Ints, "n"]) -> list[Shaped[Ints, "r"]]:
    """Return the key of each run of equal keys, and the sums of the columns over the run."""
    first = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]])
    return [keys[first], *(np.add.reduceat(column, first) for column in columns)]


class _Ties(NamedTuple):
    """Rows of one group and score each."""

    codes: Shaped[WholeNumbers, "T"]
    """Group in the upper 32 bits, score below."""
    rows: Shaped[Ints, "T"]
    positives: Shaped[Ints, "T"]

    def part(self, runs: slice) -> _Ties:
        """Return some of the runs."""
        return _Ties(self.codes[runs], self.rows[runs], self.positives[runs])


def _tied_runs(keys: Shaped[WholeNumbers, "n"], piece: int) -> Iterator[_Ties]:
    """Yield the runs of equal group and score in sorted keys, each run once, in order."""
    last: _Ties | None = None
    for part in pieces(len(keys), piece):
        codes, labels = keys[part] >> 1, (keys[part] & 1).astype(np.int64)
        first = np.flatnonzero(np.r_[True, codes[1:] != codes[:-1]])
        ties = _Ties(codes[first], np.diff(first, append=len(codes)), np.add.reduceat(labels, first))
        if last:
            if last.codes[0] == ties.codes[0]:
                ties.rows[0] += last.rows[0]
                ties.positives[0] += last.positives[0]
            else:
                yield last
        if len(first) > 1:
            yield ties.part(slice(None, -1))
        last = ties.part(slice(-1, None))
    if last:
        yield last


@dataclass(frozen=True)
class _OrderedPairs:
    """Pairs by rising score, for weighted AUCs; n negatives and m positives in temporary arrays."""

    negative_users: Shaped[WholeNumbers, "n"]
    positive_users: Shaped[WholeNumbers, "m"]
    below: Shaped[Ints, "m"]
    """Number of negatives with a lower score than each positive."""
    not_above: Shaped[Ints, "m"]
    """Number of negatives with a score that is not higher."""
    weight_before: Shaped[Doubles, "n1"]
    """Sum of the weights of the negatives before each place, overwritten by each AUC."""

    @classmethod
    def of(cls, pairs: ScoredPairs) -> _OrderedPairs:
        """Order the pairs."""
        n = len(pairs.scores)
        order = temporary_array(n, np.uint64)  # score, place in the pairs
        codes = None if pairs.scores.dtype == np.float32 else ordered_codes(pairs.scores)
        for part in pieces(n):
            code = ordered_codes(pairs.scores[part]) if codes is None else codes[part]
            order[part] = (code.astype(np.uint64) << 32) | np.arange(part.start, part.stop, dtype=np.uint64)
        order.sort()
        positive = temporary_array(n, np.bool_)
        users = temporary_array(n, pairs.users.dtype.type)
        scores = temporary_array(n, np.uint32)
        for part in pieces(n):
            place = order[part] & np.uint64(0xFFFFFFFF)
            positive[part], users[part], scores[part] = pairs.positive[place], pairs.users[place], order[part] >> 32
        upper, upper_users = selected(scores, positive), selected(users, positive)
        np.logical_not(positive, out=positive)
        lower, lower_users = selected(scores, positive), selected(users, positive)
        below, not_above = temporary_array(len(upper), np.int64), temporary_array(len(upper), np.int64)
        for part in pieces(len(upper)):
            below[part] = np.searchsorted(lower, upper[part], side="left")
            not_above[part] = np.searchsorted(lower, upper[part], side="right")
        return cls(lower_users, upper_users, below, not_above, temporary_array(len(lower) + 1, np.float64))

    def weighted_auc(self, weights: Shaped[Doubles, "U"]) -> float:
        """Return the area with the weight of each user; 0.5 where a class has no weight."""
        under, n = self.weight_before, 0.0
        under[0] = 0
        for part in pieces(len(self.negative_users)):
            summed = np.cumsum(weights[self.negative_users[part]])
            under[part.start + 1 : part.stop + 1] = summed + n
            n += float(summed[-1])
        total, wins = 0.0, 0.0
        for part in pieces(len(self.positive_users)):
            weight = weights[self.positive_users[part]]
            total += float(weight.sum())
            wins += float(weight @ (under[self.below[part]] + under[self.not_above[part]]))
        return wins / 2 / (total * n) if total * n else 0.5


def ordered_codes(scores: Shaped[Numbers, "*n"]) -> Shaped[WholeNumbers, "*n"]:
    """Map scores to uint32 codes with the same order and the same ties; uint32 scores are such codes."""
    if scores.dtype == np.uint32:
        return scores.view(np.uint32)
    if scores.dtype != np.float32:
        return np.unique(scores, return_inverse=True)[1].astype(np.uint32)
    bits = (scores + np.float32(0)).view(np.int32)  # -0 becomes 0
    return (bits ^ ((bits >> 31) | np.int32(-(2**31)))).view(np.uint32)
