"""Rows of columns and single rows against loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from twotower.arrays.ragged import Ragged, row_of
from twotower.data.dataset import Dataset
from twotower.features.side import SideName
from twotower.model.inputs.code_layout import pad
from twotower.model.inputs.gather import ColumnRows, OneRow, TowerFields, feed, gather, stack_feeds

quick = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@pytest.mark.parametrize("side", ["user", "item"])
@quick
@given(start=st.integers(0, 40), n=st.integers(0, 9))
def test_a_slice_numbers_and_single_rows_give_the_same(
    everything_data: Dataset, side: SideName, start: int, n: int
) -> None:
    columns, fields = everything_data.side(side).columns, TowerFields(everything_data.encoders.fields(side))
    rows = range(*slice(start, start + n).indices(len(everything_data.side(side))))
    together = gather(fields, ColumnRows(columns, slice(start, start + n)), ColumnRows.padded)
    numbered = gather(fields, ColumnRows(columns, np.array(rows, np.int32)), ColumnRows.padded)
    assert len(together[0]) == len(rows)
    for a, b in zip(arrays(together), arrays(numbered), strict=True):
        assert a.dtype == b.dtype
        assert np.array_equal(a, b)
    for place, row in enumerate(rows):
        values = {name: row_of(column, row) for name, column in columns.items()}
        alone = gather(fields, OneRow(values), OneRow.padded)
        assert list(alone[1]) == [f.name for f in fields.bags]
        for a, b in zip(arrays(alone), arrays(together), strict=True):
            assert a.dtype == b.dtype
            assert a.shape[0] == 1
            assert np.array_equal(a[0], b[place, : a.shape[1]])
            assert (b[place, a.shape[1] :] == -1).all()


def arrays(gathered: tuple[Any, dict[str, Any], dict[str, Any]]) -> list[Any]:
    lookup, bags, dense = gathered
    return [lookup, *bags.values(), *dense.values()]


def test_padded_codes_are_the_last_of_each_row_and_an_empty_row_is_padding() -> None:
    ragged = Ragged(np.array([1, 2, 3, 4], np.int32), np.array([0, 3, 3, 4]))
    assert pad(ragged, np.array([2, 0, 1])).tolist() == [[4, -1, -1], [1, 2, 3], [-1, -1, -1]]
    assert pad(ragged, np.array([0, 1]), limit=2).tolist() == [[2, 3], [-1, -1]]
    assert pad(ragged, np.array([1])).tolist() == [[-1]]
    assert pad(ragged, np.zeros(0, np.int64)).shape == (0, 1)


def test_stacked_feeds_are_the_feed_of_all_rows(everything_data: Dataset) -> None:
    data = everything_data
    fields, columns = data.encoders.fields("user"), data.side("user").columns
    rows = np.arange(20)
    whole = feed(fields, columns, rows)
    stacked = stack_feeds([feed(fields, columns, rows[i : i + 1]) for i in rows])
    assert stacked.keys() == whole.keys()
    for name, values in whole.items():
        assert stacked[name].dtype == values.dtype
        np.testing.assert_array_equal(stacked[name], values)
