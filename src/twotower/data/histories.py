"""Histories of users and items, from the interactions of a dataset."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from twotower.arrays.ragged import Ragged
from twotower.arrays.types import Bools, Codes, Ints
from twotower.features.feature import HistoryFacts, HistorySpec
from twotower.features.side import other_side

if TYPE_CHECKING:
    from twotower.data.dataset import Dataset


def history_of(dataset: Dataset, history: HistorySpec, among: Bools) -> Ragged:
    """Return the history of each row of its side, oldest first, from the interactions of a dataset in the mask `among`
    (n,)."""
    keep = dataset.sort_by_time(among & history.holds(dataset.pairs.positive))
    own, other = dataset.pairs.user, dataset.pairs.item
    if history.side == "item":
        own, other = other, own
    n = len(dataset.side(history.side))
    if history.codes is not None:
        found = Ragged.from_pairs(own[keep], np.zeros(len(keep), np.int32), n, keep).keep_last(history.max_length)
        assert found.source is not None
        types, times = dataset.pairs.event, dataset.times
        return replace(found, values=history.codes(facts_of(found, found.source, types, times)))
    read = other_side(history.side)
    rows = dataset.input_rows(read, other[keep], keep)  # the features of an interaction are those of its time
    codes = dataset.encoders.history_codes(history, dataset.side(read).by_version().frame)
    return Ragged.from_pairs(own[keep], codes[rows], n, keep).keep_last(history.max_length)


def facts_of(histories: Ragged, places: Ints, types: Codes | None, times: Ints | None) -> HistoryFacts:
    """Return the facts of the interactions of some histories, which stand at `places` (L,) of `types` (n,) and `times`
    (n,)."""
    first = np.zeros(len(places), bool)
    first[histories.offsets[:-1][histories.lengths > 0]] = True
    return HistoryFacts(
        first,
        None if types is None else types[places].astype(np.int32, copy=False),
        None if times is None else times[places],
    )
