"""Sequence feature: the interactions of a row."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import Field

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
    In training a history never contains its target: see `train.history_scope`.
    """

    side: SideName = Field(description="Tower that reads the feature: user or item.")
    kind = "sequence"
    of_model = ("width", "pooling")

    interactions: Interactions = Field("all", description="Interactions in the sequence, by label.")
    max_length: int = Field(0, ge=0, description="Maximum length, from the latest interaction. 0: unlimited.")
    pooling: PoolingSpec = Field(MEAN, description="Pooling of the embeddings, by name or section.")
    share_embedding: bool = Field(
        True, description="Sharing of the other side's id embedding. false: a table of its own."
    )

    @property
    def history(self) -> HistorySpec:
        return HistorySpec(self.name, self.side, self.interactions, self.max_length, self.share_embedding)

    @property
    def pools(self) -> PoolingSpec:
        return self.pooling

    def check(self, schema: Schema) -> None:
        other = other_side(self.side)
        if self.share_embedding and schema.id_feature(other) is None:
            raise ValueError(
                f"sequence {self.name!r} shares the {other} id embedding, but no categorical feature "
                f"reads the {other} id column; add one or set share_embedding = false"
            )

    def field(self, encoder: Encoder) -> InputField:
        return replace(super().field(encoder), kind="bag", pooling=self.pooling, sequence=True)
