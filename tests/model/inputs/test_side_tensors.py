"""Columns to tensors against plain loops."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from taken import equal, rows_of, tensors

from twotower.arrays.ragged import Ragged
from twotower.data.dataset import Dataset
from twotower.data.splits import TRAIN
from twotower.features.side import SideName
from twotower.model.inputs.bag import Bag

# The dataset is not changed by a test, so hypothesis may see one for all its examples.
quick = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


SIDES: tuple[SideName, SideName] = ("user", "item")


USERS, ITEMS, ROWS = 60, 40, 1200  # of `everything`


def transposed(bag: object) -> list[list[int]]:
    """The rows that hold a code, for every code of the table."""
    assert isinstance(bag, Bag)
    rows, offsets = bag.rows_by_code.tolist(), bag.code_offsets.tolist()
    assert offsets[-1] == len(rows)
    return [rows[a:b] for a, b in pairwise(offsets)]


def naive_bags(
    data: Dataset, side: SideName, rows: list[int], left_out: frozenset[int] = frozenset()
) -> dict[str, list[list[int]]]:
    """Every bag by loops; `left_out` interactions are dropped from the columns that know their source."""
    out: dict[str, list[list[int]]] = {}
    for name, column in data.side(side).columns.items():
        if not isinstance(column, Ragged):
            continue
        out[name] = []
        for r in rows:
            places = range(int(column.offsets[r]), int(column.offsets[r + 1]))
            out[name].append(
                [int(column.values[i]) for i in places if column.source is None or column.source[i] not in left_out]
            )
    return out


@pytest.mark.parametrize("side", SIDES)
@quick
@given(picked=st.lists(st.integers(0, ITEMS - 1), max_size=12))
def test_taking_rows_equals_a_loop_over_them_for_every_kind_of_field(
    everything_data: Dataset, side: SideName, picked: list[int]
) -> None:
    data = everything_data
    fields = data.encoders.fields(side)
    columns: dict[str, Any] = dict(data.side(side).columns)
    assert {f.kind for f in fields} == {"lookup", "bag", "dense"}
    inputs = tensors(data, side).take(np.array(picked, np.int64))
    assert inputs.rows == len(picked)
    lookups = [f.name for f in fields if f.kind == "lookup"]
    assert inputs.lookup.dtype == torch.int64
    assert inputs.lookup.tolist() == [[int(columns[n][r]) for n in lookups] for r in picked]
    assert set(inputs.dense) == {f.name for f in fields if f.kind == "dense"}
    for name, found in inputs.dense.items():
        assert found.dtype == torch.float32
        assert found.tolist() == [columns[name][r].tolist() for r in picked]
    naive = naive_bags(data, side, picked)
    assert set(inputs.bags) == set(naive)
    sizes = {f.name: f.rows for f in fields}
    for name, bag in inputs.bags.items():
        assert rows_of(bag) == naive[name]
        by_code: list[list[int]] = [[] for _ in range(sizes[name])]
        for r, codes in enumerate(naive[name]):
            for code in codes:
                by_code[code].append(r)
        assert transposed(bag) == by_code


@pytest.mark.parametrize("side", SIDES)
@quick
@given(
    picked=st.lists(st.integers(0, ITEMS - 1), min_size=1, max_size=12),
    left_out=st.sets(st.integers(0, ROWS - 1), max_size=400),
)
def test_left_out_interactions_are_in_no_sequence_and_nothing_else_changes(
    everything_data: Dataset, side: SideName, picked: list[int], left_out: set[int]
) -> None:
    data, rows = everything_data, np.array(picked, np.int64)
    own = tensors(data, side)
    before = own.take(rows)
    without = own.take(rows, np.array(sorted(left_out), np.int64))
    naive = naive_bags(data, side, picked, frozenset(left_out))
    assert {name: rows_of(bag) for name, bag in without.bags.items()} == naive
    for bag in without.bags.values():
        assert isinstance(bag, Bag)
        assert [len(r) for r in transposed(bag)] == np.bincount(
            bag.values.numpy(), minlength=len(bag.code_offsets) - 1
        ).tolist()
    assert torch.equal(without.lookup, before.lookup)
    assert all(torch.equal(without.dense[n], before.dense[n]) for n in before.dense)
    # Nothing of it lasts until the next call.
    assert equal(own.take(rows), before)
    assert equal(own.take(rows, np.zeros(0, np.int64)), before)


def test_a_cut_sequence_is_not_refilled_and_does_not_miss_what_it_never_held(everything_data: Dataset) -> None:
    data = everything_data
    own = tensors(data, "user")
    column = data.users.columns["disliked"]  # its last five
    assert isinstance(column, Ragged)
    assert column.source is not None
    full = (data.parts == TRAIN) & ~data.pairs.positive
    user = next(u for u in range(USERS) if (full & (data.pairs.user == u)).sum() > 7)
    mine = np.flatnonzero(full & (data.pairs.user == user))
    held = column.source[column.offsets[user] : column.offsets[user + 1]]
    cut = np.setdiff1d(mine, held)
    assert (len(held), len(cut)) == (5, len(mine) - 5)
    rows = np.array([user])
    before = rows_of(own.take(rows).bags["disliked"])[0]
    assert rows_of(own.take(rows, cut).bags["disliked"])[0] == before
    assert rows_of(own.take(rows, np.append(cut, held[2])).bags["disliked"])[0] == before[:2] + before[3:]


def test_a_side_without_fields_of_a_kind_gives_empty_inputs_of_it(board: Dataset) -> None:
    inputs = tensors(board, "user").take(np.array([3, 1]), np.array([0, 5]))
    assert not tensors(board, "user").has_sequences
    assert inputs.lookup.shape == (2, 1)
    assert inputs.bags == inputs.dense == {}
