"""Sequence feature: the interactions of a row."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from twotower.errors import did_you_mean
from twotower.features.beside import check_beside
from twotower.features.feature import HistorySpec
from twotower.features.interaction_history import InteractionHistory
from twotower.features.side import other_side

if TYPE_CHECKING:
    from twotower.features.schema import Schema


class Sequence(InteractionHistory):
    """The row's own training interactions, a history: for a user the items, for an item the users.

    Use it to recommend by what users did: a request may give a history of its own, and events after the stored one.
    In training a history never contains its target: see `train.history_scope`. Beside the ids, further sequences with a
    `feature` read side information of the same interactions, such as their categories and prices.
    """

    kind = "sequence"
    of_model = ("width", "pooling", "beside")

    feature: str = Field(
        "",
        description="Feature of the other side whose codes are the sequence, categorical or numeric with buckets: a category, a "
        "brand, a price. Empty: its ids.",
    )
    share_embedding: bool = Field(
        True,
        description="Sharing of the other side's embedding of this feature, or of its ids. false: a table of its own.",
    )

    beside: tuple[str, ...] = Field(
        (),
        description="Sequences of the same interactions whose embeddings are added to those of this one, at each interaction, "
        "before they are pooled. They have no pooling of their own. Empty: none.",
    )

    @property
    def holds_beside(self) -> tuple[str, ...]:
        return self.beside

    @property
    def history(self) -> HistorySpec:
        share = self.share_embedding
        return HistorySpec(self.name, self.side, self.interactions, self.max_length, share, self.feature)

    def check(self, schema: Schema) -> None:
        check_beside(self, schema)
        other = other_side(self.side)
        if self.feature:
            known = [f.name for f in schema.side(other)]
            if self.feature not in known:
                raise ValueError(
                    f"sequence {self.name!r} reads feature '{self.feature}', which the {other}s do not have"
                    f"{did_you_mean(self.feature, known)} (found: {', '.join(known)}); name another one, or add it"
                )
            if not schema.code_feature(other, self.feature):
                raise ValueError(
                    f"sequence {self.name!r} reads feature '{self.feature}', of which a row has not one code; name a categorical "
                    "feature, or a numeric one with buckets"
                )
        elif self.share_embedding and schema.code_feature(other) is None:
            raise ValueError(
                f"sequence {self.name!r} shares the {other} id embedding, but no categorical feature "
                f"reads the {other} id column; add one or set share_embedding = false"
            )
