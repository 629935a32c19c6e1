"""Metric `auc`: the order of positives and negatives."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from twotower.arrays.pieces import PIECE_ROWS, gathered, is_constant, ones, pieces, selected, temporary_array
from twotower.arrays.types import Bools, Doubles, Floats, Ints, Numbers, Shaped, WholeNumbers
from twotower.evaluation.metrics.measured import ScoredPairs
from twotower.evaluation.metrics.metric import PairMetric, Prominence

_PLACE = np.uint64(0xFFFFFFFF)
"""Bits of the place in a key whose upper bits are another number."""


class Auc(PairMetric):
    """Area under the ROC curve: the probability that a positive pair of any user outranks a negative one, ties counting
    half. Undefined for one class.

    Use it where dislikes are observed, to see if a score tells them from likes.
    """

    kind = "auc"
    prominence = Prominence.EPOCH
    slices = ("user", "item")

    def value(self, pairs: ScoredPairs) -> float:
        """Return the area; NaN if a class is missing."""
        return auc(pairs.scores, pairs.positive, weights=pairs.weights)

    def resampled(self, pairs: ScoredPairs, draws: Iterable[Shaped[Doubles, "_ U"]]) -> Shaped[Doubles, "R"] | None:
        """Return the area over the pairs of the drawn users; 0.5 where a class is missing."""
        if not pairs.positive.any() or pairs.positive.all():
            return None
        # Ordered once: a resample only changes the weights of the pairs.
        ordered = _OrderedPairs.of(pairs)
        return np.array([ordered.weighted_auc(row) for block in draws for row in block])


def auc(
    scores: Shaped[Numbers, "n"],
    positive: Shaped[Bools, "n"],
    weights: Shaped[Floats, "_"] = ones(1),
    piece: int = PIECE_ROWS,
) -> float:
    """Return the probability that a positive outranks a negative, ties counting half, of pairs drawn by `weights`; NaN
    if a class is missing."""
    _, value, _ = auc_by_group(scores, positive, np.broadcast_to(np.int32(0), len(scores)), weights, piece)
    return float(value[0]) if len(value) else float("nan")


def auc_by_group(
    scores: Shaped[Numbers, "n"],
    positive: Shaped[Bools, "n"],
    group: Shaped[WholeNumbers, "n"],
    weights: Shaped[Floats, "_"] = ones(1),
    piece: int = PIECE_ROWS,
) -> tuple[Shaped[Ints, "G"], Shaped[Doubles, "G"], Shaped[Numbers, "G"]]:
    """Return the groups with both classes, rising, their AUC and the sum of the weights of their rows. One weight
    stands for all. Rows are read `piece` at a time; their sorted keys are a temporary array."""
    if not len(scores):
        return np.zeros(0, np.int64), np.zeros(0), np.zeros(0, np.int64)
    weights = np.broadcast_to(weights, len(scores))
    if is_constant(weights):
        units = np.broadcast_to(1.0, (2, int(group.max()) + 1))
        rows = _sorted_rows(scores, positive, group, piece)
    else:
        # Powers of 2, which change no digit.
        units = np.ldexp(1.0, np.frexp(_class_weights(positive, group, weights, piece))[1])
        rows = _sorted_weighted_rows(scores, positive, group, weights, units, piece)
    sums, before = list[list[Shaped[Any, "_"]]](), 0
    for ties in _tied_runs(rows):
        # Twice the weight of the negatives that each positive outranks, of all groups so far.
        wins = ties.positives * (2 * (before + np.cumsum(ties.negatives)) - ties.negatives)
        sums.append(_sums_by_run((ties.codes >> 32).astype(np.int64), ties.positives, ties.negatives, wins))
        before += ties.negatives.sum()
    groups, positives, negatives, wins = _sums_by_run(*(np.concatenate(column) for column in zip(*sums, strict=True)))
    # Within the group of the positives.
    wins -= positives * 2 * (np.cumsum(negatives) - negatives)
    n_pairs = positives * negatives
    both = n_pairs > 0
    sizes = negatives * units[0, groups] + positives * units[1, groups]
    return groups[both], np.clip(wins[both] / (2 * n_pairs[both]), 0, 1), sizes[both]


def _class_weights(
    positive: Shaped[Bools, "n"], group: Shaped[WholeNumbers, "n"], weights: Shaped[Floats, "n"], piece: int
) -> Shaped[Doubles, "2 G"]:
    """Return the weight of the negatives and that of the positives of each group 0..G-1."""
    totals = np.zeros((2, int(group.max()) + 1))
    for part in pieces(len(group), piece):
        np.add.at(totals, (positive[part].astype(np.int64), group[part]), weights[part])
    return totals


def _sums_by_run(keys: Shaped[Ints, "n"], *columns: Shaped[Numbers, "n"]) -> list[Shaped[Any, "r"]]:
    """Return the key of each run of equal keys, and the sums of the columns over the run."""
    first = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]])
    return [keys[first], *(np.add.reduceat(column, first) for column in columns)]


class _Rows(NamedTuple):
    """Sorted rows, or runs of rows of one group and score each."""

    codes: Shaped[WholeNumbers, "n"]
    """Group in the upper 32 bits, score below."""
    positives: Shaped[Numbers, "n"]
    """Number or weight of the positives of each."""
    negatives: Shaped[Numbers, "n"]

    def part(self, rows: slice) -> _Rows:
        """Return some of the rows."""
        return _Rows(self.codes[rows], self.positives[rows], self.negatives[rows])


def _sorted_rows(
    scores: Shaped[Numbers, "n"], positive: Shaped[Bools, "n"], group: Shaped[WholeNumbers, "n"], piece: int
) -> Iterator[_Rows]:
    """Yield the rows by group and score, a piece at a time."""
    # Group, score and label in one uint64: sorting such keys is ten times as fast as an argsort.
    keys = temporary_array(len(scores), np.uint64)
    codes = None if scores.dtype == np.float32 else ordered_codes(scores)
    for part in pieces(len(scores), piece):
        code = ordered_codes(scores[part]) if codes is None else codes[part]
        keys[part] = (group[part].astype(np.uint64) << 33) | (code.astype(np.uint64) << 1) | positive[part]
    keys.sort()
    for part in pieces(len(keys), piece):
        labels = (keys[part] & 1).astype(np.int64)
        yield _Rows(keys[part] >> 1, labels, 1 - labels)


def _sorted_weighted_rows(
    scores: Shaped[Numbers, "n"], positive: Shaped[Bools, "n"], group: Shaped[WholeNumbers, "n"],
    weights: Shaped[Floats, "n"],
    units: Shaped[Doubles, "2 G"], piece: int,
) -> Iterator[_Rows]:  # fmt: skip
    """Yield the rows by group and score, a piece at a time, with their weights in the `units` of the negatives and the
    positives of each group. In units near the weight of all of them no group is lost in sums over several."""
    by_score = _places_by_score(scores, piece)
    order = temporary_array(len(scores), np.uint64)  # group, place in `by_score`
    for part in pieces(len(scores), piece):
        rank = np.arange(part.start, part.stop, dtype=np.uint64)
        order[part] = (group[by_score[part] & _PLACE].astype(np.uint64) << 32) | rank
    order.sort()
    for part in pieces(len(scores), piece):
        found = by_score[order[part] & _PLACE]
        place = found & _PLACE
        label = positive[place]
        weight = weights[place] / units[label.astype(np.int64), group[place]]
        yield _Rows((order[part] & ~_PLACE) | (found >> 32), weight * label, weight * ~label)


def _places_by_score(scores: Shaped[Numbers, "n"], piece: int = PIECE_ROWS) -> Shaped[WholeNumbers, "n"]:
    """Return a temporary array by rising score, with the code of the score in the upper 32 bits and the place of the
    row below."""
    order = temporary_array(len(scores), np.uint64)
    codes = None if scores.dtype == np.float32 else ordered_codes(scores)
    for part in pieces(len(scores), piece):
        code = ordered_codes(scores[part]) if codes is None else codes[part]
        order[part] = (code.astype(np.uint64) << 32) | np.arange(part.start, part.stop, dtype=np.uint64)
    order.sort()
    return order


def _tied_runs(rows: Iterable[_Rows]) -> Iterator[_Rows]:
    """Yield the runs of equal group and score in sorted rows, each run once, in order."""
    last: _Rows | None = None
    for some in rows:
        first = np.flatnonzero(np.r_[True, some.codes[1:] != some.codes[:-1]])
        ties = _Rows(some.codes[first], np.add.reduceat(some.positives, first), np.add.reduceat(some.negatives, first))
        if last:
            if last.codes[0] == ties.codes[0]:
                ties.positives[0] += last.positives[0]
                ties.negatives[0] += last.negatives[0]
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
    negative_weights: Shaped[Floats, "n"]
    positive_weights: Shaped[Floats, "m"]
    weight_before: Shaped[Doubles, "n1"]
    """Sum of the weights of the negatives before each place, overwritten by each AUC."""

    @classmethod
    def of(cls, pairs: ScoredPairs) -> _OrderedPairs:
        """Order the pairs."""
        order = _places_by_score(pairs.scores)
        positive = temporary_array(len(order), np.bool_)
        for part in pieces(len(order)):
            positive[part] = pairs.positive[order[part] & _PLACE]
        upper = selected(order, positive)
        lower = selected(order, np.logical_not(positive, out=positive))
        below, not_above = temporary_array(len(upper), np.int64), temporary_array(len(upper), np.int64)
        for part in pieces(len(upper)):
            below[part] = np.searchsorted(lower, upper[part] & ~_PLACE)
            not_above[part] = np.searchsorted(lower, upper[part] | _PLACE)
        for places in (lower, upper):
            np.bitwise_and(places, _PLACE, out=places)
        return cls(
            gathered(pairs.users, lower), gathered(pairs.users, upper), below, not_above,
            gathered(pairs.weights, lower), gathered(pairs.weights, upper), temporary_array(len(lower) + 1, np.float64),
        )  # fmt: skip

    def weighted_auc(self, weights: Shaped[Doubles, "U"]) -> float:
        """Return the area with the weight of each user; 0.5 where a class has no weight."""
        under, n = self.weight_before, 0.0
        under[0] = 0
        for part in pieces(len(self.negative_users)):
            summed = np.cumsum(weights[self.negative_users[part]] * self.negative_weights[part])
            under[part.start + 1 : part.stop + 1] = summed + n
            n += float(summed[-1])
        total, wins = 0.0, 0.0
        for part in pieces(len(self.positive_users)):
            weight = weights[self.positive_users[part]] * self.positive_weights[part]
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
