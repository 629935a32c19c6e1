"""The stable order of codes against an argsort."""

from __future__ import annotations

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from twotower.arrays.ragged import stable_order

# The dataset is not changed by a test, so hypothesis may see one for all its examples.
quick = settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


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
