"""The items that an answer is made of: the index of their vectors, their ids and titles."""

from __future__ import annotations

import time
from dataclasses import dataclass

from twotower.arrays.types import Floats, Ints, ItemId
from twotower.data.ids import TextColumn
from twotower.index import Index
from twotower.retrieval.request import Answer, Item, Method, Source


@dataclass(frozen=True)
class Catalogue:
    """The items of a bundle or of a run. Ranks them for a vector, and lists ranked rows in an answer."""

    index: Index
    ids: TextColumn[ItemId]
    titles: TextColumn[str]
    bundle_id: str = ""
    """Empty for the items of a run."""

    def rank(self, vector: Floats, k: int, excluded: Ints, allowed: Ints | None = None) -> tuple[Ints, Floats]:
        """Return the `k` rows of highest score for a vector (1, D) among the `allowed` ones without the `excluded`, and the
        scores; rows of -1 are padding. Raises Unavailable if the server of the index does not answer."""
        rows, scores = self.index.search(vector, k, allowed=allowed, banned=[excluded])
        return rows[0], scores[0]

    def answer(
        self,
        ranked: tuple[Ints, Floats],
        k: int,
        started: float,
        method: Method = 1,
        source: Source = "model",
        unknown: list[str] | None = None,
    ) -> Answer:
        """Return the answer of ranked rows (n,) with their scores (n,) to a question for `k` items, asked when
        `time.perf_counter` said `started`."""
        found = zip(ranked[0].tolist(), ranked[1].tolist(), strict=True)
        ids, titles = self.ids.column, self.titles.column
        items = [Item(ids[row], score, titles[row]) for row, score in found if row >= 0]
        spent = (time.perf_counter() - started) * 1e3
        return Answer(items, self.bundle_id, method, source, round(spent, 3), len(items) < k, unknown or [])
