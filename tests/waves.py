"""A log of waves: what is popular changes all the time, and no user has tastes."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from twotower.data.dataset import Dataset, build_dataset
from twotower.data.split import SplitConfig
from twotower.data.tables import check
from twotower.features.categorical import Categorical
from twotower.features.schema import Schema
from twotower.features.sequence import Sequence
from twotower.model.two_tower import TwoTower
from twotower.scorers.trending import PopularityBias

N_USERS, N_ITEMS, LENGTH = 240, 90, 8
DAY = 86_400
FEATURES = (Sequence(name="taken", side="user"), Categorical(name="item_id", side="item"))
SCHEMA = Schema(time="at", title="", features=FEATURES)


def waves(share: float = 0.7, n_users: int = N_USERS, seed: int = 0) -> pl.DataFrame:
    """Users are there in 60 of 300 days; a share of their items are of the three that are popular for ten days, the
    others any."""
    rng, rows = np.random.default_rng(seed), list[tuple[int, int, int]]()
    for user in range(n_users):
        begin, seen = rng.random() * 240, set[int]()
        for day in np.sort(begin + rng.random(LENGTH) * 60):
            item = int(day * N_ITEMS / 300) // 3 * 3 + int(rng.integers(3))
            if rng.random() > share or item in seen:
                item = int(rng.choice([i for i in range(N_ITEMS) if i not in seen]))
            seen.add(item)
            rows.append((user, item, 1_500_000_000 + int(day * DAY)))
    log = pl.DataFrame(rows, schema=["user_id", "item_id", "at"], orient="row")
    return log[rng.permutation(log.height)]


def world(share: float = 0.7, schema: Schema = SCHEMA, **split: Any) -> Dataset:
    """The log with a split, by default of the last rows."""
    return build_dataset(check(None, None, waves(share), schema), schema, SplitConfig(**({"kind": "last"} | split)))


def trending(model: TwoTower) -> PopularityBias:
    """Return the recent popularity of a model that has it."""
    term = model.terms["trending"]
    assert isinstance(term, PopularityBias)
    return term
