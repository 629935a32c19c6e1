"""Scorer `repeats`: the items that a user has taken before."""

from __future__ import annotations

from typing import TYPE_CHECKING

from twotower.features.sequence import Sequence
from twotower.scorers.scorer import AddedScorer, Addition

if TYPE_CHECKING:
    from twotower.features.schema import Schema


class Repeats(AddedScorer):
    """Own counts: an item of the user's history scores by how often and how lately the user took it, times the share of
    its interactions that repeat an earlier one (Hu et al. 2020, "Modeling Personalized Item Frequency Information for
    Next-basket Recommendation").

    Use it where users take items again: `schema.duplicates = "keep"`, `evaluation.repeats = "allow"`. No vector holds
    these scores; a retriever adds them to the user's own items.
    """

    kind = "repeats"

    def addition(self, schema: Schema, name: str) -> Addition:
        history = Sequence(name=name, side="user", interactions="positive", share_embedding=False)
        return Addition((history,), model={"own_counts": name})
