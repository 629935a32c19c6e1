"""Scorer `trending`: what is popular now."""

from __future__ import annotations

from typing import TYPE_CHECKING

from twotower.scorers.scorer import AddedScorer, Addition

if TYPE_CHECKING:
    from twotower.features.schema import Schema


class Trending(AddedScorer):
    """Recent popularity: a bias of each item by its count in the latest rows of the log, its count in all rows, and the
    rows since its first (Ji et al. 2020, "A Re-visit of the Popularity Baseline in Recommender Systems").

    Use it where what is popular changes, as in news. A log needs times.
    """

    kind = "trending"

    def addition(self, schema: Schema, name: str) -> Addition:
        return Addition(model={"recent_popularity": True})
