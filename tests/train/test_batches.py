"""Columns to tensors against plain loops, and no history that contains its target."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from worlds import EVERYTHING_SCHEMA, everything

from twotower.arrays.ragged import Ragged
from twotower.arrays.sets import DistinctRows
from twotower.config.experiment import Config
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.splits import TRAIN
from twotower.data.tables import check
from twotower.features.schema import Schema, Sequence, SideName
from twotower.model.inputs.bags import _stable_order
from twotower.model.inputs.carriers import Bag, Inputs
from twotower.model.inputs.side_tensors import SideTensors
from twotower.train.batches import Batcher
from twotower.train.negatives.config import NegativesConfig
from twotower.train.pair_sampler import PairSampler

# The dataset is not changed by a test, so hypothesis may see one for all its examples.
quick = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
SIDES: tuple[SideName, SideName] = ("user", "item")
USERS, ITEMS, ROWS = 60, 40, 1200  # of `everything`


def tensors(data: Dataset, side: SideName) -> SideTensors:
    return SideTensors(data.side(side), data.encoders.fields(side))


def rows_of(bag: object) -> list[list[int]]:
    assert isinstance(bag, Bag)
    values, offsets = bag.values.tolist(), bag.offsets.tolist()
    assert offsets[0] == 0
    assert offsets[-1] == len(values)
    return [values[a:b] for a, b in pairwise(offsets)]


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


def equal(a: Inputs, b: Inputs) -> bool:
    bags = all(
        torch.equal(x, y)
        for n in a.bags
        for x, y in zip(vars(a.bags[n]).values(), vars(b.bags[n]).values(), strict=True)
    )
    dense = all(torch.equal(a.dense[n], b.dense[n]) for n in a.dense)
    return bags and dense and a.bags.keys() == b.bags.keys() and torch.equal(a.lookup, b.lookup)


# ---- one side


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


def test_leaving_out_every_training_row_empties_the_sequences_and_no_other_bag(
    everything_data: Dataset,
) -> None:
    for side in SIDES:
        own = tensors(everything_data, side)
        rows = np.arange(own.n)
        before, after = own.take(rows), own.take(rows, np.arange(ROWS))
        sequences = {f.name for f in own.fields if f.sequence}
        assert {name for name, bag in after.bags.items() if not any(rows_of(bag))} == sequences
        assert all(any(rows_of(bag)) for bag in before.bags.values())


def test_a_cut_sequence_is_not_refilled_and_does_not_miss_what_it_never_held(
    everything_data: Dataset,
) -> None:
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


# ---- distinct rows and stable order


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


CODES = st.one_of(st.integers(0, 3), st.integers(65_530, 65_545), st.integers(0, 2**31 - 1), st.just(2**16), st.just(0))


@quick
@given(st.lists(CODES, max_size=60))
def test_stable_order_equals_a_stable_argsort_also_beyond_16_bits(codes: list[int]) -> None:
    array = np.array(codes, np.int32)
    assert _stable_order(array).tolist() == np.argsort(array, kind="stable").tolist()


def test_stable_order_keeps_ties_in_place_in_a_long_array_of_large_codes() -> None:
    codes = np.random.default_rng(0).integers(0, 200, 20_000).astype(np.int32) * 1000
    assert codes.max() > 65_535
    assert np.array_equal(_stable_order(codes), np.argsort(codes, kind="stable"))


# ---- batches


def histories(data: Dataset, side: SideName, name: str, inputs: Inputs) -> list[list[int]]:
    """A sequence's codes as internal rows of the other side."""
    other: SideName = "item" if side == "user" else "user"
    feature = next(f for f in data.schema.side(side) if f.name == name)
    assert isinstance(feature, Sequence)
    codes = data.encoders.sequence_codes(feature, data.side(other).ids).tolist()
    decode = {code: row for row, code in enumerate(codes) if code}
    return [[decode[c] for c in row if c] for row in rows_of(inputs.bags[name])]


def history_by_loop(data: Dataset, side: SideName, feature: Sequence, row: int, gone: set[int]) -> list[int]:
    """The row's own training interactions of the right kind, oldest first and cut, less `gone`."""
    own, other = data.pairs.user, data.pairs.item
    if side == "item":
        own, other = other, own
    assert data.times is not None
    kept = []
    for i in np.argsort(data.times, kind="stable").tolist():
        right = feature.interactions == "all" or data.pairs.positive[i] == (feature.interactions == "positive")
        if data.parts[i] == TRAIN and own[i] == row and right:
            kept.append(i)
    return [int(other[i]) for i in kept[-feature.max_length :] if i not in gone]


def many_sequences() -> Dataset:
    """`everything` with a sequence of every kind on both sides."""
    extra = (
        Sequence(name="seen", side="user", interactions="all", max_length=6),
        Sequence(name="viewers", side="item", interactions="all", pooling="sum"),
        Sequence(name="haters", side="item", interactions="negative", share_embedding=False),
    )
    schema: Schema = EVERYTHING_SCHEMA.model_copy(update={"features": (*EVERYTHING_SCHEMA.features, *extra)})
    return build_dataset(check(*everything(), schema), schema, Config().split)


def test_a_batch_has_no_target_in_any_history_and_every_other_item_is_still_there() -> None:
    data = many_sequences()
    batcher = Batcher(tensors(data, "user"), tensors(data, "item"))
    epoch = PairSampler(data, NegativesConfig(random=1), seed=3).epoch(0)
    for start in (0, 64, 128):
        part = slice(start, start + 64)
        user, item, source = epoch.user[part], epoch.item[part], epoch.source[part]
        batch = batcher(user, item, epoch.label[part], epoch.weight[part], source)
        targets = set(zip(user[source >= 0].tolist(), item[source >= 0].tolist(), strict=True))
        gone = set(source[source >= 0].tolist())
        assert 0 < len(gone) < 64
        dropped = 0
        sides: list[tuple[SideName, Inputs, Any, Any]] = [
            ("user", batch.users, user, batch.user),
            ("item", batch.items, item, batch.item),
        ]
        for side, inputs, rows, index in sides:
            at = {int(k): int(r) for k, r in zip(index.tolist(), rows, strict=True)}
            for feature in data.schema.side(side):
                if not isinstance(feature, Sequence):
                    continue
                for k, history in enumerate(histories(data, side, feature.name, inputs)):
                    pairs = {(at[k], other) if side == "user" else (other, at[k]) for other in history}
                    assert not pairs & targets
                    assert history == history_by_loop(data, side, feature, at[k], gone)
                    dropped += len(history_by_loop(data, side, feature, at[k], set())) - len(history)
        assert dropped > 0


def test_random_negatives_leave_nothing_out(everything_data: Dataset) -> None:
    data = everything_data
    users, items = tensors(data, "user"), tensors(data, "item")
    pairs = data.train
    n = 30
    ones = np.ones(n, np.float32)
    batch = Batcher(users, items)(pairs.user[:n], pairs.item[:n], ones, ones, np.full(n, -1, np.int64))
    distinct = DistinctRows(users.n)(pairs.user[:n])[0], DistinctRows(items.n)(pairs.item[:n])[0]
    assert equal(batch.users, users.take(distinct[0]))
    assert equal(batch.items, items.take(distinct[1]))
    own = np.flatnonzero(data.parts == TRAIN)[:n]
    real = Batcher(users, items)(pairs.user[:n], pairs.item[:n], ones, ones, own)
    assert not equal(real.users, batch.users)
    assert not equal(real.items, batch.items)


def test_a_batch_names_each_row_once_and_its_pairs_by_index(everything_data: Dataset) -> None:
    data = everything_data
    epoch = PairSampler(data, NegativesConfig(random=2), seed=1).epoch(0)
    part = slice(100, 300)
    arrays: list[npt.NDArray[Any]] = [x[part] for x in (epoch.user, epoch.item, epoch.label, epoch.weight)]
    batch = Batcher(tensors(data, "user"), tensors(data, "item"))(
        arrays[0], arrays[1], arrays[2], arrays[3], epoch.source[part]
    )
    assert len(batch) == 200
    assert batch.label.tolist() == arrays[2].tolist()
    assert batch.weight.tolist() == arrays[3].tolist()
    for inputs, index, rows, column in (
        (batch.users, batch.user, arrays[0], data.users.columns["uid"]),
        (batch.items, batch.item, arrays[1], data.items.columns["iid"]),
    ):
        assert inputs.rows == len(np.unique(rows)) < 200
        assert isinstance(column, np.ndarray)
        assert inputs.lookup[index, 0].tolist() == column[rows].tolist()
