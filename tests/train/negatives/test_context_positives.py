"""The positives that a context leaves out of the candidates, against plain loops."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from context_worlds import HOUR, flat, hourly, hourly_schema

from twotower.arrays.ragged import Ragged
from twotower.config.experiment import Config
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.splits import TRAIN
from twotower.data.tables import check
from twotower.features.multi_hot import MultiHot
from twotower.features.numeric import Numeric
from twotower.train.negatives.config import NegativesConfig
from twotower.train.negatives.context_positives import ContextPositives
from twotower.train.negatives.mixture import CandidateSampler
from twotower.train.pair_sampler import PairSampler
from twotower.train.positive_sampler import PositiveSampler


@pytest.fixture(scope="module")
def data() -> Dataset:
    """A log with contexts of a code, a number and a bag, of which some of a user are equal, and random items."""
    users, items, actions = hourly(400)
    rng = np.random.default_rng(2)
    some = rng.integers(0, 3, actions.height)
    actions = actions.with_columns(
        hour=pl.Series(rng.integers(0, 2, actions.height)),
        item_id=pl.Series(rng.integers(0, 16, actions.height)),
        price=pl.Series(rng.integers(0, 2, actions.height).astype(float)),
        tags=pl.Series([["a", "b", "c"][:k] if k < 2 else ["b"] for k in some]),
    )
    schema = hourly_schema(HOUR, Numeric(name="price", side="context"), MultiHot(name="tags", side="context"))
    return build_dataset(check(users, items, actions, schema), schema, Config().split)


def moment(data: Dataset, row: int) -> tuple[object, ...]:
    """User and context of an interaction."""
    bag = data.context["tags"]
    assert isinstance(bag, Ragged)
    code, number = int(flat(data, "hour")[row]), float(flat(data, "price")[row, 0])
    return int(data.pairs.user[row]), code, number, tuple(bag.row(row).tolist())


def in_the_same_context(data: Dataset, row: int) -> set[int]:
    rows = np.flatnonzero((data.parts == TRAIN) & data.pairs.target)
    return {int(data.pairs.item[j]) for j in rows.tolist() if moment(data, j) == moment(data, row)}


def test_positives_of_the_same_context_are_found(data: Dataset) -> None:
    rows = data.positive_indices[::3]
    items, lengths = ContextPositives(data)(data.pairs.user[rows], rows)
    found = np.split(items, np.cumsum(lengths)[:-1])
    expected = [in_the_same_context(data, row) for row in rows.tolist()]
    assert [set(f.tolist()) for f in found] == expected
    assert max(map(len, expected)) > 1


@pytest.mark.parametrize("negatives", [{"full": True}, {"random": 6}], ids=["shared", "per-positive"])
def test_candidates_lack_the_positives_of_the_context_and_no_others(
    data: Dataset, negatives: dict[str, object]
) -> None:
    sampler = CandidateSampler(data, NegativesConfig(**negatives), seed=1)  # type: ignore[arg-type]
    batch = PositiveSampler(data, seed=2).epoch(0).take(0, slice(0, 60))
    drawn = sampler(batch.user, batch.item, 0, interactions=batch.source)
    for b, row in enumerate(batch.source.tolist()):
        gone = in_the_same_context(data, row) - {int(batch.item[b])}
        assert not gone & {int(drawn.items[j]) for j in drawn.per_positive[b].tolist() if j >= 0}
        assert drawn.exclusions is not None
        group = int(drawn.exclusions.group[b])
        first, end = drawn.exclusions.offsets[group : group + 2].tolist()
        left_out = {int(drawn.items[c]) for c in drawn.exclusions.columns[first:end].tolist()}
        present = {int(i) for i in drawn.items[: drawn.shared]}
        assert left_out - {int(batch.item[b])} == gone & present


def test_without_a_mask_nothing_is_left_out(data: Dataset) -> None:
    sampler = CandidateSampler(data, NegativesConfig(full=True, mask_positives=False), seed=1)
    batch = PositiveSampler(data, seed=2).epoch(0).take(0, slice(0, 20))
    assert sampler(batch.user, batch.item, 0, interactions=batch.source).exclusions is None


def test_a_drawn_pair_has_the_context_of_its_positive_and_no_item_that_is_right_in_it(data: Dataset) -> None:
    epoch = PairSampler(data, NegativesConfig(random=4), seed=3).epoch(0)
    drawn = epoch.source < 0
    positives = ~epoch.source[drawn]
    assert drawn.sum() == 4 * len(data.positive_indices)
    assert np.array_equal(
        np.bincount(positives, minlength=len(data.pairs)) > 0,
        np.isin(np.arange(len(data.pairs)), data.positive_indices),
    )
    assert np.array_equal(data.pairs.user[positives], epoch.user[drawn])
    right = [
        int(item) in in_the_same_context(data, row)
        for item, row in zip(epoch.item[drawn], positives.tolist(), strict=True)
    ]
    assert (epoch.item[drawn] != data.pairs.item[positives])[right].any()
    assert np.array_equal(epoch.weight[drawn] == 0, right)


def test_pairs_of_data_without_a_context_are_of_items_that_the_user_lacks(data: Dataset) -> None:
    plain = replace(data, schema=hourly_schema())
    epoch = PairSampler(plain, NegativesConfig(random=4), seed=3).epoch(0)
    drawn = epoch.source < 0
    taken = set(zip(data.train.user.tolist(), data.train.item.tolist(), strict=True))
    assert not taken & set(zip(epoch.user[drawn].tolist(), epoch.item[drawn].tolist(), strict=True))
    assert epoch.weight.all()
