"""Positives of users in one context: what `mask_positives` leaves out, and no drawn pair is, where the schema has features of
the context."""

from __future__ import annotations

import numpy as np

from twotower.arrays.pieces import pieces
from twotower.arrays.ragged import Column, Ragged, run_indices
from twotower.arrays.sets import distinct_keys, is_in_sorted, pair_keys
from twotower.arrays.types import Bools, Codes, Ints, Shaped
from twotower.data.dataset import Dataset

BLOCK_PAIRS = 2**15
"""Drawn pairs that are compared with the positives of their users at a time."""


class ContextPositives:
    """Finds the training positives of users in the context of one of their interactions. In another context an item that the
    user likes may be wrong, so it stays a candidate there."""

    def __init__(self, dataset: Dataset) -> None:
        self._positives, self._items = dataset.positives_by_user, dataset.pairs.item
        self._users = dataset.pairs.user
        self._context, self._n_items = dataset.context, len(dataset.items)

    def __call__(
        self, users: Shaped[Codes, "B"], interactions: Shaped[Ints, "B"]
    ) -> tuple[Shaped[Ints, "L"], Shaped[Ints, "B"]]:
        """Return the distinct item rows of each user's positives that have the context of the user's interaction, one user after
        another, and their numbers."""
        at, lengths = self._positives.indices(users)
        rows, owner = self._positives.values[at].astype(np.int64), np.repeat(np.arange(len(users)), lengths)
        for column in self._context.values():
            same = _equal(column, rows, interactions[owner])
            rows, owner = rows[same], owner[same]
        found, items = np.divmod(distinct_keys(pair_keys(owner, self._items[rows], self._n_items)), self._n_items)
        return items, np.bincount(found, minlength=len(users))

    def include(self, interactions: Shaped[Ints, "n"], items: Shaped[Ints, "n"]) -> Shaped[Bools, "n"]:
        """Return a mask: true where the user of an interaction has an item among the positives of its context."""
        found = np.empty(len(items), np.bool_)
        for block in pieces(len(items), BLOCK_PAIRS):
            rows = interactions[block]
            positives, lengths = self(self._users[rows], rows)
            at = np.arange(len(rows))
            members = pair_keys(np.repeat(at, lengths), positives, self._n_items)
            found[block] = is_in_sorted(members, pair_keys(at, items[block], self._n_items))
        return found


def _equal(column: Column, a: Shaped[Ints, "n"], b: Shaped[Ints, "n"]) -> Shaped[Bools, "n"]:
    """Return a mask: true where the rows `a` and `b` of a column are equal."""
    if not isinstance(column, Ragged):
        same: Bools = np.equal(column[a], column[b])
        return same if same.ndim == 1 else np.logical_and.reduce(same, 1)
    lengths, others = (column.offsets[rows + 1] - column.offsets[rows] for rows in (a, b))
    same = lengths == others
    lengths = np.where(same, lengths, 0)
    values = (column.values[run_indices(column.offsets[rows], lengths)] for rows in (a, b))
    differs = np.not_equal(*values)
    same[np.repeat(np.arange(len(a)), lengths)[differs]] = False
    return same
