"""A negative by attribute shares a known value with the positive."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import pytest
from candidate_worlds import batch_of, own_items, positives
from worlds import CHECKERBOARD_SCHEMA, ID_FEATURES, checkerboard

from twotower.config.experiment import Config
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.tables import check
from twotower.errors import ConfigError
from twotower.features.categorical import Categorical
from twotower.features.multi_hot import MultiHot
from twotower.features.schema import Schema
from twotower.features.sequence import Sequence
from twotower.train.negatives.config import NegativesConfig
from twotower.train.negatives.mixture import CandidateSampler


def towns() -> Dataset:
    """Items with a town (some unknown, one too rare to be known), a list of tags and an item-side sequence."""
    users, items, actions = checkerboard()
    rng = np.random.default_rng(0)
    town = ["rare", *(None if i % 7 == 0 else f"town{i % 4}" for i in range(1, 30))]
    tags = [[f"t{t}" for t in rng.choice(6, rng.integers(0, 4), replace=False)] for _ in range(30)]
    items = items.with_columns(town=pl.Series(town), tags=pl.Series(tags, dtype=pl.List(pl.String)))
    features = (
        ID_FEATURES[0].model_copy(update={"min_count": 19}),  # so that some fans are unknown
        ID_FEATURES[1],
        Categorical(name="town", side="item", min_count=60),
        MultiHot(name="tags", side="item"),
        Sequence(name="fans", side="item"),
    )
    schema: Schema = CHECKERBOARD_SCHEMA.model_copy(update={"features": features})
    return build_dataset(check(users, items, actions, schema), schema, Config().split)


@pytest.mark.parametrize("name", ["town", "tags", "fans"])
def test_a_candidate_by_attribute_shares_a_known_value_with_the_positive(name: str) -> None:
    data = towns()
    if name == "fans":
        column: Any = data.items.columns["fans"]
        assert (column.values == 0).any(), "unknown fans"
        values = [set(row.tolist()) - {0} for row in np.split(column.values, column.offsets[1:-1])]
    else:
        frame = data.items.frame[name].to_list()
        values = [set(v) if isinstance(v, list) else {v} - {None, "rare"} for v in frame]
        assert set() in values
    sampler = CandidateSampler(data, NegativesConfig(attribute={"feature": name, "n": 3}, mask_positives=False), seed=2)
    user, item = positives(data)
    seen: dict[int, set[int]] = {i: set() for i in range(30)}
    for step in range(40):
        for i, row in zip(item.tolist(), own_items(sampler(batch_of(user, item), step)), strict=True):
            assert len(set(row)) == len(row) <= 3
            assert i not in row
            assert all(values[i] & values[other] for other in row)
            seen[i] |= set(row)
    # And every item that shares one has its turn.
    assert seen == {i: {j for j in range(30) if j != i and values[i] & values[j]} for i in range(30)}


def test_an_attribute_that_is_not_there_is_named_with_the_nearest(everything_data: Dataset) -> None:
    for name, words in [
        ("brnd", "no item feature 'brnd' with values to share; did you mean 'brand'?"),
        ("picture", "no item feature 'picture'"),  # numbers cannot be shared
        ("city", "no item feature 'city'"),  # of the other side
    ]:
        with pytest.raises(ConfigError, match=rf"negatives.attribute: {words}.*allowed: iid, brand, tags"):
            CandidateSampler(everything_data, NegativesConfig(attribute=name), seed=1)
