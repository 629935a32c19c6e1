"""Sets of rows against Python's sets."""

from __future__ import annotations

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from twotower.arrays.sets import DistinctRows, distinct_keys, find_in_sorted, is_in_sorted, pair_keys

# The dataset is not changed by a test, so hypothesis may see one for all its examples.
quick = settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@quick
@given(st.lists(st.lists(st.integers(0, 9), max_size=30), min_size=1, max_size=4))
def test_distinct_rows_are_unique_and_give_the_rows_back_call_after_call(calls: list[list[int]]) -> None:
    distinct = DistinctRows(10)
    for call in calls:
        rows = np.array(call, np.int32)
        found, inverse = distinct(rows)
        assert np.array_equal(found[inverse], rows)
        assert np.array_equal(np.sort(found), np.unique(rows))
        assert found.dtype == inverse.dtype == np.int64


NUMBERS = st.lists(st.integers(-9, 9), max_size=12)


@quick
@given(NUMBERS, NUMBERS)
def test_values_are_found_in_a_sorted_array_where_python_finds_them(members: list[int], values: list[int]) -> None:
    ascending = sorted(members)
    sought = np.array(values, np.int64).reshape(1, -1)
    places, known = find_in_sorted(np.array(ascending, np.int64), sought)
    assert known.shape == places.shape == sought.shape
    assert known[0].tolist() == [v in members for v in values]
    assert [ascending[p] for p, k in zip(places[0], known[0], strict=True) if k] == [v for v in values if v in members]
    assert np.array_equal(is_in_sorted(np.array(ascending, np.int64), sought), known)


@quick
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 6)), max_size=20))
def test_keys_of_pairs_are_ordered_as_the_pairs_and_never_shared(pairs: list[tuple[int, int]]) -> None:
    users, items = (np.array([p[i] for p in pairs], np.int32) for i in (0, 1))
    keys = pair_keys(users, items, 7)
    assert keys.dtype == np.int64
    assert [divmod(k, 7) for k in sorted(keys.tolist())] == sorted(pairs)


def test_the_key_of_a_pair_does_not_overflow_the_type_of_its_rows() -> None:
    assert pair_keys(np.array([2**31 - 1], np.int32), np.array([5], np.int32), 10**9).tolist() == [
        (2**31 - 1) * 10**9 + 5
    ]


@quick
@given(st.lists(st.integers(-(2**62), 2**62)), st.booleans())
def test_distinct_keys_are_those_of_numpy(keys: list[int], repeated: bool) -> None:
    given_keys = np.array(keys * 2 if repeated else keys, np.int64)
    before = given_keys.copy()
    assert np.array_equal(distinct_keys(given_keys), np.unique(given_keys))
    assert np.array_equal(given_keys, before)
