"""Interactions in the sequences of a side: their positions, and the prefixes before them."""

from __future__ import annotations

import numpy as np

from twotower.arrays.ragged import Ragged
from twotower.arrays.sets import find_in_sorted
from twotower.arrays.types import Ints, Shaped


class TimelinePositions:
    """Positions of interactions in a sequence column, and lengths of the prefixes before them."""

    def __init__(self, ragged: Ragged, timeline: Ragged | None, by_user: bool) -> None:
        assert ragged.source is not None
        self._ragged, self._source = ragged, ragged.source
        self._place: Ints | None = None
        self._known: Ints | None = None
        if by_user:  # the sources rise, so a binary search replaces the array of positions
            return
        self._place = np.full(int(self._source.max(initial=-1)) + 1, -1, np.int64)
        self._place[self._source] = np.arange(len(self._source))
        if timeline is not None:
            self._known = _counts_before(timeline, self._place)

    def find(self, interactions: Shaped[Ints, "n"]) -> Shaped[Ints, "found"]:
        """Return the positions of those interactions that are in the column."""
        if self._place is None:
            # With two types numpy would convert all sources.
            places, known = find_in_sorted(self._source, interactions.astype(self._source.dtype))
            return places[known]
        found = self._place[interactions[interactions < len(self._place)]]
        return found[found >= 0]

    def prefix_lengths(self, rows: Shaped[Ints, "U"], interactions: Shaped[Ints, "U"]) -> Shaped[Ints, "U"]:
        """Return the number of values of each row that are older than the interaction of that row."""
        if self._place is None:
            wanted = interactions.astype(self._source.dtype)
            return np.searchsorted(self._source, wanted) - self._ragged.offsets[rows]
        assert self._known is not None, "created without a timeline"
        return self._known[interactions]


def _counts_before(timeline: Ragged, position: Shaped[Ints, "_"]) -> Shaped[Ints, "n"]:
    """Return for each interaction, by index, the number of earlier interactions of its row's timeline that have a
    `position`."""
    numbers = timeline.values
    known = np.zeros(len(numbers), bool)
    inside = numbers < len(position)
    known[inside] = position[numbers[inside]] >= 0
    before = np.cumsum(known) - known
    starts = timeline.offsets[:-1]
    before -= np.repeat(np.append(before, known.sum())[starts], timeline.lengths)
    out = np.zeros(int(numbers.max(initial=-1)) + 1, np.int64)
    out[numbers] = before
    return out
