"""Own items: those of a user's history, with scores that grow with how often and how lately the user took them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from twotower.arrays.ragged import Ragged, offsets_of, run_indices
from twotower.arrays.sets import pair_keys
from twotower.arrays.types import Codes, Floats, Ints, Shaped
from twotower.errors import RunError
from twotower.features.values import UNKNOWN

if TYPE_CHECKING:
    from twotower.data.dataset import Dataset
    from twotower.features.feature import HistorySpec


class Recency(NamedTuple):
    """Weight of the n-th latest interaction of a history, rate^(n - 1) n^-exponent; at (1, 0) all count alike."""

    rate: float = 1.0
    """0 to 1."""
    exponent: float = 0.0
    """0 or more."""


class OwnItems(NamedTuple):
    """Items of one user, or of several one after another."""

    rows: Shaped[Ints, "L"]
    """Item rows, ascending for each user."""
    scores: Shaped[Floats, "L"]


class HistoryTerm(NamedTuple):
    """Term of a score by which an item of a user's history has factor * log(1 + the sum over its interactions of the
    weight of its code times the weight of the recency)."""

    history: str
    """Name of the feature."""
    weights: Shaped[Floats, "codes"]
    factor: float = 1.0
    recency: Recency = Recency()


def own_items(
    histories: Ragged, rows: Shaped[Ints, "codes"], term: HistoryTerm, n_items: int
) -> tuple[Shaped[Ints, "_"], OwnItems]:
    """Return offsets (U + 1,) and items of the histories of U users, rows of codes, oldest first, with their scores by
    a term. `rows` has the item of each code, -1 for none."""
    codes, lengths = histories.values, histories.lengths
    places = run_indices(np.zeros(len(lengths), np.int64), lengths)
    later = (np.repeat(lengths, lengths) - places - 1).astype(np.float64)  # 0 for the latest
    rate, exponent = term.recency
    owner, latest = histories.owners, rate**later * (later + 1) ** -exponent
    item = rows[codes]
    known = item >= 0
    keys, which = np.unique(pair_keys(owner[known], item[known], n_items), return_inverse=True)
    sums = np.bincount(which, term.weights[codes[known]] * latest[known], len(keys))
    scores = (term.factor * np.log1p(sums)).astype(np.float32)
    users, items = np.divmod(keys, n_items)
    return offsets_of(np.bincount(users, minlength=len(lengths))), OwnItems(items, scores)


def rows_of_codes(dataset: Dataset, history: HistorySpec, n_codes: int) -> Shaped[Ints, "codes"]:
    """Return the item row of each code of a history of the users, -1 for the unknown one and those of no item."""
    codes = dataset.encoders.history_codes(history, dataset.items.frame)
    rows = np.full(n_codes, -1)
    rows[codes] = np.arange(len(codes))
    rows[UNKNOWN] = -1
    return rows


@dataclass(frozen=True)
class HistoryScores:
    """A term of a bundle, with the stored histories of its users."""

    term: HistoryTerm
    stored: Ragged
    """Codes of each user row."""
    rows: Shaped[Ints, "codes"]
    """Item row of each code, -1 for none."""
    n_items: int

    @classmethod
    def of(cls, dataset: Dataset, stored: Ragged, term: HistoryTerm) -> HistoryScores:
        """Take a term. Raises RunError for another number of weights than the history has codes."""
        name = term.history
        spec = next((h for h in dataset.schema.histories("user") if h.name == name), None)
        field = next((f for f in dataset.encoders.fields("user") if f.name == name), None)
        if spec is None or field is None or spec.feature or spec.codes or len(term.weights) != field.rows:
            raise RunError(f"{len(term.weights):,} weights are not those of the codes of a history '{name}'")
        return cls(term, stored, rows_of_codes(dataset, spec, field.rows), len(dataset.items))

    def of_codes(self, codes: Shaped[Codes, "L"]) -> OwnItems:
        """Return the items of one history, the codes (n,), oldest first."""
        return self._of(Ragged(codes.astype(np.int32), np.array([0, len(codes)])))[0]

    def of_users(self, users: Shaped[Ints, "B"]) -> list[OwnItems]:
        """Return the items of the stored histories of some user rows."""
        return self._of(self.stored.take(users))

    def _of(self, histories: Ragged) -> list[OwnItems]:
        offsets, own = own_items(histories, self.rows, self.term, self.n_items)
        ends = offsets[1:-1]
        return [OwnItems(*part) for part in zip(np.split(own.rows, ends), np.split(own.scores, ends), strict=True)]
