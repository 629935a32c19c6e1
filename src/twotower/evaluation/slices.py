"""Slices of a part: by the activity of users, the popularity of items, and the values of columns of the users."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import polars as pl

from twotower.arrays.pieces import gathered
from twotower.arrays.types import Bools, Ints, Shaped, WholeNumbers
from twotower.data.dataset import Dataset
from twotower.data.pairs import Pairs
from twotower.errors import ConfigError, did_you_mean
from twotower.evaluation.config import EvaluationConfig
from twotower.evaluation.moments import users_during
from twotower.features.side import SideName
from twotower.features.values import canonical_ids, numbers

COLD, COLD_ALONE = "cold_item", "cold_item_alone"
"""Ends of the names of metrics: of cold items among all, and among themselves."""

MAX_NUMBERS = 10
"""Distinct numbers of a column up to which each is a slice; more are cut at their quartiles."""

MAX_SLICES = 50
"""Slices of a column that are measured: those with the most users."""

MISSING = "(missing)"
"""Value of users without one."""


@dataclass(frozen=True)
class UserSlices:
    """Slices of U users by a column: the value of each slice, and the place of the slice of each user."""

    values: list[str]
    places: Shaped[Ints, "U"]

    @classmethod
    def of(cls, users: pl.DataFrame, column: str) -> UserSlices:
        """Slice the users by a column, rising by value; the range 18..25 is from 18 to below 25. Raises ConfigError if
        the table lacks the column, or it does not hold one value a row."""
        if column not in users.columns:
            raise ConfigError(
                f"evaluation.slices: the users have no column '{column}'{did_you_mean(column, users.columns)} "
                f"(found: {', '.join(users.columns)}); prepared data have the columns that [schema] names"
            )
        series = users[column]
        if series.dtype.is_nested():
            raise ConfigError(
                f"evaluation.slices: column '{column}' of the users holds {series.dtype}, expected one value a row; "
                "name another column"
            )
        if series.dtype.is_numeric() and series.drop_nulls().n_unique() > MAX_NUMBERS:
            return cls._ranges(series)
        texts = canonical_ids(series)
        values = texts.drop_nulls().unique().sort()
        names = [*values.cast(pl.String).to_list(), MISSING]
        places = pl.DataFrame({"value": texts}).join(
            pl.DataFrame({"value": values}).with_row_index("place"), on="value", how="left", maintain_order="left"
        )["place"]
        return cls(names, places.fill_null(len(values)).to_numpy().astype(np.int64))

    @classmethod
    def _ranges(cls, series: pl.Series) -> UserSlices:
        """Cut a column of numbers at its quartiles."""
        x = numbers(series)
        known = np.isfinite(x)
        cuts = np.unique(np.quantile(x[known], (0.25, 0.5, 0.75)))
        bounds = ["", *(f"{cut:.12g}" for cut in cuts), ""]
        names = [f"{low}..{high}" for low, high in pairwise(bounds)]
        return cls([*names, MISSING], np.where(known, np.searchsorted(cuts, x, side="right"), len(names)))

    def measured(self, users: Shaped[Ints, "Q"], fewest: int) -> list[int]:
        """Return the places of the slices with at least `fewest` of some users, rising."""
        n = np.bincount(self.places[users], minlength=len(self.values))
        largest = np.argsort(-n, kind="stable")[:MAX_SLICES]
        return [int(i) for i in np.sort(largest) if n[i] >= fewest]


class TableSlice(NamedTuple):
    """A slice: its name at the end of metrics such as auc.new_user, and a mask over the table of its side."""

    name: str
    side: SideName
    rows: Shaped[Bools, "R"]
    column: str = ""
    """Column of the users with the value of the slice; empty of another slice."""

    def of_pairs(self, pairs: Pairs) -> Shaped[Bools, "n"]:
        """Return a mask of the pairs of its users or items."""
        return gathered(self.rows, pairs.user if self.side == "user" else pairs.item)


def slices_of(
    data: Dataset, config: EvaluationConfig, part: int, items: Shaped[WholeNumbers, "n"], users: Shaped[Ints, "U"]
) -> Iterator[TableSlice]:
    """Yield the slices by activity and popularity, then those by the columns of evaluation.slices.

    Cold items are a slice if some of `items`, the rows of a part's pairs, are cold; a value of a column if it has at
    least evaluation.slice_min_users of `users`, the rows of those with a ranking, by their table during the part."""
    user_n, item_n = data.user_counts, data.item_counts
    head = np.zeros(len(data.items), bool)
    head[np.argsort(-item_n, kind="stable")[: max(1, int(config.head_share * len(data.items)))]] = True
    yield TableSlice("new_user", "user", user_n < config.new_user_below)
    yield TableSlice("new_item", "item", item_n < config.new_item_below)
    yield TableSlice("head", "item", head)
    yield TableSlice("tail", "item", ~head)
    if gathered(cold := item_n == 0, items).any():
        yield TableSlice(COLD, "item", cold)
    for column in config.slices:
        sliced = UserSlices.of(users_during(data, part), column)
        for i in sliced.measured(users, config.slice_min_users):
            yield TableSlice(f"{column}={sliced.values[i]}", "user", sliced.places == i, column)
