"""Positives of some users are rows of the matrix of all."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from twotower.arrays.ragged import offsets_of
from twotower.scorers.positives import PositiveMatrix, PositiveSequences


def matrix(weighted: bool) -> PositiveMatrix:
    """Rows of 0 to 6 values, and twice as many in the sequences."""
    rng, lengths = np.random.default_rng(1), np.arange(50) % 7
    n = int(lengths.sum())
    told = PositiveSequences(
        rng.integers(1, 9, 2 * n).astype(np.int32),
        2 * lengths,
        np.arange(2.0 * n, dtype=np.float32) if weighted else None,
    )
    columns = np.concatenate([np.sort(rng.choice(9, size, replace=False)) for size in lengths])
    return PositiveMatrix(columns.astype(np.int32), offsets_of(lengths), rng.random(n).astype(np.float32), 10, told)


def dense(of: PositiveMatrix) -> np.ndarray:
    out = np.zeros((len(of), of.n_columns), np.float32)
    out[of.owners, of.columns] = of.values
    return out


@pytest.mark.parametrize("weighted", [True, False])
def test_of_rows_keeps_some_rows_and_their_sequences(weighted: bool) -> None:
    every, rows = matrix(weighted), np.arange(50) % 3 == 0
    few = every.of_rows(rows)
    assert (dense(few) == np.where(rows[:, None], dense(every), 0)).all()
    assert every.histories
    assert few.histories
    begins = np.append(0, np.cumsum(every.histories.lengths))
    places = np.concatenate([np.arange(begins[row], begins[row + 1]) for row in np.flatnonzero(rows)])
    assert (few.histories.codes == every.histories.codes[places]).all()
    assert (few.histories.lengths == np.where(rows, every.histories.lengths, 0)).all()
    if every.histories.weights is None:
        assert few.histories.weights is None
    else:
        assert few.histories.weights is not None
        assert (few.histories.weights == every.histories.weights[places]).all()


@pytest.mark.parametrize("n", [1, 20, 80, 149])
def test_rows_are_drawn_whole_and_hold_as_many_values_as_asked_at_most(n: int) -> None:
    every = matrix(False)
    assert len(every.values) == 147
    few = every.drawn(n, 3)
    if n > 147:
        assert few is every
        return
    assert 1 <= len(few.values) <= max(n, 6)
    assert len(few.values) > n - 7 or n < 7
    lengths = np.diff(few.offsets)
    assert (lengths[lengths > 0] == np.diff(every.offsets)[lengths > 0]).all()
    assert (dense(every.drawn(n, 3)) == dense(few)).all()
    if n > 7:
        assert (dense(every.drawn(n, 4)) != dense(few)).any()


def test_what_was_made_of_all_rows_is_not_that_of_some() -> None:
    every = replace(matrix(False))
    assert every.once("x", lambda: 1) == 1
    assert every.of_rows(np.ones(50, bool)).once("x", lambda: 2) == 2
