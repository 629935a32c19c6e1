"""Slices of a part: by the activity of users, the popularity of items, and the values of columns of the users."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from twotower.arrays.pieces import gathered
from twotower.arrays.types import Bools, Ints, Shaped, WholeNumbers
from twotower.data.dataset import Dataset
from twotower.evaluation.cold_items import SLICE
from twotower.evaluation.config import EvaluationConfig
from twotower.evaluation.moments import users_during
from twotower.evaluation.user_slices import UserSlices
from twotower.features.side import SideName


class TableSlice(NamedTuple):
    """A slice: its name at the end of metrics such as auc.new_user, and a mask over the table of its side."""

    name: str
    side: SideName
    rows: Shaped[Bools, "R"]


def fixed_slices(data: Dataset, config: EvaluationConfig, items: Shaped[WholeNumbers, "n"]) -> Iterator[TableSlice]:
    """Yield the slices by activity and popularity; that of cold items if some of `items`, the rows of a part's pairs,
    are cold."""
    user_n, item_n = data.user_counts, data.item_counts
    head = np.zeros(len(data.items), bool)
    head[np.argsort(-item_n, kind="stable")[: max(1, int(config.head_share * len(data.items)))]] = True
    yield TableSlice("new_user", "user", user_n < config.new_user_below)
    yield TableSlice("new_item", "item", item_n < config.new_item_below)
    yield TableSlice("head", "item", head)
    yield TableSlice("tail", "item", ~head)
    if gathered(cold := item_n == 0, items).any():
        yield TableSlice(SLICE, "item", cold)


def column_slices(data: Dataset, config: EvaluationConfig, part: int, users: Shaped[Ints, "Q"]) -> Iterator[TableSlice]:
    """Yield the slices by the columns of evaluation.slices: the values of at least evaluation.slice_min_users of
    `users`, the rows of those with a ranking, by what their table says during a part."""
    for column in config.slices:
        sliced = UserSlices.of(users_during(data, part), column)
        for i in sliced.measured(users, config.slice_min_users):
            yield TableSlice(f"{column}={sliced.values[i]}", "user", sliced.places == i)
