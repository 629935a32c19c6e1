"""Rows and test pairs of two datasets, matched by the ids of users and items."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import polars as pl

from twotower.arrays.pieces import pieces
from twotower.arrays.sets import distinct_keys, is_in_sorted, pair_keys, places_of_rows
from twotower.arrays.types import Doubles, Ints, Shaped
from twotower.data.dataset import Dataset
from twotower.data.pairs import GroupedPairs
from twotower.data.splits import TEST
from twotower.errors import RunError
from twotower.features.side import SideName
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
    users, items = _JoinedIds.of(a, b, "user"), _JoinedIds.of(a, b, "item")
    n_pairs, n_missing, first, relabelled, reweighed = [0, 0], [0, 0], ["", ""], 0, 0
    progress = JobProgress(log, "users matched", len(users.ids))
    for part in pieces(len(users.ids), block):
        both = [
            _LabelledPairs.of(data.grouped(TEST), users.rows[i][part], items.places[i], len(items.ids))
            for i, data in enumerate((a, b))
        ]
        keys = [pairs.keys for pairs in both]
        for one, other in ((0, 1), (1, 0)):
            missing = keys[one][~is_in_sorted(keys[other] >> 1, keys[one] >> 1)]
            n_pairs[one] += len(keys[one])
            n_missing[one] += len(missing)
            if len(missing):
                user, item = np.divmod(missing >> 1, len(items.ids))
                ids = pl.DataFrame({"user": users.ids[part].gather(user), "item": items.ids.gather(item)})
                text = "user '{}' with item '{}'".format(*ids.sort("user", "item").row(0))
                first[one] = min(first[one] or text, text)
        relabelled += int(np.count_nonzero(~is_in_sorted(keys[1], keys[0])))
        if np.array_equal(keys[0], keys[1]):
            x, y = (pairs.weights for pairs in both)
            same = np.isclose(x, y, rtol=1e-5, atol=0) if weighted else (x > 0) == (y > 0)
            reweighed += int(np.count_nonzero(~same))
        progress.advance(part.stop - part.start)
    for one, other in ((0, 1), (1, 0)):
        if n_missing[one]:
            raise RunError(
                f"{names[other]} was not tested on the pairs of {names[one]}: {n_missing[one]:,} of {n_pairs[one]:,} "
                f"are missing, such as {first[one]}; train both on the same tables with the same [split]"
            )
    if relabelled:
        of_events = a.schema.event or b.schema.event
        raise RunError(
            f"{names[0]} and {names[1]} label {relabelled:,} of {n_pairs[0]:,} test pairs differently; train "
            f"both with the same {'schema.events' if of_events else 'schema.label and schema.positive_above'}"
        )
    if reweighed:
        how = "weigh" if weighted else "give a weight above 0 to"
        raise RunError(
            f"{names[0]} and {names[1]} {how} {reweighed:,} of {n_pairs[0]:,} test pairs differently; train both with "
            "the same schema.weight and schema.events"
        )


@dataclass(frozen=True)
class _JoinedIds:
    """Ids of one side that A or B has: those of A in its order, then the other ids of B."""

    ids: pl.Series
    rows: tuple[Shaped[Ints, "J"], Shaped[Ints, "J"]]
    """Row of each id in A, and in B; -1 for none."""
    places: tuple[Shaped[Ints, "a"], Shaped[Ints, "b"]]
    """Place of each row of A, and of B, in the ids."""

    @classmethod
    def of(cls, a: Dataset, b: Dataset, side: SideName) -> _JoinedIds:
        """Join the ids of a side."""
        of_a, of_b = _text_ids(a, side), _text_ids(b, side)
        in_a, in_b = match_ids(a, b, side, np.arange(len(of_a)))
        place = np.full(len(of_b), -1, np.int64)
        place[in_b] = in_a
        others = np.flatnonzero(place < 0)
        place[others] = len(of_a) + np.arange(len(others))
        places = np.arange(len(of_a)), place
        n = len(of_a) + len(others)
        return cls(
            pl.concat([of_a, of_b.gather(others)]), (places_of_rows(places[0], n), places_of_rows(place, n)), places
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


def _text_ids(data: Dataset, side: SideName) -> pl.Series:
    """Return the ids of a side as text; 7, 7.0 and '7' are equal."""
    return canonical_ids(data.side(side).ids).cast(pl.String)
