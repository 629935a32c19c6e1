"""Feature `sequence`: the interactions of a row."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from twotower.errors import did_you_mean
from twotower.features.feature import HistorySpec, InteractionHistory
from twotower.features.field import MEAN
from twotower.features.side import other_side

if TYPE_CHECKING:
    from twotower.features.feature import Feature
    from twotower.features.schema import Schema


class Sequence(InteractionHistory):
    """History of a row: the items of a user's training interactions, or the users of an item's.

    Use it to recommend by what users did. A request may give its own history, or events after the stored one. In
    training a history never holds its target: see `train.history_scope`. Sequences with a `feature` read side
    information of the same interactions, such as categories and prices. Sequences in `beside` have no own pooling.
    """

    kind = "sequence"
    of_model = ("width", "pooling", "beside")

    feature: str = Field(
        "", description="Feature of the other side to read, with one code a row, such as a brand. Empty: its ids."
    )
    share_embedding: bool = Field(
        True, description="Sharing of the embedding with the other side's feature or ids. false: a table of its own."
    )
    beside: tuple[str, ...] = Field((), description="Sequences whose embeddings are added before pooling. Empty: none.")

    @property
    def added_histories(self) -> tuple[str, ...]:
        return self.beside

    @property
    def history(self) -> HistorySpec:
        common = self.name, self.side, self.interactions, self.max_length
        return HistorySpec(*common, self.share_embedding, self.feature)

    def check(self, schema: Schema) -> None:
        _check_added(self, schema)
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
                    f"sequence {self.name!r} reads feature '{self.feature}', which has not one code a row; name a "
                    "categorical feature, or a numeric one with buckets"
                )
        elif self.share_embedding and schema.code_feature(other) is None:
            raise ValueError(
                f"sequence {self.name!r} shares the {other} id embedding, but no categorical feature "
                f"reads the {other} id column; add one or set share_embedding = false"
            )


def _check_added(host: Feature, schema: Schema) -> None:
    """Raise ValueError unless the sequences in `beside` have the same interactions and width, and no other host."""
    sequences = {f.name: f for f in schema.side(host.side) if f.history}
    for name in host.added_histories:
        where = f"beside of sequence {host.name!r} names {name!r}"
        added = sequences.get(name)
        if added is None or added is host:
            others = [n for n in sequences if n != host.name]
            raise ValueError(
                f"{where}, which is no other sequence of the {host.side}s{did_you_mean(name, others)} (found: "
                f"{', '.join(others) or 'none'}); name one of them, or add it"
            )
        if host.added_histories.count(name) > 1:
            raise ValueError(f"{where} twice; name it once")
        if (first := schema.host_of(added)) is not host:
            assert first is not None
            raise ValueError(f"{where}, which is added to {first.name!r} already; add another sequence of its feature")
        if added.added_histories:
            raise ValueError(f"{where}, which has a beside of its own; name its sequences in {host.name!r}")
        if added.pools != MEAN:
            raise ValueError(f"{where}, which is pooled with {host.name!r}; leave out the pooling of {name!r}")
        if added.width != host.width:
            raise ValueError(f"{where}, of width {added.width} and not {host.width}; give both the same width")
        for option in ("interactions", "max_length"):
            if (own := getattr(host.history, option)) != (other := getattr(added.history, option)):
                raise ValueError(f"{where}, whose {option} is {other!r}, not {own!r}; give both the same interactions")
