"""Slices of the users by the values of a column of their table."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import polars as pl

from twotower.arrays.types import Ints, Shaped
from twotower.errors import ConfigError, did_you_mean
from twotower.features.values import canonical_ids, numbers

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

    def measured(self, users: Shaped[Ints, "Q"], fewest: int) -> dict[int, int]:
        """Return the places of the slices with at least `fewest` of some users, rising, and their numbers of these
        users."""
        n = np.bincount(self.places[users], minlength=len(self.values))
        largest = np.argsort(-n, kind="stable")[:MAX_SLICES]
        return {int(i): int(n[i]) for i in np.sort(largest) if n[i] >= fewest}
