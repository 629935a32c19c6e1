"""Rows of different lengths against lists of lists."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from twotower.arrays.ragged import Ragged, offsets_of, row_of, run_indices, stable_order

quick = settings(deadline=None, max_examples=60)
LISTS = st.lists(st.lists(st.integers(0, 99), max_size=6), min_size=1, max_size=8)


def ragged(rows: list[list[int]]) -> Ragged:
    values = np.array([v for row in rows for v in row], np.int32)
    return Ragged(values, offsets_of(np.array([len(row) for row in rows], np.int64)), np.arange(len(values)))


def lists(of: Ragged) -> list[list[int]]:
    assert of.offsets[0] == 0
    assert of.offsets[-1] == len(of.values)
    return [of.row(r).tolist() for r in range(len(of))]


@quick
@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 5)), max_size=9))
def test_run_indices_are_ranges_one_after_another(runs: list[tuple[int, int]]) -> None:
    starts, lengths = (np.array([run[i] for run in runs], np.int64) for i in (0, 1))
    found = run_indices(starts, lengths)
    assert found.dtype == np.int64
    assert found.tolist() == [i for start, n in runs for i in range(start, start + n)]


@quick
@given(LISTS, st.data())
def test_rows_are_taken_in_any_order_and_with_repeats(rows: list[list[int]], data: st.DataObject) -> None:
    picked = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=9))
    assert lists(ragged(rows).take(np.array(picked, np.int64))) == [rows[r] for r in picked]


@quick
@given(LISTS, st.integers(0, 9), st.integers(0, 9))
def test_consecutive_rows_are_those_of_a_slice(rows: list[list[int]], start: int, stop: int) -> None:
    assert lists(ragged(rows).part(slice(start, stop))) == rows[start:stop]


@quick
@given(LISTS, st.integers(0, 4))
def test_each_row_keeps_its_last_values(rows: list[list[int]], n: int) -> None:
    kept = ragged(rows).keep_last(n)
    assert lists(kept) == [row[-n:] for row in rows]
    assert kept.source is not None
    assert kept.values.tolist() == ragged(rows).values[kept.source].tolist()


@quick
@given(LISTS)
def test_pairs_are_grouped_by_row_in_their_order(rows: list[list[int]]) -> None:
    whole = ragged(rows)
    assert whole.owners.tolist() == [r for r, row in enumerate(rows) for _ in row]
    backwards = Ragged.from_pairs(whole.owners[::-1], whole.values[::-1], len(rows), np.arange(len(whole.values))[::-1])
    assert lists(backwards) == [row[::-1] for row in rows]


def test_one_row_of_a_column_is_an_array_of_its_values() -> None:
    assert row_of(ragged([[1, 2], [3]]), 0).tolist() == [1, 2]
    assert row_of(np.array([4, 5], np.int32), 1).tolist() == [5]
    assert row_of(np.array([[0.5, 2.0]], np.float32), 0).tolist() == [0.5, 2.0]


CODES = st.one_of(st.integers(0, 3), st.integers(65_530, 65_545), st.integers(0, 2**31 - 1), st.just(2**16), st.just(0))


@quick
@given(st.lists(CODES, max_size=60))
def test_stable_order_equals_a_stable_argsort_also_beyond_16_bits(codes: list[int]) -> None:
    array = np.array(codes, np.int32)
    assert stable_order(array).tolist() == np.argsort(array, kind="stable").tolist()


def test_stable_order_keeps_ties_in_place_in_a_long_array_of_large_codes() -> None:
    codes = np.random.default_rng(0).integers(0, 200, 20_000).astype(np.int32) * 1000
    assert codes.max() > 65_535
    assert np.array_equal(stable_order(codes), np.argsort(codes, kind="stable"))
