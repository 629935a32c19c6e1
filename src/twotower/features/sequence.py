"""Sequence feature: the interactions of a row."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import Field

from twotower.errors import did_you_mean
from twotower.features.encoder import Encoder
from twotower.features.feature import Feature, HistorySpec, Interactions
from twotower.features.field import InputField
from twotower.features.pooling_spec import MEAN, PoolingSpec
from twotower.features.side import SideName, other_side

if TYPE_CHECKING:
    from twotower.features.schema import Schema


class Sequence(Feature):
    """The row's own training interactions, a history: for a user the items, for an item the users.

    Use it to recommend by what users did: a request may give a history of its own, and events after the stored one.
    In training a history never contains its target: see `train.history_scope`. Beside the ids, further sequences with a
    `feature` read side information of the same interactions, such as their categories and prices.
    """

    side: SideName = Field(description="Tower that reads the feature: user or item.")
    kind = "sequence"
    of_model = ("width", "pooling")

    interactions: Interactions = Field("all", description="Interactions in the sequence, by label.")
    max_length: int = Field(0, ge=0, description="Maximum length, from the latest interaction. 0: unlimited.")
    pooling: PoolingSpec = Field(MEAN, description="Pooling of the embeddings, by name or section.")
    feature: str = Field(
        "",
        description="Feature of the other side whose codes are the sequence, categorical or numeric with buckets: a category, a "
        "brand, a price. Empty: its ids.",
    )
    share_embedding: bool = Field(
        True,
        description="Sharing of the other side's embedding of this feature, or of its ids. false: a table of its own.",
    )

    @property
    def history(self) -> HistorySpec:
        share = self.share_embedding
        return HistorySpec(self.name, self.side, self.interactions, self.max_length, share, self.feature)

    @property
    def pools(self) -> PoolingSpec:
        return self.pooling

    def check(self, schema: Schema) -> None:
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

    def field(self, encoder: Encoder) -> InputField:
        return replace(super().field(encoder), kind="bag", pooling=self.pooling, sequence=True)
