"""External ids of a dataset and their rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import pytest

from twotower.arrays.types import UserId, UserRow
from twotower.data.ids import TextColumn, UserIds, _hashes

ID_COLUMNS = [
    pl.Series("id", ["7", "007", "", "漢", "7.0", "\\udcff", "a" * 300]),
    pl.Series("id", [7, -7, 2**63 - 1, 0]),
    pl.Series("id", [0, 2**64 - 1], dtype=pl.UInt64),
]


@pytest.mark.parametrize("bits", [64, 1, 0])
@pytest.mark.parametrize("column", ID_COLUMNS)
def test_ids_have_their_rows_also_where_hashes_collide(column: pl.Series, bits: int) -> None:
    known = [UserId(str(i)) for i in column]
    second: Any = np.int64(1)  # an index of numpy
    row = {i: r for r, i in enumerate(known)}
    found = UserIds(column, UserRow, lambda c: _hashes(c) & np.uint64(2**bits - 1))
    asked = [*known[::-1], *map(UserId, ("nobody", "07", "7 ", "\udcff", "漢漢")), known[0]]
    assert found.rows(asked) == [row.get(i, -1) for i in asked]
    assert [found.row(i) for i in asked * 2] == [row.get(i) for i in asked * 2]
    assert found.rows([]) == []
    texts = pl.Series([*(i for i in asked if i.isprintable()), None], dtype=pl.String)
    assert found.find(texts).tolist() == [row.get(i, -1) for i in texts]
    assert list(found) == known == found[:]
    assert (len(found), found[-1], found[second], found[1:3]) == (len(known), known[-1], known[1], known[1:3])
    assert known[1] in found
    assert "nobody" not in found
    assert UserIds(column.clear(), UserRow).rows([UserId("7")]) == [-1]
    assert UserIds(column.clear(), UserRow).find(texts).tolist() == [-1] * len(texts)
    assert list(TextColumn(column)) == known
    with pytest.raises(IndexError):
        found[len(known)]


def test_the_ids_asked_last_are_few() -> None:
    many = UserIds(pl.Series("id", np.arange(20_000)), UserRow)
    assert [many.row(UserId(str(i))) for i in range(20_000)] == list(range(20_000))
    assert len(many._cached_rows) <= 16_384
    assert [many.row(UserId(str(i))) for i in range(0, 20_000, 50)] == list(range(0, 20_000, 50))
