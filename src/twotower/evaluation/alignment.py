"""Rows and test pairs of two datasets, matched by the ids of users and items."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import polars as pl

from twotower.arrays.pieces import pieces
from twotower.arrays.sets import distinct_keys, is_in_sorted, pair_keys
from twotower.arrays.types import Doubles, Ints, Shaped
from twotower.data.dataset import Dataset
from twotower.data.pairs import GroupedPairs
from twotower.data.splits import TEST
from twotower.errors import RunError
from twotower.features.side import SIDES, SideName
from twotower.features.values import canonical_ids
from twotower.progress import JobProgress

log = logging.getLogger(__name__)

BLOCK_USERS = 1024
"""Users whose test pairs are compared at a time."""


def match_ids(
    a: Dataset, b: Dataset, side: SideName, rows: Shaped[Ints, "n"]
) -> tuple[Shaped[Ints, "m"], Shaped[Ints, "m"]]:
    """Return the `rows` of A whose ids B has too, in their order, and the rows of B with the same ids."""
    one = pl.DataFrame({"id": _text_ids(a, side).gather(rows), "a": rows})
    two = pl.DataFrame({"id": _text_ids(b, side)}).with_row_index("b")
    both = one.join(two, on="id", how="inner", maintain_order="left")
    return both["a"].to_numpy().astype(np.int64), both["b"].to_numpy().astype(np.int64)


def check_same_tests(
    a: Dataset, b: Dataset, names: Sequence[str], block: int = BLOCK_USERS, weighted: bool = False
) -> None:
    """Raise RunError unless the test parts hold the same pairs of ids with the same labels, and the same pairs have a
    weight above 0, or if `weighted` the same weights. They are compared `block` users at a time. `names` are those of
    the runs.
    """
    for data, name in zip((a, b), names, strict=True):
        if not len(data.test):
            raise RunError(f"{name}: the run has no test part; train it with a [split] that has one")
    relabelled = reweighed = 0
    progress = JobProgress(log, "users matched", len(a.users) + len(b.users))
    for one, other, name, other_name in ((a, b, names[0], names[1]), (b, a, names[1], names[0])):
        n_items, n_pairs, n_missing, first = len(one.items), 0, 0, ""
        users, items = _rows_in(one, other, "user"), _rows_in(other, one, "item")
        items[items < 0] = n_items
        user_ids, item_ids = (_text_ids(one, side) for side in SIDES)
        for part in pieces(len(users), block):
            rows = np.arange(part.start, part.stop)
            mine = _LabelledPairs.of(one.grouped(TEST), rows, np.arange(n_items), n_items + 1)
            theirs = _LabelledPairs.of(other.grouped(TEST), users[part], items, n_items + 1)
            missing = mine.keys[~is_in_sorted(theirs.keys >> 1, mine.keys >> 1)] >> 1
            n_pairs, n_missing = n_pairs + len(mine.keys), n_missing + len(missing)
            if len(missing):
                user, item = np.divmod(missing, n_items + 1)
                ids = pl.DataFrame({"user": user_ids.gather(rows[user]), "item": item_ids.gather(item)})
                text = "user '{}' with item '{}'".format(*ids.sort("user", "item").row(0))
                first = min(first or text, text)
            if one is a:
                relabelled += int(np.count_nonzero(~is_in_sorted(theirs.keys, mine.keys)))
                if np.array_equal(mine.keys, theirs.keys):
                    x, y = mine.weights, theirs.weights
                    same = np.isclose(x, y, rtol=1e-5, atol=0) if weighted else (x > 0) == (y > 0)
                    reweighed += int(np.count_nonzero(~same))
            progress.advance(len(rows))
        if n_missing:
            raise RunError(
                f"{other_name} was not tested on the pairs of {name}: {n_missing:,} of {n_pairs:,} "
                f"are missing, such as {first}; train both on the same tables with the same [split]"
            )
    if relabelled:
        of_events = a.schema.event or b.schema.event
        raise RunError(
            f"{names[0]} and {names[1]} label {relabelled:,} of {n_pairs:,} test pairs differently; train "
            f"both with the same {'schema.events' if of_events else 'schema.label and schema.positive_above'}"
        )
    if reweighed:
        how = "weigh" if weighted else "give a weight above 0 to"
        raise RunError(
            f"{names[0]} and {names[1]} {how} {reweighed:,} of {n_pairs:,} test pairs differently; train both with "
            "the same schema.weight and schema.events"
        )


class _LabelledPairs(NamedTuple):
    """Distinct test pairs of some users, with labels and weights."""

    keys: Shaped[Ints, "n"]
    """2 (place of the user * number of items + place of the item) + label, rising."""
    weights: Shaped[Doubles, "n"]
    """Sums of the weights of the rows of each pair; without weights their number."""

    @classmethod
    def of(
        cls, tests: GroupedPairs, rows: Shaped[Ints, "u"], places: Shaped[Ints, "i"], n_items: int
    ) -> _LabelledPairs:
        """Return the pairs of some user rows, whose places are those in `rows`; a row of -1 has none."""
        known = np.flatnonzero(rows >= 0)
        pairs = tests.take(rows[known])
        of_rows = pair_keys(known[pairs.user], places[pairs.item], n_items) << 1 | pairs.positive
        keys = distinct_keys(of_rows)
        return cls(keys, np.bincount(np.searchsorted(keys, of_rows), pairs.weight, len(keys)).astype(np.float64))


def _rows_in(one: Dataset, other: Dataset, side: SideName) -> Shaped[Ints, "n"]:
    """Return the row in `other` of each row of `one`, -1 for an id that it lacks."""
    rows = np.full(len(one.side(side)), -1, np.int64)
    own, found = match_ids(one, other, side, np.arange(len(rows)))
    rows[own] = found
    return rows


def _text_ids(data: Dataset, side: SideName) -> pl.Series:
    """Return the ids of a side as text; 7, 7.0 and '7' are equal."""
    return canonical_ids(data.side(side).ids).cast(pl.String)
