"""Sequence feature: the interactions of a row."""

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


def check_beside(host: Feature, schema: Schema) -> None:
    """Raise ValueError unless the sequences beside a sequence hold the same interactions, in embeddings of the same width, and
    stand beside no other."""
    sequences = {f.name: f for f in schema.side(host.side) if f.history}
    for name in host.holds_beside:
        where = f"sequence {host.name!r} has {name!r} beside it"
        beside = sequences.get(name)
        if beside is None or beside is host:
            others = [n for n in sequences if n != host.name]
            raise ValueError(
                f"{where}, which is no other sequence of the {host.side}s{did_you_mean(name, others)} (found: "
                f"{', '.join(others) or 'none'}); name one of them, or add it"
            )
        if host.holds_beside.count(name) > 1:
            raise ValueError(f"{where} twice; name it once")
        if (first := schema.host_of(beside)) is not host:
            assert first is not None
            raise ValueError(
                f"{where}, which stands beside {first.name!r} already; add another sequence of the same feature"
            )
        if beside.holds_beside:
            raise ValueError(f"{where}, which has sequences beside it of its own; name them in {host.name!r}")
        if beside.pools != MEAN:
            raise ValueError(f"{where}, which is not pooled on its own; leave out the pooling of {name!r}")
        if beside.width != host.width:
            raise ValueError(f"{where}, of width {beside.width} and not {host.width}; give both the same width")
        a, b = host.history, beside.history
        assert a is not None
        assert b is not None
        for option, own, other in (
            ("interactions", a.interactions, b.interactions),
            ("max_length", a.max_length, b.max_length),
        ):
            if own != other:
                raise ValueError(
                    f"{where}, whose {option} is {other!r} and not {own!r}; give both the same interactions"
                )
