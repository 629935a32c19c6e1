"""Parts of the ids of items, such as the folders of a path: whether the items of a user share them more often than others do."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl

from twotower.arrays.types import Ints

SEPARATORS = "/.-_: "
"""Characters between the parts of ids."""
MIN_SEVERAL = 0.1
"""Share of the ids with a separator from which it divides parts."""
MIN_TIMES = 1.4
"""Times that two items of a user share a part as often as two items at random, from which parts tell what users take."""
MIN_SHARED = 0.05
"""Share of such pairs beyond that of pairs at random, at least."""
MAX_COMMON = 0.1
"""Share of the rows whose items have a part, above which it tells little and is not compared."""
MAX_PARTS = 10_000
"""Distinct parts of all separators at most: a closed form solves for them."""
SAMPLED_PAIRS = 20_000
"""Pairs of rows at random that are compared, at most."""


@dataclass(frozen=True)
class IdParts:
    """Separators whose parts of the ids tell what users take."""

    separators: tuple[str, ...] = ()
    values: int = 0
    """Number of the distinct parts, of all these separators."""


def id_parts(users: Ints, items: Ints, ids: pl.Series) -> IdParts:
    """Return the separators of `ids`, one of each code of items, by the rows of the codes of users and items."""
    if ids.dtype != pl.String or ids.null_count():
        return IdParts()
    shares = {separator: float(ids.str.contains(separator, literal=True).mean() or 0) for separator in SEPARATORS}  # type: ignore[arg-type]
    separators = [separator for separator, share in shares.items() if share >= MIN_SEVERAL]
    if not separators:
        return IdParts()
    one, other, at_random = _pairs(users, items)
    if not len(one):
        return IdParts()
    found, values = list[str](), 0
    rows = np.bincount(items, minlength=len(ids))
    for separator in separators:
        parts = pl.DataFrame({"item": np.arange(len(ids)), "part": ids.str.split(separator)}).explode("part").unique()
        if values + (n_parts := parts["part"].n_unique()) > MAX_PARTS:
            continue
        counted = parts.with_columns(n=pl.Series(rows[parts["item"].to_numpy()]))
        rare = counted.filter((pl.col("n").sum().over("part") <= MAX_COMMON * len(items)) & (pl.len().over("part") > 1))
        lists = rare.group_by("item").agg("part")
        shared, chance = _shared(lists, one, other), _shared(lists, one, at_random)
        if shared >= MIN_TIMES * chance and shared >= chance + MIN_SHARED:
            found.append(separator)
            values += n_parts
    return IdParts(tuple(found), values)


def _pairs(users: Ints, items: Ints) -> tuple[Ints, Ints, Ints]:
    """Return the items of rows at random, another item of the same user for each, and one of another row at random."""
    if not len(users):
        return items, items, items
    rng = np.random.default_rng(0)
    rows, at_random = rng.integers(len(users), size=(2, SAMPLED_PAIRS))
    ranked, counts = np.argsort(users, kind="stable"), np.bincount(users)
    first, of_user = (np.cumsum(counts) - counts)[users[rows]], counts[users[rows]]
    others = ranked[first + (rng.random(SAMPLED_PAIRS) * of_user).astype(np.int64)]
    differ = items[rows] != items[others]
    return items[rows][differ], items[others][differ], items[at_random][differ]


def _shared(lists: pl.DataFrame, one: Ints, other: Ints) -> float:
    """Return the share of pairs of two items that have a part in common."""
    pairs = pl.DataFrame({"one": one, "other": other}).filter(pl.col("one") != pl.col("other"))
    joined = pairs.join(lists, left_on="one", right_on="item", how="left", maintain_order="left").join(
        lists, left_on="other", right_on="item", how="left", maintain_order="left", suffix="_of"
    )
    both = pl.col("part").list.set_intersection("part_of").list.len().fill_null(0) > 0
    return float(joined.select(both.mean()).item() or 0)
